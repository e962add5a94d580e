# SPDX-License-Identifier: Apache-2.0
"""Rows through the transform kernels: every order, prologue and output, against float64.

Codes are compared exactly. Where the reference's own last bit decides (a quotient within 1e-6 of
the middle of two codes) both codes are right; inputs on an integer grid have no such quotients.
"""

import ctypes
import itertools
import math
from typing import Final

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quarot_onnx import ops
from quarot_onnx.errors import UnsupportedModelError
from quarot_onnx.hadamard import hadamard_matrix, plan
from quarot_onnx.plugins import layouts
from quarot_onnx.plugins.kernels import ABI_VERSION, Dtype, HadamardPlan, Prologue
from quarot_onnx.plugins.layouts import Layout
from tests.kernels.reference import NUMPY, mismatches, rotate

CLIP: Final = 0.9
BOTH: Final = [Dtype.FP16, Dtype.BF16]

# Row length, factors, length of the trailing identity.
POWERS_OF_TWO: Final = [
    (128, (128,), 1),
    (256, (64,), 1),
    (384, (128,), 1),
    (512, (16, 32), 1),
    (1024, (1024,), 1),
    (1536, (512,), 1),
    (2048, (32, 64), 1),
    (4096, (64, 64), 1),
    (4096, (2,), 1),
    (8192, (64, 128), 1),
    (11008, (256,), 1),
    (16384, (128, 128), 1),
    (32768, (128, 256), 1),
]
DENSE: Final = [
    (768, (12, 2, 32), 1),
    (1408, (44, 32), 1),
    (4864, (76, 64), 1),
    (5120, (20, 4, 64), 1),
    (6912, (36, 2, 12, 8), 1),
    (8960, (28, 4, 20, 4), 1),
    (9728, (76, 128), 1),
    (10752, (12, 128), 1),
    (11008, (172, 64), 1),
    (13824, (12, 12, 12, 8), 1),
    (14336, (28, 4, 128), 1),
    (18944, (148, 128), 1),
    (24576, (12, 16, 128), 1),
    (28672, (28, 8, 128), 1),
    (29568, (12, 28, 44, 2), 1),
]
HEADS: Final = [
    (4096, (4, 8), 128),
    (2048, (8, 4), 64),
    (3584, (28,), 128),
    (5120, (20, 2), 128),
    (6144, (12, 4), 128),
    (1536, (12, 2), 64),
    (8192, (32,), 256),
]
# What one block cannot hold, by compute capability; on a GPU, what that GPU does with these rows.
WIDE: Final = [
    ((53248, (52, 4, 256), 1), 90),
    ((36864, (12, 16, 12, 16), 1), 80),
    ((65536, (256, 256), 1), 90),
    ((36864, (512,), 1), 90),
    ((32768, (64,), 512), 89),
    ((28672, (28, 8, 128), 1), 86),
    ((28672, (8,), 1), 86),
    ((29568, (12, 28, 44, 2), 1), 120),
    ((18944, (148, 128), 1), 89),
]
ORDERS: Final = [*POWERS_OF_TWO, *DENSE, *HEADS]


def rows_of(n: int, rows: int, dtype: Dtype, seed: int = 0) -> np.ndarray:
    """Gaussian rows with one spike each, in the 16-bit dtype."""
    random = np.random.default_rng([n, rows, seed])
    x = random.standard_normal((rows, n))
    x[np.arange(rows), random.integers(0, n, rows)] *= 30
    return x.astype(NUMPY[dtype])


