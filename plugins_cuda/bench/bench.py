#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Measures the kernels on a GPU: one command, at most ten minutes, PyTorch and nvcc are enough.

    python plugins_cuda/bench/bench.py               build, check, measure; the table comes last
    python plugins_cuda/bench/bench.py --emulate     every stage once, tiny, on the CPU emulator:
                                                     finds mistakes without a GPU, times nothing
    python plugins_cuda/bench/bench.py --stages check,hadamard --csv rows.csv

Stages, in order: probe (GPU, clocks, TensorRT libraries), ceilings (copy, bf16, int8 and fp8 GEMM),
check (every kernel on fresh random inputs against float64 or int64), hadamard, prefill, decode,
attention, layer, memory, sanitizer (compute-sanitizer's memcheck over the checks on tiny shapes).
Kernels that fail their check are not measured. Rows are skipped when the budget no longer holds
them; a watchdog ends the process at the budget whatever hangs. The table comes last in any case,
with what was not measured.

How a row is measured: a CUDA graph of several launches over rotating inputs (more than five times
the L2, so weights are cold), replayed in turn with its baseline's graph; the median over the
replays, and the spread (10th to 90th percentile). A floor is max(bytes / copy bandwidth, operations
/ GEMM ceiling) with the ceilings of the same run. Data are Gaussian or uniform codes, never zeros:
power matters.
"""

import argparse
import csv
import dataclasses
import math
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import cublaslt  # noqa: E402

from quarot_onnx.errors import MissingDependencyError  # noqa: E402
from quarot_onnx.hadamard import hadamard_matrix, plan  # noqa: E402
from quarot_onnx.plugins import build  # noqa: E402
from quarot_onnx.plugins.kernels import (  # noqa: E402
    Dtype,
    GemmArgs,
    GemmKernel,
    HadamardPlan,
    Kernels,
    KvCache,
    Prologue,
)
from quarot_onnx.plugins.layouts import Layout  # noqa: E402

STAGES = (
    "probe", "ceilings", "check", "hadamard", "prefill", "decode", "attention", "layer", "memory",
    "sanitizer",
)  # fmt: skip
# Seconds of the budget that a stage leaves to the stages behind it.
RESERVE = {"hadamard": 270, "prefill": 180, "decode": 150, "attention": 110, "layer": 60}
SANITIZER_SECONDS = 90.0
# (out features, in features): the linears of 7B to 70B models.
WEIGHTS = ((4096, 4096), (11008, 4096), (4096, 11008), (28672, 8192), (8192, 28672))
COLD_BYTES = 256 << 20


@dataclasses.dataclass
class Row:
    """One line of the table. Times in microseconds; nan where there is no such thing."""

    kernel: str
    shape: str
    us: float
    floor_us: float = math.nan
    rate: str = ""
    baseline: str = ""
    baseline_us: float = math.nan
    spread: float = math.nan
    aim: str = ""
    ratio: float = math.nan  # where it is not baseline_us / us


@dataclasses.dataclass
class Ceilings:
    """What this GPU does at best in this run: bytes/s of a copy, operations/s of GEMMs."""

    copy: float = math.nan
    bf16: float = math.nan
    int8: float = math.nan


class Bench:
    """The library, the device, and the rows so far."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.started = time.monotonic()
        self.budget: float = arguments.budget
        self.emulated: bool = arguments.emulate
        self.tiny: bool = arguments.emulate or arguments.tiny  # shapes of the checks
        self.device = torch.device("cpu" if self.emulated else "cuda")
        self.rows: list[Row] = []
        self.unmeasured: list[str] = []
        self.ceilings = Ceilings()
        self.capability = 90
        if not self.emulated:
            major, minor = torch.cuda.get_device_capability()
            self.capability = 10 * major + minor
        self.library = self._library(arguments.library)
        self.kernels = Kernels(self.library)
        if self.emulated:
            self.kernels.configure_emulation(workers=4, check_races=False)
        self.generator = torch.Generator(device=self.device).manual_seed(time.time_ns() % 2**31)
        self._cublaslt: cublaslt.CublasLt | None = None
        if not self.emulated:
            try:
                self._cublaslt = cublaslt.CublasLt()
                print(f"int8 baseline: {self._cublaslt.path}")
            except (OSError, RuntimeError) as error:
                print(f"int8 baseline: torch._int_mm, because {error}")

    def _library(self, named: Path | None) -> Path:
        if named is not None:
            return named
        if self.emulated:
            return build.build("cpu")
        architecture = "90a" if self.capability == 90 else str(self.capability)
        return build.build("cuda", architectures=(architecture,))

    def left(self) -> float:
        """Seconds of the budget that are left."""
        return self.budget - (time.monotonic() - self.started)

    def has_time(self, stage: str, what: str) -> bool:
        """Whether a row of a stage still fits the budget; else it is listed as unmeasured."""
        if self.left() > RESERVE[stage]:
            return True
        self.unmeasured.append(f"{what} (budget)")
        return False

    def int8_gemm(self, x: torch.Tensor, w: torch.Tensor) -> tuple[str, Callable[[], torch.Tensor]]:
        """The vendor's x [m, k] times w [n, k] transposed, in s32: who, and the call.

        cuBLASLt with a workspace of 64 MB; torch._int_mm where it is missing or refuses.
        """
        if self._cublaslt:
            (m, k), n = x.shape, w.shape[0]
            y = torch.empty(m, n, dtype=torch.int32, device=self.device)
            workspace = self.empty(cublaslt.WORKSPACE_BYTES, dtype=torch.uint8)
            addresses = (t.data_ptr() for t in (x, w, y, workspace))
            try:
                gemm = self._cublaslt.int8_gemm(m, n, k, *addresses)
            except RuntimeError as error:
                print(f"int8 baseline: torch._int_mm, because {error}")
            else:
                held = (x, w, workspace)

                def call() -> torch.Tensor:
                    assert held
                    gemm(self.stream())
                    return y

                return "cuBLASLt int8", call
        return "torch._int_mm int8", lambda: torch._int_mm(x, w.T)

    def stream(self) -> int | None:
        """The current CUDA stream, as an int."""
        return None if self.emulated else torch.cuda.current_stream().cuda_stream

    # ---- data

    def normal(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        """Gaussians of a shape."""
        x = torch.randn(shape, generator=self.generator, device=self.device, dtype=torch.float32)
        return x.to(dtype)

    def packed_codes(self, *shape: int) -> torch.Tensor:
        """Uniform bytes: two uniform codes each."""
        return torch.randint(
            0, 256, shape, generator=self.generator, device=self.device, dtype=torch.uint8
        )

    def empty(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        """Poisoned, so that what a kernel forgets to write shows."""
        return torch.full(shape, 113, device=self.device, dtype=dtype)

    def hadamard(
        self, factors: tuple[int, ...], inner: int = 1
    ) -> tuple[HadamardPlan, torch.Tensor]:
        """A plan of factors, and its signs on the device."""
        matrices = [hadamard_matrix(f) for f in factors if f & (f - 1)]
        made, words = self.kernels.hadamard_plan(factors, matrices, inner=inner)
        held = torch.from_numpy(words.view("int32").copy()).to(self.device)
        made.signs = held.data_ptr()
        return made, held

    # ---- time

    def time(self, *variants: list[Callable[[], Any]]) -> list[tuple[float, float]]:
        """(median, relative spread) in microseconds of one call of each variant.

        A variant is a list of calls on different inputs; their graphs are replayed in turn.
        """
        if self.emulated:
            for calls in variants:
                calls[0]()
            return [(math.nan, math.nan)] * len(variants)
        graphs = []
        for calls in variants:
            side = torch.cuda.Stream()
            with torch.cuda.stream(side):
                for call in calls:
                    call()
            torch.cuda.current_stream().wait_stream(side)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            launches = max(len(calls), 20)
            with torch.cuda.graph(graph):
                for i in range(launches):
                    calls[i % len(calls)]()
            graphs.append((graph, launches))
        samples: list[list[float]] = [[] for _ in graphs]
        began = time.monotonic()
        for replay in range(60):
            if replay >= 12 and time.monotonic() - began > 2.5:
                break
            for (graph, launches), times in zip(graphs, samples, strict=True):
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                graph.replay()
                end.record()
                end.synchronize()
                if replay >= 2:
                    times.append(begin.elapsed_time(end) * 1000 / launches)
        out = []
        for times in samples:
            ordered = sorted(times)
            low, high = ordered[len(ordered) // 10], ordered[-1 - len(ordered) // 10]
            median = statistics.median(ordered)
            out.append((median, (high - low) / median))
        return out

    def copies(self, bytes_of_one: int, most: int = 16) -> int:
        """How many input sets make the caches cold."""
        return 1 if self.emulated else max(1, min(most, -(-COLD_BYTES // max(1, bytes_of_one))))

    def add(self, row: Row) -> None:
        """Keeps and prints a row."""
        self.rows.append(row)
        print(format_row(row), flush=True)


HEADER = (
    f"{'kernel':34} {'shape':26} {'us':>9} {'floor us':>9} {'% floor':>7} {'rate':>11}"
    f" {'baseline':>16} {'us':>9} {'ratio':>6} {'spread':>6}  aim"
)


def format_row(row: Row) -> str:
    """A row as one line of the table."""
    percent = 100 * row.floor_us / row.us
    ratio = row.baseline_us / row.us if math.isnan(row.ratio) else row.ratio
    return (
        f"{row.kernel:34} {row.shape:26} {row.us:9.2f} {row.floor_us:9.2f} {percent:7.1f}"
        f" {row.rate:>11} {row.baseline:>16} {row.baseline_us:9.2f} {ratio:6.2f}"
        f" {100 * row.spread:5.1f}%  {row.aim}"
    )


# Probe and ceilings


def tensorrt_libraries() -> list[Path]:
    """libnvinfer* in wheels, on LD_LIBRARY_PATH and where TensorRT is usually installed."""
    folders = [Path(entry) / "tensorrt_libs" for entry in sys.path]
    folders += [Path(entry) for entry in os.environ.get("LD_LIBRARY_PATH", "").split(":") if entry]
    folders += [
        Path("/usr/lib/x86_64-linux-gnu"), Path("/usr/local/tensorrt/lib"),
        Path("/usr/local/cuda/lib64"), *Path("/opt").glob("*[tT]ensor[rR][tT]*/lib"),
    ]  # fmt: skip
    return sorted({path for folder in folders for path in folder.glob("libnvinfer*.so*")})


def probe(bench: Bench) -> None:
    """Names the GPU, its clocks and its power, and what there is of TensorRT."""
    found = ", ".join(str(path) for path in tensorrt_libraries())
    print(f"TensorRT: {found or 'no libnvinfer* found'}")
    if bench.emulated:
        print("emulated: correctness only, no times")
        return
    properties = torch.cuda.get_device_properties(0)
    print(
        f"{properties.name}: sm_{bench.capability}, {properties.multi_processor_count} SMs,"
        f" {properties.total_memory >> 30} GiB, torch {torch.__version__}"
    )
    query = "name,clocks.sm,clocks.max.sm,power.draw,power.limit,temperature.gpu,driver_version"
    done = subprocess.run(
        ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        check=False,
        timeout=20,
    )
    print(done.stdout.strip())


def ceilings(bench: Bench) -> None:
    """Measures what floors are made of: a copy, and the vendor's GEMMs."""
    size, n = (1 << 16, 64) if bench.emulated else (1 << 31, 8192)
    big = bench.packed_codes(size)
    other = torch.empty_like(big)
    ((us, spread),) = bench.time([lambda target=other, source=big: target.copy_(source)])
    bench.ceilings.copy = 2 * big.numel() / us * 1e6
    bench.add(
        Row(
            "copy",
            f"{size >> 10} KiB",
            us,
            rate=f"{bench.ceilings.copy / 1e12:.2f} TB/s",
            spread=spread,
        )
    )
    del big, other
    a, b = bench.normal(n, n), bench.normal(n, n)
    ((us, spread),) = bench.time([lambda: a @ b.T])
    bench.ceilings.bf16 = 2 * n**3 / us * 1e6
    rate = f"{bench.ceilings.bf16 / 1e12:.0f} TFLOPS"
    bench.add(Row("cuBLAS bf16", f"{n}^3", us, rate=rate, spread=spread))
    i, j = (bench.packed_codes(n, n).view(torch.int8) for _ in range(2))
    # The ceiling is the better of the two: a weak baseline must not flatter the floors.
    calls = dict([bench.int8_gemm(i, j), ("torch._int_mm int8", lambda: torch._int_mm(i, j.T))])
    times = []
    for name, call in calls.items():
        ((us, spread),) = bench.time([call])
        times.append(us)
        bench.add(Row(name, f"{n}^3", us, rate=f"{2 * n**3 / us / 1e6:.0f} TOPS", spread=spread))
    bench.ceilings.int8 = 2 * n**3 / min(times) * 1e6
    if bench.capability >= 89 and not bench.emulated:
        x, y = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)
        one = torch.ones((), device=bench.device)
        ((us, spread),) = bench.time(
            [lambda: torch._scaled_mm(x, y.T, one, one, out_dtype=torch.bfloat16)]
        )
        rate = f"{2 * n**3 / us / 1e6:.0f} TFLOPS"
        bench.add(Row("cuBLASLt fp8 (_scaled_mm)", f"{n}^3", us, rate=rate, spread=spread))


# Transforms


@dataclasses.dataclass
class Transformed:
    """Inputs and outputs of one transform, kept alive for a graph."""

    x: torch.Tensor
    up: torch.Tensor | None
    outputs: dict[str, torch.Tensor]
    held: torch.Tensor | None
    call: Callable[[], None]


def transformed(
    bench: Bench,
    rows: int,
    n: int,
    *,
    factors: tuple[int, ...] | None,
    output: str,
    prologue: Prologue = Prologue.NONE,
    dtype: Dtype = Dtype.BF16,
) -> Transformed:
    """A transform of Gaussian rows; output: store, s4 or s8."""
    kind = torch.bfloat16 if dtype == Dtype.BF16 else torch.float16
    x = bench.normal(rows, n, dtype=kind)
    up = bench.normal(rows, n, dtype=kind) if prologue == Prologue.SILU_MUL else None
    made, held = bench.hadamard(factors) if factors else (None, None)
    outputs: dict[str, torch.Tensor] = {}
    layout = Layout.ACTIVATIONS_PACKED_V1
    if output == "store":
        outputs["y"] = bench.empty(rows, n, dtype=kind)
    else:
        outputs["scale"] = bench.empty(rows, dtype=torch.float32)
        if output == "s4":
            outputs["codes"] = bench.empty(rows, n // 2, dtype=torch.uint8)
        else:
            layout = Layout.ACTIVATIONS_SPLIT_V1
            outputs["codes"] = bench.empty(n // 128, -(-rows // 8) * 8, 128, dtype=torch.uint8)

    def call() -> None:
        bench.kernels.transform(
            dtype, rows, n, x, up=up, hadamard=made, prologue=prologue, layout=layout,
            stream=bench.stream(), **outputs,
        )  # fmt: skip

    return Transformed(x, up, outputs, held, call)


def rotated(x: torch.Tensor, factors: tuple[int, ...]) -> torch.Tensor:
    """X (I ⊗ H_f1 ⊗ ..) / sqrt(order), in float64."""
    y = x.double()
    for i, factor in enumerate(factors):
        matrix = torch.from_numpy(hadamard_matrix(factor).copy()).to(x.device).double()
        y = torch.einsum("aks,kj->ajs", y.reshape(-1, factor, math.prod(factors[i + 1 :])), matrix)
    return y.reshape(x.shape) / math.sqrt(math.prod(factors))


def unpacked(packed: torch.Tensor) -> torch.Tensor:
    """Codes -8..7 (int64) of packed bytes."""
    nibbles = torch.stack([packed & 15, packed >> 4], -1).flatten(-2).long()
    return (nibbles ^ 8) - 8


def check_transforms(bench: Bench) -> None:
    """Compares Hadamard + quantize with float64."""
    sizes = (4096, 768) if bench.tiny else (4096, 8192, 11008, 13824, 14336, 28672)
    for n in sizes:
        factors = plan(n).factors
        for prologue in (Prologue.NONE, Prologue.SILU_MUL):
            case = transformed(bench, 33, n, factors=factors, output="s4", prologue=prologue)
            case.call()
            want = case.x.double()
            if case.up is not None:
                want = torch.nn.functional.silu(case.x.double()) * case.up.double()
                want = want.to(torch.bfloat16).double()
            want = rotated(want, factors)
            scale = want.abs().amax(1) * 0.9 / 7
            # SiLU in fp32 may round to the neighbouring bf16 value now and then.
            tolerance = 1e-5 if case.up is None else 2e-3
            torch.testing.assert_close(
                case.outputs["scale"].double(), scale, rtol=tolerance, atol=0.0
            )
            quotient = want / case.outputs["scale"].double()[:, None]
            wrong = (unpacked(case.outputs["codes"]) - quotient.round().clamp(-8, 7)) != 0
            share = wrong.double().mean().item()
            limit = 1e-5 if case.up is None else 2e-2
            assert share <= limit, f"transform n={n}: {share:.1e} of the codes differ"


def hadamard_rows(bench: Bench) -> None:
    """Times the transforms of every order against a device copy."""
    prologues = {
        "fwht": ("store", Prologue.NONE, True),
        "fwht + s4": ("s4", Prologue.NONE, True),
        "fwht + s8": ("s8", Prologue.NONE, True),
        "silu*up + fwht + s8": ("s8", Prologue.SILU_MUL, True),
        "rmsnorm + s8": ("s8", Prologue.RMSNORM, False),
    }
    lengths, counts = (4096, 8192, 11008, 13824, 14336, 28672), (1, 16, 2048, 8192)
    if bench.emulated:
        lengths, counts = (768,), (2,)
    for n in lengths:
        factors = plan(n).factors
        for tokens in counts:
            for name, (output, prologue, rotates) in prologues.items():
                if not bench.has_time("hadamard", f"{name} {tokens}x{n}"):
                    continue
                per_element = {"store": 4.0, "s4": 2.5, "s8": 3.0}[output]
                per_element += 2.0 if prologue == Prologue.SILU_MUL else 0.0
                sets = [
                    transformed(
                        bench, tokens, n, factors=factors if rotates else None, output=output,
                        prologue=prologue,
                    )
                    for _ in range(bench.copies(int(tokens * n * per_element)))
                ]  # fmt: skip
                source, target = sets[0].x, torch.empty_like(sets[0].x)
                measured, copied = bench.time(
                    [s.call for s in sets], [lambda a=source, b=target: b.copy_(a)]
                )
                moved = tokens * n * per_element
                bench.add(
                    Row(
                        name, f"{tokens} x {n}", measured[0], moved / bench.ceilings.copy * 1e6,
                        f"{moved / measured[0] / 1e6:.2f} TB/s", "torch copy", copied[0],
                        measured[1], "75 % of floor, aim 90" if tokens >= 2048 else "",
                    )
                )  # fmt: skip


# GEMM


@dataclasses.dataclass
class Linear:
    """Weights, activations and output of one GEMM, kept alive for a graph."""

    args: GemmArgs
    tensors: dict[str, torch.Tensor]
    call: Callable[[], None]


def linear(
    bench: Bench, m: int, n: int, k: int, kernel: GemmKernel, *, out: Dtype = Dtype.BF16
) -> Linear:
    """An INT4 GEMM of uniform codes, its operands in the layouts that ``kernel`` reads."""
    activation, weight = bench.kernels.gemm_preferred_layouts(bench.capability, m)
    if kernel in (GemmKernel.MMA_S4, GemmKernel.MMA_S8):
        activation = Layout.ACTIVATIONS_PACKED_V1
    elif kernel == GemmKernel.WGMMA_S8:
        activation = Layout.ACTIVATIONS_SPLIT_V1
    tensors = {"packed_q": bench.packed_codes(m, k // 2), "packed_w": bench.packed_codes(n, k // 2)}
    tensors["q"] = tensors["packed_q"]
    if activation == Layout.ACTIVATIONS_SPLIT_V1:
        shape = (-(-k // 128), -(-m // 8) * 8, 128)
        tensors["q"] = torch.zeros(shape, dtype=torch.uint8, device=bench.device)
        bench.kernels.split_activations(
            m, k, tensors["packed_q"], tensors["q"], stream=bench.stream()
        )
    tensors["w"] = bench.empty(bench.kernels.weight_bytes(weight, n, k), dtype=torch.uint8)
    bench.kernels.pack_weight(
        weight, n, k, tensors["packed_w"], tensors["w"], stream=bench.stream()
    )
    tensors["scale"] = bench.normal(m, dtype=torch.float32).abs() * 0.01 + 1e-3
    tensors["w_scale"] = bench.normal(n, dtype=torch.float32).abs() * 0.01 + 1e-3
    kind = {Dtype.BF16: torch.bfloat16, Dtype.FP16: torch.float16, Dtype.INT32: torch.int32}[out]
    tensors["y"] = bench.empty(m, n, dtype=kind)
    args = GemmArgs(
        kernel=kernel, out_dtype=out, activation_layout=activation, weight_layout=weight,
        m=m, n=n, k=k, y_stride=n,
        **{name: tensors[name].data_ptr() for name in ("q", "scale", "w", "w_scale", "y")},
    )  # fmt: skip
    need = bench.kernels.gemm_workspace_size(args)
    tensors["workspace"] = torch.zeros(max(need, 16), dtype=torch.uint8, device=bench.device)
    args.workspace, args.workspace_bytes = tensors["workspace"].data_ptr(), need

    def call() -> None:
        bench.kernels.gemm(args, stream=bench.stream())

    return Linear(args, tensors, call)


def gemm_kernels(bench: Bench, m: int) -> list[GemmKernel]:
    """The kernels that this GPU has for m tokens."""
    kernels = [GemmKernel.AUTO, GemmKernel.MMA_S8]
    if bench.capability == 90:
        kernels.append(GemmKernel.WGMMA_S8)
    elif bench.capability < 90:
        kernels.append(GemmKernel.MMA_S4)
    if m <= 16:
        kernels.append(GemmKernel.DECODE)
    return kernels


def check_gemms(bench: Bench) -> None:
    """Compares the integer sums of every GEMM kernel with exact ones."""
    sizes = ((1, 256, 256), (45, 136, 320)) if bench.tiny else (
        (1, 4096, 4096), (16, 8192, 28672), (129, 1032, 448), (2048, 4096, 11008),
    )  # fmt: skip
    for m, n, k in sizes:
        for kernel in gemm_kernels(bench, m):
            case = linear(bench, m, n, k, kernel, out=Dtype.INT32)
            case.call()
            q, w = unpacked(case.tensors["packed_q"]), unpacked(case.tensors["packed_w"])
            # float64 holds these integers exactly.
            want = (q.double() @ w.double().T).to(torch.int32)
            assert torch.equal(case.tensors["y"], want), (
                f"gemm {m}x{n}x{k} {kernel.name}: not exact"
            )


def prefill_rows(bench: Bench) -> None:
    """Times the GEMM at 128 tokens and more."""
    weights, counts = (((64, 128),), (32,)) if bench.emulated else (WEIGHTS, (128, 512, 2048, 8192))
    for n, k in weights:
        for m in counts:
            for kernel in gemm_kernels(bench, m)[1:]:
                if not bench.has_time("prefill", f"gemm {kernel.name} {m}x{n}x{k}"):
                    continue
                gemm_row(bench, m, n, k, kernel, "1.5x, aim 1.8x" if m >= 2048 else "")


def decode_rows(bench: Bench) -> None:
    """Times the GEMM at 16 tokens and fewer."""
    weights, counts = (((64, 128),), (1,)) if bench.emulated else (WEIGHTS, (1, 4, 8, 16))
    for n, k in weights:
        for m in counts:
            if not bench.has_time("decode", f"gemm decode {m}x{n}x{k}"):
                continue
            gemm_row(bench, m, n, k, GemmKernel.DECODE, "3x, aim 3.5x" if n * k > 2e8 else "")


def gemm_row(bench: Bench, m: int, n: int, k: int, kernel: GemmKernel, aim: str) -> None:
    """Times one GEMM against cuBLAS bf16 and int8."""
    sets = [linear(bench, m, n, k, kernel) for _ in range(bench.copies(n * k // 2))]
    dense = [(bench.normal(m, k), bench.normal(n, k)) for _ in range(bench.copies(2 * n * k))]
    baseline: list[Callable[[], Any]] = [lambda x=x, w=w: x @ w.T for x, w in dense]
    variants: list[list[Callable[[], Any]]] = [[s.call for s in sets], baseline]
    if m > 16:  # what _int_mm takes
        q8, w8 = (bench.packed_codes(*s).view(torch.int8) for s in ((m, k), (n, k)))
        int8_name, int8 = bench.int8_gemm(q8, w8)
        variants.append([int8])
    measured = bench.time(*variants)
    moved = n * k / 2 + m * k * (1 if kernel == GemmKernel.WGMMA_S8 else 0.5) + 2 * m * n
    operations = 2 * m * n * k
    floor = max(moved / bench.ceilings.copy, operations / bench.ceilings.int8) * 1e6
    us = measured[0][0]
    rate = f"{moved / us / 1e6:.2f} TB/s" if m <= 16 else f"{operations / us / 1e6:.0f} TOPS"
    shape = f"{m} x {n} x {k}"
    bench.add(
        Row(
            f"gemm {kernel.name.lower()}", shape, us, floor, rate, "cuBLAS bf16", measured[1][0],
            measured[0][1], aim,
        )
    )  # fmt: skip
    if len(measured) > 2:
        bench.add(
            Row(
                f"  {int8_name}", shape, measured[2][0], floor,
                f"{operations / measured[2][0] / 1e6:.0f} TOPS", "cuBLAS bf16", measured[1][0],
                measured[2][1],
            )
        )  # fmt: skip


# KV cache


class Cache:
    """An INT4 cache of one layer, filled with random keys and values."""

    def __init__(self, bench: Bench, batch: int, kv_heads: int, capacity: int, d: int) -> None:
        self.shape = batch, kv_heads, capacity, d
        self.parts = [
            (
                bench.packed_codes(batch, kv_heads, capacity, d // 2),
                bench.normal(batch, kv_heads, capacity, dtype=torch.float32).abs() * 0.1 + 0.01,
                torch.full((batch, kv_heads, capacity), 7.0, device=bench.device),
            )
            for _ in range(2)
        ]
        self.key, self.value = (KvCache(*part) for part in self.parts)

    def values(self, part: int) -> torch.Tensor:
        """K (part 0) or V (part 1), dequantized in float64."""
        codes, scale, zero = self.parts[part]
        u = torch.stack([codes & 15, codes >> 4], -1).flatten(-2).double()
        return (u - zero.double()[..., None]) * scale.double()[..., None]

    def bytes(self) -> int:
        """Bytes of codes, scales and zero points."""
        return sum(t.numel() * t.element_size() for part in self.parts for t in part)


@dataclasses.dataclass
class Attention:
    """One attention call and its operands."""

    cache: Cache
    tensors: dict[str, torch.Tensor]
    call: Callable[[], None]


def attention(
    bench: Bench, cache: Cache, heads: int, length: int, query_tokens: int, *, rotate: bool = True
) -> Attention:
    """Queries [B, heads, query_tokens, d] over the first ``length`` positions, in bf16."""
    batch, kv_heads, capacity, d = cache.shape
    tensors = {
        "q": bench.normal(batch, heads, query_tokens, d),
        "y": bench.empty(batch, query_tokens, heads * d, dtype=torch.bfloat16),
    }
    args = bench.kernels.kv_attention_args(
        Dtype.BF16, tensors["q"], batch=batch, heads=heads, kv_heads=kv_heads, head_dim=d,
        query_tokens=query_tokens, capacity=capacity, max_length=length,
        strides=(heads * query_tokens * d, query_tokens * d, d), key=cache.key, value=cache.value,
        softmax_scale=d**-0.5, rotate_q=rotate, y=tensors["y"],
    )  # fmt: skip
    need = bench.kernels.kv_attention_workspace_size(args)
    tensors["workspace"] = bench.empty(max(need, 16), dtype=torch.uint8)

    def call() -> None:
        bench.kernels.kv_attention(args, tensors["workspace"], need, stream=bench.stream())

    return Attention(cache, tensors, call)


def check_attention(bench: Bench) -> None:
    """Compares attention over the cache with float64."""
    cases = ((2, 8, 2, 128, 100, 1), (1, 4, 2, 64, 40, 12)) if bench.tiny else (
        (1, 32, 8, 128, 5000, 1), (16, 32, 8, 128, 1000, 1), (2, 8, 8, 64, 300, 1),
        (1, 32, 8, 128, 700, 300),
    )  # fmt: skip
    for batch, heads, kv_heads, d, length, query_tokens in cases:
        cache = Cache(bench, batch, kv_heads, -(-length // 4) * 4, d)
        case = attention(bench, cache, heads, length, query_tokens, rotate=False)
        case.call()
        k, v = (
            cache.values(i)[:, :, :length].repeat_interleave(heads // kv_heads, 1) for i in (0, 1)
        )
        scores = case.tensors["q"].double() @ k.transpose(-1, -2) * d**-0.5
        position = torch.arange(length, device=bench.device)
        last = length - query_tokens + torch.arange(query_tokens, device=bench.device)
        scores.masked_fill_(position > last[:, None], -math.inf)
        want = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        error = (case.tensors["y"].double() - want).norm() / want.norm()
        assert error < 5e-3, f"attention {batch}x{heads}/{kv_heads}x{length}: error {error:.1e}"


def check_append(bench: Bench) -> None:
    """Reads appended values back: within a step of what was given."""
    cache = Cache(bench, 2, 4, 64, 128)
    k, v = bench.normal(2, 4, 9, 128), bench.normal(2, 4, 9, 128)
    bench.kernels.kv_append(
        Dtype.BF16, k, v, batch=2, kv_heads=4, head_dim=128, tokens=9, capacity=64,
        strides=(4 * 9 * 128, 9 * 128, 128), key=cache.key, value=cache.value, start=3,
        clip_ratio=1.0, stream=bench.stream(),
    )  # fmt: skip
    for part, new in enumerate((k, v)):
        scale = cache.parts[part][1][:, :, 3:12, None].double()
        error = (cache.values(part)[:, :, 3:12] - new.double()).abs()
        assert bool((error <= 1.001 * scale).all()), "append: a value is more than a step away"


def attention_rows(bench: Bench) -> None:
    """Times decode attention against SDPA, and the append."""
    contexts = ((1, 8192), (1, 131072), (16, 8192), (64, 2048))
    for batch, context in ((2, 64),) if bench.emulated else contexts:
        for heads, kv_heads in ((32, 8), (32, 32)):
            name = f"{batch} x {context} x {heads}/{kv_heads}"
            if not bench.has_time("attention", f"kv4 decode {name}"):
                continue
            d = 128
            cache = Cache(bench, batch, kv_heads, context, d)
            count = bench.copies(cache.bytes(), 4)
            caches = [cache, *(Cache(bench, *cache.shape) for _ in range(count - 1))]
            cases = [attention(bench, each, heads, context, 1) for each in caches]
            q = bench.normal(batch, heads, 1, d)
            k, v = (bench.normal(batch, kv_heads, context, d) for _ in range(2))

            def dense(q: torch.Tensor = q, k: torch.Tensor = k, v: torch.Tensor = v) -> Any:
                return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)

            measured, sdpa = bench.time([c.call for c in cases], [dense])
            floor = cache.bytes() / bench.ceilings.copy * 1e6
            bench.add(
                Row(
                    "kv4 decode", name, measured[0], floor,
                    f"{cache.bytes() / measured[0] / 1e6:.2f} TB/s", "SDPA bf16", sdpa[0],
                    measured[1], "3x" if cache.bytes() > 100e6 else "",
                )
            )  # fmt: skip
            new_k, new_v = (bench.normal(batch, kv_heads, 1, d) for _ in range(2))

            def append(
                cache: Cache = cache, k: torch.Tensor = new_k, v: torch.Tensor = new_v
            ) -> None:
                b, h, capacity, head_dim = cache.shape
                bench.kernels.kv_append(
                    Dtype.BF16, k, v, batch=b, kv_heads=h, head_dim=head_dim, tokens=1,
                    capacity=capacity, strides=(h * head_dim, head_dim, head_dim), key=cache.key,
                    value=cache.value, start=capacity - 1, rotate_k=True, stream=bench.stream(),
                )  # fmt: skip

            ((us, spread),) = bench.time([append])
            bench.add(Row("kv4 append", name, us, spread=spread))


# A whole decoder layer


class Layer:
    """A Llama-3-8B layer, W4A4KV4 with the kernels or bf16 with torch, on the same shapes."""

    hidden, intermediate, heads, kv_heads, d = 4096, 14336, 32, 8, 128

    def __init__(self, bench: Bench, batch: int, tokens: int, context: int) -> None:
        self.bench, self.batch, self.tokens = bench, batch, tokens
        if bench.emulated:
            self.hidden, self.intermediate, self.heads, self.kv_heads, self.d = 256, 768, 4, 2, 64
        self.length = context + tokens
        rows = self.rows = batch * tokens
        qkv = (self.heads + 2 * self.kv_heads) * self.d
        self.x = bench.normal(rows, self.hidden)
        self.norm = bench.normal(self.hidden)
        angle = torch.rand(tokens, self.d // 2, device=bench.device)
        self.cos, self.sin = (
            torch.cat([f(angle), f(angle)], -1).to(torch.bfloat16) for f in (torch.cos, torch.sin)
        )
        # INT4
        shapes = {"qkv": (qkv, self.hidden), "o": (self.hidden, self.heads * self.d)}
        shapes |= {"gate_up": (2 * self.intermediate, self.hidden)}
        shapes |= {"down": (self.hidden, self.intermediate)}
        self.linears = {
            name: linear(bench, rows, n, k, GemmKernel.AUTO) for name, (n, k) in shapes.items()
        }
        self.cache = Cache(bench, batch, self.kv_heads, -(-self.length // 4) * 4, self.d)
        self.heads_plan, self._held = bench.hadamard(plan(self.heads).factors, self.d)
        self.down_plan, self._down_held = bench.hadamard(plan(self.intermediate).factors)
        # bf16
        self.dense = {name: bench.normal(n, k) * k**-0.5 for name, (n, k) in shapes.items()}
        self.dense_k, self.dense_v = (
            bench.normal(batch, self.kv_heads, self.length, self.d) for _ in range(2)
        )
        self.workspace = bench.empty(1, dtype=torch.uint8)

    def rope(self, x: torch.Tensor) -> torch.Tensor:
        """Rotary position embedding of x [B, H, T, d]."""
        half = self.d // 2
        turned = torch.cat([-x[..., half:], x[..., :half]], -1)
        return x * self.cos + turned * self.sin

    def split(self, qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q, k and v [B, H, T, d] of the merged projection, after RoPE."""
        q, k, v = qkv.view(self.batch, self.tokens, -1, self.d).split(
            [self.heads, self.kv_heads, self.kv_heads], 2
        )
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return self.rope(q).contiguous(), self.rope(k).contiguous(), v.contiguous()

    def int4(self) -> torch.Tensor:
        """The layer with the kernels."""
        kernels, stream = self.bench.kernels, self.bench.stream()

        def into(name: str, x: torch.Tensor, **options: Any) -> torch.Tensor:
            case = self.linears[name]
            kernels.transform(
                Dtype.BF16, self.rows, case.args.k, x, codes=case.tensors["q"],
                scale=case.tensors["scale"], layout=case.args.activation_layout, stream=stream,
                **options,
            )  # fmt: skip
            case.call()
            return case.tensors["y"]

        rms = {"prologue": Prologue.RMSNORM, "norm_weight": self.norm}
        q, k, v = self.split(into("qkv", self.x, **rms))
        strides = (self.kv_heads * self.tokens * self.d, self.tokens * self.d, self.d)
        kernels.kv_append(
            Dtype.BF16, k, v, batch=self.batch, kv_heads=self.kv_heads, head_dim=self.d,
            tokens=self.tokens, capacity=self.cache.shape[2], strides=strides, key=self.cache.key,
            value=self.cache.value, start=self.length - self.tokens, rotate_k=True, stream=stream,
        )  # fmt: skip
        o = self.linears["o"]
        args = kernels.kv_attention_args(
            Dtype.BF16, q, batch=self.batch, heads=self.heads, kv_heads=self.kv_heads,
            head_dim=self.d, query_tokens=self.tokens, capacity=self.cache.shape[2],
            max_length=self.length,
            strides=(self.heads * self.tokens * self.d, self.tokens * self.d, self.d),
            key=self.cache.key, value=self.cache.value, softmax_scale=self.d**-0.5, rotate_q=True,
            heads_hadamard=self.heads_plan, codes=o.tensors["q"], scale=o.tensors["scale"],
            layout=o.args.activation_layout,
        )  # fmt: skip
        need = kernels.kv_attention_workspace_size(args)
        if self.workspace.numel() < need:
            self.workspace = self.bench.empty(need, dtype=torch.uint8)
        kernels.kv_attention(args, self.workspace, need, stream=stream)
        o.call()
        x = self.x + o.tensors["y"]
        gate_up = into("gate_up", x, **rms)
        down = into(
            "down", gate_up, x_stride=2 * self.intermediate, up=gate_up[:, self.intermediate :],
            up_stride=2 * self.intermediate, prologue=Prologue.SILU_MUL, hadamard=self.down_plan,
        )  # fmt: skip
        return x + down

    def bf16(self) -> torch.Tensor:
        """The layer with torch."""
        functional = torch.nn.functional

        def norm(x: torch.Tensor) -> torch.Tensor:
            return functional.rms_norm(x, (self.hidden,), self.norm, 1e-6)

        q, k, v = self.split(norm(self.x) @ self.dense["qkv"].T)
        self.dense_k[:, :, -self.tokens :] = k
        self.dense_v[:, :, -self.tokens :] = v
        causal = self.tokens > 1  # then there is no context before
        y = functional.scaled_dot_product_attention(
            q, self.dense_k, self.dense_v, is_causal=causal, enable_gqa=True
        )
        x = self.x + y.transpose(1, 2).reshape(self.rows, -1) @ self.dense["o"].T
        gate, up = (norm(x) @ self.dense["gate_up"].T).chunk(2, -1)
        return x + (functional.silu(gate) * up) @ self.dense["down"].T


def layer_rows(bench: Bench) -> None:
    """Times a whole decoder layer against torch bf16."""
    cases = ((1, 2048, 0), (1, 1, 2048), (16, 1, 2048))
    for batch, tokens, context in ((1, 12, 0), (2, 1, 20)) if bench.emulated else cases:
        if not bench.has_time("layer", f"layer {batch} x {tokens}"):
            continue
        layer = Layer(bench, batch, tokens, context)
        assert bool(layer.int4().isfinite().all()), "layer: the output is not finite"
        assert bool(layer.bf16().isfinite().all())
        measured, dense = bench.time([layer.int4], [layer.bf16])
        name = "layer prefill" if tokens > 1 else "layer decode"
        shape = f"batch {batch}, {tokens} + {context}"
        bench.add(
            Row(name, shape, measured[0], baseline="torch bf16", baseline_us=dense[0],
                spread=measured[1])
        )  # fmt: skip


def memory(bench: Bench) -> None:
    """Bytes of a cache of one layer of Llama-3-8B; allocated, not timed."""
    for batch, tokens in ((1, 64),) if bench.emulated else ((1, 8192), (16, 8192)):
        dense = torch.empty(2, batch, 8, tokens, 128, dtype=torch.float16, device=bench.device)
        fp16, int4 = dense.nbytes, Cache(bench, batch, 8, tokens, 128).bytes()
        bench.add(
            Row(
                "cache of a layer, int4", f"{batch} x {tokens} x 8 x 128", math.nan,
                rate=f"{int4 / 2**20:.2f} MiB", baseline=f"fp16 {fp16 / 2**20:.2f} MiB",
                ratio=fp16 / int4,
            )
        )  # fmt: skip


def sanitizer_path() -> Path | None:
    """compute-sanitizer: on PATH, or beside nvcc."""
    if on_path := shutil.which("compute-sanitizer"):
        return Path(on_path)
    try:
        beside = build.find_nvcc().parent / "compute-sanitizer"
    except MissingDependencyError:
        return None
    return beside if beside.is_file() else None


def sanitizer_command(tool: Path, library: Path) -> list[str]:
    """The checks on tiny shapes, in a process of their own, under memcheck."""
    return [
        str(tool), "--tool", "memcheck", "--error-exitcode", "9",
        sys.executable, str(Path(__file__)), "--tiny", "--stages", "check",
        "--library", str(library), "--budget", str(SANITIZER_SECONDS),
    ]  # fmt: skip


def sanitizer(bench: Bench) -> None:
    """Runs the checks under compute-sanitizer, where it is installed."""
    tool = sanitizer_path()
    seconds = min(SANITIZER_SECONDS, bench.left() - 5)
    reason = ""
    if tool is None:
        reason = "compute-sanitizer is neither on PATH nor beside nvcc"
    elif bench.emulated:
        reason = "the emulator checks its memory itself"
    elif seconds < 20:
        reason = "budget"
    if tool is None or reason:
        print(f"sanitizer: skipped, {reason}")
        bench.unmeasured.append(f"memcheck ({reason})")
        return
    # PyTorch's caching allocator would hide accesses behind a tensor.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        done = subprocess.run(
            sanitizer_command(tool, bench.library), env=environment, capture_output=True,
            text=True, check=False, timeout=seconds,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        print(f"sanitizer: stopped after {seconds:.0f} s")
        bench.unmeasured.append(f"memcheck (not done within {seconds:.0f} s)")
        return
    print(done.stdout[-1500:].strip())
    assert done.returncode == 0, f"memcheck ended with {done.returncode}: {done.stderr[-500:]}"
    print("sanitizer: memcheck found nothing")


def check_baseline(bench: Bench) -> None:
    """Compares the int8 baseline with exact sums: a wrong baseline may be a fast one."""
    x, w = (bench.packed_codes(*shape).view(torch.int8) for shape in ((96, 256), (128, 256)))
    name, call = bench.int8_gemm(x, w)
    want = (x.double() @ w.double().T).to(torch.int32)
    assert torch.equal(call(), want), f"{name}: not exact"


def check(bench: Bench) -> None:
    """Runs every check."""
    checks = (check_transforms, check_gemms, check_append, check_attention, check_baseline)
    for checked in checks:
        began = time.monotonic()
        checked(bench)
        print(f"{checked.__name__}: ok ({time.monotonic() - began:.1f} s)", flush=True)


RUN: dict[str, Callable[[Bench], None]] = {
    "probe": probe, "ceilings": ceilings, "check": check, "hadamard": hadamard_rows,
    "prefill": prefill_rows, "decode": decode_rows, "attention": attention_rows,
    "layer": layer_rows, "memory": memory, "sanitizer": sanitizer,
}  # fmt: skip


class Results:
    """The rows of a run, printed once: at its end, or by the watchdog when there is none."""

    def __init__(self, stages: list[str], csv_file: Path | None) -> None:
        self.started = time.monotonic()
        self.unfinished = [stage for stage in STAGES if stage in stages]
        self.bench: Bench | None = None
        self.csv_file = csv_file
        self._lock = threading.Lock()
        self._printed = False

    def print(self) -> None:
        """The table so far, what is missing of it, and the CSV file."""
        with self._lock:
            if self._printed:
                return
            self._printed = True
            rows = list(self.bench.rows) if self.bench else []
            print(f"\n{HEADER}")
            for row in rows:
                print(format_row(row))
            for what in self.bench.unmeasured if self.bench else ():
                print(f"unmeasured: {what}")
            for stage in self.unfinished:
                print(f"unmeasured: {stage} (not finished)")
            if self.csv_file:
                with self.csv_file.open("w", newline="") as file:
                    writer = csv.DictWriter(file, [f.name for f in dataclasses.fields(Row)])
                    writer.writeheader()
                    writer.writerows(dataclasses.asdict(row) for row in rows)
            print(f"{time.monotonic() - self.started:.0f} s", flush=True)

    def watch(self, seconds: float) -> None:
        """Ends the process after that time, with the table: a kernel may hang, a build may last."""

        def stop() -> None:
            print(
                f"\nwatchdog: the budget of {seconds:.0f} s is spent", file=sys.stderr, flush=True
            )
            self.print()
            os._exit(3)

        timer = threading.Timer(seconds, stop)
        timer.daemon = True
        timer.start()


def run(bench: Bench, unfinished: list[str]) -> bool:
    """Runs stages in order and takes them off the list; whether all of them succeeded."""
    ok = True
    while unfinished:
        stage = unfinished[0]
        if bench.left() < 0:
            break
        try:
            RUN[stage](bench)
        except Exception as error:  # whatever it is, the other stages and the table still count
            ok = False
            bench.unmeasured.append(f"{stage}: {type(error).__name__}: {error}")
            print(f"{stage}: FAILED: {error}", file=sys.stderr, flush=True)
        unfinished.pop(0)
        if stage == "check" and not ok:
            break  # times of wrong kernels are worth nothing
        if not bench.emulated:
            torch.cuda.empty_cache()
    return ok


def main() -> int:
    """Runs the stages that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stages", default=",".join(STAGES), help="comma-separated, in any order")
    parser.add_argument("--budget", type=float, default=570.0, help="seconds, building included")
    parser.add_argument("--library", type=Path, help="a built library instead of building one")
    parser.add_argument("--csv", type=Path, help="where to write the rows")
    parser.add_argument("--emulate", action="store_true", help="every stage, tiny, on the CPU")
    parser.add_argument("--tiny", action="store_true", help="checks on the emulator's tiny shapes")
    arguments = parser.parse_args()
    stages = arguments.stages.split(",")
    if unknown := set(stages) - set(STAGES):
        parser.error(f"unknown stages {sorted(unknown)}; there are {', '.join(STAGES)}")
    if not arguments.emulate and not torch.cuda.is_available():
        parser.error("there is no GPU; --emulate runs every stage, tiny, on the CPU")
    results = Results(stages, arguments.csv)
    results.watch(arguments.budget)
    print(HEADER)
    try:
        results.bench = Bench(arguments)
        ok = run(results.bench, results.unfinished)
    finally:
        results.print()
    return int(not ok)


if __name__ == "__main__":
    sys.exit(main())
