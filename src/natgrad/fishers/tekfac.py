"""TEKFAC: TKFAC's eigenvectors with the Fisher's own second moments (Gao et al. 2020)."""

from __future__ import annotations

from natgrad.fishers.eigen_corrected import EigenCorrected
from natgrad.fishers.tkfac import TKFAC


def TEKFAC() -> EigenCorrected:
    """``EigenCorrected(TKFAC())``: F ~ Q diag(s) Q^T in the eigenbasis of TKFAC's factors, s = E[(Q_S^T DW Q_P)^2].

    Its Frobenius error is never above TKFAC's. Costs and options: :class:`EigenCorrected`; the paper's adaptive damping
    for convolutions is ``EigenCorrected(TKFAC(), rule=Relative())``. Reference: Gao, Liu, Huang, Wang, Wang, Xu and Yu,
    arXiv 2011.13609.
    """
    return EigenCorrected(TKFAC())
