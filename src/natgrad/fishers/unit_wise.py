"""The unit-wise Fisher: one matrix per output of a layer, what couples the outputs left out (Ollivier 2015)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from natgrad.capture import Capture, Kind
from natgrad.fishers.base import Approximation
from natgrad.fishers.diagonal import Diagonal
from natgrad.fishers.statistics import Mean, Stats
from natgrad.matrix import Matrix, Rows
from natgrad.matrix.base import check_damping


@dataclass(frozen=True)
class UnitWise(Approximation):
    """F ~ diag(R_1, ..., R_out) with R_j = E[DW_j DW_j^T] over the rows DW_j; E[g_j^2 a a^T] for unshared weights.

    The diagonal blocks of the Fisher, so its trace is that of F. With the activation's slope in place of g_j it is the
    relative Fisher metric of a neuron (Sun and Nielsen 2017) that SNGD's released code uses; ``activations`` of
    :func:`natgrad.reconstruct` measures that. ``eps`` is a relative ridge that every inverse contains, ``limit`` the
    largest number of elements out in^2 that it accepts; ``ValueError`` for a larger layer or a bad ``eps``.

    Cost: n out in (t + in) flops an observation, out in^3 a refresh, 2 out in^2 a step; memory 2 out in^2.
    References: Ollivier, "Riemannian metrics for neural networks I", arXiv 1303.0818; Amari, Karakida and Oizumi, arXiv
    1808.07172; Sun and Nielsen, "Relative Fisher information and natural gradient for learning large modular models",
    ICML 2017; SNGD: arXiv 2412.07441.
    """

    eps: float = 1e-4
    limit: int = 1 << 28

    def __post_init__(self) -> None:
        """Refuse a negative or infinite ``eps``."""
        check_damping(self.eps, "eps")

    def observe(self, seen: Capture) -> Stats:
        """sum_n DW_nj DW_nj^T for every row j."""
        parts = [torch.einsum("...noi,...nok->...oik", DW, DW) for DW in seen.weight_gradients()]
        return {"R": Mean(torch.stack(parts).sum(0), seen.count)}

    def sided(self, kind: Kind) -> Approximation:
        """The diagonal."""
        return Diagonal()

    def assemble(self, stats: Stats, previous: Matrix | None = None) -> Rows:
        """diag(R)."""
        return Rows(stats["R"].value, self.eps)

    def check(self, name: str, shape: torch.Size) -> None:
        """Refuse blocks above ``limit``."""
        if shape.numel() * shape[-1] > self.limit:
            raise ValueError(
                f"UnitWise: layer {name!r} has {shape[:-1].numel()} outputs of {shape[-1]} inputs, above limit="
                f"{self.limit} elements of out * in^2; use SNGD, exclude the layer, or raise the limit"
            )
