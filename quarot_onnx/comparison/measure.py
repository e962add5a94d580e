# SPDX-License-Identifier: Apache-2.0
"""One recipe on one model, measured: what `compare` does for each of its rows."""

import hashlib
import importlib.metadata
import json
import math
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from quarot_onnx.artifacts import DATA, MODEL
from quarot_onnx.calibration import Calibration
from quarot_onnx.evaluate import agreement
from quarot_onnx.export.checkpoint import Checkpoint
from quarot_onnx.observation import (
    CACHED,
    Float32,
    Float64,
    Observed,
    observe,
    signal_to_noise,
    site_statistics,
    stream_map,
)
from quarot_onnx.pages.figures import pooled
from quarot_onnx.pipeline import export
from quarot_onnx.recipe import Recipe, load_recipe
from quarot_onnx.reference import HuggingFaceModel
from quarot_onnx.runtime import Cache, CausalModel, Ids, Logits, OnnxModel, load_tokenizer
from quarot_onnx.texts import calibration_windows, evaluation_windows, require_disjoint

OBSERVED_TOKENS = 512  # of the evaluation text, at most: layers, sites and surfaces are of these
REMEMBERED_BYTES = 1 << 30  # of the judge's logits, at most
ORIGINAL = "float"
"""The preset of the model as it is; its surfaces are the atlas before."""


