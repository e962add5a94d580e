# SPDX-License-Identifier: Apache-2.0
"""Handles are located by dataflow; whatever a rotation could not follow is refused by name."""

import onnx_ir as ir
import pytest

from quarot_onnx.decoder import Decoder
from quarot_onnx.errors import UnsupportedModelError
from tests.small_decoder import located, small_decoder


def _refusal(old: str, new: str, **options: object) -> str:
    with pytest.raises(UnsupportedModelError) as caught:
        Decoder.locate(small_decoder(replace=(old, new), **options))
    assert caught.value.exit_code == 4
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_locates_every_part_of_every_layer() -> None:
    decoder = located(num_layers=2)
    assert decoder.hidden_size == 8
    assert [node.name for node in decoder.embeddings] == ["/embed/Gather"]
    assert decoder.lm_head.name == "/lm_head/MatMul"
    assert [norm.name for norm in decoder.norms] == [
        "/layers.0/norm_1/RMSNormalization",
        "/layers.0/norm_2/RMSNormalization",
        "/layers.1/norm_1/RMSNormalization",
        "/layers.1/norm_2/RMSNormalization",
        "/norm/RMSNormalization",
    ]
    for index, layer in enumerate(decoder.layers):
        assert layer.index == index
        assert [linear.module for linear in layer.linears] == [
            f"/layers.{index}/{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")
        ]
        assert layer.attention.key_append.outputs[0].name == f"present.{index}.key"
        assert layer.attention.value_append.outputs[0].name == f"present.{index}.value"
        sizes = (layer.attention.num_heads, layer.attention.num_kv_heads, layer.attention.head_dim)
        assert sizes == (4, 2, 4)
    assert [writer.linear.module for writer in decoder.writers[:2]] == [
        "/layers.0/o_proj",
        "/layers.0/down_proj",
    ]


def test_a_linear_knows_its_sizes_and_its_bias() -> None:
    attention = located().layers[0].attention
    assert (attention.v.in_features, attention.v.out_features) == (8, 8)
    assert (attention.o.in_features, attention.o.out_features) == (16, 8)
    assert attention.v.bias.name == "layers.0.v_proj.bias"
    assert attention.o.bias.name == "layers.0.o_proj.bias"
    assert attention.v.output.name == "v0"
    assert attention.q.bias is None
    assert attention.q.output.name == "q0"


def test_replacing_a_linears_node_keeps_the_handle_true() -> None:
    decoder = located()
    up = decoder.layers[0].mlp.readers[1]
    new = ir.node("MatMul", [up.x, up.weight_value], name="/new")
    up.replace(decoder.model.graph, new)
    assert up.name == "/new"
    assert any(user.name == "/layers.0/Mul" for user, _ in new.outputs[0].uses())
    names = [node.name for node in decoder.model.graph]
    assert "/layers.0/up_proj/MatMul" not in names
    assert names.index("/new") == names.index("/layers.0/gate_proj/MatMul") + 1
    assert new.outputs[0].shape is not None


