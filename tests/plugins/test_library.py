# SPDX-License-Identifier: Apache-2.0
"""The library as a file: symbols, headers, installing, verifying, finding; ``doctor``."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from quarot_onnx import doctor
from quarot_onnx.errors import MissingDependencyError
from quarot_onnx.plugins import build, library

ENTRIES = {"getCreators", "setLoggerFinder", "quarotRegisterPlugins", "quarotDescribePlugins"}
BARE = {"libc.so.6", "libm.so.6", "libdl.so.2", "libpthread.so.0", "librt.so.1"} | {
    *("libstdc++.so.6", "libgcc_s.so.1", "ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1"),
}
"""What every machine that can run TensorRT has."""


def output(*command: object) -> str:
    return subprocess.run([*map(str, command)], check=True, capture_output=True, text=True).stdout


def require_plain(path: Path) -> None:
    """A library with the entry points alone, that a bare machine can load and nothing unloads."""
    exported = {
        line.split()[-1] for line in output("nm", "-D", "--defined-only", path).splitlines()
    }
    assert exported == ENTRIES
    dynamic = output("readelf", "-d", path)
    assert set(re.findall(r"NEEDED.*\[(.*)\]", dynamic)) <= BARE
    assert "NODELETE" in dynamic
    missing = output("nm", "-D", "--undefined-only", path)
    assert not re.search(r" [Uvw] (_ZN8nvinfer1|cuda|cu[A-Z]|qr_|getPluginRegistry)", missing)


def test_the_library_exports_its_entry_points_and_needs_nothing_special(library_path) -> None:
    require_plain(library_path)


def test_the_cuda_library_exports_and_needs_the_same(cuda_library_path) -> None:
    require_plain(cuda_library_path)
    described = json.loads(output(sys.executable, "-c", DESCRIBE, cuda_library_path))
    assert described["backend"] == "cuda"
    assert described["architectures"] == "80"


DESCRIBE = """
import ctypes, sys
library = ctypes.CDLL(sys.argv[1])
library.quarotDescribePlugins.restype = ctypes.c_char_p
print(library.quarotDescribePlugins().decode())
"""


def test_an_undefined_symbol_stops_the_link() -> None:
    makefile = (build.source_directory() / "Makefile").read_text()
    assert makefile.count("-z,defs") == 1
    assert makefile.count("$(PLUGIN_LINKS)") == 2


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty ``build/plugins``."""
    monkeypatch.delenv(library.LIBRARY_VARIABLE, raising=False)
    monkeypatch.setattr(library, "directory", lambda: tmp_path / "plugins")
    return tmp_path / "plugins"


@pytest.fixture
def installed(place: Path) -> Path:
    return library.install(build.build_plugins("cpu"))


def test_an_installed_library_is_found_and_described(installed) -> None:
    found = library.find("cpu")
    assert found.path == installed
    assert found.backend == "emulation"
    assert found.architectures == ("cpu",)
    assert found.is_current
    assert set(found.plugins) >= {"Int4Gemm", "KvAppend"}
    assert library.load("cpu").sha256 == found.sha256
    assert {p.name for p in installed.parent.iterdir()} == {
        installed.name,
        f"{installed.stem}.json",
    }


def test_a_missing_library_is_one_line_that_says_what_to_run(place) -> None:
    with pytest.raises(
        MissingDependencyError, match=r"^plugins: there is no .*; run make plugins,"
    ):
        library.find()


def test_a_changed_library_is_not_loaded(installed) -> None:
    with installed.open("ab") as file:
        file.write(b"\0")
    with pytest.raises(MissingDependencyError, match=r"sha256 is .* the file was changed"):
        library.find("cpu")


def test_a_library_without_its_description_is_refused(installed) -> None:
    installed.with_suffix(".json").unlink()
    with pytest.raises(MissingDependencyError, match="its description cannot be read"):
        library.find("cpu")


def test_a_library_of_another_abi_is_refused(installed, monkeypatch) -> None:
    monkeypatch.setattr(library, "ABI_VERSION", 99)
    with pytest.raises(MissingDependencyError, match="ABI version is 3 and this package has 99"):
        library.find("cpu")


def test_a_file_that_is_no_plugin_library_is_refused(place) -> None:
    kernels = build.build("cpu")
    with pytest.raises(MissingDependencyError, match="cannot be loaded as a plugin library"):
        library.install(kernels)


