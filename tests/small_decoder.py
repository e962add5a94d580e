# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: E501  # a node of ONNX text is a line
"""A decoder small enough to read, as ONNX text, with random weights that passes can compose on."""

import difflib
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnx_ir as ir
import onnx_ir.passes.common as common_passes
import pytest
from hypothesis import strategies as st
from numpy.typing import NDArray

from quarot_onnx import decoder as handles
from quarot_onnx.calibration.roundings import Roundings
from quarot_onnx.errors import UnsupportedModelError
from quarot_onnx.passes import untie_embeddings
from quarot_onnx.passes.quantize_activations import QuantizeActivationsPass
from quarot_onnx.passes.quantize_kv_cache import QuantizeKvCachePass
from quarot_onnx.passes.quantize_weights import QuantizeWeightsPass
from quarot_onnx.recipe import Recipe
from quarot_onnx.weights import ArraySource, Weight
from tests import float64, running

Array = NDArray[Any]
Run = Callable[[ir.Model, dict[str, Array]], dict[str, Array]]

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

_POST_NORM = """
["/layers.{i}/post_{n}/RMSNormalization"] {y}_normed = RMSNormalization <axis = -1> ({y}, "layers.{i}.post_{n}.weight")
["/layers.{i}/{add}"]"""

_SIDE_BY_SIDE = """
["/layers.{i}/Add"] side{i} = Add (d{i}_out, o{i})
["/layers.{i}/Add_1"] h{j} = Add (side{i}, h{i})
"""

_POSITIONS = """
["/embed/Gather"] tokens = Gather <axis = 0> ("embed.weight", input_ids)
["/positions/Gather"] positions = Gather <axis = 0> ("positions.weight", input_ids)
["/embed/Add"] h0 = Add (tokens, positions)
"""


def _layer(*, post_norms: bool, parallel: bool) -> str:
    """The text of a layer: post-norms behind the writers, or both halves reading one state."""
    text = _LAYER
    if post_norms:
        for n, y, add in ((1, "o{i}", "Add"), (2, "d{i}_out", "Add_1")):
            norm = _POST_NORM.replace("{n}", str(n)).replace("{y}", y).replace("{add}", add)
            text = text.replace(f'\n["/layers.{{i}}/{add}"]', norm)
            text = (
                text.replace(f", {y})\n", f", {y}_normed)\n")
                if n == 2
                else text.replace(f"(h{{i}}, {y})", f"(h{{i}}, {y}_normed)")
            )
    if parallel:
        text = text.replace('["/layers.{i}/Add"] m{i} = Add (h{i}, o{i})\n', "")
        text = text.replace('["/layers.{i}/Add_1"] h{j} = Add (m{i}, d{i}_out)\n', _SIDE_BY_SIDE)
        text = text.replace("(m{i},", "(h{i},")
    return text


