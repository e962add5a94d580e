# SPDX-License-Identifier: Apache-2.0
"""Hugging Face's model with rounded activations and cache, whose rotations are parameters.

The modules of a Llama-like model (`quarot_onnx.export.architectures.LLAMA_MODULES`) are replaced
one by one: embedding, norms and linears compute what the exported graph will compute, with
matrices that a step of the training can change. Places whose matrices are not learned have those
of the recipe. Weights stay float, or are rounded to `LearningSettings.weight_bits` in the forward.

Row vectors; torch's weights are [out, in], so an input turned by M makes ``W M^-T`` of W, an
output turned by M makes ``M.T W``.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import transformers
from torch.nn import functional
from transformers.masking_utils import eager_mask

from quarot_onnx.errors import UnsupportedModelError
from quarot_onnx.hadamard import Plan, plan, random_orthogonal
from quarot_onnx.learning.matrices import LearnedMatrix, LearnedRotation
from quarot_onnx.learning.rounding import round_activation, round_cache, round_weight
from quarot_onnx.recipe import Recipe
from quarot_onnx.rotation import Rotation
from quarot_onnx.weights import Float64

ATTENTION_NAME = "quarot_learning"
_FLOAT_BITS = 16
_LARGEST_FACTOR = 1024  # a dense product of this order already costs more than many a linear

Turn = Callable[[torch.Tensor], torch.Tensor]
Matrix = LearnedRotation | LearnedMatrix


class Student(torch.nn.Module):
    """The model and, as parameters, the matrices of the places in `learned`.

    Attributes:
        recipe: bits, clips, and which rotations the other places have.
        learned: names of `quarot_onnx.recipe.Learning.places`.
        rotations: parameters with the learning rate of rotations.
        matrices: parameters with that of matrices.
        scales: parameters with that of scales; logarithms.
    """

    def __init__(self, model: Any, recipe: Recipe) -> None:
        """Take over `model`, a Hugging Face causal model in float32: its modules are replaced."""
        super().__init__()
        self.recipe = recipe
        self.learned = frozenset(recipe.learning.places)
        self.config = config = model.config
        self.model = model.requires_grad_(False)
        self.head_dim = int(model.model.layers[0].self_attn.head_dim)
        self.num_heads = int(config.num_attention_heads)
        self.num_kv_heads = int(config.num_key_value_heads)
        self._r1 = self._make_r1()
        self.places = [_LayerPlaces(self, index) for index in range(config.num_hidden_layers)]
        self.layers = torch.nn.ModuleList(self.places)  # which makes them parameters
        self.residual = torch.eye(1)  # R1 of the present step, float32
        self._replace_modules()

    @property
    def rotations(self) -> list[torch.nn.Parameter]:
        """The parameters of orthogonal matrices."""
        return [m.free for m in self.modules() if isinstance(m, LearnedRotation)]

    @property
    def matrices(self) -> list[torch.nn.Parameter]:
        """The parameters of invertible matrices."""
        return [m.free for m in self.modules() if isinstance(m, LearnedMatrix)]

    @property
    def scales(self) -> list[torch.nn.Parameter]:
        """The logarithms of the learned scales."""
        found = [scale for places in self.places for scale in places.scales()]
        return [scale for scale in found if isinstance(scale, torch.nn.Parameter)]

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Logits [B, S, vocabulary] of input_ids [B, S], with gradients."""
        self.residual = self._r1_matrix().float()
        for places in self.places:
            places.refresh()
        logits: torch.Tensor = self.model(input_ids=input_ids, use_cache=False).logits
        return logits

    @torch.no_grad()
    def tensors(self) -> dict[str, Float64]:
        """What has been learned, by the names of `quarot_onnx.transforms`."""
        found: dict[str, Float64] = {}
        if "r1" in self.learned:
            found["R1"] = self._r1_matrix().numpy()
        for index, places in enumerate(self.places):
            found |= places.tensors(f"model.layers.{index}.")
        return found

    def _make_r1(self) -> LearnedRotation | torch.Tensor:
        size, rotations = int(self.config.hidden_size), self.recipe.rotations
        kind = "identity" if rotations.r1 == "none" else rotations.r1
        start = Rotation(kind, size, self.recipe.seed, "R1", rotations.group_size)
        matrix = torch.from_numpy(start.rotate_outputs(np.eye(size)))
        return LearnedRotation(matrix) if "r1" in self.learned else matrix

    def _r1_matrix(self) -> torch.Tensor:
        return self._r1.matrix() if isinstance(self._r1, LearnedRotation) else self._r1

    def _replace_modules(self) -> None:
        transformers.AttentionInterface.register(ATTENTION_NAME, _attend)
        transformers.AttentionMaskInterface.register(ATTENTION_NAME, eager_mask)
        self.model.set_attn_implementation(ATTENTION_NAME)
        inner = self.model.model
        inner.embed_tokens = _Embedding(self, inner.embed_tokens)
        for layer, places in zip(inner.layers, self.places, strict=True):
            attention, mlp = layer.self_attn, layer.mlp
            first, second = layer.input_layernorm, layer.post_attention_layernorm
            attention.quarot_places = places
            for name in ("q_proj", "k_proj", "v_proj"):
                linear = _Linear(self, getattr(attention, name), first.weight)
                linear.turn_input = places.reader(0)
                setattr(attention, name, linear)
            attention.v_proj.turn_output = places.turn_value_outputs
            attention.o_proj = _Linear(self, attention.o_proj, None)
            attention.o_proj.prepare = places.turn_heads
            attention.o_proj.turn_input = places.turn_o_inputs
            for name in ("gate_proj", "up_proj"):
                linear = _Linear(self, getattr(mlp, name), second.weight)
                linear.turn_input = places.reader(1)
                setattr(mlp, name, linear)
            mlp.up_proj.turn_output = places.shrink_up_outputs
            mlp.down_proj = _Linear(self, mlp.down_proj, None)
            mlp.down_proj.prepare = places.turn_down
            mlp.down_proj.turn_input = places.turn_down_inputs
            for writer in (attention.o_proj, mlp.down_proj):
                writer.turn_output = self._turn_stream
            layer.input_layernorm = _Norm(self, first, places, 0)
            layer.post_attention_layernorm = _Norm(self, second, places, 1)
        inner.norm = _FinalNorm(self, inner.norm)

    def _turn_stream(self, weight: torch.Tensor) -> torch.Tensor:
        """``R1.T W`` of a writer's weight [out, in]; a bias [out, 1] likewise."""
        return self.residual.T @ weight

    def round(self, x: torch.Tensor) -> torch.Tensor:
        """What the linear behind x sees of it."""
        activations = self.recipe.activations
        if activations.bits == _FLOAT_BITS:
            return x
        return round_activation(x, activations.bits, activations.clip_ratio)


