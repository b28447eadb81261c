"""Approximations of a layer's Fisher block, one per file."""

from natgrad.fishers.base import Approximation, Coupled, Part
from natgrad.fishers.block_tridiagonal import BlockTridiagonal
from natgrad.fishers.coarse import (
    CoarseSpace,
    KrylovNicolaides,
    KrylovResidual,
    Nicolaides,
    ResidualSpace,
    SpectralSpace,
    Tselepidis,
)
from natgrad.fishers.corrected_kfac import CorrectedKFAC
from natgrad.fishers.deflated import Deflated
from natgrad.fishers.diagonal import Diagonal
from natgrad.fishers.eigen_corrected import EigenCorrected
from natgrad.fishers.ekfac import EKFAC
from natgrad.fishers.exact import ExactFisher
from natgrad.fishers.foof import FOOF
from natgrad.fishers.joint import JointFisher
from natgrad.fishers.kfac import KFAC
from natgrad.fishers.kpsvd import KPSVD
from natgrad.fishers.lanczos import Lanczos
from natgrad.fishers.ng_plus import NGPlus
from natgrad.fishers.sided import check_layers, for_layer
from natgrad.fishers.sngd import SNGD
from natgrad.fishers.statistics import Mean, Samples, Statistic, Stats, as_capture, as_samples, pool
from natgrad.fishers.tekfac import TEKFAC
from natgrad.fishers.tengrad import TENGraD
from natgrad.fishers.tkfac import TKFAC, TKFACExact
from natgrad.fishers.two_level import TwoLevel
from natgrad.fishers.unit_wise import UnitWise
from natgrad.fishers.woodbury import JointWoodbury, Woodbury

__all__ = [
    "EKFAC",
    "FOOF",
    "KFAC",
    "SNGD",
    "KPSVD",
    "TEKFAC",
    "TKFAC",
    "Approximation",
    "BlockTridiagonal",
    "CoarseSpace",
    "CorrectedKFAC",
    "Coupled",
    "Deflated",
    "Diagonal",
    "EigenCorrected",
    "ExactFisher",
    "JointFisher",
    "JointWoodbury",
    "KrylovNicolaides",
    "KrylovResidual",
    "Lanczos",
    "Mean",
    "NGPlus",
    "Nicolaides",
    "Part",
    "ResidualSpace",
    "Samples",
    "SpectralSpace",
    "Statistic",
    "Stats",
    "TENGraD",
    "TKFACExact",
    "Tselepidis",
    "TwoLevel",
    "UnitWise",
    "Woodbury",
    "as_capture",
    "as_samples",
    "check_layers",
    "for_layer",
    "pool",
]
