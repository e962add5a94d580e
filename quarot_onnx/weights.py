# SPDX-License-Identifier: Apache-2.0
"""Lazy weights: passes compose float64 transforms, the writer computes each value once.

A `Weight` is an ONNX tensor that knows where its numbers come from and which steps were composed on
it. Nothing is read until the tensor is written; then it is computed in float64, in blocks where its
steps allow, and rounded once to its dtype.
"""

import io
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from quarot_onnx.errors import InputError

Float64 = NDArray[np.float64]

_BLOCK_ELEMENTS = 1 << 22  # 32 MB of float64


class Source(Protocol):
    """Where a weight's numbers come from: a checkpoint tensor, or another weight."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape in ONNX layout."""

    def read(self, index: tuple[slice, ...]) -> Float64:
        """The numbers at `index`, one slice per axis, as float64.

        Raises:
            InputError: the file is damaged or holds a number that is not finite.
        """


@dataclass(frozen=True)
class Step:
    """One transform of a weight.

    Attributes:
        axis: the only axis along which `apply` mixes or scales entries.
        apply: maps an array that is whole along `axis` to one of the same shape.
    """

    axis: int
    apply: Callable[[Float64], Float64]


class Weight(ir.TensorProtocol):
    """A weight that is computed when it is written.

    Shapes are in ONNX layout: a linear's weight is [in_features, out_features], so axis 0 is its
    input side and axis 1 its output side; an embedding is [vocabulary, hidden_size]; a bias or a
    norm scale is [features].
    """

    def __init__(self, name: str, source: Source, dtype: ir.DataType) -> None:
        self.name = name
        self.doc_string = None
        self.raw = source
        self.metadata_props: dict[str, str] = {}
        self.meta: dict[str, Any] = {}
        self._source = source
        self._dtype = dtype
        self._steps: list[Step] = []

    @property
    def shape(self) -> ir.Shape:
        """The shape, known without reading."""
        return ir.Shape(self._source.shape)

    @property
    def sizes(self) -> tuple[int, ...]:
        """The shape as plain integers."""
        return tuple(self._source.shape)

    @property
    def dtype(self) -> ir.DataType:
        """The float dtype in which it will be stored."""
        return self._dtype

    @property
    def size(self) -> int:
        """The number of entries."""
        return int(np.prod(self._source.shape))

    @property
    def nbytes(self) -> int:
        """The number of bytes when stored."""
        return int(self.size * self._dtype.itemsize)

    @property
    def steps(self) -> tuple[Step, ...]:
        """What has been composed so far, first to last."""
        return tuple(self._steps)

    def compose(self, axis: int, apply: Callable[[Float64], Float64]) -> None:
        """Transform the weight along `axis` after everything composed before."""
        self._steps.append(Step(axis, apply))

    def derive(self, name: str) -> "Weight":
        """A weight of its own that starts as this one is now."""
        copy = Weight(name, self._source, self._dtype)
        copy._steps = list(self._steps)
        return copy

    def free_axis(self) -> int | None:
        """An axis along which blocks are independent; None where every axis is mixed."""
        mixed = {step.axis % len(self.shape) for step in self._steps}
        free = [axis for axis in range(len(self.shape)) if axis not in mixed]
        return free[-1] if free else None

    def blocks(self) -> Iterator[tuple[tuple[slice, ...], Float64]]:
        """The finished float64 values, block by block, as (index, values)."""
        sizes = [int(n) for n in self._source.shape]
        index = [slice(0, n) for n in sizes]
        axis = self.free_axis()
        if axis is None:
            yield tuple(index), self.read(tuple(index))
            return
        others = int(np.prod(sizes)) // max(sizes[axis], 1)
        step = max(_BLOCK_ELEMENTS // max(others, 1) // 2 * 2, 2)  # even: 4-bit codes share bytes
        for start in range(0, sizes[axis], step):
            index[axis] = slice(start, min(start + step, sizes[axis]))
            yield tuple(index), self.read(tuple(index))

    def read(self, index: tuple[slice, ...]) -> Float64:
        """The unrounded values at `index`, which is whole along every axis that a step mixes."""
        values = self._source.read(index)
        for step in self._steps:
            values = step.apply(values)
        return values

    def float64(self) -> Float64:
        """The whole weight, unrounded."""
        result = np.empty(self._source.shape, dtype=np.float64)
        for index, values in self.blocks():
            result[index] = values
        return result

    def _rounded(self, values: Float64) -> NDArray[Any]:
        dtype = self._dtype.numpy()
        with np.errstate(over="ignore"):
            rounded: NDArray[Any] = values.astype(dtype)
        if not np.isfinite(rounded).all():
            is_half = self._dtype == ir.DataType.FLOAT16
            remedy = "export with --dtype float32 or bfloat16" if is_half else "repair the model"
            raise InputError(
                f"{self.name}: max|value| = {np.abs(values).max():.3g} overflows "
                f"{self._dtype.name.lower()}; {remedy}"
            )
        return rounded

    def numpy(self) -> NDArray[Any]:
        """The whole weight in its dtype."""
        result = np.empty(self._source.shape, dtype=self._dtype.numpy())
        for index, values in self.blocks():
            result[index] = self._rounded(values)
        return result

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return self.numpy() if dtype is None else self.numpy().astype(dtype)

    def __dlpack__(self, *, stream: Any = None) -> Any:
        return self.numpy().__dlpack__(stream=stream)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.numpy().__dlpack_device__()

    def tobytes(self) -> bytes:
        """The bytes that `tofile` writes."""
        return self.numpy().tobytes()

    def tofile(self, file: Any) -> None:
        """Write the bytes at the file's position without holding the whole weight in memory."""
        if not isinstance(file, io.BufferedWriter) or self.nbytes < _BLOCK_ELEMENTS:
            file.write(self.tobytes())
            return
        file.flush()
        start = file.tell()
        rows, *rest = (int(n) for n in self._source.shape)
        item = int(self._dtype.itemsize)
        row_bytes = int(np.prod(rest)) * item
        os.truncate(file.fileno(), start + self.nbytes)
        for index, values in self.blocks():
            rounded = self._rounded(values)
            first, offset = index[0].start, (index[1].start if rest else 0) * item
            if len(rounded) == rows and rest and rounded.shape[1] != rest[0]:
                for row in range(rows):  # a column block: one strided piece of each row
                    piece = np.ascontiguousarray(rounded[row])
                    _write_at(file.fileno(), piece.tobytes(), start + row * row_bytes + offset)
            else:
                _write_at(file.fileno(), rounded.tobytes(), start + first * row_bytes)
        file.seek(start + self.nbytes)


def _write_at(descriptor: int, content: bytes, position: int) -> None:
    """Write all of `content`: one call writes 2 GB at most, and less where the disk is nearly full."""
    remaining = memoryview(content)
    while remaining:
        written = os.pwrite(descriptor, remaining, position)
        remaining = remaining[written:]
        position += written


Quantizer = Callable[[Float64], tuple[NDArray[np.int8], NDArray[np.float32]]]
"""Codes [in_features, n] and scales [n] of n output channels [in_features, n]."""


class QuantizedWeight:
    """Codes and scales of a weight, computed together when the codes are written.

    Attributes:
        codes: an INT4 or INT8 tensor [in_features, out_features] with the weight's name.
        scale: a float32 tensor [out_features] named ``<weight>_scale``; written after the codes.
    """

    def __init__(self, weight: Weight, quantizer: Quantizer, dtype: ir.DataType) -> None:
        self._weight = weight
        self._quantizer = quantizer
        self._scale: NDArray[np.float32] | None = None
        self.codes = ir.LazyTensor(
            self._compute_codes, dtype=dtype, shape=weight.shape, name=weight.name
        )
        self.scale = ir.LazyTensor(
            self._take_scale,
            dtype=ir.DataType.FLOAT,
            shape=ir.Shape([weight.shape[1]]),
            name=f"{weight.name}_scale",
        )

    def _compute_codes(self) -> ir.TensorProtocol:
        in_features, out_features = (int(n) for n in self._weight.shape)
        codes = np.empty((in_features, out_features), dtype=np.int8)
        scale = np.empty(out_features, dtype=np.float32)
        blocks = (
            self._weight.blocks()
            if self._weight.free_axis() == 1
            else [((slice(None), slice(None)), self._weight.float64())]
        )
        for (_, columns), values in blocks:
            codes[:, columns], scale[columns] = self._quantizer(values)
        self._scale = scale
        if self.codes.dtype == ir.DataType.INT4:
            return ir.tensor(codes.astype(ml_dtypes.int4), name=self.codes.name)
        return ir.tensor(codes, name=self.codes.name)

    def _take_scale(self) -> ir.TensorProtocol:
        if self._scale is None:
            self._compute_codes()
        return ir.tensor(self._scale, name=self.scale.name)


class ArraySource:
    """A source that is an array in memory; for tests and for values computed by a pass."""

    def __init__(self, array: NDArray[Any]) -> None:
        self._array = array

    @property
    def shape(self) -> tuple[int, ...]:
        """The array's shape."""
        return self._array.shape

    def read(self, index: tuple[slice, ...]) -> Float64:
        """A float64 copy of the part at `index`."""
        return self._array[index].astype(np.float64)
