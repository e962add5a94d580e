# SPDX-License-Identifier: Apache-2.0
"""The page: a template, its bars and its figures."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from quarot_onnx.activations import SITES, Activation, Statistics
from quarot_onnx.pages import number, render, write_page
from quarot_onnx.pages.figures import AFTER, BEFORE, INK, STYLE, inline, matplotlib, surface_figure
from quarot_onnx.report.content import Perplexity, ReportContent, rotation_plan

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.figure import Figure

_TEMPLATE = Path(__file__).parent / "report.html.jinja"


def write_report(path: Path, content: ReportContent) -> None:
    """Write the page.

    Raises:
        MissingDependencyError: Jinja2 or, for figures, Matplotlib is not installed.
        ResourceError: `path` cannot be written.
    """
    write_page(path, _render(content))


def _render(content: ReportContent) -> str:
    activations = content.activations or {}
    return render(
        _TEMPLATE,
        content=content,
        model=content.model,
        rotations=rotation_plan(content.model, content.passes),
        bars=_damage_bars(content.perplexity),
        surfaces=_surface_figures(activations),
        layers=_layer_figures(activations),
        total_seconds=sum(seconds for _, seconds in content.timing),
    )


@dataclass(frozen=True)
class _Bar:
    label: str
    perplexity: float
    damage: float
    percent: float
    kind: str


def _damage_bars(perplexity: Perplexity | None) -> list[_Bar]:
    """Log-perplexity above fp32, as bars relative to the longest."""
    if perplexity is None or perplexity.float32 is None:
        return []
    rows = [
        ("as it is, no rotation", perplexity.unrotated, "before"),
        ("norm scales folded, no rotation", perplexity.folded, "before"),
        ("rotated", perplexity.quantized, "after"),
    ]
    damages = [
        (label, value, math.log(value / perplexity.float32), kind)
        for label, value, kind in rows
        if value is not None and math.isfinite(value) and value > 0
    ]
    longest = max((damage for _, _, damage, _ in damages), default=0.0)
    if longest <= 0 or len(damages) < 2:
        return []
    return [
        _Bar(label, value, damage, max(0.0, 100 * damage / longest), kind)
        for label, value, damage, kind in damages
    ]


# --- Figures --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _SurfaceFigure:
    """One site of the drawn layer: two figures and what they say in numbers."""

    site: str
    layer: int
    before: "Markup"
    after: "Markup"
    peak_before: float
    peak_after: float
    statistics_before: Statistics
    statistics_after: Statistics


@dataclass(frozen=True)
class _LayerFigure:
    """One site through all layers."""

    site: str
    figure: "Markup"


def _surface_figures(activations: Mapping[str, Activation]) -> list[_SurfaceFigure]:
    found = []
    for site, activation in activations.items():
        for layer, surface in activation.surfaces.items():
            before, after = np.abs(surface.before), np.abs(surface.after)
            peaks = float(before.max()), float(after.max())
            limit = max(*peaks, 1e-30)
            pictures = {
                when: inline(
                    surface_figure(values, limit),
                    f"surface-{site}-{layer}-{when}",
                    f"Magnitude of the {SITES[site]} of layer {layer} by token and channel, "
                    f"{when} rotation; the largest is {number(float(values.max()), 3)}",
                )
                for when, values in (("before", before), ("after", after))
            }
            found.append(
                _SurfaceFigure(
                    site=SITES[site],
                    layer=layer,
                    before=pictures["before"],
                    after=pictures["after"],
                    peak_before=peaks[0],
                    peak_after=peaks[1],
                    statistics_before=activation.before[layer],
                    statistics_after=activation.after[layer],
                )
            )
    return found


def _layer_figures(activations: Mapping[str, Activation]) -> list[_LayerFigure]:
    if not activations:
        return []
    everything = [s for a in activations.values() for s in (*a.before, *a.after)]
    peak = max(s.max_over_rms for s in everything)
    finite = [s.snr_db for s in everything if math.isfinite(s.snr_db)] or [0.0]
    limits = (min(0.0, *finite), max(finite) * 1.08)
    return [
        _LayerFigure(
            SITES[site],
            inline(
                _layer_figure(activation, peak * 1.15, limits),
                f"layers-{site}",
                f"The {SITES[site]} by layer, before and after rotation: max/rms from "
                f"{number(_mean_of(activation.before, 'max_over_rms'), 3)} to "
                f"{number(_mean_of(activation.after, 'max_over_rms'), 3)} on average",
            ),
        )
        for site, activation in activations.items()
    ]


def _mean_of(entries: Sequence[Any], name: str) -> float:
    return float(np.mean([getattr(entry, name) for entry in entries]))


def _layer_figure(activation: Activation, peak: float, limits: tuple[float, float]) -> "Figure":
    mpl = matplotlib()
    from matplotlib.figure import Figure  # noqa: PLC0415

    layers = range(len(activation.before))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(3.4, 3.5))
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(1.15, 1))
        figure.subplots_adjust(left=0.15, right=0.98, top=0.93, bottom=0.11, hspace=0.3)
        for axes, name in ((above, "max_over_rms"), (below, "snr_db")):
            for entries, colour in ((activation.before, BEFORE), (activation.after, AFTER)):
                values = [getattr(entry, name) for entry in entries]
                axes.plot(layers, values, color=colour, marker="o", markersize=3.2, clip_on=False)
            axes.grid(axis="y")
            axes.set_axisbelow(True)
            axes.tick_params(length=0)
        above.axhline(
            _gaussian_peak(activation.group_size), color=INK, linewidth=0.9, linestyle=(0, (3, 3))
        )
        above.set_yscale("log", base=2)
        above.set_ylim(1, peak)
        above.yaxis.set_major_formatter(mpl.ticker.FormatStrFormatter("%g"))
        above.minorticks_off()
        above.set_title("max / rms", loc="left", fontsize=8.5)
        below.set_ylim(*limits)
        below.yaxis.set_major_locator(mpl.ticker.MaxNLocator(4, integer=True))
        below.set_title("4-bit SNR, dB", loc="left", fontsize=8.5)
        below.xaxis.set_major_locator(mpl.ticker.MaxNLocator(6, integer=True))
        below.set_xlabel("layer")
        margin = 0.5 if len(layers) == 1 else 0.04 * (len(layers) - 1)
        below.set_xlim(-margin, len(layers) - 1 + margin)
    return figure


def _gaussian_peak(channels: int) -> float:
    """The median of max|x| over `channels` standard normal numbers."""
    return statistics.NormalDist().inv_cdf((1 + 0.5 ** (1 / channels)) / 2)
