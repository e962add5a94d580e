# SPDX-License-Identifier: Apache-2.0
"""Trains the second embedded model: a 2-million-parameter Qwen3 on the text of the first.

    python examples/tiny_qwen3/train.py WORK_DIR [--steps N] [--threads N]

leaves in WORK_DIR ``checkpoint/``: a Hugging Face model with the tokenizer of
``examples/tiny_llama``. Text, split, loss and optimizers are those of ``examples/tiny_llama``.
``add_outliers.py`` makes the committed model of it.
"""

import argparse
import pathlib
import sys
import time

import torch
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from examples.tiny_llama import train as common  # noqa: E402

TOKENIZER = ROOT / "examples" / "tiny_llama" / "model"


def make_config() -> Qwen3Config:
    """What the Llama lacks: norms on q and k, tied embeddings, 8 * 32 != 192, orders 12 and 28."""
    return Qwen3Config(
        vocab_size=common.VOCAB_SIZE,
        hidden_size=192,
        intermediate_size=448,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
    )


def train(directory: pathlib.Path, steps: int, seed: int, muon: float, adam: float) -> None:
    """Writes the checkpoint into `directory`; prints the loss every 50 steps.

    The last norm keeps a gain of 1: with tied embeddings nothing can take another gain over, and
    add_outliers.py turns the residual stream.
    """
    texts = common.documents()
    kept_out = [text for name, text in texts.items() if common.is_held_out(name)]
    training = [text for name, text in texts.items() if not common.is_held_out(name)]
    names = [name for name in texts if not common.is_held_out(name)]
    plain = [texts[name] for name in names if not common.IS_TEST.search(name)]
    tokenizer = PreTrainedTokenizerFast.from_pretrained(TOKENIZER)
    stream = common.token_stream(tokenizer, training + 2 * plain)
    held_out = common.token_stream(tokenizer, kept_out)
    print(f"{len(stream):,} training tokens; {len(held_out):,} held out", flush=True)

    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(make_config())
    model.model.norm.weight.requires_grad_(False)
    step_model = torch.compile(model)
    chosen = common.optimizers(model, muon, adam)
    peaks = [optimizer.param_groups[0]["lr"] for optimizer in chosen]
    source = common.batches(stream, seed)
    started = time.time()
    for step in range(1, steps + 1):
        rate = min(step / 50, 1.0) * (1 - (step - 1) / steps)  # warm-up, then linear to zero
        for optimizer, peak in zip(chosen, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * rate
        loss = common.loss_of(step_model, next(source))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in chosen:
            optimizer.step()
            optimizer.zero_grad()
        if step % 50 == 0 or step == steps:
            print(f"step {step}: {time.time() - started:.0f} s, loss {loss.item():.4f}", flush=True)
        if step % 200 == 0 or step == steps:
            found = common.held_out_loss(step_model, held_out)
            print(f"held-out loss {found:.4f}", flush=True)
            model.save_pretrained(directory / "checkpoint")
            tokenizer.save_pretrained(directory / "checkpoint")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="train the second embedded model")
    parser.add_argument("work_dir", type=pathlib.Path)
    parser.add_argument("--steps", type=int, default=1400)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--muon", type=float, default=1.2e-2)
    parser.add_argument("--adam", type=float, default=1.5e-2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    train(arguments.work_dir, arguments.steps, arguments.seed, arguments.muon, arguments.adam)


if __name__ == "__main__":
    main()
