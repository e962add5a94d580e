# SPDX-License-Identifier: Apache-2.0
"""The model that an artifact should be, exported anew from its reference: ``validate --bisect``.

Two comparisons, each a site at a time (the embedding, every layer, the head) and each site started
from Hugging Face's own residual state, so that nothing spreads:

* the rotated float model against Hugging Face: is what is exported the model?
* every tensor of the artifact against the same tensor of the new export: is the artifact what was
  exported? Same names, same operators, so that only another machine's last bits may differ.

Weights that were calibrated cannot be found again without the text. Such an artifact is compared
with a new export that rounds to nearest, by the site, and may deviate from the float model twice as
far as that does.
"""

import math
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from quarot_onnx import artifacts
from quarot_onnx.errors import GateError, UsageError
from quarot_onnx.export.architectures import dimensions
from quarot_onnx.pipeline import Rewritten, rewrite
from quarot_onnx.recipe import (
    Activations,
    KvCache,
    Learning,
    Outliers,
    Recipe,
    Smoothing,
    Weights,
)
from quarot_onnx.runtime import load_session, position_ids
from quarot_onnx.sections import between, cut
from quarot_onnx.transforms import Transforms
from quarot_onnx.validate.closeness import relative_error
from quarot_onnx.validate.subject import Subject
from quarot_onnx.validate.verdict import Finding, Skip

Array = NDArray[Any]

_TOKENS = 24  # of each row; a fault in a weight shows in every token
_ROUNDED = 0.01  # relative: codes that round the other way after another machine's last bit


@dataclass(frozen=True)
class Site:
    """How far one part of the model is off, each part started from Hugging Face's state.

    Attributes:
        name: ``embedding``, ``layers.0`` and so on, ``head``.
        to_hugging_face: of the rotated float model: relative L2 of the state behind the site.
        rounding: of the new quantized export, against the float model, relative to what the site
            adds to the state; 0 for a float recipe.
        to_export: of the artifact's furthest tensor, against the new export's.
    """

    name: str
    to_hugging_face: float
    rounding: float
    to_export: float


@dataclass(frozen=True)
class Departure:
    """Where an artifact first leaves its reference.

    Attributes:
        site: the part of the model.
        tensor: the first tensor, in the order of computation, that is off.
        error: relative L2; NaN where the tensor is not finite or is missing.
        allowed: what would have passed.
        detail: what its node reads that is off, too.
    """

    site: str
    tensor: str
    error: float
    allowed: float
    detail: str


@dataclass(frozen=True)
class Bisection:
    """The sites up to the first departure.

    Attributes:
        sites: in order.
        departure: None for an artifact that follows its reference to the end.
        is_calibrated: whether tensors could not be compared one by one.
    """

    sites: tuple[Site, ...]
    departure: Departure | None
    is_calibrated: bool

    def as_json(self) -> dict[str, Any]:
        """For ``--json``; numbers that are not finite become null."""
        content = asdict(self)
        for entry in [*content["sites"], content["departure"] or {}]:
            for key, value in entry.items():
                if isinstance(value, float) and not math.isfinite(value):
                    entry[key] = None
        return content

    def require_followed(self, artifact: Path) -> None:
        """Nothing, for an artifact that follows its reference.

        Raises:
            GateError: names the site and the tensor.
        """
        if (found := self.departure) is not None:
            raise GateError(
                f"{artifact}: leaves its reference at {found.site}, tensor {found.tensor}: "
                f"{found.detail}; the artifact must not be used, export again"
            )


def bisect(subject: Subject) -> Bisection:
    """Walk the artifact and its twin until they part.

    Raises:
        InputError: the artifact or the reference is damaged.
        UsageError: no reference.
    """
    if subject.reference is None:
        raise UsageError("--bisect: needs the model it was exported from; give --reference")
    twin = Twin(subject)
    sites: list[Site] = []
    for site, departure in twin.walk():
        sites.append(site)
        if departure is not None:
            return Bisection(tuple(sites), departure, twin.is_calibrated)
    return Bisection(tuple(sites), None, twin.is_calibrated)


# --- Stages of families that no PyTorch model of the codes is written for -------------------------


def check_initializers(subject: Subject) -> Finding:
    """Fails on an initializer that is not the one that a new export of the reference has."""
    twin = _uncalibrated(subject)
    worst, where, count = 0.0, "", 0
    for name, found, wanted in twin.initializers():
        allowed = 2 * subject.epsilon if wanted.dtype.kind == "f" else _ROUNDED
        error = _error(found, wanted) / allowed
        count += 1
        if not error <= worst:
            worst, where = error, name
    detail = f"{count} tensors against a new export; furthest is {where or 'none'}"
    return Finding("error over what another machine explains", worst, 1.0, detail)


