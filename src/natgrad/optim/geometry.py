"""Geometries: in which norm a step is steepest, given a matrix F of the layer.

Of all steps D of norm 1 the steepest maximises <M, D>, M the gradient or its average (Bernstein and Newhouse, arXiv
2409.20325). Both norms here live in the coordinates that the matrix whitens, Z = F^(1/2) D.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from natgrad.fishers import Approximation
from natgrad.matrix import Kronecker, LinearMap, Matrix, OneSided
from natgrad.matrix.factor import is_column
from natgrad.matrix.whitening import halves, whitened

INVERSE, ROOT, NO_ROOT = 0, 1, 2  # what a preconditioner is: an inverse, a root of one, an inverse for want of a root


class Geometry(ABC):
    """What is made of a matrix at a refresh, and of a gradient with it at every step."""

    iterations: int | None = None  # for the polar factor of a root
    every: int = 1  # steps that a part of a root, made for one gradient, serves at most

    @abstractmethod
    def prepare(self, approximation: Approximation, matrix: Matrix, damping: float) -> tuple[LinearMap, int]:
        """The preconditioner, and which of ``INVERSE``, ``ROOT`` and ``NO_ROOT`` it is. Raises
        ``FactorisationError``."""

    @abstractmethod
    def made(self, kind: int) -> bool:
        """Whether a preconditioner of this kind is its own."""

    def empirical(self) -> Geometry:
        """What it is where F is the empirical Fisher."""
        return self


@dataclass(frozen=True)
class Frobenius(Geometry):
    """The Frobenius norm, |Z|_F = (D^T F D)^(1/2): D = (F + damping I)^-1 M, the natural gradient (Amari 1998)."""

    def prepare(self, approximation: Approximation, matrix: Matrix, damping: float) -> tuple[LinearMap, int]:
        """The damped inverse."""
        return approximation.invert(matrix, damping), INVERSE

    def made(self, kind: int) -> bool:
        """An inverse that is no stand-in."""
        return kind == INVERSE


@dataclass(frozen=True)
class SpectralDescent(Geometry):
    """The spectral norm, |Z|_2: D = S polar(S M) with S = F^(-1/2), spectral descent in the Fisher's coordinates.

    With F = G kron A: D = G^(-1/2) polar(G^(-1/2) M A^(-1/2)) A^(-1/2). It solves max <M, D> over |G^(1/2) D A^(1/2)|_2
    <= 1, where <M, D> = |S M|_*, the nuclear norm. With F = I it is Muon's direction. ``damping`` times its mean
    eigenvalue is added to every factor before the root; that of the optimizer plays no part. Matrices without a root
    (:func:`~natgrad.matrix.whitening.whitened`) give the natural direction. It is not linear in M, so that momentum
    comes before it.

    With ``sides="inputs"`` a Kronecker product counts as I kron A.

    The polar factor comes from ``iterations`` of Newton and Schulz on the smaller side, so that singular values end
    between .7 and 1.2, and the smallest below (``None``: exactly, by an eigendecomposition). Where that would be dear
    beside a training step, on wide layers and small batches, its part serves several steps, ``every`` at most
    (:func:`~natgrad.matrix.whitening.turned`): what it is made for is an average that changes slowly.
    """

    damping: float = 1.0
    every: int = 10
    iterations: int | None = 3
    sides: Literal["both", "inputs"] = "both"

    def __post_init__(self) -> None:
        """Refuse a damping that is not positive, and iterations that are no number of them."""
        if not 0 < self.damping < float("inf"):
            raise ValueError(f"damping must be a finite number > 0, got {self.damping!r}")
        if self.sides not in ("both", "inputs"):
            raise ValueError(f"sides must be 'both' or 'inputs', got {self.sides!r}")
        if not (isinstance(self.every, int) and self.every > 0):
            raise ValueError(f"every must be a whole number of at least 1, got {self.every!r}")
        if self.iterations is not None and not (isinstance(self.iterations, int) and self.iterations > 0):
            raise ValueError(f"iterations must be a whole number of at least 1 or None, got {self.iterations!r}")

    def prepare(self, approximation: Approximation, matrix: Matrix, damping: float) -> tuple[LinearMap, int]:
        """S, or where it has none the damped inverse."""
        if self.sides == "inputs" and isinstance(matrix, Kronecker):
            matrix = OneSided(matrix.right, (matrix.shape[-2], matrix.shape[-1]))
        root = None if _wide(matrix) else whitened(matrix, self.damping)
        return (approximation.invert(matrix, damping), NO_ROOT) if root is None else (root, ROOT)

    def empirical(self) -> SpectralDescent:
        """With the inputs alone: whitening by the gradients of the true labels slows down what they agree on."""
        return replace(self, sides="inputs")

    def made(self, kind: int) -> bool:
        """A root, or its stand-in."""
        return kind != INVERSE


def metric(preconditioner: LinearMap, kind: int, X: Tensor, Y: Tensor) -> Tensor:
    """<X, Y>, <X, X> and <Y, Y> in the metric of F^-1: two products with a preconditioner."""
    (HX, KX), (HY, KY) = (halves(preconditioner, Z) if kind == ROOT else (Z, preconditioner @ Z) for Z in (X, Y))
    return torch.stack([(H * K).sum() for H, K in ((HX, KY), (HX, KX), (HY, KY))])


def _wide(matrix: Matrix) -> bool:
    """Whether both sides are diagonal, being too wide for a matrix."""
    if not isinstance(matrix, Kronecker) or min(matrix.shape[-2:]) == 1:
        return False
    return is_column(matrix.left) and is_column(matrix.right)
