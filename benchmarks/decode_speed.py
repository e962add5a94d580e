# SPDX-License-Identifier: Apache-2.0
"""ONNX Runtime CPU: time per token of fp32 against W4A4KV4, the same model in one run.

    python benchmarks/decode_speed.py [--layers 4] [--threads 1] [--seconds 20] [--keep DIR]

A Llama layer stack that does not fit the cache (the layers of Llama-3.2-1B, random weights, a small
vocabulary so that the head does not dilute it) is exported as ``float``, ``w4a4kv4`` and
``w4a4kv4-unrotated``. Their runs take turns, so that whatever else the machine does hits all alike;
the table shows medians. The online Hadamards are measured twice: end to end, as the difference
between the rotated and the unrotated model, and as node time in ONNX Runtime's profile, where the
integer products, the same in both, are left out of the difference. Aims: decode 3 times faster than
fp32, Hadamards under 7 % of it.
"""

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from random_llama import Shape, save_random_llama

from quarot_onnx.pipeline import export
from quarot_onnx.recipe import load_recipe

AIM_SPEEDUP, AIM_HADAMARD = 3.0, 0.07
FLOAT, ROTATED, UNROTATED = RECIPES = ("float", "w4a4kv4", "w4a4kv4-unrotated")
WORKLOADS = (
    ("decode, context 128", 128, 1),
    ("decode, context 1024", 1024, 1),
    ("prefill 128", 0, 128),
)
"""Name, cached tokens, new tokens."""

Feeds = dict[str, NDArray[np.generic]]