def check_sites(subject: Subject) -> Finding:
    """Fails on a layer, an embedding or a head that computes something else than a new export's.

    The new export's float model is compared with Hugging Face's, layer by layer.
    """
    found = bisect(subject)
    if (departure := found.departure) is not None:
        error, allowed = departure.error, departure.allowed
        detail = f"{departure.site}, tensor {departure.tensor}: {departure.detail}"
        return Finding("relative error of a tensor", error, allowed, detail, False)
    judged = max(site.to_hugging_face for site in found.sites)
    detail = (
        f"{len(found.sites)} parts against a new export, whose float parts are within "
        f"{judged:.2g} of Hugging Face's"
    )
    return Finding(
        "relative error of a tensor", max(s.to_export for s in found.sites), None, detail
    )


def _uncalibrated(subject: Subject) -> "Twin":
    if _without_search(subject.recipe).is_calibrated:
        raise Skip("the recipe looked at text, without which its weights cannot be found again")
    return Twin(subject)


def _without_search(recipe: Recipe) -> Recipe:
    """The recipe without what was found by looking at text: the artifact's transforms say it."""
    rotations = recipe.rotations.model_copy(update={"candidates": 1})
    return recipe.model_copy(
        update={"rotations": rotations, "learning": Learning(), "smoothing": Smoothing()}
    )


class Twin:
    """A new export of an artifact's reference, beside the artifact.

    Attributes:
        is_calibrated: whether the artifact's weights were found with text, which the twin's are
            not.
    """

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        recipe = _without_search(subject.recipe)
        self._given = Transforms.of_artifact(
            subject.artifact, dimensions(subject.checkpoint.config)
        )
        self.is_calibrated = recipe.is_calibrated
        float_recipe = recipe.model_copy(
            update={
                "weights": Weights(bits=16),
                "activations": Activations(bits=16),
                "kv_cache": KvCache(bits=16),
                "outliers": Outliers(),
            }
        )
        self._float = self._rewrite(float_recipe)
        self._quantized = self._float
        if recipe.is_lossy:
            self._quantized = self._rewrite(self._rounding(recipe))

    def _rewrite(self, recipe: Recipe) -> Rewritten:
        subject = self._subject
        return rewrite(subject.checkpoint, recipe, subject.dtype, transforms=self._given)

    def _rounding(self, recipe: Recipe) -> Recipe:
        """The recipe itself, or one with the same bits that needs no text."""
        if not self.is_calibrated:
            return recipe
        return recipe.model_copy(
            update={
                "weights": recipe.weights.uncalibrated(),
                "activations": recipe.activations.uncalibrated(),
                "kv_cache": recipe.kv_cache.uncalibrated(),
                "outliers": Outliers(),
            }
        )

    @cached_property
    def _values(self) -> dict[str, ir.Value]:
        """The artifact's values by name."""
        model = self._artifact
        computed = (value for node in model.graph for value in node.outputs)
        return {value.name or "": value for value in (*model.graph.inputs, *computed)}

    @cached_property
    def _artifact(self) -> ir.Model:
        from quarot_onnx.reference import load_graph  # noqa: PLC0415  # imports torch

        return load_graph(self._subject.artifact)

    def initializers(self) -> Iterator[tuple[str, Array, Array]]:
        """Name, the artifact's numbers and the new export's, of each initializer of the latter.

        Raises:
            GateError: the artifact lacks one, or has it in another shape.
        """
        held = self._artifact.graph.initializers
        for name, value in self._quantized.model.graph.initializers.items():
            found = held[name].const_value if name in held else None
            assert value.const_value is not None
            wanted = value.const_value.numpy()
            if found is None or tuple(found.shape.numpy()) != wanted.shape:
                shape = "missing" if found is None else f"of shape {found.shape}"
                raise GateError(f"initializer {name} is {shape}; it should be {wanted.shape}")
            yield name, found.numpy(), wanted

    def walk(self) -> Iterator[tuple[Site, Departure | None]]:
        """Every site in order, with where the artifact parts from the reference in it, if it does.

        Raises:
            InputError: a section of the artifact does not run.
        """
        ids = np.ascontiguousarray(self._subject.ids[:, :_TOKENS])
        states, logits = self._subject.judge.states(ids)
        ends: list[Array] = [*(self._float.state(x.astype(np.float64)) for x in states), logits]
        names = ["embedding", *(f"layers.{i}" for i in range(len(states) - 1)), "head"]
        for index, (name, wanted) in enumerate(zip(names, ends, strict=True)):
            start = ends[index - 1].astype(np.float32) if index else None
            yield self._site(index, name, ids, start, wanted)

    def _site(
        self, index: int, name: str, ids: Array, start: Array | None, wanted: Array
    ) -> tuple[Site, Departure | None]:
        float_start, float_end = _border(self._float, index)
        (exact,) = _run(self._float.model, float_start, [float_end], ids, start)
        to_judge = relative_error(exact, wanted)
        tolerance = self._subject.tolerance
        if not to_judge <= tolerance:
            detail = f"the rotated float model is off by {to_judge:.2g} from Hugging Face's"
            site = Site(name, to_judge, 0.0, 0.0)
            return site, Departure(name, float_end.name or "", to_judge, tolerance, detail)
        first, last = _border(self._quantized, index)
        starts = [] if first is None else [first]
        nodes = between(self._quantized.model.graph, starts, [last])
        tensors = [last] if self.is_calibrated else [v for node in nodes for v in node.outputs]
        missing = next((v for v in (*starts, *tensors) if v.name not in self._values), None)
        if missing is not None:
            detail = "the artifact's graph has no such tensor; it was altered, or another version's"
            site = Site(name, to_judge, 0.0, math.nan)
            return site, Departure(name, missing.name or "", math.nan, 0.0, detail)
        held = [self._values[v.name or ""] for v in tensors]
        held_start = None if first is None else self._values[first.name or ""]
        found = _run(self._artifact, held_start, held, ids, start)
        expected = _run(self._quantized.model, first, tensors, ids, start)
        before = np.zeros(()) if start is None or name == "head" else start
        size = float(np.linalg.norm(exact - before)) or 1.0
        end = tensors.index(last)
        rounding = float(np.linalg.norm(expected[end] - exact)) / size
        if self.is_calibrated:
            error = float(np.linalg.norm(found[end] - exact)) / size
            site = Site(name, to_judge, rounding, error)
            allowed = 2 * rounding + tolerance
            if error <= allowed:
                return site, None
            detail = f"off by {error:.2g} from the float model; rounding explains {rounding:.2g}"
            return site, Departure(name, last.name or "", error, allowed, detail)
        errors = [_error(a, b) for a, b in zip(found, expected, strict=True)]
        site = Site(name, to_judge, rounding, max(errors, key=_nan_is_largest))
        allowed = _ROUNDED if self._subject.recipe.is_lossy else tolerance
        for value, error in zip(tensors, errors, strict=True):
            if not error <= allowed:
                detail = self._explain(value, error)
                return site, Departure(name, value.name or "", error, allowed, detail)
        return site, None

    def _explain(self, value: ir.Value, error: float) -> str:
        """What the node that computes `value` reads that is not as exported."""
        node = value.producer()
        assert node is not None
        parts = [f"{node.op_type} is off by {error:.2g}"]
        held = self._artifact.graph.initializers
        for source in node.inputs:
            if source is None or source.const_value is None:
                continue
            mine = held.get(source.name or "")
            if mine is None or mine.const_value is None:
                parts.append(f"initializer {source.name} is missing")
                continue
            off = _error(mine.const_value.numpy(), source.const_value.numpy())
            if off != 0:
                parts.append(f"initializer {source.name} is off by {off:.2g}")
        if len(parts) == 1:
            parts.append("what it reads is as exported, so the node itself was altered")
        return ", ".join(parts)


