# SPDX-License-Identifier: Apache-2.0
"""Prints the perplexities of the embedded model under fake quantization, as in the README.

    python examples/tiny_llama/measure.py [MODEL_DIR] [--quick]

Judged by tests/fake_quant.py in PyTorch, on 96 windows of 256 tokens of heldout.txt.
"""

import argparse
import math
import pathlib
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1] / "tests"))

from fake_quant import fake_quantize, perplexity  # noqa: E402

ROWS: list[tuple[str, dict[str, float]]] = [
    ("not rotated, W4A4KV4", {"rotate": False, "fold_norms": False}),
    ("not rotated, norms folded, W4A4KV4", {"rotate": False}),
    ("QuaRot W4A4KV4 RTN", {"rotate": True}),
    ("not rotated, W4 only", {"rotate": False, "bits_a": 16, "bits_kv": 16}),
    ("not rotated, A4 only", {"rotate": False, "bits_w": 16, "bits_kv": 16}),
    ("not rotated, KV4 only", {"rotate": False, "bits_w": 16, "bits_a": 16}),
    ("QuaRot W4 only", {"rotate": True, "bits_a": 16, "bits_kv": 16}),
    ("QuaRot A4 only", {"rotate": True, "bits_w": 16, "bits_kv": 16}),
    ("QuaRot KV4 only", {"rotate": True, "bits_w": 16, "bits_a": 16}),
    ("QuaRot W4A4KV4 RTN, seed 1", {"rotate": True, "seed": 1}),
    ("QuaRot W4A4KV4 RTN, seed 2", {"rotate": True, "seed": 2}),
    ("QuaRot, no quantization", {"rotate": True, "bits_w": 16, "bits_a": 16, "bits_kv": 16}),
]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="perplexities of the embedded model")
    parser.add_argument("model_dir", type=pathlib.Path, nargs="?", default=HERE / "model")
    parser.add_argument("--quick", action="store_true", help="only the first three rows")
    arguments = parser.parse_args()
    torch.set_num_threads(2)

    model = AutoModelForCausalLM.from_pretrained(arguments.model_dir, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model_dir)
    text = (arguments.model_dir.parent / "heldout.txt").read_text("utf-8")
    tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    base = perplexity(model, tokens)
    print(f"| model | perplexity | times fp32 |\n|---|---|---|\n| fp32 | {base:.3f} | 1 |")
    measured = {}
    for label, options in ROWS[: 3 if arguments.quick else None]:
        measured[label] = perplexity(fake_quantize(model, **options), tokens)
        print(f"| {label} | {measured[label]:.3f} | {measured[label] / base:.3f} |", flush=True)
    left = math.log(measured["QuaRot W4A4KV4 RTN"] / base)
    for label in list(measured)[:2]:
        removed = 1 - left / math.log(measured[label] / base)
        print(f"\nQuaRot removes {removed:.1%} of the damage in log-perplexity of: {label}")


if __name__ == "__main__":
    main()
