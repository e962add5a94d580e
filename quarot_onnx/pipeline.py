# SPDX-License-Identifier: Apache-2.0
"""The stages in order; read this file first.

    Hugging Face directory --export--> float ONNX --passes--> rotated, quantized ONNX --save-->
    artifact

Weights stay on disk until the last step, which computes each one as it is written.
"""

import importlib.metadata
import resource
import shutil
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnx_ir.passes.common as common_passes

from quarot_onnx import artifacts
from quarot_onnx.calibration import Calibration, Journal
from quarot_onnx.certificates import Certificate, Certifier, Restate
from quarot_onnx.decoder import Decoder
from quarot_onnx.errors import UsageError
from quarot_onnx.export.architectures import dimensions, load_config
from quarot_onnx.export.checkpoint import Checkpoint
from quarot_onnx.export.genai import save_genai_config
from quarot_onnx.export.huggingface import COMPANIONS, onnx_from_huggingface
from quarot_onnx.export.polygraphy_run import save_polygraphy
from quarot_onnx.passes import Effect, Report, pipeline, untie_embeddings
from quarot_onnx.recipe import Recipe
from quarot_onnx.rounding import require_groups
from quarot_onnx.sparsity import save_sparse
from quarot_onnx.targets import targets_of
from quarot_onnx.transforms import FILE as TRANSFORMS
from quarot_onnx.transforms import Transforms
from quarot_onnx.weights import Float64

DTYPES = {
    "float32": ir.DataType.FLOAT,
    "float16": ir.DataType.FLOAT16,
    "bfloat16": ir.DataType.BFLOAT16,
}
"""What ``--dtype`` may be."""


@dataclass(frozen=True)
class Rewritten:
    """A model after its passes, with lazy weights.

    Attributes:
        model: valid ONNX, not yet written.
        decoder: handles into it.
        reports: what each pass did, in order.
        certificates: of each equivalent pass, by its name; empty where nothing was certified.
        seconds: that the passes took, certificates apart.
        restated: what the passes did to the residual stream, in order.
        transforms: the matrices that were given or learned; empty where there are none.
    """

    model: ir.Model
    decoder: Decoder
    reports: tuple[Report, ...]
    certificates: dict[str, tuple[Certificate, ...]]
    seconds: float
    restated: tuple[Restate, ...]
    transforms: Transforms

    def state(self, x: Float64) -> Float64:
        """The residual stream x [..., hidden_size] of the original model as it is in this one."""
        for restate in self.restated:
            x = restate(x)
        return x


def rewrite(
    checkpoint: Checkpoint,
    recipe: Recipe,
    dtype: str,
    calibration: Calibration | None = None,
    transforms: Transforms | None = None,
    *,
    certify: bool = False,
    journal: Journal | None = None,
    progress: artifacts.Progress | None = None,
) -> Rewritten:
    """Trace the model and apply the recipe's passes.

    No weight is read except the norms' scales, unless a calibrated pass runs the layers.

    Args:
        checkpoint: a Hugging Face directory.
        recipe: rotations, bits and methods.
        dtype: a key of `DTYPES`, for the float parts.
        calibration: what calibrated methods may look at.
        transforms: matrices that take the place of the recipe's; nothing is learned then.
        journal: where what is finished is kept; a temporary one where None.
        progress: called with the steps done and the steps in all, by a training and by each
            calibrated pass, whose steps are layers.
        certify: measure what each equivalent pass changed, for which every weight is read.

    Raises:
        GateError: an equivalent pass has changed the function.
        UsageError: a method of the recipe looks at text and there is no calibration.
        InputError: damaged weights.
        UnsupportedModelError: an architecture or a dimension that a pass refuses.
    """
    if recipe.is_calibrated and calibration is None:
        raise UsageError(
            f"recipe {recipe.name}: has a method that looks at text; give one with --calibration"
        )
    model = onnx_from_huggingface(checkpoint, DTYPES[dtype])
    online = recipe.learning.online if transforms is None else transforms.online
    require_groups(recipe, dimensions(checkpoint.config), online)
    reports = [untie_embeddings(model)]
    decoder = Decoder.locate(model)
    begun = time.perf_counter()
    if recipe.learning.places and calibration is not None and transforms is None:
        from quarot_onnx.learning import learn  # noqa: PLC0415  # imports torch's optimizers

        learned = learn(
            checkpoint.directory, recipe, calibration, journal=journal, progress=progress
        )
        reports.append(learned.report)
        transforms = learned.transforms
    passes = pipeline(recipe, decoder, calibration, transforms, journal=journal, progress=progress)
    exact = [apply for apply in passes if apply.effect is Effect.EQUIVALENT]
    certifier = Certifier(decoder) if certify else None
    certificates: dict[str, tuple[Certificate, ...]] = {}
    seconds = time.perf_counter() - begun
    for apply in passes:
        started = time.perf_counter()
        reports.append(apply())
        seconds += time.perf_counter() - started
        if certifier is not None and apply.effect is Effect.EQUIVALENT:
            certifier.record(apply.name, apply.restate)
            if apply is exact[-1]:  # before a calibrated pass takes its hours
                certificates = certifier.certify()
    common_passes.RemoveUnusedNodesPass()(model)
    _sort_initializers(model)
    model.metadata_props["quarot.recipe"] = recipe.name
    model.metadata_props["quarot.seed"] = str(recipe.seed)
    restated = tuple(apply.restate for apply in passes if apply.restate is not None)
    found = {name: array for apply in passes for name, array in apply.found.items()}
    given = (transforms or Transforms()).including(found)
    return Rewritten(model, decoder, tuple(reports), certificates, seconds, restated, given)


