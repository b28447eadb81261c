"""The step that minimises a quadratic model of the loss over the new and the previous direction."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from natgrad.optim.step_size.base import Decision, Memory, Situation, StepSize

if TYPE_CHECKING:
    from natgrad.optim.directions import Directions


@dataclass(frozen=True)
class QuadraticModel(StepSize):
    """alpha and mu that minimise the quadratic model of the loss in the plane of D and P (Martens and Grosse 2015).

    The model is q(delta) = delta^T (F + damping I) delta / 2 + <M, delta> with the exact Fisher of the batch along both
    directions, read off the samples that the statistics use anyway: V1^T F V2 = 1/count sum_n u1_n u2_n with
    u_n = sum over layers of sum_t g_nt^T V a_nt. One product per layer and direction; no second pass.

    With ``per_layer`` every layer's D is first given the length that minimises the model along it alone, from the same
    samples and without a read: a block-diagonal F misjudges layers by very different factors, above all while
    statistics are young (on the auto-encoders by 1 to 100), and one alpha has to suit the worst of them.

    Where probabilities saturate, D^T F D counts at least <D, M>^2 / capacity, so that a step promises at most half the
    largest entropy of a loss term: samples drawn from a model that is sure of wrong answers show no curvature.

    ``limit`` caps the step's predicted KL, delta^T F delta / 2, as a share of the largest entropy that one loss term
    can have (log C nats for C classes, log 2 for each binary output, 1/2 for each normal one; ``None``: no cap):
    beyond some per cent of it the model's samples, drawn at the old point, say little about the new one.
    """

    limit: float | None = 0.05
    per_layer: bool = True

    chooses_momentum = True

    def __post_init__(self) -> None:
        """Refuse a limit that is not positive."""
        if self.limit is not None and not self.limit > 0:
            raise ValueError(f"limit must be > 0 or None, got {self.limit!r}")

    def needs_samples(self, memory: Memory) -> bool:
        """At every step."""
        return True

    def prepare(self, directions: Directions, damping: float, memory: Memory) -> Directions:
        """Every layer's D at its own best length, unless a map that joins the layers has set their ratios."""
        own = self.per_layer and not directions.joint
        return directions.scaled(directions.lengths(damping)) if own else directions

    def products(self, directions: Directions, damping: float, memory: Memory) -> Mapping[str, Tensor]:
        """The entries of the 2 x 2 system without damping (``DFD`` ...) and with it (``DBD`` ...)."""
        return _system(directions, damping, directions.sampled_curvature())

    def decide(self, now: Situation) -> Decision:
        """The minimiser; along D alone where the plane is degenerate."""
        alpha, mu = _minimiser(now)
        kl = 0.5 * now.lr**2 * now.form("F", alpha, mu)
        limit = math.inf if self.limit is None else self.limit * now.capacity
        if kl > limit:
            shrink = (limit / kl) ** 0.5
            alpha, mu, kl = alpha * shrink, mu * shrink, limit
        slope = -now.lr * (alpha * now.read["slope"] + mu * now.read["drift"])
        return Decision(alpha, mu, slope, slope + kl)


@dataclass(frozen=True)
class ExactQuadraticModel(QuadraticModel):
    """The same with exact Jacobian products in place of samples: V1^T F V2 = 1/count sum_n (J V1)^T H (J V2).

    Two forward-mode passes over the batch at every step; the reference that the samples are tested against.
    """

    needs_inputs = True

    def products(self, directions: Directions, damping: float, memory: Memory) -> Mapping[str, Tensor]:
        """As for the samples."""
        return _system(directions, damping, directions.exact_curvature())


def _system(directions: Directions, damping: float, curvature: Tensor) -> Mapping[str, Tensor]:
    DFD, DFP, PFP = curvature.unbind()
    DFD = torch.maximum(DFD, directions.least_curvature(directions.slope()).to(DFD.dtype))
    DD, DP, PP = directions.gram().unbind()
    damped = {"DBD": DFD + damping * DD, "DBP": DFP + damping * DP, "PBP": PFP + damping * PP}
    return {"DFD": DFD, "DFP": DFP, "PFP": PFP, **damped}


def _minimiser(now: Situation) -> tuple[float, float]:
    dd, dp, pp = (now.read[name] for name in ("DBD", "DBP", "PBP"))
    d, p = now.read["slope"], now.read["drift"]
    determinant = dd * pp - dp * dp
    if determinant > 1e-6 * dd * pp:
        return (d * pp - p * dp) / determinant, (p * dd - d * dp) / determinant
    return minimum_along_d(now), 0.0


def minimum_along_d(now: Situation) -> float:
    """The alpha of the model's minimum along D alone."""
    return now.read["slope"] / now.read["DBD"] if now.read["DBD"] > 0 else 0.0
