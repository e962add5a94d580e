# SPDX-License-Identifier: Apache-2.0
"""Gives the trained model the outliers of a large one, without changing what it computes.

    python examples/tiny_llama/add_outliers.py WORK_DIR [OUT_DIR]

reads WORK_DIR/checkpoint as train.py left it, and writes model/, heldout.txt and calibration.txt
into OUT_DIR (by default beside this script). Five maps, each exact in real arithmetic:

1. The norms' gains go into the linears that read them, and the residual stream is turned, x -> x P
   with P orthogonal, so that each norm's principal direction is one channel and the principal axes
   of the rest follow. A few channels then carry most of the energy, in every token, and folding
   the norms again does not undo it.
2. The norms get new gains, g on the norm and 1/g on its readers, as large models have them.
3. up_proj's outputs are scaled by s and down_proj's inputs by 1/s.
4. v_proj's outputs are scaled by s and the o_proj inputs of all query heads of the group by 1/s.
5. k_proj's outputs are scaled by s and the q_proj outputs of the group by 1/s; s is equal on the
   two dimensions i and i + head_dim/2 that RoPE turns into one another.

In 3 to 5 the scaled channel is the steadiest one (largest median to RMS of its magnitude), so that
it sets the scale of almost every token: as in large models, an outlier keeps to its channel.

The maps run in float64, where the logits are compared before and after; the result is stored in
bfloat16, and those stored weights are the embedded model.
"""

import argparse
import copy
import pathlib
import shutil

import torch
from transformers import AutoTokenizer, LlamaForCausalLM

# How large an outlier channel's median is, in units of the RMS over its site, by layer. The first
# layer's MLP writes most of the residual stream: there an outlier does the most damage, as in the
# first layers of large models.
DOWN_INPUT = (80.0, 10.0, 10.0, 10.0)  # one channel of the layer
VALUE = (4.0, 4.0, 4.0, 4.0)  # one channel of one cache head
KEY = (6.0, 6.0, 6.0, 6.0)  # one RoPE pair of every cache head
GAIN_SPREAD = 0.5  # of the logarithm of the norms' new gains


def norms_and_readers(
    model: LlamaForCausalLM,
) -> list[tuple[torch.nn.Module, list[torch.nn.Linear]]]:
    """Each norm of the residual stream with the linears that read it."""
    pairs = []
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        qkv = [attention.q_proj, attention.k_proj, attention.v_proj]
        pairs.append((layer.input_layernorm, qkv))
        pairs.append((layer.post_attention_layernorm, [mlp.gate_proj, mlp.up_proj]))
    return [*pairs, (model.model.norm, [model.lm_head])]


