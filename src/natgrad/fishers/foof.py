"""FOOF: gradient descent on the outputs of a layer (Benzing 2022)."""

from __future__ import annotations

from natgrad.fishers.sngd import SNGD


def FOOF() -> SNGD:
    """``SNGD(eps=0)``: F ~ I kron A with A = E[a a^T], D = M (A + damping I)^-1.

    The step that changes the layer's outputs as gradient descent on them would, at a price for large weights. Its scale
    is not that of the Fisher, and ``damping`` has the unit of a squared input. Costs: :class:`SNGD`.
    Reference: Benzing, "Gradient descent on neurons and its link to approximate second-order optimization", arXiv
    2201.12250.
    """
    return SNGD(eps=0.0)
