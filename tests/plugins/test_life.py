# SPDX-License-Identifier: Apache-2.0
"""Creation, attributes, types, shapes, formats and serialization of every plugin; fuzzed input.

The life that computes something is in ``test_against_operators.py``.
"""

import ctypes
from ctypes import POINTER, c_void_p, cast

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quarot_onnx.plugins.layouts import Layout
from tests.plugins import harness
from tests.plugins.harness import BF16, BOOL, FLOAT, HALF, INT8, INT32, Host

FRAGMENTS = int(Layout.WEIGHTS_FRAGMENTS_V1)
PACKED, SPLIT = int(Layout.ACTIVATIONS_PACKED_V1), int(Layout.ACTIVATIONS_SPLIT_V1)

SMALLEST = {
    "Hadamard": {"factors": [128]},
    "HadamardHeads": {"factors": [8]},
    "QuantizeInt4": {},
    "Int4Gemm": {"dtype": 10, "weight_layout": FRAGMENTS},
    "KvAppend": {},
    "KvAttention": {"scale": 0.125},
}
"""The required attributes of every plugin."""

SHAPES = {
    "Hadamard": ([[2, 3, 256]], [HALF]),
    "HadamardHeads": ([[2, 3, 512]], [HALF]),
    "QuantizeInt4": ([[2, 3, 256]], [HALF]),
    "Int4Gemm": ([[2, 3, 128], [2, 3, 1], [2, 4, 4, 32, 16], [72]], [INT8, FLOAT, INT8, FLOAT]),
    "KvAppend": (
        [[2, 3, 5, 64], [2, 3, 16, 32], [2, 3, 16, 1], [2, 3, 16, 1], [2]],
        [HALF, INT8, FLOAT, FLOAT, INT32],
    ),
    "KvAttention": (
        [[2, 4, 5, 64], *[[2, 2, 16, 32], [2, 2, 16, 1], [2, 2, 16, 1]] * 2, [2]],
        [HALF, *[INT8, FLOAT, FLOAT] * 2, INT32],
    ),
}
"""Shapes and types of inputs that fit `SMALLEST`."""

every = pytest.mark.parametrize("name", SMALLEST)


def test_there_is_one_creator_for_every_plugin(host: Host) -> None:
    assert set(host.creators) == set(SMALLEST)
    for creator in host.creators.values():
        assert host.abi.creator_version(creator) == b"1"
        assert host.abi.creator_namespace(creator) == b"quarot"


@every
def test_a_plugin_knows_its_name_and_only_the_cache_is_aliased(host: Host, name) -> None:
    plugin = host.create(name, SMALLEST[name])
    assert plugin is not None
    assert host.abi.plugin_name(plugin.handle) == name.encode()
    assert host.abi.plugin_version(plugin.handle) == b"1"
    assert host.abi.plugin_namespace(plugin.handle) == b"quarot"
    assert host.abi.plugin_tactics(plugin.handle) == 0
    aliases = [host.abi.plugin_aliased_input(plugin.handle, i) for i in range(3)]
    assert aliases == ([1, 2, 3] if name == "KvAppend" else [-1, -1, -1])
    # TensorRT before 10.3 knows no version 2.
    assert host.abi.plugin_build_version(plugin.handle) == (2 if name == "KvAppend" else 1)