@pytest.fixture
def transform(library):
    """``transform(x, dtype, ...)`` -> y, or (codes, scale) when ``layout`` is given."""

    def make_plan(factors: tuple[int, ...], inner: int) -> tuple[HadamardPlan, object]:
        matrices = [hadamard_matrix(f) for f in factors if f & (f - 1)]
        made, words = library.kernels.hadamard_plan(factors, matrices, inner=inner)
        held = library.put(words)
        made.signs = held.pointer
        return made, held

    def call(
        x: np.ndarray,
        dtype: Dtype,
        *,
        factors: tuple[int, ...] | None = None,
        inner: int = 1,
        layout: Layout | None = None,
        up: np.ndarray | None = None,
        norm: np.ndarray | None = None,
        prologue: Prologue = Prologue.NONE,
        padding: int = 0,
        seed: int = 0,
        clip: float = CLIP,
        capability: int = 90,
    ):
        library.configure(seed=seed, workers=2, compute_capability=capability)
        rows, n = x.shape
        made, held = make_plan(factors, inner) if factors is not None else (None, None)
        spread = np.full((rows, n + padding), 3, x.dtype)
        spread[:, :n] = x
        arguments = {"x": library.put(spread)}
        if up is not None:
            arguments["up"] = library.put(up)
        if norm is not None:
            arguments["norm_weight"] = library.put(norm)
        if layout is None:
            arguments["y"] = library.put(np.full((rows, n), -9, x.dtype))
        else:
            shape = layouts.split_shape(rows, n) if layout == Layout.ACTIVATIONS_SPLIT_V1 else None
            arguments["codes"] = library.put(np.full(shape or (rows, n // 2), 0x5B, np.uint8))
            arguments["scale"] = library.put(np.full(rows, np.nan, np.float32))
        need = library.kernels.transform_workspace_size(rows, n, made, prologue)
        if need:  # whatever is in it
            arguments["workspace"] = library.put(np.full(need, 0x7B, np.uint8))
        library.kernels.transform(
            dtype,
            rows,
            n,
            **{name: buffer.pointer for name, buffer in arguments.items()},
            workspace_bytes=need,
            x_stride=n + padding,
            prologue=prologue,
            hadamard=made,
            layout=layout or Layout.ACTIVATIONS_PACKED_V1,
            clip_ratio=clip,
        )
        del held
        if layout is None:
            return arguments["y"].read()
        codes = arguments["codes"].read()
        if layout == Layout.ACTIVATIONS_SPLIT_V1:
            codes = layouts.packed_from_split(codes.view(np.int8), rows, n)
        return layouts.codes_from_packed(codes).astype(int), arguments["scale"].read()

    return call


def scale_of(y: np.ndarray, clip: float = CLIP) -> np.ndarray:
    amax = np.abs(y).max(axis=1).astype(np.float32)
    return np.where(amax == 0, np.float32(1), amax * (np.float32(clip) / np.float32(7)))


def assert_codes(codes, scale, y: np.ndarray, *, error: float = 1e-6, clip: float = CLIP) -> None:
    np.testing.assert_allclose(scale, scale_of(y, clip), rtol=max(error, 3e-7))
    wrong = mismatches(codes, y, scale, error=error)
    assert not wrong.any(), f"{wrong.sum()} codes differ, the first at {np.argwhere(wrong)[0]}"


@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_the_transform_equals_float64_to_one_rounding(transform, order, dtype):
    n, factors, inner = order
    x = rows_of(n, 3, dtype)
    y = transform(x, dtype, factors=factors, inner=inner, seed=1)
    want = rotate(x, factors, inner) / math.sqrt(math.prod(factors))
    half_ulp = float(np.finfo(NUMPY[dtype]).eps if dtype == Dtype.FP16 else 2**-7) / 2
    bound = half_ulp * np.abs(want) + 2e-6 * np.abs(want).max(axis=1, keepdims=True)
    assert (np.abs(y.astype(np.float64) - want) <= bound).all()


@pytest.mark.parametrize("layout", [Layout.ACTIVATIONS_PACKED_V1, Layout.ACTIVATIONS_SPLIT_V1])
@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_fused_codes_and_scales_are_those_of_the_reference(transform, order, dtype, layout):
    n, factors, inner = order
    x = rows_of(n, 3, dtype, seed=1)
    codes, scale = transform(x, dtype, factors=factors, inner=inner, layout=layout, seed=2)
    assert_codes(codes, scale, rotate(x, factors, inner) / math.sqrt(math.prod(factors)))


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_integers_give_the_very_codes_and_scale_of_ops(transform, order):
    # Sums of integers are exact in any order, so nothing is left to chance, ties included.
    n, factors, inner = order
    x = np.random.default_rng(n).integers(-3, 4, (2, n)).astype(np.float16)
    codes, scale = transform(
        x, Dtype.FP16, factors=factors, inner=inner, layout=Layout.ACTIVATIONS_PACKED_V1, seed=3
    )
    norm = np.float32(1 / math.sqrt(math.prod(factors)))
    q, want = ops.quantize_int4(rotate(x, factors, inner).astype(np.float32) * norm)
    assert (scale == want[:, 0]).all()
    assert (codes == q.astype(int) - 128).all()


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
@pytest.mark.parametrize("rows", [1, 2, 5, 9, 17])
@pytest.mark.parametrize(
    "order", [(256, (256,), 1), (4096, (64, 64), 1), (768, (12, 2, 32), 1)], ids=str
)
def test_any_number_of_rows_in_any_thread_order(transform, order, rows, seed):
    n, factors, inner = order
    x = rows_of(n, rows, Dtype.BF16, seed)
    for layout in (Layout.ACTIVATIONS_PACKED_V1, Layout.ACTIVATIONS_SPLIT_V1):
        codes, scale = transform(x, Dtype.BF16, factors=factors, layout=layout, seed=seed)
        assert_codes(codes, scale, rotate(x, factors, inner) / math.sqrt(math.prod(factors)))


@pytest.mark.parametrize("n", [128, 640, 896, 4096, 11008, 32768])
@pytest.mark.parametrize("layout", [Layout.ACTIVATIONS_PACKED_V1, Layout.ACTIVATIONS_SPLIT_V1])
def test_quantizing_alone_gives_the_codes_of_ops_to_the_bit(transform, n, layout):
    for dtype in BOTH:
        x = rows_of(n, 5, dtype)
        codes, scale = transform(x, dtype, layout=layout, padding=8)
        q, want = ops.quantize_int4(x.astype(np.float32))
        assert (scale == want[:, 0]).all()
        assert (codes == q.astype(int) - 128).all()


@pytest.mark.parametrize("clip", [1.0, 0.9, 0.5, 0.1])
def test_ties_round_to_even_and_the_range_is_clipped(transform, clip):
    # Every quotient k/2 within the range, and beyond it: scale = 7 * clip / 7 with amax 7.
    x = np.tile(np.arange(-14, 14, dtype=np.float32) / 2 * clip, 5)[:128][None].astype(np.float16)
    x[0, 0] = 7
    codes, scale = transform(x, Dtype.FP16, layout=Layout.ACTIVATIONS_PACKED_V1, clip=clip)
    q, want = ops.quantize_int4(x.astype(np.float32), clip_ratio=clip)
    assert (scale == want[:, 0]).all()
    assert (codes == q.astype(int) - 128).all()


@pytest.mark.parametrize("factors", [None, (128,), (12, 32)])
def test_a_zero_row_has_scale_one_and_zero_codes(transform, factors):
    x = rows_of(384, 3, Dtype.FP16)
    x[1] = 0
    codes, scale = transform(x, Dtype.FP16, factors=factors, layout=Layout.ACTIVATIONS_PACKED_V1)
    assert scale[1] == 1
    assert not codes[1].any()
    assert codes[0].any()


@pytest.mark.parametrize("factors", [None, (128,), (12, 32)])
@pytest.mark.parametrize("magnitude", [1e-38, 6e-8, 3e4])
def test_tiny_and_large_rows_keep_their_codes(transform, factors, magnitude):
    dtype = Dtype.BF16 if magnitude < 1e-8 else Dtype.FP16
    x = (np.random.default_rng(1).integers(-1, 2, (2, 384)) * magnitude).astype(NUMPY[dtype])
    codes, scale = transform(x, dtype, factors=factors, layout=Layout.ACTIVATIONS_PACKED_V1)
    want = rotate(x, factors or ()) / math.sqrt(math.prod(factors or ()))
    assert np.isfinite(scale).all()
    assert_codes(codes, scale, want, error=1e-5)


def silu_mul(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    gate, up = gate.astype(np.float64), up.astype(np.float64)
    return gate / (1 + np.exp(-gate)) * up


def rms_norm(x: np.ndarray, weight: np.ndarray | None, epsilon: float = 1e-6) -> np.ndarray:
    x = x.astype(np.float64)
    y = x / np.sqrt((x * x).mean(axis=1, keepdims=True) + epsilon)
    return y if weight is None else y * weight.astype(np.float64)


@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("order", [(4096, None, 1), *POWERS_OF_TWO[4:], *DENSE], ids=str)
def test_silu_times_up_in_front_equals_the_separate_operators(transform, order, dtype):
    n, factors, inner = order
    gate, up = rows_of(n, 3, dtype, seed=2), rows_of(n, 3, dtype, seed=3)
    options = {"up": up, "prologue": Prologue.SILU_MUL, "padding": 16}
    stored = transform(gate, dtype, **options)
    want = silu_mul(gate, up)
    ulp = 2.0**-10 if dtype == Dtype.FP16 else 2.0**-7
    assert (np.abs(stored.astype(np.float64) - want) <= ulp * 0.501 * np.abs(want) + 1e-7).all()
    fused = transform(
        gate, dtype, factors=factors, inner=inner, layout=Layout.ACTIVATIONS_PACKED_V1, **options
    )
    apart = transform(
        stored, dtype, factors=factors, inner=inner, layout=Layout.ACTIVATIONS_PACKED_V1
    )
    assert (fused[0] == apart[0]).all()
    assert (fused[1] == apart[1]).all()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize(
    "order",
    [(256, None, 1), (4096, None, 1), (512, (512,), 1), (4096, (64, 64), 1), *DENSE[:4]],
    ids=str,
)
def test_rms_norm_in_front_equals_the_separate_operators(transform, order, dtype, weighted):
    n, factors, inner = order
    x = rows_of(n, 5, dtype, seed=4)
    weight = rows_of(n, 1, dtype, seed=5)[0] if weighted else None
    options = {"norm": weight, "prologue": Prologue.RMSNORM}
    want = rms_norm(x, weight)
    ulp = 2.0**-10 if dtype == Dtype.FP16 else 2.0**-7
    # The order of the sum of squares depends on who owns which element.
    stored = transform(x, dtype, **options)
    assert (np.abs(stored.astype(np.float64) - want) <= ulp * 0.51 * np.abs(want) + 1e-7).all()
    codes, scale = transform(
        x, dtype, factors=factors, inner=inner, layout=Layout.ACTIVATIONS_PACKED_V1, **options
    )
    rotated = rotate(stored, factors or (), inner) / math.sqrt(math.prod(factors or ()))
    assert_codes(codes, scale, rotated, error=2e-3 if factors else 1e-6)


def test_the_prologue_reads_gate_and_up_from_one_matrix(library, transform):
    gate_up = rows_of(512, 4, Dtype.FP16)
    held = library.put(gate_up)
    y = library.put(np.zeros((4, 256), np.float16))
    library.kernels.transform(
        Dtype.FP16,
        4,
        256,
        held.pointer,
        x_stride=512,
        up=held.pointer + 512,
        up_stride=512,
        prologue=Prologue.SILU_MUL,
        y=y.pointer,
    )
    want = silu_mul(gate_up[:, :256], gate_up[:, 256:])
    np.testing.assert_allclose(y.read().astype(np.float64), want, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    "order", [o for o in POWERS_OF_TWO if o[0] >= 2048 and o[0] != 11008], ids=str
)
def test_powers_of_two_exchange_without_bank_conflicts(emulated, transform, order):
    n, factors, inner = order
    for quantize, prologue in itertools.product((False, True), (Prologue.NONE, Prologue.RMSNORM)):
        emulated.reset_counters()
        emulated.configure(count_banks=True)
        x = emulated.put(rows_of(n, 1, Dtype.FP16))
        made, _ = emulated.kernels.hadamard_plan(factors, [], inner=inner)
        out, scale = emulated.put(np.zeros(n, np.float16)), emulated.put(np.zeros(1, np.float32))
        target = {"codes": out.pointer, "scale": scale.pointer} if quantize else {"y": out.pointer}
        emulated.kernels.transform(
            Dtype.FP16, 1, n, x.pointer, hadamard=made, prologue=prologue, **target
        )
        counters = emulated.counters()
        emulated.configure()
        assert counters.vector_accesses > 0
        assert counters.vector_conflicts == 0


@pytest.mark.parametrize(
    "order", [(14336, (28, 4, 128), 1), (28672, (28, 8, 128), 1), (11008, (172, 64), 1)], ids=str
)
def test_dense_factors_have_few_bank_conflicts(emulated, order):
    # Not none: rows past the order read one common zero, and 86 blocks do not fill the last warp.
    n, factors, inner = order
    matrices = [hadamard_matrix(f) for f in factors if f & (f - 1)]
    made, words = emulated.kernels.hadamard_plan(factors, matrices, inner=inner)
    held = emulated.put(words)
    made.signs = held.pointer
    x, out = emulated.put(rows_of(n, 1, Dtype.FP16)), emulated.put(np.zeros(n, np.float16))
    emulated.reset_counters()
    emulated.configure(count_banks=True)
    emulated.kernels.transform(Dtype.FP16, 1, n, x.pointer, hadamard=made, y=out.pointer)
    counters = emulated.counters()
    emulated.configure()
    assert counters.matrix_load_conflicts <= 0.15 * counters.matrix_loads
    assert counters.vector_conflicts <= 0.4 * counters.vector_accesses


def test_the_plan_of_factors_is_their_product_with_butterflies_last(library):
    def dense_and_butterflies(factors):
        matrices = [hadamard_matrix(f) for f in factors if f & (f - 1)]
        made, _ = library.kernels.hadamard_plan(factors, matrices)
        return tuple(made.dense), made.butterflies

    assert dense_and_butterflies((64, 64)) == ((0, 0, 0), 4096)
    assert dense_and_butterflies((28, 4, 128)) == ((28, 0, 0), 512)
    assert dense_and_butterflies((36, 2, 12, 8)) == ((36, 24, 0), 8)
    assert dense_and_butterflies((12, 12, 12, 8)) == ((12, 12, 12), 8)
    assert dense_and_butterflies((12,)) == ((12, 0, 0), 1)


@pytest.mark.parametrize("layout", [Layout.ACTIVATIONS_PACKED_V1, Layout.ACTIVATIONS_SPLIT_V1])
@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize(("order", "capability"), WIDE, ids=str)
def test_wide_rows_give_the_codes_and_scales_of_the_reference(
    transform, order, capability, dtype, layout
):
    n, factors, inner = order
    x = rows_of(n, 3, dtype, seed=1)
    options = {"layout": layout, "capability": capability, "padding": 8}
    codes, scale = transform(x, dtype, factors=factors, inner=inner, seed=2, **options)
    assert_codes(codes, scale, rotate(x, factors, inner) / math.sqrt(math.prod(factors)))


@pytest.mark.parametrize(("order", "capability"), WIDE, ids=str)
def test_wide_rows_of_integers_give_the_very_codes_and_scale_of_ops(transform, order, capability):
    n, factors, inner = order
    x = np.random.default_rng(n).integers(-3, 4, (2, n)).astype(np.float16)
    options = {"layout": Layout.ACTIVATIONS_PACKED_V1, "capability": capability}
    codes, scale = transform(x, Dtype.FP16, factors=factors, inner=inner, seed=3, **options)
    norm = np.float32(1 / math.sqrt(math.prod(factors)))
    q, want = ops.quantize_int4(rotate(x, factors, inner).astype(np.float32) * norm)
    assert (scale == want[:, 0]).all()
    assert (codes == q.astype(int) - 128).all()


@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize(("order", "capability"), WIDE, ids=str)
def test_wide_rows_are_stored_as_float64_to_one_rounding(transform, order, capability, dtype):
    n, factors, inner = order
    x = rows_of(n, 2, dtype)
    y = transform(x, dtype, factors=factors, inner=inner, seed=1, capability=capability)
    want = rotate(x, factors, inner) / math.sqrt(math.prod(factors))
    half_ulp = float(np.finfo(NUMPY[dtype]).eps if dtype == Dtype.FP16 else 2**-7) / 2
    bound = half_ulp * np.abs(want) + 2e-6 * np.abs(want).max(axis=1, keepdims=True)
    assert (np.abs(y.astype(np.float64) - want) <= bound).all()


@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize(("order", "capability"), WIDE[5:], ids=str)
def test_a_wide_row_has_the_codes_that_the_same_row_has_in_one_block(
    transform, order, capability, dtype
):
    # SiLU in front, too: on sm_90 these rows fit a block.
    n, factors, inner = order
    gate, up = rows_of(n, 2, dtype, seed=2), rows_of(n, 2, dtype, seed=3)
    wide, whole = (
        transform(
            gate, dtype, factors=factors, inner=inner, up=up, prologue=Prologue.SILU_MUL,
            layout=Layout.ACTIVATIONS_PACKED_V1, capability=each,
        )
        for each in (capability, 90)
    )  # fmt: skip
    np.testing.assert_allclose(wide[1], whole[1], rtol=3e-7)
    assert (wide[0] != whole[0]).mean() < 1e-4


def test_a_wide_row_without_its_workspace_or_behind_a_norm_is_refused(library):
    library.configure()
    n = 65536
    made, _ = library.kernels.hadamard_plan((256, 256), [])
    x, y = (library.put(np.zeros((1, n), np.float16)) for _ in range(2))
    need = library.kernels.transform_workspace_size(1, n, made)
    assert need == 4 * n + 16
    assert library.kernels.transform_workspace_size(1, 4096, HadamardPlan((0, 0, 0), 4096, 1)) == 0
    held = library.put(np.zeros(need, np.uint8))
    call = {"x": x.pointer, "y": y.pointer, "hadamard": made}
    for pointer, size, options, message in (
        (held.pointer, need - 1, {}, "workspace"),
        (None, need, {}, "null"),
        (held.pointer + 8, need, {}, "aligned"),
        (held.pointer, need, {"prologue": Prologue.RMSNORM}, "table of supported shapes"),
    ):
        with pytest.raises(UnsupportedModelError, match=message):
            library.kernels.transform(
                Dtype.FP16, 1, n, workspace=pointer, workspace_bytes=size, **call, **options
            )


@pytest.mark.parametrize("capability", [80, 86, 90, 120])
@pytest.mark.parametrize(
    "n",
    [
        *(768, 1536, 2560, 3072, 4096, 4864, 5632, 6144, 6912, 8192, 8960, 9216, 9728, 10240),
        *(11008, 12288, 13824, 14336, 16384, 17408, 17920, 18944, 22016, 24576, 25600, 27648),
        *(1408, 15360, 21504, 28672, 29568, 32768, 36864, 53248),
    ],
)
def test_every_intermediate_size_of_known_models_is_supported(transform, n, capability):
    x = rows_of(n, 1, Dtype.FP16)
    factors = plan(n).factors
    options = {"layout": Layout.ACTIVATIONS_PACKED_V1, "capability": capability}
    codes, scale = transform(x, Dtype.FP16, factors=factors, **options)
    assert_codes(codes, scale, rotate(x, factors) / math.sqrt(math.prod(factors)))


REFUSALS: Final = [
    ("n=96 is not a multiple of 128", {"n": 96}, "table of supported shapes"),
    (
        "n above 32768 without a transform",
        {"n": 36864, "x_stride": 36864},
        "table of supported shapes",
    ),
    ("n above 65536", {"n": 65664, "x_stride": 65664}, "table of supported shapes"),
    ("negative rows", {"rows": -1}, "table of supported shapes"),
    ("no input", {"x": None}, "null"),
    ("a misaligned input", {"x": 8}, "16-byte aligned"),
    ("a stride below n", {"x_stride": 248}, "out of range"),
    ("a stride that breaks alignment", {"x_stride": 260}, "out of range"),
    ("a clip ratio of zero", {"clip_ratio": 0.0}, "out of range"),
    ("a clip ratio above one", {"clip_ratio": 1.1}, "out of range"),
    ("the layout of weights", {"layout": Layout.WEIGHTS_PACKED_V1}, "layout"),
    ("an integer dtype", {"dtype": Dtype.INT32}, "dtype"),
    ("no scale", {"scale": None}, "null"),
    ("SiLU without up", {"prologue": Prologue.SILU_MUL}, "null"),
    ("a plan that does not divide n", {"hadamard": HadamardPlan((0, 0, 0), 512, 1)}, "plan"),
    ("butterflies of 3", {"hadamard": HadamardPlan((0, 0, 0), 3, 1)}, "plan"),
    ("a dense factor of 6", {"hadamard": HadamardPlan((6, 0, 0), 2, 1)}, "plan"),
    ("a dense factor of 196", {"hadamard": HadamardPlan((196, 0, 0), 8, 1)}, "plan"),
    ("a dense factor without signs", {"hadamard": HadamardPlan((4, 0, 0), 64, 1)}, "null"),
]


@pytest.mark.parametrize(
    ("changes", "message"), [r[1:] for r in REFUSALS], ids=[r[0] for r in REFUSALS]
)
def test_refuses_what_is_not_in_the_table(library, changes, message):
    arguments = {"dtype": Dtype.FP16, "rows": 2, "n": 256, "layout": Layout.ACTIVATIONS_PACKED_V1}
    held = {
        "x": library.put(np.zeros((2, 256), np.float16)),
        "codes": library.put(np.full((2, 128), 7, np.uint8)),
        "scale": library.put(np.full(2, 7, np.float32)),
    }
    arguments |= {name: buffer.pointer for name, buffer in held.items()}
    if changes.get("x"):
        changes = {"x": held["x"].pointer + changes["x"]}
    with pytest.raises(UnsupportedModelError, match=message):
        library.kernels.transform(**(arguments | changes))
    assert (held["codes"].read() == 7).all()
    assert (held["scale"].read() == 7).all()


@pytest.mark.parametrize(
    "factors", [(9,), (6, 2), (196, 2), (12, 12, 12, 12), (0,), (12, 16, 12, 32, 12)]
)
def test_refuses_factors_without_a_kernel(library, factors):
    with pytest.raises(UnsupportedModelError, match="plan"):
        library.kernels.hadamard_plan(factors, [np.ones((f, f), np.int8) for f in factors if f])


def test_zero_rows_are_nothing_to_do(library):
    held = library.put(np.zeros((1, 128), np.float16))
    library.kernels.transform(Dtype.FP16, 0, 128, held.pointer, y=held.pointer)


def test_every_status_has_a_sentence_and_the_version_is_the_headers(library):
    texts = [library.abi.qr_status_string(ctypes.c_int(i)).decode() for i in range(11)]
    assert len(set(texts)) == 11
    assert library.abi.qr_status_string(99) == b"unknown status"
    assert library.abi.qr_abi_version() == ABI_VERSION


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    blocks=st.integers(1, 40),
    log_order=st.integers(1, 13),
    rows=st.integers(1, 7),
    dtype=st.sampled_from(BOTH),
    seed=st.integers(0, 99),
)
def test_blocks_of_any_power_of_two_in_rows_of_any_length(
    transform, blocks, log_order, rows, dtype, seed
):
    n = 128 * blocks
    order = min(2**log_order, n & -n)
    x = rows_of(n, rows, dtype, seed)
    codes, scale = transform(
        x, dtype, factors=(order,), layout=Layout.ACTIVATIONS_PACKED_V1, seed=seed, padding=8
    )
    assert_codes(codes, scale, rotate(x, (order,)) / math.sqrt(order))
