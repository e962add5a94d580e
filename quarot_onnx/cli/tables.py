# SPDX-License-Identifier: Apache-2.0
"""What the commands print for a person: one function per command, tables of plain data.

Every function takes what ``--json`` would print. Rich is imported when something is printed.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quarot_onnx.plugins import build

if TYPE_CHECKING:
    from quarot_onnx.comparison.measure import Measured


_FILE_WIDTH = 120
"""Columns of a table that is not printed on a terminal."""


def show_recipes(recipes: list[dict[str, Any]]) -> None:
    """The presets and what they do."""
    _table(
        "Recipes",
        ["recipe", "what it does", "runs in"],
        [
            [
                recipe["name"],
                recipe["description"],
                ", ".join(t["name"] for t in recipe["targets"] if not t["reasons"]),
            ]
            for recipe in recipes
        ],
    )


def show_findings(findings: list[dict[str, Any]]) -> None:
    """What `doctor` found."""
    _table(
        "This machine",
        ["what", "found", "needed for", "what to do"],
        [[f["name"], f["found"] or "-", f["needed_for"], f["remedy"]] for f in findings],
    )


def show_forecast(found: dict[str, Any]) -> None:
    """The rotation plan, sizes and memory of an export."""
    _table(
        f"Rotations of {found['recipe']} for {found['model_type']}, {found['layers']} layers",
        ["place", "matrix", "runs", "size", "MACs/token", "peaks / by"],
        [
            [
                f"{site['name']}: {site['where']}",
                site["how"],
                site["runs"],
                str(site["size"]),
                f"{site['cost']:,}" if site["cost"] else "-",
                "-" if site["suppression"] is None else f"{site['suppression']:.0f}",
            ]
            for site in found["sites"]
        ],
        numeric=3,
    )
    for site in found["sites"]:
        if site["reason"]:
            print(f"{site['name']}: {site['reason']}")
    for site in found["sites"]:
        if site["candidates"]:
            _table(
                f"{site['name']}, {site['where']} of {site['size']}: rotations.r4_policy",
                ["policy", "matrix", "size", "MACs/token", "peaks / by"],
                [
                    [
                        candidate["policy"] + ("" if number else " (this recipe)"),
                        candidate["how"],
                        str(candidate["size"]),
                        f"{candidate['cost']:,}",
                        f"{candidate['suppression']:.0f}",
                    ]
                    for number, candidate in enumerate(site["candidates"])
                ],
                numeric=3,
            )
    smaller = found["float_cache_bytes_per_token"] / found["cache_bytes_per_token"]
    _table(
        "Sizes",
        ["what", "how much"],
        [
            ["parameters", f"{found['parameters']:,}"],
            ["linears of the layers", _size(found["weight_bytes"])],
            [f"embedding, head, norms ({found['dtype']})", _size(found["float_bytes"])],
            ["on disk", _size(found["weight_bytes"] + found["float_bytes"])],
            ["cache per token", _size(found["cache_bytes_per_token"])],
            ["float32 cache per token is larger by", f"{smaller:.1f} times"],
            ["memory while exporting (estimate)", _size(found["peak_memory_bytes"])],
        ],
        numeric=1,
    )


def show_manifest(out_dir: Path, manifest: dict[str, Any]) -> None:
    """What each pass of an export did."""
    rows = []
    for entry in manifest["passes"]:
        skipped = "; ".join(f"skipped {len(at)}: {why}" for why, at in entry["skipped"].items())
        detail = "; ".join(part for part in (entry["detail"], skipped) if part)
        measured = [_deviation(entry, dtype) for dtype in ("float64", "float32")]
        rows.append([entry["name"], entry["effect"], detail, str(entry["sites"]), *measured])
    _table(
        f"Recipe {manifest['recipe']['name']}; fp64, fp32: deviation from the float model",
        ["pass", "effect", "detail", "sites", "fp64", "fp32"],
        rows,
        numeric=3,
    )
    size = sum((out_dir / name).stat().st_size for name in manifest["files"])
    print(f"wrote {out_dir}: {_size(size)}")
    print(f"next: quarot-onnx validate {out_dir} --reference MODEL_DIR")


def show_build(engine_dir: Path, manifest: dict[str, Any]) -> None:
    """What `build` wrote, and the same build by trtexec."""
    built = manifest["tensorrt"]
    plugins, engine = built["plugins"], built["engine"]
    limits = ", ".join(f"{name.replace('_', ' ')} {n}" for name, n in built["limits"].items())
    rows = [
        ["TensorRT", built["version"] if engine is None else engine["tensorrt"]],
        ["limits", limits],
        [
            "lint",
            "no problem found"
            if plugins is not None
            else f"no problem found; creators not checked: no plugins, run {build.command()}",
        ],
        ["plugins", "-" if plugins is None else f"{plugins['file']} {plugins['sha256'][:12]}"],
        [
            "engine",
            "none: --onnx-only"
            if engine is None
            else f"model.plan, {engine['plugin_layers']} plugin layers, "
            f"{(engine['gpu'] or {}).get('name', 'unknown GPU')}",
        ],
    ]
    _table(f"Built {engine_dir}", ["what", "found"], rows)
    print(f"the same build by trtexec, whole in {engine_dir / 'trtexec.sh'}:\n")
    for line in (engine_dir / "trtexec.sh").read_text(encoding="utf-8").splitlines()[1:]:
        is_long = len(line) > _FILE_WIDTH  # the shapes of every layer's cache
        print(f"{line[:_FILE_WIDTH]}... \\" if is_long else line)


def show_verdict(content: dict[str, Any]) -> None:
    """The stages of a validation."""
    marks = {"passed": "✓", "failed": "✗", "skipped": "–"}
    _table(
        "Validation",
        ["", "stage", "what was found", "value", "threshold"],
        [
            [
                marks[stage["status"]],
                stage["id"],
                stage["detail"],
                _number(stage["value"]),
                _number(stage["threshold"]),
            ]
            for stage in content["stages"]
        ],
        numeric=2,
    )


def show_bisection(content: dict[str, Any]) -> None:
    """Each part of the model, up to the first that leaves the reference."""
    departure = content["departure"]
    where = departure["site"] if departure else None
    _table(
        "float model: off from Hugging Face; artifact: off from a new export",
        ["", "part", "float model", "rounding", "artifact"],
        [
            [
                "✗" if site["name"] == where else "✓",
                site["name"],
                _number(site["to_hugging_face"]),
                _number(site["rounding"]),
                _number(site["to_export"]),
            ]
            for site in content["sites"]
        ],
        numeric=3,
    )
    if departure is None:
        print("the artifact follows its reference to the end")


def show_evaluation(content: dict[str, Any]) -> None:
    """Perplexities side by side."""
    baselines = content.get("baselines", {})
    labels = {
        "fp32": "Hugging Face, fp32",
        "unrotated": "same bits, unrotated",
        "folded": "same bits, norm scales folded, unrotated",
    }
    rows = [[labels[name], f"{baselines[name]:,.3f}"] for name in labels if name in baselines]
    rows.append([f"{content['recipe']} on {content['runtime']}", f"{content['perplexity']:,.3f}"])
    _table(
        f"Perplexity over {content['windows']} windows of {content['window_length']} tokens",
        ["model", "perplexity"],
        rows,
        numeric=1,
    )
    for name, removed in content.get("damage_removed", {}).items():
        print(f"{removed:.1%} of the damage is removed, in log-perplexity against: {labels[name]}")
    if agreed := content.get("agreement"):
        print(
            f"against fp32: KL divergence {agreed['kl_divergence']:.4g} nats per token, "
            f"top-1 agreement {agreed['top1_agreement']:.1%}"
        )
    if noise := content.get("layer_snr_db"):
        shown = ", ".join("∞" if value is None else f"{value:.1f}" for value in noise)
        print(f"signal-to-noise behind each layer, dB: {shown}")
    if decode := content.get("decode"):
        print(
            f"token by token through the cache: perplexity {decode['perplexity']:.3f}, "
            f"top-1 agreement with one pass {decode['top1_agreement']:.1%}"
        )


def show_comparison(out_dir: Path, content: dict[str, Any], rows: Sequence["Measured"]) -> None:
    """Recipes side by side, the least loss first."""
    share = [f"of {content['baseline']}"] if content["baseline"] else []
    _table(
        f"{content['windows']} windows of {content['window_length']} tokens of {content['text']}; "
        f"fp32: {content['fp32']:.3f}",
        ["recipe", "bits", "perplexity", "loss", *share, "KL", "top-1", "MB"],
        [
            [
                row.recipe,
                row.bits,
                f"{row.perplexity:,.3f}",
                f"{row.loss:.4f}",
                *(["" if row.share is None else f"{row.share:.0%}"] if share else []),
                f"{row.kl_divergence:.4f}",
                f"{row.top1_agreement:.1%}",
                f"{row.bytes / 1e6:.2f}",
            ]
            for row in sorted(rows, key=lambda row: row.loss)
        ],
        numeric=6 + len(share),
    )
    print(f"wrote {out_dir}: comparison.html, comparison.md, comparison.json")


def _deviation(entry: dict[str, Any], dtype: str) -> str:
    """The worst site of a pass, as certified in `dtype`; empty where nothing was measured."""
    found = {c["dtype"]: f"{c['worst']:.1e}" for c in entry.get("certificates", ())}
    return found.get(dtype, "")


def show_inspection(found: dict[str, Any], *, all_layers: bool) -> None:
    """An artifact's linears, cache and operators."""
    from quarot_onnx.rotation import INPUTS, PLACES  # noqa: PLC0415  # it computes, most tables do not

    manifest = found["manifest"]
    print(
        f"{manifest['source']['model_type']}, recipe {manifest['recipe']['name']}, "
        f"{manifest['dtype']}: {found['layers']} layers, {found['nodes']} nodes, "
        f"{_size(found['weight_bytes'])} of weights"
    )
    done = {entry["name"]: entry for entry in manifest["passes"]}
    _table(
        "Rotations",
        ["rotation", "what it turns", "runs", "matrix", "places", "fp64"],
        [
            [
                place.name,
                place.where,
                ("fused" if place.is_fused else "online")
                if entry["sites"]
                else f"skipped: {'; '.join(entry['skipped'])}",
                entry["detail"],
                str(entry["sites"]),
                _deviation(entry, "float64"),
            ]
            for place in (*PLACES, INPUTS)
            for entry in (done[name] for name in place.put_by if name in done)
        ],
        numeric=2,
    )
    shown = _one_expert([r for r in found["linears"] if all_layers or r["layer"] in (None, 0)])
    _table(
        "Linears" if all_layers else f"Linears of layer 0 (of {found['layers']}) and the head",
        ["layer", "linear", "rotated by", "shape", "W", "A", "size"],
        [
            [
                "-" if row["layer"] is None else str(row["layer"]),
                row["name"],
                row["rotation"],
                f"{row['in_features']} x {row['out_features']}",
                str(row["weight_bits"]),
                str(row["activation_bits"]),
                _size(row["bytes"]),
            ]
            for row in shown
        ],
        numeric=4,
    )
    _table("Cache of layer 0", ["input", "dtype", "shape"], [list(row) for row in found["cache"]])
    counts = ", ".join(f"{count} {name}" for name, count in found["operators"].items())
    print(f"quarot operators: {counts or 'none'}")


