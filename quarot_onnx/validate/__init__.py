# SPDX-License-Identifier: Apache-2.0
"""Validate an artifact: stages, each a number against a threshold, that together leave no gap.

    from pathlib import Path
    from quarot_onnx.validate import validate

    validate(Path("out_dir"), Path("model_dir")).require_passed()

The chain from Hugging Face's model to the graph's logits has two links. ``weights``: every
initializer is the checkpoint's tensor, folded, rotated and rounded as the recipe says. ``layers``:
with those initializers, every layer of the graph computes what plain PyTorch computes, each layer
being given the graph's own input, so that an activation code that rounds the other way (a tie,
resolved by the last bit of a float sum) does not spread into the layers behind it. ``equivalence``
closes the chain end to end where nothing is quantized. The other stages see what such a comparison
does not: files, form, causality, the cache, padding.

`_STAGES` below is their order. A stage is a function from the `Subject` to a `Finding`; its
docstring says what fault it catches. `artifact` has those that need no PyTorch model, `behaviour`
those that compare the graph with itself, `weights` and `agreement` the links of the chain.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from quarot_onnx.errors import GateError, InputError, UsageError
from quarot_onnx.validate.agreement import (
    check_equivalence,
    check_layers,
    check_logits,
    check_quality,
)
from quarot_onnx.validate.artifact import (
    check_finite,
    check_integrity,
    check_load,
    check_structure,
)
from quarot_onnx.validate.behaviour import (
    check_cache,
    check_causality,
    check_padding,
    check_sensitivity,
)
from quarot_onnx.validate.deployed import check_engine, check_triton
from quarot_onnx.validate.side_by_side import check_outputs, load_tolerances
from quarot_onnx.validate.subject import Subject
from quarot_onnx.validate.verdict import Finding, Skip, Stage, Verdict
from quarot_onnx.validate.weights import check_weights

__all__ = ["IDS", "Stage", "Verdict", "validate"]

_STAGES: dict[str, Callable[[Subject], Finding]] = {
    # Is it what was exported, does it run? `load` and `finite` let the later stages run at all.
    "integrity": check_integrity,
    "structure": check_structure,
    "load": check_load,
    "finite": check_finite,
    # Do the logits depend on the tokens they should depend on, and on no other?
    "sensitivity": check_sensitivity,
    "causality": check_causality,
    # Is it the model that it was made from?
    "weights": check_weights,
    "equivalence": check_equivalence,
    "layers": check_layers,
    "logits": check_logits,
    "quality": check_quality,
    # Does it stay the same model token by token and in a batch?
    "cache": check_cache,
    "padding": check_padding,
    # Does every host compute the same?
    "outputs": check_outputs,
    # What is deployed, is it made of this artifact?
    "trt": check_engine,
    "triton": check_triton,
}

IDS = tuple(_STAGES)
"""The stages, in order."""


def validate(
    artifact: Path,
    reference: Path | None = None,
    *,
    require: Sequence[str] = (),
    tolerance: float | None = None,
    tolerances: Path | None = None,
    engine: Path | None = None,
    triton_repository: Path | None = None,
    runtime: str = "ort-cpu",
    threads: int | None = None,
    progress: Callable[[Stage], None] | None = None,
) -> Verdict:
    """Run every stage on `artifact`.

    Args:
        artifact: a directory that ``quarot-onnx export`` wrote.
        reference: the Hugging Face directory; stages that need it are skipped where None.
        require: stages that may not be skipped.
        tolerance: of two computations of one function, see `Subject`; by the artifact's dtype
            where None.
        tolerances: a file for stage ``outputs``, see `quarot_onnx.validate.side_by_side`.
        engine: a directory that ``quarot-onnx build`` made of `artifact`.
        triton_repository: one that ``quarot-onnx triton`` made of it.
        runtime: where the graph runs.
        threads: of one operator.
        progress: called after each stage.

    Returns:
        The verdict; a failed stage does not raise.

    Raises:
        UsageError: `require` names no stage.
        InputError: not an artifact at all, or the reference is damaged.
        MissingDependencyError: the runtime is not on this machine.
    """
    for name in require:
        if name not in IDS:
            raise UsageError(f"--require {name}: no such stage; stages are {', '.join(IDS)}")
    subject = Subject(artifact, reference, runtime=runtime, threads=threads, tolerance=tolerance)
    if tolerances is not None:
        subject.tolerances = load_tolerances(tolerances)
    subject.engine, subject.triton_repository = engine, triton_repository
    if reference is not None:
        _ = subject.checkpoint, subject.judge  # a damaged reference is no finding on the artifact
    stages: list[Stage] = []
    for name in IDS:
        stages.append(_run(name, subject))
        if progress is not None:
            progress(stages[-1])
    return Verdict(artifact, tuple(stages), tuple(require))


def _run(name: str, subject: Subject) -> Stage:
    start = time.perf_counter()
    try:
        finding = _STAGES[name](subject)
    except Skip as reason:
        return Stage(name, "skipped", detail=str(reason))
    except (InputError, GateError) as error:
        seconds = time.perf_counter() - start
        return Stage(name, "failed", seconds=seconds, detail=str(error))
    return Stage(
        name,
        "passed" if finding.passed else "failed",
        finding.metric,
        finding.value,
        finding.threshold,
        time.perf_counter() - start,
        finding.detail,
    )
