"""TEKFAC: TKFAC's eigenvectors with the Fisher's own second moments (Gao et al. 2020)."""

from __future__ import annotations

from natgrad.fishers.eigen_corrected import EigenCorrected
from natgrad.fishers.tkfac import TKFAC


def TEKFAC() -> EigenCorrected:
    """EKFAC's correction in TKFAC's eigenbasis: F ~ Q diag(s) Q^T with s = E[(Q_S^T DW Q_P)^2].

    Its Frobenius error is never above TKFAC's. With each new basis the eigenvalues are measured anew: this basis
    turns fast, and values that were measured along another one left CURVES on a plateau. Costs and options:
    :class:`EigenCorrected`; the paper's adaptive damping for convolutions is ``EigenCorrected(TKFAC(),
    carry="reseed", rule=Relative())``, or ``TraceDamping`` for the whole network. Reference: Gao, Liu, Huang, Wang,
    Wang, Xu and Yu, arXiv 2011.13609.
    """
    return EigenCorrected(TKFAC(), carry="reseed")
