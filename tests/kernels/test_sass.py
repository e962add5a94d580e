# SPDX-License-Identifier: Apache-2.0
"""What ptxas made of the GEMM kernels: the tensor-core instructions that the design names.

An `mma.s4` compiles for every architecture, but from sm_90 on into some hundred ALU instructions;
a `wgmma` whose registers conflict compiles into serialized ones; a spilled accumulator compiles
too. Only the disassembly tells. It needs nvcc and cuobjdump, no GPU.
"""

import concurrent.futures
import dataclasses
import functools
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from quarot_onnx.errors import MissingDependencyError
from quarot_onnx.plugins.build import ARCHITECTURES, find_nvcc

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "plugins_cuda"
S4_ARCHITECTURES = ("80", "86", "89")
FILES = ("gemm_mma", "gemm_decode", "gemm_sm90", "pack_weights")


def find_cuobjdump() -> str | None:
    """On PATH, in CUDA_HOME, or inside an installed wheel that carries it."""
    candidates = [shutil.which("cuobjdump")]
    toolkits = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    candidates += [str(Path(toolkit) / "bin/cuobjdump") for toolkit in toolkits if toolkit]
    for package, below in (("triton", "backends/nvidia/bin"), ("nvidia", "cu13/bin")):
        spec = importlib.util.find_spec(package)
        locations = (spec.submodule_search_locations or ()) if spec else ()
        candidates += [str(Path(location) / below / "cuobjdump") for location in locations]
    return next((c for c in candidates if c and os.access(c, os.X_OK)), None)


CUOBJDUMP = find_cuobjdump()


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One function of a cubin: its demangled-enough name, its instructions, ptxas's report."""

    name: str
    instructions: tuple[str, ...]
    spills: bool
    registers: int

    def count(self, pattern: str) -> int:
        """How many instructions match from their first character on, predicates aside."""
        return sum(bool(re.match(rf"(@!?U?P\w+ +)?{pattern}", i)) for i in self.instructions)


def compiled(nvcc: Path, cache: Path, file: str, architecture: str) -> tuple[Path, str]:
    """The cubin and ptxas's report, compiled unless this version of the sources already was."""
    cubin, report = cache / f"{file}.{architecture}.cubin", cache / f"{file}.{architecture}.log"
    if not report.exists():
        command = [
            str(nvcc), "-std=c++17", "-O3", "-Xptxas", "-v", "-cubin",
            f"-gencode=arch=compute_{architecture},code=sm_{architecture}",
            str(SOURCES / "kernels" / f"{file}.cu"), "-o", str(cubin),
        ]  # fmt: skip
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        report.write_text(result.stderr)
    return cubin, report.read_text()


@pytest.fixture(scope="session")
def cubins(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], tuple[Path, str]]:
    try:
        nvcc = find_nvcc()
    except MissingDependencyError as error:
        pytest.skip(str(error))
    digest = hashlib.sha256()
    for path in sorted(p for p in SOURCES.rglob("*") if p.suffix in {".cu", ".cuh", ".hpp", ".h"}):
        digest.update(path.read_bytes())
    cache = tmp_path_factory.getbasetemp().parent / f"quarot-sass-{digest.hexdigest()[:16]}"
    cache.mkdir(exist_ok=True)
    cases = [(f, a) for f in FILES for a in ARCHITECTURES]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        built = pool.map(lambda case: compiled(nvcc, cache, *case), cases)
        return dict(zip(cases, built, strict=True))


@functools.cache
def disassemble(cubin: Path, report: str) -> tuple[Kernel, ...]:
    text = subprocess.run(
        [str(CUOBJDUMP), "-sass", str(cubin)], capture_output=True, text=True, check=True
    ).stdout
    kernels = []
    for name, body in re.findall(r"Function : (\S+)\n(.*?)(?=\n\s*Function :|\Z)", text, re.S):
        instructions = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.*?) ?;", body, re.M)
        entry = report[report.index(f"Compiling entry function '{name}'") :]
        spill = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", entry)
        registers = re.search(r"Used (\d+) registers", entry)
        assert spill is not None
        assert registers is not None
        spilled = spill.group(1) != "0" or spill.group(2) != "0"
        kernels.append(Kernel(name, tuple(instructions), spilled, int(registers.group(1))))
    return tuple(kernels)


@pytest.fixture
def kernels_of(cubins):
    if CUOBJDUMP is None:
        pytest.skip("no cuobjdump on PATH, in CUDA_HOME, or in an installed triton wheel")
    return lambda file, architecture: disassemble(*cubins[file, architecture])


def is_native(kernel: Kernel) -> bool:
    """Whether kNative is set: the last template argument of gemm_mma, the first of gemm_decode."""
    if "gemm_mma" in kernel.name:
        return "ELb1EEE" in kernel.name
    return "kernelILb1" in kernel.name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("file", FILES)
def test_ptxas_neither_warns_nor_spills(cubins, file, architecture):
    report = cubins[file, architecture][1]
    assert "warning" not in report
    assert "C75" not in report, "ptxas serialized wgmma"
    assert set(re.findall(r"(\d+) bytes spill", report)) == {"0"}
    assert set(re.findall(r"(\d+) bytes stack frame", report)) == {"0"}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("file", FILES)