@pytest.mark.parametrize(
    ("name", "attributes", "message"),
    [
        ("Hadamard", {}, "Hadamard (layer): factors is missing; allowed: 1 to 64 orders"),
        ("Hadamard", {"factors": [4, 0]}, "factors = 0; allowed"),
        ("Hadamard", {"factors": [4, 44, 6]}, "factors=[4, 44, 6]: the Hadamard plan is outside"),
        ("Hadamard", {"factors": np.ones(65, np.int32)}, "factors = 65 values; allowed"),
        ("Hadamard", {"factors": 0.5}, "factors = a field of type 1; allowed"),
        ("Hadamard", {"factors": [4], "k": 3}, '"k" is no attribute; allowed: factors'),
        ("QuantizeInt4", {"bits": 8}, "bits = 8; allowed: 4"),
        ("QuantizeInt4", {"clip_ratio": 0.0}, "clip_ratio = 0; allowed: above 0, at most 1"),
        ("QuantizeInt4", {"clip_ratio": 1.5}, "clip_ratio = 1.5; allowed: above 0, at most 1"),
        ("QuantizeInt4", {"clip_ratio": float("nan")}, "clip_ratio = nan; allowed"),
        ("QuantizeInt4", {"clip_ratio": 1}, "clip_ratio = a field of type 5; allowed"),
        ("QuantizeInt4", {"heads": 2}, "heads = 2; allowed: 0, 1"),
        ("QuantizeInt4", {"activation_layout": 7}, f"allowed: {PACKED}, {SPLIT}"),
        ("Int4Gemm", {"dtype": 10}, f"weight_layout is missing; allowed: {FRAGMENTS}"),
        ("Int4Gemm", {"dtype": 1, "weight_layout": FRAGMENTS}, "dtype = 1; allowed: 10, 16"),
        (
            "Int4Gemm",
            {"dtype": 10, "weight_layout": int(Layout.WEIGHTS_PACKED_V1)},
            f"weight_layout = {int(Layout.WEIGHTS_PACKED_V1)}; allowed: {FRAGMENTS}",
        ),
        ("Int4Gemm", {"dtype": np.int64([2**40])}, f"dtype = {2**40}; allowed"),
        ("KvAppend", {"bits": 8}, "bits = 8; allowed: 4"),
        ("KvAppend", {"rotate": -1}, "rotate = -1; allowed: 0, 1"),
        ("KvAttention", {}, "scale is missing; allowed: finite, above 0"),
        ("KvAttention", {"scale": float("inf")}, "scale = inf; allowed: finite, above 0"),
    ],
    ids=str,
)
def test_a_wrong_attribute_is_refused_with_its_name_and_allowed_values(
    host: Host, name, attributes, message
) -> None:
    host.log()
    assert host.create(name, attributes) is None
    assert message in host.log()


def test_an_attribute_given_twice_is_refused(host: Host) -> None:
    collection, held = harness.fields({"bits": 4, "clip_ratio": 0.9})
    collection.fields[1] = collection.fields[0]
    host.log()
    assert host.create_from("QuantizeInt4", collection, held) is None
    assert "bits is given twice" in host.log()


def test_python_s_wide_numbers_are_taken_too(host: Host) -> None:
    wide = {"bits": np.int64([4]), "clip_ratio": np.float64([0.9])}
    made, narrow = host.create("QuantizeInt4", wide), host.create("QuantizeInt4", {})
    assert made is not None
    assert narrow is not None
    assert harness.contents(made.fields()) == harness.contents(narrow.fields())


@every
def test_serialized_fields_make_the_same_plugin(host: Host, name) -> None:
    plugin = host.create(name, SMALLEST[name])
    assert plugin is not None
    again = host.create_from(name, plugin.fields())
    assert again is not None
    assert harness.contents(again.fields()) == harness.contents(plugin.fields())
    for copy in (again, plugin.clone(), plugin.attach()):
        assert timing_cache_id(host, copy) == timing_cache_id(host, plugin)


def timing_cache_id(host: Host, plugin: harness.Plugin) -> str:
    return host.abi.plugin_timing_cache_id(plugin.handle).decode()


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("Hadamard", {"factors": [64, 2, 2]}),
        ("QuantizeInt4", {"clip_ratio": 0.8}),
        ("QuantizeInt4", {"activation_layout": SPLIT}),
        ("Int4Gemm", {"dtype": 16, "weight_layout": FRAGMENTS}),
        ("KvAttention", {"scale": 0.12500001}),
    ],
    ids=str,
)
def test_other_attributes_have_another_timing_cache_id(host: Host, name, changed) -> None:
    one, other = host.create(name, SMALLEST[name]), host.create(name, changed)
    assert one is not None
    assert other is not None
    assert timing_cache_id(host, one) != timing_cache_id(host, other)
    assert timing_cache_id(host, one).startswith(f"quarot.{name}.1.")


@pytest.mark.parametrize(
    ("name", "attributes", "inputs", "outputs", "constant"),
    [
        ("Hadamard", {}, [[-2, 3, 256]], [[2, 3, 256]], [[0, 1, 1]]),
        ("QuantizeInt4", {}, [[-2, 3, 256]], [[2, 3, 128], [2, 3, 1]], [[0, 1, 1], [0, 1, 1]]),
        (
            "QuantizeInt4",
            {"activation_layout": SPLIT},
            [[-2, 7, 320]],
            [[3, 16, 128], [2, 7, 1]],
            [[1, 0, 1], [0, 1, 1]],
        ),
        (
            "Int4Gemm",
            {},
            [[-2, 3, 128], [-2, 3, 1], [2, 4, 4, 32, 16], [72]],
            [[2, 3, 72]],
            [[0, 1, 1]],
        ),
        (
            "KvAttention",
            {},
            [[-2, 4, -5, 64], *[[-2, 2, 16, 32], [-2, 2, 16, 1], [-2, 2, 16, 1]] * 2, [-2]],
            [[2, 5, 256]],
            [[0, 0, 1]],
        ),
    ],
    ids=str,
)
def test_output_shapes_are_symbolic(
    host: Host, name, attributes, inputs, outputs, constant
) -> None:
    plugin = host.create(name, {**SMALLEST[name], **attributes})
    assert plugin is not None
    assert plugin.output_shapes(inputs) == (outputs, [[bool(c) for c in row] for row in constant])


