"""Approximations of a layer's Fisher block, one per file."""

from natgrad.fishers.base import Approximation, Mean, Stats, pool
from natgrad.fishers.diagonal import Diagonal
from natgrad.fishers.eigen_corrected import EigenCorrected
from natgrad.fishers.ekfac import EKFAC
from natgrad.fishers.exact import ExactFisher
from natgrad.fishers.kfac import KFAC
from natgrad.fishers.tekfac import TEKFAC
from natgrad.fishers.tkfac import TKFAC, TKFACExact

__all__ = [
    "EKFAC",
    "KFAC",
    "TEKFAC",
    "TKFAC",
    "Approximation",
    "Diagonal",
    "EigenCorrected",
    "ExactFisher",
    "Mean",
    "Stats",
    "TKFACExact",
    "pool",
]
