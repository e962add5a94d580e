# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face model directory: configuration and weights, checked before they are trusted.

Weights are read from ``.safetensors`` files, one or many with an index, through memory maps.
Headers are verified here (extents, dtypes, shapes), so that a truncated download or an error page
saved under a model's name is named as such instead of surfacing deep in a run.
"""

import json
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from quarot_onnx.errors import InputError, UnsupportedModelError
from quarot_onnx.weights import Float64

_DTYPES: Mapping[str, type] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
}
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_HEADER_LIMIT = 100_000_000  # the safetensors library's own
_JSON_LIMIT = 50_000_000


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: dtype as safetensors spells it, and the byte range in the file."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        InputError: it is missing, too large, not UTF-8 or not JSON; the message says where.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file; give a complete model directory")
    try:
        if path.stat().st_size > _JSON_LIMIT:
            raise InputError(f"{path}: larger than {_JSON_LIMIT} bytes; this is not such a file")
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check the file") from error
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: not UTF-8 text at byte {error.start}; download it again"
        ) from error
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path}:{error.lineno}:{error.colno}: not JSON ({error.msg}); download it again"
        ) from error
    except (ValueError, RecursionError) as error:  # a number of 5000 digits; brackets in brackets
        raise InputError(f"{path}: not sensible JSON ({error}); download it again") from error


class Checkpoint:
    """A model directory whose configuration and weight headers have been verified.

    Attributes:
        directory: the directory.
        config: the content of ``config.json``.
        files: the weight files.
        tensors: every tensor by the name it has on disk.
    """

    def __init__(self, directory: Path) -> None:
        """Verify `directory`.

        Raises:
            InputError: something is missing or damaged; names the file and the tensor.
            UnsupportedModelError: pickled or already quantized weights, or code that would have to
            run.
        """
        if not directory.is_dir():
            raise InputError(f"{directory}: no such directory; give a Hugging Face model directory")
        self.directory = directory
        self.config = _config(directory)
        self.files = self._files()
        self.tensors: dict[str, TensorEntry] = {}
        for file in self.files:
            for entry in _header(file):
                if entry.name in self.tensors:
                    raise InputError(
                        f"{file}: tensor {entry.name} is also in "
                        f"{self.tensors[entry.name].file.name}; download the model again"
                    )
                self.tensors[entry.name] = entry
        self._check_index()

    def _files(self) -> list[Path]:
        index = self.directory / _INDEX
        if index.exists():
            names = sorted(set(_weight_map(index).values()))
            for name in names:
                if Path(name).name != name:
                    raise InputError(
                        f"{index}: shard {name!r} is not a plain file name; download it again"
                    )
                if not (self.directory / name).exists():
                    held = [t for t, shard in _weight_map(index).items() if shard == name]
                    raise InputError(
                        f"{self.directory / name}: shard is missing ({len(held)} tensors, first "
                        f"{held[0]}); download it"
                    )
            return [self.directory / name for name in names]
        if (self.directory / _SINGLE).exists():
            return [self.directory / _SINGLE]
        pickled = [*self.directory.glob("*.bin"), *self.directory.glob("*.pt")]
        if pickled:
            raise UnsupportedModelError(
                f"{pickled[0]}: pickled weights can run code and are refused; convert them with "
                "model.save_pretrained(directory, safe_serialization=True)"
            )
        raise InputError(f"{self.directory}: no {_SINGLE} and no {_INDEX}; download the weights")

    def _check_index(self) -> None:
        index = self.directory / _INDEX
        if index.exists():
            for tensor, shard in _weight_map(index).items():
                if tensor not in self.tensors or self.tensors[tensor].file.name != shard:
                    raise InputError(
                        f"{index}: tensor {tensor} is not in {shard}; download it again"
                    )

    def tensor(self, name: str) -> TensorEntry:
        """The entry of `name`.

        Raises:
            InputError: the checkpoint has no such tensor.
        """
        if name not in self.tensors:
            raise InputError(
                f"{self.directory}: tensor {name} is missing from the weights; "
                "download the model again or check config.json"
            )
        return self.tensors[name]

    def are_equal(self, first: str, second: str) -> bool:
        """Whether two tensors hold the same bytes; true where one of them is absent."""
        if first not in self.tensors or second not in self.tensors:
            return True
        a, b = self.tensors[first], self.tensors[second]
        check_float(a)
        check_float(b)
        return (a.dtype, a.shape) == (b.dtype, b.shape) and bool(np.array_equal(_map(a), _map(b)))


@dataclass(frozen=True)
class Rows:
    """Rows r of a tensor on disk with ``start <= r % period < stop``.

    A range of rows has the number of rows as its period; the queries of a linear that writes
    query, key and value head by head have a period of ``3 * head_dim``.
    """

    period: int
    start: int
    stop: int

    def count(self, rows: int) -> int:
        """How many of `rows` rows are selected."""
        return rows // self.period * (self.stop - self.start)

    def numbers(self, selected: slice) -> NDArray[np.intp]:
        """The row numbers on disk of some of the selected rows."""
        width = self.stop - self.start
        number = np.arange(selected.start or 0, selected.stop)
        found: NDArray[np.intp] = number // width * self.period + self.start + number % width
        return found


@dataclass(frozen=True)
class CheckpointSource:
    """A checkpoint tensor as a `quarot_onnx.weights.Source`.

    Attributes:
        entry: the tensor on disk.
        transposed: the ONNX layout is the transpose of the one on disk (torch's linear weights).
        rows: which output features it has, rows on disk where it is transposed and else the last
            axis; None is all.
        index: which part of a stack, along its first axis; None where the tensor is no stack.
    """

    entry: TensorEntry
    transposed: bool = False
    rows: Rows | None = None
    index: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape in ONNX layout."""
        shape = list(self.entry.shape if self.index is None else self.entry.shape[1:])
        if self.rows is not None:
            shape[self._axis] = self.rows.count(shape[self._axis])
        return tuple(shape[::-1] if self.transposed else shape)

    @property
    def _axis(self) -> int:
        """The axis of the output features on disk, counted without a stack's own."""
        return 0 if self.transposed else -1

    def read(self, index: tuple[slice, ...]) -> Float64:
        """The numbers at `index` (ONNX layout) as a float64 array that is contiguous.

        Raises:
            InputError: a number is not finite.
        """
        part = index[::-1] if self.transposed else index
        values = self._stored(part).astype(np.float64)
        if not np.isfinite(values).all():
            bad = np.argwhere(~np.isfinite(values))
            first = [int(i) + (s.start or 0) for i, s in zip(bad[0], part, strict=True)]
            if self.rows is not None:
                number = first[self._axis]
                first[self._axis] = int(self.rows.numbers(slice(number, number + 1))[0])
            if self.index is not None:
                first.insert(0, self.index)
            raise InputError(
                f"{self.entry.file}: tensor {self.entry.name} has {len(bad)} values that are not "
                f"finite (first at {first}); download it again or repair the model"
            )
        return np.ascontiguousarray(values.T) if self.transposed else values

    def _stored(self, part: tuple[slice, ...]) -> NDArray[Any]:
        """The numbers at `part` of the selected rows, in the dtype on disk."""
        stored = _map(self.entry)
        if self.index is not None:
            stored = stored[self.index]
        if self.rows is None:
            return stored[part]
        axis = self._axis % len(part)
        features = part[axis]
        size = self.rows.count(stored.shape[axis])
        end = size if features.stop is None else features.stop
        others = tuple(slice(None) if i == axis else s for i, s in enumerate(part))
        return stored[others].take(self.rows.numbers(slice(features.start, end)), axis)


def _map(entry: TensorEntry) -> NDArray[Any]:
    try:
        with entry.file.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise InputError(f"{entry.file}: cannot be read ({error.strerror}); check it") from error
    dtype = np.dtype(_DTYPES[entry.dtype])
    flat: NDArray[Any] = np.frombuffer(
        mapped, dtype=dtype, count=(entry.end - entry.start) // dtype.itemsize, offset=entry.start
    )
    return flat.reshape(entry.shape)


def _config(directory: Path) -> dict[str, Any]:
    path = directory / "config.json"
    config = read_json(path)
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise InputError(f"{path}: has no model_type; give a Hugging Face model directory")
    if "auto_map" in config:
        raise UnsupportedModelError(
            f"{path}: auto_map asks to run the model's own code, which is refused; "
            "choose a model that transformers supports itself"
        )
    if quantization := config.get("quantization_config"):
        is_table = isinstance(quantization, dict)
        method = quantization.get("quant_method") if is_table else quantization
        raise UnsupportedModelError(
            f"{path}: the weights are already quantized ({method}); give the original float model"
        )
    return config


def _weight_map(index: Path) -> Mapping[str, str]:
    content = read_json(index)
    mapping = content.get("weight_map") if isinstance(content, dict) else None
    if (
        not isinstance(mapping, dict)
        or not mapping
        or not all(isinstance(v, str) for v in mapping.values())
    ):
        raise InputError(f"{index}: has no weight_map; download it again")
    return mapping


def _header(file: Path) -> list[TensorEntry]:
    """The tensors of a safetensors file, every extent checked against the file's size."""
    if not file.is_file():
        raise InputError(f"{file}: not a regular file; give a complete model directory")
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            start = stream.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            if not 2 <= length <= min(size - 8, _HEADER_LIMIT):
                raise InputError(f"{file}: {_what_it_is(start, length, size)}")
            header = json.loads(stream.read(length).decode("utf-8"))
        header.pop("__metadata__", None)
        entries = [_entry(file, name, value, 8 + length) for name, value in header.items()]
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror}); check it") from error
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{file}: header is damaged ({error}); download it again") from error
    for entry in entries:
        if entry.end > size:
            raise InputError(
                f"{file}: truncated, tensor {entry.name} ends at byte {entry.end} of {size}; "
                "download it again"
            )
    return entries


