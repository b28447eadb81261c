"""The coarse spaces of Koroko et al. (2303.18083, section 4): one or two directions a layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from natgrad.fishers.coarse.base import CoarseSpace
from natgrad.fishers.eigen_corrected import HasSpectrum
from natgrad.matrix import LinearMap


@dataclass(frozen=True)
class Nicolaides(CoarseSpace):
    """The constants: one direction a layer, all of its weights alike. m = layers."""

    def vectors(self, inverse: LinearMap, r: Tensor) -> Tensor:
        """Ones."""
        return torch.ones_like(r).unsqueeze(0)


@dataclass(frozen=True)
class SpectralSpace(CoarseSpace):
    """q_G q_A^T, the eigenvector of the smallest eigenvalue of the fine matrix: one direction a layer. m = layers.

    For a Kronecker product the q are eigenvectors of the smallest eigenvalues of G and A. It takes a fine inverse with
    an eigenbasis; that of a Kronecker product is computed once a refresh, 9 to 25 (in^3 + out^3) flops. ``ValueError``
    for other bases, at the first step.
    """

    def vectors(self, inverse: LinearMap, r: Tensor) -> Tensor:
        """The eigenvector of the largest eigenvalue of the inverse; one a group, of equal weight and fixed sign."""
        if not isinstance(inverse, HasSpectrum):
            raise ValueError(
                f"SpectralSpace needs a base whose inverse has an eigenbasis, not {type(inverse).__name__}"
            )
        spectrum = inverse.spectral()
        place = spectrum.values.flatten(-2).argmax(-1)[..., None, None]
        width = spectrum.shape[-1]
        q_G = spectrum.left.take_along_dim(place // width, -1)
        q_A = spectrum.right.take_along_dim(place % width, -1)
        return _signed(q_G @ q_A.mT).to(r.dtype).unsqueeze(0)


@dataclass(frozen=True)
class ResidualSpace(CoarseSpace):
    """F_fine^-1 r, the fine step for what the fine step left: one direction a layer. m = layers."""

    moves: ClassVar[bool] = True

    def vectors(self, inverse: LinearMap, r: Tensor) -> Tensor:
        """F_fine^-1 r."""
        return (inverse @ r).unsqueeze(0)


@dataclass(frozen=True)
class KrylovNicolaides(CoarseSpace):
    """{1, F_fine^-1 1}: two directions a layer. m = 2 layers."""

    def vectors(self, inverse: LinearMap, r: Tensor) -> Tensor:
        """Ones, and the fine step for them."""
        ones = torch.ones_like(r)
        return torch.stack([ones, inverse @ ones])


@dataclass(frozen=True)
class KrylovResidual(CoarseSpace):
    """{F_fine^-1 r, F_fine^-2 r}: two directions a layer. m = 2 layers."""

    moves: ClassVar[bool] = True

    def vectors(self, inverse: LinearMap, r: Tensor) -> Tensor:
        """One fine step for the residual, and two."""
        z = inverse @ r
        return torch.stack([z, inverse @ z])


def _signed(q: Tensor) -> Tensor:
    """q (*groups, out, in), each with its largest entry positive: groups add up, and eigh gives a vector any sign."""
    flat = q.flatten(-2)
    largest = flat.take_along_dim(flat.abs().argmax(-1, keepdim=True), -1)
    return q * largest.sign().unsqueeze(-1)
