"""EKFAC: KFAC's eigenvectors with the Fisher's own second moments (George et al. 2018)."""

from __future__ import annotations

from natgrad.fishers.eigen_corrected import EigenCorrected
from natgrad.fishers.kfac import KFAC


def EKFAC() -> EigenCorrected:
    """``EigenCorrected(KFAC())``: F ~ Q diag(s) Q^T in the eigenbasis of KFAC's factors, s = E[(Q_G^T DW Q_A)^2].

    Its Frobenius error is never above KFAC's, and its trace is that of F. Costs and options: :class:`EigenCorrected`.
    Reference: George, Laurent, Bouthillier, Ballas and Vincent, arXiv 1806.03884.
    """
    return EigenCorrected(KFAC())
