"""Approximations of a layer's Fisher block, one per file."""

from natgrad.fishers.base import Approximation, Coupled, Part
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
from natgrad.fishers.sngd import SNGD
from natgrad.fishers.statistics import Mean, Samples, Statistic, Stats, as_capture, as_samples, pool
from natgrad.fishers.tekfac import TEKFAC
from natgrad.fishers.tengrad import TENGraD
from natgrad.fishers.tkfac import TKFAC, TKFACExact
from natgrad.fishers.unit_wise import UnitWise
from natgrad.fishers.woodbury import JointWoodbury, Woodbury

__all__ = [
    "EKFAC",
    "FOOF",
    "KFAC",
    "SNGD",
    "KPSVD",
    "TEKFAC",
    "TENGraD",
    "TKFAC",
    "Approximation",
    "CorrectedKFAC",
    "Coupled",
    "Deflated",
    "Diagonal",
    "EigenCorrected",
    "ExactFisher",
    "JointFisher",
    "JointWoodbury",
    "Lanczos",
    "Mean",
    "NGPlus",
    "Part",
    "Samples",
    "Statistic",
    "Stats",
    "TKFACExact",
    "UnitWise",
    "Woodbury",
    "as_capture",
    "as_samples",
    "pool",
]
