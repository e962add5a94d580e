# SPDX-License-Identifier: Apache-2.0
"""What this machine has, what it lacks, and how to get it: ``quarot-onnx doctor``."""

import ctypes.util
import importlib.metadata
import os
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path

from quarot_onnx.errors import MissingDependencyError
from quarot_onnx.plugins import build, library


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        name: what was looked for.
        found: its version or place; empty where it is missing.
        needed_for: which command or stage needs it.
        remedy: what to do; empty where nothing is wrong.
        is_problem: whether it breaks something that was installed on purpose.
    """

    name: str
    found: str
    needed_for: str
    remedy: str = ""
    is_problem: bool = False


_BASE = (
    "accelerate",
    "numpy",
    "onnx",
    "onnx-ir",
    "torch",
    "transformers",
    "safetensors",
    "polygraphy",
    "pydantic",
)


def diagnose() -> list[Finding]:
    """Everything that decides which commands work here."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    free = shutil.disk_usage(Path.cwd()).free / 1e9
    findings = [
        Finding("python", platform.python_version(), "everything"),
        Finding(
            "machine",
            f"{os.cpu_count()} cores, {memory:.0f} GB memory, {free:.0f} GB free here",
            "everything",
        ),
    ]
    for package in _BASE:
        version = _version(package)
        remedy = "" if version else "pip install quarot-onnx"
        findings.append(Finding(package, version, "export", remedy, not version))
    findings.append(_onnxruntime())
    for package in ("jinja2", "matplotlib"):
        version = _version(package)
        remedy = "" if version else 'pip install "quarot-onnx[report]"'
        findings.append(Finding(package, version, "report, compare", remedy))
    for package in ("datasets", "pyarrow"):
        version = _version(package)
        remedy = "" if version else 'pip install "quarot-onnx[data]"'
        findings.append(Finding(package, version, "data sets and .parquet as text", remedy))
    tensorrt = _version("tensorrt")
    findings.append(
        Finding(
            "tensorrt",
            tensorrt,
            "engines",
            ""
            if tensorrt
            else 'on a machine with an NVIDIA GPU: pip install "quarot-onnx[tensorrt]"',
        )
    )
    findings += [_nvcc(), plugins()]
    driver = ctypes.util.find_library("cuda") or ""
    findings.append(
        Finding(
            "NVIDIA driver", driver, "running on a GPU", "" if driver else "none on this machine"
        )
    )
    return findings


def _onnxruntime() -> Finding:
    cpu, gpu = _version("onnxruntime"), _version("onnxruntime-gpu")
    if cpu and gpu:
        return Finding(
            "onnxruntime",
            f"{cpu} and onnxruntime-gpu {gpu}",
            "validate, eval, generate",
            "both install the same module; pip uninstall both, then install one of [cpu], [gpu]",
            is_problem=True,
        )
    found = cpu or (f"gpu {gpu}" if gpu else "")
    remedy = "" if found else 'pip install "quarot-onnx[cpu]" (or [gpu])'
    return Finding("onnxruntime", found, "validate, eval, generate", remedy, not found)


def _nvcc() -> Finding:
    try:
        return Finding("nvcc", str(build.find_nvcc()), "building the CUDA kernels and plugins")
    except MissingDependencyError:
        wheels = "nvidia-cuda-nvcc nvidia-cuda-runtime nvidia-cuda-cccl"
        remedy = f"install the CUDA toolkit, set CUDA_HOME, or pip install {wheels}"
        return Finding("nvcc", "", "building the CUDA kernels and plugins", remedy)


def plugins() -> Finding:
    """The TensorRT plugin library: whether it is there, whole, and of these sources."""
    name, needed_for = "TensorRT plugins", "engines"
    if library.LIBRARY_VARIABLE not in os.environ and not library.is_installed():
        remedy = f"{build.command()} on a machine with nvcc (docs/plugins.md)"
        return Finding(name, "", needed_for, remedy)
    try:
        found = library.find()
    except MissingDependencyError as error:
        return Finding(name, str(error), needed_for, build.command(), is_problem=True)
    described = f"{found.path}: {found.backend} for {' '.join(found.architectures)}"
    remedy = "" if found.is_current else f"built from other sources than these: {build.command()}"
    return Finding(name, described, needed_for, remedy)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
