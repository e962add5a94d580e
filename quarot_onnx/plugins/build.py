# SPDX-License-Identifier: Apache-2.0
"""Building the kernel and plugin libraries, once per content of their sources.

``plugins_cuda/Makefile`` does the work. A library lies in a directory whose name is a hash of every
source, the target and its options, so a changed source is a new build and an unchanged one is
found; concurrent callers (pytest workers) wait for the first. The plugins of a backend are linked
from the objects of its kernels. ``QUAROT_KERNELS_LIBRARY`` names a kernel library to take instead.

    python -m quarot_onnx.plugins.build cpu|cuda|plugins|plugins-cpu [ARCHITECTURE ...]

builds one and prints where it is; plugins are put where `library.find` looks (`library.install`).
A wheel carries the sources, so an installation builds as a source tree does (`make plugins`), and
keeps what it builds in the user's cache.
"""

import fcntl
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final, Literal

from quarot_onnx.errors import MissingDependencyError, QuarotError

LIBRARY_VARIABLE: Final = "QUAROT_KERNELS_LIBRARY"
ARCHITECTURES: Final = ("80", "86", "89", "90a", "120")
"""What the CUDA library has native code for; sm_100 and 103 run none of it."""

Target = Literal["cpu", "cuda"]
_FILES: Final = {"cpu": "libquarot_kernels_cpu.so", "cuda": "libquarot_kernels.so"}
_PLUGIN_FILES: Final = {"cpu": "libquarot_plugins_cpu.so", "cuda": "libquarot_plugins.so"}
_NVCC = "nvcc"
_COMMANDS: Final = ("cpu", "cuda", "plugins", "plugins-cpu")
_PACKAGE: Final = Path(__file__).resolve().parents[1]


def is_source_tree() -> bool:
    """Whether this package lies in a source tree, where ``make`` builds."""
    return (_PACKAGE.parent / "plugins_cuda" / "Makefile").is_file()


def source_directory() -> Path:
    """``plugins_cuda``: the source tree's, or the copy that a wheel puts into the package.

    Raises:
        MissingDependencyError: there is neither, as beside the modules that serve in Triton.
    """
    directory = (_PACKAGE.parent if is_source_tree() else _PACKAGE) / "plugins_cuda"
    if not (directory / "Makefile").is_file():
        raise MissingDependencyError(
            f"kernels: {directory} has no Makefile, so there are no kernel sources here;"
            f" run from a source tree, or name a built library in {LIBRARY_VARIABLE}"
        )
    return directory


def build_directory() -> Path:
    """``build`` in a source tree; otherwise ``quarot-onnx`` in the user's cache directory."""
    if is_source_tree():
        return _PACKAGE.parent / "build"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "quarot-onnx"


def command(target: Target = "cuda", *architectures: int) -> str:
    """What a person runs here to build and install the plugins of a target."""
    rule = "plugins" if target == "cuda" else "plugins-cpu"
    named = " ".join(map(str, architectures))
    if is_source_tree():
        return f"make {rule} ARCHS={named}" if named else f"make {rule}"
    return f"python -m quarot_onnx.plugins.build {rule} {named}".rstrip()


def find_nvcc() -> Path:
    """nvcc: ``CUDA_HOME``, then PATH, then the nvidia-cuda-nvcc wheels of this environment.

    Raises:
        MissingDependencyError: there is none.
    """
    candidates = [
        Path(os.environ[variable]) / "bin" / _NVCC
        for variable in ("CUDA_HOME", "CUDA_PATH")
        if variable in os.environ
    ]
    if on_path := shutil.which(_NVCC):
        candidates.append(Path(on_path))
    spec = importlib.util.find_spec("nvidia")
    for root in (spec.submodule_search_locations or ()) if spec else ():
        candidates += sorted(Path(root).glob(f"*/bin/{_NVCC}"), reverse=True)
    candidates.append(Path("/usr/local/cuda/bin") / _NVCC)
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise MissingDependencyError(
        "kernels: no nvcc in CUDA_HOME, on PATH or in an nvidia-cuda-nvcc wheel; install the CUDA"
        " toolkit 12.8 or later, or pip install nvidia-cuda-nvcc nvidia-cuda-runtime"
        " nvidia-cuda-cccl"
    )


def cuda_include(nvcc: Path) -> Path:
    """The include directory of the toolkit that an nvcc, which may be a script, belongs to.

    Raises:
        MissingDependencyError: nvcc does not say.
    """
    said = subprocess.run(
        [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull],
        capture_output=True,
        text=True,
        check=False,
    ).stderr
    if not (top := re.search(r"^#\$ TOP=(.*)$", said, re.MULTILINE)):
        raise MissingDependencyError(
            f"kernels: {nvcc} --dryrun names no toolkit directory; set CUDA_HOME to the toolkit"
        )
    return Path(top[1]).resolve() / "include"


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
    options = _options(target, architectures, sanitize=sanitize)
    directory = build_directory() / "kernels" / _kernels_digest(source, target, options)
    library = directory / target / _FILES[target]
    return _built(library, source, directory, target, options, jobs)


