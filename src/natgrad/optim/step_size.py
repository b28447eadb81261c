"""Step-size policies: how much of the natural gradient and how much of the previous direction.

With D the preconditioned gradient and P the previous direction, the next direction is ``alpha D + mu P`` and a
parameter moves by ``-lr`` times it. A policy says which inner products it needs (:meth:`StepSize.products`, on the
device) and what it makes of their values (:meth:`StepSize.decide`, after the one host read of a step).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from natgrad.optim.directions import Directions

Memory = Mapping[str, float]


@dataclass(frozen=True)
class Situation:
    """What a policy decides on: the scalars read, the learning rate and momentum, and what it remembered last time.

    ``read`` always has ``slope`` = <D, M> and ``drift`` = <P, M>, M the gradient. ``capacity`` is the largest
    entropy of one loss term in nats, the scale on which a KL divergence is large or small.
    """

    read: Mapping[str, float]
    lr: float = 1.0
    momentum: float = 0.9
    memory: Memory = field(default_factory=dict)
    capacity: float = 1.0

    def form(self, name: str, alpha: float, mu: float) -> float:
        """(alpha D + mu P)^T X (alpha D + mu P) for the matrix X = ``name``."""
        dd, dp, pp = (self.read[pair[0] + name + pair[1]] for pair in ("DD", "DP", "PP"))
        return alpha * alpha * dd + 2 * alpha * mu * dp + mu * mu * pp


@dataclass(frozen=True)
class Decision:
    """alpha and mu; the slope of the loss along the step and the change of the loss that is predicted; the memory.

    ``restart``: whether damping that was lowered should return to where it started.
    """

    alpha: float
    mu: float
    slope: float = 0.0
    predicted: float = 0.0
    memory: Memory = field(default_factory=dict)
    restart: bool = False


class StepSize(ABC):
    """A policy: a frozen dataclass of settings; what it must remember travels in ``Decision.memory``."""

    needs_inputs = False  # whether the model is run again, on its own inputs
    lr = 1.0  # the default learning rate under this policy

    def needs_samples(self, memory: Memory) -> bool:
        """Whether the next step's products read the captured samples."""
        return False

    def products(self, directions: Directions, damping: float, memory: Memory) -> Mapping[str, Tensor]:
        """Scalars to be read beside slope and drift."""
        return {}

    @abstractmethod
    def decide(self, now: Situation) -> Decision:
        """alpha and mu from the scalars."""


@dataclass(frozen=True)
class Constant(StepSize):
    """alpha = 1, mu = ``momentum``: the plain damped natural gradient with heavy-ball momentum."""

    lr = 0.01

    def decide(self, now: Situation) -> Decision:
        """alpha = 1."""
        return _plain(1.0, now)


@dataclass(frozen=True)
class KLLimit(StepSize):
    """alpha = min(1, sqrt(limit / (lr^2 <D, M>))): the predicted KL of the step, lr^2 <D, M> / 2, is at most limit / 2.

    ``limit`` is in nats per loss term. References: Ba, Grosse and Martens, ICLR 2017; Pauloski et al., arXiv
    2107.01739.
    """

    limit: float = 1e-3
    lr = 0.1

    def __post_init__(self) -> None:
        """Refuse a limit that is not positive."""
        if not self.limit > 0:
            raise ValueError(f"limit must be > 0, got {self.limit!r}")

    def decide(self, now: Situation) -> Decision:
        """alpha from the limit; 0 where <D, M> is not positive."""
        return _limited(self.limit, 1.0, now)