class Bench:
    """A model, a text and a reference: everything that the runs of a comparison share."""

    def __init__(
        self,
        model_dir: Path,
        *,
        text: str,
        calibration: str,
        count: int | None,
        length: int,
        runtime: str,
        threads: int | None,
    ) -> None:
        """Read the text and check the model; see `quarot_onnx.comparison.compare`."""
        self.checkpoint = Checkpoint(model_dir)
        self.tokenizer = load_tokenizer(model_dir)
        self.windows = evaluation_windows(text, self.tokenizer, count=count, length=length)
        self.calibration_source = calibration
        self.model_dir, self.runtime, self.threads = model_dir, runtime, threads
        self._directory = tempfile.TemporaryDirectory(prefix="quarot-onnx-")

    def __enter__(self) -> "Bench":
        return self

    def __exit__(self, *_: object) -> None:
        """Remove the artifacts; what was measured stays."""
        self._directory.cleanup()

    def facts(self) -> dict[str, Any]:
        """What was compared on what, for JSON."""
        count, length = self.windows.tokens.shape
        return {
            "model_type": self.checkpoint.config["model_type"],
            "text": self.windows.source,
            "windows": count,
            "window_length": length,
            "calibration": self.calibration_source,
        }

    def key(self, recipe: Recipe) -> str:
        """Changes with whatever a run's result depends on."""
        files = [(path.name, path.stat()) for path in self.checkpoint.files]
        content = {
            "recipe": recipe.model_dump(mode="json", exclude_defaults=True),
            "config": self.checkpoint.config,
            "files": [(name, found.st_size, found.st_mtime_ns) for name, found in files],
            "windows": self.windows.sha256,
            "calibration": self.calibration_source if recipe.is_calibrated else None,
            "runtime": self.runtime,
            "version": importlib.metadata.version("quarot-onnx"),
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def calibration(self, recipe: Recipe) -> Calibration | None:
        """What the methods of `recipe` look at; None where none looks.

        Raises:
            UsageError: the evaluation text is in it.
        """
        if not recipe.is_calibrated:
            return None
        found = calibration_windows(
            self.calibration_source,
            self.tokenizer,
            count=recipe.calibration.windows,
            length=recipe.calibration.window_length,
            seed=recipe.seed,
        )
        require_disjoint(found, self.windows)
        return Calibration.of(found.tokens, found.source)

    @cached_property
    def original(self) -> "Remembering":
        """The judge."""
        return Remembering(HuggingFaceModel(self.model_dir, threads=self.threads))

    @cached_property
    def observed(self) -> Ids:
        """The tokens on which layers are observed, [windows, length]."""
        length = min(self.windows.tokens.shape[1], OBSERVED_TOKENS)
        count = max(1, OBSERVED_TOKENS // length)
        return self.windows.tokens[:count, :length]

    @cached_property
    def float_artifact(self) -> Path:
        """The model as it is, in ONNX."""
        out = Path(self._directory.name) / ORIGINAL
        export(self.model_dir, out, load_recipe(ORIGINAL), certify=False)
        return out

    @cached_property
    def before(self) -> "Before":
        """Its layers."""
        return Before.of(observe(self.float_artifact, self.observed, threads=self.threads))

    def measure(self, recipe: Recipe, surfaces: Path) -> dict[str, Any]:
        """Export `recipe` and measure it; the artifact is removed.

        Args:
            recipe: with its seed.
            surfaces: an .npz file for the activations of the drawn layer.

        Returns:
            For JSON: ``recipe``, ``seed``, ``bits``, ``description``, ``perplexity``, ``fp32``,
            ``loss`` (log-perplexity above fp32, nats), ``kl_divergence``, ``top1_agreement``,
            ``layer_snr_db``, ``sites`` (site -> ``max_over_rms`` and ``snr_db``, by layer),
            ``before`` (the same of the float model), ``layer`` (that is drawn), ``sizes`` (its
            sites' tokens and channels), ``bytes``, ``cache_bytes_per_token``, ``seconds``,
            ``targets``, ``passes``.

        Raises:
            QuarotError: what exporting and running raise.
        """
        with tempfile.TemporaryDirectory(dir=self._directory.name) as own:
            artifact = Path(own) / "artifact"
            started = time.perf_counter()
            manifest = export(
                self.model_dir,
                artifact,
                recipe,
                calibration=self.calibration(recipe),
                certify=False,
            )
            exported = time.perf_counter()
            model = OnnxModel(artifact, runtime=self.runtime, threads=self.threads)
            found = agreement(model, self.original, self.windows.tokens)
            cache_bytes = model.cache_bytes_per_token
            del model
            evaluated = time.perf_counter()
            layers = self._observe(artifact, surfaces)
            size = sum((artifact / name).stat().st_size for name in (MODEL, DATA))
        return {
            "recipe": recipe.name,
            "seed": recipe.seed,
            "description": recipe.description,
            "bits": bits_of(recipe),
            "perplexity": found.perplexity,
            "fp32": found.reference_perplexity,
            "loss": math.log(found.perplexity / found.reference_perplexity),
            "kl_divergence": found.kl_divergence,
            "top1_agreement": found.top1_agreement,
            **layers,
            "bytes": size,
            "cache_bytes_per_token": cache_bytes,
            "seconds": {"export": exported - started, "evaluate": evaluated - exported},
            "targets": [asdict(target) for target in recipe.targets()],
            "passes": manifest["passes"],
        }

    def _observe(self, artifact: Path, surfaces: Path) -> dict[str, Any]:
        stream: Float64 = stream_map(self.float_artifact, artifact)
        noise, sites, drawn, sizes = [], [], {}, {}
        layers = observe(artifact, self.observed, threads=self.threads)
        for state, layer in zip(self.before.states, layers, strict=True):
            noise.append(signal_to_noise(state, layer.state, stream))
            sites.append(_measured(layer))
            if layer.index == self.before.layer:
                drawn = {
                    f"{when}/{name}": pooled(np.abs(x[: self.observed.shape[1]]))[0]
                    for when, values in (("before", self.before.values), ("after", layer.sites))
                    for name, x in values.items()
                    if name not in CACHED
                }
                sizes = {
                    name: [self.observed.shape[1], x.shape[1]] for name, x in layer.sites.items()
                }
        np.savez_compressed(surfaces, allow_pickle=False, **drawn)
        return {
            "layer_snr_db": [_finite(value) for value in noise[1:]],
            "sites": _by_site(sites[:-1]),
            "before": _by_site(self.before.sites[:-1]),
            "layer": self.before.layer,
            "sizes": sizes,
        }


class Remembering:
    """A `CausalModel` that computes each prefill once, as far as its logits fit in memory."""

    def __init__(self, model: CausalModel) -> None:
        self._model = model
        self._found: dict[bytes, Logits] = {}

    @property
    def vocabulary_size(self) -> int:
        """How many logits there are for a token."""
        return self._model.vocabulary_size

    def new_cache(self, batch: int) -> Cache:
        """An empty cache for `batch` rows."""
        return self._model.new_cache(batch)

    def step(
        self, input_ids: Ids, cache: Cache, attention_mask: Ids | None = None
    ) -> tuple[Logits, Cache]:
        """Logits [B, S, vocabulary] of `input_ids` [B, S] behind an empty cache."""
        key = input_ids.tobytes()
        logits = self._found.get(key)
        if logits is None:
            logits, cache = self._model.step(input_ids, cache, attention_mask)
            held = sum(found.nbytes for found in self._found.values())
            if held + logits.nbytes <= REMEMBERED_BYTES:
                self._found[key] = logits
        return logits, cache


_Sites = Mapping[str, Mapping[str, float | None]]


@dataclass(frozen=True)
class Before:
    """The model as it is.

    Attributes:
        states: the residual stream in front of each layer and behind the last.
        sites: the statistics of each layer's sites.
        layer: the one with the largest outliers: the largest geometric mean of max/rms.
        values: of its sites.
    """

    states: tuple[Float32, ...]
    sites: tuple[_Sites, ...]
    layer: int
    values: Mapping[str, Float32]

    @classmethod
    def of(cls, layers: Iterable[Observed]) -> "Before":
        """From what was observed; holds one layer's values at a time."""
        states, sites = [], []
        worst, index, values = -math.inf, 0, {}
        for layer in layers:
            states.append(layer.state)
            sites.append(_measured(layer))
            outliers = [s["max_over_rms"] for s in sites[-1].values()]
            score = float(np.mean(np.log([s for s in outliers if s]))) if outliers else -math.inf
            if score > worst:
                worst, index, values = score, layer.index, layer.sites
        return cls(tuple(states), tuple(sites), index, values)


def _measured(layer: Observed) -> dict[str, dict[str, float | None]]:
    found = {name: site_statistics(name, x) for name, x in layer.sites.items()}
    return {
        name: {"max_over_rms": s.max_over_rms, "snr_db": _finite(s.snr_db)}
        for name, s in found.items()
    }


def _by_site(
    layers: Sequence[_Sites],
) -> dict[str, dict[str, list[float | None]]]:
    names = dict.fromkeys(name for layer in layers for name in layer)
    return {
        name: {
            key: [layer[name][key] if name in layer else None for layer in layers]
            for key in ("max_over_rms", "snr_db")
        }
        for name in names
    }


def bits_of(recipe: Recipe) -> str:
    """Such as ``W4A4KV4``."""
    return f"W{recipe.weights.bits}A{recipe.activations.bits}KV{recipe.kv_cache.bits}"


def _finite(value: float) -> float | None:
    """For JSON, which has no infinity."""
    return value if math.isfinite(value) else None


@dataclass(frozen=True)
class Measured:
    """A recipe over its seeds: a row of the table.

    Attributes:
        perplexity: at the mean of the log-perplexities.
        lowest, highest: perplexity of a seed.
        loss: log-perplexity above fp32, in nats; the mean.
        share: of the baseline's loss.
        snr_db: of the residual stream behind the last layer; the mean.
        bytes: on disk.
        seconds: of the export; the mean.
        targets: who can run it.
    """

    recipe: str
    bits: str
    count: int
    perplexity: float
    lowest: float
    highest: float
    loss: float
    share: float | None
    kl_divergence: float
    top1_agreement: float
    snr_db: float | None
    bytes: int
    cache_bytes_per_token: int
    seconds: float
    targets: tuple[str, ...]

    @classmethod
    def of(cls, runs: Sequence[Mapping[str, Any]], unit: float | None) -> "Measured":
        """The row of one recipe's runs; `unit` is the baseline's loss."""
        first = runs[0]
        loss = float(np.mean([run["loss"] for run in runs]))
        last = [s for run in runs if (s := run["layer_snr_db"][-1]) is not None]
        perplexities = [float(run["perplexity"]) for run in runs]
        return cls(
            recipe=first["recipe"],
            bits=first["bits"],
            count=len(runs),
            perplexity=math.exp(float(np.mean(np.log(perplexities)))),
            lowest=min(perplexities),
            highest=max(perplexities),
            loss=loss,
            share=loss / unit if unit is not None and unit > 0 else None,
            kl_divergence=float(np.mean([run["kl_divergence"] for run in runs])),
            top1_agreement=float(np.mean([run["top1_agreement"] for run in runs])),
            snr_db=float(np.mean(last)) if last else None,
            bytes=first["bytes"],
            cache_bytes_per_token=first["cache_bytes_per_token"],
            seconds=float(np.mean([run["seconds"]["export"] for run in runs])),
            targets=tuple(t["name"] for t in first["targets"] if not t["reasons"]),
        )
