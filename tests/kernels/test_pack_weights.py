# SPDX-License-Identifier: Apache-2.0
"""Operand orders: NumPy there and back, and the CUDA packing equal to NumPy byte by byte."""

import ctypes

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quarot_onnx.errors import InputError, UnsupportedModelError
from quarot_onnx.hadamard import hadamard_matrix
from quarot_onnx.plugins import layouts
from quarot_onnx.plugins.layouts import Layout

SIZES = [(8, 64), (64, 128), (72, 192), (136, 320), (200, 1024)]
OK, NULL, MISALIGNED, SHAPE, LAYOUT = 0, 1, 2, 4, 6


def random_packed(rows: int, k: int) -> np.ndarray:
    return np.random.default_rng([rows, k]).integers(0, 256, (rows, k // 2), dtype=np.uint8)


@given(
    rows=st.integers(1, 150),
    k=st.integers(1, 10).map(lambda x: 64 * x),
)
def test_every_order_leads_back_to_packed(rows, k):
    packed = random_packed(rows, k)
    codes = layouts.codes_from_packed(packed)
    assert (layouts.packed_from_codes(codes) == packed).all()
    assert (layouts.packed_from_split(layouts.split_from_packed(packed), rows, k) == packed).all()
    fragments = layouts.fragments_from_packed(packed)
    assert fragments.shape == layouts.fragments_shape(rows, k)
    assert (layouts.packed_from_fragments(fragments, rows, k) == packed).all()


def test_codes_are_twos_complement_with_the_even_one_in_the_low_nibble():
    assert layouts.packed_from_codes(np.array([[-8, 7, -1, 0]])).tolist() == [[0x78, 0x0F]]
    assert layouts.codes_from_packed(np.array([[0x78, 0x0F]], np.uint8)).tolist() == [
        [-8, 7, -1, 0]
    ]


def test_a_lane_of_fragment_order_holds_the_words_of_its_tensor_core_operand():
    packed = random_packed(128, 256)
    words = packed.view(np.uint32)  # [row, word of 8 codes]
    fragments = layouts.fragments_from_packed(packed).view(np.uint32)
    for block_n, block_k, warp, lane in ((0, 0, 0, 0), (1, 2, 3, 31), (0, 3, 1, 13)):
        row, word = 64 * block_n + 16 * warp + lane // 4, 8 * block_k + lane % 4
        want = [
            words[row, word],
            words[row + 8, word],
            words[row, word + 4],
            words[row + 8, word + 4],
        ]
        assert fragments[block_n, block_k, warp, lane].tolist() == want


def test_unpacked_fragments_and_split_activations_agree_on_the_order_of_k():
    # What wgmma multiplies: masked words of a block times 32 bytes of a token, even codes then odd.
    weights, tokens = random_packed(64, 64), random_packed(8, 64)
    words = weights.view(np.uint32)
    split = layouts.split_from_packed(tokens)[0]  # [token, 128], the second half is padding
    total = np.zeros((64, 8), np.int64)
    for parity in (0, 1):
        masked = (words << np.uint32(4) if parity == 0 else words) & np.uint32(0xF0F0F0F0)
        a = np.ascontiguousarray(masked).view(np.int8).astype(np.int64)  # [row, 32], times 16
        for token in range(8):
            chunks = split[token].reshape(8, 16)
            b = np.concatenate([chunks[(2 * parity + c) ^ token] for c in (0, 1)])
            total[:, token] += a @ b
    want = layouts.codes_from_packed(weights).astype(np.int64) @ layouts.codes_from_packed(tokens).T
    assert (total == 16 * want).all()


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_cuda_and_numpy_write_the_same_weight_bytes(library, size):
    packed = random_packed(*size)
    fragments = layouts.fragments_from_packed(packed)
    n, k = map(ctypes.c_int64, size)
    tag = Layout.WEIGHTS_FRAGMENTS_V1
    assert library.abi.qr_weight_bytes(tag, n, k) == fragments.nbytes
    assert library.abi.qr_weight_bytes(Layout.WEIGHTS_PACKED_V1, n, k) == packed.nbytes
    source, target = library.put(packed), library.put(np.full_like(fragments, 0xEE))
    pointers = [ctypes.c_void_p(b.pointer) for b in (source, target)]
    assert library.abi.qr_pack_weight(tag, n, k, *pointers, None) == OK
    assert (target.read() == fragments).all()


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_cuda_and_numpy_sum_the_same_weight_codes(library, size):
    packed = random_packed(*size)
    source, target = library.put(packed), library.put(np.full(size[0], 99, np.int32))
    pointers = [ctypes.c_void_p(b.pointer) for b in (source, target)]
    assert library.abi.qr_weight_sums(*map(ctypes.c_int64, size), *pointers, None) == OK
    assert (target.read() == layouts.weight_sums(packed)).all()


@pytest.mark.parametrize("size", [(1, 64), (3, 128), (13, 192), (40, 1088)], ids=str)
def test_cuda_and_numpy_split_activations_alike_and_padding_rows_are_left_alone(library, size):
    m, k = size
    packed = random_packed(m, k)
    want = layouts.split_from_packed(packed)
    source, target = library.put(packed), library.put(np.full_like(want, 0x55))
    pointers = [ctypes.c_void_p(b.pointer) for b in (source, target)]
    assert library.abi.qr_split_activations(*map(ctypes.c_int64, size), *pointers, None) == OK
    assert (target.read()[:, :m] == want[:, :m]).all()
    assert (target.read()[:, m:] == 0x55).all()


@pytest.mark.parametrize(
    ("layout", "n", "k", "offset", "status"),
    [
        (Layout.WEIGHTS_FRAGMENTS_V1, 12, 64, 0, SHAPE),
        (Layout.WEIGHTS_FRAGMENTS_V1, 64, 32, 0, SHAPE),
        (Layout.WEIGHTS_FRAGMENTS_V1, 64, 131072, 0, SHAPE),
        (Layout.WEIGHTS_FRAGMENTS_V1 + 1, 64, 64, 0, LAYOUT),
        (Layout.WEIGHTS_PACKED_V1, 64, 64, 0, LAYOUT),
        (Layout.WEIGHTS_FRAGMENTS_V1, 64, 64, 4, MISALIGNED),
        (Layout.WEIGHTS_FRAGMENTS_V1, 64, 64, None, NULL),
    ],
)
def test_packing_refuses_other_shapes_layouts_and_pointers(
    *, library, layout, n, k, offset, status
):
    buffer = library.put(np.zeros(1 << 15, np.uint8))
    pointer = ctypes.c_void_p(None if offset is None else buffer.pointer + offset)
    sizes = ctypes.c_int64(n), ctypes.c_int64(k)
    out = ctypes.c_void_p(buffer.pointer)
    assert library.abi.qr_pack_weight(layout, *sizes, pointer, out, None) == status
    if status == SHAPE:
        assert library.abi.qr_weight_bytes(layout, *sizes) == 0


def test_numpy_refuses_a_k_that_no_kernel_takes():
    with pytest.raises(
        UnsupportedModelError, match=r"fragments_from_packed: k=72 is not a multiple"
    ):
        layouts.fragments_from_packed(np.zeros((64, 36), np.uint8))
    with pytest.raises(
        UnsupportedModelError, match=r"split_from_packed: k=131072 is not a multiple"
    ):
        layouts.split_from_packed(np.zeros((1, 65536), np.uint8))


def test_numpy_refuses_codes_that_do_not_fit_and_arrays_of_another_weight():
    with pytest.raises(InputError, match=r"codes span -9..0; four bits hold -8..7"):
        layouts.packed_from_codes(np.array([[-9, 0]]))
    with pytest.raises(InputError, match=r"last axis has 3 codes; give an even number"):
        layouts.packed_from_codes(np.zeros((1, 3), np.int8))
    with pytest.raises(InputError, match=r"is not a weight of n=64, k=128"):
        layouts.packed_from_fragments(np.zeros(100, np.uint8), 64, 128)
    with pytest.raises(InputError, match=r"is not m=8, k=128"):
        layouts.packed_from_split(np.zeros(100, np.int8), 8, 128)
    with pytest.raises(InputError, match=r"got int8\[64, 64\]; give uint8 with 2 dimensions"):
        layouts.fragments_from_packed(np.zeros((64, 64), np.int8))


@pytest.mark.parametrize(
    "factors", [(12,), (12, 8), (2, 12, 4), (172, 64), (36, 2, 12, 8), (12, 20, 4), (4, 4)], ids=str
)
def test_hadamard_signs_are_those_of_the_plan(library, factors):
    matrices = [hadamard_matrix(factor) for factor in factors if factor & (factor - 1)]
    _, words = library.kernels.hadamard_plan(factors, matrices)
    signs = layouts.hadamard_signs(factors)
    np.testing.assert_array_equal(signs, words.view(np.int32)[: signs.size])
    assert (signs.size == 0) == (not matrices)
