# SPDX-License-Identifier: Apache-2.0
"""A decoder small enough to read, as ONNX text, with random weights that passes can compose on."""

import numpy as np
import onnx
import onnx_ir as ir
import onnx_ir.passes.common as common_passes
from numpy.typing import NDArray

from quarot_onnx import decoder as handles
from quarot_onnx.passes import untie_embeddings
from quarot_onnx.weights import ArraySource, Weight

TYPES = {"float": ir.DataType.FLOAT, "float16": ir.DataType.FLOAT16}

_LAYER = """
["/layers.{i}/norm_1/RMSNormalization"] a{i} = RMSNormalization <axis = -1> (h{i}, "layers.{i}.norm_1.weight")
["/layers.{i}/q_proj/MatMul"] q{i} = MatMul (a{i}, "layers.{i}.q_proj.weight")
["/layers.{i}/k_proj/MatMul"] k{i} = MatMul (a{i}, "layers.{i}.k_proj.weight")
["/layers.{i}/v_proj/MatMul"] v{i}_product = MatMul (a{i}, "layers.{i}.v_proj.weight")
["/layers.{i}/v_proj/Add"] v{i} = Add (v{i}_product, "layers.{i}.v_proj.bias")
q{i}_by_head = Reshape (q{i}, by_head)
q{i}_heads = Transpose <perm = [0, 2, 1, 3]> (q{i}_by_head)
k{i}_by_head = Reshape (k{i}, by_head)
k{i}_heads = Transpose <perm = [0, 2, 1, 3]> (k{i}_by_head)
v{i}_by_head = Reshape (v{i}, by_head)
v{i}_heads = Transpose <perm = [0, 2, 1, 3]> (v{i}_by_head)
["/layers.{i}/RotaryEmbedding"] q{i}_turned = RotaryEmbedding (q{i}_heads, cos, sin)
["/layers.{i}/RotaryEmbedding_1"] k{i}_turned = RotaryEmbedding (k{i}_heads, cos, sin)
["/layers.{i}/Concat"] "present.{i}.key" = Concat <axis = 2> ("past_key_values.{i}.key", k{i}_turned)
["/layers.{i}/Concat_1"] "present.{i}.value" = Concat <axis = 2> ("past_key_values.{i}.value", v{i}_heads)
["/layers.{i}/Attention"] y{i}_heads = Attention <scale = 0.5> (q{i}_turned, "present.{i}.key", "present.{i}.value", mask)
y{i}_by_head = Transpose <perm = [0, 2, 1, 3]> (y{i}_heads)
y{i} = Reshape (y{i}_by_head, flat)
["/layers.{i}/o_proj/MatMul"] o{i}_product = MatMul (y{i}, "layers.{i}.o_proj.weight")
["/layers.{i}/o_proj/Add"] o{i} = Add ("layers.{i}.o_proj.bias", o{i}_product)
["/layers.{i}/Add"] m{i} = Add (h{i}, o{i})
["/layers.{i}/norm_2/RMSNormalization"] b{i} = RMSNormalization <axis = -1> (m{i}, "layers.{i}.norm_2.weight")
["/layers.{i}/gate_proj/MatMul"] g{i} = MatMul (b{i}, "layers.{i}.gate_proj.weight")
["/layers.{i}/up_proj/MatMul"] u{i} = MatMul (b{i}, "layers.{i}.up_proj.weight")
g{i}_gate = Sigmoid (g{i})
g{i}_active = Mul (g{i}, g{i}_gate)
["/layers.{i}/Mul"] d{i} = Mul (g{i}_active, u{i})
["/layers.{i}/down_proj/MatMul"] d{i}_out = MatMul (d{i}, "layers.{i}.down_proj.weight")
["/layers.{i}/Add_1"] h{j} = Add (m{i}, d{i}_out)
"""

_TIED_HEAD = """
["/lm_head/Transpose"] head = Transpose <perm = [1, 0]> ("embed.weight")
["/lm_head/MatMul"] logits = MatMul (final, head)
"""
_HEAD = '["/lm_head/MatMul"] logits = MatMul (final, "lm_head.weight")'


