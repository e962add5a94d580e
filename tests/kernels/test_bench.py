# SPDX-License-Identifier: Apache-2.0
"""The GPU lane without a GPU: every stage runs under emulation, and the table always comes."""

import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "plugins_cuda" / "bench" / "bench.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(BENCH), "--emulate", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )


def table(output: str) -> list[str]:
    """The lines behind the last header."""
    lines = output.splitlines()
    return lines[max(i for i, line in enumerate(lines) if line.startswith("kernel ")) + 1 :]


def test_every_stage_runs_under_emulation(library, tmp_path):
    if library.backend != "emulation":
        pytest.skip("on a GPU, run the script itself")
    rows = tmp_path / "rows.csv"
    done = run("--csv", str(rows))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "TensorRT: " in done.stdout
    names = [line[:34].strip() for line in table(done.stdout)]
    for name in (
        "copy", "cuBLAS bf16", "torch._int_mm int8", "fwht + s8", "silu*up + fwht + s8",
        "gemm wgmma_s8", "gemm decode", "kv4 decode", "kv4 append", "layer prefill",
        "layer decode", "cache of a layer, int4",
    ):  # fmt: skip
        assert name in names
    assert "FAILED" not in done.stderr
    missing = [name for name in names if name.startswith("unmeasured")]
    assert len(rows.read_text().splitlines()) == len(names) - len(missing)  # header for last line


def test_the_watchdog_prints_the_table_when_the_budget_is_spent():
    done = run("--budget", "0.01")
    assert done.returncode == 3
    assert "unmeasured: " in done.stdout
    assert "watchdog: the budget" in done.stderr


def test_rows_that_no_longer_fit_the_budget_are_listed_as_unmeasured(library):
    done = run("--budget", "50", "--stages", "layer,memory")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "unmeasured: layer 1 x 12 (budget)" in done.stdout
    assert any(line.startswith("cache of a layer, int4") for line in table(done.stdout))


def test_an_unknown_stage_is_refused():
    done = run("--stages", "warmup")
    assert done.returncode == 2
    assert "unknown stages ['warmup']; there are probe" in done.stderr
