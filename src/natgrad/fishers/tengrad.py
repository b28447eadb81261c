"""TENGraD: the Gram form with one outer product per example, whatever the number of positions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from natgrad.capture import Capture
from natgrad.fishers.statistics import Stats, as_samples
from natgrad.fishers.woodbury import Woodbury


@dataclass(frozen=True)
class TENGraD(Woodbury):
    """:class:`Woodbury` with DW_n ~ (sum_t g_nt) (sum_t a_nt)^T / T_n in place of sum_t g_nt a_nt^T.

    T_n is the number of positions of example n that are not all zero (padding is); with ``average=False`` it is left
    out. Exact without weight sharing, and, averaged, where ``a`` or ``g`` is the same at all positions of an example.
    The factorised inverse of one batch serves fresh gradients until the next refresh.

    Cost: n^2 (in + out) + n^3 / 3 flops a refresh and 4 n in out a step, at any t; memory n (in + out) + n^2. Raises
    ``ValueError`` for a ``window`` that is not a whole number of at least 1. Reference: Soori et al., arXiv 2106.03947.
    """

    average: bool = True
    refresh_every: ClassVar[int] = 10

    def observe(self, seen: Capture) -> Stats:
        """Sums over positions."""
        a, g = (x.sum(-2, keepdim=True) for x in (seen.a, seen.g))
        if self.average:
            used = (seen.a != 0).any(-1) | (seen.g != 0).any(-1)  # (*groups, n, t)
            g = g / used.sum(-1).clamp(min=1)[..., None, None]
        return as_samples(Capture(a, g, seen.count, seen.rows))
