# SPDX-License-Identifier: Apache-2.0
"""The names in an artifact, and ``manifest.json``: versions and the sha256 of every file."""

import hashlib
import importlib.metadata
import json
from pathlib import Path
from typing import Any

from quarot_onnx.errors import InputError

FORMAT_VERSION = 1
MODEL, DATA, MANIFEST = "model.onnx", "model.onnx_data", "manifest.json"

_PACKAGES = ("quarot-onnx", "numpy", "onnx", "onnx-ir", "torch", "transformers")


def save_manifest(directory: Path, content: dict[str, Any]) -> None:
    """Write ``manifest.json``: `content`, the versions, and the sha256 of every other file."""
    manifest = {
        "format_version": FORMAT_VERSION,
        "packages": {name: _version(name) for name in _PACKAGES},
        **content,
        "files": {
            path.relative_to(directory).as_posix(): sha256(path)
            for path in sorted(directory.rglob("*"))
            if path.is_file() and path.name != MANIFEST
        },
    }
    text = json.dumps(manifest, indent=2, ensure_ascii=False, sort_keys=True)
    (directory / MANIFEST).write_text(f"{text}\n", encoding="utf-8")


def load_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of an artifact.

    Raises:
        InputError: `directory` is not an artifact, or of a format this version does not read.
    """
    path = directory / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        version = manifest["format_version"]
    except FileNotFoundError as error:
        raise InputError(
            f"{directory}: no {MANIFEST}; give a directory that `quarot-onnx export` wrote"
        ) from error
    except (OSError, UnicodeDecodeError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: is damaged ({error}); export again") from error
    if version != FORMAT_VERSION:
        raise InputError(
            f"{path}: format version {version!r}, this quarot-onnx reads {FORMAT_VERSION}; "
            "export again"
        )
    return dict(manifest)


def changed_files(directory: Path, manifest: dict[str, Any]) -> list[str]:
    """The files that are missing or differ from the manifest."""
    return [
        name
        for name, digest in manifest.get("files", {}).items()
        if not (directory / name).is_file() or sha256(directory / name) != digest
    ]


def sha256(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
