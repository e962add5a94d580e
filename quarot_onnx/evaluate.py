# SPDX-License-Identifier: Apache-2.0
"""How good an artifact is on a text: perplexity, baselines, agreement with the float model.

The text is cut into windows that do not overlap (`quarot_onnx.texts`); every token of a window but
the first is predicted from those before it in the window. Log-probabilities are taken in float64.
"""

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quarot_onnx.artifacts import load_manifest
from quarot_onnx.calibration import Calibration, require_unseen
from quarot_onnx.errors import GateError
from quarot_onnx.runtime import CausalModel, Ids, Logits, OnnxModel, load_model, load_tokenizer
from quarot_onnx.texts import evaluation_windows

WINDOWS, WINDOW_LENGTH = 32, 256
"""How much text `evaluate` reads by default."""

Progress = Callable[[int, int], None]
"""Called with the windows done and the windows in all."""

_BASELINES = 2  # artifacts that `baselines` evaluates
_LOGITS_AT_ONCE = 1 << 24  # 64 MB in float32: windows are batched up to here


def log_probabilities(logits: Logits) -> NDArray[np.float64]:
    """The logarithm of softmax over the last axis, in float64."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted


def _target_log_probabilities(logits: Logits, targets: Ids) -> NDArray[np.float64]:
    """Of targets [B, S] under logits [B, S, V]; a row at a time, to bound the float64 memory."""
    rows = [
        np.take_along_axis(log_probabilities(row), target[:, None], axis=-1)[:, 0]
        for row, target in zip(logits, targets, strict=True)
    ]
    return np.stack(rows)


def _require_finite(values: NDArray[np.float64], first_window: int) -> None:
    if not np.isfinite(values).all():
        row, column = np.argwhere(~np.isfinite(values))[0]
        raise GateError(
            f"logits: not finite at token {column} of window {first_window + row}; "
            "the model is broken, see `quarot-onnx validate`"
        )


def _batch_size(model: CausalModel, length: int) -> int:
    return max(1, _LOGITS_AT_ONCE // (length * model.vocabulary_size))


def perplexity(model: CausalModel, windows: Ids, *, progress: Progress | None = None) -> float:
    """By prefill: the exponential of the mean negative log-likelihood over windows [N, T].

    Raises:
        GateError: a logit is not finite.
    """
    total = 0.0
    batch = _batch_size(model, windows.shape[1])
    for start in range(0, len(windows), batch):
        part = windows[start : start + batch]
        logits, _ = model.step(part, model.new_cache(len(part)))
        found = _target_log_probabilities(logits[:, :-1], part[:, 1:])
        _require_finite(found, start)
        total -= float(found.sum())
        if progress is not None:
            progress(start + len(part), len(windows))
    return math.exp(total / (len(windows) * (windows.shape[1] - 1)))


@dataclass(frozen=True)
class DecodeResult:
    """Decoding token by token through the cache, against one prefill of the same windows.

    Attributes:
        perplexity: by decoding.
        prefill_perplexity: by prefill.
        top1_agreement: fraction of tokens with the same most likely next token.
        mean_difference: mean |difference| of the log-probability of the text's next token, in nats.
    """

    perplexity: float
    prefill_perplexity: float
    top1_agreement: float
    mean_difference: float


def decode_perplexity(
    model: CausalModel, windows: Ids, *, progress: Progress | None = None
) -> DecodeResult:
    """Perplexity of windows [N, T], one token at a time through the cache, and how prefill agrees.

    Raises:
        GateError: a logit is not finite.
    """
    batch = _batch_size(model, windows.shape[1])
    decoded, prefilled, agreed = [], [], []
    for start in range(0, len(windows), batch):
        part = windows[start : start + batch]
        whole, _ = model.step(part, model.new_cache(len(part)))
        cache = model.new_cache(len(part))
        steps = []
        for index in range(part.shape[1] - 1):
            logits, cache = model.step(part[:, index : index + 1], cache)
            agreed.append(logits[:, 0].argmax(axis=-1) == whole[:, index].argmax(axis=-1))
            steps.append(_target_log_probabilities(logits, part[:, index + 1 : index + 2]))
        decoded.append(np.concatenate(steps, axis=1))
        prefilled.append(_target_log_probabilities(whole[:, :-1], part[:, 1:]))
        _require_finite(decoded[-1], start)
        _require_finite(prefilled[-1], start)
        if progress is not None:
            progress(start + len(part), len(windows))
    by_decode, by_prefill = np.concatenate(decoded), np.concatenate(prefilled)
    return DecodeResult(
        perplexity=math.exp(-by_decode.mean()),
        prefill_perplexity=math.exp(-by_prefill.mean()),
        top1_agreement=float(np.concatenate(agreed).mean()),
        mean_difference=float(np.abs(by_decode - by_prefill).mean()),
    )


@dataclass(frozen=True)
class Agreement:
    """A model's predictions beside those of the model that it stands for.

    Attributes:
        perplexity: of the model.
        reference_perplexity: of the other one, on the same windows.
        kl_divergence: mean of KL(reference || model) over all tokens, in nats.
        top1_agreement: fraction of tokens with the same most likely next token.
    """

    perplexity: float
    reference_perplexity: float
    kl_divergence: float
    top1_agreement: float


def agreement(
    model: CausalModel,
    reference: CausalModel,
    windows: Ids,
    *,
    progress: Progress | None = None,
) -> Agreement:
    """Perplexity, KL divergence and top-1 agreement of `model` on windows [N, T], by prefill.

    Raises:
        GateError: a logit of `model` is not finite.
    """
    batch = min(_batch_size(each, windows.shape[1]) for each in (model, reference))
    own, other, divergence, agreed = [], [], [], []
    for start in range(0, len(windows), batch):
        part = windows[start : start + batch]
        found, _ = model.step(part, model.new_cache(len(part)))
        expected, _ = reference.step(part, reference.new_cache(len(part)))
        own.append(_target_log_probabilities(found[:, :-1], part[:, 1:]))
        _require_finite(own[-1], start)
        other.append(_target_log_probabilities(expected[:, :-1], part[:, 1:]))
        agreed.append(found.argmax(axis=-1) == expected.argmax(axis=-1))
        for rows in zip(found, expected, strict=True):
            q, p = map(log_probabilities, rows)
            divergence.append((np.exp(p) * (p - q)).sum(axis=-1))
        if progress is not None:
            progress(start + len(part), len(windows))
    return Agreement(
        perplexity=math.exp(-np.concatenate(own).mean()),
        reference_perplexity=math.exp(-np.concatenate(other).mean()),
        kl_divergence=float(np.stack(divergence).mean()),
        top1_agreement=float(np.concatenate(agreed).mean()),
    )


def evaluate(
    artifact: Path,
    text: str | Path,
    *,
    count: int | None = WINDOWS,
    length: int = WINDOW_LENGTH,
    decode: bool = False,
    reference: Path | None = None,
    runtime: str = "ort-cpu",
    threads: int | None = None,
    trust_engine: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Perplexity of `artifact` on `text`.

    Args:
        artifact: a directory that ``quarot-onnx export`` wrote, or ``build`` for ``tensorrt``.
        text: a file or a data set, as `quarot_onnx.texts` reads it.
        count: how many evenly spaced windows; None takes all, as the literature does.
        length: tokens of a window.
        decode: also decode token by token through the cache.
        reference: the Hugging Face directory; adds its perplexity, the agreement with it, and the
            perplexities of the same bits without rotations.
        runtime: where the artifact runs.
        threads: of one operator.
        trust_engine: run an engine that its manifest does not vouch for.
        progress: called after each batch of windows.

    Returns:
        For JSON: ``perplexity``, ``windows``, ``window_length``, ``tokens`` (of the text),
        ``recipe``, ``runtime``, ``cache_bytes_per_token``, and where asked ``decode``,
        ``agreement``, ``layer_snr_db`` (of float32 artifacts; None is no noise), ``baselines`` and
        ``damage_removed``: the share, in log-perplexity, by baseline.

    Raises:
        InputError: the text is unreadable or too short, the artifact is damaged.
        GateError: a logit is not finite.
        QuarotError: what `OnnxModel` and `pipeline.export` raise.
    """
    manifest = load_manifest(artifact)
    read = evaluation_windows(text, load_tokenizer(artifact), count=count, length=length)
    cut = read.tokens
    require_unseen(artifact, cut, str(text))
    model = load_model(artifact, runtime=runtime, threads=threads, trust_engine=trust_engine)
    shares = iter(_shares(progress, 1 + decode + (0 if reference is None else _BASELINES)))
    agreed = None
    if reference is None:
        found_perplexity = perplexity(model, cut, progress=next(shares))
    else:
        from quarot_onnx.reference import HuggingFaceModel  # noqa: PLC0415  # imports torch

        original = HuggingFaceModel(reference, threads=threads)
        agreed = agreement(model, original, cut, progress=next(shares))
        found_perplexity = agreed.perplexity
        del original
    result: dict[str, Any] = {
        "perplexity": found_perplexity,
        "windows": len(cut),
        "window_length": length,
        "tokens": read.available,
        "recipe": manifest["recipe"]["name"],
        "runtime": runtime,
        "cache_bytes_per_token": model.cache_bytes_per_token,
    }
    if decode:
        by_decode = decode_perplexity(model, cut, progress=next(shares))
        result["decode"] = {
            "perplexity": by_decode.perplexity,
            "top1_agreement": by_decode.top1_agreement,
            "mean_difference": by_decode.mean_difference,
        }
    if reference is not None and agreed is not None:
        del model
        if manifest["dtype"] == "float32":  # a coarser embedding does not tell the map
            result["layer_snr_db"] = _layer_noise(reference, artifact, cut, threads)
        others = baselines(
            reference,
            manifest,
            cut,
            runtime=runtime,
            threads=threads,
            calibration=Calibration.load(artifact),
            progress=list(shares),
        )
        result |= _compared(agreed, others)
    return result


