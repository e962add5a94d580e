# SPDX-License-Identifier: Apache-2.0
"""QuaRot as fake quantization inside a Hugging Face model: the tests' independent judge.

Written from the paper (arXiv 2404.00456) on plain PyTorch modules, sharing no code with the
package, so that agreement between the two means something. Llama, Mistral, Qwen2 and Qwen3.

Row vectors throughout: an activation x is rotated as x @ R. A `torch.nn.Linear` holds W: [out, in]
and computes x @ W.T, so rotating its input by R turns W into W @ R, and rotating its output by R
turns W into R.T @ W and its bias b into b @ R.
"""

import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask

FLOAT_BITS = 16  # a bit width from here on means "leave it in float"
IMPLEMENTATION = "fake_quant"


# Hadamard matrices: Sylvester, Paley I and II, Kronecker products


def quadratic_character(prime: int, power: int) -> torch.Tensor:
    """chi(x - y) over GF(prime ** power), float64 [q, q]: 1 for squares, -1 otherwise, 0 for 0.

    The field is the polynomials over GF(prime) modulo the first monic one of degree `power` that
    leaves (q - 1) / 2 nonzero squares and no zero divisors.
    """
    elements = list(itertools.product(range(prime), repeat=power))

    def product(x: Sequence[int], y: Sequence[int], modulus: Sequence[int]) -> tuple[int, ...]:
        total = [0] * (2 * power - 1)
        for (i, a), (j, b) in itertools.product(enumerate(x), enumerate(y)):
            total[i + j] += a * b
        for degree in range(2 * power - 2, power - 1, -1):  # x^power = -modulus
            for i, coefficient in enumerate(modulus):
                total[degree - power + i] -= total[degree] * coefficient
        return tuple(value % prime for value in total[:power])

    def is_field(modulus: Sequence[int]) -> bool:
        # A polynomial of degree 2 or 3 without a root is irreducible; degree 1 always is.
        return power == 1 or all(
            (x**power + sum(c * x**i for i, c in enumerate(modulus))) % prime for x in range(prime)
        )

    if power > 3:
        raise ValueError(f"GF({prime}^{power}): only degrees up to 3 are built")
    modulus = next(candidate for candidate in elements if is_field(candidate))
    squares = {product(x, x, modulus) for x in elements} - {elements[0]}
    character = {x: 1.0 if x in squares else -1.0 for x in elements}
    character[elements[0]] = 0.0
    rows = [
        [character[tuple((a - b) % prime for a, b in zip(x, y, strict=True))] for y in elements]
        for x in elements
    ]
    return torch.tensor(rows, dtype=torch.float64)


def prime_power(number: int) -> tuple[int, int] | None:
    """(p, k) with number = p ** k, k at most 3, or None."""
    for power in (1, 2, 3):
        root = round(number ** (1 / power))
        if root > 1 and root**power == number and all(root % d for d in range(2, root)):
            return root, power
    return None


def paley(order: int) -> torch.Tensor | None:
    """A Hadamard matrix of entries +-1 by Paley's first or second construction, or None."""
    field = prime_power(order - 1)
    if order % 4 == 0 and field:
        core = torch.zeros(order, order, dtype=torch.float64)
        core[0, 1:], core[1:, 0] = 1, -1
        core[1:, 1:] = quadratic_character(*field)
        return core + torch.eye(order, dtype=torch.float64)
    half = order // 2
    field = prime_power(half - 1)
    if order % 4 == 0 and field and half % 4 == 2:
        conference = torch.zeros(half, half, dtype=torch.float64)
        conference[0, 1:], conference[1:, 0] = 1, 1
        conference[1:, 1:] = quadratic_character(*field)
        plus = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        minus = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        identity = torch.eye(half, dtype=torch.float64)
        return torch.kron(conference, plus) + torch.kron(identity, minus)
    return None


