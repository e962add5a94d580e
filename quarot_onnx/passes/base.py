# SPDX-License-Identifier: Apache-2.0
"""What every pass is: a declared effect, a check of all sites, a rewrite, a report."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, ClassVar

from quarot_onnx.decoder import Decoder
from quarot_onnx.errors import UnsupportedModelError
from quarot_onnx.weights import Float64

APPLIED = "quarot.passes"
"""Model metadata: the passes applied so far, in order."""


class Effect(Enum):
    """What a pass does to the function that the model computes."""

    EQUIVALENT = "equivalent"
    """The same function up to rounding."""
    LOSSY = "lossy"
    """Another function, close to it."""


@dataclass(frozen=True)
class Report:
    """What a pass did.

    Attributes:
        name: the pass.
        effect: what it declared.
        sites: how many places it changed.
        detail: one phrase for a person, such as the matrix that was used.
        skipped: reason -> places that were left alone for it.
        records: what was decided or measured, one entry per site: ``site`` names it, the other
            keys are the pass's own.
    """

    name: str
    effect: Effect
    sites: int
    detail: str = ""
    skipped: dict[str, list[str]] = field(default_factory=dict)
    records: list[dict[str, Any]] = field(default_factory=list)


class Pass(ABC):
    """One rewrite of a located decoder; its module docstring states the algebra.

    Valid ONNX before, valid ONNX after. `requires` looks at every site before `rewrite` changes the
    first, so that a refused model is untouched.

    Attributes:
        decoder: handles into the graph.
        found: matrices and scales that the pass has chosen by looking at data, by the names of
            `quarot_onnx.transforms`; they are saved with the artifact.
        restate: the residual stream [..., hidden_size] after `rewrite`, from the stream before;
            None where it is the same.
    """

    effect: ClassVar[Effect]

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.restate: Callable[[Float64], Float64] | None = None
        self.found: dict[str, Float64] = {}

    @property
    def name(self) -> str:
        """The class's name without its suffix."""
        return type(self).__name__.removesuffix("Pass")

    def requires(self) -> None:  # noqa: B027  # most passes can finish any located decoder
        """Refuse a model that the rewrite could not finish.

        Raises:
            UnsupportedModelError: names the site, the value and what to do.
        """

    @abstractmethod
    def rewrite(self) -> Report:
        """Change the graph; every site has been checked."""

    def __call__(self) -> Report:
        """Check, rewrite and record the pass in the model's metadata."""
        properties = self.decoder.model.metadata_props
        applied = properties.get(APPLIED, "").split()
        if self.name in applied:
            raise UnsupportedModelError(
                f"{self.name}: already applied to this model; apply it once"
            )
        self.requires()
        report = self.rewrite()
        properties[APPLIED] = " ".join([*applied, self.name])
        return report

    def refuse_after(self, later: str) -> None:
        """Refuse a model that the pass named `later` has changed already.

        Raises:
            UnsupportedModelError: names both passes.
        """
        if later in self.decoder.model.metadata_props.get(APPLIED, "").split():
            raise UnsupportedModelError(
                f"{self.name}: {later} has been applied to this model; apply {self.name}Pass before"
            )

    def refuse_experts(self) -> None:
        """Refuse a model with a mixture of experts.

        Raises:
            UnsupportedModelError: names the layer.
        """
        for layer in self.decoder.layers:
            _ = layer.mlp

    def report(
        self,
        sites: int,
        detail: str = "",
        skipped: dict[str, list[str]] | None = None,
        records: list[dict[str, Any]] | None = None,
    ) -> Report:
        """A report with this pass's name and effect."""
        return Report(self.name, self.effect, sites, detail, skipped or {}, records or [])