@dataclass(frozen=True)
class AdaptiveKLLimit(StepSize):
    """A KL limit that the gradients themselves set: for small, noisy batches.

    The slope <P, M> of the loss on a *new* batch along the direction just taken is positive while steps are short, and
    0 on average where they are as long as noise and curvature allow (Pflug's diagnostic, 1990). With r the ratio of the
    moving averages of <P, M> and \\|<P, M>\\|, every step multiplies the limit by exp(rate clip(2 (r - target), -1,
    1)). alpha = min(longest, sqrt(limit / (lr^2 <D, M>))), mu = ``momentum``.
    """

    limit: float = 1e-3
    target: float = 0.2
    rate: float = 0.05
    decay: float = 0.95
    longest: float = 0.1

    def decide(self, now: Situation) -> Decision:
        """alpha from the limit of this moment."""
        drift, size = now.memory.get("drift", 0.0), now.memory.get("size", 0.0)
        limit, seen = now.memory.get("limit", self.limit), now.memory.get("seen", 0.0)
        if now.read["drift"] != 0:
            size = _average(size, abs(now.read["drift"]), self.decay)
            bound = 10 * size
            drift = _average(drift, min(max(now.read["drift"], -bound), bound), self.decay)
            seen += 1
        if seen > _WARM_UP:
            limit *= math.exp(self.rate * min(max(2 * (drift / size - self.target), -1.0), 1.0))
        if seen and now.lr > 0 and now.read["slope"] > 0:  # a limit that does not bind must not grow on
            limit = min(limit, 2 * (now.lr * self.longest) ** 2 * now.read["slope"])
        decided = _limited(limit, self.longest, now)
        return replace(decided, memory={"limit": limit, "drift": drift, "size": size, "seen": seen})


@dataclass(frozen=True)
class QuadraticModel(StepSize):
    """alpha and mu that minimise the quadratic model of the loss in the plane of D and P (Martens and Grosse 2015).

    The model is q(delta) = delta^T (F + damping I) delta / 2 + <M, delta> with the exact Fisher of the batch along both
    directions, read off the samples that the statistics use anyway: V1^T F V2 = 1/count sum_n u1_n u2_n with
    u_n = sum over layers of sum_t g_nt^T V a_nt. One product per layer and direction; no second pass.

    ``limit`` caps the step's predicted KL, delta^T F delta / 2, as a share of the largest entropy that one loss term
    can have (log C nats for C classes, log 2 for each binary output, 1/2 for each normal one; ``None``: no cap):
    beyond some per cent of it the model's samples, drawn at the old point, say little about the new one.
    """

    limit: float | None = 0.05

    def __post_init__(self) -> None:
        """Refuse a limit that is not positive."""
        if self.limit is not None and not self.limit > 0:
            raise ValueError(f"limit must be > 0 or None, got {self.limit!r}")

    def needs_samples(self, memory: Memory) -> bool:
        """At every step."""
        return True

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