def hadamard_matrix(order: int) -> torch.Tensor | None:
    """An orthonormal Hadamard matrix, float64 [order, order], or None where none is built here."""
    doubled = torch.ones(1, 1, dtype=torch.float64)
    rest = order
    while True:
        core = torch.ones(1, 1, dtype=torch.float64) if rest == 1 else paley(rest)
        if core is not None:
            matrix = torch.kron(doubled, core) / order**0.5
            identity = torch.eye(order, dtype=torch.float64)
            assert torch.allclose(matrix @ matrix.T, identity, atol=1e-12), order
            return matrix
        if rest % 2:
            return None
        doubled = torch.kron(doubled, torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64))
        rest //= 2


# Quantizers


def quantize_weight(weight: torch.Tensor, bits: int, clip_search: bool) -> torch.Tensor:
    """weight [out, in] rounded per output channel, symmetric; best clip of 1 - i/100, i < 80."""
    qmax = 2 ** (bits - 1) - 1
    amax = weight.abs().amax(dim=1, keepdim=True)
    best = torch.full_like(amax, torch.inf)
    result = weight.clone()
    for i in range(80 if clip_search else 1):
        scale = amax * (1 - i / 100) / qmax
        scale = torch.where(amax == 0, torch.ones_like(scale), scale)
        rounded = torch.clamp(torch.round(weight / scale), -qmax - 1, qmax) * scale
        error = (rounded - weight).square().sum(dim=1, keepdim=True)
        result = torch.where(error < best, rounded, result)
        best = torch.minimum(error, best)
    return result


def quantize_activation(x: torch.Tensor, bits: int, clip: float) -> torch.Tensor:
    """x rounded per token (last axis), symmetric, codes -qmax-1..qmax."""
    qmax = 2 ** (bits - 1) - 1
    amax = x.abs().amax(dim=-1, keepdim=True)
    scale = torch.where(amax == 0, torch.ones_like(amax), amax * (clip / qmax))
    return torch.clamp(torch.round(x / scale), -qmax - 1, qmax) * scale


def quantize_cache(x: torch.Tensor, bits: int, clip: float) -> torch.Tensor:
    """x [batch, heads, tokens, head_dim] rounded per token and head, asymmetric, integer zero."""
    top = 2**bits - 1
    low = x.amin(dim=-1, keepdim=True).clamp(max=0)
    high = x.amax(dim=-1, keepdim=True).clamp(min=0)
    scale = torch.where(high == low, torch.ones_like(low), (high - low) * (clip / top))
    zero = torch.round(-low * clip / scale)
    return (torch.clamp(torch.round(x / scale) + zero, 0, top) - zero) * scale


# The model


@dataclass(frozen=True)
class Rotation:
    """x -> x @ (matrix kron I_inner) on the last axis; inner = 1 is a plain x @ matrix."""

    matrix: torch.Tensor
    inner: int = 1

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        order = self.matrix.shape[0]
        split = x.unflatten(-1, (order, self.inner))
        return torch.einsum("...ai,ab->...bi", split, self.matrix.to(x.dtype)).flatten(-2)


class OnlineLinear(torch.nn.Module):
    """A linear whose input is rotated (where a rotation is given) and then quantized per token."""

    def __init__(
        self, linear: torch.nn.Linear, bits: int, clip: float, rotate: Rotation | None = None
    ) -> None:
        super().__init__()
        self.linear = linear
        self.bits = bits
        self.clip = clip
        self.rotate = rotate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.rotate is not None:
            x = self.rotate(x)
        if self.bits < FLOAT_BITS:
            x = quantize_activation(x, self.bits, self.clip)
        return self.linear(x)


