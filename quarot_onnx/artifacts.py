# SPDX-License-Identifier: Apache-2.0
"""Artifact directories: written beside their place, published by one rename.

An artifact holds ``model.onnx``, its weights in one file ``model.onnx_data``, the files that travel
from the Hugging Face model, and ``manifest.json``: versions, the resolved recipe, the report of
every pass and the sha256 of every file. A crash or a full disk leaves nothing under the final name.
"""

import errno
import fcntl
import glob
import os
import secrets
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import onnx_ir as ir

from quarot_onnx.errors import ResourceError, UsageError
from quarot_onnx.manifest import (
    DATA,
    FORMAT_VERSION,
    MANIFEST,
    MODEL,
    changed_files,
    load_manifest,
    save_manifest,
    sha256,
)
from quarot_onnx.weights import Weight

__all__ = [
    "DATA",
    "FORMAT_VERSION",
    "MANIFEST",
    "MODEL",
    "Progress",
    "changed_files",
    "load_manifest",
    "publish",
    "require_space",
    "save_manifest",
    "save_model",
    "sha256",
]

_INLINE_BYTES = 1024  # smaller tensors stay in model.onnx
_PAGE = 4096
_PAGE_ALIGNED_BYTES = 1 << 20

Progress = Callable[[int, int], None]
"""Called with the bytes written so far and the bytes in all."""


@contextmanager
def publish(target: Path, *, force: bool = False) -> Iterator[Path]:
    """A directory to fill; on success it becomes `target`, otherwise nothing is left.

    Raises:
        UsageError: `target` exists and is not empty (unless `force` and it is an artifact of ours),
            or another process is writing it.
        ResourceError: no space, or no permission to write there.
    """
    target = target.resolve()  # "." and a link have no name of their own to build beside
    try:
        _take_over(target)
    except OSError as error:
        raise _resource_error(error, target) from error
    _check_target(target, force=force)
    unique = f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}"
    staging, replaced = (target.with_name(f"{unique}.{kind}") for kind in ("partial", "replaced"))
    previous_handler = signal.getsignal(signal.SIGTERM)
    try:
        signal.signal(signal.SIGTERM, _terminate)
    except ValueError:  # not the main thread: the caller handles its signals
        previous_handler = None
    lock = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging.mkdir()
        lock = _locked(staging)
        yield staging
        if target.exists():
            target.rename(replaced)
        try:
            staging.rename(target)
        finally:
            if replaced.exists() and not target.exists():
                replaced.rename(target)
        shutil.rmtree(replaced, ignore_errors=True)
    except OSError as error:
        raise _resource_error(error, target) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if lock is not None:
            os.close(lock)
        if previous_handler is not None:
            signal.signal(signal.SIGTERM, previous_handler)


def _take_over(target: Path) -> None:
    """Put back or remove what a process that was killed has left beside `target`.

    Raises:
        UsageError: another process is writing `target`.
    """
    for left in target.parent.glob(f".{glob.escape(target.name)}.*"):
        if left.suffix == ".partial" and left.is_dir():
            lock = _locked(left)
            if lock is None:
                raise UsageError(
                    f"{target}: another export is writing it; wait, or choose another directory"
                )
            shutil.rmtree(left, ignore_errors=True)
            os.close(lock)
    for left in target.parent.glob(f".{glob.escape(target.name)}.*.replaced"):
        if target.exists():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.rename(target)


def _locked(directory: Path) -> int | None:
    """A descriptor that holds the lock on `directory` while it is open; None where another does."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def _terminate(number: int, frame: object) -> None:
    raise SystemExit(128 + number)


def _check_target(target: Path, *, force: bool) -> None:
    if target.is_dir() and not any(target.iterdir()):
        return
    if not (target.exists() or target.is_symlink()):
        return
    if not force:
        raise UsageError(f"{target}: exists and is not empty; choose another or add --force")
    if not (target / MANIFEST).is_file():
        raise UsageError(
            f"{target}: is not an artifact of quarot-onnx, so --force does not replace it; "
            "choose another directory"
        )


def _resource_error(error: OSError, target: Path) -> ResourceError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return ResourceError(
            f"{target}: no space left while writing; free some or choose another disk"
        )
    where = error.filename or target
    return ResourceError(f"{where}: cannot be written ({error.strerror}); choose another directory")


def require_space(target: Path, needed: int) -> None:
    """Refuse to start what will not fit.

    Raises:
        ResourceError: the disk of `target` has fewer than `needed` bytes free.
    """
    existing = next(parent for parent in target.absolute().parents if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise ResourceError(
            f"{target}: needs {needed / 1e9:.2f} GB and {free / 1e9:.2f} GB are free; "
            "free some or choose another disk"
        )


def stored_bytes(model: ir.Model) -> int:
    """The size of the weights as they will be stored."""
    tensors = (value.const_value for value in model.graph.initializers.values())
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def save_model(model: ir.Model, directory: Path, progress: Progress | None = None) -> None:
    """Write ``model.onnx`` and ``model.onnx_data``; each lazy weight is computed as it is written.

    The model keeps its lazy weights, so it can be saved again elsewhere.
    """
    values = [v for v in model.graph.initializers.values() if v.const_value is not None]
    large = [
        v for v in values if v.const_value is not None and v.const_value.nbytes > _INLINE_BYTES
    ]
    total = sum(v.const_value.nbytes for v in large if v.const_value is not None)
    stored: list[tuple[ir.Value, ir.TensorProtocol]] = []
    with (directory / DATA).open("w+b") as file:
        for value in large:
            tensor = value.const_value
            assert tensor is not None
            offset = _align(file, tensor.nbytes)
            _write(file, tensor)
            stored.append((value, _external(value, tensor, offset, directory)))
            if progress is not None:
                progress(file.tell(), total)
        file.flush()
        os.fsync(file.fileno())
    written = {value for value, _ in stored}
    stored += [(value, _computed(value)) for value in values if value not in written]
    kept = [(value, value.const_value) for value, _ in stored]
    try:
        for value, tensor in stored:
            value.const_value = tensor
        proto = ir.to_proto(model)
    finally:
        for value, lazy in kept:
            value.const_value = lazy
    with (directory / MODEL).open("wb") as file:
        file.write(proto.SerializeToString(deterministic=True))
        file.flush()
        os.fsync(file.fileno())


def _computed(value: ir.Value) -> ir.TensorProtocol:
    """A small tensor's numbers, computed here: `ir.to_proto` would wrap their errors."""
    tensor = value.const_value
    assert tensor is not None
    return ir.tensor(tensor.numpy(), dtype=tensor.dtype, name=value.name)


def _align(file: IO[bytes], size: int) -> int:
    alignment = _PAGE if size >= _PAGE_ALIGNED_BYTES else 64
    file.write(b"\0" * (-file.tell() % alignment))
    return file.tell()


def _write(file: IO[bytes], tensor: ir.TensorProtocol) -> None:
    if isinstance(tensor, Weight):
        tensor.tofile(file)
    else:
        file.write(tensor.tobytes())  # numpy's own tofile reports a full disk without an errno


def _external(
    value: ir.Value, tensor: ir.TensorProtocol, offset: int, directory: Path
) -> ir.ExternalTensor:
    return ir.ExternalTensor(
        DATA,
        offset,
        tensor.nbytes,
        tensor.dtype,
        shape=ir.Shape(tensor.shape.numpy()),
        name=value.name or "",
        base_dir=directory,
    )
