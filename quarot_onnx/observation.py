# SPDX-License-Identifier: Apache-2.0
"""What runs through an artifact: the residual stream, and what its quantizers meet.

Rotations and foldings give the residual stream other coordinates, x -> x M with one M for the whole
model. M is read off the embeddings, which are stored in float on both sides, so two artifacts of
one model can be compared layer by layer whatever was done to them.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common_passes
from numpy.typing import NDArray

from quarot_onnx.activations import (
    Statistics,
    quantized_asymmetric,
    quantized_symmetric,
    statistics,
)
from quarot_onnx.errors import InputError
from quarot_onnx.ops import DOMAIN
from quarot_onnx.reference import load_graph
from quarot_onnx.runtime import Ids, load_session, position_ids

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]

CACHED = ("keys", "values")
"""Sites whose rows are heads; a row of another site is a token."""

_HELD_BYTES = 256 << 20  # of activations in memory at once
_NORMS = frozenset({"RMSNormalization", "LayerNormalization"})
_LAYER = re.compile(r"(?:^|/)layers\.(\d+)/(.*)/[^/]*$")


@dataclass(frozen=True)
class Observed:
    """One layer on a text.

    Attributes:
        index: of the layer; the count of layers for what is behind the last one.
        state: the residual stream in front of it, [tokens, hidden_size].
        sites: what is rounded, or would be, by module (``mlp.down_proj``, the first one where
            several read the same; experts are left out) and ``keys`` and ``values``: [rows,
            channels].
    """

    index: int
    state: Float32
    sites: dict[str, Float32]


def observe(artifact: Path, tokens: Ids, *, threads: int | None = None) -> Iterator[Observed]:
    """Every layer of `artifact` on windows `tokens` [N, T], and the state behind the last one.

    Raises:
        InputError: the artifact is damaged, or its layers cannot be found by name.
        QuarotError: what `quarot_onnx.runtime.load_session` raises.
    """
    model = load_graph(artifact)
    places = _places(artifact, model.graph)
    feeds = _feeds(model.graph, tokens)
    values = [value for state, sites in places for value in (state, *sites.values())]
    model.graph.outputs.clear()
    for value in dict.fromkeys(values):
        if value.type is None:
            value.type = ir.TensorType(ir.DataType.FLOAT)
        model.graph.outputs.append(value)
    common_passes.RemoveUnusedNodesPass()(model)
    kept = {value.name for value in model.graph.inputs if value.uses()}
    for value in [v for v in model.graph.inputs if v.name not in kept]:
        model.graph.inputs.remove(value)
    session = load_session(
        ir.to_proto(model).SerializeToString(), threads=threads, data_directory=artifact.absolute()
    )
    feeds = {name: array for name, array in feeds.items() if name in kept}
    sizes = [value.shape[-1] for value in values if value.shape is not None]
    widest = max((size for size in sizes if isinstance(size, int)), default=1)
    at_once = max(1, _HELD_BYTES // (4 * tokens.size * widest * 8))
    for start in range(0, len(places), at_once):
        part = places[start : start + at_once]
        names = [value.name or "" for state, sites in part for value in (state, *sites.values())]
        outputs = iter(session.run(names, feeds))
        for offset, (_, sites) in enumerate(part):
            state = _rows(next(outputs))
            found = {name: _rows(next(outputs)) for name in sites}
            yield Observed(start + offset, state, found)


_Place = tuple[ir.Value, dict[str, ir.Value]]


def _places(artifact: Path, graph: ir.Graph) -> list[_Place]:
    """For each layer and what follows the last: the stream, and the inputs of the quantizers."""
    states: dict[int, ir.Value] = {}
    sites: dict[int, dict[ir.Value, str]] = {}
    last: ir.Value | None = None
    for node in graph:
        match = _LAYER.search(node.name or "")
        x = node.inputs[0] if node.inputs else None
        if x is None:
            continue
        if node.op_type in _NORMS:
            if match is None:
                last = x
            else:
                states.setdefault(int(match[1]), x)
        elif match is not None and "experts" not in match[2] and _is_linear(node):
            sites.setdefault(int(match[1]), {}).setdefault(_unrounded(x), match[2])
    if last is None or not states or sorted(states) != list(range(len(states))):
        raise InputError(
            f"{artifact}: the norms of its layers are not named layers.N; it cannot be observed"
        )
    by_name = {value.name: value for value in graph.outputs}
    found: list[_Place] = []
    for index, state in sorted(states.items()):
        named = {name.replace("/", "."): value for value, name in sites.get(index, {}).items()}
        for name, kind in zip(CACHED, ("key", "value"), strict=True):
            present = by_name.get(f"present.{index}.{kind}")
            if present is not None and (new := _appended(present)) is not None:
                named[name] = new
        found.append((state, named))
    return [*found, (last, {})]


def _is_linear(node: ir.Node) -> bool:
    if node.op_type != "MatMul" and not (node.domain == DOMAIN and "Gemm" in node.op_type):
        return False
    weights = [v for v in node.inputs[1:] if v is not None and v.is_initializer()]
    return any(v.shape is not None and len(v.shape) >= 2 for v in weights)


def _unrounded(value: ir.Value) -> ir.Value:
    """`value` in front of the operators that round it."""
    producer = value.producer()
    while producer is not None and producer.domain == DOMAIN and "uantize" in producer.op_type:
        source = producer.inputs[0]
        assert source is not None
        value, producer = source, source.producer()
    return value


def _appended(present: ir.Value) -> ir.Value | None:
    """What is appended to the cache, before it is rounded: the input that a node computes."""
    append = present.producer()
    if append is None:
        return None
    new = next((v for v in append.inputs if v is not None and v.producer() is not None), None)
    return None if new is None else _unrounded(new)


def _feeds(graph: ir.Graph, tokens: Ids) -> dict[str, NDArray[Any]]:
    """One prefill of `tokens` behind an empty cache."""
    mask = np.ones_like(tokens)
    feeds: dict[str, NDArray[Any]] = {
        "input_ids": np.ascontiguousarray(tokens),
        "attention_mask": mask,
        "position_ids": position_ids(mask, tokens.shape[1]),
    }
    for value in graph.inputs:
        if value.name not in feeds and value.shape is not None and value.dtype is not None:
            shape = (len(tokens), int(value.shape[1]), 0, int(value.shape[3]))  # type: ignore[arg-type]
            feeds[value.name or ""] = np.zeros(shape, value.dtype.numpy())
    return feeds


def _rows(values: NDArray[Any]) -> Float32:
    """[N, T, channels] or [N, heads, T, head_dim] as rows that share a scale."""
    rows: Float32 = values.reshape(-1, values.shape[-1]).astype(np.float32)
    return rows


# --- Comparing ------------------------------------------------------------------------------------


def site_statistics(name: str, x: Float32) -> Statistics:
    """The statistics of a site, per token, or per token and head where it is cached."""
    return statistics(x, quantized_asymmetric if name in CACHED else quantized_symmetric)


def stream_map(reference: Path, artifact: Path) -> Float64:
    """M [hidden_size, hidden_size]: the artifact's residual stream is the reference's times M.

    The least-squares solution over the embeddings of at most four times as many tokens as there are
    channels.

    Raises:
        InputError: no embedding is found, or they have other shapes.
    """
    ours, theirs = _embedding(reference), _embedding(artifact)
    if ours.shape != theirs.shape:
        raise InputError(
            f"{artifact}: embeddings {list(theirs.shape)}, those of {reference} {list(ours.shape)}"
        )
    vocabulary, hidden = ours.shape
    count = min(vocabulary, 4 * hidden)
    rows = np.sort(np.random.default_rng(0).choice(vocabulary, count, replace=False))
    x, y = ours[rows].astype(np.float64), theirs[rows].astype(np.float64)
    solution: Float64 = np.linalg.lstsq(x, y, rcond=None)[0]
    return solution


def _embedding(artifact: Path) -> NDArray[Any]:
    for node in load_graph(artifact).graph:
        table = node.inputs[0] if node.inputs else None
        if node.op_type == "Gather" and table is not None and table.const_value is not None:
            found = table.const_value.numpy()
            if found.ndim == 2 and "embed" in (table.name or ""):
                return found
    raise InputError(f"{artifact}: has no token embeddings; export again")


def signal_to_noise(expected: Float32, found: Float32, stream: Float64) -> float:
    """-10 log10 of the mean over tokens of |found - expected M|² / |expected M|², in decibels.

    Tokens whose state is all zero are left out.
    """
    signal = expected.astype(np.float64) @ stream
    power = np.square(signal).sum(-1)
    is_silent = power == 0  # a padding token's embedding
    noise = np.square(found - signal).sum(-1)[~is_silent] / power[~is_silent]
    mean = float(noise.mean()) if noise.size else 0.0
    return -10 * math.log10(mean) if mean > 0 else math.inf


def layer_noise(
    reference: Path, artifact: Path, tokens: Ids, *, threads: int | None = None
) -> list[float]:
    """The signal-to-noise ratio of the residual stream behind each layer, in decibels.

    Args:
        reference: an artifact of the same model, unquantized.
        artifact: the other one.
        tokens: windows [N, T].
        threads: of one operator.
    """
    stream = stream_map(reference, artifact)
    pairs = zip(
        observe(reference, tokens, threads=threads),
        observe(artifact, tokens, threads=threads),
        strict=True,
    )
    found = [signal_to_noise(ours.state, theirs.state, stream) for ours, theirs in pairs]
    return found[1:]  # in front of the first layer nothing has been rounded
