"""KFAC and the Kronecker product nearest to what it leaves of the Fisher (Koroko et al. 2022)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from natgrad.fishers.kfac import KFAC
from natgrad.fishers.singular import Followed, check_sum_rule, kronecker_sum, means, pair
from natgrad.fishers.statistics import Stats, as_capture
from natgrad.fishers.triples import indefinite
from natgrad.matrix import Clamp, KroneckerSum, Matrix
from natgrad.matrix.kronecker_sum import Guard


@dataclass(frozen=True)
class CorrectedKFAC(Followed):
    """F ~ G kron A + Q kron P: A and G as in KFAC, (P, Q) the leading triple of Z - vec(A) vec(G)^T.

    Never further from F than KFAC, never nearer than :class:`~natgrad.fishers.Deflated`; exact where the remainder is a
    single product. P and Q are indefinite and **so may be the sum**; the damped inverse is positive definite, ``guard``
    says how (:class:`~natgrad.matrix.KroneckerSum`). A and G have KFAC's divisors, ``rows`` and ``count``, so that
    their product is in the scale of F also for shared weights.

    The remainder of a batch is taken against the average (A, G). Over time (P, Q) is averaged as the second pair of
    ``Deflated``. Cost: KFAC's and KPSVD's observation; the rest as ``Deflated``. Reference: Koroko et al., arXiv
    2201.10285, where it is KFAC-CORRECTED.
    """

    guard: Guard = Clamp()

    refresh_every: ClassVar[int] = 20  # two eigh

    def __post_init__(self) -> None:
        """Refuse a damping without closed inverse."""
        super().__post_init__()
        check_sum_rule(self.rule)

    def merge(self, old: Stats | None, new: Stats, decay: float) -> Stats:
        """A, G, P and Q over time."""
        Z, kfac = self.rearranged(new), KFAC()
        known = {name: old[name] for name in ("A", "G")} if old else None
        first = kfac.merge(known, kfac.observe(as_capture(new)), decay)
        rest = Z.minus((first["A"].value, first["G"].value))
        second, _ = self.follow(rest, pair(old, "P", "Q"), indefinite(Z), decay)
        return {**first, **means(("P", "Q"), second)}

    def assemble(self, stats: Stats, previous: Matrix | None = None) -> KroneckerSum:
        """G kron A + Q kron P."""
        return kronecker_sum(stats, ("A", "G"), self.rule, self.guard)
