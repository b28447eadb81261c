"""The sum of two Kronecker products nearest to the Fisher, one after the other (Koroko et al. 2022)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from natgrad.fishers.singular import Followed, check_sum_rule, kronecker_sum, means, pair
from natgrad.fishers.statistics import Stats
from natgrad.fishers.triples import identity, indefinite
from natgrad.matrix import Clamp, KroneckerSum, Matrix
from natgrad.matrix.kronecker_sum import Guard


@dataclass(frozen=True)
class Deflated(Followed):
    """F ~ S kron R + Q kron P: (R, S) as in KPSVD, (P, Q) the same of what remains, Z - vec(R) vec(S)^T.

    The nearest sum of two products with symmetric factors, so its error is never above that of KPSVD. P and Q are
    indefinite and **so may be the sum**; the damped inverse is positive definite, ``guard`` says how
    (:class:`~natgrad.matrix.KroneckerSum`).

    Averages over time are those of :class:`~natgrad.fishers.KPSVD`, for the same reasons: ``"streaming"`` applies Z of
    every batch, with the directions of the average (R, S) projected out on both sides, to the old directions of the
    second triple. Subtracting the average (R, S) instead lets the batch's deviation along them into the second
    product, which on heavy-tailed batches grows beyond all relation to F (``benchmarks/streaming.py``). ``"published"``
    finds the second triple of every batch, and averages it with the sign that agrees with the average. The code
    released with the paper: ``averaging="published"``, ``guard=Magnitude()``, ``rule=Unit()``, its damping squared.

    Cost: twice KPSVD's observation; two Cholesky factorisations and two eigh a refresh; 4 in out (in + out) flops a
    step; memory 4 (in^2 + out^2). Reference: Koroko et al., arXiv 2201.10285.
    """

    guard: Guard = Clamp()

    refresh_every: ClassVar[int] = 20  # two eigh

    def __post_init__(self) -> None:
        """Refuse a damping without closed inverse."""
        super().__post_init__()
        check_sum_rule(self.rule)

    def merge(self, old: Stats | None, new: Stats, decay: float) -> Stats:
        """R, S, P and Q over time."""
        Z = self.rearranged(new)
        first, known = self.follow(Z, pair(old, "R", "S"), identity(Z), decay)
        second, _ = self.follow(Z.without(known), pair(old, "P", "Q"), indefinite(Z), decay)
        return {**means(("R", "S"), first), **means(("P", "Q"), second)}

    def assemble(self, stats: Stats, previous: Matrix | None = None) -> KroneckerSum:
        """S kron R + Q kron P."""
        return kronecker_sum(stats, ("R", "S"), self.rule, self.guard)
