# SPDX-License-Identifier: Apache-2.0
"""Codes in groups: every ONNX body equals its NumPy reference, and the references are right."""

from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from quarot_onnx import ops
from quarot_onnx.ops import groups
from tests import running
from tests.test_ops import FLOAT16, FLOAT32, _tokens, run

Array = NDArray[Any]

_BITS = st.integers(3, 8)
_SHAPES = st.sampled_from([(8, 1), (8, 2), (24, 3), (64, 2), (70, 1), (688, 8)])  # k, groups
_SYMMETRIC = st.sampled_from([0, 1])


def _rows(seed: int, *shape: int, shift: float = 0.0, magnitude: float = 1.0) -> Array:
    """`_tokens`, some rows off centre: the asymmetric case."""
    x = _tokens(np.random.default_rng(seed), *shape, magnitude=magnitude)
    x[..., ::2, :] += np.float32(shift * magnitude)
    return x


# --- Quantizing -----------------------------------------------------------------------------------


@given(
    shape=_SHAPES,
    tokens=st.tuples(st.integers(1, 2), st.integers(1, 5)),
    bits=_BITS,
    symmetric=_SYMMETRIC,
    clip_ratio=st.sampled_from([0.6, 0.95, 1.0]),
    shift=st.sampled_from([-3.0, 0.0, 3.0]),
    magnitude=st.sampled_from([1e-44, 1e-30, 1.0, 1e30]),
    dtype=st.sampled_from([np.float32, np.float16]),
    seed=st.integers(0, 99),
)
@settings(max_examples=80, deadline=None)
def test_the_body_gives_the_codes_scales_and_zeros_of_the_reference_exactly(
    shape, tokens, bits, symmetric, clip_ratio, shift, magnitude, dtype, seed
) -> None:
    features, count = shape
    x = _rows(seed, *tokens, features, shift=shift, magnitude=magnitude)
    x = np.clip(x, -6e4, 6e4).astype(dtype) if dtype == np.float16 else x
    options = {
        "bits": bits,
        "clip_ratio": clip_ratio,
        "group_size": features // count,
        "symmetric": symmetric,
    }
    expected = groups.quantize_groups(x, **options)
    for found, wanted in zip(run("QuantizeGroups", x, **options), expected, strict=True):
        np.testing.assert_array_equal(found, wanted)
        assert found.dtype == wanted.dtype
    assert expected[1].shape == (*tokens, count)
    assert np.isfinite(expected[1]).all()


@given(bits=_BITS, seed=st.integers(0, 99))
def test_a_symmetric_row_as_one_group_has_the_codes_of_the_common_operator(bits, seed) -> None:
    x = _rows(seed, 7, 48)
    q, scale = ops.quantize_int4(x, bits=bits, clip_ratio=0.9)
    codes, by_group, zero = groups.quantize_groups(
        x, bits=bits, clip_ratio=0.9, group_size=48, symmetric=1
    )
    np.testing.assert_array_equal(by_group, scale)
    np.testing.assert_array_equal(codes - zero, q.astype(np.float32) - ops.ACTIVATION_ZERO_POINT)


@given(bits=_BITS, seed=st.integers(0, 99))
def test_an_asymmetric_head_as_one_group_has_the_codes_of_the_common_cache(bits, seed) -> None:
    x = _rows(seed, 7, 32, shift=2.0)
    found = groups.quantize_groups(x, bits=bits, clip_ratio=0.95, group_size=32, symmetric=0)
    for part, wanted in zip(found, ops.quantize_kv(x, bits=bits), strict=True):
        np.testing.assert_array_equal(part, wanted)


@given(bits=_BITS, symmetric=_SYMMETRIC, shape=_SHAPES, seed=st.integers(0, 99))
def test_the_error_is_a_step_at_most_without_a_clip(bits, symmetric, shape, seed) -> None:
    """Half a step of the value, and in the asymmetric form half a step of the zero point."""
    features, count = shape
    x = _rows(seed, 5, features, shift=1.0)
    codes, scale, zero = groups.quantize_groups(
        x, bits=bits, clip_ratio=1.0, group_size=features // count, symmetric=symmetric
    )
    error = np.abs(groups.group_values(codes, scale, zero).astype(np.float64) - x)
    steps = error.reshape(5, count, -1) / scale[..., None]
    assert steps.max() <= (0.5 if symmetric else 1) * (1 + 1e-4)
    assert codes.max() <= 2**bits - 1
    assert ((zero >= 0) & (zero <= 2**bits - 1)).all()


