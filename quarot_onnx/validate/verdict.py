# SPDX-License-Identifier: Apache-2.0
"""What comes out: a `Finding` of a stage function, as a `Stage` of the `Verdict`."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from quarot_onnx.errors import GateError

Status = Literal["passed", "failed", "skipped"]


@dataclass(frozen=True)
class Stage:
    """What one stage found.

    Attributes:
        id: one of `quarot_onnx.validate.IDS`.
        status: skipped stages say why in `detail`.
        metric: what `value` is; passed is ``value <= threshold`` unless the metric says otherwise.
        value: None where nothing was measured.
        threshold: None where the value is only reported.
        seconds: wall time.
        detail: one line for a person.
    """

    id: str
    status: Status
    metric: str = ""
    value: float | None = None
    threshold: float | None = None
    seconds: float = 0.0
    detail: str = ""


@dataclass(frozen=True)
class Verdict:
    """The stages of one validation.

    Attributes:
        artifact: what was validated.
        stages: in order.
        required: stages that may not be skipped.
    """

    artifact: Path
    stages: tuple[Stage, ...]
    required: tuple[str, ...] = ()

    @property
    def failures(self) -> tuple[Stage, ...]:
        """The stages that failed, or were skipped although they were required."""
        return tuple(
            stage
            for stage in self.stages
            if stage.status == "failed" or (stage.status == "skipped" and stage.id in self.required)
        )

    @property
    def passed(self) -> bool:
        """Whether nothing failed."""
        return not self.failures

    def as_json(self) -> dict[str, Any]:
        """For ``--json``; numbers that are not finite become null."""
        stages = [asdict(stage) for stage in self.stages]
        for stage in stages:
            for key in ("value", "threshold"):
                if stage[key] is not None and not math.isfinite(stage[key]):
                    stage[key] = None
        return {
            "artifact": str(self.artifact),
            "passed": self.passed,
            "stages": stages,
            "failed": [stage.id for stage in self.failures],
            "skipped": [stage.id for stage in self.stages if stage.status == "skipped"],
        }

    def require_passed(self) -> None:
        """Nothing, for a verdict that passed.

        Raises:
            GateError: names the stages that failed, with the first one's finding.
        """
        if self.failures:
            first, *others = self.failures
            more = f" (and {', '.join(stage.id for stage in others)})" if others else ""
            raise GateError(
                f"{self.artifact}: {first.id} {first.status}{more}: {first.detail}; "
                "the artifact must not be used, export again"
            )


@dataclass(frozen=True)
class Finding:
    """What a stage function measured.

    Attributes:
        metric: what `value` is.
        value: the number.
        threshold: None where the value is only reported.
        detail: one line for a person.
        has_passed: for a stage that asks more than ``value <= threshold``.
    """

    metric: str
    value: float
    threshold: float | None
    detail: str
    has_passed: bool | None = None

    @property
    def passed(self) -> bool:
        """`has_passed` where given, else whether the value, which may be NaN, is low enough."""
        if self.has_passed is not None:
            return self.has_passed
        return self.threshold is None or self.value <= self.threshold  # false for NaN


class Skip(Exception):  # noqa: N818  # not an error: it says why a stage has nothing to do
    """Why a stage was skipped; raised by the stage function."""
