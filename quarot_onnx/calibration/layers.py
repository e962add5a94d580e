# SPDX-License-Identifier: Apache-2.0
"""A decoder shown to a calibration one layer at a time, on the graph as the passes have left it.

A layer is the part of the graph between two states of the residual stream. It is cut out, its lazy
weights are written to a temporary directory, and ONNX Runtime runs it on the stored states: memory
holds one layer, one batch of windows and, where they are small, the states. What a pass has put
into the graph (online Hadamards, codes, quantized activations) is what runs.
"""

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from quarot_onnx import artifacts, ops
from quarot_onnx.calibration.tokens import Calibration
from quarot_onnx.decoder import Decoder, Layer, Linear
from quarot_onnx.errors import InputError
from quarot_onnx.runtime import load_session
from quarot_onnx.sections import between, cut

Float32 = NDArray[np.float32]
Progress = Callable[[int, int], None]
"""Called with the layers done and the layers in all."""

Edit = Callable[[ir.Model], None]
"""Changes a part of the graph, which is a copy, before it runs."""

Compute = Callable[[slice, Mapping[str, Float32]], list[Float32]]
"""The outputs of a part of the graph for a slice of the windows and more inputs by name."""

HELD_BYTES = 256 << 20
"""States larger than this are streamed to disk; a batch has as many windows as fit below it."""

_RUN_BYTES = 32 << 20  # activations of the windows of a batch that ONNX Runtime is given at once
_WIDEST = 4  # activations of a layer, in multiples of its widest linear, alive at once


def walk(
    decoder: Decoder,
    calibration: Calibration,
    *,
    directory: Path | None = None,
    progress: Progress | None = None,
) -> Iterator["LayerRun"]:
    """Each layer with the states that reach it, first to last.

    When the next layer is asked for, the states go through this one as its nodes are then: a
    caller that has quantized it in between calibrates the later layers on quantized outputs, as
    QuaRot's and GPTQ's code do, and one that has not stays on the float model.

    Args:
        decoder: handles into a valid graph.
        calibration: the tokens.
        directory: for cut layers and streamed states; a temporary one where None.
        progress: called after each layer.

    Raises:
        InputError: a token is outside the vocabulary, or the weights are damaged.
        ResourceError: no space for a layer.
        UnsupportedModelError: ONNX Runtime has no kernel for a node.
    """
    _require_vocabulary(decoder, calibration)
    with _scratch(directory) as store:
        states = _Runner(decoder, calibration, store, None).states(decoder.states[0], "states.0")
        for layer in decoder.layers:
            run = LayerRun(_Runner(decoder, calibration, store, states), layer)
            yield run
            if progress is not None:
                progress(layer.index + 1, len(decoder.layers))
            if layer.index + 1 < len(decoder.layers):
                states = run.following()


@contextmanager
def _scratch(parent: Path | None) -> Iterator[Path]:
    """A directory that is gone afterwards, also where a walk is dropped before its end."""
    directory = Path(tempfile.mkdtemp(prefix="quarot-onnx-", dir=parent))
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _require_vocabulary(decoder: Decoder, calibration: Calibration) -> None:
    tokens, vocabulary = calibration.tokens, decoder.embedding_weights[0].sizes[0]
    outside = tokens[(tokens < 0) | (tokens >= vocabulary)]
    if outside.size:
        raise InputError(
            f"{calibration.source}: token {outside[0]} is outside the vocabulary of {vocabulary}; "
            "use the model's own tokenizer"
        )


class LayerRun:
    """One layer and the states that reach it.

    Attributes:
        layer: its handles.
    """

    def __init__(self, runner: "_Runner", layer: Layer) -> None:
        self.layer = layer
        self._runner = runner
        self._state = runner.decoder.states[layer.index]

    @property
    def sites(self) -> dict[str, ir.Value]:
        """What a quantizer would round, by name, in the order of computation.

        Inputs of linears by the linear's module (``/model/layers.0/mlp/down_proj``); linears that
        share an input name the same value. New keys and values, as they enter the cache, by
        `Attention.cache_site`.
        """
        attention = self.layer.attention
        found = {linear.module: linear.x for linear in self.layer.linears}
        for append, kind in ((attention.key_append, "key"), (attention.value_append, "value")):
            new = append.inputs[0 if append.domain == ops.DOMAIN else 1]
            assert new is not None
            found[attention.cache_site(kind)] = new
        return found

    def capture(self, values: Mapping[str, ir.Value]) -> Iterator[dict[str, Float32]]:
        """`values` of this layer by name, a batch of windows at a time.

        Each is [tokens, features]; keys and values of the cache are [tokens, kv_heads * head_dim].
        Only what the values depend on is computed.
        """
        distinct = {value.name or "": value for value in values.values()}
        for _, outputs in self._runner.run(list(distinct.values()), self._state):
            found = dict(zip(distinct, map(_by_token, outputs), strict=True))
            yield {name: found[value.name or ""] for name, value in values.items()}

    def levels(self) -> list[tuple[Linear, ...]]:
        """The linears by depth: those of a level read nothing that one of the same level computes.

        Of Llama: q, k and v; o; gate and up; down.
        """
        linears = {linear.node: linear for linear in self.layer.linears}
        depth: dict[ir.Value, int] = {}
        levels: dict[int, list[Linear]] = {}
        for node in between(
            self._runner.graph, [self._state], [x.output for x in linears.values()]
        ):
            own = max((depth.get(v, 0) for v in node.inputs if v is not None), default=0)
            if node in linears:
                levels.setdefault(own, []).append(linears[node])
                own += 1
            depth.update(dict.fromkeys(node.outputs, own))
        return [tuple(levels[level]) for level in sorted(levels)]

    @contextmanager
    def rest(self, end: ir.Value, edit: Edit) -> Iterator[Compute]:
        """`end`, perhaps behind later layers, of windows and of the inputs that `edit` adds."""
        with self._runner.opened([end], self._state, edit) as compute:
            yield compute

    def following(self) -> Float32:
        """The states [windows, length, hidden_size] behind the layer as its nodes are now."""
        index = self.layer.index + 1
        return self._runner.states(
            self._runner.decoder.states[index], f"states.{index}", self._state
        )


