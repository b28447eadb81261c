"""KPSVD: the Kronecker product nearest to the Fisher (Koroko et al. 2022)."""

from __future__ import annotations

from dataclasses import dataclass

from natgrad.fishers.singular import Followed, means, pair
from natgrad.fishers.statistics import Stats
from natgrad.fishers.triples import identity
from natgrad.matrix import Kronecker, Matrix


@dataclass(frozen=True)
class KPSVD(Followed):
    """F ~ S kron R, the minimum of |F - S kron R|: R = sqrt(s) u, S = sqrt(s) v for the leading triple (s, u, v) of Z.

    Z: V -> E[DW^T V DW] is the rearranged Fisher (:class:`~natgrad.fishers.rearrangement.Rearrangement`). Z keeps
    positivity, so R and S are PSD. The error is sqrt(sum_{i>=2} s_i^2), never above that of KFAC or TKFAC. Exact
    wherever F is a single Kronecker product, one example among them.

    The KPSVD of every batch, averaged over time (``averaging="published"``), is **not** the KPSVD of the average: the
    leading triple is no linear function of Z, each batch's own is biased towards its noise, and what the batches have
    in common beyond their leading triples is lost. Means of Z itself would be exact, but have the size of F. The
    default, ``"streaming"``, averages products instead: X <- ema(X, Z v), Y <- ema(Y, Z^T u) with the directions
    v = Y/|Y| and u = X/|X| of before, F ~ Y kron X / sqrt(|X| |Y|). They are linear in the batch's Z, so unbiased for
    given directions, and over time one power iteration on the average; it ends 0 to 3 % above the best possible
    product where the other rule ends 1 to 80 % above it (``benchmarks/streaming.py``). Either iterates the first
    observation to ``tolerance``.

    Cost: 4 n (in^2 + out^2) flops an observation, as many an iteration of the first; refresh, step and memory of KFAC.
    ``rule`` is the damping, as for KFAC. References: Koroko, Anciaux-Sedrakian, Ben Gharbia, Gares, Haddou and Tran,
    arXiv 2201.10285; the streaming average is this library's.
    """

    def merge(self, old: Stats | None, new: Stats, decay: float) -> Stats:
        """R and S over time."""
        Z = self.rearranged(new)
        kept, _ = self.follow(Z, pair(old, "R", "S"), identity(Z), decay)
        return means(("R", "S"), kept)

    def assemble(self, stats: Stats, previous: Matrix | None = None) -> Kronecker:
        """S kron R."""
        return Kronecker(stats["S"].value, stats["R"].value, self.rule)