class _LayerPlaces(torch.nn.Module):
    """The matrices of one layer: parameters, or constants of the recipe."""

    def __init__(self, student: Student, index: int) -> None:
        super().__init__()
        self.recipe = recipe = student.recipe
        self.num_heads, self.num_kv_heads = student.num_heads, student.num_kv_heads
        learned, config = student.learned, student.config
        rotations = recipe.rotations
        self._residual: Callable[[], torch.Tensor] = lambda: student.residual
        d, m, n = student.head_dim, int(config.intermediate_size), int(config.hidden_size)
        across = plan(self.num_heads, policy="full")

        def make(name: str, given: Plan, is_used: bool) -> Matrix | torch.Tensor:
            if name not in learned:
                return _constant(given, is_used)
            return LearnedMatrix(_start(given, is_used, f"{name}.{index}", recipe.seed))

        self.value: Matrix | torch.Tensor = _constant(plan(d), rotations.r2)
        if "r2" in learned:
            self.value = LearnedRotation(_start(plan(d), rotations.r2, f"r2.{index}", recipe.seed))
        elif "value" in learned:
            start = _start(plan(d), rotations.r2, f"value.{index}", recipe.seed)
            self.value = LearnedMatrix(start.expand(self.num_kv_heads, d, d).clone())
        self.key = make("key", plan(d), rotations.r3)
        self.heads = make("heads", across, rotations.heads)
        self.down: Any
        if "down" in learned:
            a, b = balanced_factors(m)
            self.down = torch.nn.ModuleList(
                LearnedMatrix(_start(plan(size), rotations.r4, f"down.{index}.{side}", recipe.seed))
                for size, side in ((a, "A"), (b, "B"))
            )
        else:
            fixed = plan(m, policy=rotations.r4_policy) if rotations.r4 else Plan(m, (), m)
            self.down = [torch.from_numpy(matrix) for matrix in fixed.matrices()]
        self.up: torch.Tensor = torch.zeros(m)
        if "up" in learned:
            self.up = torch.nn.Parameter(self.up)
        self.norms: Any = [torch.zeros(n), torch.zeros(n)]
        if "norms" in learned:
            self.norms = torch.nn.ParameterList(torch.zeros(n) for _ in range(2))
        self.learned = learned
        self.present: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def scales(self) -> list[torch.Tensor]:
        """The logarithms of the scales."""
        return [self.up, *self.norms]

    def refresh(self) -> None:
        """Compute the matrices and their inverses of this step."""
        a, b = self.down
        places = {"value": self.value, "key": self.key, "heads": self.heads, "A": a, "B": b}
        self.present = {name: _with_inverse(place) for name, place in places.items()}

    def tensors(self, prefix: str) -> dict[str, Float64]:
        """What this layer has learned."""
        found: dict[str, torch.Tensor] = {}
        if isinstance(self.value, LearnedRotation):
            found["self_attn.R2"] = self.value.matrix()
        elif isinstance(self.value, LearnedMatrix):
            found["self_attn.value"] = self.value.matrix()
        for name in ("key", "heads"):
            place = getattr(self, name)
            if isinstance(place, LearnedMatrix):
                found[f"self_attn.{name}"] = place.matrix()
        if "down" in self.learned:
            found |= {
                f"mlp.down_{side}": x.matrix() for side, x in zip("AB", self.down, strict=True)
            }
        if "up" in self.learned:
            found["mlp.up"] = self.up.double().exp()
        if "norms" in self.learned:
            names = ("input_layernorm", "post_attention_layernorm")
            found |= {
                f"{name}.scale": x.double().exp() for name, x in zip(names, self.norms, strict=True)
            }
        return {prefix + name: value.detach().numpy() for name, value in found.items()}

    def reader(self, which: int) -> Turn:
        """What becomes of the weight [out, in] of a reader of norm `which`."""

        def turn(weight: torch.Tensor) -> torch.Tensor:
            scale: torch.Tensor = self.norms[which].exp()
            return (weight @ self._residual()) / scale

        return turn

    def turn_value_outputs(self, weight: torch.Tensor) -> torch.Tensor:
        """``M.T W`` head by head, of v_proj's weight [K * d, in]; a bias [K * d, 1] likewise."""
        matrix, _ = self.present["value"]
        by_head = weight.reshape(self.num_kv_heads, matrix.shape[-1], -1)
        turned: torch.Tensor = matrix.mT @ by_head
        return turned.reshape(weight.shape)

    def turn_o_inputs(self, weight: torch.Tensor) -> torch.Tensor:
        """``W (M^-T ⊗ ...)`` of o_proj's weight [out, H * d]: values and heads undone."""
        _, inverse = self.present["value"]
        by_head = weight.reshape(len(weight), self.num_heads, -1).transpose(0, 1)
        if inverse.dim() == 3:
            inverse = inverse.repeat_interleave(self.num_heads // self.num_kv_heads, dim=0)
        turned = by_head @ inverse.mT  # [H, out, d]
        _, across = self.present["heads"]
        mixed = torch.einsum("hod,gh->ogd", turned, across)
        return mixed.reshape(weight.shape)

    def turn_heads(self, x: torch.Tensor) -> torch.Tensor:
        """``x (M ⊗ I)`` in front of o_proj."""
        matrix, _ = self.present["heads"]
        by_head = x.reshape(*x.shape[:-1], self.num_heads, -1)
        return torch.einsum("...hd,hg->...gd", by_head, matrix).reshape(x.shape)

    def shrink_up_outputs(self, weight: torch.Tensor) -> torch.Tensor:
        """up_proj's rows divided by the scales."""
        return weight / self.up.exp()[:, None]

    def turn_down(self, x: torch.Tensor) -> torch.Tensor:
        """``x (I ⊗ A ⊗ B)`` in front of down_proj."""
        return _kronecker(x, self.present["A"][0], self.present["B"][0])

    def turn_down_inputs(self, weight: torch.Tensor) -> torch.Tensor:
        """down_proj's weight [out, in] times the scales, with A and B undone."""
        inverses = (self.present[side][1].T for side in "AB")
        return _kronecker(weight * self.up.exp(), *inverses)

    def turn_query_and_key(
        self, query: torch.Tensor, key: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``q M^-T`` and ``k M``, after RoPE."""
        matrix, inverse = self.present["key"]
        return query @ inverse.T, key @ matrix

    def round_cache(self, x: torch.Tensor) -> torch.Tensor:
        """Keys or values [B, K, S, d] as attention sees them."""
        cache = self.recipe.kv_cache
        return x if cache.bits == _FLOAT_BITS else round_cache(x, cache.bits, cache.clip_ratio)


class _Embedding(torch.nn.Module):
    def __init__(self, student: Student, embedding: torch.nn.Embedding) -> None:
        super().__init__()
        self.embedding = embedding
        self._residual: Callable[[], torch.Tensor] = lambda: student.residual

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        rotated: torch.Tensor = self.embedding(input_ids) @ self._residual()
        return rotated


class _Norm(torch.nn.Module):
    """``round(x / rms(x) * g)``: what all readers of a norm see."""

    def __init__(self, student: Student, norm: Any, places: _LayerPlaces, which: int) -> None:
        super().__init__()
        self.epsilon = float(norm.variance_epsilon)
        self._round = student.round
        self._scale: Callable[[], torch.Tensor] = places.norms[which].exp

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._round(_normalized(x, self.epsilon) * self._scale())


class _FinalNorm(torch.nn.Module):
    """Out of the rotated space, then the head's norm as it was."""

    def __init__(self, student: Student, norm: Any) -> None:
        super().__init__()
        self.weight, self.epsilon = norm.weight, float(norm.variance_epsilon)
        self._residual: Callable[[], torch.Tensor] = lambda: student.residual

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scaled: torch.Tensor = (_normalized(x, self.epsilon) @ self._residual().T) * self.weight
        return scaled


class _Linear(torch.nn.Module):
    """A linear between two turned spaces; its weight is made at every step.

    Attributes:
        prepare: turns and rounds the input; None where the norm in front has rounded it.
        turn_input, turn_output: what becomes of the weight [out, in].
    """

    def __init__(self, student: Student, linear: torch.nn.Linear, gain: Any) -> None:
        super().__init__()
        weight = linear.weight if gain is None else linear.weight * gain
        self.weight, self.bias = weight.detach(), linear.bias
        self.prepare: Turn | None = None
        self.turn_input: Turn | None = None
        self.turn_output: Turn | None = None
        self._round = student.round
        self._bits = student.recipe.learning.weight_bits

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.prepare is not None:
            x = self._round(self.prepare(x))
        weight: torch.Tensor = self.weight
        bias: torch.Tensor | None = self.bias
        if self.turn_input is not None:
            weight = self.turn_input(weight)
        if self.turn_output is not None:
            weight = self.turn_output(weight)
            bias = None if bias is None else self.turn_output(bias[:, None])[:, 0]
        if self._bits < _FLOAT_BITS:
            weight = round_weight(weight, self._bits)
        return functional.linear(x, weight, bias)


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention over a rounded cache: q [B, H, S, d], k and v [B, K, S, d] -> [B, S, H, d]."""
    assert attention_mask is not None, "no mask: the student would not be causal"
    places: _LayerPlaces = module.quarot_places  # type: ignore[assignment]
    query, key = places.turn_query_and_key(query, key)
    key, value = places.round_cache(key), places.round_cache(value)
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = (query * scale) @ key.transpose(2, 3) + attention_mask
    return (torch.softmax(scores, dim=-1) @ value).transpose(1, 2), None


def _normalized(x: torch.Tensor, epsilon: float) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(dim=-1, keepdim=True) + epsilon)


def _kronecker(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``x (I ⊗ A ⊗ B)`` on the last axis."""
    folded = x.reshape(*x.shape[:-1], -1, len(a), len(b))
    return torch.einsum("...ab,ac->...cb", folded @ b, a).reshape(x.shape)


def _constant(given: Plan, is_used: bool) -> torch.Tensor:
    """The matrix that the recipe's pass puts in a place; the identity where there is none."""
    blocks = np.kron(np.eye(given.size // given.block_size), given.matrix())
    return torch.from_numpy(blocks if is_used else np.eye(given.size))


def _start(given: Plan, is_used: bool, site: str, seed: int) -> torch.Tensor:
    """Where a learned place begins: as a constant, or at random where no Hadamard is full."""
    if is_used and given.kind != "full":
        return torch.from_numpy(random_orthogonal(given.size, seed, site))
    return _constant(given, is_used)


def _with_inverse(place: Matrix | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A place's matrix and its inverse in float32; a constant is orthogonal."""
    if isinstance(place, torch.Tensor):
        return place.float(), place.float().T
    return place.matrix().float(), place.inverse().float()


def balanced_factors(n: int) -> tuple[int, int]:
    """(a, b) with a b = n and the smallest a + b, a at most b: the cheapest Kronecker product.

    Raises:
        UnsupportedModelError: n has no such factors of at most `_LARGEST_FACTOR`.
    """
    a = next(a for a in range(int(n**0.5), 0, -1) if n % a == 0)
    if n // a > _LARGEST_FACTOR:
        raise UnsupportedModelError(
            f"down_proj: in_features = {n} has no factors up to {_LARGEST_FACTOR} for a Kronecker "
            "product; take down out of learning.places"
        )
    return a, n // a