def _nan_is_largest(error: float) -> float:
    return math.inf if math.isnan(error) else error


def _error(found: Array, wanted: Array) -> float:
    """Relative L2; NaN for another shape."""
    if found.shape != wanted.shape:
        return math.nan
    return relative_error(found.astype(np.float64), wanted.astype(np.float64))


def _border(model: Rewritten, index: int) -> tuple[ir.Value | None, ir.Value]:
    """Where site `index` starts and ends."""
    states = model.decoder.states
    start = None if index == 0 else states[index - 1]
    if index < len(states):
        return start, states[index]
    return start, next(v for v in model.model.graph.outputs if v.name == "logits")


def _run(
    model: ir.Model, start: ir.Value | None, ends: list[ir.Value], ids: Array, state: Array | None
) -> list[Array]:
    """`ends` for a prefill of `ids` [B, S], from the residual `state`, by ONNX Runtime."""
    batch, length = ids.shape
    mask = np.ones_like(ids)
    feeds: dict[str, Array] = {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": position_ids(mask, length),
    }
    if start is not None and state is not None:
        feeds[start.name or ""] = state
    part = cut(model, ends, start)
    for value in part.graph.inputs:
        if (name := value.name or "") not in feeds:
            feeds[name] = _empty_cache(value, batch)
    with tempfile.TemporaryDirectory(prefix="quarot-onnx-") as own:
        artifacts.save_model(part, Path(own))
        session = load_session(Path(own) / artifacts.MODEL, threads=1)
        names = {v.name or "" for v in part.graph.inputs}
        results = session.run(
            [v.name for v in ends], {k: v for k, v in feeds.items() if k in names}
        )
    return [np.asarray(result) for result in results]


def _empty_cache(value: ir.Value, batch: int) -> Array:
    assert value.shape is not None
    assert value.dtype is not None
    shape: Mapping[int, Any] = dict(enumerate(value.shape))
    return np.zeros((batch, shape[1], 0, shape[3]), value.dtype.numpy())
