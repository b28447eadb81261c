"""The sum of two Kronecker products nearest to the Fisher, both at once (Koroko et al. 2022)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from natgrad.fishers.rearrangement import unit
from natgrad.fishers.singular import Singular, check_sum_rule, check_whole, kronecker_sum, means, pair
from natgrad.fishers.statistics import Stats
from natgrad.fishers.triples import average, identity, lanczos
from natgrad.matrix import Clamp, KroneckerSum, Matrix
from natgrad.matrix.kronecker_sum import Guard


@dataclass(frozen=True)
class Lanczos(Singular):
    """F ~ S kron R + Q kron P, the two leading triples of Z by Golub-Kahan bidiagonalisation.

    The matrix of :class:`~natgrad.fishers.Deflated` by another algorithm: a basis of ``size`` matrices on each side,
    re-orthogonalised in full, at most ``restarts`` passes, until the residual is below ``tolerance``. Each
    observation is iterated to the end, from where the last one ended, and the factors are averaged, (P, Q) with the
    sign that agrees with the average; that is **not** the KPSVD of the averaged Fisher (see
    :class:`~natgrad.fishers.KPSVD`), which ``Deflated`` follows better and at less cost. ``size=2, restarts=1`` is what
    the released code computes: its stopping test is an identity of the recurrence, and it misses the second triple.

    Cost: 2 size products of 2 n (in^2 + out^2) flops a pass, usually one to three passes an observation; the rest as
    ``Deflated``. Reference: Koroko et al., arXiv 2201.10285.
    """

    size: int = 8
    restarts: int = 20
    guard: Guard = Clamp()

    observe_every: ClassVar[int] = 20  # an observation is many products
    refresh_every: ClassVar[int] = 20  # two eigh

    def __post_init__(self) -> None:
        """Refuse a basis that cannot hold two triples, no pass at all, and a damping without closed inverse."""
        super().__post_init__()
        check_whole(2, size=self.size)
        check_whole(restarts=self.restarts)
        check_sum_rule(self.rule)

    def merge(self, old: Stats | None, new: Stats, decay: float) -> Stats:
        """R, S, P and Q over time."""
        Z = self.rearranged(new)
        before = [pair(old, "R", "S"), pair(old, "P", "Q")]
        start = unit(sum((unit(known[1]) for known in before if known), start=0 * identity(Z)), identity(Z))
        found = lanczos(Z, start, self.size, self.restarts, self.tolerance)
        first, second = (average(known, new, decay) if known else new for known, new in zip(before, found, strict=True))
        return {**means(("R", "S"), first), **means(("P", "Q"), second)}

    def assemble(self, stats: Stats, previous: Matrix | None = None) -> KroneckerSum:
        """S kron R + Q kron P."""
        return kronecker_sum(stats, ("R", "S"), self.rule, self.guard)
