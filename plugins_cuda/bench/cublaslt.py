# SPDX-License-Identifier: Apache-2.0
"""The vendor's INT8 GEMM, called directly: cuBLASLt, s8 x s8 -> s32, the heuristic's algorithm.

``torch._int_mm`` is the same library with PyTorch's choice of workspace and no choice of shapes;
the baseline of a kernel library should be the best that the vendor does, so the workspace here is
64 MB. Through ctypes: the library lies beside PyTorch, its header often does not.
"""

import ctypes
import importlib.util
import os
from collections.abc import Callable
from ctypes import POINTER, byref, c_float, c_int, c_int32, c_int64, c_size_t, c_uint64, c_void_p
from pathlib import Path

WORKSPACE_BYTES = 64 << 20

# Values of cublasLt.h, cublas_api.h and library_types.h, which do not change between versions.
COMPUTE_32I = 72
TYPE_8I, TYPE_32I = 3, 10
TRANSPOSE = 1
DESCRIPTOR_TRANSA = 3
PREFERENCE_WORKSPACE_BYTES = 1


class _Heuristic(ctypes.Structure):
    """``cublasLtMatmulHeuristicResult_t``."""

    _fields_ = (
        ("algorithm", c_uint64 * 8),
        ("workspace_bytes", c_size_t),
        ("state", c_int),
        ("waves", c_float),
        ("reserved", c_int * 4),
    )


_HANDLES = POINTER(c_void_p)
_SIGNATURES: dict[str, tuple[object, ...]] = {
    "cublasLtCreate": (_HANDLES,),
    "cublasLtMatmulDescCreate": (_HANDLES, c_int, c_int),
    "cublasLtMatmulDescSetAttribute": (c_void_p, c_int, c_void_p, c_size_t),
    "cublasLtMatrixLayoutCreate": (_HANDLES, c_int, c_uint64, c_uint64, c_int64),
    "cublasLtMatmulPreferenceCreate": (_HANDLES,),
    "cublasLtMatmulPreferenceSetAttribute": (c_void_p, c_int, c_void_p, c_size_t),
    "cublasLtMatmulAlgoGetHeuristic": (
        *(c_void_p,) * 7, c_int, POINTER(_Heuristic), POINTER(c_int),
    ),
    "cublasLtMatmul": (
        c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p,
        c_void_p, c_void_p, c_void_p, POINTER(_Heuristic), c_void_p, c_size_t, c_void_p,
    ),
}  # fmt: skip


def candidates() -> list[Path]:
    """Where libcublasLt may lie: beside PyTorch's CUDA wheels, in PyTorch, in a toolkit."""
    folders = []
    for package in ("nvidia", "torch"):
        spec = importlib.util.find_spec(package)
        for root in (spec.submodule_search_locations or ()) if spec else ():
            folders += [*Path(root).glob("*/lib"), Path(root) / "lib"]
    folders += [
        Path(os.environ[variable]) / "lib64"
        for variable in ("CUDA_HOME", "CUDA_PATH")
        if variable in os.environ
    ]
    folders += [Path(part) for part in os.environ.get("LD_LIBRARY_PATH", "").split(":") if part]
    folders += [Path("/usr/local/cuda/lib64"), Path("/usr/lib/x86_64-linux-gnu")]
    found: list[Path] = []
    for folder in folders:
        found += sorted(folder.glob("libcublasLt.so*"), reverse=True)
    return found


class CublasLt:
    """A handle of cuBLASLt.

    Args:
        library: the shared library; the first of ``candidates()`` that loads by default.

    Raises:
        OSError: there is no such library, or it is not cuBLASLt.
        RuntimeError: cuBLASLt refuses a handle.
    """

    def __init__(self, library: Path | None = None) -> None:
        paths = [library] if library else candidates()
        if not paths:
            raise OSError("cuBLASLt: no libcublasLt.so beside PyTorch, in CUDA_HOME or on the path")
        self.path = paths[0]
        self._library = ctypes.CDLL(str(self.path))
        for name, arguments in _SIGNATURES.items():
            try:
                function = getattr(self._library, name)
            except AttributeError as error:
                raise OSError(f"cuBLASLt: {self.path} has no {name}") from error
            function.argtypes, function.restype = arguments, c_int
        self._handle = self._made("cublasLtCreate")

    def _call(self, name: str, *arguments: object) -> None:
        status = getattr(self._library, name)(*arguments)
        if status:
            raise RuntimeError(f"cuBLASLt: {name} returned status {status}")

    def _made(self, name: str, *arguments: object) -> c_void_p:
        made = c_void_p()
        self._call(name, byref(made), *arguments)
        return made

    def int8_gemm(
        self, m: int, n: int, k: int, x: int, w: int, y: int, workspace: int
    ) -> Callable[[int | None], None]:
        """A call ``gemm(stream)`` of y[m, n] = x[m, k] w[n, k]^T, s8 to s32, all row-major.

        Args:
            m: rows of x.
            n: rows of w.
            k: columns of both.
            x: device address of x.
            w: device address of w.
            y: device address of y.
            workspace: device address of ``WORKSPACE_BYTES`` bytes.

        Raises:
            RuntimeError: cuBLASLt has no algorithm for this shape.
        """
        # cuBLASLt is column-major: it sees y^T [n, m] = (w^T)^T x^T.
        operation = self._made("cublasLtMatmulDescCreate", COMPUTE_32I, TYPE_32I)
        transpose = c_int32(TRANSPOSE)
        self._call(
            "cublasLtMatmulDescSetAttribute", operation, DESCRIPTOR_TRANSA, byref(transpose), 4
        )
        layout = "cublasLtMatrixLayoutCreate"
        a, b = self._made(layout, TYPE_8I, k, n, k), self._made(layout, TYPE_8I, k, m, k)
        c = self._made(layout, TYPE_32I, n, m, n)
        preference = self._made("cublasLtMatmulPreferenceCreate")
        limit = c_size_t(WORKSPACE_BYTES)
        self._call(
            "cublasLtMatmulPreferenceSetAttribute",
            preference, PREFERENCE_WORKSPACE_BYTES, byref(limit), ctypes.sizeof(limit),
        )  # fmt: skip
        best, count = _Heuristic(), c_int(0)
        self._call(
            "cublasLtMatmulAlgoGetHeuristic",
            self._handle, operation, a, b, c, c, preference, 1, byref(best), byref(count),
        )  # fmt: skip
        if count.value == 0 or best.state:
            raise RuntimeError(f"cuBLASLt: no algorithm for int8 {m} x {n} x {k}")
        one, zero = c_int32(1), c_int32(0)

        def gemm(stream: int | None) -> None:
            self._call(
                "cublasLtMatmul", self._handle, operation, byref(one), w, a, x, b, byref(zero),
                y, c, y, c, byref(best), workspace, WORKSPACE_BYTES, stream,
            )  # fmt: skip

        return gemm
