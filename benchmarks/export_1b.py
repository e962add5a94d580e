# SPDX-License-Identifier: Apache-2.0
"""Time and memory of exporting a 1B-parameter Llama (the shape of Llama-3.2-1B, random weights).

    python benchmarks/export_1b.py [--layers 16] [--recipe w4a4kv4] [--no-certify]
        [--keep DIR]

The export runs in a process of its own, as the command line does; its anonymous memory (RssAnon:
what the process allocated, without mapped files) is sampled from /proc. Aims on 4 cores: under
3 minutes and under 2 GB.
"""

import argparse
import importlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

AIM_SECONDS, AIM_BYTES = 180.0, 2e9

STAGES = (
    ("quarot_onnx.pipeline", "rewrite", "trace one layer, stitch, passes"),
    ("quarot_onnx.artifacts", "save_model", "compute and write the weights"),
    ("quarot_onnx.artifacts", "save_manifest", "sha256 of what was written"),
)
"""Module, function and description of what is timed on its own."""


def export_and_time(model_dir: Path, out_dir: Path, recipe_name: str, *, certify: bool) -> None:
    """The child process: export, and print the seconds of every stage as JSON."""
    started = time.perf_counter()
    from quarot_onnx.pipeline import export  # noqa: PLC0415  # its import is timed
    from quarot_onnx.recipe import load_recipe  # noqa: PLC0415

    seconds = {"import": time.perf_counter() - started}

    def timed(call: Callable[..., Any], stage: str) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            before = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                seconds[stage] = time.perf_counter() - before

        return wrapper

    for module_name, function, stage in STAGES:
        module = importlib.import_module(module_name)
        setattr(module, function, timed(getattr(module, function), stage))
    export(model_dir, out_dir, load_recipe(recipe_name), certify=certify)
    seconds["rest"] = time.perf_counter() - started - sum(seconds.values())
    print(json.dumps(seconds))


def run_and_sample(command: list[str]) -> tuple[str, float, dict[str, int]]:
    """The output of `command`, its wall seconds, and its peak RssAnon and VmHWM in bytes."""
    peaks = {"RssAnon": 0, "VmHWM": 0}
    started = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            try:
                status = Path(f"/proc/{process.pid}/status").read_text(encoding="ascii")
            except OSError:
                break
            for line in status.splitlines():
                key, _, value = line.partition(":")
                if key in peaks:
                    peaks[key] = max(peaks[key], int(value.split()[0]) * 1024)
            time.sleep(0.02)
        output, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"export: exit code {process.returncode}")
    return output, time.perf_counter() - started, peaks


def main() -> None:
    """Parse the command line, run, print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=16, help="depth; 16 is the full 1B model")
    parser.add_argument("--recipe", default="w4a4kv4")
    parser.add_argument("--no-certify", action="store_true", help="leave the certificates out")
    parser.add_argument("--keep", type=Path, help="put model and artifact here and leave them")
    parser.add_argument("--child", nargs=2, type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        export_and_time(*arguments.child, arguments.recipe, certify=not arguments.no_certify)
        return

    from random_llama import Shape, save_random_llama  # noqa: PLC0415  # keeps the child lean

    shape = Shape(layers=arguments.layers)
    directory = arguments.keep or Path(tempfile.mkdtemp(prefix="export_1b_"))
    model_dir, out_dir = directory / "model", directory / "artifact"
    try:
        if not (model_dir / "model.safetensors").exists():
            model_dir.mkdir(parents=True, exist_ok=True)
            save_random_llama(model_dir, shape)
        shutil.rmtree(out_dir, ignore_errors=True)
        command = [sys.executable, __file__, "--recipe", arguments.recipe]
        command += ["--no-certify"] * arguments.no_certify + ["--child"]
        output, wall, peaks = run_and_sample([*command, str(model_dir), str(out_dir)])
        written = sum(path.stat().st_size for path in out_dir.rglob("*"))
    finally:
        if not arguments.keep:
            shutil.rmtree(directory, ignore_errors=True)

    print(
        f"{shape.parameters / 1e9:.2f}B parameters, {shape.layers} layers, "
        f"recipe {arguments.recipe}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    )
    for stage, seconds in json.loads(output.splitlines()[-1]).items():
        print(f"  {stage:36} {seconds:8.1f} s")
    print(f"  {'wall time of the process':36} {wall:8.1f} s   aim {AIM_SECONDS:.0f} s")
    print(
        f"  {'peak anonymous memory (RssAnon)':36} {peaks['RssAnon'] / 1e9:8.2f} GB  "
        f"aim {AIM_BYTES / 1e9:.0f} GB"
    )
    print(f"  {'peak with mapped files (VmHWM)':36} {peaks['VmHWM'] / 1e9:8.2f} GB")
    print(f"  {'artifact':36} {written / 1e9:8.2f} GB")


if __name__ == "__main__":
    main()
