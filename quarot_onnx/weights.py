# SPDX-License-Identifier: Apache-2.0
"""Lazy weights: passes compose float64 transforms, the writer computes each value once.

A `Weight` is an ONNX tensor that knows where its numbers come from and which steps were composed on
it. Nothing is read until the tensor is written; then it is computed in float64, in blocks where its
steps allow, and rounded once to its dtype. Threads compute blocks; every block has the same bits on
any number of them.
"""

import io
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any, Protocol, TypeVar

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from quarot_onnx.errors import InputError

Float64 = NDArray[np.float64]
Index = tuple[slice, ...]
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

_BLOCK_ELEMENTS = 1 << 20  # 8 MB of float64, of which each thread holds a few
_THREADS = min(4, os.cpu_count() or 1)


class Source(Protocol):
    """Where a weight's numbers come from: a checkpoint tensor, or another weight."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape in ONNX layout."""

    def read(self, index: Index) -> Float64:
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
    """A weight that is computed when it is written; `dtype` is the float dtype it is stored in.

    Shapes are in ONNX layout: a linear's weight is [in_features, out_features], so axis 0 is its
    input side and axis 1 its output side; an embedding is [vocabulary, hidden_size]; a bias or a
    norm scale is [features].
    """

    def __init__(self, name: str, source: Source, dtype: ir.DataType) -> None:
        self.name = name
        self.shape: ir.ShapeProtocol = ir.Shape(source.shape)
        self.dtype = dtype
        self.doc_string = None
        self.raw = source
        self.metadata_props: dict[str, str] = {}
        self.meta: dict[str, Any] = {}
        self._source = source
        self._steps: list[Step] = []

    @property
    def sizes(self) -> tuple[int, ...]:
        """The shape as plain integers."""
        return tuple(self._source.shape)

    @property
    def size(self) -> int:
        """The number of entries."""
        return int(np.prod(self._source.shape))

    @property
    def nbytes(self) -> int:
        """The number of bytes when stored."""
        return int(self.size * self.dtype.itemsize)

    @property
    def steps(self) -> tuple[Step, ...]:
        """What has been composed so far, first to last."""
        return tuple(self._steps)

    def compose(self, axis: int, apply: Callable[[Float64], Float64]) -> None:
        """Transform the weight along `axis` after everything composed before."""
        self._steps.append(Step(axis, apply))

    def pad_inputs(self, rows: int) -> None:
        """Append zeros to a matrix, up to `rows` rows, on which only steps of axis 1 are composed.

        Those are linear, so that zeros stay zeros.
        """
        assert len(self.sizes) == 2
        assert all(step.axis % 2 == 1 for step in self._steps)
        self._source = _PaddedSource(self._source, rows)
        self.shape, self.raw = ir.Shape(self._source.shape), self._source

    def derive(self, name: str) -> "Weight":
        """A weight of its own that starts as this one is now."""
        copy = Weight(name, self._source, self.dtype)
        copy._steps = list(self._steps)
        return copy

    def free_axis(self) -> int | None:
        """An axis along which blocks are independent; None where every axis is mixed."""
        mixed = {step.axis % len(self.shape) for step in self._steps}
        free = [axis for axis in range(len(self.shape)) if axis not in mixed]
        return free[-1] if free else None

    def blocks(
        self, axis: int, finish: Callable[[Float64], _Result]
    ) -> Iterator[tuple[Index, _Result]]:
        """`finish` of the unrounded values, block by block along `axis`, as (index, result)."""
        read = self.read if axis == self.free_axis() else self.float64().__getitem__
        return _in_order(lambda index: (index, finish(read(index))), self._indices(axis))

    def _indices(self, axis: int | None) -> Iterator[Index]:
        """Blocks that are whole along every axis but `axis`; one block for None."""
        sizes = self.sizes
        if axis is None or self.size == 0:
            yield tuple(slice(0, n) for n in sizes)
            return
        others = self.size // sizes[axis]
        step = max(_BLOCK_ELEMENTS // others // 2 * 2, 2)  # even: 4-bit codes share bytes
        for start in range(0, sizes[axis], step):
            part = slice(start, min(start + step, sizes[axis]))
            yield tuple(part if i == axis else slice(0, n) for i, n in enumerate(sizes))

    def read(self, index: Index) -> Float64:
        """The unrounded values at `index`, which is whole along every axis that a step mixes."""
        values = self._source.read(index)
        for step in self._steps:
            values = step.apply(values)
        return values

    def float64(self) -> Float64:
        """The whole weight, unrounded: one array, in which block after block is transformed."""
        result = np.empty(self._source.shape, dtype=np.float64)
        read: Callable[[Index], Float64] = self._source.read
        by_axis = groupby(self._steps, lambda step: step.axis % result.ndim)
        for mixed, steps in [(axis, list(group)) for axis, group in by_axis] or [(0, [])]:
            transform = partial(_transform, read, steps, result)
            for _ in _in_order(transform, self._indices(1 - mixed if result.ndim == 2 else None)):
                pass
            read = result.__getitem__
        return result

    def _rounded(self, values: Float64) -> NDArray[Any]:
        dtype = self.dtype.numpy()
        with np.errstate(over="ignore"):
            rounded: NDArray[Any] = values.astype(dtype)
        if not np.isfinite(rounded).all():
            is_half = self.dtype == ir.DataType.FLOAT16
            remedy = "export with --dtype float32 or bfloat16" if is_half else "repair the model"
            raise InputError(
                f"{self.name}: max|value| = {np.abs(values).max():.3g} overflows "
                f"{self.dtype.name.lower()}; {remedy}"
            )
        return rounded

    def numpy(self) -> NDArray[Any]:
        """The whole weight in its dtype."""
        result = np.empty(self._source.shape, dtype=self.dtype.numpy())
        self._store(result)
        return result

    def _store(self, target: NDArray[Any]) -> None:
        for index, rounded in self.blocks(self.free_axis() or 0, self._rounded):
            target[index] = rounded

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
        if not isinstance(file, io.BufferedRandom) or self.nbytes < _BLOCK_ELEMENTS:
            file.write(self.tobytes())
            return
        file.flush()
        start = file.tell()
        if hasattr(os, "posix_fallocate"):  # where a full disk fails here, and not in the mapping
            os.posix_fallocate(file.fileno(), start, self.nbytes)
        shape = self.sizes
        self._store(np.memmap(file, self.dtype.numpy(), "r+", start, shape))
        file.seek(start + self.nbytes)


def _transform(
    read: Callable[[Index], Float64], steps: list[Step], target: Float64, index: Index
) -> None:
    values = read(index)
    for step in steps:
        values = step.apply(values)
    target[index] = values


def _in_order(call: Callable[[_Item], _Result], items: Iterable[_Item]) -> Iterator[_Result]:
    """``map(call, items)`` on threads, at most `_THREADS` results ahead of the reader."""
    with ThreadPoolExecutor(_THREADS) as pool:
        pending: deque[Future[_Result]] = deque()
        for item in items:
            pending.append(pool.submit(call, item))
            if len(pending) > _THREADS:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


Quantizer = Callable[[Float64], tuple[NDArray[Any], ...]]
"""Codes and scales of n output channels [in_features, n]: int8 [in_features, n] and float32 [n].

With groups the scales are [groups, n], and int8 zero points [groups, n] follow.
"""


class QuantizedWeight:
    """Codes and scales of a weight, computed together when the codes are written.

    Attributes:
        codes: an INT4 or INT8 tensor [in_features, out_features] with the weight's name.
        scale: a float32 tensor [out_features] named ``<weight>_scale``; written after the codes.
            With groups, [groups, out_features].
        zero: with groups, an INT8 tensor [groups, out_features] named ``<weight>_zero``.
    """

    def __init__(
        self,
        weight: Weight,
        quantizer: Quantizer,
        dtype: ir.DataType,
        groups: int | None = None,
    ) -> None:
        self._weight = weight
        self._quantizer = quantizer
        self._parts: list[NDArray[Any]] = []  # what was computed with the codes
        out_features = weight.sizes[1]
        shape = [out_features] if groups is None else [groups, out_features]
        self.codes = ir.LazyTensor(
            self._compute_codes, dtype=dtype, shape=ir.Shape(weight.sizes), name=weight.name
        )
        self.scale = self._part(0, "scale", ir.DataType.FLOAT, shape)
        self.zero = None if groups is None else self._part(1, "zero", ir.DataType.INT8, shape)

    @property
    def tensors(self) -> tuple[ir.TensorProtocol, ...]:
        """Codes, scales and, where there are any, zero points."""
        return (self.codes, self.scale, *([] if self.zero is None else [self.zero]))

    def _compute_codes(self) -> ir.TensorProtocol:
        out_features = self._weight.sizes[1]
        whole: list[NDArray[Any]] = []
        for (_, columns), block in self._weight.blocks(1, self._quantizer):
            if not whole:
                whole = [np.empty((*x.shape[:-1], out_features), x.dtype) for x in block]
            for target, part in zip(whole, block, strict=True):
                target[..., columns] = part
        codes, *self._parts = whole
        if self.codes.dtype == ir.DataType.INT4:
            return ir.tensor(codes.astype(ml_dtypes.int4), name=self.codes.name)
        return ir.tensor(codes, name=self.codes.name)

    def _part(self, index: int, suffix: str, dtype: ir.DataType, shape: list[int]) -> ir.LazyTensor:
        name = f"{self._weight.name}_{suffix}"

        def take() -> ir.TensorProtocol:
            if not self._parts:
                self._compute_codes()
            return ir.tensor(self._parts[index], name=name)

        return ir.LazyTensor(take, dtype=dtype, shape=ir.Shape(shape), name=name)


class _PaddedSource:
    """Another source's matrix, with rows of zeros behind its own."""

    def __init__(self, source: Source, rows: int) -> None:
        self._source = source
        self._rows = rows

    @property
    def shape(self) -> tuple[int, ...]:
        return (self._rows, self._source.shape[1])

    def read(self, index: Index) -> Float64:
        own, part = self._source.shape[0], range(self._rows)[index[0]]
        values = np.zeros((len(part), *self._source.shape[1:]))[:, index[1]]
        held = max(0, min(part.stop, own) - part.start)
        if held:
            values[:held] = self._source.read((slice(part.start, part.start + held), index[1]))
        return values


class ArraySource:
    """A source that is an array in memory; for tests and for values computed by a pass."""

    def __init__(self, array: NDArray[Any]) -> None:
        self._array = array

    @property
    def shape(self) -> tuple[int, ...]:
        """The array's shape."""
        return self._array.shape

    def read(self, index: Index) -> Float64:
        """A float64 copy of the part at `index`."""
        return self._array[index].astype(np.float64)
