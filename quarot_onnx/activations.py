# SPDX-License-Identifier: Apache-2.0
"""What quantization meets: the activations of a model before and after its rotations.

The float model is built twice, without and with the recipe's rotations, and run on a sample of text
with ONNX Runtime. What is observed is what a quantizer would round: the inputs of the linears, and
the new keys and values as they enter the cache. (QuaRot, figure 1.)
"""

import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common_passes
from numpy.typing import NDArray

from quarot_onnx import artifacts, ops
from quarot_onnx.decoder import Layer
from quarot_onnx.errors import InputError, UnsupportedModelError
from quarot_onnx.export.checkpoint import Checkpoint
from quarot_onnx.pipeline import rewrite
from quarot_onnx.recipe import Activations, KvCache, Recipe, Rotations, Weights
from quarot_onnx.runtime import load_session

Float32 = NDArray[np.float32]

SITES: Mapping[str, str] = {
    "qkv": "input of q, k and v",
    "o_proj": "input of o_proj",
    "gate_up": "input of gate and up",
    "down_proj": "input of down_proj",
    "keys": "keys entering the cache",
    "values": "values entering the cache",
}
"""Where a layer is observed, in the order of computation: name -> for a person."""

CACHED = frozenset({"keys", "values"})
"""Sites rounded per token and head, asymmetrically; the others are per token and symmetric."""

_BITS = 4
_HELD_BYTES = 256 << 20  # of activations in memory at once


@dataclass(frozen=True)
class Statistics:
    """How hard an activation is to round, as means over its quantization groups.

    A group shares one scale: a token of a linear's input, one head of a token of a key or a value.
    Groups that are all zero are left out.

    Attributes:
        max_over_rms: max|x| / rms(x); 1 for constant magnitude, √n for one outlier in n channels.
        max_over_median: max|x| / median|x|, over groups whose median is not zero.
        kurtosis: E[(x - μ)⁴] / E[(x - μ)²]², 3 for a Gaussian.
        snr_db: -10 log10 of the mean of Σ(x - quantized x)² / Σx², at 4 bits, in decibels; 6 dB are
            one bit.
    """

    max_over_rms: float
    max_over_median: float
    kurtosis: float
    snr_db: float


@dataclass(frozen=True)
class Surface:
    """One site of one layer, [tokens, channels], before and after rotation."""

    before: Float32
    after: Float32


@dataclass(frozen=True)
class Activation:
    """One site through all layers.

    Attributes:
        site: a key of `SITES`.
        group_size: channels that share a scale, without padding.
        before: without rotations, one entry per layer.
        after: with rotations, one entry per layer.
        surfaces: layer -> its values, for the layers that were asked for.
    """

    site: str
    group_size: int
    before: tuple[Statistics, ...]
    after: tuple[Statistics, ...]
    surfaces: Mapping[int, Surface]


def statistics(x: Float32, quantized: Callable[[Float32], Float32] | None = None) -> Statistics:
    """The statistics of x [groups, channels].

    Args:
        x: one quantization group per row.
        quantized: the values after rounding; by default symmetric, 4 bits, clip 0.9.
    """
    x = x.astype(np.float32)
    x = x[np.any(x != 0, axis=-1)]
    if not len(x):
        return Statistics(1.0, 1.0, 1.0, float("inf"))
    error = np.square((quantized or quantized_symmetric)(x) - x).mean(axis=-1, dtype=np.float64)
    magnitude = np.abs(x)
    peak = magnitude.max(axis=-1).astype(np.float64)
    power = np.square(x).mean(axis=-1, dtype=np.float64)
    centred = x - x.mean(axis=-1, keepdims=True)
    variance = np.square(centred).mean(axis=-1, dtype=np.float64)
    fourth = np.square(np.square(centred)).mean(axis=-1, dtype=np.float64)
    median = np.median(magnitude, axis=-1)
    typical, varied = median > 0, variance > 0
    noise = float(np.mean(error / power))
    return Statistics(
        max_over_rms=float(np.mean(peak / np.sqrt(power))),
        max_over_median=_mean(peak[typical] / median[typical], float("inf")),
        kurtosis=_mean(fourth[varied] / np.square(variance[varied]), 1.0),
        snr_db=-10 * math.log10(noise) if noise > 0 else float("inf"),
    )


def _mean(values: NDArray[np.floating[Any]], otherwise: float) -> float:
    return float(np.mean(values)) if values.size else otherwise


