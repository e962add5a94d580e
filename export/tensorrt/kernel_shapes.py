# SPDX-License-Identifier: Apache-2.0
"""Which sizes the kernels take (``docs/kernels.md``, "Supported shapes"), and what padding helps.

Padding changes no number: a zero feature adds nothing to a sum and nothing to a maximum, and the
range of the cache quantizer includes 0.
"""

from collections.abc import Sequence

ROW_MULTIPLE = 128
"""Rows that `QuantizeInt4` and `Hadamard` take, and so the inner length of `Int4Gemm`."""
OUT_MULTIPLE = 8
"""Output features of `Int4Gemm`."""
CACHE_HEAD_DIMS = (64, 128, 256)
"""Head dimensions of `KvAppend` and `KvAttention`."""
CAPACITY_MULTIPLE = 4
"""Tokens that a cache has room for."""

_MAX_ROW, _MAX_DENSE, _MAX_ORDER, _MAX_INNER = 65_536, 3, 192, 2_048


def padded(size: int, multiple: int) -> int:
    """`size`, rounded up."""
    return -(-size // multiple) * multiple


def cache_head_dim(head_dim: int) -> int | None:
    """The smallest head dimension of the kernels that holds `head_dim`."""
    return next((size for size in CACHE_HEAD_DIMS if size >= head_dim), None)


def takes_hadamard(n: int, factors: Sequence[int], inner: int = 1) -> bool:
    """Whether a kernel transforms rows of n by ``H_f1 ⊗ H_f2 ⊗ .. ⊗ I_inner``.

    Powers of two at the end are butterflies; in front of another factor they are multiplied into
    it, which makes a dense factor.
    """
    dense: list[int] = []
    twos = 1
    for factor in factors:
        twos *= factor
        if factor & (factor - 1):
            dense.append(twos)
            twos = 1
    block = inner
    for factor in factors:
        block *= factor
    if inner & (inner - 1) or n % ROW_MULTIPLE or n > _MAX_ROW or n % block:
        return False
    if not dense:
        return True
    return (
        len(dense) <= _MAX_DENSE
        and all(order % 4 == 0 and order <= _MAX_ORDER for order in dense)
        and twos * inner <= _MAX_INNER
        and (block // dense[0]) % 8 == 0
    )