def _compared(agreed: Agreement, others: dict[str, float]) -> dict[str, Any]:
    """What `evaluate` says of an artifact beside the original and other exports of it."""
    found = {"fp32": agreed.reference_perplexity, **others}
    kept = math.log(agreed.perplexity / found["fp32"])
    return {
        "agreement": {
            "kl_divergence": agreed.kl_divergence,
            "top1_agreement": agreed.top1_agreement,
        },
        "baselines": found,
        "damage_removed": {
            name: 1 - kept / damage
            for name in ("unrotated", "folded")
            if (damage := math.log(found[name] / found["fp32"])) > 0
        },
    }


def _layer_noise(
    reference: Path, artifact: Path, windows: Ids, threads: int | None
) -> list[float | None]:
    """`observation.layer_noise` on the first window, against an export of `reference` as it is."""
    from quarot_onnx.observation import layer_noise  # noqa: PLC0415  # imports torch
    from quarot_onnx.pipeline import export  # noqa: PLC0415  # imports torch
    from quarot_onnx.recipe import load_recipe  # noqa: PLC0415

    with tempfile.TemporaryDirectory(prefix="quarot-onnx-") as directory:
        original = Path(directory) / "float"
        export(reference, original, load_recipe("float"), certify=False)
        found = layer_noise(original, artifact, windows[:1], threads=threads)
    return [value if math.isfinite(value) else None for value in found]


