# SPDX-License-Identifier: Apache-2.0
"""The emulator itself: it computes what PTX says, and stops what a GPU would not forgive.

``emulator_cases.cu`` holds small kernels; each runs in its own process, since a stopped one aborts.
"""

import fcntl
import os
import subprocess
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

HERE = Path(__file__).parent
SEEDS = [0, 1, 2, 3]

RIGHT = [
    "exchange",
    "exchange-in-warp",
    "poison",
    "async",
    "mma",
    "ldmatrix",
    "ldmatrix-conflicts",
    "banks-1",
    "banks-2",
    "banks-32",
    "too-many-threads",
    "too-much-shared-memory",
]
STOPPED = [
    ("no-barrier", "race: shared memory"),
    ("no-warp-barrier", "race: shared memory"),
    ("overwrite", "race: shared memory"),
    ("two-writers", "race: two threads write"),
    ("divergent-barrier", "different __syncthreads"),
    ("early-return", "returned"),
    ("partial-barrier", "returned"),
    ("divergent-shuffle", "returned"),
    ("mixed-operations", "different warp-level operations"),
    ("out-of-bounds", "outside shared memory"),
    ("raw-out-of-bounds", "past the end of shared memory"),
    ("misaligned", "misaligned"),
    ("odd-block", "multiple of 32"),
]


@pytest.fixture(scope="session")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program, compiled once for all workers of a run."""
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if os.environ.get("PYTEST_XDIST_WORKER") else folder
    program = folder / "emulator_cases"
    with (folder / "emulator_cases.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not program.exists():
            subprocess.run(
                [
                    *("g++", "-x", "c++", "-std=c++17", "-O1", "-pthread", "-U_FORTIFY_SOURCE"),
                    *("-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"),
                    *(str(HERE / "emulator_cases.cu"), "-o", str(program)),
                ],
                check=True,
            )
    return program


def run(program: Path, name: str, seed: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(program), name, str(seed)], capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize("name", RIGHT)
def test_computes_what_the_instruction_set_says(cases, name):
    for seed in SEEDS:
        done = run(cases, name, seed)
        assert done.stdout == "ok\n", done.stderr


@pytest.mark.parametrize(("name", "message"), STOPPED)
def test_stops_what_a_gpu_would_not_forgive(cases, name, message):
    for seed in SEEDS:
        done = run(cases, name, seed)
        assert done.returncode < 0, f"seed {seed}: ran to its end with {done.stdout!r}"
        assert message in done.stderr
        assert "thread" in done.stderr or name in {"odd-block", "raw-out-of-bounds"}


def test_a_missing_wait_shows_when_copies_land_late(cases):
    # Seed 0 lands every copy at its wait: what was not waited for is poison.
    assert run(cases, "async-no-wait", 0).stdout == "wrong\n"


def test_conversions_round_like_ieee_754(library):
    """fp16 and bf16 of every kind of number: through a kernel that only converts."""
    random = np.random.default_rng(0)
    for dtype, index in ((np.dtype(np.float16), 0), (np.dtype(ml_dtypes.bfloat16), 1)):
        bits = random.integers(0, 0x7C00, (4, 256)).astype(np.uint16)
        x = (bits | (random.integers(0, 2, bits.shape) << 15).astype(np.uint16)).view(dtype)
        held, y = library.put(x), library.put(np.zeros_like(x))
        library.kernels.transform(index, 4, 256, held.pointer, y=y.pointer)
        assert (y.read().view(np.uint16) == x.view(np.uint16)).all()
