# SPDX-License-Identifier: Apache-2.0
"""Which rounding each site gets: symmetric or asymmetric, and how much of its range is clipped.

Everything is measured on the rows that a quantizer would round, in one walk over the layers with
float activations. Two ways to the mode: by the shape of the rows (QuaRot Extended: skewness and
mean), or by the measured error of both. A clip is searched on a grid for the least mean over the
rows of ``|x - rounded x|^2 / |x|^2``, in which every token counts the same, however large it is.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import onnx_ir as ir

from quarot_onnx.calibration.layers import Float32, LayerRun, Progress, walk
from quarot_onnx.calibration.tokens import Calibration
from quarot_onnx.decoder import Decoder
from quarot_onnx.recipe import Activations, KvCache, Recipe
from quarot_onnx.rounding import Choice, Rounding, Site, activation_sites, cache_sites

_FLOAT_BITS = 16
_ROWS = 2048  # of a site, evenly spaced over the calibration: they decide a clip to the percent
_COARSE = tuple(i / 100 for i in range(30, 101, 10))
_FINE = tuple(i / 100 for i in range(-8, 9, 2))  # around the best of the coarse grid


@dataclass(frozen=True)
class Shape:
    """How far rows are from symmetric around zero, as means over their groups.

    Attributes:
        skewness: |E[(x - μ)³]| / σ³, 0 for a symmetric distribution.
        off_centre: |μ| / σ.
    """

    skewness: float
    off_centre: float

    @classmethod
    def of(cls, rows: Float32) -> "Shape":
        """Of rows [groups, features]; groups that are constant are left out."""
        x = rows.astype(np.float64)
        mean, spread = x.mean(axis=-1, keepdims=True), x.std(axis=-1, keepdims=True)
        varied = spread[:, 0] > 0
        if not varied.any():
            return cls(0.0, 0.0)
        x, mean, spread = x[varied], mean[varied], spread[varied]
        skewness = np.abs((((x - mean) / spread) ** 3).mean(axis=-1)).mean()
        return cls(float(skewness), float(np.abs(mean / spread).mean()))


def relative_error(rows: Float32, rounding: Rounding) -> float:
    """The mean over rows [n, features] of ``|x - rounded x|^2 / |x|^2``; rows of zeros left out."""
    power = np.square(rows, dtype=np.float64).sum(axis=-1)
    kept = power > 0
    if not kept.any():
        return 0.0
    rows, power = rows[kept], power[kept]
    error = np.square(rounding.values(rows) - rows, dtype=np.float64).sum(axis=-1)
    return float((error / power).mean())


def best_clip(rows: Float32, rounding: Rounding) -> tuple[Rounding, float]:
    """`rounding` with the clip ratio of least `relative_error`, and that error.

    On a grid of a tenth from 0.3 to 1, then of 0.02 around its best; of equals the largest.
    """

    def best(candidates: Iterable[float]) -> tuple[float, float]:
        clipped = (replace(rounding, clip_ratio=clip) for clip in candidates)
        return min((relative_error(rows, each), -each.clip_ratio) for each in clipped)

    _, found = best(_COARSE)
    error, found = best(c for step in _FINE if (c := round(step - found, 2)) <= 1)
    return replace(rounding, clip_ratio=-found), error


@dataclass(frozen=True)
class Decision:
    """What a site gets and why.

    Attributes:
        rounding: how it is rounded.
        measured: for the report: the shape of its rows, and the signal-to-noise ratio in decibels
            of each mode that was considered.
    """

    rounding: Rounding
    measured: Mapping[str, Any]


def decide(rows: Float32, rounding: Rounding, section: Activations | KvCache) -> Decision:
    """The rounding of rows [n, features] by the methods that `section` names.

    Args:
        rows: what a quantizer would round.
        rounding: the recipe's, with its clip ratio for where none is searched.
        section: the mode and clip methods, and the thresholds of the mode.
    """
    if not rows.any():  # an expert that no token of the text has visited
        return Decision(rounding, {})
    shape = Shape.of(rows.reshape(-1, rounding.group_size))
    modes = {"symmetric": (True,), "asymmetric": (False,), "error": (True, False)}
    if section.mode == "skew":
        is_skewed = shape.skewness > section.skewness or shape.off_centre > section.off_centre
        considered: tuple[bool, ...] = (not is_skewed,)
    else:
        considered = modes[section.mode]
    found: dict[float, Rounding] = {}
    measured: dict[str, Any] = asdict(shape)
    for symmetric in considered:
        candidate = replace(rounding, symmetric=symmetric)
        if section.clip == "fixed":
            error = relative_error(rows, candidate)
        else:
            candidate, error = best_clip(rows, candidate)
        found.setdefault(error, candidate)
        measured[f"{candidate.mode}_snr_db"] = -10 * math.log10(error) if error > 0 else None
    return Decision(found[min(found)], measured)


class Roundings:
    """The roundings of a recipe; what is measured, is when the first pass asks."""

    def __init__(
        self,
        decoder: Decoder,
        recipe: Recipe,
        calibration: Calibration | None,
        progress: Progress | None = None,
    ) -> None:
        """`calibration` is needed where the recipe is calibrated; `progress` counts layers."""
        self._decoder = decoder
        self._recipe = recipe
        self._calibration = calibration
        self._progress = progress

    def of_activations(self) -> Choice:
        """For the inputs of the linears."""
        return self._choice(activation_sites(self._decoder, self._recipe.activations))

    def of_cache(self) -> Choice:
        """For keys and values."""
        return self._choice(cache_sites(self._decoder, self._recipe.kv_cache))

    def _choice(self, sites: list[Site]) -> Choice:
        found = {site.name: self._decisions[site.name] for site in sites if self._is_open(site)}
        return Choice(
            tuple(
                replace(site, rounding=found[site.name].rounding) if site.name in found else site
                for site in sites
            ),
            {name: decision.measured for name, decision in found.items()},
        )

    def _section(self, site: Site) -> Activations | KvCache:
        return self._recipe.kv_cache if site.is_cached else self._recipe.activations

    def _is_open(self, site: Site) -> bool:
        """Whether the recipe leaves something to be decided."""
        return self._section(site).is_calibrated

    @cached_property
    def _decisions(self) -> dict[str, Decision]:
        """By site, for all that are open, in one walk."""
        assert self._calibration is not None
        sites: list[Site] = []
        if self._recipe.activations.bits < _FLOAT_BITS:
            sites += activation_sites(self._decoder, self._recipe.activations)
        if self._recipe.kv_cache.bits < _FLOAT_BITS:
            sites += cache_sites(self._decoder, self._recipe.kv_cache)
        sites = [site for site in sites if self._is_open(site)]
        decisions = {}
        for run in walk(self._decoder, self._calibration, progress=self._progress):
            own = {site.name: site for site in sites if site.layer == run.layer.index}
            values = {name: site.value for name, site in own.items()}
            for name, rows in _sampled(run, values, self._calibration.tokens.size).items():
                site = own[name]
                by_row = rows.reshape(-1, site.features)
                decisions[name] = decide(by_row, site.rounding, self._section(site))
        return decisions


def _sampled(run: LayerRun, values: Mapping[str, ir.Value], tokens: int) -> dict[str, Float32]:
    """About `_ROWS` evenly spaced tokens [n, features] of each of `values`.

    Of rows that are copied for several experts there are as many times more.
    """
    stride = max(1, tokens // _ROWS)
    kept: dict[str, list[Float32]] = {name: [] for name in values}
    seen = dict.fromkeys(values, 0)
    for batch in run.capture(values):
        for name, rows in batch.items():
            kept[name].append(rows[-seen[name] % stride :: stride].copy())
            seen[name] += len(rows)
    return {name: np.concatenate(parts) for name, parts in kept.items()}
