# SPDX-License-Identifier: Apache-2.0
"""Which orthogonal matrix: R1, R2, ... are places, a `Rotation` is what is put there."""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from quarot_onnx.hadamard import Plan, plan, random_orthogonal, randomized_signs
from quarot_onnx.weights import Float64

RotationKind = Literal["hadamard", "randomized_hadamard", "random_orthogonal"]


@dataclass(frozen=True)
class Rotation:
    """An orthogonal matrix Q of order `size`, applied in float64.

    ``hadamard`` is H / √n; ``randomized_hadamard`` is diag(s) H / √n with random signs s (QuaRot,
    section 3); ``random_orthogonal`` is Haar-distributed. Where no Hadamard matrix of the order is
    known, the Hadamard kinds are a Haar-distributed matrix too: offline, any orthogonal one is
    legal.

    Attributes:
        kind: what was asked for.
        size: the order n.
        seed: determines the signs or the matrix, together with `site`.
        site: the name of the place, so that places with one seed differ.
    """

    kind: RotationKind
    size: int
    seed: int
    site: str

    @cached_property
    def plan(self) -> Plan | None:
        """The fast form, None for a dense matrix."""
        if self.kind == "random_orthogonal":
            return None
        full = plan(self.size)
        return full if full.kind == "full" else None

    @cached_property
    def signs(self) -> Float64:
        """The signs s of ``diag(s) H``; ones for a plain Hadamard."""
        if self.kind == "randomized_hadamard":
            return randomized_signs(self.size, self.seed, self.site)
        return np.ones(self.size)

    @cached_property
    def _dense(self) -> Float64:
        return random_orthogonal(self.size, self.seed, self.site)

    def describe(self) -> str:
        """For the report: kind and factors."""
        if self.plan is None:
            return f"random orthogonal {self.size}"
        name = self.kind.replace("_", " ")
        return f"{name} {' x '.join(str(factor) for factor in self.plan.factors)}"

    def rotate_outputs(self, weight: Float64) -> Float64:
        """``W @ Q``: what is written to the rotated space; last axis of size n."""
        if self.plan is None:
            return weight @ self._dense
        return self.plan.apply(weight * self.signs)

    def rotate_inputs(self, weight: Float64) -> Float64:
        """``Q.T @ W``: what reads from the rotated space; first axis of size n."""
        if self.plan is None:
            return self._dense.T @ weight
        return self.plan.apply(weight * self.signs[:, None], axis=0)
