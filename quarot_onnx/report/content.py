# SPDX-License-Identifier: Apache-2.0
"""What stands on the page of an artifact; what is None or empty is left out."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from quarot_onnx.activations import Activation
from quarot_onnx.rotation import INPUTS, PLACES


@dataclass(frozen=True)
class ModelFacts:
    """What the model is, from its configuration.

    Attributes:
        name: for a person.
        architecture: ``model_type``.
        parameters: how many.
        dtype: of the float parts of the export.
    """

    name: str
    architecture: str
    layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocabulary_size: int
    parameters: int
    dtype: str

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], *, name: str, parameters: int, dtype: str
    ) -> "ModelFacts":
        """The facts in a Hugging Face ``config.json``."""
        from quarot_onnx.export.architectures import dimensions  # noqa: PLC0415  # for this only

        sizes = dimensions(config)
        return cls(
            name=name,
            architecture=config["model_type"],
            layers=sizes.num_layers,
            hidden_size=sizes.hidden_size,
            intermediate_size=sizes.feed_forwards[0].size,
            num_heads=sizes.num_heads,
            num_kv_heads=sizes.num_kv_heads,
            head_dim=sizes.head_dim,
            vocabulary_size=sizes.vocabulary_size,
            parameters=parameters,
            dtype=dtype,
        )


@dataclass(frozen=True)
class Perplexity:
    """Perplexities on one text, and the command that printed them.

    Attributes:
        quantized: of the artifact.
        float32: of the Hugging Face model.
        unrotated: of the same bits without rotations.
        folded: of the same bits with norm scales folded and no rotation.
        decoded: of the artifact, token by token through its cache.
        text: what was read, such as ``32 windows of 256 tokens``.
        command: prints these numbers.
    """

    quantized: float
    float32: float | None = None
    unrotated: float | None = None
    folded: float | None = None
    decoded: float | None = None
    text: str = ""
    command: str = ""

    @property
    def damage_removed(self) -> float | None:
        """1 - log(quantized / float32) / log(unrotated / float32), where all are known."""
        if self.float32 is None or self.unrotated is None:
            return None
        damage = math.log(self.unrotated / self.float32)
        if not (0 < damage < math.inf and math.isfinite(self.quantized)):
            return None
        return 1 - math.log(self.quantized / self.float32) / damage


@dataclass(frozen=True)
class Size:
    """Bytes before and after.

    Attributes:
        before: unquantized, in bytes: weights in the export's float dtype, the cache in float32.
        after: as the artifact holds it, in bytes.
        bits_per_weight: of the linears of the layers, with their scales; for weights on disk.
        command: prints these numbers.
    """

    before: int
    after: int
    bits_per_weight: float | None = None
    command: str = ""

    @property
    def ratio(self) -> float:
        """How many times smaller."""
        return self.before / self.after


Status = Literal["passed", "failed", "skipped"]


@dataclass(frozen=True)
class Stage:
    """One stage of the validation; `value` and `threshold` where it measures something."""

    name: str
    status: Status
    detail: str = ""
    value: float | None = None
    threshold: float | None = None


@dataclass(frozen=True)
class Validation:
    """A validation run, and the command that made it."""

    stages: tuple[Stage, ...]
    command: str = ""

    def count(self, status: Status) -> int:
        """How many stages ended so."""
        return sum(stage.status == status for stage in self.stages)


@dataclass(frozen=True)
class Sample:
    """A text that the artifact generated, and the command that did it."""

    prompt: str
    completion: str
    command: str = ""


@dataclass(frozen=True)
class PassEntry:
    """What one pass did; an entry of the manifest's ``passes``."""

    name: str
    effect: str
    sites: int
    detail: str = ""
    skipped: Mapping[str, Sequence[str]] = field(default_factory=dict)
    records: Sequence[Mapping[str, Any]] = ()
    certificates: Sequence[Mapping[str, Any]] = ()

    @classmethod
    def from_manifest(cls, manifest: Mapping[str, Any]) -> tuple["PassEntry", ...]:
        """The entries of a manifest, in order."""
        return tuple(cls(**entry) for entry in manifest["passes"])


@dataclass(frozen=True)
class ReportContent:
    """Everything on the page; what is None or empty is left out.

    Attributes:
        title: of the page.
        model: the facts.
        recipe: its name.
        bits: of weights, activations and cache, such as ``W4A4KV4``.
        passes: from the manifest; the rotation plan is read off them.
        weights: all of them, before and after.
        cache: of one token in the cache of all layers, in float32 and as the artifact keeps it.
        activations: what `quarot_onnx.activations.capture` returned.
        activations_text: what was read for them, such as ``256 tokens of heldout.txt``.
        commands: (what it does, command line), to reproduce everything in order.
        timing: (what, seconds).
    """

    title: str
    model: ModelFacts
    recipe: str
    bits: str = "W4A4KV4"
    perplexity: Perplexity | None = None
    weights: Size | None = None
    cache: Size | None = None
    validation: Validation | None = None
    passes: tuple[PassEntry, ...] = ()
    activations: Mapping[str, Activation] | None = None
    activations_text: str = ""
    sample: Sample | None = None
    commands: tuple[tuple[str, str], ...] = ()
    timing: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class PlannedRotation:
    """One line of the rotation plan.

    Attributes:
        name: as in the field.
        where: what it turns.
        size: the dimension.
        runs: ``fused into weights``, ``online``, ``skipped`` or ``not in the recipe``.
        matrix: kind and factors.
        reason: why something was skipped.
    """

    name: str
    where: str
    size: int
    runs: str
    matrix: str = ""
    reason: str = ""


def rotation_plan(model: ModelFacts, passes: Sequence[PassEntry]) -> tuple[PlannedRotation, ...]:
    """Every rotation of QuaRot and what became of it, and given matrices of other places."""
    done = {entry.name: entry for entry in passes}
    sizes = {
        "R1": model.hidden_size,
        "R2": model.head_dim,
        "heads": model.num_heads,
        "R3": model.head_dim,
        "R4": model.intermediate_size,
        "inputs": model.hidden_size,
    }
    plan = []
    for place in (*PLACES, INPUTS):
        row = PlannedRotation(place.name, place.where, sizes[place.name], "not in the recipe")
        entry = next((done[name] for name in place.put_by if name in done), None)
        if entry is None and place is INPUTS:
            continue
        if entry is not None:
            runs = "fused into weights" if place.is_fused else "online"
            row = replace(
                row,
                runs=runs if entry.sites else "skipped",
                matrix=entry.detail,
                reason="; ".join(entry.skipped),
            )
        plan.append(row)
    return tuple(plan)