@dataclass(frozen=True)
class Automatic(StepSize):
    """The quadratic model while it describes the loss, the adaptive KL limit once it only describes the batch.

    On a small batch the model of ``precise`` fits the noise. *Trust* measures that without a further pass: the slope
    along D that the next batch finds at the old point (<P, M> plus the curvature term of the step, less what the old
    direction contributed), over the slope <D, M> that the batch itself claimed; 1 without noise. Both are moving
    averages. When trust falls below ``threshold`` (after ``patience`` steps, or below 0 after a few), ``noisy`` takes
    over for good, starting at the KL of the steps so far. Until then the model's KL limit is a trust region: it starts
    at a quarter, doubles after a step that kept a quarter of its promise, and shrinks after one that did not.
    """

    precise: QuadraticModel = QuadraticModel()
    noisy: AdaptiveKLLimit = AdaptiveKLLimit()
    threshold: float = 0.75
    patience: int = 20
    decay: float = 0.95

    @property
    def needs_inputs(self) -> bool:  # type: ignore[override]
        """As ``precise``."""
        return self.precise.needs_inputs

    def needs_samples(self, memory: Memory) -> bool:
        """While the quadratic model is in use."""
        return not memory.get("noisy", 0.0)

    def products(self, directions: Directions, damping: float, memory: Memory) -> Mapping[str, Tensor]:
        """Those of the policy in use."""
        return {} if memory.get("noisy", 0.0) else self.precise.products(directions, damping, memory)

    def decide(self, now: Situation) -> Decision:
        """By the policy in use."""
        if now.memory.get("noisy", 0.0):
            decided = self.noisy.decide(now)
            return replace(decided, memory={**decided.memory, "noisy": 1.0})
        memory = self._judged(now)
        if self._distrusts(memory):
            limit = 2 * memory["kl"] * (1 - now.momentum) ** 2
            fresh = replace(now, momentum=0.0, memory={"limit": limit})
            decided = self.noisy.decide(fresh)
            return replace(decided, memory={**decided.memory, "noisy": 1.0}, restart=True)
        decided = replace(self.precise, limit=memory["cap"]).decide(now)
        return replace(decided, memory=memory | self._promised(now, decided, memory))

    def _distrusts(self, memory: Memory) -> bool:
        """Below the threshold after ``patience`` comparisons; below 0 (the steps go uphill) already after a few."""
        threshold = self.threshold if memory["seen"] > self.patience else 0.0
        return memory["seen"] > _WARM_UP and memory["gain"] < threshold * memory["claim"]

    def _judged(self, now: Situation) -> dict[str, float]:
        """The memory after comparing what the last step claimed with what this batch finds."""
        most = math.inf if self.precise.limit is None else self.precise.limit
        memory = {"gain": 0.0, "claim": 0.0, "seen": 0.0, "kl": 0.0, "cap": min(most, 0.4) / 4, **now.memory}
        if "promise" in memory:
            found = now.read["drift"] + memory["bend"] - memory["known"]
            memory["gain"] = _average(memory["gain"], found, self.decay)
            memory["claim"] = _average(memory["claim"], memory["promise"], self.decay)
            memory["seen"] += 1
            kept = found > 0.25 * memory["promise"]
            memory["cap"] = min(2 * memory["cap"], most) if kept else max(0.7 * memory["cap"], 1e-3 * min(most, 1.0))
            memory["trust"] = memory["gain"] / memory["claim"] if memory["claim"] > 0 else 1.0
        return memory

    def _promised(self, now: Situation, decided: Decision, memory: Memory) -> dict[str, float]:
        kl = decided.predicted - decided.slope
        return {
            "promise": decided.alpha * now.read["slope"],
            "known": decided.mu * now.read["drift"],
            "bend": now.lr * now.form("F", decided.alpha, decided.mu),
            "kl": _average(memory["kl"], kl, self.decay) if memory["seen"] else kl,
        }


_WARM_UP = 5  # comparisons before one is acted on


def read_once(products: Mapping[str, Tensor]) -> dict[str, float]:
    """The values of all scalars in one transfer to the host."""
    dtype = torch.float64 if any(value.dtype == torch.float64 for value in products.values()) else torch.float32
    values = torch.stack([value.to(dtype) for value in products.values()]).tolist()
    return dict(zip(products, values, strict=True))


def _system(directions: Directions, damping: float, curvature: Tensor) -> Mapping[str, Tensor]:
    DFD, DFP, PFP = curvature.unbind()
    DD, DP, PP = directions.gram().unbind()
    damped = {"DBD": DFD + damping * DD, "DBP": DFP + damping * DP, "PBP": PFP + damping * PP}
    return {"DFD": DFD, "DFP": DFP, "PFP": PFP, **damped}


def _minimiser(now: Situation) -> tuple[float, float]:
    dd, dp, pp = (now.read[name] for name in ("DBD", "DBP", "PBP"))
    d, p = now.read["slope"], now.read["drift"]
    determinant = dd * pp - dp * dp
    if determinant > 1e-6 * dd * pp:
        return (d * pp - p * dp) / determinant, (p * dd - d * dp) / determinant
    return (d / dd if dd > 0 else 0.0), 0.0


def _limited(limit: float, longest: float, now: Situation) -> Decision:
    slope = now.read["slope"]
    if slope <= 0:
        return Decision(0.0, now.momentum)
    return _plain(min(longest, (limit / slope) ** 0.5 / max(now.lr, 1e-30)), now)


def _plain(alpha: float, now: Situation) -> Decision:
    slope = -now.lr * (alpha * now.read["slope"] + now.momentum * now.read["drift"])
    return Decision(alpha, now.momentum, slope, slope + 0.5 * (now.lr * alpha) ** 2 * now.read["slope"])


def _average(old: float, new: float, decay: float) -> float:
    return decay * old + (1 - decay) * new