def _sort_initializers(model: ir.Model) -> None:
    """In order of first use: the file is read front to back, and scales follow codes."""
    initializers = dict(model.graph.initializers)
    ordered: dict[str, None] = {
        v.name or "": None
        for node in model.graph
        for v in node.inputs
        if v is not None and v.is_initializer()
    }
    model.graph.initializers.clear()
    for name in [*ordered, *(n for n in initializers if n not in ordered)]:
        model.graph.initializers[name] = initializers[name]


def export(
    model_dir: Path,
    out_dir: Path,
    recipe: Recipe,
    *,
    dtype: str = "float32",
    calibration: Calibration | None = None,
    transforms: Path | None = None,
    force: bool = False,
    resume: bool = False,
    certify: bool = True,
    progress: artifacts.Progress | None = None,
    calibrating: artifacts.Progress | None = None,
) -> dict[str, Any]:
    """Export the Hugging Face model in `model_dir` to an artifact in `out_dir`.

    Args:
        model_dir: a local Hugging Face directory with safetensors weights.
        out_dir: created; it must not exist or be empty, unless `force` and an artifact.
        recipe: rotations and bits.
        dtype: a key of `DTYPES`, for the float parts.
        calibration: what calibrated methods may look at; recipes without one leave it alone.
        transforms: a file of matrices (`quarot_onnx.transforms`), such as an artifact's own; what
            it holds replaces the recipe's rotations, and nothing is learned.
        force: replace an existing artifact.
        resume: keep what a training or a calibrated pass has finished in ``OUT_DIR.calibration``,
            and go on from what is there; it is removed when the artifact is complete.
        certify: measure what each equivalent pass changed; costs about as much as the export.
        progress: called while weights are written.
        calibrating: `progress` of `rewrite`.

    Returns:
        The manifest.

    Raises:
        QuarotError: any of its children; nothing is left in `out_dir`.
    """
    with artifacts.publish(out_dir, force=force) as staging:
        checkpoint = Checkpoint(model_dir)
        given = None if transforms is None else _load(transforms, checkpoint)
        sources = {path.name: artifacts.sha256(path) for path in checkpoint.files}
        journal = Journal()
        if resume and calibration is not None and recipe.is_calibrated:
            run = _run(sources, recipe, dtype, calibration, given)
            journal = Journal(_journal_of(out_dir), run)
        rewritten = rewrite(
            checkpoint,
            recipe,
            dtype,
            calibration,
            given,
            certify=certify,
            journal=journal,
            progress=calibrating,
        )
        artifacts.require_space(out_dir, artifacts.stored_bytes(rewritten.model))
        artifacts.save_model(rewritten.model, staging, progress)
        _save_companions(staging, checkpoint, recipe, rewritten, calibration, journal)
        content = {
            "source": {"model_type": checkpoint.config["model_type"], "files": sources},
            **_manifest(recipe, rewritten, calibration),
            "dtype": dtype,
        }
        artifacts.save_manifest(staging, content)
        manifest = artifacts.load_manifest(staging)
    shutil.rmtree(journal.directory, ignore_errors=True)
    return manifest


