"""KFAC: the Kronecker product of the covariances of output gradients and inputs (Martens and Grosse 2015)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from natgrad.capture import Capture, Kind
from natgrad.fishers.base import Approximation
from natgrad.fishers.statistics import Mean, Stats
from natgrad.fishers.tkfac import TKFAC
from natgrad.matrix import Factored, Kronecker, Matrix
from natgrad.matrix.damping import KroneckerRule


@dataclass(frozen=True)
class KFAC(Approximation):
    """F ~ G kron A with A = E[a a^T] over positions and G = E[sum_t g g^T] over loss terms.

    Exact for deep linear networks under square loss, for one example, and where a a^T and g g^T are independent.
    ``rule`` is the damping of the inverse: ``Factored()`` (default), ``Unit()`` or ``Tikhonov()``.

    Cost: 2 n t (in^2 + out^2) flops an observation, in^3 + out^3 a refresh, 2 in out (in + out) a step; memory
    2 (in^2 + out^2). References: Martens and Grosse, arXiv 1503.05671; for convolutions Grosse and Martens, arXiv
    1602.01407; for weight sharing Eschenhagen et al., arXiv 2311.00636.
    """

    rule: KroneckerRule = Factored()

    def observe(self, seen: Capture) -> Stats:
        """Both covariances."""
        return {"A": Mean(seen.moment_a(), seen.rows), "G": Mean(seen.moment_g(), seen.count)}

    @property
    def reads(self) -> Literal["positions", "examples", "all"]:
        """Single positions."""
        return "positions"

    @property
    def sides(self) -> tuple[bool, bool]:
        """Both."""
        return True, True

    def sided(self, kind: Kind) -> Approximation:
        """With A or G diagonal; for uses of both roles, whose a and g have no common scale, as TKFAC."""
        return TKFAC(self.rule) if kind == "mixed" else self

    def assemble(self, stats: Stats, previous: Matrix | None = None) -> Kronecker:
        """G kron A."""
        return Kronecker(stats["G"].value, stats["A"].value, self.rule)