def quantized_symmetric(x: Float32, *, clip_ratio: float = 0.9) -> Float32:
    """The values that 4-bit symmetric codes of x [..., channels] stand for, one scale per row."""
    codes, scale = ops.quantize_int4(x, bits=_BITS, clip_ratio=clip_ratio)
    values: Float32 = (codes.astype(np.float32) - ops.ACTIVATION_ZERO_POINT) * scale
    return values


def quantized_asymmetric(x: Float32, *, clip_ratio: float = 0.95) -> Float32:
    """The values that 4-bit asymmetric codes of x [..., head_dim] stand for, one scale per row."""
    values: Float32 = ops.kv_fake_quantize(x, bits=_BITS, clip_ratio=clip_ratio)
    return values


def capture(
    checkpoint: Checkpoint,
    recipe: Recipe,
    token_ids: Sequence[int] | NDArray[np.integer[Any]],
    layers: Sequence[int] | None = None,
) -> dict[str, Activation]:
    """What the quantizers of `recipe` would meet on a text, before and after its rotations.

    "Before" is the Hugging Face model as it is. Both models run in float32, one after the other,
    from a temporary directory.

    Args:
        checkpoint: a Hugging Face directory.
        recipe: its rotations are applied; its bits are not.
        token_ids: a text, [tokens].
        layers: whose values to keep whole; None keeps the layer with the largest outliers before
            rotation. Statistics are of all layers in any case.

    Returns:
        A key of `SITES` -> what was seen there.

    Raises:
        InputError: no tokens, or one outside the vocabulary.
        UnsupportedModelError: a layer that the model does not have, or a refusal of the export.
        MissingDependencyError: ONNX Runtime is not installed.
    """
    tokens = np.asarray(token_ids, dtype=np.int64)
    if tokens.ndim != 1 or not tokens.size:
        raise InputError(
            f"token_ids: shape {list(tokens.shape)}; give at least one token, [tokens]"
        )
    rotated = recipe.model_copy(update=_FLOAT)
    plain = rotated.model_copy(update={"rotations": _NO_ROTATIONS})
    with _Observed(checkpoint, plain, tokens) as observed:
        if layers is None:
            before, kept = observed.measure(None)
        else:
            observed.require(layers)
            before, kept = observed.measure(frozenset(layers))
    with _Observed(checkpoint, rotated, tokens) as observed:
        after, kept_after = observed.measure(frozenset(kept))
    return {
        site: Activation(
            site,
            observed.group_sizes[site],
            tuple(layer[site] for layer in before),
            tuple(layer[site] for layer in after),
            {index: Surface(kept[index][site], kept_after[index][site]) for index in sorted(kept)},
        )
        for site in SITES
    }


_FLOAT = {
    "weights": Weights(bits=16),
    "activations": Activations(bits=16),
    "kv_cache": KvCache(bits=16),
}
_NO_ROTATIONS = Rotations(
    fold_norm_scale=False, r1="none", r2=False, heads=False, r3=False, r4=False
)


_ByLayer = dict[int, dict[str, Float32]]


