# SPDX-License-Identifier: Apache-2.0
"""The INT4 GEMM: integer sums exact against int64 NumPy, outputs equal to the NumPy formula.

Every kernel runs on sizes that fill no tile, in several thread orders, on the emulator for each
architecture that it exists for; on a GPU the same cases run on the GPU's own.
"""

import ctypes
import dataclasses
from typing import Any, Final

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quarot_onnx.plugins import layouts
from quarot_onnx.plugins.kernels import GemmArgs
from quarot_onnx.plugins.layouts import Layout

OK, NULL, MISALIGNED, DTYPE, SHAPE, LAYOUT, WORKSPACE, ARGUMENT, ARCHITECTURE = (
    0, 1, 2, 3, 4, 6, 7, 8, 9,
)  # fmt: skip
AUTO, MMA_S4, MMA_S8, WGMMA, DECODE, CUTLASS = range(6)
FP16, BF16, INT32 = range(3)
NUMPY: Final = {FP16: np.dtype(np.float16), BF16: np.dtype(ml_dtypes.bfloat16), INT32: np.int32}
PACKED, SPLIT = Layout.ACTIVATIONS_PACKED_V1, Layout.ACTIVATIONS_SPLIT_V1


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel, an architecture that runs it, and the activation order that it reads."""

    kernel: int
    compute_capability: int
    layout: Layout

    def __str__(self) -> str:
        name = ("auto", "mma_s4", "mma_s8", "wgmma", "decode")[self.kernel]
        return f"{name}-sm{self.compute_capability}-{self.layout.name.split('_')[1].lower()}"


GUARD_ROWS: Final = 256  # the most that a tile could write too far

PREFILL: Final = [
    Kernel(MMA_S4, 80, PACKED),
    Kernel(MMA_S4, 89, PACKED),
    Kernel(MMA_S8, 90, PACKED),
    Kernel(MMA_S8, 120, PACKED),
    Kernel(WGMMA, 90, SPLIT),
]
SMALL: Final = [
    Kernel(DECODE, 80, PACKED),
    Kernel(DECODE, 90, PACKED),
    Kernel(DECODE, 90, SPLIT),
    Kernel(DECODE, 120, PACKED),
]
# Tokens that reach every tile shape, and none of which fills its tile.
PREFILL_SIZES: Final = [
    (1, 8, 64),
    (17, 72, 192),
    (40, 136, 320),
    (70, 200, 128),
    (129, 72, 448),
    (250, 248, 320),
    (300, 264, 256),
]
SMALL_SIZES: Final = [
    (1, 8, 64),
    (1, 200, 1024),
    (3, 72, 704),
    (8, 64, 2176),
    (9, 136, 192),
    (16, 264, 576),
]


@pytest.fixture
def run(library):
    """``run(case, kernel, ...)`` -> (status, y): a problem through the C ABI."""

    def call(problem: "Problem", where: Kernel, out: int = INT32, **changes: Any):
        if library.backend == "emulation":
            library.configure(
                seed=problem.seed, workers=2, compute_capability=where.compute_capability
            )
        else:
            pytest.importorskip("torch")
            require_architecture(library, where)
        return launch(library, problem, where, out, **changes)

    return call


def require_architecture(library, where: Kernel) -> None:
    capability = library.compute_capability
    same_kind = capability == 90 if where.compute_capability == 90 else (
        80 <= capability < 90 if where.compute_capability < 90 else capability >= 100
    )  # fmt: skip
    if not same_kind:
        pytest.skip(f"this GPU is sm_{capability}; the case is for sm_{where.compute_capability}")


class Problem:
    """Random codes and scales of one GEMM: x [m, k], w [n, k], and what the epilogue takes."""

    def __init__(self, m: int, n: int, k: int, *, seed: int = 0, codes: int | None = None):
        random = np.random.default_rng([m, n, k, seed])
        self.m, self.n, self.k, self.seed = m, n, k, seed
        draw = (lambda *s: random.integers(-8, 8, s)) if codes is None else (
            lambda *s: np.full(s, codes)
        )  # fmt: skip
        self.x, self.w = draw(m, k), draw(n, k)
        self.scale = (random.random(m) * 0.01 + 1e-4).astype(np.float32)
        self.w_scale = (random.random(n) * 0.02 + 1e-4).astype(np.float32)
        self.zero = random.integers(-8, 8, m).astype(np.float32)
        self.bias = random.standard_normal(n).astype(np.float32)

    def sums(self) -> np.ndarray:
        return self.x.astype(np.int64) @ self.w.T.astype(np.int64)

    def outputs(self, out: int, *, bias: bool, asymmetric: bool) -> np.ndarray:
        """What ``Int4Gemm`` means: fp32 products in this order, one rounding."""
        sums = self.sums()
        if asymmetric:
            sums = sums - self.zero.astype(np.int64)[:, None] * self.w.sum(1)[None, :]
        y = (sums.astype(np.float32) * self.scale[:, None]) * self.w_scale[None, :]
        if bias:
            y = y + self.bias[None, :]
        with np.errstate(over="ignore"):
            return y.astype(NUMPY[out])


def launch(
    library,
    problem: Problem,
    where: Kernel,
    out: int = INT32,
    *,
    bias: bool = False,
    asymmetric: bool = False,
    split_k: int = 0,
    extra_columns: int = 0,
    repeat: int = 1,
):
    """Status and y, with rows of ``n + extra_columns`` elements; checks that scratch stays zero."""
    packed = layouts.packed_from_codes(problem.x)
    q = layouts.split_from_packed(packed) if where.layout == SPLIT else packed
    w = layouts.packed_from_codes(problem.w)
    stride = problem.n + extra_columns
    poison = np.full((problem.m + GUARD_ROWS, stride), 77, NUMPY[out])
    buffers = {
        "q": q,
        "scale": problem.scale,
        "w": layouts.fragments_from_packed(w),
        "w_scale": problem.w_scale,
        "y": poison,
    }
    if bias:
        buffers["bias"] = problem.bias
    if asymmetric:
        buffers |= {"zero": problem.zero, "w_sum": layouts.weight_sums(w)}
    held = {name: library.put(value) for name, value in buffers.items()}
    args = GemmArgs(
        kernel=where.kernel,
        out_dtype=out,
        activation_layout=where.layout,
        weight_layout=Layout.WEIGHTS_FRAGMENTS_V1,
        m=problem.m,
        n=problem.n,
        k=problem.k,
        y_stride=stride,
        split_k=split_k,
        **{name: buffer.pointer for name, buffer in held.items()},
    )
    need = library.abi.qr_gemm_workspace_size(ctypes.byref(args))
    workspace = library.put(np.zeros(max(need, 16), np.uint8))
    args.workspace, args.workspace_bytes = workspace.pointer, need
    for _ in range(repeat):
        status = library.abi.qr_gemm(ctypes.byref(args), None)
    if status == OK:
        assert not workspace.read().any(), "the workspace was not left zero"
    y = held["y"].read()
    assert (y[problem.m :] == 77).all(), "rows after the last token were written"
    return status, y[: problem.m]


def assert_same_bits(got: np.ndarray, want: np.ndarray) -> None:
    assert got.dtype == want.dtype
    bits = np.dtype(f"u{got.dtype.itemsize}")
    differ = got.view(bits) != want.view(bits)
    assert not differ.any(), (
        f"{differ.sum()} of {differ.size} elements differ, the first at {np.argwhere(differ)[0]}"
    )


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("size", PREFILL_SIZES, ids=str)
@pytest.mark.parametrize("where", PREFILL, ids=str)
def test_prefill_sums_are_exact(run, where, size, seed):
    problem = Problem(*size, seed=seed)
    status, y = run(problem, where)
    assert status == OK
    assert (y == problem.sums()).all()


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("size", SMALL_SIZES, ids=str)
@pytest.mark.parametrize("where", SMALL, ids=str)
def test_decode_sums_are_exact(run, where, size, seed):
    problem = Problem(*size, seed=seed)
    status, y = run(problem, where, split_k=seed % 2)  # 1: slices longer than the loads in flight
    assert status == OK
    assert (y == problem.sums()).all()


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("out", [FP16, BF16])
@pytest.mark.parametrize("where", [*PREFILL, *SMALL], ids=str)
def test_outputs_equal_the_numpy_formula_to_the_bit(run, where, out, bias, asymmetric):
    problem = Problem(13 if where.kernel == DECODE else 45, 136, 192, seed=3)
    status, y = run(problem, where, out, bias=bias, asymmetric=asymmetric)
    assert status == OK
    assert_same_bits(y, problem.outputs(out, bias=bias, asymmetric=asymmetric))


@pytest.mark.parametrize("where", [*PREFILL, *SMALL], ids=str)
def test_products_and_the_bias_are_rounded_one_by_one(run, where):
    # A fused multiply-add differs in the last bit of fp32, which one output in thousands shows.
    tokens, features = (16, 8192) if where.kernel == DECODE else (256, 1024)
    problem = Problem(tokens, features, 64, seed=7)
    status, y = run(problem, where, FP16, bias=True)
    assert status == OK
    assert_same_bits(y, problem.outputs(FP16, bias=True, asymmetric=False))


@pytest.mark.parametrize("tokens", [16, 32, 64, 128, 256, 384])
@pytest.mark.parametrize("where", PREFILL, ids=str)
def test_a_full_tile_of_every_shape_is_written_once_and_wholly(run, where, tokens):
    problem = Problem(tokens, 256, 128, seed=4)
    status, y = run(problem, where, BF16, bias=True)
    assert status == OK
    assert_same_bits(y, problem.outputs(BF16, bias=True, asymmetric=False))


@pytest.mark.parametrize("out", [FP16, INT32])
@pytest.mark.parametrize("where", [*PREFILL, *SMALL], ids=str)
def test_elements_between_the_rows_of_y_are_left_alone(run, where, out):
    problem = Problem(11, 72, 128, seed=5)
    status, y = run(problem, where, out, extra_columns=24)
    assert status == OK
    want = problem.sums() if out == INT32 else problem.outputs(out, bias=False, asymmetric=False)
    assert (y[:, :72] == want).all()
    assert (y[:, 72:] == 77).all()


@pytest.mark.parametrize("codes", [-8, 7])
@pytest.mark.parametrize("where", [*PREFILL, *SMALL], ids=str)
def test_the_longest_sum_of_the_largest_codes_does_not_overflow(run, where, codes):
    problem = Problem(2, 8, layouts.MAX_K, codes=codes)
    status, y = run(problem, where)
    assert status == OK
    assert (y == codes * codes * layouts.MAX_K).all()


@pytest.mark.parametrize("split_k", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("tokens", [14, 250])
@pytest.mark.parametrize("where", [*PREFILL, *SMALL], ids=str)
def test_the_result_does_not_depend_on_how_k_is_split(run, where, tokens, split_k):
    problem = Problem(min(tokens, 16) if where.kernel == DECODE else tokens, 248, 1088, seed=6)
    status, y = run(problem, where, FP16, bias=True, split_k=split_k, repeat=2)
    assert status == OK
    assert_same_bits(y, problem.outputs(FP16, bias=True, asymmetric=False))


@pytest.mark.parametrize("tokens", [8, 16, 32, 64, 128, 256])
@pytest.mark.parametrize("where", [*PREFILL, *SMALL], ids=str)
def test_shared_memory_is_read_and_written_without_bank_conflicts(library, where, tokens):
    if library.backend != "emulation":
        pytest.skip("bank conflicts are counted by the emulator")
    library.configure(compute_capability=where.compute_capability, count_banks=True)
    library.reset_counters()
    problem = Problem(min(tokens, 16) if where.kernel == DECODE else tokens, 256, 256)
    status, _ = launch(library, problem, where, FP16)
    counters = library.counters()
    library.configure()
    assert status == OK
    assert counters.vector_accesses > 0
    assert counters.vector_conflicts == 0
    assert (counters.matrix_loads > 0) == (where.kernel in {MMA_S4, MMA_S8})
    assert counters.matrix_load_conflicts == 0


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    m=st.integers(1, 140),
    n=st.integers(1, 20).map(lambda x: 8 * x),
    k=st.integers(1, 9).map(lambda x: 64 * x),
    out=st.sampled_from([FP16, BF16]),
    flags=st.tuples(st.booleans(), st.booleans()),
    split_k=st.integers(0, 3),
    seed=st.integers(0, 1000),
    capability=st.sampled_from([80, 86, 89, 90, 100, 120]),
)
def test_any_supported_shape_gives_the_formula(
    *, library, run, m, n, k, out, flags, split_k, seed, capability
):
    if library.backend != "emulation":
        capability = library.compute_capability
    layout = SPLIT if capability == 90 else PACKED
    problem = Problem(m, n, k, seed=seed)
    where = Kernel(AUTO, capability, layout)
    status, y = run(problem, where, out, bias=flags[0], asymmetric=flags[1], split_k=split_k)
    assert status == OK
    assert_same_bits(y, problem.outputs(out, bias=flags[0], asymmetric=flags[1]))


def test_no_token_is_no_work(run):
    assert run(Problem(0, 64, 64), Kernel(AUTO, 90, SPLIT))[0] == OK


# --------------------------------------------------------------------------------------- refusals


@pytest.fixture
def arguments(library):
    """Arguments of a small problem that runs, for a test to spoil; every pointer is one buffer."""
    if library.backend == "emulation":
        library.configure(compute_capability=90)
    buffer = library.put(np.zeros(1 << 16, np.uint8))
    names = ("q", "scale", "zero", "w", "w_scale", "w_sum", "bias", "y", "workspace")
    args = GemmArgs(
        kernel=AUTO,
        out_dtype=FP16,
        activation_layout=PACKED,
        weight_layout=Layout.WEIGHTS_FRAGMENTS_V1,
        m=4,
        n=64,
        k=128,
        y_stride=64,
        workspace_bytes=1 << 16,
        **dict.fromkeys(names, buffer.pointer),
    )
    args.buffer = buffer
    return args


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"n": 12}, SHAPE),
        ({"n": 0}, SHAPE),
        ({"k": 96}, SHAPE),
        ({"k": 131072}, SHAPE),
        ({"m": -1}, SHAPE),
        ({"m": 17, "kernel": DECODE}, SHAPE),
        ({"y_stride": 56}, SHAPE),
        ({"y_stride": 68}, SHAPE),
        ({"out_dtype": 3}, DTYPE),
        ({"kernel": 9}, ARGUMENT),
        ({"split_k": -1}, ARGUMENT),
        ({"weight_layout": Layout.WEIGHTS_PACKED_V1}, LAYOUT),
        ({"weight_layout": Layout.WEIGHTS_FRAGMENTS_V1 + 1}, LAYOUT),
        ({"activation_layout": 0}, LAYOUT),
        ({"activation_layout": SPLIT, "kernel": MMA_S8}, LAYOUT),
        ({"activation_layout": PACKED, "kernel": WGMMA}, LAYOUT),
        ({"kernel": MMA_S4}, ARCHITECTURE),
        ({"kernel": CUTLASS}, ARCHITECTURE),
        ({"q": None}, NULL),
        ({"w": None}, NULL),
        ({"y": None}, NULL),
        ({"scale": None}, NULL),
        ({"w_scale": None}, NULL),
        ({"w_sum": None}, NULL),
        ({"k": 2048, "split_k": 4, "workspace": None}, NULL),
        ({"k": 2048, "split_k": 4, "workspace_bytes": 16}, WORKSPACE),
    ],
    ids=str,
)
def test_refuses_what_the_table_does_not_list(library, arguments, change, status):
    if library.backend != "emulation" and ("kernel" in change or status == ARCHITECTURE):
        pytest.skip("which kernels there are is a matter of the GPU at hand")
    for name, value in change.items():
        setattr(arguments, name, value)
    assert library.abi.qr_gemm(ctypes.byref(arguments), None) == status


@pytest.mark.parametrize("name", ["q", "w", "y", "scale", "w_scale", "bias", "zero", "w_sum"])
def test_refuses_a_misaligned_pointer(library, arguments, name):
    setattr(arguments, name, getattr(arguments, name) + 8)
    assert library.abi.qr_gemm(ctypes.byref(arguments), None) == MISALIGNED


def test_refuses_no_arguments(library):
    assert library.abi.qr_gemm(None, None) == NULL


@pytest.mark.parametrize("capability", [75, 80, 86, 89, 90, 100, 103, 120])
@pytest.mark.parametrize("m", [1, 16, 17, 1000])
def test_the_preferred_layouts_are_accepted_and_no_s4_kernel_runs_after_sm89(
    library, arguments, capability, m
):
    if library.backend != "emulation":
        pytest.skip("the architecture is the GPU's")
    library.configure(compute_capability=capability)
    activations, weights = ctypes.c_int32(), ctypes.c_int32()
    status = library.abi.qr_gemm_preferred_layouts(
        capability, ctypes.c_int64(m), ctypes.byref(activations), ctypes.byref(weights)
    )
    arguments.m, arguments.y = m, None  # far enough to choose a kernel, not to launch it
    if capability < 80:
        assert status == ARCHITECTURE
        assert library.abi.qr_gemm(ctypes.byref(arguments), None) == ARCHITECTURE
        return
    assert status == OK
    arguments.activation_layout, arguments.weight_layout = activations.value, weights.value
    assert library.abi.qr_gemm(ctypes.byref(arguments), None) == NULL
    arguments.kernel, arguments.activation_layout = MMA_S4, PACKED
    expected = NULL if capability < 90 else ARCHITECTURE
    assert library.abi.qr_gemm(ctypes.byref(arguments), None) == expected


@pytest.mark.parametrize("where", [Kernel(AUTO, 80, PACKED), Kernel(AUTO, 90, SPLIT)], ids=str)
def test_the_workspace_covers_every_smaller_number_of_tokens(library, arguments, where):
    if library.backend == "emulation":
        library.configure(compute_capability=where.compute_capability)
    arguments.activation_layout, arguments.k = where.layout, 8192
    sizes = []
    for m in range(1, 600, 7):
        arguments.m = m
        sizes.append(library.abi.qr_gemm_workspace_size(ctypes.byref(arguments)))
    assert max(sizes) > 0
    assert sizes == sorted(sizes)


def test_the_workspace_is_zeroed_by_its_init(library):
    buffer = library.put(np.full(1024, 7, np.uint8))
    assert library.abi.qr_gemm_workspace_init(
        ctypes.c_void_p(buffer.pointer), ctypes.c_size_t(1000), None
    ) == OK  # fmt: skip
    assert not buffer.read()[:1000].any()
    assert buffer.read()[1000:].all()
