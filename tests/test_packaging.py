# SPDX-License-Identifier: Apache-2.0
"""What is installed from a wheel is what lies in the tree, and runs without it."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from quarot_onnx.plugins import build

ROOT = Path(__file__).parents[1]
FOLDERS = ("quarot_onnx", "export", "plugins_cuda", "examples")
NOT_SHIPPED = {"plugins_cuda/bench"}

SDIST = "import sys, setuptools.build_meta as b; print(b.build_sdist(sys.argv[1]))"
IMPORTS = """
import importlib, pathlib, pkgutil, sys
import quarot_onnx
for module in pkgutil.walk_packages(quarot_onnx.__path__, "quarot_onnx."):
    if module.name != "quarot_onnx.export.triton.model":  # imports what Triton alone provides
        importlib.import_module(module.name)
        print(module.name)
for name, module in list(sys.modules.items()):  # an editable install would lend what is missing
    file = getattr(module, "__file__", None)
    if name.partition(".")[0] == "quarot_onnx" and file is not None:
        assert pathlib.Path(file).is_relative_to(sys.argv[1]), file
"""
BUILDS = """
from quarot_onnx.plugins import build, library
print(build.plugins_digest("cpu"), build.plugins_digest("cuda"), build.command("cpu"))
print(library.directory())
"""


def _run(*command: object, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [*map(str, command)],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        env=os.environ | environment,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the source distribution, as an index would serve both; the tree stays as it is."""
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("dist")
    for folder in FOLDERS:
        ignored = shutil.ignore_patterns("__pycache__", "model", "build")
        shutil.copytree(ROOT / folder, tree / folder, symlinks=True, ignore=ignored)
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / file, tree / file)
    source = out / _run(sys.executable, "-c", SDIST, out, cwd=tree).splitlines()[-1]
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check")
    _run(sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", out, source, cwd=out)
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("site")
    options = ("--no-deps", "--no-index", "--disable-pip-version-check", "--target", target)
    _run(sys.executable, "-m", "pip", "install", *options, wheel, cwd=target)
    return target


def _shipped(folder: str, place: str) -> set[str]:
    """Every file under a folder of the tree, named as in the wheel."""
    return {
        f"{place}/{path.relative_to(ROOT / folder)}"
        for path in (ROOT / folder).rglob("*")
        if path.is_file()
        and "__pycache__" not in path.parts
        and not path.is_relative_to(ROOT / "quarot_onnx" / "export")
        and str(path.relative_to(ROOT).parent) not in NOT_SHIPPED
    }


def test_a_wheel_holds_every_file_of_the_package(wheel) -> None:
    expected = (
        _shipped("quarot_onnx", "quarot_onnx")
        | _shipped("export", "quarot_onnx/export")
        | _shipped("plugins_cuda", "quarot_onnx/plugins_cuda")
    )
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == expected


def test_every_module_of_an_installation_imports(installed) -> None:
    found = _run(sys.executable, "-c", IMPORTS, installed, cwd=installed, PYTHONPATH=str(installed))
    modules = {
        ".".join(path.relative_to(installed).with_suffix("").parts).removesuffix(".__init__")
        for path in (installed / "quarot_onnx").rglob("*.py")
    }
    assert set(found.split()) == modules - {"quarot_onnx", "quarot_onnx.export.triton.model"}


def test_the_command_runs_where_there_is_no_source_tree(installed) -> None:
    program = ("-c", "from quarot_onnx.cli import main; main()", "recipes", "w4a4kv4")
    printed = _run(sys.executable, *program, cwd=installed, PYTHONPATH=str(installed))
    assert printed == (ROOT / "quarot_onnx" / "recipes" / "w4a4kv4.toml").read_text()


def test_an_installation_builds_the_plugins_from_its_own_sources(installed, tmp_path) -> None:
    environment = {"PYTHONPATH": str(installed), "XDG_CACHE_HOME": str(tmp_path)}
    said = _run(sys.executable, "-c", BUILDS, cwd=installed, **environment).splitlines()
    digests = f"{build.plugins_digest('cpu')} {build.plugins_digest('cuda')}"
    assert said[0] == f"{digests} python -m quarot_onnx.plugins.build plugins-cpu"
    assert said[1] == str(tmp_path / "quarot-onnx" / "plugins")
