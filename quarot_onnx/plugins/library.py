# SPDX-License-Identifier: Apache-2.0
"""The TensorRT plugin library: where it is, whether it is what it claims, and loading it.

``make plugins`` installs ``build/plugins/libquarot_plugins.so`` (elsewhere without a source tree:
`build.build_directory`) and, beside it, a JSON file with the library's hash and its own description
(ABI version, architectures, plugins). The emulated one (``make plugins-cpu``,
``libquarot_plugins_cpu.so``) has the same plugins on the CPU, for tests.
``QUAROT_PLUGINS_LIBRARY`` names a library elsewhere. ``docs/plugins.md`` says what each plugin
takes.
"""

import ctypes
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from quarot_onnx.errors import MissingDependencyError
from quarot_onnx.plugins import build
from quarot_onnx.plugins.kernels import ABI_VERSION

LIBRARY_VARIABLE: Final = "QUAROT_PLUGINS_LIBRARY"

_NAMES: Final[Mapping[build.Target, str]] = {
    "cuda": "libquarot_plugins.so",
    "cpu": "libquarot_plugins_cpu.so",
}


@dataclass(frozen=True)
class PluginLibrary:
    """A plugin library whose hash and ABI version have been checked.

    Attributes:
        path: the shared library.
        sha256: of the file.
        backend: ``cuda`` or ``emulation``.
        architectures: what it has native code for, as in ``90a``; ``("cpu",)`` if emulated.
        build_id: of its sources and options; a part of every timing cache ID.
        plugins: name -> inputs, outputs and attributes, as the library describes them.
        is_current: whether it was built from the sources that lie here; true where none do.
    """

    path: Path
    sha256: str
    backend: str
    architectures: tuple[str, ...]
    build_id: str
    plugins: Mapping[str, Any]
    is_current: bool

    def require_architecture(self, compute_capability: int) -> None:
        """Raises unless the library has code for a device of 10 * major + minor.

        Raises:
            MissingDependencyError: it has none.
        """
        # Code of one architecture runs on later minors of its major, except 90a and its like.
        runs = self.backend == "cuda" and any(
            int(name.rstrip("af")) == compute_capability
            if name[-1] in "af"
            else int(name) // 10 == compute_capability // 10 and int(name) <= compute_capability
            for name in self.architectures
        )
        if not runs:
            command = build.command("cuda", compute_capability)
            raise MissingDependencyError(
                f"{self.path}: built for {' '.join(self.architectures)}, and the GPU is"
                f" {compute_capability}; run {command}"
            )


def directory() -> Path:
    """``plugins`` under `build.build_directory`."""
    return build.build_directory() / "plugins"


def install(built: Path) -> Path:
    """Put a built library into `directory`, with its description beside it; returns its place."""
    directory().mkdir(parents=True, exist_ok=True)
    place = directory() / built.name
    target: build.Target = "cuda" if built.name == _NAMES["cuda"] else "cpu"
    content = {
        "sha256": _sha256(built),
        "sources": build.plugins_digest(target),
        **_describe(built),
    }
    for source, name in ((built, place), (None, _beside(place))):
        with tempfile.NamedTemporaryFile(dir=directory(), delete=False) as staged:
            if source is None:
                staged.write(json.dumps(content, indent=1).encode() + b"\n")
        if source is not None:
            shutil.copyfile(source, staged.name)
        Path(staged.name).chmod(0o644)
        Path(staged.name).replace(name)
    return place


def is_installed(target: build.Target = "cuda") -> bool:
    """Whether `directory` has the library of a target."""
    return (directory() / _NAMES[target]).is_file()


def find(target: build.Target = "cuda") -> PluginLibrary:
    """The installed library, or the one that ``QUAROT_PLUGINS_LIBRARY`` names; see `verify`.

    Raises:
        MissingDependencyError: there is none, or it is not what it claims.
    """
    if named := os.environ.get(LIBRARY_VARIABLE):
        return verify(Path(named))
    path = directory() / _NAMES[target]
    if not path.is_file():
        raise MissingDependencyError(
            f"plugins: there is no {path}; run {build.command(target)}, or name a library in"
            f" {LIBRARY_VARIABLE}"
        )
    return verify(path)


def verify(path: Path) -> PluginLibrary:
    """Check a library against the description beside it, before and after loading it.

    Raises:
        MissingDependencyError: no description, another hash, another ABI version, or not loadable.
    """
    try:
        stated = json.loads(_beside(path).read_text())
        digest = _sha256(path)
    except (OSError, ValueError) as error:
        raise MissingDependencyError(
            f"{path}: the library or its description cannot be read ({error});"
            f" run {build.command()}"
        ) from error
    if stated.get("sha256") != digest:
        raise MissingDependencyError(
            f"{path}: sha256 is {digest[:12]} and {_beside(path).name} says"
            f" {str(stated.get('sha256'))[:12]}: the file was changed;"
            f" run {build.command()}"
        )
    described = _describe(path)
    if described["abi_version"] != ABI_VERSION:
        raise MissingDependencyError(
            f"{path}: ABI version is {described['abi_version']} and this package has"
            f" {ABI_VERSION}; run {build.command()}"
        )
    return PluginLibrary(
        path,
        digest,
        described["backend"],
        tuple(described["architectures"].split()),
        described["build_id"],
        described["plugins"],
        _is_current(described["backend"], stated.get("sources")),
    )


def load(target: build.Target = "cuda") -> PluginLibrary:
    """`find` the library and register its plugins with every TensorRT loaded in this process.

    Import ``tensorrt`` first. Loading it again, here or through TensorRT, is harmless.

    Raises:
        MissingDependencyError: as `find`.
    """
    found = find(target)
    _open(found.path).quarotRegisterPlugins(None)
    return found


def _is_current(backend: str, sources: str) -> bool:
    try:
        return sources == build.plugins_digest("cuda" if backend == "cuda" else "cpu")
    except MissingDependencyError:  # no sources, as in a Triton repository
        return True


def _beside(path: Path) -> Path:
    return path.with_suffix(".json")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _open(path: Path) -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(str(path))
        library.quarotDescribePlugins.restype = ctypes.c_char_p
        library.quarotRegisterPlugins.argtypes = [ctypes.c_void_p]
    except (OSError, AttributeError) as error:
        raise MissingDependencyError(
            f"{path}: cannot be loaded as a plugin library ({error}); run {build.command()}"
        ) from error
    return library


def _describe(path: Path) -> dict[str, Any]:
    description: dict[str, Any] = json.loads(_open(path).quarotDescribePlugins())
    return description