_LAYER_NORM = r'LayerNormalization\1 (\2, "\3.weight", "\3.bias")'
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
    layer_norms: bool = False,
    post_norms: bool = False,
    parallel: bool = False,
    positions: bool = False,
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
    if post_norms:
        weights |= {
            f"layers.{i}.post_{n}.weight": (hidden_size,) for i in range(num_layers) for n in (1, 2)
        }
    if positions:
        weights["positions.weight"] = (vocabulary, hidden_size)
    if layer_norms:
        weights |= {
            name.replace(".weight", ".bias"): shape
            for name, shape in weights.items()
            if "norm" in name
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
    layer = _layer(post_norms=post_norms, parallel=parallel)
    layers = "".join(layer.format(i=i, j=i + 1) for i in range(num_layers))
    text = f"""<ir_version: 10, opset_import: ["" : 23]>
        small ({", ".join(inputs)}) => ({", ".join(outputs)}) {{
        by_head = Constant <value_ints = [0, 0, -1, {head_dim}]> ()
        flat = Constant <value_ints = [0, 0, {heads}]> ()
        ["/embed/Gather"] h0 = Gather <axis = 0> ("embed.weight", input_ids)
        {layers}
        ["/norm/RMSNormalization"] final = RMSNormalization <axis = -1> (h{num_layers}, "norm.weight")
        {_TIED_HEAD if tied else _HEAD} }}"""
    if positions:
        gather = '["/embed/Gather"] h0 = Gather <axis = 0> ("embed.weight", input_ids)'
        text = text.replace(gather, _POSITIONS)
    if layer_norms:
        text = re.sub(r'RMSNormalization( <.*>) \((\w+), "(.*)\.weight"\)', _LAYER_NORM, text)
        text = text.replace("/RMSNormalization", "/LayerNormalization")
    if replace is not None:
        assert text.count(replace[0]) == 1, f"{text.count(replace[0])} times {replace[0]!r}"
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


def invertible(*shape: int, seed: int = 0) -> Array:
    """Matrices that are neither symmetric nor orthogonal, with condition numbers below 10."""
    noise = np.random.default_rng(seed).uniform(-1, 1, shape) / (2 * shape[-1])
    matrix: Array = np.eye(shape[-1]) + noise
    return matrix


def feeds(model: ir.Model, *, length: int, past: int) -> dict[str, Array]:
    """Random inputs: a batch of 2, causal, in the first of which one position is padding."""
    rng = np.random.default_rng(length)
    sizes = {"B": 2, "S": length, "P": past, "T": past + length}
    angle = rng.uniform(0, 3, (2, length, 1))
    result: dict[str, Array] = {}
    for value in model.graph.inputs:
        assert value.name is not None
        assert value.shape is not None
        assert value.dtype is not None
        shape = [n if isinstance(n, int) else sizes[str(n.value)] for n in value.shape]
        if value.name == "input_ids":
            array = rng.integers(0, 10, shape)
        elif value.name == "mask":
            array = np.broadcast_to(np.tri(length, past + length, past) > 0, shape).copy()
            array[0, :, 1:, 0] = False
        elif value.name in ("cos", "sin"):
            turn = np.cos if value.name == "cos" else np.sin
            array = turn(angle * np.arange(1, shape[-1] + 1))
        else:
            array = rng.normal(size=shape)
        result[value.name] = array.astype(value.dtype.numpy())
    return result


def logits(run: Run, model: ir.Model) -> Array:
    """Logits of a prefill of 3 tokens and of a step of 2 on the cache that it left."""
    outputs = run(model, feeds(model, length=3, past=0))
    cache = {
        name.replace("present", "past_key_values"): array
        for name, array in outputs.items()
        if name != "logits"
    }
    following = run(model, feeds(model, length=2, past=3) | cache)
    return np.concatenate([outputs["logits"], following["logits"]], axis=1)


SIZES = st.fixed_dictionaries(
    {
        "hidden_size": st.sampled_from([8, 12, 10]),
        "num_heads": st.sampled_from([4, 6, 12]),
        "num_kv_heads": st.sampled_from([1, 2]),
        "head_dim": st.sampled_from([2, 4, 6, 24]),
        "intermediate_size": st.sampled_from([12, 13, 22, 172]),
        "num_layers": st.sampled_from([1, 2]),
    }
)
"""Powers of two, 12 and 172, and sizes of which no Hadamard matrix exists: 6, 10, 13, 22."""


def assert_equivalent(apply: Callable[[handles.Decoder], object], **options: object) -> None:
    """`apply` leaves the logits alone: to 1e-12 in float64, to a few eps in ONNX Runtime."""
    decoder = located(**options)
    before = logits(float64.run, decoder.model)
    before_in_dtype = logits(running.run, decoder.model)
    apply(decoder)
    onnx.checker.check_model(ir.to_proto(decoder.model), full_check=True)
    largest = np.abs(before).max()
    assert np.abs(logits(float64.run, decoder.model) - before).max() <= 1e-12 * largest
    after = logits(running.run, decoder.model)
    assert after.dtype == before_in_dtype.dtype
    eps = float(np.finfo(after.dtype).eps)
    assert np.abs(after.astype(np.float64) - before).max() <= 64 * eps * largest


def assert_golden(name: str, before: str, after: str) -> None:
    """The difference is the one in ``tests/golden/<name>.diff``; QUAROT_GOLDEN=write rewrites it."""
    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), n=0, lineterm="")
    actual = "".join(f"{line}\n" for line in lines if not line.startswith(("@@", "---", "+++")))
    path = Path(__file__).parent / "golden" / f"{name}.diff"
    if os.environ.get("QUAROT_GOLDEN") == "write":
        path.write_text(actual, encoding="utf-8")
    assert actual == path.read_text(encoding="utf-8")


def quantize_linears(decoder: handles.Decoder) -> None:
    """Weights and activations of every linear become codes, by the default recipe."""
    QuantizeWeightsPass(decoder, bits=4, clip_search=False)()
    choose = Roundings(decoder, Recipe(), None).of_activations
    QuantizeActivationsPass(decoder, choose, weight_bits=4)()


def quantize_cache(decoder: handles.Decoder, form: Literal["packed", "float"]) -> None:
    """Keys and values become codes, by the default recipe."""
    QuantizeKvCachePass(decoder, Roundings(decoder, Recipe(), None).of_cache, bits=4, form=form)()


@contextmanager
def refused(decoder: handles.Decoder, message: str) -> Iterator[None]:
    """The block is refused with `message`, and the model is as it was."""
    before = text(decoder.model)
    with pytest.raises(UnsupportedModelError) as caught:
        yield
    assert str(caught.value) == message
    assert text(decoder.model) == before


def text(model: ir.Model) -> str:
    """The graph without functions and intermediate types, and what was composed on each weight."""
    names = list(model.graph.initializers)
    unweighted = model.clone()
    unweighted.graph.initializers.clear()
    proto = ir.to_proto(unweighted)
    del proto.functions[:]
    del proto.graph.value_info[:]
    lines = [*onnx.printer.to_text(proto).splitlines()]
    for name in sorted(names):
        held = model.graph.initializers[name].const_value
        axes = [step.axis for step in held.steps] if isinstance(held, Weight) else []
        composed = f" composed along {axes}" if axes else ""
        lines.append(f"initializer {name}: {held.dtype.name} {list(held.shape)}{composed}")
    return "\n".join(lines) + "\n"
