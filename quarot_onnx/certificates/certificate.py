# SPDX-License-Identifier: Apache-2.0
"""Certificates: how far each part of the model is from the float model after each equivalent pass.

The parts, or sites, are the embedding, every layer and the head. For each of them and each pass

    deviation = max over tokens of |f'(x Q) - f(x) Q| / |u|       u: what the site adds to x

where f is the float model's site in float64, f' the rewritten one in float64 or float32, x the
float model's own residual state (so that no site answers for another) and Q what the passes so far
have done to the residual stream. An exact rewrite deviates by rounding alone, so the bound is a
fixed multiple of the dtype's epsilon: a wrong sign or a forgotten transpose is caught in float64
however small it is beside the residual stream.

Every weight is computed once more for this, in float64 and one layer at a time.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from quarot_onnx.certificates.interpreter import Array, Section
from quarot_onnx.decoder import Decoder
from quarot_onnx.errors import GateError
from quarot_onnx.weights import ArraySource, Float64, Step, Weight

MULTIPLE = 2**10
"""The bound in units of the dtype's epsilon."""

_DTYPES: Mapping[str, Any] = {"float64": np.float64, "float32": np.float32}
_TOKENS = (2, 12)  # rows and their length
_LOGITS = 256  # columns of the head that are compared

Restate = Callable[[Float64], Float64]
"""The residual stream [..., hidden_size] after a pass, from the stream before it."""


@dataclass(frozen=True)
class Certificate:
    """The deviations after one pass in one dtype.

    Attributes:
        dtype: float64 or float32.
        bound: `MULTIPLE` epsilons of the dtype.
        deviations: by site: ``embedding``, ``layers.0`` and so on, ``head``.
    """

    dtype: str
    bound: float
    deviations: Mapping[str, float] = field(default_factory=dict)

    @property
    def worst(self) -> tuple[str, float]:
        """The site that deviates most, and by how much."""
        return max(self.deviations.items(), key=lambda item: item[1])

    @property
    def holds(self) -> bool:
        """Whether every site is within the bound; false for NaN."""
        return all(deviation <= self.bound for deviation in self.deviations.values())

    def as_json(self) -> dict[str, Any]:
        """For the manifest; three digits of each deviation."""
        site, deviation = self.worst
        return {
            "dtype": self.dtype,
            "bound": self.bound,
            "worst": float(f"{deviation:.3g}"),
            "worst_site": site,
            "deviations": {name: float(f"{d:.3g}") for name, d in self.deviations.items()},
        }


@dataclass(frozen=True)
class _Stage:
    """The sites as one pass left them.

    Attributes:
        name: the pass.
        sections: the embedding, the layers and the part of the head before its matrix.
        states: names of the residual states, in order: the start of each site but the first.
        head: weight and bias of the head.
        restate: of every pass so far.
    """

    name: str
    sections: tuple[Section, ...]
    states: tuple[str, ...]
    head: tuple[Weight, Weight | None]
    restate: tuple[Restate, ...]

    def state(self, x: Float64) -> Float64:
        """The float model's residual stream as it is here."""
        for restate in self.restate:
            x = restate(x)
        return x