def test_a_library_of_other_sources_says_so(installed) -> None:
    description = installed.with_suffix(".json")
    stated = json.loads(description.read_text())
    description.write_text(json.dumps(stated | {"sources": "0"}))
    assert not library.find("cpu").is_current


def test_a_variable_names_a_library_elsewhere(installed, monkeypatch, tmp_path) -> None:
    elsewhere = tmp_path / "other"
    shutil.copytree(installed.parent, elsewhere)
    monkeypatch.setenv(library.LIBRARY_VARIABLE, str(elsewhere / installed.name))
    assert library.find().path == elsewhere / installed.name


@pytest.mark.parametrize(
    ("architectures", "capability", "runs"),
    [
        ("80 86 89 90a 120", 80, True),
        ("80 86 89 90a 120", 87, True),
        ("80 86 89 90a 120", 90, True),
        ("80 86 89 90a 120", 100, False),
        ("80 86 89 90a 120", 121, True),
        ("89", 86, False),
        ("90a", 91, False),
        ("cpu", 90, False),
    ],
)
def test_architectures_are_compared_with_the_device(architectures, capability, runs) -> None:
    held = library.PluginLibrary(
        Path("lib.so"),
        "",
        "emulation" if architectures == "cpu" else "cuda",
        tuple(architectures.split()),
        "",
        {},
        is_current=True,
    )
    if runs:
        held.require_architecture(capability)
    else:
        with pytest.raises(MissingDependencyError, match=f"run make plugins ARCHS={capability}"):
            held.require_architecture(capability)


def test_without_nvcc_make_plugins_is_one_line_and_exit_code_5(monkeypatch, capsys) -> None:
    monkeypatch.setattr(build, "_NVCC", "no-such-compiler")
    with pytest.raises(SystemExit) as stopped:
        build._main(["plugins"])
    assert stopped.value.code == 5
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert printed.startswith(
        "error: kernels: no nvcc in CUDA_HOME, on PATH or in an nvidia-cuda-nvcc"
    )


def report(directory: Path, *flags: str) -> dict[str, str]:
    """Section -> lines of ``abi_report.cpp``."""
    source, program = Path(__file__).parent / "abi_report.cpp", directory / "report"
    command = ["g++", "-std=c++17", "-Wall", "-Wextra", "-Werror", "-Wno-invalid-offsetof"]
    command += [f"-I{build.source_directory() / 'trt'}", *flags, str(source), "-o", str(program)]
    subprocess.run(command, check=True)
    return sections(output(program))


def sections(text: str) -> dict[str, str]:
    parts = re.split(r"^# (.*)\n", text, flags=re.MULTILINE)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def test_the_project_s_header_has_nvidia_s_layout(tmp_path) -> None:
    # abi.txt is what NVIDIA's headers of 10.3, 10.16 and 11.1 gave, each for its part.
    assert report(tmp_path) == sections((Path(__file__).parent / "abi.txt").read_text())


def test_nvidia_s_headers_give_the_same_layout_and_compile_the_plugins(tmp_path) -> None:
    include = os.environ.get("TRT_INCLUDE")
    if not include:
        pytest.skip("TRT_INCLUDE is not set: it names a directory with NVIDIA's NvInferRuntime.h")
    cuda = build.cuda_include(build.find_nvcc())
    flags = ["-DQR_TENSORRT_HEADERS", "-isystem", include, "-isystem", str(cuda)]
    expected = sections((Path(__file__).parent / "abi.txt").read_text())
    for name, lines in report(tmp_path, *flags).items():
        assert lines == expected[name]
    require_plain(build.build_plugins("cpu", tensorrt_include=Path(include)))


def test_doctor_says_how_to_get_the_plugins(place) -> None:
    findings = {finding.name: finding for finding in doctor.diagnose()}
    assert findings["TensorRT plugins"].found == ""
    assert "make plugins" in findings["TensorRT plugins"].remedy
    assert not findings["TensorRT plugins"].is_problem


def test_doctor_reports_the_library_and_what_is_wrong_with_it(installed, monkeypatch) -> None:
    monkeypatch.setenv(library.LIBRARY_VARIABLE, str(installed))
    found = doctor.plugins()
    assert str(installed) in found.found
    assert "emulation for cpu" in found.found
    with installed.open("ab") as file:
        file.write(b"\0")
    found = doctor.plugins()
    assert found.is_problem
    assert "the file was changed" in found.found
