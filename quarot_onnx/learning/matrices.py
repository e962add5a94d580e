# SPDX-License-Identifier: Apache-2.0
"""Matrices with parameters: on the manifold of orthogonal matrices, or free and invertible."""

import torch


class LearnedRotation(torch.nn.Module):
    """``R = R0 C(A)``: R is orthogonal whatever the parameter is.

    C is the Cayley map of the skew part S = A - A.T, ``C = (1 + S/2)^-1 (1 - S/2)``, which reaches
    every rotation that has no eigenvalue -1. R0 is where the training starts, A = 0. An optimizer
    of A walks on the Stiefel manifold as SpinQuant's Cayley SGD does (arXiv 2405.16406, section
    3.2), without that method's retraction, since every A stands for an orthogonal matrix.
    """

    def __init__(self, start: torch.Tensor) -> None:
        """`start`: orthogonal, float64 [n, n]."""
        super().__init__()
        self.start: torch.Tensor
        self.register_buffer("start", start)
        self.free = torch.nn.Parameter(torch.zeros_like(start, dtype=torch.float32))

    def matrix(self) -> torch.Tensor:
        """R, float64 [n, n]."""
        skew = (self.free - self.free.T).double() / 2
        one = torch.eye(len(skew), dtype=torch.float64)
        turn: torch.Tensor = torch.linalg.solve(one + skew, one - skew)
        return self.start @ turn

    def inverse(self) -> torch.Tensor:
        """The transpose."""
        return self.matrix().T


class LearnedMatrix(torch.nn.Module):
    """Invertible matrices [..., n, n] near where they start; every entry is a parameter."""

    def __init__(self, start: torch.Tensor) -> None:
        """`start`: invertible, float64."""
        super().__init__()
        self.free = torch.nn.Parameter(start.float())

    def matrix(self) -> torch.Tensor:
        """M, float64."""
        return self.free.double()

    def inverse(self) -> torch.Tensor:
        """Its inverse."""
        inverse: torch.Tensor = torch.linalg.inv(self.matrix())
        return inverse
