# SPDX-License-Identifier: Apache-2.0
"""Canonical rewrites: the same function, whichever way a modelling file writes it."""

import numpy as np
import onnx_ir as ir
import pytest

from quarot_onnx.export import canonical
from quarot_onnx.export.canonical import MODULE, reading
from quarot_onnx.export.checkpoint import Rows
from tests import running

SHAPES = {
    "w": [12, 6],
    "fused": [6, 12],
    "flat_w": [6, 6],
    "b": [12],
    "g": [6],
}


def _template(body: str, result: str) -> ir.Model:
    """A traced template over x [B, S, 6]: parameters are initializers without a value."""
    parameters = ", ".join(f"float{shape} {name}" for name, shape in SHAPES.items())
    model = ir.from_onnx_text(
        f"""<ir_version: 10, opset_import: ["" : 23]>
        template (float[B,S,6] x, {parameters}) => ({result}) {{ {body} }}"""
    )
    for value in [v for v in model.graph.inputs if v.name in SHAPES]:
        model.graph.inputs.remove(value)
        model.graph.initializers[value.name or ""] = value
    for node in list(model.graph):
        node.metadata_props[MODULE] = "layer.query_key_value"
        if node.op_type == "Constant":
            value = node.outputs[0]
            name = value.name
            held = node.attributes.get("value_ints") or node.attributes["value_float"]
            is_ints = isinstance(held.value, tuple | list)
            array = np.array(held.value, np.int64 if is_ints else np.float32)
            constant = ir.Value(name=f"{name}_held", const_value=ir.tensor(array))
            constant.shape, constant.type = ir.Shape(array.shape), value.type
            model.graph.initializers[constant.name or ""] = constant
            value.replace_all_uses_with(constant)
            model.graph.remove(node, safe=True)
    return model


def _run(model: ir.Model) -> list[np.ndarray]:
    """The outputs, with random numbers as the checkpoint's tensors."""
    rng = np.random.default_rng(0)
    tensors = {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}
    copy = model.clone()
    for original, value in zip(
        model.graph.initializers.values(), copy.graph.initializers.values(), strict=True
    ):
        if value.const_value is not None:
            continue
        how = reading(original)
        array = tensors[how.tensor]
        if how.rows is not None:  # of torch's layout, which for `fused` is the transpose
            stored = array.T if how.tensor == "fused" else array
            rows = how.rows.numbers(slice(0, how.rows.count(len(stored))))
            array = stored[rows].T if how.tensor == "fused" else stored[rows]
        elif how.transposed:
            array = array.T
        value.const_value = ir.tensor(np.ascontiguousarray(array + np.float32(how.addend)))
    x = rng.normal(size=(2, 3, 6)).astype(np.float32)
    return list(running.run(copy, {"x": x}).values())