@dataclass(frozen=True)
class CacheSettings:
    """What the attention of one layer does to queries, keys and values."""

    bits: int
    clip: float
    r3: Rotation | None


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    **_: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention on a quantized cache; query [batch, heads, tokens, head_dim] comes after RoPE.

    transformers hands a mask to a registered attention function only where a mask function of the
    same name is registered too; without one the model silently attends to the future.
    """
    assert attention_mask is not None, "attend: no mask: the model would not be causal"
    new = query.shape[2]
    future = torch.ones(new, new, dtype=torch.bool).triu(1)
    assert bool((attention_mask[..., -new:][..., future] < -1e30).all()), "attend: not causal"
    settings: CacheSettings = module.cache_settings
    if settings.r3 is not None:
        query, key = settings.r3(query), settings.r3(key)
    if settings.bits < FLOAT_BITS:
        key = quantize_cache(key, settings.bits, settings.clip)
        value = quantize_cache(value, settings.bits, settings.clip)
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(2, 3) * scaling + attention_mask
    weights = torch.softmax(scores, dim=-1)
    return (weights @ value).transpose(1, 2), weights


AttentionInterface.register(IMPLEMENTATION, attend)
AttentionMaskInterface.register(IMPLEMENTATION, eager_mask)


def change(linear: torch.nn.Linear, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
    """Stores a float64 weight (and bias) in a linear, rounding once to its dtype."""
    linear.weight.data = weight.to(linear.weight.dtype)
    if bias is not None:
        linear.bias.data = bias.to(linear.bias.dtype)


def fold(norm: torch.nn.Module, readers: Sequence[torch.nn.Linear]) -> None:
    """Moves an RMSNorm's gain into the linears that read it."""
    gain = norm.weight.data.double()
    for reader in readers:
        change(reader, reader.weight.data.double() * gain)
    norm.weight.data = torch.ones_like(norm.weight.data)


def norm_readers(model: PreTrainedModel) -> list[tuple[torch.nn.Module, list[torch.nn.Linear]]]:
    """Each norm of the residual stream with the linears that read it."""
    pairs: list[tuple[torch.nn.Module, list[torch.nn.Linear]]] = []
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        qkv = [attention.q_proj, attention.k_proj, attention.v_proj]
        pairs.append((layer.input_layernorm, qkv))
        pairs.append((layer.post_attention_layernorm, [mlp.gate_proj, mlp.up_proj]))
    return [*pairs, (model.model.norm, [model.lm_head])]


def rotate_residual(model: PreTrainedModel, r1: torch.Tensor) -> None:
    """Fuses R1 [hidden, hidden] into every writer and reader; the norms' gains must be one."""
    embedding = model.model.embed_tokens.weight
    embedding.data = (embedding.data.double() @ r1).to(embedding.dtype)
    for norm, readers in norm_readers(model):
        assert bool((norm.weight == 1).all()), "rotate_residual: a norm's gain is not folded"
        for reader in readers:
            change(reader, reader.weight.data.double() @ r1)
    for layer in model.model.layers:
        for writer in (layer.self_attn.o_proj, layer.mlp.down_proj):
            bias = None if writer.bias is None else writer.bias.data.double() @ r1
            change(writer, r1.T @ writer.weight.data.double(), bias)


def rotate_values(attention: torch.nn.Module, r2: torch.Tensor, across: torch.Tensor) -> None:
    """Fuses R2 [head_dim, head_dim] in v_proj; R2 and the inverse heads rotation in o_proj."""
    v_proj, o_proj = attention.v_proj, attention.o_proj
    head_dim = r2.shape[0]
    rows = v_proj.weight.data.double().unflatten(0, (-1, head_dim))
    bias = None
    if v_proj.bias is not None:
        bias = (v_proj.bias.data.double().unflatten(0, (-1, head_dim)) @ r2).flatten()
    change(v_proj, torch.einsum("hdi,de->hei", rows, r2).flatten(0, 1), bias)
    change(o_proj, o_proj.weight.data.double() @ torch.kron(across, r2))


