# SPDX-License-Identifier: Apache-2.0
"""Clip ratios by the perplexity of the whole model: gradual binary search (arXiv 2504.13989).

Site after site, in the order of computation, the clip ratio that gives the quantized model the
least loss on the calibration text is searched by halving an interval; sites that were searched
keep their clip, later ones have the clip they came with. A layer's states are computed once, so a
trial runs from the site's layer to the logits, in one session in which the clips are inputs.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir

from quarot_onnx import ops
from quarot_onnx.calibration.journal import Journal
from quarot_onnx.calibration.layers import Compute, Float32, Progress, walk
from quarot_onnx.calibration.tokens import Calibration
from quarot_onnx.decoder import Decoder
from quarot_onnx.rounding import Quantizer

LOW, HIGH = 0.25, 1.0
"""Where a clip is searched: 3 bits of a Gaussian row of 10^5 features want 0.4."""

_STEPS = 4  # halvings: the last trials are 0.02 apart
_LOGITS_AT_ONCE = 1 << 24  # 64 MB in float32


def minimum(
    loss: Callable[[float], float], start: float, known: float | None = None
) -> tuple[float, float]:
    """The best clip that a binary search tries, and its loss; `start` is tried, too.

    Each step tries the middles of both halves of the interval and keeps the better half. The loss
    of `start` may be `known`.
    """
    tried = {start: loss(start) if known is None else known}
    low, high = LOW, HIGH
    for _ in range(_STEPS):
        middle = (low + high) / 2
        left, right = (low + middle) / 2, (middle + high) / 2
        for clip in (left, right):
            tried[clip] = loss(clip)
        low, high = (low, middle) if tried[left] <= tried[right] else (middle, high)
    best = min(tried, key=lambda clip: tried[clip])
    return best, tried[best]


def search_clips(
    decoder: Decoder,
    calibration: Calibration,
    logits: ir.Value,
    quantizers: Sequence[Quantizer],
    journal: Journal,
    progress: Progress | None = None,
) -> Iterator[tuple[Quantizer, float, float]]:
    """Set each quantizer's clip, in order; gives the quantizer, its old clip and the loss in nats.

    Args:
        decoder: handles into the quantized graph.
        calibration: on which the loss is measured.
        logits: the graph's output.
        quantizers: in the order of computation.
        journal: keeps the clip of every site; those that it has are not searched again.
        progress: called after each layer.
    """
    by_layer: dict[int, list[Quantizer]] = {}
    for quantizer in quantizers:
        by_layer.setdefault(quantizer.site.layer, []).append(quantizer)
    for run in walk(decoder, calibration, progress=progress):
        searched = by_layer.get(run.layer.index, [])
        before = {each: each.clip_ratio for each in searched}
        least = None
        while searched and (found := journal.record(_part(searched[0]))) is not None:
            quantizer, *searched = searched
            quantizer.set_clip_ratio(found["clip_ratio"])
            least = float(found["loss"])
            yield quantizer, before[quantizer], least
        if not searched:
            continue
        with run.rest(logits, partial(_take_clips, quantizers=searched)) as compute:
            for quantizer in searched:
                loss = partial(_loss, compute, calibration)
                # With the clip that it has, the model is the one that the last site ended with.
                least = _search(quantizer, searched, loss, least)
                found = {"clip_ratio": quantizer.clip_ratio, "loss": least}
                journal.finish(_part(quantizer), found)
                yield quantizer, before[quantizer], least


def _part(quantizer: Quantizer) -> str:
    """Of the journal."""
    return f"clip_ratio{quantizer.site.name}"


def _search(
    quantizer: Quantizer,
    beside: Sequence[Quantizer],
    loss: Callable[[Mapping[str, float]], float],
    known: float | None,
) -> float:
    """Set the clip of one of the quantizers of a layer; the loss with it.

    `known` is the loss with the clip that the quantizer has, where that was measured.
    """
    clips = {_input_of(each): each.clip_ratio for each in beside}
    start = quantizer.clip_ratio
    best, least = minimum(lambda clip: loss({**clips, _input_of(quantizer): clip}), start, known)
    quantizer.set_clip_ratio(best)
    return least


def _input_of(quantizer: Quantizer) -> str:
    return f"{quantizer.site.name}/clip_ratio"


def _take_clips(model: ir.Model, quantizers: Sequence[Quantizer]) -> None:
    """Make the clip ratio of each quantizer an input of the graph."""
    inputs = {each.node.name or "": _input_of(each) for each in quantizers}
    for node in model.graph:
        name = inputs.get(node.name or "")
        if name is None:
            continue
        function = ops.function(node.op_type, as_input="clip_ratio")
        model.functions.setdefault(function.identifier(), function)
        node.op_type = function.name
        node.attributes.pop("clip_ratio")
        clip = ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([]))
        model.graph.inputs.append(clip)
        node.resize_inputs(len(node.inputs) + 1)
        node.replace_input_with(len(node.inputs) - 1, clip)


def _loss(compute: Compute, calibration: Calibration, clips: Mapping[str, float]) -> float:
    """The mean negative log-likelihood of the text, in nats."""
    more: dict[str, Any] = {name: np.array(clip, np.float32) for name, clip in clips.items()}
    tokens = calibration.tokens
    total, first, step = 0.0, 0, 1
    while first < len(tokens):
        rows = slice(first, min(first + step, len(tokens)))
        (logits,) = compute(rows, more)
        total += _negative_log_likelihood(logits[:, :-1], tokens[rows, 1:])
        first = rows.stop
        step = max(1, _LOGITS_AT_ONCE // logits[0].size)
    return total / tokens[:, 1:].size


def _negative_log_likelihood(logits: Float32, targets: np.ndarray[Any, Any]) -> float:
    """The sum over targets [B, S] under logits [B, S, V]."""
    largest = logits.max(axis=-1, keepdims=True)
    total = np.log(np.exp(logits - largest).sum(axis=-1, dtype=np.float64)) + largest[..., 0]
    chosen = np.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return float(np.sum(total - chosen))
