# SPDX-License-Identifier: Apache-2.0
"""The matrices of one layer: parameters where they are learned, constants of the recipe elsewhere.

Row vectors; torch's weights are [out, in], so an input turned by M makes ``W M^-T`` of W, an output
turned by M makes ``M.T W``.
"""

from collections.abc import Callable

import numpy as np
import torch

from quarot_onnx.export.architectures import Dimensions
from quarot_onnx.hadamard import Plan, plan, random_orthogonal
from quarot_onnx.learning.matrices import LearnedMatrix, LearnedRotation
from quarot_onnx.recipe import Recipe
from quarot_onnx.transforms import NORMS, balanced_factors
from quarot_onnx.weights import Float64

Turn = Callable[[torch.Tensor], torch.Tensor]
Matrix = LearnedRotation | LearnedMatrix | torch.Tensor


class Place(torch.nn.Module):
    """One matrix [..., n, n].

    Attributes:
        matrix: with parameters, or an orthogonal constant.
        now: the matrix of the present step, float32.
        undone: its inverse.
    """

    now: torch.Tensor
    undone: torch.Tensor

    def __init__(self, matrix: Matrix) -> None:
        super().__init__()
        self.matrix: Matrix = matrix

    def refresh(self) -> None:
        """Compute what this step uses."""
        if isinstance(self.matrix, torch.Tensor):
            self.now, self.undone = self.matrix.float(), self.matrix.float().T
        else:
            self.now, self.undone = self.matrix.matrix().float(), self.matrix.inverse().float()

    def found(self, name: str) -> dict[str, torch.Tensor]:
        """`name` -> the matrix; nothing where it is constant."""
        return {} if isinstance(self.matrix, torch.Tensor) else {name: self.matrix.matrix()}


class Product(torch.nn.Module):
    """``I ⊗ A ⊗ B`` on the last axis."""

    def __init__(self, a: Matrix, b: Matrix) -> None:
        super().__init__()
        self.a, self.b = Place(a), Place(b)

    def turn(self, x: torch.Tensor) -> torch.Tensor:
        """``x (I ⊗ A ⊗ B)``."""
        return _kronecker(x, self.a.now, self.b.now)

    def undo(self, weight: torch.Tensor) -> torch.Tensor:
        """What becomes of the weight [out, in] behind it."""
        return _kronecker(weight, self.a.undone.T, self.b.undone.T)

    def found(self, name: str) -> dict[str, torch.Tensor]:
        """`name` with ``A`` and ``B`` -> the matrices, where they are learned."""
        return self.a.found(f"{name}A") | self.b.found(f"{name}B")


