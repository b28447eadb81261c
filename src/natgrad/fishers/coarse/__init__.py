"""Coarse levels of :class:`~natgrad.fishers.TwoLevel`: what couples the layers."""

from natgrad.fishers.coarse.base import CoarseLevel, CoarseSpace, Form
from natgrad.fishers.coarse.spaces import KrylovNicolaides, KrylovResidual, Nicolaides, ResidualSpace, SpectralSpace
from natgrad.fishers.coarse.tselepidis import Tselepidis

__all__ = [
    "CoarseLevel",
    "CoarseSpace",
    "Form",
    "KrylovNicolaides",
    "KrylovResidual",
    "Nicolaides",
    "ResidualSpace",
    "SpectralSpace",
    "Tselepidis",
]
