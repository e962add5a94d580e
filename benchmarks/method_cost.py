# SPDX-License-Identifier: Apache-2.0
"""Seconds and peak memory of each weight method, for the embedded model and for a 1B shape.

    python benchmarks/method_cost.py [--layers 2] [--windows 16] [--window-length 512]
        [--set KEY=VALUE] RECIPE...

Each export runs in a process of its own, without certificates; its anonymous memory is sampled from
/proc, as in ``export_1b.py``. The large model is the shape of Llama-3.2-1B with random weights and
random calibration tokens, cut to some layers: the cost of a calibrated method grows with their
number, and the table says what a layer takes. ``--layers 0`` leaves it out. ``--set
learning.steps=10`` cuts a training, whose cost grows with its steps.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

EMBEDDED = Path(__file__).parents[1] / "examples" / "tiny_llama" / "model"
RECIPES = (
    "w4a4kv4",
    "w4a4kv4-gptq",
    "w4a16-gptq-g128",
    "w4a4kv4-smoothrot",
    "w4a4kv4-search",
    "w4a4kv4-gptq-error",
)


def export_and_time(
    model_dir: Path, out_dir: Path, recipe_name: str, overrides: list[str], shape: list[int]
) -> None:
    """The child process: export on random tokens of `shape`, and print the seconds as JSON."""
    started = time.perf_counter()
    from quarot_onnx.calibration import Calibration  # noqa: PLC0415  # its import is timed
    from quarot_onnx.pipeline import export  # noqa: PLC0415
    from quarot_onnx.recipe import load_recipe  # noqa: PLC0415

    vocabulary = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    tokens = np.random.default_rng(0).integers(0, vocabulary, shape)
    manifest = export(
        model_dir,
        out_dir,
        load_recipe(recipe_name, overrides),
        calibration=Calibration.of(tokens, "random tokens"),
        certify=False,
    )
    found = {
        "all": time.perf_counter() - started,
        "calibration": manifest.get("calibration", {}).get("seconds", 0.0),
    }
    print(json.dumps(found))


def row(
    model_dir: Path, recipe: str, overrides: list[str], shape: list[int]
) -> tuple[float, float, float]:
    """Seconds of the process, seconds of its passes, and peak anonymous memory in bytes."""
    from export_1b import run_and_sample  # noqa: PLC0415  # beside this script

    out_dir = Path(tempfile.mkdtemp(prefix="method_cost_")) / "artifact"
    command = [sys.executable, __file__, recipe, "--child", str(model_dir), str(out_dir)]
    command += ["--windows", str(shape[0]), "--window-length", str(shape[1])]
    command += [f"--set={override}" for override in overrides]
    try:
        output, wall, peaks = run_and_sample(command)
    finally:
        shutil.rmtree(out_dir.parent, ignore_errors=True)
    return wall, json.loads(output.splitlines()[-1])["calibration"], peaks["RssAnon"]


def main() -> None:
    """Parse the command line, run, print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("recipes", nargs="*", default=RECIPES, metavar="RECIPE")
    parser.add_argument("--layers", type=int, default=2, help="of the 1B shape; it has 16")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--window-length", type=int, default=512)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--child", nargs=2, type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    shape = [arguments.windows, arguments.window_length]
    if arguments.child:
        export_and_time(*arguments.child, arguments.recipes[0], arguments.set, shape)
        return
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    print(f"  {'model':28} {'recipe':24} {'tokens':>7} {'wall s':>7} {'passes s':>9} {'GB':>6}")
    directory = Path(tempfile.mkdtemp(prefix="method_cost_"))
    models = [("embedded, 4M", EMBEDDED, [128, 256])]
    try:
        if arguments.layers:
            from random_llama import Shape, save_random_llama  # noqa: PLC0415

            save_random_llama(directory, Shape(layers=arguments.layers))
            models.append((f"1B shape, {arguments.layers} of 16 layers", directory, shape))
        for name, model_dir, size in models:
            for recipe in arguments.recipes:
                wall, passes, peak = row(model_dir, recipe, arguments.set, size)
                print(
                    f"  {name:28} {recipe:24} {size[0] * size[1]:7} {wall:7.1f} {passes:9.1f} "
                    f"{peak / 1e9:6.2f}",
                    flush=True,
                )
    finally:
        shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    main()