class LayerPlaces(torch.nn.Module):
    """All places of a layer, and what they do to its activations and weights.

    Attributes:
        refreshed: the matrices, which are computed again for every step.
        scales: the logarithms of the learned scales.
    """

    def __init__(
        self, recipe: Recipe, sizes: Dimensions, index: int, residual: Callable[[], torch.Tensor]
    ) -> None:
        """`residual` gives R1 of the present step."""
        super().__init__()
        self._recipe, self._index = recipe, index
        self._learned = frozenset(recipe.learning.places)
        self._residual = residual
        self.num_heads, self.num_kv_heads = sizes.num_heads, sizes.num_kv_heads
        rotations, d = recipe.rotations, plan(sizes.head_dim)
        self.value = self._make_value(d)
        self.key = Place(self._make("key", d, rotations.r3))
        across = plan(self.num_heads, policy="full")
        self.heads = Place(self._make("heads", across, rotations.heads))
        self.down = self._make_down(sizes.feed_forwards[0].size)
        self.inputs = self._make_inputs(sizes.hidden_size)
        self.registered = torch.nn.ModuleList(self.inputs)
        self.up = torch.zeros(sizes.feed_forwards[0].size)
        self.norms = [torch.zeros(sizes.hidden_size) for _ in NORMS]
        if "up" in self._learned:
            self.up = torch.nn.Parameter(self.up)
        if "norms" in self._learned:
            self.norms = [torch.nn.Parameter(scale) for scale in self.norms]
        self.refreshed = [m for m in self.modules() if isinstance(m, Place)]
        learned = [self.up, *self.norms]
        self.scales = [scale for scale in learned if isinstance(scale, torch.nn.Parameter)]

    def _make(self, name: str, given: Plan, is_used: bool) -> Matrix:
        if name in self._learned:
            return LearnedMatrix(self._start(name, given, is_used))
        return _constant(given, is_used)

    def _make_value(self, d: Plan) -> Place:
        is_used = self._recipe.rotations.r2
        if "r2" in self._learned:
            return Place(LearnedRotation(self._start("r2", d, is_used)))
        if "value" in self._learned:
            start = self._start("value", d, is_used)
            return Place(LearnedMatrix(start.expand(self.num_kv_heads, d.size, d.size).clone()))
        return Place(_constant(d, is_used))

    def _make_down(self, size: int) -> Product:
        rotations = self._recipe.rotations
        if "down" in self._learned:
            sides = zip("AB", balanced_factors(size, "down"), strict=True)
            starts = (self._start("down", plan(n), rotations.r4, f".{side}") for side, n in sides)
            return Product(*(LearnedMatrix(start) for start in starts))
        fixed = plan(size, policy=rotations.r4_policy) if rotations.r4 else Plan(size, (), size)
        return Product(*(torch.from_numpy(matrix) for matrix in fixed.matrices()))

    def _make_inputs(self, size: int) -> list[Product]:
        """Of both norms; none where they are not learned."""
        if "inputs" not in self._learned:
            return []
        orders = balanced_factors(size, "inputs")
        sides = [[torch.eye(n, dtype=torch.float64) for n in orders] for _ in NORMS]
        return [Product(LearnedMatrix(a), LearnedMatrix(b)) for a, b in sides]

    def _start(self, name: str, given: Plan, is_used: bool, side: str = "") -> torch.Tensor:
        """Where a learned place begins: as a constant, or at random where no Hadamard is full."""
        if is_used and given.kind != "full":
            site = f"{name}.{self._index}{side}"
            return torch.from_numpy(random_orthogonal(given.size, self._recipe.seed, site))
        return _constant(given, is_used)

    def refresh(self) -> None:
        """Compute the matrices and their inverses of this step."""
        for place in self.refreshed:
            place.refresh()

    def tensors(self, prefix: str) -> dict[str, Float64]:
        """What this layer has learned."""
        is_rotation = isinstance(self.value.matrix, LearnedRotation)
        found = self.value.found("self_attn.R2" if is_rotation else "self_attn.value")
        found |= self.key.found("self_attn.key") | self.heads.found("self_attn.heads")
        found |= self.down.found("mlp.down_")
        if "up" in self._learned:
            found["mlp.up"] = self.up.double().exp()
        if "norms" in self._learned:
            scales = zip(NORMS, self.norms, strict=True)
            found |= {f"{name}.scale": scale.double().exp() for name, scale in scales}
        for name, product in zip(NORMS, self.inputs, strict=False):
            found |= product.found(f"{name}.")
        return {prefix + name: value.detach().numpy() for name, value in found.items()}

    def reader(self, which: int) -> Turn:
        """What becomes of the weight [out, in] of a reader of norm `which`."""

        def turn(weight: torch.Tensor) -> torch.Tensor:
            weight = (weight @ self._residual()) / self.norms[which].exp()
            return self.inputs[which].undo(weight) if self.inputs else weight

        return turn

    def turn_inputs(self, which: int, x: torch.Tensor) -> torch.Tensor:
        """What the readers see of x, which norm `which` has normalized."""
        x = x * self.norms[which].exp()
        return self.inputs[which].turn(x) if self.inputs else x

    def turn_value_outputs(self, weight: torch.Tensor) -> torch.Tensor:
        """``M.T W`` head by head, of v_proj's weight [K * d, in]; a bias [K * d, 1] likewise."""
        matrix = self.value.now
        by_head = weight.reshape(self.num_kv_heads, matrix.shape[-1], -1)
        turned: torch.Tensor = matrix.mT @ by_head
        return turned.reshape(weight.shape)

    def turn_o_inputs(self, weight: torch.Tensor) -> torch.Tensor:
        """``W (M^-T ⊗ ...)`` of o_proj's weight [out, H * d]: values and heads undone."""
        inverse = self.value.undone
        by_head = weight.reshape(len(weight), self.num_heads, -1).transpose(0, 1)
        if inverse.dim() == 3:
            inverse = inverse.repeat_interleave(self.num_heads // self.num_kv_heads, dim=0)
        turned = by_head @ inverse.mT  # [H, out, d]
        mixed = torch.einsum("hod,gh->ogd", turned, self.heads.undone)
        return mixed.reshape(weight.shape)

    def turn_heads(self, x: torch.Tensor) -> torch.Tensor:
        """``x (M ⊗ I)`` in front of o_proj."""
        by_head = x.reshape(*x.shape[:-1], self.num_heads, -1)
        return torch.einsum("...hd,hg->...gd", by_head, self.heads.now).reshape(x.shape)

    def shrink_up_outputs(self, weight: torch.Tensor) -> torch.Tensor:
        """up_proj's rows divided by the scales."""
        return weight / self.up.exp()[:, None]

    def turn_down_inputs(self, weight: torch.Tensor) -> torch.Tensor:
        """down_proj's weight [out, in] times the scales, with its input's transform undone."""
        return self.down.undo(weight * self.up.exp())

    def turn_query_and_key(
        self, query: torch.Tensor, key: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``q M^-T`` and ``k M``, after RoPE."""
        return query @ self.key.undone.T, key @ self.key.now


def _kronecker(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``x (I ⊗ A ⊗ B)`` on the last axis."""
    folded = x.reshape(*x.shape[:-1], -1, len(a), len(b))
    return torch.einsum("...ab,ac->...cb", folded @ b, a).reshape(x.shape)


def _constant(given: Plan, is_used: bool) -> torch.Tensor:
    """The matrix that the recipe's pass puts in a place; the identity where there is none."""
    blocks = np.kron(np.eye(given.size // given.block_size), given.matrix())
    return torch.from_numpy(blocks if is_used else np.eye(given.size))