def build_plugins(
    target: Target,
    *,
    architectures: tuple[str, ...] = ARCHITECTURES,
    sanitize: bool = False,
    tensorrt_include: Path | None = None,
    jobs: int = 0,
) -> Path:
    """The TensorRT plugin library over a target's kernels.

    Args:
        target: of the kernels, as in `build`.
        architectures: as in `build`.
        sanitize: as in `build`.
        tensorrt_include: NVIDIA's headers, in place of the project's own of the plugin ABI; the
            environment's ``TRT_INCLUDE`` where it is None.
        jobs: as in `build`.

    Raises:
        MissingDependencyError: as `build`.
    """
    source = source_directory()
    options = _options(target, architectures, sanitize=sanitize)
    directory = build_directory() / "kernels" / _kernels_digest(source, target, options)
    include = tensorrt_include or os.environ.get("TRT_INCLUDE")
    if include:
        options.append(f"TRT_INCLUDE={Path(include).resolve()}")
        options.append(f"CUDA_INCLUDE={cuda_include(find_nvcc())}")
    build_id = plugins_digest(target, options)
    place = directory / f"plugins-{build_id}"
    options += [f"BUILD_ID={build_id}", f"PLUGIN_BUILD={place}"]
    library = place / _PLUGIN_FILES[target]
    return _built(library, source, directory, f"plugins-{target}", options, jobs)


def plugins_digest(target: Target, options: list[str] | None = None) -> str:
    """A hash of a plugin library's sources and, where given, of how it is built: its build id."""
    source = source_directory()
    folders = ("include", "kernels", "trt", *(("emu",) if target == "cpu" else ()))
    return _digest(source, f"plugins-{target}", options or [], folders)


def _options(target: Target, architectures: tuple[str, ...], *, sanitize: bool) -> list[str]:
    options = [f"ARCHS={' '.join(architectures)}"] if target == "cuda" else []
    if target == "cuda":
        options.append(f"NVCC={find_nvcc()}")
    if sanitize:
        options.append("EXTRA_CPU_FLAGS=-fsanitize=address,undefined -fno-sanitize-recover")
    return options


def _built(
    library: Path, source: Path, directory: Path, rule: str, options: list[str], jobs: int
) -> Path:
    if library.is_file():
        return library
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.is_file():
            _make(source, directory, rule, options, jobs or os.cpu_count() or 1)
    return library


def find_library(target: Target = "cpu") -> Path:
    """``QUAROT_KERNELS_LIBRARY`` when it is set, else the built library of a target."""
    if named := os.environ.get(LIBRARY_VARIABLE):
        return Path(named)
    return build(target)


def _kernels_digest(source: Path, target: Target, options: list[str]) -> str:
    folders = ("include", "kernels", *(("emu",) if target == "cpu" else ()))
    return _digest(source, target, options, folders)


def _digest(source: Path, rule: str, options: list[str], folders: tuple[str, ...]) -> str:
    digest = hashlib.sha256()
    for part in (rule, *options):
        digest.update(part.encode() + b"\0")
    files = [source / "Makefile"]
    for folder in folders:
        files += (source / folder).iterdir()
    for file in sorted(files):
        if file.is_file():
            digest.update(
                str(file.relative_to(source)).encode() + b"\0" + file.read_bytes() + b"\0"
            )
    return digest.hexdigest()[:16]


def _make(source: Path, directory: Path, rule: str, options: list[str], jobs: int) -> None:
    if not (make := shutil.which("make")):
        raise MissingDependencyError("kernels: there is no make on PATH; install it")
    command = [make, "-C", str(source), f"-j{jobs}", f"BUILD={directory}", *options, rule]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        message = (done.stderr or done.stdout).strip()
        raise MissingDependencyError(
            f"kernels: make {rule} failed with {message[-2000:]!r}; fix the compiler's complaint"
        )


def _main(arguments: list[str]) -> None:
    from quarot_onnx.plugins import library  # noqa: PLC0415  # it imports this module

    command, *named = arguments or ["cpu"]
    if command not in _COMMANDS:
        sys.exit(f"build: {command} is not one of {', '.join(_COMMANDS)}")
    architectures = tuple(named) or ARCHITECTURES
    try:
        if command == "plugins-cpu":
            print(library.install(build_plugins("cpu")))
        elif command == "plugins":
            print(library.install(build_plugins("cuda", architectures=architectures)))
        else:
            print(build("cpu" if command == "cpu" else "cuda", architectures=architectures))
    except QuarotError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    _main(sys.argv[1:])
