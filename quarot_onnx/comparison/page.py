# SPDX-License-Identifier: Apache-2.0
"""The page of a comparison: perplexity against bits, noise by layer, outliers, choices."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from quarot_onnx.comparison.measure import Measured
from quarot_onnx.pages import number, render
from quarot_onnx.pages.figures import (
    AFTER,
    BEFORE,
    FAINT,
    INK,
    STYLE,
    Float32,
    inline,
    matplotlib,
    surface_figure,
)

if TYPE_CHECKING:
    from markupsafe import Markup

_TEMPLATE = Path(__file__).parent / "comparison.html.jinja"
_BITS = re.compile(r"W(\d+)A(\d+)KV(\d+)")
_LINE = 0.17  # inches between two labels
_CHOICES = 400  # rows of a recipe's choices on the page; all are in the JSON
_LABELLED = ("clip_ratio", "symmetric", "bits", "group_size")


@dataclass(frozen=True)
class Panel:
    """A figure with what stands above it."""

    title: str
    figure: "Markup"


@dataclass(frozen=True)
class Pair:
    """A site of the drawn layer, before and after."""

    site: str
    before: "Markup"
    after: "Markup"
    peak_before: float
    peak_after: float


@dataclass(frozen=True)
class Choices:
    """What a recipe decided by measuring.

    Attributes:
        recipe: its name.
        title: of the pass.
        figure: clip ratios by layer, where there are any.
        columns: of the table.
        cells: the table, one row per site.
        hidden: how many rows are left out.
    """

    recipe: str
    title: str
    figure: "Markup | None"
    columns: tuple[str, ...]
    cells: tuple[tuple[str, ...], ...]
    hidden: int


def page_of(
    content: Mapping[str, Any], rows: Sequence[Measured], model_dir: Path, runs_dir: Path
) -> str:
    """The HTML of a comparison.

    Args:
        content: of ``comparison.json``.
        rows: one per recipe that worked.
        model_dir: names the model.
        runs_dir: holds the ``.npz`` of each run.

    Raises:
        MissingDependencyError: Jinja2 or Matplotlib is not installed.
    """
    good = [run for run in content["runs"] if "error" not in run]
    first = {run["recipe"]: run for run in reversed(good)}  # the lowest seed of each
    lossy = [row for row in rows if row.bits != "W16A16KV16"]
    best = min((row for row in lossy if _mean_bits(row.bits) <= 4), key=_loss, default=None)
    folder = model_dir.resolve()
    return render(
        _TEMPLATE,
        content=content,
        name=folder.parent.name if folder.name == "model" else folder.name,
        rows=sorted(rows, key=lambda row: row.loss),
        failed=[run for run in content["runs"] if "error" in run],
        best=best,
        bits=_bits_figure(lossy) if lossy else None,
        layers=_noise_panels([first[row.recipe] for row in lossy]),
        sites=list(good[0]["before"]) if good else [],
        atlas=_atlas(good[:1], [first[row.recipe] for row in lossy]),
        pairs=_pairs(first[best.recipe], runs_dir) if best is not None else [],
        drawn=first[best.recipe]["layer"] if best is not None else 0,
        choices=[
            found
            for row in lossy
            for entry in first[row.recipe]["passes"]
            if (found := _choices(row.recipe, entry)) is not None
        ],
    )


def _loss(row: Measured) -> float:
    return row.loss


def _mean_bits(bits: str) -> float:
    match = _BITS.fullmatch(bits)
    assert match is not None
    return sum(int(part) for part in match.groups()) / 3


# --- Perplexity against bits ----------------------------------------------------------------------


def _bits_figure(rows: Sequence[Measured]) -> "Markup":
    """Loss against the mean of the bits of weights, activations and cache; a bar over the seeds."""
    mpl = matplotlib()
    from matplotlib.figure import Figure  # noqa: PLC0415

    columns = sorted({_mean_bits(row.bits) for row in rows})
    tallest = max(sum(_mean_bits(row.bits) == bits for row in rows) for bits in columns)
    height = max(4.6, 1 + _LINE * tallest)  # inches
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8.6, height))
        axes: Any = figure.add_axes((0.07, 0.45 / height, 0.92, 1 - 0.75 / height))
        values = [max(row.loss, 1e-5) for row in rows]
        axes.set_yscale("log")
        low, high = min(values) / 1.6, max(values) * 1.6
        axes.set_ylim(low, high)
        axes.set_xlim(-0.3, len(columns) - 0.1)
        gap = (math.log(high) - math.log(low)) * _LINE / (height - 0.75)
        for column, bits in enumerate(columns):
            here = sorted((r for r in rows if _mean_bits(r.bits) == bits), key=_loss)
            marks = [math.log(max(row.loss, 1e-5)) for row in here]
            for row, mark, text in zip(
                here, marks, _apart(marks, gap, math.log(high)), strict=True
            ):
                colour = BEFORE if "unrotated" in row.recipe else AFTER
                fp32 = row.perplexity / math.exp(row.loss)
                ends = [max(math.log(p / fp32), 1e-5) for p in (row.lowest, row.highest)]
                axes.plot([column, column], ends, color=colour, linewidth=4, alpha=0.25)
                axes.plot(column, math.exp(mark), "o", color=colour, markersize=4.5)
                axes.plot(
                    [column + 0.02, column + 0.06],
                    [math.exp(mark), math.exp(text)],
                    color=FAINT,
                    linewidth=0.8,
                )
                axes.text(
                    column + 0.07,
                    math.exp(text),
                    f"{row.recipe}  {number(row.perplexity, 4)}",
                    fontsize=7.5,
                    va="center",
                )
        names = {_mean_bits(row.bits): row.bits for row in rows}
        axes.set_xticks(range(len(columns)), [names[bits] for bits in columns])
        axes.yaxis.set_major_formatter(mpl.ticker.FormatStrFormatter("%g"))
        axes.set_title("log-perplexity above fp32, nats per token", loc="left", fontsize=8.5)
        axes.grid(axis="y")
        axes.set_axisbelow(True)
        axes.tick_params(length=0)
    best = min(rows, key=_loss)
    return inline(
        figure,
        "bits",
        f"Loss of {len(rows)} recipes by bits; the least is {best.recipe} with "
        f"{number(best.loss, 3)} nats",
    )


def _apart(marks: Sequence[float], gap: float, top: float) -> list[float]:
    """Ascending positions near `marks`, at least `gap` from one another, none above `top`."""
    found: list[float] = []
    for mark in marks:
        found.append(mark if not found else max(mark, found[-1] + gap))
    for index in reversed(range(len(found))):
        found[index] = min(found[index], top - gap * (len(found) - 1 - index))
    return found


# --- Noise by layer -------------------------------------------------------------------------------


def _noise_panels(runs: Sequence[Mapping[str, Any]]) -> list[Panel]:
    """One panel per recipe: its signal-to-noise behind each layer, all others faint."""
    lines = {run["recipe"]: _numbers(run["layer_snr_db"]) for run in runs}
    finite = [value for line in lines.values() for value in line if math.isfinite(value)]
    if not finite:
        return []
    limits = (min(0.0, *finite), max(finite) * 1.06)
    panels = []
    for index, (name, line) in enumerate(lines.items()):
        mean = float(np.nanmean(line)) if np.isfinite(line).any() else math.nan
        label = f"Signal-to-noise ratio behind each layer of {name}: {number(mean, 3)} dB"
        panels.append(Panel(name, _noise_figure(lines, name, limits, f"noise-{index}", label)))
    return panels


def _numbers(values: Sequence[float | None]) -> list[float]:
    return [math.nan if value is None else value for value in values]


def _noise_figure(
    lines: Mapping[str, Sequence[float]],
    shown: str,
    limits: tuple[float, float],
    name: str,
    label: str,
) -> "Markup":
    mpl = matplotlib()
    from matplotlib.figure import Figure  # noqa: PLC0415

    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(3.4, 2.0))
        axes: Any = figure.add_axes((0.11, 0.2, 0.87, 0.76))
        for other, line in lines.items():
            if other != shown:
                axes.plot(range(1, len(line) + 1), line, color=FAINT, linewidth=0.9)
        colour = BEFORE if "unrotated" in shown else AFTER
        line = lines[shown]
        axes.plot(range(1, len(line) + 1), line, color=colour, marker="o", markersize=3.2)
        axes.set_ylim(*limits)
        axes.xaxis.set_major_locator(mpl.ticker.MaxNLocator(6, integer=True))
        axes.yaxis.set_major_locator(mpl.ticker.MaxNLocator(4, integer=True))
        axes.set_xlabel("behind layer")
        axes.grid(axis="y")
        axes.tick_params(length=0)
    return inline(figure, name, label)


# --- Outliers -------------------------------------------------------------------------------------


def _atlas(
    original: Sequence[Mapping[str, Any]], runs: Sequence[Mapping[str, Any]]
) -> list[tuple[str, list[tuple[float | None, float]]]]:
    """(recipe, for each site (max/rms averaged over layers, its place in 0 to 1 in logarithms)."""
    table = [("the model as it is", run["before"]) for run in original]
    table += [(run["recipe"], run["sites"]) for run in runs]
    names = list(table[0][1]) if table else []
    means = [
        (recipe, [_mean(sites.get(name, {}).get("max_over_rms", ())) for name in names])
        for recipe, sites in table
    ]
    largest = max((v for _, line in means for v in line if v is not None), default=1.0)
    scale = math.log(max(largest, 1.001))
    return [
        (recipe, [(v, 0.0 if v is None else max(0.0, math.log(max(v, 1)) / scale)) for v in line])
        for recipe, line in means
    ]


def _mean(values: Sequence[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return float(np.mean(found)) if found else None


def _pairs(run: Mapping[str, Any], runs_dir: Path) -> list[Pair]:
    path = runs_dir / f"{run['recipe']}-seed{run['seed']}.npz"
    try:
        with np.load(path) as file:
            found: dict[str, Float32] = {name: file[name] for name in file.files}
    except (OSError, ValueError):
        return []
    sites = [name.partition("/")[2] for name in found if name.startswith("before/")]
    pairs = []
    for site in sites:
        before, after = found[f"before/{site}"], found.get(f"after/{site}")
        if after is None or site not in run["sizes"]:
            continue
        peaks = float(before.max()), float(after.max())
        limit = max(*peaks, 1e-30)
        pictures = [
            inline(
                surface_figure(values, limit, (run["sizes"][site][0], run["sizes"][site][1])),
                f"surface-{site.replace('.', '-')}-{when}",
                f"Magnitude of the input of {site} by token and channel, {when}",
            )
            for when, values in (("before", before), ("after", after))
        ]
        pairs.append(Pair(site, pictures[0], pictures[1], *peaks))
    return pairs


# --- Choices --------------------------------------------------------------------------------------


def _choices(recipe: str, entry: Mapping[str, Any]) -> Choices | None:
    """What a pass recorded of its decisions; None where it decided nothing."""
    records = entry.get("records") or []
    if not any(key in record for record in records for key in _LABELLED):
        return None
    columns = tuple(dict.fromkeys(key for record in records for key in record))
    return Choices(
        recipe,
        entry["name"],
        _clip_figure(recipe, entry["name"], records),
        columns,
        tuple(
            tuple(_cell(record.get(column)) for column in columns) for record in records[:_CHOICES]
        ),
        max(0, len(records) - _CHOICES),
    )


def _cell(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: ""}[value]
    return number(float(value), 4) if isinstance(value, float) else str(value)


def _clip_figure(recipe: str, title: str, records: Sequence[Mapping[str, Any]]) -> "Markup | None":
    """Clip ratios by layer, a line per kind of site; hollow where the site is asymmetric."""
    lines: dict[str, list[tuple[int, float, bool]]] = {}
    for record in records:
        layer = re.search(r"layers[./](\d+)", str(record.get("site", "")))
        if layer is not None and isinstance(record.get("clip_ratio"), float):
            symmetric = record.get("symmetric") is not False
            point = (int(layer[1]), record["clip_ratio"], symmetric)
            lines.setdefault(str(record.get("kind", "")), []).append(point)
    values = {clip for line in lines.values() for _, clip, _ in line}
    if len(values) < 2:
        return None
    mpl = matplotlib()
    from matplotlib.figure import Figure  # noqa: PLC0415

    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8.6, 2.2))
        axes: Any = figure.add_axes((0.06, 0.18, 0.76, 0.76))
        for shade, (kind, line) in enumerate(lines.items()):
            style = ("-", "--", ":", "-.")[shade % 4]
            colour = (AFTER, BEFORE, INK)[shade % 3]
            axes.plot([p[0] for p in line], [p[1] for p in line], style, color=colour, label=kind)
            for index, clip, symmetric in line:
                fill = colour if symmetric else "none"
                axes.plot(index, clip, "o", color=colour, markerfacecolor=fill, markersize=4)
        axes.xaxis.set_major_locator(mpl.ticker.MaxNLocator(8, integer=True))
        axes.set_xlabel("layer")
        axes.grid(axis="y")
        axes.tick_params(length=0)
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.02), frameon=False, fontsize=7.5)
    return inline(
        figure,
        f"clips-{re.sub('[^a-z0-9]+', '-', (recipe + title).lower())}",
        f"Clip ratios that {recipe} chose, by layer: {number(min(values), 3)} to "
        f"{number(max(values), 3)}",
    )