def test_a_row_of_one_sign_gains_a_bit_from_a_zero_point() -> None:
    x = np.abs(_rows(0, 64, 64))
    errors = []
    for symmetric, bits in ((0, 4), (1, 5), (1, 4)):
        values = groups.fake_quantize_groups(
            x, bits=bits, clip_ratio=1.0, group_size=64, symmetric=symmetric
        )
        errors.append(np.square(values - x).sum())
    assert errors[0] < 1.5 * errors[1]
    assert errors[0] < 0.5 * errors[2]


def test_an_outlier_costs_its_own_group_only() -> None:
    x = np.random.default_rng(1).normal(size=(4, 64)).astype(np.float32)
    x[:, 3] = 100
    values = groups.fake_quantize_groups(x, bits=4, clip_ratio=1.0, group_size=16, symmetric=1)
    assert (values[:, :16] == 0).mean() > 0.9
    assert np.abs(values[:, 16:] - x[:, 16:]).max() < 0.5


# --- Products -------------------------------------------------------------------------------------


def _stored(codes: Array, bits: int) -> Array:
    return codes.astype(ml_dtypes.int4 if bits <= 4 else np.int8)


class _Product:
    """A GEMM with its weight as initializers, which is how artifacts hold it."""

    def __init__(
        self,
        name: str,
        w: Array,
        w_scale: Array,
        dtype: ir.DataType,
        attributes: dict[str, Any],
        w_zero: Array | None = None,
    ) -> None:
        inputs = [
            ir.Value(name="q", type=ir.TensorType(ir.DataType.UINT8), shape=ir.Shape(["m", len(w)]))
        ]
        inputs += [
            ir.Value(name=part, type=ir.TensorType(FLOAT32), shape=ir.Shape(["m", "g"]))
            for part in ("scale", "zero")
        ]
        held = []
        for key, array in (("w", w), ("w_scale", w_scale), ("w_zero", w_zero)):
            if array is None:
                continue
            tensor = ir.tensor(array, name=key)
            value = ir.Value(name=key, type=ir.TensorType(tensor.dtype), shape=tensor.shape)
            value.const_value = tensor
            held.append(value)
        node = ops.node(name, [*inputs, *held], attributes | {"dtype": int(dtype)}, at="/gemm")
        node.outputs[0].type = ir.TensorType(dtype)
        graph = ir.Graph(
            inputs,
            node.outputs,
            nodes=[node],
            initializers=held,
            opset_imports={"": ops.OPSET},
            name="gemm",
        )
        self.model = ir.Model(graph, ir_version=10)
        ops.declare(self.model)

    def __call__(self, q: Array, scale: Array, zero: Array, *, optimized: bool = True) -> Array:
        feeds = {"q": q, "scale": scale, "zero": zero}
        return next(iter(running.run(self.model, feeds, optimized=optimized).values()))


