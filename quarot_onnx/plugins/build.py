# SPDX-License-Identifier: Apache-2.0
"""Building the kernel libraries, once per content of their sources.

``plugins_cuda/Makefile`` does the work. A library lies in a directory whose name is a hash of every
source, the target and its options, so a changed source is a new build and an unchanged one is
found; concurrent callers (pytest workers) wait for the first. ``QUAROT_KERNELS_LIBRARY`` names a
library to take instead.
"""

import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final, Literal

from quarot_onnx.errors import MissingDependencyError

LIBRARY_VARIABLE: Final = "QUAROT_KERNELS_LIBRARY"
ARCHITECTURES: Final = ("80", "86", "89", "90a", "120")
"""What the CUDA library has native code for; sm_100 and 103 run none of it."""

Target = Literal["cpu", "cuda"]
_FILES: Final = {"cpu": "libquarot_kernels_cpu.so", "cuda": "libquarot_kernels.so"}


def source_directory() -> Path:
    """``plugins_cuda``: the project's, or the copy that a wheel carries.

    Raises:
        MissingDependencyError: the installation has no kernel sources.
    """
    directory = Path(__file__).resolve().parents[2] / "plugins_cuda"
    if not (directory / "Makefile").is_file():
        raise MissingDependencyError(
            f"kernels: {directory} has no Makefile, so there are no kernel sources here;"
            f" run from a source tree, or name a built library in {LIBRARY_VARIABLE}"
        )
    return directory


def build_directory() -> Path:
    """``build/kernels`` beside the sources."""
    return source_directory().parent / "build" / "kernels"


def find_nvcc() -> Path:
    """nvcc: ``CUDA_HOME``, then PATH, then the nvidia-cuda-nvcc wheels of this environment.

    Raises:
        MissingDependencyError: there is none.
    """
    candidates = [
        Path(os.environ[variable]) / "bin" / "nvcc"
        for variable in ("CUDA_HOME", "CUDA_PATH")
        if variable in os.environ
    ]
    if on_path := shutil.which("nvcc"):
        candidates.append(Path(on_path))
    spec = importlib.util.find_spec("nvidia")
    for root in (spec.submodule_search_locations or ()) if spec else ():
        candidates += sorted(Path(root).glob("*/bin/nvcc"), reverse=True)
    candidates.append(Path("/usr/local/cuda/bin/nvcc"))
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise MissingDependencyError(
        "kernels: no nvcc in CUDA_HOME, on PATH or in an nvidia-cuda-nvcc wheel;"
        " install the CUDA toolkit 12.8 or later"
    )


def build(
    target: Target,
    *,
    source: Path | None = None,
    architectures: tuple[str, ...] = ARCHITECTURES,
    sanitize: bool = False,
    jobs: int = 0,
) -> Path:
    """The library for a target, built if its content has not been built before.

    Args:
        target: ``cpu`` (g++, the emulator) or ``cuda`` (nvcc).
        source: a directory like ``plugins_cuda``; tests give altered copies.
        architectures: of the CUDA library, as in ``sm_80``.
        sanitize: the CPU library with address and undefined-behaviour sanitizers.
        jobs: compilers at a time; 0: one per core.

    Raises:
        MissingDependencyError: make, the compiler or a header is missing, or the build fails.
    """
    source = source_directory() if source is None else source
    options = [f"ARCHS={' '.join(architectures)}"] if target == "cuda" else []
    if target == "cuda":
        options.append(f"NVCC={find_nvcc()}")
    if sanitize:
        options.append("EXTRA_CPU_FLAGS=-fsanitize=address,undefined -fno-sanitize-recover")
    directory = build_directory() / _digest(source, target, options)
    library = directory / target / _FILES[target]
    if library.is_file():
        return library
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.is_file():
            _make(source, directory, target, options, jobs or os.cpu_count() or 1)
    return library


def find_library(target: Target = "cpu") -> Path:
    """``QUAROT_KERNELS_LIBRARY`` when it is set, else the built library of a target."""
    if named := os.environ.get(LIBRARY_VARIABLE):
        return Path(named)
    return build(target)


def _digest(source: Path, target: Target, options: list[str]) -> str:
    digest = hashlib.sha256()
    for part in (target, *options):
        digest.update(part.encode() + b"\0")
    files = [source / "Makefile"]
    for folder in ("include", "kernels", *(("emu",) if target == "cpu" else ())):
        files += (source / folder).iterdir()
    for file in sorted(files):
        if file.is_file():
            digest.update(
                str(file.relative_to(source)).encode() + b"\0" + file.read_bytes() + b"\0"
            )
    return digest.hexdigest()[:16]


def _make(source: Path, directory: Path, target: Target, options: list[str], jobs: int) -> None:
    if not (make := shutil.which("make")):
        raise MissingDependencyError("kernels: there is no make on PATH; install it")
    command = [make, "-C", str(source), f"-j{jobs}", f"BUILD={directory}", *options, target]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        message = (done.stderr or done.stdout).strip()
        raise MissingDependencyError(
            f"kernels: make {target} failed with {message[-2000:]!r}; fix the compiler's complaint"
        )


if __name__ == "__main__":
    for requested in sys.argv[1:] or ["cpu"]:
        if requested not in ("cpu", "cuda"):
            sys.exit(f"build: {requested} is not cpu or cuda")
        print(build("cpu" if requested == "cpu" else "cuda"))