def _save_companions(
    staging: Path,
    checkpoint: Checkpoint,
    recipe: Recipe,
    rewritten: Rewritten,
    calibration: Calibration | None,
    journal: Journal,
) -> None:
    """Everything beside the graph, its weights and the manifest."""
    for name in COMPANIONS:
        if (checkpoint.directory / name).is_file():
            shutil.copyfile(checkpoint.directory / name, staging / name)
    if rewritten.transforms:
        rewritten.transforms.save(staging / TRANSFORMS)
    if calibration is not None and recipe.is_calibrated:
        calibration.save(staging)
    if recipe.weights.bits < 16 and recipe.weights.sparsity != "none":
        weights = [(x.weight.name, x.weight.sizes) for x in rewritten.decoder.linears]
        save_sparse(staging, journal, weights, recipe.weights.sparsity, recipe.weights.bits)
    save_polygraphy(staging)
    config = load_config(checkpoint.directory, checkpoint.config)
    save_genai_config(staging, rewritten.model, config)


def _manifest(
    recipe: Recipe, rewritten: Rewritten, calibration: Calibration | None
) -> dict[str, Any]:
    """What was asked for, what was done and what it measured."""
    targets = targets_of(recipe, rewritten.transforms.online)
    return {
        "recipe": recipe.model_dump(),
        "targets": [asdict(target) for target in targets],
        **_calibrated(recipe, calibration, rewritten.seconds),
        **_transformed(rewritten.transforms),
        "passes": [
            _report(report, rewritten.certificates.get(report.name, ()))
            for report in rewritten.reports
        ],
    }


def _journal_of(out_dir: Path) -> Path:
    target = out_dir.resolve()
    return target.with_name(f"{target.name}.calibration")


def _run(
    sources: dict[str, str],
    recipe: Recipe,
    dtype: str,
    calibration: Calibration,
    given: Transforms | None,
) -> dict[str, Any]:
    """What would make the numbers of a calibrated pass differ."""
    return {
        "source": sources,
        "recipe": recipe.model_dump(),
        "dtype": dtype,
        "calibration": calibration.sha256,
        "transforms": None if given is None else given.sha256,
        "versions": {name: importlib.metadata.version(name) for name in ("quarot-onnx", "torch")},
    }


def _calibrated(recipe: Recipe, calibration: Calibration | None, seconds: float) -> dict[str, Any]:
    """What was looked at and what it cost, for the manifest of a recipe that looks."""
    if calibration is None or not recipe.is_calibrated:
        return {}
    windows, length = calibration.tokens.shape
    return {
        "calibration": {
            "source": calibration.source,
            "sha256": calibration.sha256,
            "windows": windows,
            "window_length": length,
            "seconds": round(seconds, 3),
            "peak_memory_bytes": _peak_memory(),
        }
    }


def _load(transforms: Path, checkpoint: Checkpoint) -> Transforms:
    load_config(checkpoint.directory, checkpoint.config)  # which refuses sizes that make no sense
    return Transforms.load(transforms, dimensions(checkpoint.config))


def _transformed(transforms: Transforms) -> dict[str, Any]:
    """Where matrices come from, for the manifest of an artifact that has some."""
    if not transforms:
        return {}
    return {"transforms": {"source": transforms.source, "places": transforms.places}}


def _peak_memory() -> int:
    """The most physical memory that this process has had, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _report(report: Report, certificates: tuple[Certificate, ...]) -> dict[str, Any]:
    return {
        **asdict(report),
        "effect": report.effect.value,
        "certificates": [certificate.as_json() for certificate in certificates],
    }
