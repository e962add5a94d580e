# SPDX-License-Identifier: Apache-2.0
"""The plugin library under test: emulated kernels, or the library QUAROT_PLUGINS_LIBRARY names.

A named CUDA library is driven with device memory, which needs torch and a GPU but no TensorRT.
"""

import os
from pathlib import Path

import pytest

from quarot_onnx.errors import MissingDependencyError
from quarot_onnx.plugins import build, library
from quarot_onnx.plugins.library import LIBRARY_VARIABLE
from tests.plugins.harness import Host, compile_host


@pytest.fixture(scope="session")
def library_path() -> Path:
    """The plugin library, built once for all processes."""
    if named := os.environ.get(LIBRARY_VARIABLE):
        return Path(named)
    return build.build_plugins("cpu")


@pytest.fixture(scope="session")
def cuda_library_path() -> Path:
    """The plugins over CUDA kernels of one architecture: a minute of nvcc, no GPU."""
    try:
        build.find_nvcc()
    except MissingDependencyError as error:
        pytest.skip(str(error))
    return build.build_plugins("cuda", architectures=("80",))


@pytest.fixture(scope="session")
def host_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_host(build.source_directory(), tmp_path_factory.mktemp("host"))


@pytest.fixture(scope="session")
def host(host_path: Path, library_path: Path) -> Host:
    """The library in the host without TensorRT."""
    on_gpu = False
    if LIBRARY_VARIABLE in os.environ and library.verify(library_path).backend == "cuda":
        import torch  # noqa: PLC0415

        on_gpu = torch.cuda.is_available()
        if not on_gpu:
            pytest.skip(f"{library_path} has CUDA kernels, and there is no GPU for them here")
    return Host(host_path, library_path, on_gpu=on_gpu)
