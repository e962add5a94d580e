# SPDX-License-Identifier: Apache-2.0
"""The kernel library under test: the emulated build, or the one named by QUAROT_KERNELS_LIBRARY.

The same tests drive both through the C ABI. Buffers lie in host memory for the emulator and in GPU
memory (through torch) for the CUDA library; a guard zone behind each must stay untouched.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quarot_onnx.plugins import build
from quarot_onnx.plugins.kernels import EmulationCounters, Kernels

GUARD_BYTES = 4096
GUARD = 0xC3


class Buffer:
    """Memory that kernels can reach: ``pointer`` (16-byte aligned) and ``read()``."""

    def __init__(self, array: np.ndarray, *, device: bool) -> None:
        self.shape, self.dtype = array.shape, array.dtype
        raw = np.full(array.nbytes + GUARD_BYTES + 16, GUARD, np.uint8)
        self._begin = 0 if device else -raw.ctypes.data % 16
        self._bytes = array.nbytes
        raw[self._begin : self._begin + self._bytes] = (
            np.ascontiguousarray(array).view(np.uint8).ravel()
        )
        if device:
            import torch  # noqa: PLC0415

            self._held: Any = torch.from_numpy(raw).cuda()
            self.pointer = int(self._held.data_ptr())
        else:
            self._held = raw
            self.pointer = raw.ctypes.data + self._begin

    def read(self) -> np.ndarray:
        """A copy; fails when the guard zone was written."""
        raw = self._held if isinstance(self._held, np.ndarray) else self._held.cpu().numpy()
        end = self._begin + self._bytes
        assert (raw[end:] == GUARD).all(), "memory behind a buffer was written"
        return raw[self._begin : end].copy().view(self.dtype).reshape(self.shape)


class Library:
    """What tests need of a kernel library: the C ABI, memory, and the emulator's knobs."""

    def __init__(self, path: Path) -> None:
        self.kernels = Kernels(path)
        self.abi = self.kernels.library
        self.backend = self.kernels.backend
        self.compute_capability = 0
        if self.backend == "cuda":
            import torch  # noqa: PLC0415

            major, minor = torch.cuda.get_device_capability()
            self.compute_capability = 10 * major + minor

    def put(self, array: np.ndarray) -> Buffer:
        """A copy of ``array`` where kernels can reach it."""
        return Buffer(array, device=self.backend == "cuda")

    def configure(
        self,
        *,
        seed: int = 0,
        workers: int = 1,
        compute_capability: int = 90,
        check_races: bool = True,
        count_banks: bool = False,
    ) -> None:
        """Sets the emulator's options; nothing on a GPU."""
        if self.backend == "emulation":
            self.kernels.configure_emulation(
                seed=seed,
                workers=workers,
                compute_capability=compute_capability,
                check_races=check_races,
                count_banks=count_banks,
            )

    def reset_counters(self) -> None:
        self.kernels.reset_emulation_counters()

    def counters(self) -> EmulationCounters:
        return self.kernels.emulation_counters()


@pytest.fixture(scope="session")
def library() -> Library:
    return Library(build.find_library("cpu"))


@pytest.fixture
def emulated(library: Library) -> Library:
    """The library, for tests that read the emulator's counters."""
    if library.backend != "emulation":
        pytest.skip("only the emulator counts this")
    return library
