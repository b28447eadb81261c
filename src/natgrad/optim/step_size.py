"""Step-size policies: how much of the natural gradient and how much of the previous step.

With D the preconditioned gradient and P the previous direction, the next direction is ``alpha D + mu P`` and a parameter
moves by ``-lr`` times it. A policy says which inner products it needs (:meth:`StepSize.products`, on the device) and
what it makes of their values (:meth:`StepSize.decide`, after the one host read of a step).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from natgrad.optim.directions import Directions


@dataclass(frozen=True)
class Decision:
    """alpha and mu; the slope of the loss along the step, and the change of the loss that the model predicts."""

    alpha: float
    mu: float
    slope: float = 0.0
    predicted: float = 0.0


class StepSize(ABC):
    """A policy: a frozen dataclass of settings, without state."""

    needs_samples = False  # whether the captured samples of every step are read
    needs_inputs = False  # whether the model's inputs are, to run it again
    lr = 1.0  # the default learning rate under this policy

    def products(self, directions: Directions, damping: float) -> Mapping[str, Tensor]:
        """Scalars to be read, beside ``<D, M>`` (slope), ``<P, M>`` (drift) that every step reads."""
        return {}

    @abstractmethod
    def decide(self, read: Mapping[str, float], lr: float, momentum: float) -> Decision:
        """alpha and mu from the scalars."""


@dataclass(frozen=True)
class Constant(StepSize):
    """alpha = 1, mu = ``momentum``: the plain damped natural gradient with heavy-ball momentum."""

    lr = 0.01

    def decide(self, read: Mapping[str, float], lr: float, momentum: float) -> Decision:
        """alpha = 1."""
        return _plain(1.0, momentum, read, lr)


@dataclass(frozen=True)
class KLLimit(StepSize):
    """alpha = min(1, sqrt(limit / (lr^2 <D, M>))): the predicted KL of the step, lr^2 <D, M> / 2, is at most limit / 2.

    Reference: Ba, Grosse and Martens, ICLR 2017; Pauloski et al. (KAISA), arXiv 2107.01739.
    """

    limit: float = 1e-3
    lr = 0.1

    def __post_init__(self) -> None:
        """Refuse a limit that is not positive."""
        if not self.limit > 0:
            raise ValueError(f"limit must be > 0, got {self.limit!r}")

    def decide(self, read: Mapping[str, float], lr: float, momentum: float) -> Decision:
        """alpha from the limit; 0 where <D, M> is not positive."""
        if read["slope"] <= 0:
            return Decision(0.0, momentum)
        scale = lr * lr * read["slope"]
        return _plain(1.0 if scale <= self.limit else (self.limit / scale) ** 0.5, momentum, read, lr)


@dataclass(frozen=True)
class QuadraticModel(StepSize):
    """alpha and mu that minimise the quadratic model of the loss in the plane of D and P (Martens and Grosse 2015).

    The model is q(delta) = delta^T (F + damping I) delta / 2 + <M, delta> with the exact Fisher of the batch along both
    directions, read off the samples that the statistics use anyway: V1^T F V2 = 1/count sum_n u1_n u2_n with
    u_n = sum over layers of sum_t g_nt^T V a_nt. One product per layer and direction; no second pass.

    ``limit`` caps the step's predicted KL, delta^T F delta / 2 (``None``: no cap).
    """

    limit: float | None = None
    needs_samples = True

    def products(self, directions: Directions, damping: float) -> Mapping[str, Tensor]:
        """The three entries of the 2 x 2 system, with and without damping."""
        return _system(directions, damping, directions.sampled_curvature())

    def decide(self, read: Mapping[str, float], lr: float, momentum: float) -> Decision:
        """The minimiser; along D alone where the plane is degenerate."""
        dd, dp, pp = (read[name] for name in ("DBD", "DBP", "PBP"))
        alpha, mu = _minimiser(dd, dp, pp, read["slope"], read["drift"])
        kl = 0.5 * lr * lr * _form(alpha, mu, read["DFD"], read["DFP"], read["PFP"])
        if self.limit is not None and kl > self.limit:
            shrink = (self.limit / kl) ** 0.5
            alpha, mu, kl = alpha * shrink, mu * shrink, self.limit
        slope = -lr * (alpha * read["slope"] + mu * read["drift"])
        return Decision(alpha, mu, slope, slope + kl)


@dataclass(frozen=True)
class ExactQuadraticModel(QuadraticModel):
    """The same with exact Jacobian products in place of samples: V1^T F V2 = 1/count sum_n (J V1)^T H (J V2).

    Two forward-mode passes over the batch at every step; the reference that the samples are tested against.
    """

    needs_samples = False
    needs_inputs = True

    def products(self, directions: Directions, damping: float) -> Mapping[str, Tensor]:
        """As for the samples."""
        return _system(directions, damping, directions.exact_curvature())


def _system(directions: Directions, damping: float, curvature: Tensor) -> Mapping[str, Tensor]:
    DFD, DFP, PFP = curvature.unbind()
    DD, DP, PP = directions.gram().unbind()
    return {
        "DFD": DFD, "DFP": DFP, "PFP": PFP,
        "DBD": DFD + damping * DD, "DBP": DFP + damping * DP, "PBP": PFP + damping * PP,
    }  # fmt: skip


def _minimiser(dd: float, dp: float, pp: float, d: float, p: float) -> tuple[float, float]:
    determinant = dd * pp - dp * dp
    if determinant > 1e-6 * dd * pp:
        return (d * pp - p * dp) / determinant, (p * dd - d * dp) / determinant
    return (d / dd if dd > 0 else 0.0), 0.0


def _form(alpha: float, mu: float, dd: float, dp: float, pp: float) -> float:
    return alpha * alpha * dd + 2 * alpha * mu * dp + mu * mu * pp


def _plain(alpha: float, momentum: float, read: Mapping[str, float], lr: float) -> Decision:
    slope = -lr * (alpha * read["slope"] + momentum * read["drift"])
    return Decision(alpha, momentum, slope, slope + 0.5 * lr * lr * alpha * alpha * read["slope"])


def read_once(products: Mapping[str, Tensor]) -> dict[str, float]:
    """The values of all scalars in one transfer to the host."""
    names = list(products)
    return dict(zip(names, torch.stack([products[name].float() for name in names]).tolist(), strict=True))
