"""The diagonal of the Fisher: the cheapest curvature, and the floor that structured methods must beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from natgrad import matrix
from natgrad.capture import Capture, Kind
from natgrad.fishers.base import Approximation
from natgrad.fishers.statistics import Mean, Stats


@dataclass(frozen=True)
class Diagonal(Approximation):
    """diag(F) = E[DW^2], element by element.

    Not Adam: Adam squares the mean gradient of the batch, this takes the mean of squared per-example gradients.
    Cost: 2 n out in flops an observation (no per-example gradients for unshared weights), memory out in.
    """

    @property
    def reads(self) -> Literal["positions", "examples", "all"]:
        """Whole examples, whose gradients are squared."""
        return "examples"

    def observe(self, seen: Capture) -> Stats:
        """sum_n DW_n^2."""
        return {"f": Mean(seen.second_moment(), seen.count)}

    def sided(self, kind: Kind) -> Approximation:
        """Itself."""
        return self

    def assemble(self, stats: Stats, previous: matrix.Matrix | None = None) -> matrix.Diagonal:
        """diag(f)."""
        return matrix.Diagonal(stats["f"].value)