def fake_quantize(
    model: PreTrainedModel,
    *,
    rotate: bool,
    bits_w: int = 4,
    bits_a: int = 4,
    bits_kv: int = 4,
    a_clip: float = 0.9,
    kv_clip: float = 0.95,
    w_clip_search: bool = True,
    seed: int = 0,
    fold_norms: bool = True,
    hadamards: Mapping[int, torch.Tensor] | None = None,
) -> PreTrainedModel:
    """A copy of `model` that computes with rounded weights, activations and cache; 16 bits = float.

    `rotate` adds QuaRot: R1 (randomized by `seed`), R2, the heads Hadamard where one of that order
    exists, R3 and R4. Without it, `fold_norms` says whether the norms' gains go into the weights.
    `hadamards` gives orthonormal matrices by order where those built here are not wanted.
    Embeddings and head stay in float. The copy computes in float32, or float64 if `model` does.
    """

    def find(order: int) -> torch.Tensor | None:
        given = (hadamards or {}).get(order)
        return hadamard_matrix(order) if given is None else given.double()

    def hadamard(order: int) -> torch.Tensor:
        matrix = find(order)
        if matrix is None:
            raise ValueError(f"fake_quantize: no Hadamard of order {order}; give it in hadamards")
        return matrix

    model = copy.deepcopy(model).eval()
    if model.dtype != torch.float64:
        model = model.float()
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())  # untie
    if rotate or fold_norms:
        for norm, readers in norm_readers(model):
            fold(norm, readers)

    config = model.config
    heads = config.num_attention_heads
    r3 = r4 = across = None
    if rotate:
        generator = torch.Generator().manual_seed(seed)
        signs = torch.randint(2, (config.hidden_size,), generator=generator).double() * 2 - 1
        rotate_residual(model, signs[:, None] * hadamard(config.hidden_size))
        head_dim = model.model.layers[0].self_attn.head_dim
        r2 = hadamard(head_dim)
        r3 = Rotation(r2)
        r4 = Rotation(hadamard(config.intermediate_size))
        across_matrix = find(heads)
        if across_matrix is None:  # no such order, as 14 heads: QuaRot leaves it out
            across_matrix = torch.eye(heads, dtype=torch.float64)
        else:
            across = Rotation(across_matrix, inner=head_dim)
        for layer in model.model.layers:
            rotate_values(layer.self_attn, r2, across_matrix)
            down_proj = layer.mlp.down_proj
            change(down_proj, down_proj.weight.data.double() @ r4.matrix)

    online: dict[str, Callable[[torch.Tensor], torch.Tensor] | None] = {"o_proj": across}
    online["down_proj"] = r4
    for layer in model.model.layers:
        for block in (layer.self_attn, layer.mlp):
            for name, linear in list(block.named_children()):
                if not isinstance(linear, torch.nn.Linear):
                    continue
                if bits_w < FLOAT_BITS:
                    linear.weight.data = quantize_weight(linear.weight.data, bits_w, w_clip_search)
                setattr(block, name, OnlineLinear(linear, bits_a, a_clip, online.get(name)))
        layer.self_attn.cache_settings = CacheSettings(bits_kv, kv_clip, r3)
    model.set_attn_implementation(IMPLEMENTATION)
    return model


def window_starts(tokens: int, windows: int, window_length: int) -> list[int]:
    """Evenly spaced windows that do not overlap: window i begins at i * (tokens // windows)."""
    stride = tokens // windows
    if stride < window_length:
        raise ValueError(f"{tokens} tokens do not hold {windows} windows of {window_length}")
    return [i * stride for i in range(windows)]


@torch.no_grad()
def perplexity(
    model: PreTrainedModel, token_ids: Sequence[int], windows: int = 96, window_length: int = 256
) -> float:
    """exp of the mean NLL over each window's window_length - 1 predictions; no BOS is added."""
    starts = window_starts(len(token_ids), windows, window_length)
    rows = torch.tensor([list(token_ids[start : start + window_length]) for start in starts])
    total = 0.0
    for part in rows.split(16):
        logits = model(input_ids=part, use_cache=False).logits[:, :-1].double()
        nll = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum"
        )
        total += nll.item()
    return float(torch.tensor(total / (rows.shape[0] * (window_length - 1))).exp())
