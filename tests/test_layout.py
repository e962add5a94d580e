# SPDX-License-Identifier: Apache-2.0
"""The layout of the project: what lives where, and what an import costs."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import quarot_onnx.export.checkpoint

ROOT = Path(__file__).parents[1]
SOURCES = sorted(
    path
    for folder in ("quarot_onnx", "export", "tests", "benchmarks", "examples")
    for path in (ROOT / folder).rglob("*.py")
    if not path.is_relative_to(ROOT / "quarot_onnx" / "export")
)


def _loaded(statement: str) -> set[str]:
    program = f"import sys\n{statement}\nprint(*sys.modules)"
    output = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True, cwd=ROOT
    ).stdout
    return {name.partition(".")[0] for name in output.split()}


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert _loaded("import quarot_onnx") & {"torch", "onnx", "numpy", "transformers"} == set()


@pytest.mark.parametrize(
    "module",
    [
        "ops",
        "rounding",
        "hadamard",
        "quantizers",
        "rotation",
        "weights",
        "recipe",
        "decoder",
        "artifacts",
    ],
)
def test_the_graph_world_needs_neither_torch_nor_a_runtime(module) -> None:
    heavy = {"torch", "transformers", "onnxruntime", "polygraphy", "tensorrt"}
    assert _loaded(f"import quarot_onnx.{module}") & heavy == set()


def test_export_at_the_top_is_the_package_quarot_onnx_export() -> None:
    assert (ROOT / "quarot_onnx" / "export").is_symlink()
    assert (ROOT / "quarot_onnx" / "export").readlink() == Path("../export")
    found = Path(quarot_onnx.export.checkpoint.__file__).resolve()
    assert found == ROOT / "export" / "checkpoint.py"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_source_names_its_license_and_says_what_it_is(path) -> None:
    text = path.read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.startswith("#!")]
    assert lines[0] == "# SPDX-License-Identifier: Apache-2.0"
    is_test = path.name.startswith("test_")  # their names are sentences already
    assert is_test or ast.get_docstring(ast.parse(text)) or path.name == "__init__.py"


def _rows_of_the_tree() -> list[list[str]]:
    """The paths in the first column of the table in docs/design.md, section 2."""
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    section = text.split("## 2. The tree")[1].split("## 3.")[0]
    first = re.findall(r"^\| (`[^|]*`) \|", section, re.MULTILINE)
    rows = [re.findall(r"`([^`]+)`", cell) for cell in first]
    return [[row[0], *(f"{Path(row[0]).parent}/{name}" for name in row[1:])] for row in rows]


def test_the_tree_in_the_design_names_every_module_and_every_package() -> None:
    named = {path for row in _rows_of_the_tree() for path in row}
    packages = {
        f"{path.parent.relative_to(ROOT)}/"
        for path in SOURCES
        if path.name == "__init__.py" and path.parent != ROOT / "quarot_onnx"
    }
    modules = {
        str(path.relative_to(ROOT))
        for path in SOURCES
        if path.parent in (ROOT / "quarot_onnx", ROOT / "export") and path.name != "__init__.py"
    }
    assert packages | modules <= named
    assert {path for path in named if not (ROOT / path).exists()} == set()


def test_no_source_of_the_package_knows_a_machine() -> None:
    for path in SOURCES:
        if "tests" not in path.relative_to(ROOT).parts:
            found = re.search(r"/work/|/home/|/root/|/Users/", path.read_text(encoding="utf-8"))
            assert found is None, f"{path}: {found}"


def test_a_pass_has_a_file_of_its_own() -> None:
    for path in sorted((ROOT / "quarot_onnx" / "passes").glob("*.py")):
        classes = [
            node.name
            for node in ast.parse(path.read_text()).body
            if isinstance(node, ast.ClassDef) and node.name.endswith("Pass") and node.name != "Pass"
        ]
        expected = "".join(part.capitalize() for part in path.stem.split("_")) + "Pass"
        assert classes in ([], [expected])


def test_every_pass_has_a_test_file() -> None:
    passes = {
        path.stem
        for path in (ROOT / "quarot_onnx" / "passes").glob("*.py")
        if path.stem not in ("__init__", "base", "online")
    }
    tested = {path.stem.removeprefix("test_") for path in (ROOT / "tests" / "passes").glob("*.py")}
    assert passes <= tested