@every
def test_types_and_formats_are_those_of_the_table(host: Host, name) -> None:
    plugin = host.create(name, SMALLEST[name])
    assert plugin is not None
    shapes, types = SHAPES[name]
    made = plugin.output_types(types)
    sizes = plugin.output_shapes(shapes)
    assert made is not None
    assert sizes is not None
    tensors = list(zip([*shapes, *sizes[0]], [*types, *made], strict=True))
    for position, (shape, right) in enumerate(tensors):
        # FP8 (6), UINT8 (5), INT64 (8), INT4 (9) are never right
        for code in (FLOAT, HALF, INT8, INT32, BOOL, 5, 6, BF16, 8, 9):
            described = [*tensors]
            described[position] = (shape, code)
            alternative = position == 0 and right == HALF and code == BF16
            assert plugin.supports(position, described, len(types)) == (
                code == right or alternative
            ), (position, code)
        dynamic = plugin.dynamic_tensors(tensors)
        dynamic[position].desc.format = 1
        assert not host.abi.plugin_supports(plugin.handle, position, dynamic, len(types), len(made))


def test_float32_is_refused_by_name(host: Host) -> None:
    plugin = host.create("QuantizeInt4", {})
    assert plugin is not None
    host.log()
    assert plugin.output_types([FLOAT]) is None
    assert "x has data type 0; allowed: HALF, BF16, one of them in all inputs" in host.log()


@pytest.mark.parametrize(
    ("name", "attributes", "position", "shape", "message"),
    [
        ("Hadamard", {}, 0, [2, 3, 192], "outside the table of supported shapes"),
        ("HadamardHeads", {"factors": [12]}, 0, [2, 768], "give signs exactly if there are any"),
        ("HadamardHeads", {}, 0, [2, 3, 100], "no multiple of 8 heads"),
        ("QuantizeInt4", {}, 0, [2, 128 * 257], "outside the table of supported shapes"),
        ("QuantizeInt4", {"factors": [4]}, 0, [2, 128 * 513], "outside the table of supported"),
        ("Int4Gemm", {}, 0, [2, 3, 256], "w is [2, 4, 4, 32, 16]; it has to be [2, 8, 4, 32, 16]"),
        ("Int4Gemm", {}, 1, [2, 3, 2], "scale is [2, 3, 2]; it has to be [2, 3, 1]"),
        ("Int4Gemm", {}, 3, [80, 1], "w_scale is [80, 1]; give 1 axes"),
        ("KvAppend", {}, 1, [2, 3, 16, 64], "past is [2, 3, 16, 64]; it has to be [2, 3, 16, 32]"),
        ("KvAppend", {}, 2, [2, 3, 12, 1], "past_scale is [2, 3, 12, 1]"),
        ("KvAppend", {}, 4, [3], "lengths is [3]; it has to be [2]"),
        ("KvAttention", {}, 4, [2, 3, 16, 32], "value is [2, 3, 16, 32]"),
        ("KvAttention", {}, 0, [2, 3, 5, 64], "outside the table of supported shapes"),
        ("KvAttention", {}, 0, [2, 4, 17, 64], "query_tokens=17, capacity=16, length=16): the siz"),
    ],
    ids=str,
)
def test_a_shape_is_refused_before_anything_runs(
    host: Host, name, attributes, position, shape, message
) -> None:
    plugin = host.create(name, {**SMALLEST[name], **attributes})
    assert plugin is not None
    shapes, types = SHAPES[name]
    changed = [shape if i == position else s for i, s in enumerate(shapes)]
    outputs = [([1], HALF)] * host.abi.plugin_outputs(plugin.handle)
    host.log()
    assert plugin.on_shape_change(list(zip(changed, types, strict=True)), outputs) != 0
    assert message in host.log()
    described = plugin.dynamic_tensors(list(zip(changed, types, strict=True)))
    status = host.abi.plugin_configure(
        plugin.handle, described, len(types), plugin.dynamic_tensors(outputs), len(outputs)
    )
    assert status != 0
    assert message in host.log()


