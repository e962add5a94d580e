# SPDX-License-Identifier: Apache-2.0
"""The kernel library under test: the emulated build, or the one named by QUAROT_KERNELS_LIBRARY.

The same tests drive both through the C ABI. Buffers lie in host memory for the emulator and in GPU
memory (through torch) for the CUDA library; a guard zone behind each must stay untouched.
"""

import ctypes
import mmap
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quarot_onnx.plugins import build
from quarot_onnx.plugins.kernels import EmulationCounters, Kernels

GUARD_BYTES = 4096
GUARD = 0xC3


_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_LIBC.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_LIBC.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


class Pages:
    """Host memory whose end is the end of its last page; the page behind it may not be touched."""

    def __init__(self, size: int) -> None:
        used = -(-max(size, 1) // mmap.PAGESIZE) * mmap.PAGESIZE
        self._length = used + mmap.PAGESIZE
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self._start = _LIBC.mmap(None, self._length, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
        assert self._start not in {None, ctypes.c_void_p(-1).value}
        assert _LIBC.mprotect(self._start + used, mmap.PAGESIZE, 0) == 0
        self.address = self._start + used - size
        self.bytes = np.frombuffer((ctypes.c_uint8 * size).from_address(self.address), np.uint8)

    def __del__(self) -> None:
        _LIBC.munmap(self._start, self._length)


class Buffer:
    """Memory that kernels can reach: ``pointer`` (16-byte aligned) and ``read()``.

    Writing behind it fails at ``read()`` (on a GPU up to 4 KB behind, on the CPU up to the next 16
    bytes); touching memory farther behind ends the process on the CPU.
    """

    def __init__(self, array: np.ndarray, *, device: bool) -> None:
        self.shape, self.dtype = array.shape, array.dtype
        self._bytes = array.nbytes
        content = np.ascontiguousarray(array).view(np.uint8).ravel()
        guard = GUARD_BYTES if device else -self._bytes % 16
        raw = np.concatenate([content, np.full(guard, GUARD, np.uint8)])
        if device:
            import torch  # noqa: PLC0415

            self._held: Any = torch.from_numpy(raw).cuda()
            self.pointer = int(self._held.data_ptr())
        else:
            self._pages = Pages(raw.size)
            self._held = self._pages.bytes
            self._held[:] = raw
            self.pointer = self._pages.address

    def read(self) -> np.ndarray:
        """A copy; fails when the guard zone was written."""
        raw = self._held if isinstance(self._held, np.ndarray) else self._held.cpu().numpy()
        assert (raw[self._bytes :] == GUARD).all(), "memory behind a buffer was written"
        return raw[: self._bytes].copy().view(self.dtype).reshape(self.shape)


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
