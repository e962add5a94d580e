# SPDX-License-Identifier: Apache-2.0
"""How a weight's codes are stored; nothing is computed here, so recipes can say it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Form:
    """How a weight is stored.

    Attributes:
        bits: of a code, 2 to 8.
        symmetric: whether zero points are 0.
        group_size: rows that share a scale, at most; 0 for all.
        clip_search: whether a grid is shrunk to the least squared error.
    """

    bits: int
    symmetric: bool = True
    group_size: int = 0
    clip_search: bool = True

    @property
    def is_per_channel(self) -> bool:
        """Whether one scale per output channel says it all."""
        return self.symmetric and not self.group_size

    def describe(self) -> str:
        """For a report."""
        groups = f", groups of {self.group_size}" if self.group_size else ""
        return f"{self.bits} bits{'' if self.symmetric else ', asymmetric'}{groups}"

    def rows(self, in_features: int) -> int:
        """The rows of a group: the largest divisor of `in_features` up to `group_size`."""
        if not self.group_size:
            return in_features
        wanted = min(self.group_size, in_features)
        return next(size for size in range(wanted, 0, -1) if in_features % size == 0)
