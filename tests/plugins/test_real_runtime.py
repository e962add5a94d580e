# SPDX-License-Identifier: Apache-2.0
"""The plugins in NVIDIA's own code: the lean runtimes of TensorRT 10 and 11, and the bindings.

`make test` installs both runtimes from the package index into ``.venv/tensorrt``. They need no
GPU for what is done here: load the library by either protocol, list creators, create plugins. Every
program runs in a process of its own, whose end is a part of the test. Without a runtime the tests
are skipped, or fail where ``QUAROT_REQUIRE`` names ``lean``.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from quarot_onnx.plugins import build

RUNTIMES = Path(sys.prefix) / "tensorrt"
NAMES = ["Hadamard", "HadamardHeads", "Int4Gemm", "KvAppend", "KvAttention", "QuantizeInt4"]
LOADS = ["load", "dlopen", "dlopen+load", "load+dlopen", "load+load", "dlopen+dlopen+load+load"]


@pytest.fixture(params=["lean-10", "lean-11"])
def lean(request: pytest.FixtureRequest) -> Path:
    """The directory of a lean runtime."""
    return runtime(request.param)


def runtime(name: str) -> Path:
    directory = RUNTIMES / name
    if not (directory / "tensorrt_lean_libs").is_dir():
        reason = f"no {directory}: make test installs it, where there is a package index"
        if "lean" in os.environ.get("QUAROT_REQUIRE", "").split(","):
            pytest.fail(reason)
        pytest.skip(reason)
    return directory


def run(program: str, *arguments: object, **environment: str) -> str:
    """What a Python program prints; it has to end with status 0."""
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, (done.returncode, done.stdout, done.stderr)
    return done.stdout + done.stderr


LEAN = """
import ctypes, sys
import numpy as np
runtime, library, steps = sys.argv[1:]
sys.path.insert(0, runtime)
import tensorrt_lean_bindings as trt

registry = trt.get_plugin_registry()
held = []
for step in steps.split("+"):
    if step == "load":
        held.append(registry.load_library(library))
    else:
        held.append(ctypes.CDLL(library))
    print(step, held[-1] is not None)
print(sorted(c.name for c in registry.all_creators if c.plugin_namespace == "quarot"))

def field(name, value):
    if isinstance(value, float):
        return trt.PluginField(name, np.array([value], np.float32), trt.PluginFieldType.FLOAT32)
    return trt.PluginField(name, np.array(value, np.int32).ravel(), trt.PluginFieldType.INT32)

def create(name, phase, **attributes):
    creator = registry.get_creator(name, "1", "quarot")
    fields = trt.PluginFieldCollection([field(k, v) for k, v in attributes.items()])
    return creator.create_plugin("layer", fields, phase)

complete = {
    "Hadamard": {"factors": [12, 64]},
    "HadamardHeads": {"factors": [8]},
    "QuantizeInt4": {"bits": 4, "clip_ratio": 0.9, "factors": [128]},
    "Int4Gemm": {"dtype": 10, "weight_layout": 0x51520201},
    "KvAppend": {"bits": 4, "clip_ratio": 0.95, "rotate": 1},
    "KvAttention": {"scale": 0.125},
}
for name, attributes in complete.items():
    for phase in (trt.TensorRTPhase.BUILD, trt.TensorRTPhase.RUNTIME):
        plugin = create(name, phase, **attributes)
        core = plugin.get_capability_interface(trt.PluginCapabilityType.CORE)
        made = plugin.get_capability_interface(trt.PluginCapabilityType.BUILD)
        assert core.plugin_name == name and core.plugin_namespace == "quarot", core.plugin_name
        assert made.num_outputs == {"QuantizeInt4": 2, "KvAppend": 3}.get(name, 1)
        assert made.timing_cache_id.startswith(f"quarot.{name}.1."), made.timing_cache_id
print("refused", create("QuantizeInt4", trt.TensorRTPhase.BUILD, bits=8))
print("fields", [f.name for f in registry.get_creator("KvAppend", "1", "quarot").field_names])
print("other namespace", registry.get_creator("KvAppend", "1", ""))
"""


@pytest.mark.parametrize("steps", LOADS)
def test_the_lean_runtime_lists_and_creates_every_plugin(lean, library_path, steps) -> None:
    printed = run(LEAN, lean, library_path, steps)
    for step in steps.split("+"):
        if f"{step}+{step}" not in steps:  # to load a file again gives no handle, and no harm
            assert f"{step} True" in printed
    assert str(NAMES) in printed
    assert "refused None" in printed
    assert "QuantizeInt4 (layer): bits = 8; allowed: 4" in printed
    assert "fields ['bits', 'clip_ratio', 'rotate']" in printed
    assert "other namespace None" in printed


def test_the_cuda_library_loads_without_a_gpu(lean, cuda_library_path) -> None:
    printed = run(LEAN, lean, cuda_library_path, "dlopen+load")
    assert str(NAMES) in printed
    assert "refused None" in printed


def test_registering_itself_can_be_switched_off(lean, library_path) -> None:
    program = LEAN[: LEAN.index("def field")]
    printed = run(program, lean, library_path, "dlopen", QUAROT_PLUGINS_AUTOREGISTER="0")
    assert "\n[]\n" in printed
    printed = run(program, lean, library_path, "dlopen+load", QUAROT_PLUGINS_AUTOREGISTER="0")
    assert str(NAMES) in printed


def test_a_library_loaded_before_tensorrt_registers_when_asked(lean, library_path) -> None:
    program = """