class Certifier:
    """Records the model after each equivalent pass and measures all of them in one sweep.

    Recording keeps nodes and lazy weights only; `certify` computes.
    """

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._feeds = _prefill(decoder)  # now: the cache's inputs change when it is quantized
        self._restate: list[Restate] = []
        self._stages = [self._stage("")]

    def record(self, name: str, restate: Restate | None) -> None:
        """The pass `name` has run; it turned the residual stream x into ``restate(x)``."""
        if restate is not None:
            self._restate.append(restate)
        self._stages.append(self._stage(name))

    def _stage(self, name: str) -> _Stage:
        decoder = self._decoder
        graph, head = decoder.model.graph, decoder.lm_head
        states = decoder.states
        ends = [*states, head.x]
        starts: list[list[ir.Value]] = [[], *([state] for state in states)]
        sections = tuple(
            Section.cut(graph, start, [end]) for start, end in zip(starts, ends, strict=True)
        )
        bias = head.bias
        held = (
            head.weight.derive(head.weight.name),
            None if bias is None else bias.derive(bias.name),
        )
        names = tuple(state.name or "" for state in states)
        return _Stage(name, sections, names, held, tuple(self._restate))

    def certify(self) -> dict[str, tuple[Certificate, ...]]:
        """The certificates of every recorded pass, by its name.

        Raises:
            GateError: a site is beyond its bound in float64: the pass has changed the model.
            InputError: a weight is damaged.
        """
        found = {
            stage.name: {dtype: dict[str, float]() for dtype in _DTYPES}
            for stage in self._stages[1:]
        }
        for site, stage, dtype, deviation in self._deviations():
            found[stage][dtype][site] = deviation
        certificates = {
            stage: tuple(
                Certificate(dtype, MULTIPLE * float(np.finfo(_DTYPES[dtype]).eps), deviations)
                for dtype, deviations in by_dtype.items()
            )
            for stage, by_dtype in found.items()
        }
        for stage, (exact, _) in certificates.items():
            if not exact.holds:
                site, deviation = exact.worst
                raise GateError(
                    f"{stage}: {site} deviates from the float model by {deviation:.2g} in float64, "
                    f"where rounding explains {exact.bound:.2g}; nothing was written, please report"
                    " this model, and export it without this rotation"
                )
        return certificates

    def _deviations(self) -> Iterator[tuple[str, str, str, float]]:
        """Site, pass, dtype and deviation, a site at a time."""
        original, *rewritten = self._stages
        x: Float64 = np.zeros(())
        count = len(original.sections)
        for index in range(count):
            weights = _Progressive()
            is_head = index == count - 1
            site = "embedding" if index == 0 else "head" if is_head else f"layers.{index - 1}"
            expected = self._run(original, index, x, np.float64, weights)
            for stage in rewritten:
                wanted = expected if is_head else stage.state(expected)
                before = stage.state(x) if index and not is_head else np.zeros(())
                size = np.linalg.norm(wanted - before, axis=-1) + np.finfo(np.float64).tiny
                for name, dtype in _DTYPES.items():
                    got = self._run(stage, index, x, dtype, weights)
                    error = np.linalg.norm(got - wanted, axis=-1)
                    yield site, stage.name, name, float((error / size).max())
            x = expected

    def _run(
        self, stage: _Stage, index: int, x: Float64, dtype: type, weights: "_Progressive"
    ) -> Array:
        """The end of site `index`, from the float model's residual state `x`."""
        start = {} if index == 0 else {stage.states[index - 1]: stage.state(x)}
        (end,) = stage.sections[index].run({**self._feeds, **start}, dtype, weights.read)
        if index < len(stage.sections) - 1:
            return end
        weight, bias = stage.head
        columns = slice(0, min(_LOGITS, weight.sizes[1]))
        logits = end @ _columns(weight, columns).astype(dtype)
        return logits if bias is None else logits + bias.float64()[columns].astype(dtype)


def _prefill(decoder: Decoder) -> dict[str, Array]:
    """Every input of the graph: random tokens after an empty cache."""
    batch, length = _TOKENS
    vocabulary = decoder.embedding_weights[0].sizes[0]
    feeds: dict[str, Array] = {
        "input_ids": np.random.default_rng(0).integers(0, vocabulary, _TOKENS),
        "attention_mask": np.ones(_TOKENS, np.int64),
        "position_ids": np.broadcast_to(np.arange(length), _TOKENS),
    }
    for layer in decoder.layers:
        attention = layer.attention
        for append in (attention.key_append, attention.value_append):
            past = append.inputs[0]
            assert past is not None
            shape = (batch, attention.num_kv_heads, 0, attention.head_dim)
            feeds[past.name or ""] = np.zeros(shape)
    return feeds


def _columns(weight: Weight, columns: slice) -> NDArray[np.float64]:
    """The columns of a head, which is too large to compute whole where no step mixes them."""
    if any(step.axis % 2 == 1 for step in weight.steps):
        return weight.float64()[:, columns]
    return weight.read((slice(0, weight.sizes[0]), columns))


class _Progressive:
    """Weights whose later versions continue from the earlier one's numbers."""

    def __init__(self) -> None:
        self._held: dict[str, tuple[tuple[Step, ...], Float64]] = {}

    def read(self, weight: Weight) -> Float64:
        """The numbers of `weight`, the same whatever was read before up to rounding."""
        steps, numbers = self._held.get(weight.name, ((), None))
        was_padded = numbers is not None and numbers.shape != weight.sizes
        if numbers is None or was_padded or weight.steps[: len(steps)] != steps:
            numbers = weight.float64()
        elif rest := weight.steps[len(steps) :]:
            continued = Weight(weight.name, ArraySource(numbers), weight.dtype)
            for step in rest:
                continued.compose(step.axis, step.apply)
            numbers = continued.float64()
        self._held[weight.name] = (weight.steps, numbers)
        return numbers
