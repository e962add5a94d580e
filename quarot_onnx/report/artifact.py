# SPDX-License-Identifier: Apache-2.0
"""The page of an artifact: inspects it, captures activations and, given a prompt, generates."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quarot_onnx.activations import capture
from quarot_onnx.artifacts import DATA, MODEL
from quarot_onnx.errors import InputError
from quarot_onnx.export.checkpoint import Checkpoint
from quarot_onnx.forecast import FLOAT_BYTES, forecast
from quarot_onnx.inspection import inspect
from quarot_onnx.recipe import Recipe
from quarot_onnx.report.content import (
    ModelFacts,
    PassEntry,
    Perplexity,
    ReportContent,
    Sample,
    Size,
    Stage,
    Validation,
)
from quarot_onnx.report.page import write_report
from quarot_onnx.runtime import OnnxModel, eos_token_ids, load_tokenizer
from quarot_onnx.runtime.generation import generate
from quarot_onnx.texts import read
from quarot_onnx.transforms import FILE as TRANSFORMS

_TOKENS = 256  # of the sample that the figures show
_NEW_TOKENS = 64  # of the generated sample


def report_artifact(
    path: Path,
    artifact: Path,
    reference: Path,
    text: str | Path,
    *,
    prompt: str = "",
    evaluation: Mapping[str, Any] | None = None,
    validation: Mapping[str, Any] | None = None,
) -> None:
    """Write the page of an artifact: captures activations and, given a prompt, generates.

    Args:
        path: the HTML file.
        artifact: a directory that ``quarot-onnx export`` wrote.
        reference: the Hugging Face directory it came from.
        text: a file or a data set; its first tokens are shown.
        prompt: what to continue; nothing is generated where it is empty.
        evaluation: what ``quarot-onnx eval --save-json`` wrote.
        validation: what ``quarot-onnx validate --save-json`` wrote.

    Raises:
        QuarotError: what reading the artifact, capturing, generating and writing raise.
    """
    found = inspect(artifact)
    recipe, dtype = Recipe.model_validate(found.manifest["recipe"]), found.manifest["dtype"]
    checkpoint = Checkpoint(reference)
    given = artifact / TRANSFORMS
    planned = forecast(checkpoint, recipe, dtype, given if given.exists() else None)
    tokens = load_tokenizer(artifact).encode(read(text))[:_TOKENS]
    folder = reference.resolve()
    name = folder.parent.name if folder.name == "model" else folder.name
    bits = f"W{recipe.weights.bits}A{recipe.activations.bits}KV{recipe.kv_cache.bits}"
    linears = [row for row in found.linears if row.layer is not None]
    inspected = _command("inspect", artifact)
    measured = [*_evaluated(evaluation), "--text", text, "--reference", reference]
    content = ReportContent(
        title=f"{name} in {bits}",
        model=ModelFacts.from_config(
            checkpoint.config, name=name, parameters=planned.parameters, dtype=dtype
        ),
        recipe=recipe.name,
        bits=bits,
        perplexity=_perplexity(evaluation, _command("eval", artifact, *measured)),
        weights=Size(
            planned.parameters * FLOAT_BYTES[dtype],
            sum((artifact / file).stat().st_size for file in (MODEL, DATA)),
            8
            * sum(row.bytes for row in linears)
            / sum(row.in_features * row.out_features for row in linears),
            inspected,
        ),
        cache=Size(
            planned.float_cache_bytes_per_token, planned.cache_bytes_per_token, None, inspected
        ),
        validation=_validation(
            validation, _command("validate", artifact, "--reference", reference)
        ),
        passes=PassEntry.from_manifest(found.manifest),
        activations=capture(checkpoint, recipe, tokens),
        activations_text=f"the first {len(tokens)} tokens of {Path(text).name}",
        sample=_sample(artifact, prompt) if prompt else None,
        commands=(
            ("Export", _command("export", reference, artifact, "--recipe", recipe.name)),
            ("Validate", _command("validate", artifact, "--reference", reference)),
            ("Measure", _command("eval", artifact, *measured)),
            ("See what is inside", inspected),
        ),
    )
    write_report(path, content)


def _command(*words: object) -> str:
    return shlex.join(["quarot-onnx", *(str(word) for word in words)])


def _evaluated(evaluation: Mapping[str, Any] | None) -> list[object]:
    if evaluation is None:
        return []
    options: list[object] = ["--decode"] if "decode" in evaluation else []
    for key in ("windows", "window_length"):
        if key in evaluation:
            options += [f"--{key.replace('_', '-')}", evaluation[key]]
    return options


def _perplexity(evaluation: Mapping[str, Any] | None, command: str) -> Perplexity | None:
    if evaluation is None:
        return None
    try:
        baselines = evaluation.get("baselines") or {}
        return Perplexity(
            quantized=float(evaluation["perplexity"]),
            float32=baselines.get("fp32"),
            unrotated=baselines.get("unrotated"),
            folded=baselines.get("folded"),
            decoded=(evaluation.get("decode") or {}).get("perplexity"),
            text=f"{evaluation['windows']} windows of {evaluation['window_length']} tokens",
            command=command,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"evaluation: not what `quarot-onnx eval --save-json` writes ({error!r}); run it again"
        ) from error


def _validation(validation: Mapping[str, Any] | None, command: str) -> Validation | None:
    if validation is None:
        return None
    try:
        stages = tuple(
            Stage(
                str(stage["id"]),
                stage["status"],
                str(stage.get("detail") or ""),
                stage.get("value"),
                stage.get("threshold"),
            )
            for stage in validation["stages"]
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"validation: not what `quarot-onnx validate --save-json` writes ({error!r}); "
            "run it again"
        ) from error
    return Validation(stages, command)


def _sample(artifact: Path, prompt: str) -> Sample:
    tokenizer = load_tokenizer(artifact)
    ids = generate(
        OnnxModel(artifact),
        tokenizer.encode(prompt),
        max_new_tokens=_NEW_TOKENS,
        eos_token_ids=eos_token_ids(artifact),
    )
    completion = "".join(tokenizer.stream(ids))
    return Sample(prompt, completion, _command("generate", artifact, "--prompt", prompt))