def _one_expert(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`rows` with one row in place of those of all experts of a layer."""
    merged: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        name = re.sub(r"\.experts\.\d+\.", ".experts.*.", row["name"])
        first = merged.setdefault((row["layer"], name), {**row, "name": name, "bytes": 0, "of": 0})
        first["bytes"] += row["bytes"]
        first["of"] += 1
    for row in merged.values():
        if row["of"] > 1:
            row["name"] += f" ({row['of']})"
    return list(merged.values())


def _size(count: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:,.2f} {unit}"
    return f"{count:.0f} bytes"


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)


def _table(title: str, columns: list[str], rows: list[list[str]], numeric: int = 0) -> None:
    """Print a table; the last `numeric` columns are right-aligned."""
    from rich import box  # noqa: PLC0415
    from rich.console import Console  # noqa: PLC0415
    from rich.markup import escape  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415

    table = Table(title=escape(title), box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
    for position, column in enumerate(columns):
        right = position >= len(columns) - numeric
        table.add_column(
            column, justify="right" if right else "left", no_wrap=right, overflow="fold"
        )
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    console = Console(highlight=False)
    if not console.is_terminal:  # a file has room for names in one piece
        console.width = max(console.width, _FILE_WIDTH)
    console.print(table)


def show_repository(repository: Path, manifest: dict[str, Any]) -> None:
    """What was written and how to start it."""
    settings = ", ".join(f"{key} {value}" for key, value in manifest["parameters"].items())
    print(f"wrote {repository}: model {manifest['model']} ({settings})")
    print(f"next: {repository}/run.sh")
    print(f'      {repository}/client.py "Once upon a time" --model {manifest["model"]}')
