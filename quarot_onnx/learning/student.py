# SPDX-License-Identifier: Apache-2.0
"""Hugging Face's model with rounded activations and cache, whose rotations are parameters.

The modules of a Llama-like model (`quarot_onnx.export.architectures.LLAMA_MODULES`) are replaced
one by one: embedding, norms and linears compute what the exported graph will compute, with
matrices that a step of the training can change. Places whose matrices are not learned have those
of the recipe. Weights stay float, or are rounded to `Learning.weight_bits` per output channel.

Row vectors; torch's weights are [out, in], so an input turned by M makes ``W M^-T`` of W, an
output turned by M makes ``M.T W``.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
import transformers
from torch.nn import functional
from transformers.masking_utils import eager_mask

from quarot_onnx.export.architectures import dimensions
from quarot_onnx.learning.matrices import LearnedMatrix, LearnedRotation
from quarot_onnx.learning.places import LayerPlaces, Turn
from quarot_onnx.learning.rounding import round_weight, rounded
from quarot_onnx.recipe import Recipe
from quarot_onnx.rotation import Rotation
from quarot_onnx.rounding import cache_rounding, input_rounding
from quarot_onnx.weights import Float64

ATTENTION_NAME = "quarot_learning"
_FLOAT_BITS = 16


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
        self.model = model.requires_grad_(False)
        self.sizes = sizes = dimensions(model.config.to_dict())
        self._r1 = self._make_r1()
        self.places = [
            LayerPlaces(recipe, sizes, index, lambda: self.residual)
            for index in range(sizes.num_layers)
        ]
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
        return [scale for places in self.places for scale in places.scales]

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
        size, rotations = self.sizes.hidden_size, self.recipe.rotations
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
            self._replace_attention(layer, places)
            self._replace_feed_forward(layer, places)
        inner.norm = _FinalNorm(self, inner.norm)

    def _replace_attention(self, layer: Any, places: LayerPlaces) -> None:
        attention, norm, sizes = layer.self_attn, layer.input_layernorm, self.sizes
        for name in ("q_proj", "k_proj", "v_proj"):
            linear = self._linear(getattr(attention, name), norm.weight)
            linear.turn_input = places.reader(0)
            setattr(attention, name, linear)
        attention.v_proj.turn_output = places.turn_value_outputs
        o = attention.o_proj = self._linear(attention.o_proj)
        features = sizes.num_heads * sizes.head_dim
        o.prepare = _then(places.turn_heads, self._rounding("o_proj", features))
        o.turn_input, o.turn_output = places.turn_o_inputs, self._turn_stream
        attention.quarot_places, attention.quarot_round = places, self._cache_rounding()
        prepare = _then(partial(places.turn_inputs, 0), self._rounding("qkv", sizes.hidden_size))
        layer.input_layernorm = _Norm(norm, prepare)

    def _replace_feed_forward(self, layer: Any, places: LayerPlaces) -> None:
        mlp, norm, sizes = layer.mlp, layer.post_attention_layernorm, self.sizes
        for name in ("gate_proj", "up_proj"):
            linear = self._linear(getattr(mlp, name), norm.weight)
            linear.turn_input = places.reader(1)
            setattr(mlp, name, linear)
        mlp.up_proj.turn_output = places.shrink_up_outputs
        down = mlp.down_proj = self._linear(mlp.down_proj)
        features = sizes.feed_forwards[0].size
        down.prepare = _then(places.down.turn, self._rounding("down_proj", features))
        down.turn_input, down.turn_output = places.turn_down_inputs, self._turn_stream
        kind = "gate_up"
        prepare = _then(partial(places.turn_inputs, 1), self._rounding(kind, sizes.hidden_size))
        layer.post_attention_layernorm = _Norm(norm, prepare)

    def _linear(self, linear: torch.nn.Linear, gain: torch.Tensor | None = None) -> "_Linear":
        return _Linear(linear, self.recipe.learning.weight_bits, gain)

    def _turn_stream(self, weight: torch.Tensor) -> torch.Tensor:
        """``R1.T W`` of a writer's weight [out, in]; a bias [out, 1] likewise."""
        return self.residual.T @ weight

    def _rounding(self, kind: str, features: int) -> Turn:
        """What the linears of `kind` (`Site.kind`) see of their input [..., features]."""
        activations, size = self.recipe.activations, self.sizes.hidden_size
        if activations.bits == _FLOAT_BITS:
            return _unchanged
        return partial(rounded, rounding=input_rounding(activations, kind, features, size, kind))

    def _cache_rounding(self) -> Turn:
        """What attention sees of keys or values [B, K, S, head_dim]."""
        cache = self.recipe.kv_cache
        if cache.bits == _FLOAT_BITS:
            return _unchanged
        return partial(rounded, rounding=cache_rounding(cache, self.sizes.head_dim, "attention"))


class _Embedding(torch.nn.Module):
    def __init__(self, student: Student, embedding: torch.nn.Embedding) -> None:
        super().__init__()
        self.embedding = embedding
        self._residual: Callable[[], torch.Tensor] = lambda: student.residual

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        rotated: torch.Tensor = self.embedding(input_ids) @ self._residual()
        return rotated


class _Norm(torch.nn.Module):
    """What all readers of a norm see: ``prepare(x / rms(x))``."""

    def __init__(self, norm: Any, prepare: Turn) -> None:
        super().__init__()
        self.epsilon = float(norm.variance_epsilon)
        self.prepare = prepare

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.prepare(_normalized(x, self.epsilon))


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
        prepare: turns and rounds the input, where the norm in front has not.
        turn_input, turn_output: what becomes of the weight [out, in].
    """

    def __init__(self, linear: torch.nn.Linear, bits: int, gain: torch.Tensor | None) -> None:
        """`bits`: of the weight in training; `gain`: the scale of the norm in front."""
        super().__init__()
        weight = linear.weight if gain is None else linear.weight * gain
        self.weight, self.bias = weight.detach(), linear.bias
        self.prepare: Turn = _unchanged
        self.turn_input: Turn = _unchanged
        self.turn_output: Turn = _unchanged
        self._bits = bits

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.turn_output(self.turn_input(self.weight))
        bias = None if self.bias is None else self.turn_output(self.bias[:, None])[:, 0]
        if self._bits < _FLOAT_BITS:
            weight = round_weight(weight, self._bits)
        return functional.linear(self.prepare(x), weight, bias)


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
    places: LayerPlaces = module.quarot_places  # type: ignore[assignment]
    query, key = places.turn_query_and_key(query, key)
    round_cache: Turn = module.quarot_round  # type: ignore[assignment]
    key, value = round_cache(key), round_cache(value)
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = (query * scale) @ key.transpose(2, 3) + attention_mask
    return (torch.softmax(scores, dim=-1) @ value).transpose(1, 2), None


def _unchanged(x: torch.Tensor) -> torch.Tensor:
    return x


def _then(first: Turn, second: Turn) -> Turn:
    return lambda x: second(first(x))


def _normalized(x: torch.Tensor, epsilon: float) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(dim=-1, keepdim=True) + epsilon)
