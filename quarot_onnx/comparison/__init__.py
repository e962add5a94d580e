# SPDX-License-Identifier: Apache-2.0
"""Recipes side by side on one model: ``quarot-onnx compare``.

Each recipe is exported, measured and put aside before the next one, so an interrupted comparison
goes on where it stopped, and a recipe that fails costs nothing but its own row. The reference of
everything is the Hugging Face model in float32.
"""

import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from quarot_onnx.comparison.measure import Bench, Measured, bits_of
from quarot_onnx.comparison.page import page_of
from quarot_onnx.errors import QuarotError, ResourceError, UsageError
from quarot_onnx.evaluate import WINDOW_LENGTH, WINDOWS
from quarot_onnx.pages import write_page
from quarot_onnx.recipe import Recipe, load_recipe

RUNS, JSON, TABLE, PAGE = "runs", "comparison.json", "comparison.md", "comparison.html"
"""What a comparison leaves in its directory."""

BASELINE = "w4a4kv4-gptq"
"""The recipe whose loss counts as 100 %, where it is among those compared."""

Progress = Callable[[int, int], None]
"""Called with the runs done and the runs in all."""


def compare(
    model_dir: Path,
    out_dir: Path,
    recipes: Sequence[str],
    *,
    settings: Sequence[str] = (),
    seeds: int = 1,
    text: str = "embedded",
    calibration: str = "embedded",
    count: int | None = WINDOWS,
    length: int = WINDOW_LENGTH,
    baseline: str | None = None,
    runtime: str = "ort-cpu",
    threads: int | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Export and measure every recipe, and write the table, the JSON and the page.

    Args:
        model_dir: a local Hugging Face directory.
        out_dir: created; finished runs that are in it are kept.
        recipes: presets or TOML files.
        settings: ``KEY=VALUE``, for all of them.
        seeds: each recipe runs with this many seeds, counted up from its own.
        text: what is evaluated; see `quarot_onnx.texts`.
        calibration: what calibrated methods look at.
        count: how many windows of `text`; None takes all, as the literature does.
        length: tokens of a window.
        baseline: the recipe whose loss counts as 100 %; None takes `BASELINE` where it is there.
        runtime: where artifacts run.
        threads: of one operator.
        force: measure again what has been measured.
        progress: called after each run.

    Returns:
        The content of ``comparison.json``: ``model_type``, ``windows``, ``window_length``,
        ``text``, ``calibration``, ``fp32`` and ``runs``: for each recipe and seed what
        `measure.Bench.measure` returns, or its ``error`` and ``exit_code``.

    Raises:
        UsageError: no recipe, two of one name, or an unknown one; before anything runs.
        InputError: the model or a text cannot be read.
        QuarotError: the class of the first recipe that failed, after all have been tried.
    """
    resolved = _resolve(recipes, settings, seeds)
    if baseline is not None and baseline not in {recipe.name for recipe in resolved}:
        raise UsageError(f"--baseline {baseline}: is not compared; add --recipe {baseline}")
    _make(out_dir / RUNS)
    runs: list[dict[str, Any]] = []
    failures: list[QuarotError] = []
    with Bench(
        model_dir,
        text=text,
        calibration=calibration,
        count=count,
        length=length,
        runtime=runtime,
        threads=threads,
    ) as bench:
        for recipe in resolved:
            file = out_dir / RUNS / f"{recipe.name}-seed{recipe.seed}.json"
            key = bench.key(recipe)
            found = None if force else _finished(file, key)
            if found is None:
                try:
                    found = bench.measure(recipe, file.with_suffix(".npz"))
                except QuarotError as error:
                    failures.append(error)
                    found = _failed(recipe, error)
                _write(file, {"key": key, **found})
            runs.append(found)
            if progress is not None:
                progress(len(runs), len(resolved))
            content = _content(bench.facts(), runs, baseline)
            _write(out_dir / JSON, content)
    write_page(out_dir / TABLE, table(content))
    write_page(out_dir / PAGE, page_of(content, rows(content), model_dir, out_dir / RUNS))
    if failures:
        first = next(run for run in runs if "error" in run)
        raise type(failures[0])(
            f"{len(failures)} of {len(runs)} runs failed, first {first['recipe']}: {failures[0]}; "
            f"the others are in {out_dir / PAGE}"
        )
    return content


def _resolve(recipes: Sequence[str], settings: Sequence[str], seeds: int) -> list[Recipe]:
    if not recipes:
        raise UsageError("--recipe: is missing; give at least one")
    found = [load_recipe(name, settings) for name in recipes]
    names = [recipe.name for recipe in found]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UsageError(f"--recipe: two are named {twice}; give each file a name of its own")
    return [
        recipe.model_copy(update={"seed": recipe.seed + offset})
        for recipe in found
        for offset in range(seeds)
    ]


def _content(
    facts: dict[str, Any], runs: list[dict[str, Any]], baseline: str | None
) -> dict[str, Any]:
    names = {run["recipe"] for run in runs}
    fp32 = next((run["fp32"] for run in runs if "fp32" in run), None)
    return {
        **facts,
        "fp32": fp32,
        "baseline": baseline or (BASELINE if BASELINE in names else None),
        "runs": runs,
    }


def _failed(recipe: Recipe, error: QuarotError) -> dict[str, Any]:
    return {
        "recipe": recipe.name,
        "seed": recipe.seed,
        "bits": bits_of(recipe),
        "error": " ".join(str(error).split()),
        "exit_code": error.exit_code,
    }


def _make(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResourceError(
            f"{directory}: cannot be created ({error.strerror}); choose another place"
        ) from error


def _write(path: Path, content: dict[str, Any]) -> None:
    """Whole or not at all: a comparison may be stopped at any time."""
    partial = path.with_name(f".{path.name}.partial")
    write_page(partial, json.dumps(content, indent=1, allow_nan=False) + "\n")
    os.replace(partial, path)


def _finished(path: Path, key: str) -> dict[str, Any] | None:
    """What an earlier call measured under the same conditions; a failure is tried again."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(found, dict) or found.pop("key", None) != key or "error" in found:
        return None
    return found


# --- The table ------------------------------------------------------------------------------------


def rows(content: dict[str, Any]) -> list[Measured]:
    """One row per recipe that worked, over its seeds, in the order in which they were given."""
    found: dict[str, list[dict[str, Any]]] = {}
    for run in content["runs"]:
        if "error" not in run:
            found.setdefault(run["recipe"], []).append(run)
    means = {name: math.fsum(r["loss"] for r in runs) / len(runs) for name, runs in found.items()}
    unit = means.get(content["baseline"]) if content["baseline"] else None
    return [Measured.of(runs, unit) for runs in found.values()]


def table(content: dict[str, Any]) -> str:
    """The comparison in Markdown."""
    lines = [
        f"{content['windows']} windows of {content['window_length']} tokens of `{content['text']}`"
        + (f"; Hugging Face in fp32: {content['fp32']:.3f}" if content["fp32"] else "")
        + f". Calibrated on `{content['calibration']}`.",
        "",
        "| recipe | bits | perplexity | seeds | loss, nats "
        + (f"| of {content['baseline']} " if content["baseline"] else "")
        + "| KL | top-1 | SNR, dB | MB | export, s | runs in |",
        "|---|---|---|---|---|" + ("---|" if content["baseline"] else "") + "---|" * 6,
    ]
    for row in rows(content):
        cells = [
            f"`{row.recipe}`",
            row.bits,
            f"{row.perplexity:,.3f}",
            "1" if row.count == 1 else f"{row.count}: {row.lowest:,.3f} to {row.highest:,.3f}",
            f"{row.loss:.4f}",
        ]
        if content["baseline"]:
            cells.append("" if row.share is None else f"{row.share:.0%}")
        cells += [
            f"{row.kl_divergence:.4f}",
            f"{row.top1_agreement:.1%}",
            "" if row.snr_db is None else f"{row.snr_db:.1f}",
            f"{row.bytes / 1e6:.2f}",
            f"{row.seconds:.1f}",
            ", ".join(row.targets),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    failed = [run for run in content["runs"] if "error" in run]
    if failed:
        lines += ["", "Failed:", ""]
        lines += [f"* `{run['recipe']}` seed {run['seed']}: {run['error']}" for run in failed]
    return "\n".join(lines) + "\n"