class _Observed:
    """A float model whose only outputs are the activations of `SITES`."""

    def __init__(self, checkpoint: Checkpoint, recipe: Recipe, tokens: NDArray[np.int64]) -> None:
        self._tokens = tokens
        rewritten = rewrite(checkpoint, recipe, "float32")
        self._model, self._decoder = rewritten.model, rewritten.decoder
        vocabulary = self._decoder.embedding_weights[0].shape.numpy()[0]
        outside = tokens[(tokens < 0) | (tokens >= vocabulary)]
        if outside.size:
            raise InputError(
                f"token_ids: token {outside[0]} is outside the vocabulary of {vocabulary}; "
                "use the model's own tokenizer"
            )
        self._taps = [_taps(layer) for layer in self._decoder.layers]
        self._kv_heads = self._decoder.layers[0].attention.num_kv_heads
        self.group_sizes = {site: tap.group_size for site, tap in self._taps[0].items()}
        _expose(self._model, self._taps)

    def require(self, layers: Sequence[int]) -> None:
        """Refuse indices that are not layers."""
        for index in layers:
            if not 0 <= index < len(self._taps):
                raise UnsupportedModelError(
                    f"layer {index}: the model has {len(self._taps)} layers; "
                    f"give 0 to {len(self._taps) - 1}"
                )

    def __enter__(self) -> "_Observed":
        self._directory = tempfile.TemporaryDirectory(prefix="quarot-onnx-")
        try:
            directory = Path(self._directory.name)
            artifacts.require_space(directory / artifacts.DATA, artifacts.stored_bytes(self._model))
            artifacts.save_model(self._model, directory)
            self._session = load_session(directory / artifacts.MODEL)
        except BaseException:
            self._directory.cleanup()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        del self._session
        self._directory.cleanup()

    def measure(self, keep: frozenset[int] | None) -> tuple[list[dict[str, Statistics]], _ByLayer]:
        """Statistics of every layer and site, and the values of the layers to keep.

        With `keep` None these are the values of the layer with the largest outliers: the largest
        geometric mean over its sites of max/rms.
        """
        found: list[dict[str, Statistics]] = []
        kept: _ByLayer = {}
        worst = -np.inf
        for index, values in self._run():
            measured = {site: self._statistics(site, x) for site, x in values.items()}
            found.append(measured)
            outliers = sum(float(np.log(s.max_over_rms)) for s in measured.values())
            if keep is None and outliers > worst:
                worst, kept = outliers, {index: values}
            elif keep is not None and index in keep:
                kept[index] = values
        return found, kept

    def _statistics(self, site: str, x: Float32) -> Statistics:
        if site in CACHED:
            return statistics(x.reshape(-1, self.group_sizes[site]), quantized_asymmetric)
        return statistics(x)

    def _run(self) -> Iterator[tuple[int, dict[str, Float32]]]:
        """Each layer's activations; as many layers per run as fit `_HELD_BYTES`."""
        channels = sum(tap.channels for tap in self._taps[0].values())
        at_once = max(1, _HELD_BYTES // (4 * channels * self._tokens.size))
        feeds = self._feeds()
        for start in range(0, len(self._taps), at_once):
            taps = self._taps[start : start + at_once]
            names = [tap.name for layer in taps for tap in layer.values()]
            outputs = iter(self._session.run(names, feeds))
            for offset, layer in enumerate(taps):
                yield start + offset, {site: _by_token(next(outputs)) for site in layer}

    def _feeds(self) -> dict[str, NDArray[Any]]:
        """One batch of all tokens behind an empty cache."""
        feeds: dict[str, NDArray[Any]] = {}
        for value in self._model.graph.inputs:
            name = value.name or ""
            if name == "input_ids":
                feeds[name] = self._tokens[None]
            elif name == "attention_mask":
                feeds[name] = np.ones((1, self._tokens.size), np.int64)
            elif name == "position_ids":
                feeds[name] = np.arange(self._tokens.size, dtype=np.int64)[None]
            else:
                shape = (1, self._kv_heads, 0, self.group_sizes["keys"])
                feeds[name] = np.zeros(shape, np.float32)
        return feeds


@dataclass(frozen=True)
class _Tap:
    """Where a site is read: the value, its channels, and how many of them share a scale."""

    value: ir.Value | None
    channels: int
    group_size: int

    @property
    def name(self) -> str:
        return (self.value.name if self.value is not None else None) or ""


def _taps(layer: Layer) -> dict[str, _Tap]:
    attention, mlp = layer.attention, layer.mlps[0]  # one of the experts, read before grouping
    gate, down = mlp.readers[0], mlp.down
    q, k, v, o = attention.q, attention.k, attention.v, attention.o
    new_key, new_value = attention.key_append.inputs[1], attention.value_append.inputs[1]
    return {
        "qkv": _Tap(q.x, q.in_features, q.in_features),
        "o_proj": _Tap(o.x, o.in_features, o.in_features),
        "gate_up": _Tap(gate.source, gate.in_features, gate.in_features),
        "down_proj": _Tap(down.source, down.in_features, down.in_features),
        "keys": _Tap(new_key, k.out_features, attention.head_dim),
        "values": _Tap(new_value, v.out_features, attention.head_dim),
    }


def _expose(model: ir.Model, taps: list[dict[str, _Tap]]) -> None:
    """Make the activations of all layers the only outputs of `model`."""
    model.graph.outputs.clear()
    for layer in taps:
        model.graph.outputs.extend(tap.value for tap in layer.values() if tap.value is not None)
    common_passes.RemoveUnusedNodesPass()(model)


def _by_token(value: NDArray[Any]) -> Float32:
    """[1, tokens, channels] or [1, heads, tokens, head_dim] as [tokens, channels].

    Rows of experts are [rows, channels] already, a token's as often as it visits experts.
    """
    if value.ndim == 2:
        return np.asarray(value, np.float32)
    first = value[0] if value.ndim == 3 else value[0].swapaxes(0, 1)
    flat: Float32 = first.reshape(len(first), -1)
    return flat
