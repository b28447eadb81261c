"""TKFAC: the Kronecker product with the trace and both partial traces of the Fisher (Gao et al. 2021)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from natgrad.capture import Capture, Kind
from natgrad.fishers.base import Approximation
from natgrad.fishers.statistics import Mean, Stats
from natgrad.matrix import Kronecker, Matrix, Unit
from natgrad.matrix.damping import KroneckerRule


@dataclass(frozen=True)
class TKFAC(Approximation):
    """F ~ S kron P / d with P = E[|g|^2 a a^T], S = E[|a|^2 g g^T] and d = tr P = tr S = E[|a|^2 |g|^2].

    With shared weights the expectations run over single positions (the paper's theorem 4.3: positions are
    uncorrelated), so the traces are those of the Fisher without cross terms between positions; :class:`TKFACExact`
    keeps them. Exact wherever F is a single Kronecker product. ``rule`` is the damping; the paper's "normal" damping
    is ``Unit()``, the default.

    Cost: that of KFAC and two row norms. Reference: Gao, Liu, Huang, Wang, Wang, Xu and Yu, arXiv 2011.10741.
    """

    rule: KroneckerRule = Unit()

    def observe(self, seen: Capture) -> Stats:
        """P, S and d."""
        norm_a, norm_g = seen.norm_a, seen.norm_g
        return {
            "P": Mean(seen.moment_a(norm_g), seen.count),
            "S": Mean(seen.moment_g(norm_a), seen.count),
            "d": Mean((norm_a * norm_g).sum((-2, -1)), seen.count),
        }

    @property
    def reads(self) -> Literal["positions", "examples", "all"]:
        """Single positions."""
        return "positions"

    @property
    def sides(self) -> tuple[bool, bool]:
        """Both."""
        return True, True

    def sided(self, kind: Kind) -> Approximation:
        """Itself; the partial traces of a diagonal side are diagonals."""
        return TKFAC(self.rule)

    def assemble(self, stats: Stats, previous: Matrix | None = None) -> Kronecker:
        """S/sqrt(d) kron P/sqrt(d)."""
        d = stats["d"].value
        root = torch.where(d > 0, d, torch.ones_like(d)).sqrt()[..., None, None]
        return Kronecker(stats["S"].value / root, stats["P"].value / root, self.rule)


@dataclass(frozen=True)
class TKFACExact(TKFAC):
    """TKFAC with the cross terms between positions: P = E[DW^T DW], S = E[DW DW^T], d = E|DW|^2.

    The same as TKFAC for unshared weights; with shared weights both partial traces are those of the full Fisher.
    Cost: per-example gradients, n out in (t + out + in) flops an observation.
    """

    def observe(self, seen: Capture) -> Stats:
        """P, S and d from per-example gradients."""
        if not seen.shared:
            return super().observe(seen)
        parts = [((DW.mT @ DW).sum(-3), (DW @ DW.mT).sum(-3)) for DW in seen.weight_gradients()]
        P, S = (torch.stack(part).sum(0) for part in zip(*parts, strict=True))
        d = P.diagonal(dim1=-2, dim2=-1).sum(-1)
        return {"P": Mean(P, seen.count), "S": Mean(S, seen.count), "d": Mean(d, seen.count)}

    @property
    def reads(self) -> Literal["positions", "examples", "all"]:
        """Whole examples."""
        return "examples"