def _what_it_is(start: bytes, length: int, size: int) -> str:
    """What a file with an impossible header length looks like, and what to do."""
    if start == b"version ":
        return "a git-lfs pointer, not the weights; run `git lfs pull`"
    if start.lstrip()[:1] in (b"<", b"{"):
        return "not safetensors, looks like a web page or JSON; download it again"
    return (
        f"header of {length} bytes in a file of {size}, which is truncated or not safetensors; "
        "download it again"
    )


def _entry(file: Path, name: str, value: dict[str, Any], base: int) -> TensorEntry:
    first, last = value["data_offsets"]
    shape = tuple(value["shape"])
    if any(type(n) is not int for n in (first, last, *shape)):
        raise TypeError(f"tensor {name} has offsets or sizes that are no whole numbers")
    dtype = value["dtype"]
    if dtype in _DTYPES:
        expected = int(np.prod(shape, dtype=object)) * np.dtype(_DTYPES[dtype]).itemsize
        if min((first, *shape)) < 0 or last - first != expected:
            raise InputError(
                f"{file}: tensor {name} has {last - first} bytes where shape {list(shape)} of "
                f"{dtype} needs {expected}; download it again"
            )
    return TensorEntry(file, name, dtype, shape, base + first, base + last)


def read_tensors(path: Path) -> dict[str, Float64]:
    """Every tensor of the safetensors file `path`, by name.

    Raises:
        InputError: the file is damaged, or a number is not finite.
        UnsupportedModelError: a tensor is not float.
    """
    tensors: dict[str, Float64] = {}
    for entry in _header(path):
        check_float(entry)
        tensors[entry.name] = CheckpointSource(entry).read((slice(None),) * len(entry.shape))
    return tensors


def check_float(entry: TensorEntry) -> None:
    """Refuse a tensor that is not float.

    Raises:
        UnsupportedModelError: its dtype is not one of F64, F32, F16, BF16.
    """
    if entry.dtype not in _DTYPES:
        raise UnsupportedModelError(
            f"{entry.file}: tensor {entry.name} has dtype {entry.dtype}; "
            f"supported are {', '.join(_DTYPES)}"
        )