def test_enqueue_needs_shapes_first(host: Host) -> None:
    plugin = host.create("QuantizeInt4", {})
    assert plugin is not None
    host.log()
    assert host.abi.plugin_enqueue(plugin.handle, None, None, None, None, None, None) != 0
    assert "call onShapeChange" in host.log()


# What the fuzzers draw, they print when they fail; a crash ends the process.
fuzzed = settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
names = st.sampled_from(sorted(SMALLEST))
field_names = st.sampled_from(
    [
        *("bits", "clip_ratio", "factors", "heads", "activation_layout", "weight_layout", "dtype"),
        *("rotate", "scale", "plugin_version", "", "\xff"),
    ]
)


@st.composite
def raw_fields(draw) -> tuple[str | None, int, int, bytes | None]:
    """Name, type, length and data: plausible ones, or anything."""
    name = draw(st.none() | field_names)
    if draw(st.booleans()):
        numbers = draw(st.lists(st.sampled_from([0, 1, 4, 10, 12, 128, FRAGMENTS]), max_size=3))
        return name, harness.FIELD_INT32, len(numbers), np.array(numbers, np.int32).tobytes()
    if draw(st.booleans()):
        number = draw(st.floats(width=32))
        return name, harness.FIELD_FLOAT32, 1, np.float32(number).tobytes()
    data = draw(st.none() | st.binary(min_size=0, max_size=64))
    return name, draw(st.integers(-1, 14)), draw(st.integers(-(2**31), 2**31 - 1)), data


@fuzzed
@given(name=names, drawn=st.lists(raw_fields(), max_size=4), count=st.integers(-2, 4))
def test_no_fields_crash_a_creator(host: Host, name, drawn, count) -> None:
    held = (harness.Field * 4)()
    buffers = []
    for field, (label, code, length, data) in zip(held, drawn, strict=False):
        buffers.append(ctypes.create_string_buffer(data or b"", 1024))
        field.name = None if label is None else label.encode("latin-1")
        field.data = None if data is None else cast(buffers[-1], c_void_p).value
        field.type, field.length = code, length
    listed = cast(held, POINTER(harness.Field)) if drawn else POINTER(harness.Field)()
    collection = harness.Fields(min(count, len(drawn)), listed)
    plugin = host.create_from(name, collection, buffers)
    if plugin is None:
        assert f"{name} (layer): " in host.log()
    else:
        saved = plugin.fields()
        again = host.create_from(name, saved)
        assert again is not None
        assert harness.contents(again.fields()) == harness.contents(saved)


sizes = st.lists(
    st.sampled_from([-1, 0, 1, 2, 3, 5, 16, 32, 64, 72, 128, 256, 2**31, 2**40, 2**62]),
    min_size=0,
    max_size=8,
)


@fuzzed
@given(
    name=names,
    position=st.integers(0, 8),
    shape=sizes,
    rank=st.none() | st.sampled_from([-(2**31), -1, 0, 9, 2**31 - 1]),
    code=st.integers(-1, 12),
    count=st.integers(-1, 10),
)
def test_no_descriptors_crash_a_plugin(
    host: Host, name, position, shape, rank, code, count
) -> None:
    plugin = host.create(name, SMALLEST[name])
    assert plugin is not None
    shapes, types = SHAPES[name]
    tensors = list(zip(shapes, types, strict=True))
    position %= len(tensors)
    tensors[position] = (shape, code)
    described = (harness.DynamicTensor * 16)(*(harness.dynamic(*t) for t in tensors))
    if rank is not None:
        d = described[position]
        d.desc.dims.rank = d.max.rank = d.min.rank = d.opt.rank = rank
    plain = (harness.Tensor * 16)(*(d.desc for d in described))
    for tensor, d in zip(plain, described, strict=True):
        tensor.dims = d.max
    outputs = host.abi.plugin_outputs(plugin.handle)
    handle, abi = plugin.handle, host.abi
    inputs = min(count, len(tensors) + 1) if count != 10 else len(tensors)
    right = inputs == len(tensors)
    abi.plugin_supports(handle, position, described, inputs, outputs)
    abi.plugin_configure(handle, described, inputs, described, outputs)
    abi.plugin_workspace(handle, described, inputs, described, outputs)
    status = abi.plugin_on_shape_change(handle, plain, inputs, plain, outputs)
    if not right and not (name in ("Int4Gemm", "KvAttention") and inputs == len(tensors) + 1):
        assert status != 0
    if right and all(s >= 0 for s in shape) and rank is None and len(shape) <= 8:
        plugin.output_shapes([list(s) for s, _ in tensors])
    if status != 0:
        assert abi.plugin_enqueue(handle, plain, plain, None, None, None, None) != 0
    host.log()
