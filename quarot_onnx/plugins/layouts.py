# SPDX-License-Identifier: Apache-2.0
"""The byte orders in which INT4 weights and activations meet the GPU, and the ways between them.

An ONNX file stores one order, *packed*: two 4-bit two's-complement codes a byte, low nibble first.
The GEMM kernels read weights in *fragment* order, which is what a tensor core wants in registers,
so that a thread's operand is one aligned 16-byte load from global memory or from shared memory. One
fragment order serves every architecture and every kernel, because three instruction shapes agree:

* ``mma.m16n8k64.s4`` wants, in lane ``l``, the words ``(g, q) (g+8, q) (g, q+4) (g+8, q+4)`` of
  (row, word), ``g = l // 4``, ``q = l % 4``, where a *word* is 8 consecutive codes of one row;
* ``mma.m16n8k32.s8`` and ``wgmma.m64nNk32.s8`` want the same rows with 4 codes a word. The even
  codes of those words, then the odd ones, are two such operands: ``(w << 4) & 0xF0F0F0F0`` and
  ``w & 0xF0F0F0F0``, each value times 16. The order of k inside the dot product does not matter as
  long as both operands share it.

On sm_90a the activations take a third order, *split*: one code per byte, evens and odds of each 64
apart, so that ``wgmma`` finds them in shared memory as the unpacked weights expect them.

This module is the NumPy twin of ``plugins_cuda/kernels/pack_weights.cu``; the tests compare the two
byte by byte. A tag names an order and its version: whoever stores reordered bytes stores the tag
beside them, and a reader refuses a tag it does not know.
"""

from enum import IntEnum
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from quarot_onnx.errors import InputError, UnsupportedModelError
from quarot_onnx.hadamard import hadamard_matrix

U8Array = npt.NDArray[np.uint8]
I8Array = npt.NDArray[np.int8]
I32Array = npt.NDArray[np.int32]


class Layout(IntEnum):
    """A byte order and its version: ``0x5152`` ("QR"), the order, the version.

    The values are those of ``qr_layout`` in ``plugins_cuda/include/quarot_kernels.h``.
    """

    WEIGHTS_PACKED_V1 = 0x51520101
    """uint8 [n, k/2], low nibble first: what ONNX stores."""
    WEIGHTS_FRAGMENTS_V1 = 0x51520201
    """uint8 [n/64, k/64, 4 warps, 32 lanes, 16], n padded to 64, k to 128 by zero codes."""
    ACTIVATIONS_PACKED_V1 = 0x51520301
    """uint8 [m, k/2], low nibble first: what ``QuantizeInt4`` writes by default."""
    ACTIVATIONS_SPLIT_V1 = 0x51520401
    """int8 [k/128, m, 128], m padded to 8, k to 128 by zero codes, chunks swizzled."""


FRAGMENT_ROWS: Final = 64
"""Output features in one block of fragment order: the rows of a ``wgmma``."""
FRAGMENT_COLUMNS: Final = 64
"""Codes of k in one block: a thread's share is then exactly 16 bytes."""
STEP_COLUMNS: Final = 128
"""Codes of k that a prefill kernel takes per pipeline step; fragment order pads k to it."""
SPLIT_ROWS: Final = 8
"""Rows in one swizzle period of the 128-byte shared-memory swizzle."""
MAX_K: Final = 131_008
"""Largest multiple of 64 whose sum cannot overflow: 8*8*256*k < 2**31 (see docs/kernels.md)."""