def open_session(
    directory: Path, threads: int, profile_prefix: Path | None = None
) -> ort.InferenceSession:
    """A session of an artifact, which writes a profile where a prefix is given."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    if profile_prefix is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile_prefix)
    return ort.InferenceSession(directory / "model.onnx", options, ["CPUExecutionProvider"])


def feeds(session: ort.InferenceSession, sequence: int, past: int, vocab_size: int) -> Feeds:
    """Inputs for `sequence` new tokens after `past` cached ones, with a random cache."""
    random = np.random.default_rng(0)
    given: Feeds = {
        "input_ids": random.integers(0, vocab_size, (1, sequence)),
        "attention_mask": np.ones((1, past + sequence), np.int64),
        "position_ids": np.arange(past, past + sequence)[None],
    }
    for value in session.get_inputs():
        if value.name in given:
            continue
        shape = (1, value.shape[1], past, value.shape[3])
        if value.type == "tensor(uint8)":
            given[value.name] = random.integers(0, 256, shape, dtype=np.uint8)
        elif value.name.endswith("_zero"):
            given[value.name] = np.full(shape, 7, np.float32)
        elif value.name.endswith("_scale"):
            given[value.name] = np.full(shape, 0.1, np.float32)
        else:
            given[value.name] = random.standard_normal(shape, dtype=np.float32)
    return given


def milliseconds(session: ort.InferenceSession, given: Feeds) -> float:
    """The time of one run."""
    started = time.perf_counter()
    session.run(None, given)
    return (time.perf_counter() - started) * 1e3


def medians(
    sessions: dict[str, ort.InferenceSession], inputs: dict[str, Feeds], seconds: float
) -> dict[str, float]:
    """The median milliseconds of every recipe; runs take turns for about `seconds`."""
    times: dict[str, list[float]] = {recipe: [] for recipe in sessions}
    for recipe, session in sessions.items():
        milliseconds(session, inputs[recipe])  # the first run allocates
    until = time.perf_counter() + seconds
    while time.perf_counter() < until or len(times[FLOAT]) < 5:
        for recipe, session in sessions.items():
            times[recipe].append(milliseconds(session, inputs[recipe]))
    return {recipe: statistics.median(values) for recipe, values in times.items()}


def profile(directory: Path, threads: int, past: int, vocab_size: int) -> tuple[float, float, int]:
    """One decode step in ONNX Runtime's profile.

    Returns:
        The median milliseconds of all nodes, of all but ``MatMulInteger``, and the number of nodes.
    """
    session = open_session(directory, threads, directory / "profile")
    given = feeds(session, 1, past, vocab_size)
    for _ in range(30):
        session.run(None, given)
    file = Path(session.end_profiling())
    times: dict[tuple[str, str], list[float]] = {}
    for event in json.loads(file.read_text(encoding="utf-8")):
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            node = (event["args"]["op_name"], event["name"])
            times.setdefault(node, []).append(event["dur"] / 1e3)
    file.unlink()
    by_node = {node: statistics.median(values) for node, values in times.items()}
    products = sum(ms for (operator, _), ms in by_node.items() if operator == "MatMulInteger")
    every = sum(by_node.values())
    return every, every - products, len(by_node)


def main() -> None:
    """Parse the command line, export, run, print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden-size", type=int, default=2048)
    parser.add_argument("--intermediate-size", type=int, default=8192)
    parser.add_argument("--vocab-size", type=int, default=1024)
    parser.add_argument(
        "--threads", type=int, default=1, help="of ONNX Runtime, within an operator"
    )
    parser.add_argument("--seconds", type=float, default=20.0, help="per row of the table")
    parser.add_argument("--keep", type=Path, help="put model and artifacts here and leave them")
    arguments = parser.parse_args()
    shape = Shape(
        hidden_size=arguments.hidden_size,
        intermediate_size=arguments.intermediate_size,
        layers=arguments.layers,
        heads=arguments.hidden_size // 64,
        kv_heads=max(1, arguments.hidden_size // 256),
        vocab_size=arguments.vocab_size,
    )
    directory = arguments.keep or Path(tempfile.mkdtemp(prefix="decode_speed_"))
    try:
        model_dir = directory / "model"
        model_dir.mkdir(parents=True, exist_ok=True)
        save_random_llama(model_dir, shape)
        for recipe in RECIPES:
            export(model_dir, directory / recipe, load_recipe(recipe), force=True)
        measure(directory, shape, arguments.threads, arguments.seconds)
    finally:
        if not arguments.keep:
            shutil.rmtree(directory, ignore_errors=True)


def measure(directory: Path, shape: Shape, threads: int, seconds: float) -> None:
    """Time the artifacts in `directory` and print the tables."""
    sessions = {recipe: open_session(directory / recipe, threads) for recipe in RECIPES}
    print(
        f"{shape.layers} layers of {shape.hidden_size} x {shape.intermediate_size}, "
        f"{shape.parameters / 1e6:.0f}M parameters; ONNX Runtime {ort.__version__}, "
        f"{threads} threads on {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    )
    print(
        f"  {'median ms':22} {'fp32':>8} {'W4A4KV4':>8} {'unrotated':>10} "
        f"{'speedup':>8} {'Hadamards':>10}"
    )
    for name, past, sequence in WORKLOADS:
        inputs = {r: feeds(s, sequence, past, shape.vocab_size) for r, s in sessions.items()}
        ms = medians(sessions, inputs, seconds)
        share = 1 - ms[UNROTATED] / ms[ROTATED]
        print(
            f"  {name:22} {ms[FLOAT]:8.2f} {ms[ROTATED]:8.2f} {ms[UNROTATED]:10.2f} "
            f"{ms[FLOAT] / ms[ROTATED]:7.2f}x {share:10.1%}"
        )
    print(f"  {'aim, decode':22} {'':28} {AIM_SPEEDUP:7.2f}x {AIM_HADAMARD:10.1%}")
    del sessions
    print(
        f"  {'node time of a step':22} {'all ms':>8} {'Hadamards ms':>13} {'share':>7} {'nodes':>6}"
    )
    for name, past, sequence in WORKLOADS:
        if sequence == 1:
            every, others, nodes = profile(directory / ROTATED, threads, past, shape.vocab_size)
            _, others_unrotated, _ = profile(directory / UNROTATED, threads, past, shape.vocab_size)
            online = others - others_unrotated
            print(f"  {name:22} {every:8.2f} {online:13.2f} {online / every:7.1%} {nodes:6}")


if __name__ == "__main__":
    main()