def test_refuses_a_shared_weight() -> None:
    message = _refusal('(b0, "layers.0.up_proj.weight")', '(b0, "layers.0.gate_proj.weight")')
    assert message == (
        "/layers.0/gate_proj/MatMul: weight layers.0.gate_proj.weight is read by "
        "/layers.0/gate_proj/MatMul, /layers.0/up_proj/MatMul; it must be unshared"
    )


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "h1 = Add (m0, d0_out)",
            "t = Tanh (m0)\nh1 = Add (m0, d0_out)",
            "a Tanh reads the residual stream, which only norms and additions may",
        ),
        (
            "g0 = MatMul (b0,",
            "b0_twice = Add (b0, b0)\ng0 = MatMul (b0_twice,",
            "a Add reads the output of a norm, which only linears may",
        ),
        (
            "h1 = Add (m0, d0_out)",
            "d0_twice = Add (d0_out, d0_out)\nh1 = Add (m0, d0_twice)",
            "what is added to the residual stream is not the output of a linear",
        ),
        (
            "h1 = Add (m0, d0_out)",
            "h1 = Add (m0, m0)",
            "what is added to the residual stream is not the output of a linear",
        ),
        (
            "h1 = Add (m0, d0_out)",
            "again = Add (m0, d0_out)\nh1 = Add (m0, d0_out)",
            "what is added to the residual stream is read elsewhere too",
        ),
        (
            "y0 = Reshape (y0_by_head, flat)",
            "y0_gated = Sigmoid (y0_by_head)\ny0 = Reshape (y0_gated, flat)",
            "the attention's output does not go to one linear",
        ),
        (
            "v0_by_head = Reshape (v0, by_head)",
            "v0_gate = Sigmoid (v0)\nv0_by_head = Reshape (v0_gate, by_head)",
            "/layers.0/Attention: an input does not come from a linear over a norm",
        ),
        (
            "v0_by_head = Reshape (v0, by_head)",
            'v0_normed = RMSNormalization (v0, "layers.0.norm_1.weight")\n'
            "v0_by_head = Reshape (v0_normed, by_head)",
            "/layers.0/Attention: an input does not come from a linear over a norm",
        ),
        (
            'd0_out = MatMul (d0, "layers.0.down_proj.weight")',
            "d0_gate = Sigmoid (g0)\nd0_other = Mul (g0, d0_gate)\n"
            'd0_out = MatMul (d0_other, "layers.0.down_proj.weight")',
            "/layers.0/up_proj/MatMul: reads the residual stream and no writer depends on it",
        ),
    ],
    ids=lambda value: None,
)
def test_refuses_what_a_rotation_could_not_follow(old, new, message) -> None:
    assert message in _refusal(old, new)


def _add_linear(model: ir.Model, x: ir.Value, like: str, name: str) -> ir.Value:
    """The output of a new linear over `x`, with a copy of the weight `like`."""
    weight = model.graph.initializers[like].const_value.derive(f"{name}.weight")
    value = ir.Value(name=weight.name, shape=weight.shape, const_value=weight)
    model.graph.initializers[weight.name] = value
    node = ir.node("MatMul", [x, value], name=f"/{name}/MatMul")
    model.graph.append(node)
    return node.outputs[0]


def test_refuses_a_residual_stream_that_branches() -> None:
    model = small_decoder()
    nodes = {node.name: node for node in model.graph}
    down, add = nodes["/layers.0/down_proj/MatMul"], nodes["/layers.0/Add_1"]
    other = _add_linear(model, down.inputs[0], "layers.0.down_proj.weight", "other")
    branch = ir.node("Add", [add.inputs[0], other], name="/branch")
    branch.outputs[0].name = "branch"
    model.graph.append(branch)
    with pytest.raises(UnsupportedModelError, match="branch: the residual stream branches"):
        Decoder.locate(model)


def test_refuses_a_third_writer_of_a_layer() -> None:
    model = small_decoder()
    nodes = {node.name: node for node in model.graph}
    add, norm = nodes["/layers.0/Add_1"], nodes["/norm/RMSNormalization"]
    x = nodes["/layers.0/down_proj/MatMul"].inputs[0]
    other = _add_linear(model, x, "layers.0.down_proj.weight", "other")
    further = ir.node("Add", [add.outputs[0], other], name="/further")
    norm.replace_input_with(0, further.outputs[0])
    model.graph.append(further)
    with pytest.raises(UnsupportedModelError) as caught:
        Decoder.locate(model)
    assert str(caught.value) == (
        "graph: 1 attentions and 3 writers of the residual stream; "
        "expected an attention's and a feed-forward's per layer"
    )


def test_refuses_a_feed_forward_that_reads_the_queries() -> None:
    message = _refusal("Mul (g0_active, u0)", "Mul (g0_active, q0)", intermediate_size=16)
    assert message == (
        "/layers.0/down_proj/MatMul: its input does not come from linears over a norm alone; "
        "this architecture is not supported"
    )


def test_refuses_two_heads() -> None:
    model = small_decoder()
    head = next(node for node in model.graph if node.name == "/lm_head/MatMul")
    _add_linear(model, head.inputs[0], "lm_head.weight", "second_head")
    with pytest.raises(UnsupportedModelError) as caught:
        Decoder.locate(model)
    assert str(caught.value) == (
        "/norm/RMSNormalization: 2 linears read the final norm, expected the head"
    )