def test_no_kernel_touches_local_memory_or_calls_a_subroutine(kernels_of, file, architecture):
    for kernel in kernels_of(file, architecture):
        assert not kernel.spills
        assert kernel.count("STL") == kernel.count("LDL") == 0, kernel.name
        # A CALL may be how ptxas leaves a loop; a subroutine (emulated mma.s4) would return.
        assert kernel.count("RET") == 0, kernel.name


@pytest.mark.parametrize("architecture", S4_ARCHITECTURES)
@pytest.mark.parametrize("file", ["gemm_mma", "gemm_decode"])
def test_s4_kernels_keep_both_operands_packed_up_to_the_tensor_core(kernels_of, file, architecture):
    native = [k for k in kernels_of(file, architecture) if is_native(k)]
    assert native
    for kernel in native:
        assert kernel.count(r"IMMA\.16864\.S4\.S4") > 0
        assert kernel.count("IMMA") == kernel.count(r"IMMA\.16864\.S4\.S4")


@pytest.mark.parametrize("architecture", ["90a", "120"])
@pytest.mark.parametrize("file", ["gemm_mma", "gemm_decode"])
def test_no_s4_kernel_exists_where_it_would_be_emulated(kernels_of, file, architecture):
    native = [k for k in kernels_of(file, architecture) if is_native(k)]
    assert native
    for kernel in native:
        assert kernel.count("IMMA") == 0
        assert kernel.count(r"BPT\.TRAP") > 0
        assert len(kernel.instructions) < 64


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("file", ["gemm_mma", "gemm_decode"])
def test_s8_kernels_use_the_native_instruction(kernels_of, file, architecture):
    unpacking = [k for k in kernels_of(file, architecture) if not is_native(k)]
    assert unpacking
    for kernel in unpacking:
        assert kernel.count(r"IMMA\.16832\.S8\.S8") > 0
        assert kernel.count("IMMA") == kernel.count(r"IMMA\.16832\.S8\.S8")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_decode_never_waits_for_the_load_that_it_has_just_issued(kernels_of, architecture):
    # A refill into other registers than its predecessor's ends in a copy, which waits for it.
    for kernel in kernels_of("gemm_decode", architecture):
        mma = [i for i, x in enumerate(kernel.instructions) if x.startswith("IMMA")]
        if not mma:
            continue
        loop = kernel.instructions[mma[0] : mma[-1]]
        assert not [x for x in loop if re.match(r"(@!?P\w+ +)?(IMAD\.)?MOV", x)], kernel.name
        ring = re.findall(r"LDG\.E\.\S*128\S* (R\d+),", "\n".join(kernel.instructions))
        assert len(ring) == 16, "eight loads before the loop, eight refills"
        assert len(set(ring)) == 8


def test_the_256_token_tile_unpacks_few_words_per_mma(kernels_of):
    # 64 x 64 codes of each operand: 32 words, a shift and two masks each, for 64 mma; two such
    # halves a step. More masks than that would mean that ptxas unpacks something twice.
    (kernel,) = (
        k
        for k in kernels_of("gemm_mma", "90a")
        if not is_native(k) and "MmaShapeILi2ELi4E" in k.name
    )
    assert kernel.count("IMMA") == 2 * 2 * 32
    assert kernel.count(r"LOP3\.LUT \w+, \S+ 0xf0f0f0f0") <= 2 * 2 * 32 + 8


@pytest.mark.parametrize(("blocks", "tokens"), [(1, 16), (1, 32), (1, 64), (1, 128), (2, 128)])
def test_hopper_issues_wgmma_back_to_back(kernels_of, blocks, tokens):
    shape = f"ShapeILi{blocks}ELi{tokens}E"
    (kernel,) = (k for k in kernels_of("gemm_sm90", "90a") if shape in k.name)
    wgmma = rf"IGMMA\.64x{tokens}x32\.S8\.S8"
    assert kernel.count("IGMMA") == kernel.count(wgmma) == 4 * blocks, "one step, 32 of k each"
    # One wait for each 64 of k, and one at the end: a serialized wgmma would have its own.
    assert kernel.count(r"WARPGROUP\.DEPBAR") == 3
    assert kernel.count("USETMAXREG") == 2
    assert kernel.count("UBLKCP") == 2 * blocks + 1, "weights and tokens, by the copy engine"


def test_hopper_hides_the_unpacking_behind_wgmma(kernels_of):
    (kernel,) = (k for k in kernels_of("gemm_sm90", "90a") if "ShapeILi2ELi128E" in k.name)
    where = [i for i, x in enumerate(kernel.instructions) if x.startswith("IGMMA")]
    masked = [i for i, x in enumerate(kernel.instructions) if "0xf0f0f0f0" in x]
    for first, last in ((0, 3), (4, 7)):
        batch = range(where[first], where[last])
        assert not set(batch) & set(masked), "unpacking inside a batch of wgmma"
    # 8 words a thread and 64 of k: in the prologue, and twice in the loop, while wgmma run.
    assert len(masked) == 3 * 16
    assert len([i for i in masked if where[3] < i < where[4]]) == 16
    assert len([i for i in masked if i > where[7]]) == 16


@pytest.mark.parametrize("architecture", ["80", "86", "89", "120"])
def test_the_hopper_kernel_is_empty_elsewhere(kernels_of, architecture):
    for kernel in kernels_of("gemm_sm90", architecture):
        assert kernel.count("IMMA") == kernel.count("IGMMA") == 0
        assert kernel.count(r"BPT\.TRAP") > 0
