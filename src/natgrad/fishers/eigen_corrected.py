"""EigenCorrected: keep the eigenvectors of an approximation, measure the Fisher's own second moments along them.

``EigenCorrected(KFAC())`` is EKFAC (George et al. 2018), ``EigenCorrected(TKFAC(),
carry="reseed")`` TEKFAC (Gao et al. 2020).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from natgrad.capture import Capture, Kind
from natgrad.fishers.base import Approximation
from natgrad.fishers.sided import for_layer
from natgrad.fishers.statistics import Mean, Stats, pool
from natgrad.matrix import Factored, LinearMap, Matrix, Spectral, Tikhonov, factor
from natgrad.matrix.damping import SpectralRule


@runtime_checkable
class HasSpectrum(Protocol):
    """A matrix that knows its eigenbasis."""

    def spectral(self) -> Spectral:
        """The same matrix in its eigenbasis."""


@dataclass(frozen=True)
class EigenCorrected(Approximation):
    """F ~ Q diag(s) Q^T, Q = Q_G kron Q_A the eigenbasis of ``base``, s = E[(Q_G^T DW Q_A)^2] measured in it.

    Among all matrices with these eigenvectors it is the nearest to F in the Frobenius norm, so its error is never above
    that of ``base``, and its trace is that of F. ``carry`` says what becomes of s when the basis is refreshed:

    * ``"rotate"``: the diagonal of the old matrix in the new basis, s' = (R_G^2) s (R_A^2)^T with R = Q_new^T Q_old;
    * ``"reseed"``: the eigenvalues of ``base``, which count as 16 examples beside those measured in the new basis;
    * ``"keep"``: s as it is.

    ``rule`` is the damping. Without one the matrix itself is damped exactly, (F + damping I)^-1, which is what
    Laplace and influence need, and training steps by ``Factored()`` on the margins of s: eigenvalues measured on few
    examples are often far too small, and the cross terms of factored damping lift them in proportion to their row and
    column, where a constant does not. ``Tikhonov()``, ``Factored()`` or ``Relative()`` hold for both. Cost: that of
    ``base`` with eigh for Cholesky (9 to 25 (in^3 + out^3) flops), 2 n (in^2 + out^2 + in out) an observation, 4 in
    out (in + out) a step. Reference: George, Laurent, Bouthillier, Ballas and Vincent, arXiv 1806.03884.
    """

    base: Approximation
    carry: Literal["rotate", "reseed", "keep"] = "rotate"
    rule: SpectralRule | None = None

    refresh_every: ClassVar[int] = 20  # an eigenbasis is dear, and lasts: s is measured anew at every observation

    def __post_init__(self) -> None:
        """Refuse an unknown ``carry``."""
        if self.carry not in ("rotate", "reseed", "keep"):
            raise ValueError(f"carry must be 'rotate', 'reseed' or 'keep', got {self.carry!r}")

    def observe(self, seen: Capture) -> Stats:
        """The statistics of ``base``."""
        return self.base.observe(seen)

    def merge(self, old: Stats | None, new: Stats, decay: float) -> Stats:
        """As ``base`` does."""
        return self.base.merge(old, new, decay)

    def assemble(self, stats: Stats, previous: Matrix | None = None) -> Spectral:
        """The eigenbasis of ``base``, with the eigenvalues that ``carry`` says."""
        base = self.base.assemble(stats)
        if not isinstance(base, HasSpectrum):
            raise ValueError(f"EigenCorrected needs a base with an eigenbasis; {self.base!r} has none")
        seeded = replace(base.spectral(), rule=self.rule or Tikhonov())
        if not isinstance(previous, Spectral) or self.carry == "reseed":
            return seeded
        return replace(seeded, values=previous.values if self.carry == "keep" else _rotated(previous, seeded))

    def correct(self, matrix: Matrix, seen: Sequence[Capture], decay: float) -> Matrix:
        """s <- decay s + (1 - decay) E[(Q_G^T DW Q_A)^2]."""
        assert isinstance(matrix, Spectral)
        projected = (capture.project(matrix.left, matrix.right) for capture in seen)
        measured = pool({"s": Mean(capture.second_moment(), capture.count)} for capture in projected)["s"]
        value = measured.value.to(matrix.values.dtype)
        return replace(matrix, values=torch.lerp(value, matrix.values, decay))

    def invert(self, matrix: Matrix, damping: float) -> LinearMap:
        """Damped by ``rule``, or by ``Factored()``."""
        assert isinstance(matrix, Spectral)
        return replace(matrix, rule=self.rule or Factored()).inverse(damping)

    @property
    def seed(self) -> int:
        """16 where s is measured anew: little beside a batch, but more than one of a few examples should overrule."""
        return 16 if self.carry == "reseed" else 0

    @property
    def reads(self) -> Literal["positions", "examples", "all"]:
        """Whole examples, whose gradients are squared."""
        return "all" if self.base.reads == "all" else "examples"

    @property
    def sides(self) -> tuple[bool, bool]:
        """Those of ``base``."""
        return self.base.sides

    def sided(self, kind: Kind) -> Approximation:
        """In the eigenbasis of what ``base`` has for such a layer; that of a diagonal side is the identity."""
        return replace(self, base=for_layer(self.base, kind))

    def check(self, name: str, shape: torch.Size) -> None:
        """What ``base`` refuses."""
        self.base.check(name, shape)


def _rotated(old: Spectral, new: Spectral) -> Tensor:
    R_G, R_A = (
        factor.product(factor.transposed(Q), old_Q).square()
        for Q, old_Q in ((new.left, old.left), (new.right, old.right))
    )
    return factor.times_right(factor.left_times(R_G, old.values), factor.transposed(R_A))