@given(
    tokens=st.integers(1, 7),
    shape=_SHAPES,
    out_features=st.integers(1, 40),
    bits=st.sampled_from([(3, 3), (4, 4), (6, 6), (8, 8), (4, 8), (8, 4), (7, 5)]),
    symmetric=_SYMMETRIC,
    weight_groups=st.booleans(),
    dtype=st.sampled_from([FLOAT32, FLOAT16]),
    optimized=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_products_equal_their_reference_bit_for_bit(
    tokens, shape, out_features, bits, symmetric, weight_groups, dtype, optimized, seed
) -> None:
    rng = np.random.default_rng(seed)
    (features, count), (bits_a, bits_w) = shape, bits
    x = _rows(seed, tokens, features, shift=1.0)
    size = features // count
    options = {"bits": bits_a, "clip_ratio": 0.9, "symmetric": symmetric}
    top = 2 ** (bits_w - 1)
    w = _stored(rng.integers(-top, top, (features, out_features)), bits_w)
    name = f"Int{4 if max(bits) <= 6 else 8}Gemm"
    channel = rng.uniform(1e-4, 1e-2, out_features).astype(np.float32)

    codes = groups.quantize_groups(x, group_size=features, **options)
    product = _Product(f"{name}Asymmetric", w, channel, dtype, {})
    expected = groups.gemm_asymmetric(*codes, w.astype(np.int8), channel, dtype=dtype.numpy())
    np.testing.assert_array_equal(product(*codes, optimized=optimized), expected)

    if weight_groups:
        channel = rng.uniform(1e-4, 1e-2, (count, out_features)).astype(np.float32)
    product = _Product(f"{name}Groups", w, channel, dtype, {"group_size": size})
    for group_size in (size, features):
        codes = groups.quantize_groups(x, group_size=group_size, **options)
        expected = groups.gemm_groups(
            *codes, w.astype(np.int8), channel, group_size=size, dtype=dtype.numpy()
        )
        np.testing.assert_array_equal(product(*codes, optimized=optimized), expected)


@given(
    tokens=st.integers(1, 5),
    sizes=st.sampled_from([(4, 1, 1, 1), (4, 4, 4, 2), (2, 6, 2, 3), (86, 8, 1, 8), (32, 6, 3, 2)]),
    out_features=st.integers(1, 40),
    bits=st.sampled_from([(3, 2), (4, 4), (6, 6), (8, 8), (4, 8), (8, 4), (7, 5), (4, 7)]),
    symmetric=_SYMMETRIC,
    has_zeros=st.booleans(),
    dtype=st.sampled_from([FLOAT32, FLOAT16]),
    optimized=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=80, deadline=None)
def test_products_with_weights_in_groups_are_exact_in_every_group(
    tokens, sizes, out_features, bits, symmetric, has_zeros, dtype, optimized, seed
) -> None:
    """Activation groups and weight groups of other sizes than the parts that are summed."""
    rng = np.random.default_rng(seed)
    (size, parts, of_token, of_weight), (bits_a, bits_w) = sizes, bits
    features, top = size * parts, 2 ** (bits_w - 1)
    x = _rows(seed, tokens, features, shift=1.0)
    codes = groups.quantize_groups(
        x, bits=bits_a, clip_ratio=0.9, group_size=features // of_token, symmetric=symmetric
    )
    w = rng.integers(-top, top, (features, out_features))
    w_scale = rng.uniform(1e-4, 1e-2, (of_weight, out_features)).astype(np.float32)
    zero = rng.integers(-top, top, w_scale.shape).astype(np.int8) if has_zeros else None
    name = f"Int{4 if max(bits) <= 6 else 8}Gemm{'WeightZeros' if has_zeros else 'Groups'}"
    product = _Product(name, _stored(w, bits_w), w_scale, dtype, {"group_size": size}, zero)
    found = product(*codes, optimized=optimized)

    expected = groups.gemm_groups(*codes, w, w_scale, zero, group_size=size, dtype=dtype.numpy())
    np.testing.assert_array_equal(found, expected)
    by_row = np.repeat(w_scale.astype(np.float64), features // of_weight, axis=0)
    zeros = 0 if zero is None else np.repeat(zero.astype(int), features // of_weight, axis=0)
    values = groups.group_values(*codes).astype(np.float64)
    plain = values @ ((w - zeros) * by_row)
    magnitude = np.abs(values) @ np.abs((w - zeros) * by_row)
    whole = groups.gemm_groups(*codes, w, w_scale, zero, group_size=size)
    assert np.all(np.abs(whole - plain) <= 1e-6 * magnitude)


@pytest.mark.parametrize("optimized", [True, False], ids=["optimized", "unoptimized"])
@pytest.mark.parametrize("bits", [(4, 4), (6, 6), (8, 8), (8, 4), (4, 8), (3, 7)], ids=str)
def test_sums_of_extreme_codes_and_zero_points_of_weights_are_exact(bits, optimized) -> None:
    bits_a, bits_w = bits
    rng = np.random.default_rng(0)
    last, top, features = 2**bits_a - 1, 2 ** (bits_w - 1), 4096
    q = rng.choice([0, last], size=(5, features)).astype(np.uint8)
    q[0], q[1] = last, 0
    w = rng.choice([-top, top - 1], size=(features, 9))
    w[:, 0], w[:, 1] = -top, top - 1
    w_zero = rng.choice([-top, top - 1, 0], size=(1, 9)).astype(np.int8)
    w_zero[0, :2] = top - 1, -top
    zero = np.array([0, last, last, last // 2, 1], np.float32)[:, None]
    exact = (q.astype(np.int64) - zero.astype(np.int64)) @ (w - w_zero.astype(np.int64))
    assert np.abs(exact).max() == features * last * (2 * top - 1)
    name = f"Int{4 if max(bits) <= 6 else 8}GemmWeightZeros"
    ones, channel = np.ones((5, 1), np.float32), np.ones((1, 9), np.float32)
    options = {"group_size": features}
    product = _Product(name, _stored(w, bits_w), channel, FLOAT32, options, w_zero)
    found = product(q, ones, zero, optimized=optimized)
    np.testing.assert_array_equal(found, exact.astype(np.float32))


@pytest.mark.parametrize("optimized", [True, False], ids=["optimized", "unoptimized"])
@pytest.mark.parametrize("features", [2, 64, 4096])
@pytest.mark.parametrize("bits", [(4, 4), (6, 6), (8, 8), (8, 4), (4, 8), (3, 7)], ids=str)
def test_sums_of_extreme_codes_are_exact(bits, features, optimized) -> None:
    """All codes at the ends of their range: where 16-bit partial sums would saturate."""
    bits_a, bits_w = bits
    rng = np.random.default_rng(features)
    last, top = 2**bits_a - 1, 2 ** (bits_w - 1)
    q = rng.choice([0, last], size=(5, features)).astype(np.uint8)
    q[0], q[1] = last, 0
    w = rng.choice([-top, top - 1], size=(features, 9))
    w[:, 0], w[:, 1], w[:, 2] = -top, top - 1, 0
    zero = np.array([0, 0, last, last // 2, 1], np.float32)[:, None]
    ones, channel = np.ones((5, 1), np.float32), np.ones(9, np.float32)
    exact = ((q.astype(np.int64) - zero.astype(np.int64)) @ w).astype(np.float32)
    assert np.abs(exact).max() > 0
    name = f"Int{4 if max(bits) <= 6 else 8}Gemm"
    token = _Product(f"{name}Asymmetric", _stored(w, bits_w), channel, FLOAT32, {})
    np.testing.assert_array_equal(token(q, ones, zero, optimized=optimized), exact)
    group = _Product(
        f"{name}Groups", _stored(w, bits_w), channel, FLOAT32, {"group_size": features}
    )
    np.testing.assert_array_equal(group(q, ones, zero, optimized=optimized), exact)


def test_products_keep_leading_axes() -> None:
    x = _rows(5, 2, 3, 16)
    rng = np.random.default_rng(5)
    w, w_scale = rng.integers(-8, 8, (16, 5)).astype(np.int8), np.ones(5, np.float32)
    codes = groups.quantize_groups(x, bits=4, clip_ratio=1.0, group_size=4, symmetric=0)
    (y,) = run("Int4GemmGroups", *codes, w, w_scale, group_size=4, dtype=int(FLOAT32))
    assert y.shape == (2, 3, 5)
    np.testing.assert_array_equal(y, groups.gemm_groups(*codes, w, w_scale, group_size=4))
    one = np.ones((2, 5), np.int8)
    for name in ("Int4GemmWeightZeros", "Int8GemmWeightZeros"):
        for count in (2, 0):  # an expert may get no token
            few = [part[:count] for part in codes]
            scales = np.ones((2, 5), np.float32)
            (y,) = run(name, *few, w, scales, one, group_size=4, dtype=int(FLOAT32))
            assert y.shape == (count, 3, 5)
            expected = groups.gemm_groups(*few, w, scales, one, group_size=4)
            np.testing.assert_array_equal(y, expected)
    codes = groups.quantize_groups(x, bits=4, clip_ratio=1.0, group_size=16, symmetric=0)
    (y,) = run("Int4GemmAsymmetric", *codes, w, w_scale, dtype=int(FLOAT32))
    np.testing.assert_array_equal(y, groups.gemm_asymmetric(*codes, w, w_scale))


def test_a_product_of_codes_is_the_product_of_the_values_they_stand_for() -> None:
    x = _rows(6, 9, 48, shift=1.0)
    rng = np.random.default_rng(6)
    w, w_scale = rng.integers(-8, 8, (48, 5)), rng.uniform(1, 2, (4, 5)).astype(np.float32)
    dense = w * np.repeat(w_scale.astype(np.float64), 12, axis=0)
    codes = groups.quantize_groups(x, bits=4, clip_ratio=0.9, group_size=12, symmetric=0)
    found = groups.gemm_groups(*codes, w, w_scale, group_size=12)
    np.testing.assert_allclose(found, groups.group_values(*codes) @ dense, rtol=1e-4, atol=1e-4)


# --- Cache ----------------------------------------------------------------------------------------


@given(
    length=st.integers(1, 5),
    past=st.integers(0, 4),
    shape=st.sampled_from([(2, 1), (8, 1), (8, 2), (24, 3), (64, 4)]),
    bits=_BITS,
    symmetric=_SYMMETRIC,
    dtype=st.sampled_from([np.float32, np.float16]),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_an_appended_token_is_stored_read_back_and_faked_alike(
    length, past, shape, bits, symmetric, dtype, seed
) -> None:
    size, count = shape
    options = {
        "bits": bits,
        "clip_ratio": 0.95,
        "group_size": size // count,
        "symmetric": symmetric,
    }
    old = _rows(seed, 2, 3, past + 1, size, shift=1.0)[:, :, :past]  # perhaps an empty cache
    held = groups.quantize_groups(old, **options)
    cache = (ops.pack_kv(held[0]) if bits <= 4 else held[0], *held[1:])
    new = _rows(seed + 1, 2, 3, length, size, shift=1.0).astype(dtype)
    suffix = "" if bits <= 4 else "Int8"
    present = run(f"KvAppendGroups{suffix}", new, *cache, **options)
    expected = ops.kv_append_groups(new, *cache, **options)
    for found, wanted in zip(present, expected, strict=True):
        np.testing.assert_array_equal(found, wanted)
    assert present[0].shape[-1] == (size // 2 if bits <= 4 else size)

    kind = FLOAT32 if dtype == np.float32 else FLOAT16
    (values,) = run(f"KvDequantize{suffix}", *present, dtype=int(kind))
    np.testing.assert_array_equal(
        values, ops.kv_dequantize(*expected, bits=bits, dtype=kind.numpy())
    )
    (fake,) = run("KvFakeQuantizeGroups", new, **options)
    np.testing.assert_array_equal(fake, groups.fake_quantize_groups(new, **options))
    np.testing.assert_array_equal(fake, values[:, :, past:])


def test_a_symmetric_cache_is_read_by_the_common_attention() -> None:
    rng = np.random.default_rng(9)
    x = _rows(9, 1, 2, 3, 8)
    options = {"bits": 4, "clip_ratio": 0.95, "group_size": 8, "symmetric": 1}
    codes, scale, zero = groups.quantize_groups(x, **options)
    assert (zero == 8).all()
    q = rng.normal(size=(1, 4, 1, 8)).astype(np.float32)
    only_token_1 = np.array([False, True, False]).reshape(1, 1, 1, 3)
    stored = (ops.pack_kv(codes), scale, zero)
    (y,) = run("KvAttention", q, *stored, *stored, only_token_1, scale=1.0)
    values = groups.fake_quantize_groups(x, **options)
    np.testing.assert_allclose(y[0, :, 0], values[0, [0, 0, 1, 1], 1], atol=1e-5)
