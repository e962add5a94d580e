# SPDX-License-Identifier: Apache-2.0
"""Planted bugs: each must make the suite fail, or the suite is decoration.

A mutant is one replacement in a copy of the kernel sources, built for the emulator; the tests that
it names then run against that library in a process of their own. It takes a while, hence slow.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from quarot_onnx.plugins import build
from tests.kernels import mutants_gemm, mutants_transform
from tests.kernels.mutants_gemm import Mutant

ROOT = Path(__file__).parents[2]
MUTANTS = (*mutants_transform.MUTANTS, *mutants_gemm.MUTANTS)
TEST_FILES = ("test_hadamard", "test_kv_cache", "test_gemm", "test_pack_weights")
NO_TESTS_RAN, USAGE_ERROR, INTERNAL_ERROR, INTERRUPTED = 5, 4, 3, 2


def planted(mutant: Mutant, folder: Path) -> Path:
    """The library with the bug in it; only what the bug touches is compiled again."""
    base = build.build("cpu")
    source, objects = folder / "plugins_cuda", folder / "build"
    for part in ("include", "kernels", "emu"):
        shutil.copytree(ROOT / "plugins_cuda" / part, source / part)
    shutil.copy2(ROOT / "plugins_cuda" / "Makefile", source)
    shutil.copytree(base.parent, objects / "cpu")
    for dependencies in (objects / "cpu").glob("*.d"):  # they name the object by its full path
        dependencies.write_text(
            dependencies.read_text().replace(str(base.parent), str(objects / "cpu"))
        )
    for object_file in (objects / "cpu").iterdir():
        os.utime(object_file)
    (objects / "cpu" / base.name).unlink()
    file = source / mutant.file
    text = file.read_text()
    assert mutant.before in text, f"{mutant.file} no longer contains what the mutant replaces"
    file.write_text(text.replace(mutant.before, mutant.after, 1))
    later = max(f.stat().st_mtime for f in (objects / "cpu").iterdir()) + 2
    os.utime(file, (later, later))
    done = subprocess.run(
        [
            "make",
            "-C",
            str(source),
            f"BUILD={objects}",
            "cpu",
            "EXTRA_CPU_FLAGS=-Wno-unused -O0 -g0",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"the mutant does not compile: {done.stderr[-2000:]}"
    return objects / "cpu" / base.name


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_the_suite_catches(mutant: Mutant, tmp_path: Path):
    library = planted(mutant, tmp_path)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "-q",
        "-p",
        "no:randomly",
        "-p",
        "no:cacheprovider",
    ]
    command += ["-k", mutant.tests, "--timeout=300"]
    command += [str(ROOT / "tests" / "kernels" / f"{name}.py") for name in TEST_FILES]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, build.LIBRARY_VARIABLE: str(library)},
        capture_output=True,
        text=True,
        check=False,
    )
    shutil.rmtree(tmp_path / "build")
    setup_failed = {NO_TESTS_RAN, USAGE_ERROR, INTERNAL_ERROR, INTERRUPTED}
    assert done.returncode not in setup_failed, done.stdout[-2000:]
    assert done.returncode != 0, f"not caught: {mutant.name}"


def test_every_mutant_still_has_its_place():
    for mutant in MUTANTS:
        assert mutant.before in (ROOT / "plugins_cuda" / mutant.file).read_text(), mutant.name
    names = [mutant.name for mutant in MUTANTS]
    assert len(names) == len(set(names))
