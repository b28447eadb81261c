"""The exact Fisher block of a layer, written out: the oracle of every other approximation."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from natgrad.capture import Capture, Kind
from natgrad.fishers.base import Approximation
from natgrad.fishers.statistics import Mean, Stats
from natgrad.matrix import Dense, Matrix


@dataclass(frozen=True)
class ExactFisher(Approximation):
    """F = E[vec(DW) vec(DW)^T], the layer's Fisher block as a dense matrix (Amari 1998).

    ``limit``: the largest out * in it accepts, since memory is (out in)^2 and a refresh costs (out in)^3 / 3 flops;
    an observation costs n (out in)^2. Raises ``ValueError`` for a larger layer.

    Reference: Amari, "Natural gradient works efficiently in learning", Neural Computation 10(2), 1998.
    """

    limit: int = 8000

    def observe(self, seen: Capture) -> Stats:
        """sum_n vec(DW) vec(DW)^T, kept as (*groups, out, in, out, in)."""
        rows = (DW.flatten(-2) for DW in seen.weight_gradients())
        block = (seen.g.shape[-1], seen.a.shape[-1])
        total = torch.stack([U.mT @ U for U in rows]).sum(0)
        return {"F": Mean(total.unflatten(-1, block).unflatten(-3, block), seen.count)}

    def sided(self, kind: Kind) -> Approximation:
        """Itself, up to its ``limit``."""
        return self

    def assemble(self, stats: Stats, previous: Matrix | None = None) -> Dense:
        """F."""
        F = stats["F"].value
        return Dense(F.flatten(-2).flatten(-3, -2), (F.shape[-2], F.shape[-1]))

    def check(self, name: str, shape: torch.Size) -> None:
        """Refuse blocks above ``limit``."""
        if shape[-1] * shape[-2] > self.limit:
            raise ValueError(
                f"ExactFisher: layer {name!r} has a block of {shape[-2]} x {shape[-1]} weights, above limit="
                f"{self.limit}; use KFAC or EKFAC, Woodbury (the Gram form of the same matrix), or raise the limit"
            )
