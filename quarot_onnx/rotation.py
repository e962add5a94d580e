# SPDX-License-Identifier: Apache-2.0
"""Which orthogonal matrix: R1, R2, ... are places, a `Rotation` is what is put there."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import numpy as np

from quarot_onnx.hadamard import Plan, plan, random_orthogonal, randomized_signs
from quarot_onnx.weights import Float64

if TYPE_CHECKING:
    from quarot_onnx.recipe import Recipe
    from quarot_onnx.transforms import Transforms

RotationKind = Literal[
    "hadamard",
    "randomized_hadamard",
    "random_orthogonal",
    "walsh",
    "grouped_walsh",
    "dct",
    "identity",
    "given",
]


@dataclass(frozen=True)
class Place:
    """Where a rotation of QuaRot stands, or a matrix that is given in its place.

    Attributes:
        name: as in the field.
        where: what it turns.
        put_by: the passes of which one puts it there.
        is_fused: into weights; online otherwise.
    """

    name: str
    where: str
    put_by: tuple[str, ...]
    is_fused: bool = False


PLACES = (
    Place("R1", "residual stream", ("FuseR1",), is_fused=True),
    Place("R2", "values, per head", ("FuseR2", "FuseValueTransform"), is_fused=True),
    Place("heads", "input of o_proj, across heads", ("InsertHeadsHadamard", "InsertHeadTransform")),
    Place("R3", "queries and keys, per head, after RoPE", ("InsertR3", "InsertKeyTransform")),
    Place("R4", "input of down_proj", ("InsertR4", "InsertDownTransform")),
)
"""In the order of `docs/design.md`, section 4."""

INPUTS = Place("inputs", "inputs of q, k, v and of gate, up", ("InsertInputTransform",))
"""Where QuaRot has none, and matrices may be given."""


@dataclass(frozen=True)
class Rotation:
    """An orthogonal matrix Q of order `size`, applied in float64.

    * ``hadamard``: H / √n.
    * ``randomized_hadamard``: diag(s) H / √n with random signs s (QuaRot, section 3).
    * ``random_orthogonal``: Haar-distributed.
    * ``walsh``: H / √n with its columns sorted by their number of sign changes.
    * ``grouped_walsh``: blocks of such matrices, of a group each (GSR, arXiv 2505.03810).
    * ``dct``: the orthonormal cosine transform, DCT-II.
    * ``identity``: nothing is mixed.
    * ``given``: `matrix`, imported or learned.

    Where no Hadamard matrix of the order is known, the kinds made of one are a Haar-distributed
    matrix too: offline, any orthogonal one is legal.

    Attributes:
        kind: what was asked for.
        size: the order n.
        seed: determines the signs or the matrix, together with `site`.
        site: the name of the place, so that places with one seed differ.
        group_size: the largest order of the blocks of ``grouped_walsh``.
        matrix: [n, n], of a ``given`` one.
    """

    kind: RotationKind
    size: int
    seed: int
    site: str
    group_size: int = 128
    matrix: Float64 | None = field(default=None, compare=False, repr=False)

    @property
    def block_size(self) -> int:
        """Features that are mixed with each other: all, or a group.

        A group is the largest divisor of the order up to `group_size`.
        """
        if self.kind != "grouped_walsh":
            return self.size
        limit = min(self.group_size, self.size)
        return next(n for n in range(limit, 0, -1) if self.size % n == 0)

    @cached_property
    def plan(self) -> Plan | None:
        """The form that a `Hadamard` node computes, None for any other matrix."""
        if self.kind not in ("hadamard", "randomized_hadamard"):
            return None
        return self._hadamard

    @cached_property
    def _hadamard(self) -> Plan | None:
        full = plan(self.block_size)
        return full if full.kind == "full" else None

    @cached_property
    def signs(self) -> Float64:
        """The signs s of ``diag(s) H``; ones for a plain Hadamard."""
        if self.kind == "randomized_hadamard":
            return randomized_signs(self.size, self.seed, self.site)
        return np.ones(self.size)

    @cached_property
    def block(self) -> Float64:
        """The matrix B of ``Q = I ⊗ B``, [block_size, block_size]."""
        if self.matrix is not None:
            return self.matrix
        if self.kind == "identity":
            return np.eye(self.size)
        if self.kind == "dct":
            return _cosines(self.size)
        if self.kind != "random_orthogonal" and self._hadamard is not None:
            matrix = self.signs[: self.block_size, None] * self._hadamard.matrix()
            if self.kind in ("walsh", "grouped_walsh"):
                changes = (np.diff(np.sign(matrix), axis=0) != 0).sum(axis=0)
                matrix = matrix[:, np.argsort(changes, kind="stable")]
            return matrix
        return random_orthogonal(self.block_size, self.seed, self.site)

    def describe(self) -> str:
        """For the report: kind and factors."""
        name = self.kind.replace("_", " ")
        if self.kind in ("identity", "dct", "given"):
            return f"{name} {self.size}"
        if self.kind == "random_orthogonal" or self._hadamard is None:
            return f"random orthogonal {self.block_size}"
        factors = " x ".join(str(factor) for factor in self._hadamard.factors)
        blocks = f" in blocks of {self.block_size}" if self.block_size < self.size else ""
        return f"{name} {factors}{blocks}"

    def rotate_outputs(self, weight: Float64) -> Float64:
        """``W @ Q``: what is written to the rotated space; last axis of size n."""
        if self.plan is not None:
            return self.plan.apply(weight * self.signs)
        return (weight.reshape(-1, self.block_size) @ self.block).reshape(weight.shape)

    def rotate_inputs(self, weight: Float64) -> Float64:
        """``Q.T @ W``: what reads from the rotated space; first axis of size n."""
        if self.plan is not None:
            return self.plan.apply(weight * self.signs[:, None], axis=0)
        blocks = weight.reshape(-1, self.block_size, weight.shape[-1])
        return (self.block.T @ blocks).reshape(weight.shape)


def residual_rotations(recipe: "Recipe", size: int, given: "Transforms") -> list[Rotation]:
    """What may become R1 of a stream of `size` features: the given one, or one per seed.

    Seeds follow the recipe's own, as many as ``rotations.candidates``.
    """
    if given.r1 is not None:
        return [Rotation("given", size, recipe.seed, "R1", matrix=given.r1)]
    rotations = recipe.rotations
    assert rotations.r1 != "none"
    return [
        Rotation(rotations.r1, size, recipe.seed + i, "R1", rotations.group_size)
        for i in range(rotations.candidates)
    ]


def _cosines(n: int) -> Float64:
    """DCT-II, orthonormal: entry (j, k) is √(2/n) cos(π (2j + 1) k / 2n), and √(1/n) for k = 0."""
    angles = np.pi * np.outer(2 * np.arange(n) + 1, np.arange(n)) / (2 * n)
    matrix: Float64 = np.cos(angles) * np.sqrt(2 / n)
    matrix[:, 0] = np.sqrt(1 / n)
    return matrix
