# SPDX-License-Identifier: Apache-2.0
"""What is finished of a calibrated run: records and arrays on disk, so that it can go on.

A part of it, such as ``layers.3``, is finished when its record is in place, which is renamed there
last. Arrays are memory-mapped: codes of a large model never lie in memory all at once.
"""

import json
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quarot_onnx.errors import ResourceError, UsageError

_KEY = "run.json"


class Journal:
    """A directory of what is finished.

    Without a directory it is a temporary one, which lives as long as this object.
    """

    def __init__(self, directory: Path | None = None, run: dict[str, Any] | None = None) -> None:
        """Open or begin the journal of `run`, which says what would make its numbers differ.

        Raises:
            UsageError: the directory holds the journal of another run.
            ResourceError: it cannot be written.
        """
        if directory is None:
            self.directory = Path(tempfile.mkdtemp(prefix="quarot-onnx-"))
            weakref.finalize(self, shutil.rmtree, self.directory, ignore_errors=True)
        else:
            self.directory = directory
            self._claim(run or {})

    def _claim(self, run: dict[str, Any]) -> None:
        path = self.directory / _KEY
        text = json.dumps(run, indent=2, sort_keys=True)
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            held = path.read_text(encoding="utf-8") if path.exists() else None
            if held is None:
                _replace(path, text)
        except (OSError, UnicodeDecodeError) as error:
            raise ResourceError(
                f"{self.directory}: cannot be used for --resume ({error}); remove it"
            ) from error
        if held is not None and held != text:
            raise UsageError(
                f"{self.directory}: holds what another run finished (other model, recipe, text or "
                "version); remove it, or export without --resume"
            )

    def record(self, part: str) -> dict[str, Any] | None:
        """What `finish` was given for `part`; None where it is not finished."""
        path = self._record(part)
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None

    def keep(self, name: str, array: NDArray[Any]) -> None:
        """Store `array` under `name`.

        Raises:
            ResourceError: the disk is full.
        """
        path = self._array(name)
        with _written(path), path.open("wb") as file:
            np.save(file, array)

    def array(self, name: str) -> NDArray[Any]:
        """What was kept under `name`, memory-mapped."""
        mapped: NDArray[Any] = np.load(self._array(name), mmap_mode="r")
        return mapped

    def finish(self, part: str, record: dict[str, Any]) -> None:
        """Everything of `part` has been kept; `record` is plain data, such as what the report says.

        Raises:
            ResourceError: the disk is full.
        """
        path = self._record(part)
        with _written(path):
            _replace(path, json.dumps(record))

    def _record(self, part: str) -> Path:
        return self.directory / f"{part.replace('/', '.')}.json"

    def _array(self, name: str) -> Path:
        return self.directory / f"{name.replace('/', '.')}.npy"


@contextmanager
def _written(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ResourceError(
            f"{path}: cannot be written ({error.strerror}); free some space"
        ) from error


def _replace(path: Path, text: str) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
