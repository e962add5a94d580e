# SPDX-License-Identifier: Apache-2.0
"""What ptxas made of the transform and cache kernels: tensor cores where planned, no spills.

Compiling every specialization takes minutes, hence slow; ``test_sass.py`` does it for the GEMM.
"""

import re
import subprocess
from pathlib import Path

import pytest

from quarot_onnx.errors import MissingDependencyError
from quarot_onnx.plugins.build import find_nvcc
from tests.kernels.test_sass import CUOBJDUMP, Kernel, compiled, disassemble

ARCHITECTURES = ["80", "90a"]
FILES = ["hadamard", "kv_append", "kv_attention"]


@pytest.fixture(scope="module")
def kernels_of(tmp_path_factory):
    try:
        nvcc = find_nvcc()
    except MissingDependencyError as error:
        pytest.skip(str(error))
    if CUOBJDUMP is None:
        pytest.skip("no cuobjdump on PATH, in CUDA_HOME, or in an installed triton wheel")
    cache: Path = tmp_path_factory.mktemp("sass")
    return lambda file, architecture: disassemble(*compiled(nvcc, cache, file, architecture))


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("file", FILES)
def test_no_kernel_spills_or_touches_local_memory(kernels_of, file, architecture):
    for kernel in kernels_of(file, architecture):
        assert not kernel.spills, kernel.name
        assert kernel.count("STL") == kernel.count("LDL") == 0, kernel.name


def named(kernels: tuple[Kernel, ...], name: str) -> list[Kernel]:
    found = [k for k in kernels if name in k.name]
    assert found, name
    return found


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_dense_factors_run_on_tensor_cores_and_butterflies_do_not(kernels_of, architecture):
    kernels = kernels_of("hadamard", architecture)
    for kernel in named(kernels, "dense_rows"):
        assert kernel.count(r"HMMA\.16816\.F32") > 0
        assert kernel.count(r"LDSM\.16\.MT88\.4") > 0
    for kernel in named(kernels, "butterfly_rows"):
        assert kernel.count("HMMA") == 0
        assert kernel.count("FADD") > 6 * 64, "six stages of 64 values"


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_attention_reads_codes_by_the_matrix_and_multiplies_them_on_tensor_cores(
    kernels_of, architecture
):
    kernels = kernels_of("kv_attention", architecture)
    for kernel in named(kernels, "kv_decode_kernel"):
        head_dim = int(re.findall(r"Li(\d+)E", kernel.name)[-1])
        # Scores and output, 16 dims an instruction each.
        assert kernel.count(r"HMMA\.16816\.F32") == 2 * head_dim // 16
        assert kernel.count(r"LDSM\.16\.MT88\.4") == head_dim // 64
        assert kernel.count("MOVM") == 2
        assert kernel.count("LDGSTS") > 0
    assert named(kernels, "kv_prefill_kernel")


def test_the_sources_hold_inline_ptx_only_in_the_vocabulary():
    folder = Path(__file__).parents[2] / "plugins_cuda" / "kernels"
    done = subprocess.run(
        ["grep", "-lE", r"\basm\b", *map(str, folder.iterdir())],
        capture_output=True,
        text=True,
        check=False,
    )
    allowed = {"common.cuh", "gemm_ops.cuh", "hopper.cuh"}
    assert {Path(line).name for line in done.stdout.split()} <= allowed
