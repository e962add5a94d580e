# SPDX-License-Identifier: Apache-2.0
"""Lazy weights: composed steps, blocks, streaming, and one rounding."""

import io
import resource
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from quarot_onnx import weights
from quarot_onnx.errors import InputError
from quarot_onnx.quantizers.rtn import rtn
from quarot_onnx.weights import ArraySource, QuantizedWeight, Weight

Float64 = NDArray[np.float64]

SHAPES = st.one_of(st.tuples(st.integers(1, 40)), st.tuples(st.integers(1, 30), st.integers(1, 30)))
DTYPES = st.sampled_from([ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16])


class CountingSource(ArraySource):
    """An array that counts how often each entry is read."""

    def __init__(self, array: NDArray[Any]) -> None:
        super().__init__(array)
        self.reads = np.zeros(array.shape, int)

    def read(self, index: tuple[slice, ...]) -> Float64:
        self.reads[index] += 1
        return super().read(index)


@pytest.fixture
def _tiny_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of two rows or columns, and streaming for every weight."""
    monkeypatch.setattr(weights, "_BLOCK_ELEMENTS", 16)


def _weight(
    shape: tuple[int, ...], dtype: ir.DataType = ir.DataType.FLOAT, axes: tuple[int, ...] = ()
) -> Weight:
    array = np.random.default_rng(len(shape)).normal(size=shape)
    weight = Weight("w", CountingSource(array), dtype)
    for axis in axes:
        weight.compose(axis, lambda w, axis=axis: np.cumsum(w, axis=axis))
    return weight


def _expected(weight: Weight, axes: tuple[int, ...]) -> Float64:
    values = weight.raw.read(tuple(slice(None) for _ in weight.shape))
    for axis in axes:
        values = np.cumsum(values, axis=axis)
    return np.asarray(values)


@given(shape=SHAPES, axes=st.lists(st.sampled_from([0, -1]), max_size=3).map(tuple))
@settings(max_examples=60, deadline=None)
def test_blocks_make_up_the_whole(shape, axes) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights, "_BLOCK_ELEMENTS", 16)
        weight = _weight(shape, axes=axes)
        np.testing.assert_array_equal(weight.float64(), _expected(weight, axes))


@given(shape=SHAPES, axes=st.lists(st.sampled_from([0, -1]), max_size=3).map(tuple), dtype=DTYPES)
@settings(max_examples=100, deadline=None)
def test_streaming_to_a_file_writes_the_same_bytes(tmp_path_factory, shape, axes, dtype) -> None:
    path = tmp_path_factory.mktemp("stream") / "data"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights, "_BLOCK_ELEMENTS", 16)
        weight = _weight(shape, dtype, axes)
        with path.open("w+b") as file:
            file.write(b"before")
            weight.tofile(file)
            file.write(b"after")
    assert path.read_bytes() == b"before" + weight.tobytes() + b"after"
    expected = _expected(weight, axes).astype(dtype.numpy())
    assert weight.tobytes() == expected.tobytes()
    assert weight.nbytes == len(weight.tobytes())


@pytest.mark.parametrize(("axis", "parts"), [(0, "columns"), (1, "rows")])
@pytest.mark.usefixtures("_tiny_blocks")
def test_a_step_sees_blocks_that_are_whole_along_its_axis(tmp_path: Path, axis, parts) -> None:
    seen: list[tuple[int, ...]] = []
    weight = _weight((6, 8))
    weight.compose(axis, lambda w: seen.append(w.shape) or w)
    with (tmp_path / "data").open("w+b") as file:
        weight.tofile(file)
    assert len(seen) > 1
    assert {shape[axis] for shape in seen} == {weight.shape[axis]}
    assert sum(shape[1 - axis] for shape in seen) == weight.shape[1 - axis]


def test_steps_apply_in_the_order_in_which_they_were_composed() -> None:
    weight = _weight((3, 2))
    weight.compose(0, lambda w: w + 1)
    weight.compose(1, lambda w: w * 2)
    np.testing.assert_array_equal(weight.float64(), (_expected(weight, ()) + 1) * 2)
    assert [step.axis for step in weight.steps] == [0, 1]


def test_steps_see_float64_and_rounding_happens_once() -> None:
    seen: list[np.dtype[Any]] = []
    weight = Weight("w", ArraySource(np.full(3, 1, np.float16)), ir.DataType.FLOAT16)

    def third(values: Float64) -> Float64:
        seen.append(values.dtype)
        return values / 3

    weight.compose(0, third)
    weight.compose(0, lambda w: w * 3)
    assert weight.numpy().tolist() == [1, 1, 1]
    assert seen == [np.float64]


@pytest.mark.parametrize("axes", [(), (0,), (1,), (0, 1)])
@pytest.mark.usefixtures("_tiny_blocks")
def test_writing_reads_each_number_once(tmp_path: Path, axes) -> None:
    weight = _weight((7, 9), axes=axes)
    with (tmp_path / "data").open("w+b") as file:
        weight.tofile(file)
    assert (weight.raw.reads == 1).all()


def test_nothing_is_read_before_it_is_written() -> None:
    weight = _weight((7, 9), axes=(0,))
    assert (weight.shape, weight.size, weight.nbytes) == (ir.Shape((7, 9)), 63, 252)
    QuantizedWeight(weight, rtn, ir.DataType.INT8)
    weight.derive("other")
    assert weight.raw.reads.max() == 0


def test_a_derived_weight_starts_as_the_original_is_and_goes_its_own_way() -> None:
    weight = _weight((4, 3), axes=(0,))
    copy = weight.derive("copy")
    weight.compose(1, lambda w: w * 0)
    np.testing.assert_array_equal(copy.float64(), _expected(copy, (0,)))
    assert copy.name == "copy"


@pytest.mark.parametrize(
    ("value", "dtype", "remedy"),
    [
        (70_000.0, ir.DataType.FLOAT16, "export with --dtype float32 or bfloat16"),
        (1e39, ir.DataType.FLOAT, "repair the model"),
        (1e39, ir.DataType.BFLOAT16, "repair the model"),
    ],
)
def test_refuses_numbers_that_overflow_the_dtype(value, dtype, remedy) -> None:
    weight = Weight("model.norm.weight", ArraySource(np.array([1.0, -value])), dtype)
    with pytest.raises(InputError) as caught:
        weight.tobytes()
    assert str(caught.value) == (
        f"model.norm.weight: max|value| = {value:.3g} overflows {dtype.name.lower()}; {remedy}"
    )


def test_streaming_holds_a_block_in_memory_and_not_the_weight(tmp_path: Path) -> None:
    class Zeros:
        shape = (1 << 14, 1 << 11)

        def read(self, index: tuple[slice, ...]) -> Float64:
            return np.zeros([s.stop - s.start for s in index])

    weight = Weight("w", Zeros(), ir.DataType.FLOAT)
    weight.compose(1, lambda w: w + 1)
    tracemalloc.start()
    with (tmp_path / "data").open("w+b") as file:
        weight.tofile(file)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (tmp_path / "data").stat().st_size == weight.nbytes == 1 << 27
    assert peak < weight.nbytes


@pytest.mark.usefixtures("_tiny_blocks")
def test_a_full_disk_is_noticed_before_the_numbers_are_computed(tmp_path: Path) -> None:
    weight = _weight((6, 5))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with (tmp_path / "data").open("w+b") as file:
        resource.setrlimit(resource.RLIMIT_FSIZE, (60, limits[1]))
        try:
            with pytest.raises(OSError, match="File too large"):
                weight.tofile(file)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert weight.raw.reads.max() == 0


def test_the_number_of_threads_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    written = []
    for threads in (1, 3):
        monkeypatch.setattr(weights, "_THREADS", threads)
        monkeypatch.setattr(weights, "_BLOCK_ELEMENTS", 64)
        weight = _weight((40, 24))
        rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(40, 40)))[0]
        weight.compose(0, rotation.__matmul__)
        written.append(weight.tobytes())
    assert written[0] == written[1]


def test_a_stream_that_is_no_file_gets_the_bytes_too() -> None:
    weight, stream = _weight((5, 3)), io.BytesIO()
    weight.tofile(stream)
    assert stream.getvalue() == weight.tobytes()


@pytest.mark.parametrize("axes", [(), (0,), (1,), (0, 1)])
@pytest.mark.parametrize("shape", [(6, 8), (5, 7), (1, 1), (3, 1)])
@pytest.mark.usefixtures("_tiny_blocks")
def test_codes_and_scales_are_those_of_the_finished_weight(shape, axes) -> None:
    weight = _weight(shape, axes=axes)
    quantized = QuantizedWeight(weight, lambda w: rtn(w, bits=4), ir.DataType.INT4)
    codes, scale = rtn(_expected(weight, axes), bits=4)
    np.testing.assert_array_equal(quantized.codes.numpy().astype(np.int8), codes)
    np.testing.assert_array_equal(quantized.scale.numpy(), scale)
    assert quantized.codes.dtype == ir.DataType.INT4
    assert (quantized.codes.name, quantized.scale.name) == ("w", "w_scale")
    assert quantized.codes.nbytes == len(quantized.codes.tobytes()) == (codes.size + 1) // 2


@pytest.mark.parametrize("first", ["codes", "scale"])
def test_codes_and_scales_agree_whichever_is_written_first(first) -> None:
    quantized = QuantizedWeight(_weight((6, 4)), lambda w: rtn(w, bits=8), ir.DataType.INT8)
    getattr(quantized, first).tobytes()
    error = quantized.codes.numpy() * quantized.scale.numpy() - _expected(_weight((6, 4)), ())
    assert np.abs(error).max() <= quantized.scale.numpy().max()


def test_the_scales_do_not_read_the_weight_again() -> None:
    weight = _weight((6, 4))
    quantized = QuantizedWeight(weight, lambda w: rtn(w, bits=8), ir.DataType.INT8)
    quantized.codes.tobytes()
    quantized.scale.tobytes()
    assert (weight.raw.reads == 1).all()


def test_an_array_source_gives_copies() -> None:
    source = ArraySource(np.zeros((2, 2)))
    source.read((slice(None), slice(None)))[:] = 1
    assert (source.read((slice(None), slice(None))) == 0).all()
