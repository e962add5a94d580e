# SPDX-License-Identifier: Apache-2.0
"""Gives the trained Qwen3 the outliers of a large model, without changing what it computes.

    python examples/tiny_qwen3/add_outliers.py WORK_DIR [OUT_DIR]

reads WORK_DIR/checkpoint as train.py left it, and writes model/ into OUT_DIR (by default beside
this script). The maps are those of ``examples/tiny_llama/add_outliers.py`` with two differences:

* The embedding is tied to the head, so both are turned by the same P, and the last norm, whose gain
  is 1, gets no new gain.
* Keys and queries pass norms of their own. Their outlier is a gain s on one RoPE pair of k_norm and
  1/s on the same pair of q_norm, so that it is there in every cache head.
"""

import argparse
import copy
import pathlib
import shutil
import sys

import torch
from transformers import AutoTokenizer, Qwen3ForCausalLM

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from examples.tiny_llama import add_outliers as common  # noqa: E402

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")

# As in examples/tiny_llama: the median of an outlier channel in units of the RMS over its site.
DOWN_INPUT = (20.0, 10.0, 10.0, 10.0)  # one channel of the layer
VALUE = (8.0, 8.0, 8.0, 8.0)  # one channel of one cache head
KEY = (6.0, 6.0, 6.0, 6.0)  # one RoPE pair of all cache heads
GAIN_SPREAD = 1.0  # of the logarithm of the norms' new gains


def in_float64(model: Qwen3ForCausalLM) -> Qwen3ForCausalLM:
    """A copy in float64 throughout, with a head of its own."""

    def norm_like(old: torch.nn.Module) -> torch.nn.Module:
        norm = torch.nn.RMSNorm(model.config.head_dim, model.config.rms_norm_eps)
        norm.load_state_dict(old.state_dict())
        return norm.double()

    changed = common.in_float64(model)
    for layer in changed.model.layers:
        layer.self_attn.q_norm = norm_like(layer.self_attn.q_norm)
        layer.self_attn.k_norm = norm_like(layer.self_attn.k_norm)
    changed.lm_head.weight = torch.nn.Parameter(changed.lm_head.weight.detach().clone())
    return changed


@torch.no_grad()
def scale_pairs(model: Qwen3ForCausalLM, rows: torch.Tensor) -> None:
    """The diagonal maps of up/down, V/O and K/Q, from the activations of `rows`."""
    layers = list(model.model.layers)
    outputs = [module for x in layers for module in (x.self_attn.k_norm, x.self_attn.v_proj)]
    seen = common.inputs_and_outputs(model, rows, [x.mlp.down_proj for x in layers], outputs)
    for index, layer in enumerate(layers):
        attention, mlp = layer.self_attn, layer.mlp
        common.scale_up_and_down(mlp, seen[mlp.down_proj], DOWN_INPUT[index])
        common.scale_values(attention, seen[attention.v_proj], VALUE[index])
        keys = seen[attention.k_norm].flatten(0, 1)  # [tokens * heads, head_dim]
        pairs = keys.unflatten(1, (2, -1)).norm(dim=1)
        scale = common.outlier_scales(pairs, KEY[index]).repeat(2)
        attention.k_norm.weight *= scale
        attention.q_norm.weight /= scale


@torch.no_grad()
def add_outliers(
    model: Qwen3ForCausalLM, rows: torch.Tensor, seed: int
) -> tuple[Qwen3ForCausalLM, float]:
    """(the changed model in float64, max |difference of logits| / max |logit| on `rows`)."""
    before = in_float64(model)
    after = copy.deepcopy(before)
    common.fold_norms(after)
    common.rotate_residual(after, common.residual_axes(after, rows))
    generator = torch.Generator().manual_seed(seed)
    common.add_gains(common.norms_and_readers(after)[:-1], GAIN_SPREAD, generator)
    scale_pairs(after, rows)
    if not torch.equal(after.lm_head.weight, after.model.embed_tokens.weight):
        raise SystemExit("add_outliers: embedding and head differ; is the last norm's gain 1?")
    expected = before(input_ids=rows).logits
    difference = (after(input_ids=rows).logits - expected).abs().max() / expected.abs().max()
    return after, float(difference)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="add outliers to the second trained model")
    parser.add_argument("work_dir", type=pathlib.Path)
    parser.add_argument(
        "out_dir", type=pathlib.Path, nargs="?", default=pathlib.Path(__file__).parent
    )
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(2)

    checkpoint = arguments.work_dir / "checkpoint"
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = Qwen3ForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    text = (ROOT / "examples" / "tiny_llama" / "calibration.txt").read_text("utf-8")
    tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    rows = torch.tensor(tokens[: 64 * 256]).unflatten(0, (64, 256))

    changed, difference = add_outliers(model, rows, arguments.seed)
    print(f"max |logit after - logit before| / max |logit| = {difference:.1e} in float64")
    if difference > 1e-9:
        raise SystemExit("add_outliers: the maps changed the function")

    shutil.rmtree(arguments.out_dir / "model", ignore_errors=True)
    model = model.bfloat16()
    model.load_state_dict(changed.state_dict())  # rounds once
    model.save_pretrained(arguments.out_dir / "model")
    for name in TOKENIZER_FILES:
        shutil.copyfile(
            ROOT / "examples" / "tiny_llama" / "model" / name, arguments.out_dir / "model" / name
        )


if __name__ == "__main__":
    main()