@dataclass(frozen=True)
class _Runner:
    """Runs parts of a decoder's graph on a calibration.

    Attributes:
        decoder: handles into the graph.
        calibration: the tokens.
        directory: for what does not stay in memory.
        stored: states [windows, length, hidden_size] to start from; None starts from the tokens.
    """

    decoder: Decoder
    calibration: Calibration
    directory: Path
    stored: Float32 | None

    @property
    def graph(self) -> ir.Graph:
        return self.decoder.model.graph

    def states(self, end: ir.Value, name: str, start: ir.Value | None = None) -> Float32:
        """The values of `end` for every window, in memory or in a file `name`."""
        windows, length = self.calibration.tokens.shape
        shape = (windows, length, self.decoder.hidden_size)
        if 4 * windows * length * self.decoder.hidden_size > HELD_BYTES:
            path = self.directory / name
            artifacts.require_space(path, int(4 * np.prod(shape)))
            result: Float32 = np.memmap(path, np.float32, "w+", shape=shape)
            for earlier in self.directory.glob("states.*"):
                if earlier != path:
                    earlier.unlink()  # its memory map lives until it has been read
        else:
            result = np.empty(shape, np.float32)
        for rows, (values,) in self.run([end], start):
            result[rows] = values
        return result

    def run(
        self, ends: list[ir.Value], start: ir.Value | None
    ) -> Iterator[tuple[slice, list[Float32]]]:
        """`ends` for a batch of windows at a time, computed from the stored values of `start`."""
        with self.opened(ends, start) as compute:
            for rows in self._batches():
                parts = [compute(part, {}) for part in _parts(rows, _RUN_BYTES // self._bytes)]
                yield rows, [np.concatenate(each) for each in zip(*parts, strict=True)]

    @contextmanager
    def opened(
        self, ends: list[ir.Value], start: ir.Value | None, edit: Edit | None = None
    ) -> Iterator[Compute]:
        """A function of windows, and of the inputs that `edit` adds to the part of the graph."""
        if start is not None and any(end is start for end in ends):
            raise ValueError("an end is the start")
        with _scratch(self.directory) as directory:
            model = cut(self.decoder.model, ends, start)
            names = [value.name or "" for value in model.graph.outputs]
            cache = {v.name or "": v for v in model.graph.inputs if len(v.shape or ()) == 4}
            if edit is not None:
                edit(model)
            inputs = [value.name or "" for value in model.graph.inputs]
            artifacts.require_space(directory / artifacts.DATA, artifacts.stored_bytes(model))
            artifacts.save_model(model, directory)
            session = load_session(directory / artifacts.MODEL)

            def compute(rows: slice, more: Mapping[str, Float32]) -> list[Float32]:
                feeds = {**self._feeds(rows, start, cache), **more}
                results: list[Float32] = session.run(names, {name: feeds[name] for name in inputs})
                return results

            yield compute

    @property
    def _bytes(self) -> int:
        """Of the activations of a window that are alive at once."""
        length = self.calibration.tokens.shape[1]
        layer = self.decoder.layers[0]
        widest = max(max(x.in_features, x.out_features) for x in layer.linears)
        held: int = 4 * length * (_WIDEST * widest + layer.attention.num_heads * length)
        return held

    def _batches(self) -> Iterator[slice]:
        return _parts(slice(0, len(self.calibration.tokens)), HELD_BYTES // self._bytes)

    def _feeds(
        self, rows: slice, start: ir.Value | None, cache: Mapping[str, ir.Value]
    ) -> dict[str, NDArray[Any]]:
        """One batch of windows behind empty caches, which stay empty."""
        tokens = self.calibration.tokens[rows]
        batch, length = tokens.shape
        feeds: dict[str, NDArray[Any]] = {
            "input_ids": tokens,
            "attention_mask": np.ones((batch, length), np.int64),
            "position_ids": np.tile(np.arange(length, dtype=np.int64), (batch, 1)),
        }
        for name, value in cache.items():
            assert value.shape is not None
            assert value.dtype is not None
            shape = (batch, value.shape[1], 0, value.shape[3])
            feeds[name] = np.zeros(shape, value.dtype.numpy())  # type: ignore[arg-type]
        if start is not None and self.stored is not None:
            feeds[start.name or ""] = np.ascontiguousarray(self.stored[rows])
        return feeds


def _parts(rows: slice, count: int) -> Iterator[slice]:
    """`rows` in parts of `count`, or of one."""
    step = max(1, count)
    for first in range(rows.start, rows.stop, step):
        yield slice(first, min(first + step, rows.stop))


def _by_token(value: Float32) -> Float32:
    """[windows, tokens, features] or [windows, heads, tokens, size] as [tokens, features]."""
    by_token = value.swapaxes(1, 2) if value.ndim == 4 else value
    leading = by_token.ndim - (2 if value.ndim == 4 else 1)
    tokens, features = by_token.shape[:leading], by_token.shape[leading:]
    return by_token.reshape(int(np.prod(tokens)), int(np.prod(features)))  # an expert may get none