def _padded(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


def _require_columns(where: str, k: int) -> None:
    if k <= 0 or k % FRAGMENT_COLUMNS or k > MAX_K:
        raise UnsupportedModelError(
            f"{where}: k={k} is not a multiple of {FRAGMENT_COLUMNS} up to {MAX_K}; "
            "pad the weight and the activations with zero codes"
        )


def _require_bytes(where: str, array: npt.NDArray[Any], ndim: int) -> None:
    if array.dtype != np.uint8 or array.ndim != ndim:
        raise InputError(
            f"{where}: got {array.dtype}{list(array.shape)}; give uint8 with {ndim} dimensions"
        )


def packed_from_codes(codes: npt.NDArray[np.integer[Any]]) -> U8Array:
    """Two codes per byte, low nibble first: ``[..., k]`` in -8..7 to uint8 ``[..., k/2]``.

    Raises:
        InputError: the last axis is odd or a code does not fit four bits.
    """
    if codes.shape[-1] % 2:
        raise InputError(
            f"packed_from_codes: last axis has {codes.shape[-1]} codes; give an even number"
        )
    if codes.size and (codes.min() < -8 or codes.max() > 7):
        raise InputError(
            f"packed_from_codes: codes span {codes.min()}..{codes.max()}; four bits hold -8..7"
        )
    nibbles: U8Array = codes.astype(np.uint8) & np.uint8(15)
    packed: U8Array = nibbles[..., 0::2] | (nibbles[..., 1::2] << np.uint8(4))
    return packed


def codes_from_packed(packed: U8Array) -> I8Array:
    """The codes -8..7: uint8 ``[..., k/2]``, low nibble first, to int8 ``[..., k]``."""
    codes = np.empty((*packed.shape[:-1], packed.shape[-1] * 2), np.int8)
    codes[..., 0::2] = (packed << 4).astype(np.int8) >> 4
    codes[..., 1::2] = packed.astype(np.int8) >> 4
    return codes


def weight_sums(packed: U8Array) -> I32Array:
    """The sum of each output feature's codes, int32 [n], for the zero-point term of the GEMM."""
    sums: I32Array = codes_from_packed(packed).sum(axis=1, dtype=np.int32)
    return sums


def fragments_shape(n: int, k: int) -> tuple[int, int, int, int, int]:
    """Shape of fragment order for an ``[n, k]`` weight: (n/64, k/64, 4, 32, 16) after padding."""
    rows, columns = _padded(n, FRAGMENT_ROWS), _padded(k, STEP_COLUMNS)
    return rows // FRAGMENT_ROWS, columns // FRAGMENT_COLUMNS, 4, 32, 16


def fragments_from_packed(packed: U8Array) -> U8Array:
    """Weights in fragment order, from packed order.

    Block (i, j) holds rows 64i.. and codes 64j..; inside it warp w owns rows 16w..16w+15 and lane l
    the 16 bytes that its tensor-core operand consists of. 64 x 64 codes are 2 KB in one piece, so a
    prefill kernel fetches a block with one bulk copy and a decode warp reads 512 adjacent bytes;
    and since lanes are 16 bytes apart the shared-memory reads have no bank conflict (32 bytes a
    lane, the obvious choice for two adjacent blocks, would have two-way conflicts).

    Args:
        packed: uint8 [n, k/2].

    Returns:
        uint8 of :func:`fragments_shape`; padding is zero codes, which add nothing to a sum.

    Raises:
        UnsupportedModelError: k is not a multiple of 64.
    """
    _require_bytes("fragments_from_packed", packed, 2)
    n, k = packed.shape[0], packed.shape[1] * 2
    _require_columns("fragments_from_packed", k)
    blocks_n, blocks_k = fragments_shape(n, k)[:2]
    padded = np.zeros((blocks_n * FRAGMENT_ROWS, blocks_k * FRAGMENT_COLUMNS // 2), np.uint8)
    padded[:n, : k // 2] = packed
    # axes: block row, warp, row half, g | block column, word half, q, byte of the word
    axes = padded.reshape(blocks_n, 4, 2, 8, blocks_k, 2, 4, 4)
    fragments = axes.transpose(0, 4, 1, 3, 6, 5, 2, 7)
    return np.ascontiguousarray(fragments).reshape(blocks_n, blocks_k, 4, 32, 16)


def packed_from_fragments(fragments: U8Array, n: int, k: int) -> U8Array:
    """The inverse of :func:`fragments_from_packed`: uint8 [n, k/2].

    Raises:
        InputError: the array does not have the size that an ``[n, k]`` weight takes.
    """
    _require_columns("packed_from_fragments", k)
    shape = fragments_shape(n, k)
    if fragments.dtype != np.uint8 or fragments.size != np.prod(shape):
        raise InputError(
            f"packed_from_fragments: {fragments.dtype} with {fragments.size} elements is not a "
            f"weight of n={n}, k={k}; fragment order takes uint8{list(shape)}"
        )
    axes = fragments.reshape(shape[0], shape[1], 4, 8, 4, 2, 2, 4).transpose(0, 2, 6, 3, 1, 5, 4, 7)
    rows, columns = shape[0] * FRAGMENT_ROWS, shape[1] * FRAGMENT_COLUMNS // 2
    return np.ascontiguousarray(axes.reshape(rows, columns)[:n, : k // 2])


def split_shape(m: int, k: int) -> tuple[int, int, int]:
    """Shape of split order for ``[m, k]`` activations: (k/128, m, 128) after padding."""
    return _padded(k, STEP_COLUMNS) // STEP_COLUMNS, _padded(m, SPLIT_ROWS), STEP_COLUMNS


def split_from_packed(packed: U8Array) -> I8Array:
    """Activations in split order, from packed order.

    Row r of step s holds the 128 codes from k = 128s: per 64 codes the 32 even ones, then the 32
    odd ones, one byte each. Its eight 16-byte chunks are XORed with ``r % 8``: the order that a
    128-byte-swizzled ``wgmma`` descriptor expects in shared memory. As the bytes already lie in it,
    one linear bulk copy of rows x 128 bytes loads a tile, and no tensor map is needed.

    Args:
        packed: uint8 [m, k/2].

    Returns:
        int8 of :func:`split_shape`.
    """
    _require_bytes("split_from_packed", packed, 2)
    m, k = packed.shape[0], packed.shape[1] * 2
    _require_columns("split_from_packed", k)
    steps, rows, _ = split_shape(m, k)
    codes = np.zeros((rows, steps * STEP_COLUMNS), np.int8)
    codes[:m, :k] = codes_from_packed(packed)
    # [row, step, block of 64, code pair, parity] -> [step, row, chunk of 16]
    split = codes.reshape(rows, steps, 2, 32, 2).transpose(1, 0, 2, 4, 3)
    chunks = split.reshape(steps, rows, 8, 16)
    out = np.empty_like(chunks)
    row, chunk = np.arange(rows)[:, None], np.arange(8)[None, :]
    out[:, row, chunk ^ (row % 8)] = chunks
    return out.reshape(steps, rows, STEP_COLUMNS)


def packed_from_split(split: I8Array, m: int, k: int) -> U8Array:
    """The inverse of :func:`split_from_packed`: uint8 [m, k/2]."""
    _require_columns("packed_from_split", k)
    steps, rows, _ = split_shape(m, k)
    if split.dtype != np.int8 or split.size != steps * rows * STEP_COLUMNS:
        raise InputError(
            f"packed_from_split: {split.dtype} with {split.size} elements is not m={m}, k={k}; "
            f"split order takes int8{[steps, rows, STEP_COLUMNS]}"
        )
    chunks = split.reshape(steps, rows, 8, 16)
    row, chunk = np.arange(rows)[:, None], np.arange(8)[None, :]
    axes = chunks[:, row, chunk ^ (row % 8)].reshape(steps, rows, 2, 2, 32).transpose(1, 0, 2, 4, 3)
    return packed_from_codes(axes.reshape(rows, steps * STEP_COLUMNS)[:m, :k])


def hadamard_signs(factors: tuple[int, ...]) -> I32Array:
    """What a kernel needs to know of ``H_f1 ⊗ H_f2 ⊗ ..`` beside the factors: int32 [words].

    Only factors that are not powers of two need words; powers of two in front of one are multiplied
    into it (Sylvester ⊗ H_f). A word holds the signs of a lane's operand of four tensor-core tiles,
    16 x 16 each: bit ``15 - (4 i + r) + 16 half`` is set where
    ``H[16 (4 step + i) + 2 (lane % 4) + half + 8 (r // 2), 16 tile + lane // 4 + 8 (r % 2)]`` is
    negative; words are [factor, tile, step, lane]. The twin of ``qr_make_hadamard_plan``, which
    also says which factors the kernels take.
    """
    words = [np.zeros(0, np.int32)]
    twos = 1
    for factor in factors:
        if factor & (factor - 1) == 0:
            twos *= factor
        else:
            H = np.kron(hadamard_matrix(twos), hadamard_matrix(factor))
            words.append(_sign_words(H < 0))
            twos = 1
    return np.concatenate(words)


def _sign_words(negative: npt.NDArray[np.bool_]) -> I32Array:
    """The words of one factor; negative [order, order]."""
    tiles = _padded(len(negative), 16) // 16
    steps = _padded(tiles, 4) // 4
    padded = np.zeros((64 * steps, 16 * tiles), np.bool_)
    padded[: len(negative), : len(negative)] = negative
    # axes of a row: step, i, r // 2, lane % 4, half; of a column: tile, r % 2, lane // 4
    axes = padded.reshape(steps, 4, 2, 4, 2, tiles, 2, 8)
    bits = axes.transpose(5, 0, 7, 3, 1, 2, 6, 4).reshape(tiles, steps, 32, 4, 2, 2, 2)
    i, high, low, half = np.indices((4, 2, 2, 2))
    shifts = 15 - (4 * i + 2 * high + low) + 16 * half
    weights = np.left_shift(np.uint32(1), shifts.astype(np.uint32))
    words = (bits * weights).sum(axis=(3, 4, 5, 6), dtype=np.uint32)
    signed: I32Array = words.reshape(-1).view(np.int32)
    return signed