def small_decoder(
    *,
    hidden_size: int = 8,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 4,
    intermediate_size: int = 12,
    vocabulary: int = 10,
    num_layers: int = 1,
    tied: bool = False,
    dtype: str = "float",
    replace: tuple[str, str] | None = None,
    seed: int = 0,
) -> ir.Model:
    """The model; `replace` = (old, new) edits its text, for graphs that must be refused."""
    heads, cache = num_heads * head_dim, num_kv_heads * head_dim
    weights = {"embed.weight": (vocabulary, hidden_size), "norm.weight": (hidden_size,)}
    if not tied:
        weights["lm_head.weight"] = (hidden_size, vocabulary)
    for i in range(num_layers):
        weights |= {
            f"layers.{i}.norm_1.weight": (hidden_size,),
            f"layers.{i}.q_proj.weight": (hidden_size, heads),
            f"layers.{i}.k_proj.weight": (hidden_size, cache),
            f"layers.{i}.v_proj.weight": (hidden_size, cache),
            f"layers.{i}.v_proj.bias": (cache,),
            f"layers.{i}.o_proj.weight": (heads, hidden_size),
            f"layers.{i}.o_proj.bias": (hidden_size,),
            f"layers.{i}.norm_2.weight": (hidden_size,),
            f"layers.{i}.gate_proj.weight": (hidden_size, intermediate_size),
            f"layers.{i}.up_proj.weight": (hidden_size, intermediate_size),
            f"layers.{i}.down_proj.weight": (intermediate_size, hidden_size),
        }
    inputs = ["int64[B,S] input_ids", "bool[B,1,S,T] mask"]
    inputs += [f"{dtype}[B,S,{head_dim // 2}] {name}" for name in ("cos", "sin")]
    outputs = [f"{dtype}[B,S,{vocabulary}] logits"]
    for i in range(num_layers):
        for kind in ("key", "value"):
            shape = f"{dtype}[B,{num_kv_heads},%s,{head_dim}]"
            inputs.append(f'{shape % "P"} "past_key_values.{i}.{kind}"')
            outputs.append(f'{shape % "T"} "present.{i}.{kind}"')
    inputs += [f'{dtype}{list(shape)} "{name}"' for name, shape in weights.items()]
    layers = "".join(_LAYER.format(i=i, j=i + 1) for i in range(num_layers))
    text = f"""<ir_version: 10, opset_import: ["" : 23]>
        small ({", ".join(inputs)}) => ({", ".join(outputs)}) {{
        by_head = Constant <value_ints = [0, 0, -1, {head_dim}]> ()
        flat = Constant <value_ints = [0, 0, {heads}]> ()
        ["/embed/Gather"] h0 = Gather <axis = 0> ("embed.weight", input_ids)
        {layers}
        ["/norm/RMSNormalization"] final = RMSNormalization <axis = -1> (h{num_layers}, "norm.weight")
        {_TIED_HEAD if tied else _HEAD} }}"""
    if replace is not None:
        assert text.count(replace[0]) == 1, f"{replace[0]!r} is {text.count(replace[0])} times in it"
        text = text.replace(*replace)
    model = ir.from_onnx_text(text)
    for number, node in enumerate(model.graph):
        node.name = node.name or f"/{node.op_type}_{number}"
    _bind(model, weights, TYPES[dtype], seed)
    common_passes.ShapeInferencePass()(model)
    return model


def _bind(
    model: ir.Model, weights: dict[str, tuple[int, ...]], dtype: ir.DataType, seed: int
) -> None:
    """Turn the inputs named in `weights` into initializers with random lazy weights."""
    rng = np.random.default_rng(seed)
    for value in [v for v in model.graph.inputs if v.name in weights]:
        assert value.name is not None
        shape = weights[value.name]
        spread = 0.5 if len(shape) == 1 else shape[0] ** -0.5
        numbers = rng.normal(0 if "bias" in value.name or len(shape) > 1 else 1, spread, shape)
        model.graph.inputs.remove(value)
        value.const_value = Weight(value.name, ArraySource(numbers.astype(dtype.numpy())), dtype)
        model.graph.initializers[value.name] = value


def located(**options: object) -> handles.Decoder:
    """The handles of a `small_decoder` whose embeddings are untied."""
    model = small_decoder(**options)  # type: ignore[arg-type]
    untie_embeddings(model)
    return handles.Decoder.locate(model)


def feeds(model: ir.Model, *, batch: int = 2, length: int = 3, past: int = 2) -> dict[str, NDArray]:
    """Random inputs for a float-cache `small_decoder`, causal mask, one position padded on the left."""
    rng = np.random.default_rng(7)
    sizes = {"B": batch, "S": length, "P": past, "T": past + length}
    result: dict[str, NDArray] = {}
    for value in model.graph.inputs:
        assert value.name is not None
        assert value.shape is not None
        shape = [n if isinstance(n, int) else sizes[str(n.value)] for n in value.shape]
        if value.name == "input_ids":
            result[value.name] = rng.integers(0, 10, shape)
        elif value.name == "mask":
            result[value.name] = np.broadcast_to(np.tri(length, past + length, past) > 0, shape).copy()
            result[value.name][0, :, :, :1] = past == 0
        elif value.name in ("cos", "sin"):
            angle = rng.uniform(0, 3, shape) if value.name == "cos" else np.arccos(result["cos"])
            result[value.name] = np.cos(angle) if value.name == "cos" else np.sin(angle)
        else:
            result[value.name] = rng.normal(0, 1, shape)
        if value.dtype in TYPES.values():
            result[value.name] = result[value.name].astype(value.dtype.numpy())
    return result


def text(model: ir.Model) -> str:
    """The graph without functions and intermediate types, and what was composed on each weight."""
    proto = ir.to_proto(model)
    names = {initializer.name for initializer in proto.graph.initializer}
    del proto.functions[:]
    del proto.graph.value_info[:]
    del proto.graph.initializer[:]
    lines = [*onnx.printer.to_text(proto).splitlines()]
    for name in sorted(names):
        held = model.graph.initializers[name].const_value
        axes = [step.axis for step in held.steps] if isinstance(held, Weight) else []
        composed = f" composed along {axes}" if axes else ""
        lines.append(f"initializer {name}: {held.dtype.name} {list(held.shape)}{composed}")
    return "\n".join(lines) + "\n"