def test_refuses_a_cache_whose_heads_have_no_fixed_number() -> None:
    model = small_decoder()
    cache = next(v for v in model.graph.inputs if v.name == "past_key_values.0.key")
    cache.shape = ir.Shape(["B", "H", "P", 4])
    with pytest.raises(UnsupportedModelError) as caught:
        Decoder.locate(model)
    assert str(caught.value) == (
        "/layers.0/Attention: the cache has no fixed number and size of heads"
    )


def test_refuses_a_residual_stream_that_is_an_output() -> None:
    model = small_decoder()
    state = next(node for node in model.graph if node.name == "/layers.0/Add").outputs[0]
    model.graph.outputs.append(state)
    with pytest.raises(UnsupportedModelError) as caught:
        Decoder.locate(model)
    assert str(caught.value) == (
        "m0: the residual stream is an output of the graph, where a rotation would show; "
        "remove the output"
    )


def test_refuses_a_linear_of_no_known_role() -> None:
    model = small_decoder(num_layers=2)
    rope = next(v for v in model.graph.inputs if v.name == "cos")
    _add_linear(model, rope, "layers.0.up_proj.weight", "stray")
    with pytest.raises(UnsupportedModelError) as caught:
        Decoder.locate(model)
    assert str(caught.value) == (
        "/stray/MatMul: a linear with no known role (1 in all); this architecture is not supported"
    )


def test_refuses_a_graph_that_is_no_decoder() -> None:
    text = (
        '<ir_version: 10, opset_import: ["" : 23]> g (float[2] x) => (float[2] y) { y = Abs (x) }'
    )
    with pytest.raises(UnsupportedModelError, match="graph: no Gather of token embeddings"):
        Decoder.locate(ir.from_onnx_text(text))


def test_refuses_a_model_without_norms() -> None:
    model = small_decoder()
    gather = next(node for node in model.graph if node.op_type == "Gather")
    for node in list(model.graph):
        if node.op_type == "RMSNormalization":
            for user, position in list(node.outputs[0].uses()):
                user.replace_input_with(position, model.graph.inputs[2])
            node.replace_input_with(0, model.graph.inputs[2])
    with pytest.raises(UnsupportedModelError, match="no norm reads the residual stream"):
        Decoder.locate(model)
    assert gather.name == "/embed/Gather"


def test_refuses_keys_that_do_not_come_from_a_cache() -> None:
    model = small_decoder()
    attention = next(node for node in model.graph if node.op_type == "Attention")
    keys = next(node for node in model.graph if node.name == "/layers.0/RotaryEmbedding_1")
    attention.replace_input_with(1, keys.outputs[0])
    with pytest.raises(UnsupportedModelError) as caught:
        Decoder.locate(model)
    assert str(caught.value) == "/layers.0/Attention: its keys do not come from a cache"


def test_halves_that_run_side_by_side_are_paired_by_what_they_read() -> None:
    decoder = located(parallel=True, num_layers=2)
    for index, layer in enumerate(decoder.layers):
        assert [linear.module for linear in layer.linears] == [
            f"/layers.{index}/{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")
        ]
    assert len(decoder.norms) == 5


def test_a_norm_between_a_writer_and_the_stream_belongs_to_the_writer() -> None:
    decoder = located(post_norms=True)
    assert [norm.module for norm in decoder.post_norms] == ["/layers.0/post_1", "/layers.0/post_2"]
    assert [writer.post_norm.addition.name for writer in decoder.writers] == [
        "/layers.0/Add",
        "/layers.0/Add_1",
    ]
    assert [norm.module for norm in located().post_norms] == []


def test_learned_positions_are_an_embedding() -> None:
    decoder = located(positions=True)
    assert [weight.name for weight in decoder.embedding_weights] == [
        "embed.weight",
        "positions.weight",
    ]


def test_a_number_may_multiply_the_stream() -> None:
    scaled = "h1_before = Add (m0, d0_out)\ntwo = Constant <value_float = 2.0> ()\n"
    model = small_decoder(replace=("h1 = Add (m0, d0_out)", scaled + "h1 = Mul (h1_before, two)"))
    two = next(
        node
        for node in model.graph
        if node.name.startswith("/Constant") and "two" in {value.name for value in node.outputs}
    )
    two.outputs[0].const_value = ir.tensor(2.0)
    assert len(Decoder.locate(model).norms) == 3