def _shares(progress: Progress | None, parts: int) -> list[Progress | None]:
    """Callbacks for `parts` evaluations of the same windows, one after the other, as one."""
    if progress is None:
        return [None] * parts

    def share(part: int) -> Progress:
        return lambda done, total: progress(part * total + done, parts * total)

    return [share(part) for part in range(parts)]


def baselines(
    model_dir: Path,
    manifest: dict[str, Any],
    windows: Ids,
    *,
    runtime: str = "ort-cpu",
    threads: int | None = None,
    calibration: Calibration | None = None,
    progress: Sequence[Progress | None] = (None,) * _BASELINES,
) -> dict[str, float]:
    """Perplexities to stand beside a rotated model's, on the same windows.

    Args:
        model_dir: the Hugging Face directory that the artifact came from.
        manifest: the artifact's, for its recipe and dtype.
        windows: [N, T].
        runtime: where the exports run.
        threads: of one operator.
        calibration: the artifact's, where its recipe has one.
        progress: for each of the baselines, called after each batch of windows.

    Returns:
        ``folded`` and ``unrotated``: the same bits without rotations, with norm scales folded and
        not, rounded to nearest where the recipe is calibrated. Exported to a temporary directory.
    """
    from quarot_onnx.pipeline import export  # noqa: PLC0415  # imports torch
    from quarot_onnx.recipe import (  # noqa: PLC0415
        Activations,
        KvCache,
        Recipe,
        Rotations,
    )

    recipe = Recipe.model_validate(manifest["recipe"])
    if recipe.is_calibrated:
        recipe = Recipe(
            weights=recipe.weights.uncalibrated(),
            activations=Activations(bits=recipe.activations.bits),
            kv_cache=KvCache(bits=recipe.kv_cache.bits, io=recipe.kv_cache.io),
        )
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="quarot-onnx-") as directory:
        for index, (name, fold) in enumerate((("folded", True), ("unrotated", False))):
            off = Rotations(
                fold_norm_scale=fold, r1="none", r2=False, heads=False, r3=False, r4=False
            )
            out = Path(directory) / name
            export(
                model_dir,
                out,
                recipe.model_copy(update={"name": name, "rotations": off}),
                dtype=manifest["dtype"],
                calibration=calibration,
                certify=False,
            )
            host = "ort-cpu" if runtime == "tensorrt" else runtime  # an export is no engine
            model = OnnxModel(out, runtime=host, threads=threads)
            found[name] = perplexity(model, windows, progress=progress[index])
    return found