import ctypes, sys
runtime, path = sys.argv[1:]
library = ctypes.CDLL(path)
print("alone", library.quarotRegisterPlugins(None))
sys.path.insert(0, runtime)
import tensorrt_lean_bindings as trt
print("registered", library.quarotRegisterPlugins(None), library.quarotRegisterPlugins(None))
creators = trt.get_plugin_registry().all_creators
print(sorted(c.name for c in creators if c.plugin_namespace == "quarot"))
"""
    printed = run(program, lean, library_path)
    assert "alone -1" in printed
    assert "registered 6 0" in printed
    assert str(NAMES) in printed


def test_python_may_hold_creators_when_the_library_is_given_back(lean, library_path) -> None:
    program = """
import sys
runtime, path = sys.argv[1:]
sys.path.insert(0, runtime)
import tensorrt_lean_bindings as trt
registry = trt.get_plugin_registry()
handle = registry.load_library(path)
creators = [c for c in registry.all_creators if c.plugin_namespace == "quarot"]
registry.deregister_library(handle)
print(len(creators), [c.name for c in creators][0], len(registry.all_creators))
print("again", registry.load_library(path) is not None)
print(sum(c.plugin_namespace == "quarot" for c in registry.all_creators))
"""
    printed = run(program, lean, library_path)
    assert "6 Hadamard" in printed
    assert "again True\n6\n" in printed


@pytest.fixture(scope="module")
def bindings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment in which ``import tensorrt`` gives the real bindings, over stubs."""
    lean = runtime("lean-11")
    directory = tmp_path_factory.mktemp("bindings")
    nvinfer = next((lean / "tensorrt_lean_libs").glob("libnvinfer_lean.so.*"))
    source = Path(__file__).parent / "stubs.c"
    for macro, name, extra in (
        ("STUB_NVINFER", "libnvinfer.so.11", ["-Wl,--no-as-needed", str(nvinfer)]),
        ("STUB_PLUGIN", "libnvinfer_plugin.so.11", []),
        ("STUB_PARSER", "libnvonnxparser.so.11", []),
    ):
        command = ["gcc", "-shared", "-fPIC", f"-D{macro}", str(source), f"-Wl,-soname,{name}"]
        subprocess.run([*command, *extra, "-o", str(directory / name)], check=True)
    package = directory / "site" / "tensorrt"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(
        "import sys, tensorrt_bindings\nsys.modules[__name__] = tensorrt_bindings\n"
    )
    return {
        "PYTHONPATH": f"{package.parent}:{lean}",
        "LD_LIBRARY_PATH": f"{directory}:{nvinfer.parent}",
    }


BINDINGS = """
import os, sys
import tensorrt as trt
from polygraphy.backend.trt import LoadPlugins

assert trt.__version__.startswith("11."), trt.__version__
loader = LoadPlugins(plugins=[sys.argv[1]])
loader()
registry = trt.get_plugin_registry()
def names():
    return sorted(c.name for c in registry.all_creators if c.plugin_namespace == "quarot")
print("polygraphy", names())
registry.load_library(sys.argv[1])
print("both", names())
creator = registry.get_creator("QuantizeInt4", "1", "quarot")
fields = trt.PluginFieldCollection([])
plugin = creator.create_plugin("q", fields, trt.TensorRTPhase.BUILD)
print("created", plugin.get_capability_interface(trt.PluginCapabilityType.CORE).plugin_name)
"""


def test_polygraphy_s_plugin_loading_registers_with_the_real_bindings(
    bindings, library_path
) -> None:
    printed = run(BINDINGS, library_path, **bindings)
    assert f"polygraphy {NAMES}" in printed
    assert f"both {NAMES}" in printed
    assert "created QuantizeInt4" in printed


FAKE = """
import ctypes, sys
tensorrt, path, protocol = sys.argv[1:]
fake = ctypes.CDLL(tensorrt)
library = ctypes.CDLL(path)
fake.fakeLog.restype = ctypes.c_char_p
fake.fakeFinder.restype = ctypes.c_void_p
print("registered", fake.fakeCreators())
if protocol == "load":
    library.setLoggerFinder(ctypes.c_void_p(fake.fakeFinder()))
fake.fakeCreate()
print("logged", fake.fakeLog().decode())
library.getCreators.restype = ctypes.c_void_p
library.getCreators(ctypes.byref(ctypes.c_int32()))
print("left", fake.fakeCreators())
"""


@pytest.mark.parametrize("protocol", ["dlopen", "load"])
@pytest.mark.parametrize("major", [10, 11])
def test_messages_reach_the_logger_of_either_version(
    tmp_path, library_path, major, protocol
) -> None:
    fake = tmp_path / f"libnvinfer.so.{major}"
    here, headers = Path(__file__).parent, build.source_directory() / "trt"
    command = ["g++", "-std=c++17", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    command += [f"-DFAKE_MAJOR={major}", f"-I{headers}", str(here / "fake_tensorrt.cpp")]
    subprocess.run([*command, f"-Wl,-soname,{fake.name}", "-o", str(fake)], check=True)
    printed = run(FAKE, fake, library_path, protocol)
    assert "registered 6" in printed
    assert "logged 1 QuantizeInt4 (q): bits = 3; allowed: 4" in printed
    assert "left 0" in printed
