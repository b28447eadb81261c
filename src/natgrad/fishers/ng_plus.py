"""NG+: second moments of the per-example gradients on the smaller side of the weight (Yang et al. 2021)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from natgrad.capture import Capture, Kind
from natgrad.fishers.base import Approximation
from natgrad.fishers.statistics import Mean, Stats
from natgrad.matrix import Matrix, OneSided


@dataclass(frozen=True)
class NGPlus(Approximation):
    """F ~ L kron I with L = E[DW DW^T], D = (L + damping I)^-1 M, if out <= in; else I kron P with P = E[DW^T DW].

    L and P are the two partial traces of the Fisher, one of which TKFAC multiplies with the other. Not of the Fisher's
    scale: tr L = tr F, so that the trace of L kron I is in times that of F (of I kron P out times).

    Cost: 2 n d^2 flops an observation for unshared weights (else 2 n out in (t + d), by per-example gradients), d^3 a
    refresh, 2 out in d a step, with d = min(out, in); memory 2 d^2. Reference: Yang et al., "NG+: a multi-step
    matrix-product natural gradient method for deep learning", arXiv 2106.07454.
    """

    def observe(self, seen: Capture) -> Stats:
        """L or P, and a tensor (*groups, d') that hands on the other width."""
        left = seen.g.shape[-1] <= seen.a.shape[-1]
        other = seen.a if left else seen.g
        moment = Mean(_moment(seen, left), seen.count)
        return {"L" if left else "P": moment, "other": Mean(other.new_zeros((*other.shape[:-3], other.shape[-1])))}

    def sided(self, kind: Kind) -> Approximation | None:
        """Itself by the side that is not wide, but not for tokens."""
        return self if kind == "wide" else None

    def assemble(self, stats: Stats, previous: Matrix | None = None) -> OneSided:
        """L kron I or I kron P."""
        other = stats["other"].value.shape[-1]
        if "L" in stats:
            L = stats["L"].value
            return OneSided(L, (L.shape[-1], other), "left")
        P = stats["P"].value
        return OneSided(P, (other, P.shape[-1]))


def _moment(seen: Capture, left: bool) -> Tensor:
    """sum_n DW_n DW_n^T (left) or DW_n^T DW_n."""
    if not seen.shared:
        x, weight = (seen.flat_g, seen.flat_a) if left else (seen.flat_a, seen.flat_g)
        return (x * weight.square().sum(-1, keepdim=True)).mT @ x
    parts = [(DW @ DW.mT if left else DW.mT @ DW).sum(-3) for DW in seen.weight_gradients()]
    return torch.stack(parts).sum(0)
