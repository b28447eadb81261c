"""The coefficients of a batch, by an N x N system."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from natgrad.matrix.factorise import shifted
from natgrad.optim.validate import number

Unit = Literal["trace/N^2", "trace/N", "absolute"]


@dataclass(frozen=True)
class System:
    """c = (K + N lambda I)^-1 1 for the Gram matrix K_nm = <DW_n, DW_m> (n, n), at n^3 / 3 flops.

    lambda is ``mu`` in units of tr(K)/N^2 (``"trace/N^2"``: N lambda is then mu times the mean |DW_n|^2), of tr(K)/N
    (``"trace/N"``), or of F (``"absolute"``). ``normalise`` divides c by its sum: steps then have the length of SGD's.
    """

    mu: float = 1.0
    unit: Unit = "trace/N^2"
    normalise: bool = False

    def __post_init__(self) -> None:
        """Refuse settings out of range."""
        number("mu", self.mu, 0, open_low=True)
        if self.unit not in get_args(Unit):
            raise ValueError(f"unit must be one of {get_args(Unit)}, got {self.unit!r}")
        if not isinstance(self.normalise, bool):
            raise TypeError(f"normalise must be True or False, got {self.normalise!r}")

    def solve(self, K: Tensor) -> tuple[Tensor, Tensor]:
        """N c (n,), NaN where K is not positive definite; and 1, or 0 with c = 0 where all gradients are 0."""
        n, trace = len(K), K.diagonal().sum()
        unit = {"trace/N^2": trace / n**2, "trace/N": trace / n, "absolute": torch.ones_like(trace)}[self.unit]
        shift = (n * self.mu * unit).clamp(min=torch.finfo(K.dtype).eps * trace)
        factor, info = torch.linalg.cholesky_ex(shifted(K, torch.where(trace == 0, 1.0, shift)))
        c = torch.cholesky_solve(torch.ones_like(K[:, :1]), factor).squeeze(-1)
        w = c / c.mean() if self.normalise else n * c
        alive = (trace != 0).to(K.dtype)
        return torch.where(info == 0, w, torch.nan) * alive, alive