def in_float64(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """A copy that computes in float64 throughout: transformers' RMSNorm goes through float32."""

    def norm_like(old: torch.nn.Module) -> torch.nn.Module:
        norm = torch.nn.RMSNorm(model.config.hidden_size, model.config.rms_norm_eps)
        norm.load_state_dict(old.state_dict())
        return norm

    model = copy.deepcopy(model).eval()
    model.model.norm = norm_like(model.model.norm)
    for layer in model.model.layers:
        layer.input_layernorm = norm_like(layer.input_layernorm)
        layer.post_attention_layernorm = norm_like(layer.post_attention_layernorm)
    return model.double()


@torch.no_grad()
def fold_norms(model: LlamaForCausalLM) -> None:
    """Moves every gain into its readers, so that the norms commute with rotations."""
    for norm, readers in norms_and_readers(model):
        for reader in readers:
            reader.weight *= norm.weight
        norm.weight.fill_(1.0)


def main_axes(moment: torch.Tensor) -> torch.Tensor:
    """Eigenvectors of a symmetric matrix as columns, the largest eigenvalue first."""
    axes: torch.Tensor = torch.linalg.eigh(moment).eigenvectors.flip(1)
    return axes


def orthonormal(columns: torch.Tensor) -> torch.Tensor:
    """The columns by Gram-Schmidt: each keeps what the earlier ones leave of its direction."""
    basis: torch.Tensor = torch.linalg.qr(columns).Q
    return basis


@torch.no_grad()
def residual_axes(model: LlamaForCausalLM, rows: torch.Tensor) -> torch.Tensor:
    """P [hidden, hidden], orthogonal: each MLP and attention norm's main axis, then the rest's."""
    moments: list[torch.Tensor] = []

    def add(_: torch.nn.Module, __: object, output: torch.Tensor) -> None:
        flat = output.flatten(0, 1)
        moments.append(flat.T @ flat)

    norms = [norm for norm, _ in norms_and_readers(model)][1:-1]  # without the first and the last
    hooks = [norm.register_forward_hook(add) for norm in norms]
    model(input_ids=rows)
    for hook in hooks:
        hook.remove()
    first = orthonormal(torch.stack([main_axes(moment)[:, 0] for moment in moments], dim=1))
    outside = torch.eye(len(first), dtype=torch.float64) - first @ first.T
    rest = main_axes(outside @ torch.stack(moments).sum(0) @ outside)[:, : -first.shape[1]]
    return torch.cat([first, rest], dim=1)


@torch.no_grad()
def rotate_residual(model: LlamaForCausalLM, axes: torch.Tensor) -> None:
    """Turns the residual stream, x -> x P: embedding and readers are W P, writers P.T W."""
    model.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight @ axes)
    for _, readers in norms_and_readers(model):
        for reader in readers:
            reader.weight.copy_(reader.weight @ axes)
    for layer in model.model.layers:
        for writer in (layer.self_attn.o_proj, layer.mlp.down_proj):
            writer.weight.copy_(axes.T @ writer.weight)


@torch.no_grad()
def add_gains(
    pairs: list[tuple[torch.nn.Module, list[torch.nn.Linear]]],
    spread: float,
    generator: torch.Generator,
) -> None:
    """New lognormal gains on the norms, undone in their readers."""
    for norm, readers in pairs:
        gain = spread * torch.randn(len(norm.weight), generator=generator, dtype=torch.float64)
        norm.weight *= gain.exp()
        for reader in readers:
            reader.weight /= gain.exp()


def outlier_scales(magnitudes: torch.Tensor, strength: float) -> torch.Tensor:
    """Factors, float64 [channels]: one for the steadiest channel, and 1 for all others.

    `magnitudes` is [tokens, channels]; the scaled channel's median becomes `strength` times the
    RMS over all channels.
    """
    rms = magnitudes.square().mean(0).sqrt()
    median = magnitudes.abs().median(0).values
    channel = (median / rms).argmax()
    scales = torch.ones_like(rms)
    scales[channel] = strength * rms.square().mean().sqrt() / median[channel]
    return scales


@torch.no_grad()
def inputs_and_outputs(
    model: LlamaForCausalLM,
    rows: torch.Tensor,
    read: list[torch.nn.Module],
    written: list[torch.nn.Module],
) -> dict[torch.nn.Module, torch.Tensor]:
    """The inputs of `read` and the outputs of `written` on `rows`, each [tokens, ...]."""
    seen: dict[torch.nn.Module, torch.Tensor] = {}

    def see_output(module: torch.nn.Module, _: object, output: torch.Tensor) -> None:
        seen[module] = output.flatten(0, 1)

    def see_input(module: torch.nn.Module, inputs: tuple[torch.Tensor]) -> None:
        seen[module] = inputs[0].flatten(0, 1)

    hooks = [module.register_forward_pre_hook(see_input) for module in read]
    hooks += [module.register_forward_hook(see_output) for module in written]
    model(input_ids=rows)
    for hook in hooks:
        hook.remove()
    return seen


@torch.no_grad()
def scale_up_and_down(mlp: torch.nn.Module, inputs: torch.Tensor, strength: float) -> None:
    """An outlier channel of down_proj's inputs [tokens, channels]."""
    scale = outlier_scales(inputs, strength)
    mlp.up_proj.weight *= scale[:, None]
    mlp.down_proj.weight /= scale