def _assert_same(before: ir.Model, after: ir.Model) -> None:
    for a, b in zip(_run(before), _run(after), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def _operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


GEMM = """
    flat = Constant <value_ints = [-1, 6]> ()
    back = Constant <value_ints = [2, 3, 12]> ()
    f = Reshape (x, flat)
    y = Gemm <transB = 1> (f, w, b)
    z = Reshape (y, back)
"""


def test_a_gemm_becomes_a_product_and_a_bias() -> None:
    before, after = (_shaped(_template(GEMM, "float[B,S,12] z")) for _ in range(2))
    canonical.separate_gemms(after)
    canonical.transpose_weights(after)
    _assert_same(before, after)
    assert _operators(after) == ["Reshape", "MatMul", "Add", "Reshape"]
    assert reading(after.graph.initializers["w"]).transposed
    assert list(after.graph.initializers["w"].shape) == [6, 12]


def test_a_scaled_gemm_is_left_alone() -> None:
    model = _shaped(
        _template(GEMM.replace("transB = 1", "transB = 1, alpha = 2.0"), "float[B,S,12] z")
    )
    canonical.separate_gemms(model)
    assert "Gemm" in _operators(model)


def _shaped(model: ir.Model) -> ir.Model:
    """With the shapes that the tracer gives: tokens are B * S where they are flattened."""
    shapes = {"f": ["B*S", 6], "y": ["B*S", 12], "z": ["B", "S", 12], "n": ["B*S", 6]}
    shapes |= {"s": ["B*S", 6], "t": ["B", "S", 6]}
    for node in model.graph:
        for value in node.outputs:
            if value.name in shapes:
                value.shape = ir.Shape(shapes[value.name])
                value.type = ir.TensorType(ir.DataType.FLOAT)
    return model


FLAT = """
    flat = Constant <value_ints = [-1, 6]> ()
    back = Constant <value_ints = [2, 3, 6]> ()
    f = Reshape (x, flat)
    n = MatMul (f, flat_w)
    s = Add (f, n)
    t = Reshape (s, back)
    result = Relu (t)
"""


def test_tokens_keep_their_axes() -> None:
    before, after = (_shaped(_template(FLAT, "float[B,S,6] result")) for _ in range(2))
    canonical.batch_flattened_tokens(after)
    _assert_same(before, after)
    assert _operators(after) == ["MatMul", "Add", "Relu"]
    assert all(len(node.outputs[0].shape) == 3 for node in list(after.graph)[:2])


def test_tokens_that_meet_each_other_stay_flat() -> None:
    mixing = FLAT.replace("s = Add (f, n)", "s = Softmax <axis = 0> (n)")
    model = _shaped(_template(mixing, "float[B,S,6] result"))
    canonical.batch_flattened_tokens(model)
    assert _operators(model) == ["Reshape", "MatMul", "Softmax", "Reshape", "Relu"]


FUSED = """
    product = MatMul (x, fused)
    y = Add (product, b)
"""
SLICES = FUSED + "".join(
    f"""
    start{n} = Constant <value_ints = [{start}]> ()
    stop{n} = Constant <value_ints = [{stop}]> ()
    axis{n} = Constant <value_ints = [2]> ()
    step{n} = Constant <value_ints = [1]> ()
    part{n} = Slice (y, start{n}, stop{n}, axis{n}, step{n})
    """
    for n, (start, stop) in enumerate([(0, 6), (6, 8), (8, 9223372036854775807)])
)
SPLIT = FUSED + "part0, part1, part2 = Split <axis = -1, num_outputs = 3> (y)"
HEADS = (
    FUSED
    + """
    by_head = Constant <value_ints = [0, 0, -1, 6]> ()
    r = Reshape (y, by_head)
    h = Transpose <perm = [0, 2, 1, 3]> (r)
    part0, part1, part2 = Split <axis = 3, num_outputs = 3> (h)
"""
)


def _fused(body: str, widths: list[int], by_head: bool = False) -> ir.Model:
    parts = [
        f"float[B,2,S,2] part{n}" if by_head else f"float[B,S,{w}] part{n}"
        for n, w in enumerate(widths)
    ]
    model = _template(body, ", ".join(parts))
    by_name = {value.name: value for node in model.graph for value in node.outputs}
    by_name |= {v.name: v for v in model.graph.initializers.values()}
    shapes = {
        "product": ["B", "S", 12],
        "y": ["B", "S", 12],
        "r": ["B", "S", 2, 6],
        "h": ["B", 2, "S", 6],
    }
    for name, shape in shapes.items():
        if name in by_name:
            by_name[name].shape = ir.Shape(shape)
            by_name[name].type = ir.TensorType(ir.DataType.FLOAT)
    return model


@pytest.mark.parametrize(
    ("body", "widths", "by_head"),
    [(SLICES, [6, 2, 4], False), (SPLIT, [4, 4, 4], False), (HEADS, [4, 4, 4], True)],
    ids=["slices", "split", "heads"],
)
def test_a_fused_linear_becomes_one_for_each_part(body, widths, by_head) -> None:
    before, after = (_fused(body, widths, by_head) for _ in range(2))
    canonical.separate_fused_linears(after)
    _assert_same(before, after)
    assert _operators(after).count("MatMul") == _operators(after).count("Add") == 3
    assert not {"Slice", "Split"} & set(_operators(after))
    for name, width in zip(("query", "key", "value"), widths, strict=True):
        assert list(after.graph.initializers[f"layer.{name}.weight"].shape) == [6, width]
        assert reading(after.graph.initializers[f"layer.{name}.bias"]).tensor == "b"


def test_a_linear_that_is_read_as_a_whole_stays_whole() -> None:
    model = _fused(SPLIT + "\n whole = Relu (y)", [4, 4, 4])
    canonical.separate_fused_linears(model)
    assert _operators(model).count("MatMul") == 1


def test_a_constant_goes_into_the_norm_scale() -> None:
    body = """
        one = Constant <value_float = 1.0> ()
        scale = Add (g, one)
        y = RMSNormalization <axis = -1> (x, scale)
    """
    before, after = (_template(body, "float[B,S,6] y") for _ in range(2))
    canonical.absorb_scale_addends(after)
    _assert_same(before, after)
    assert _operators(after) == ["RMSNormalization"]
    assert reading(after.graph.initializers["g"]).addend == 1.0


def test_rows_select_within_every_period() -> None:
    rows = Rows(period=6, start=2, stop=4)
    assert rows.count(12) == 4
    assert rows.numbers(slice(0, 4)).tolist() == [2, 3, 8, 9]
    assert rows.numbers(slice(1, 3)).tolist() == [3, 8]