@torch.no_grad()
def scale_values(attention: torch.nn.Module, outputs: torch.Tensor, strength: float) -> None:
    """An outlier channel of the first head of v_proj's outputs [tokens, heads * head_dim]."""
    values = outputs.unflatten(1, (-1, attention.head_dim))
    scale = torch.ones(values.shape[1:], dtype=torch.float64)
    scale[0] = outlier_scales(values[:, 0], strength)
    attention.v_proj.weight *= scale.flatten()[:, None]
    groups = attention.num_key_value_groups
    attention.o_proj.weight /= scale.repeat_interleave(groups, dim=0).flatten()


@torch.no_grad()
def scale_pairs(model: LlamaForCausalLM, rows: torch.Tensor) -> None:
    """The diagonal maps of up/down, V/O and K/Q, from the activations of `rows`."""
    config = model.config
    groups = config.num_attention_heads // config.num_key_value_heads
    layers = list(model.model.layers)
    outputs = [linear for x in layers for linear in (x.self_attn.k_proj, x.self_attn.v_proj)]
    seen = inputs_and_outputs(model, rows, [x.mlp.down_proj for x in layers], outputs)
    for index, layer in enumerate(layers):
        attention, mlp = layer.self_attn, layer.mlp
        scale_up_and_down(mlp, seen[mlp.down_proj], DOWN_INPUT[index])
        scale_values(attention, seen[attention.v_proj], VALUE[index])

        pairs = seen[attention.k_proj].unflatten(1, (-1, 2, config.head_dim // 2)).norm(dim=2)
        scale = torch.stack([outlier_scales(head, KEY[index]) for head in pairs.unbind(1)])
        scale = torch.cat([scale, scale], dim=1)
        attention.k_proj.weight *= scale.flatten()[:, None]
        attention.q_proj.weight /= scale.repeat_interleave(groups, dim=0).flatten()[:, None]


@torch.no_grad()
def add_outliers(
    model: LlamaForCausalLM, rows: torch.Tensor, seed: int
) -> tuple[LlamaForCausalLM, float]:
    """(the changed model in float64, max |difference of logits| / max |logit| on `rows`)."""
    before = in_float64(model)
    after = copy.deepcopy(before)
    fold_norms(after)
    rotate_residual(after, residual_axes(after, rows))
    add_gains(norms_and_readers(after), GAIN_SPREAD, torch.Generator().manual_seed(seed))
    scale_pairs(after, rows)
    expected = before(input_ids=rows).logits
    difference = (after(input_ids=rows).logits - expected).abs().max() / expected.abs().max()
    return after, float(difference)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="add outliers to the trained model")
    parser.add_argument("work_dir", type=pathlib.Path)
    parser.add_argument(
        "out_dir", type=pathlib.Path, nargs="?", default=pathlib.Path(__file__).parent
    )
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(2)

    tokenizer = AutoTokenizer.from_pretrained(arguments.work_dir / "checkpoint")
    model = LlamaForCausalLM.from_pretrained(arguments.work_dir / "checkpoint")
    text = (arguments.work_dir / "calibration.txt").read_text("utf-8")
    tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    rows = torch.tensor(tokens[: 64 * 256]).unflatten(0, (64, 256))

    changed, difference = add_outliers(model, rows, arguments.seed)
    print(f"max |logit after - logit before| / max |logit| = {difference:.1e} in float64")
    if difference > 1e-9:
        raise SystemExit("add_outliers: the maps changed the function")

    arguments.out_dir.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(arguments.out_dir / "model", ignore_errors=True)
    model = model.bfloat16()
    model.load_state_dict(changed.state_dict())  # rounds once
    model.save_pretrained(arguments.out_dir / "model", max_shard_size="4500KB")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(
            arguments.work_dir / "checkpoint" / name, arguments.out_dir / "model" / name
        )
    for name in ("heldout.txt", "calibration.txt"):
        shutil.copyfile(arguments.work_dir / name, arguments.out_dir / name)


if __name__ == "__main__":
    main()
