"""Policies that leave the momentum to the user: a constant step, and a step of limited KL divergence."""

from __future__ import annotations

from dataclasses import dataclass

from natgrad.optim.step_size.base import Decision, Situation, StepSize


@dataclass(frozen=True)
class Constant(StepSize):
    """alpha = 1, mu = ``momentum``: the plain damped natural gradient with heavy-ball momentum."""

    lr = 0.01

    def decide(self, now: Situation) -> Decision:
        """alpha = 1."""
        return plain(1.0, now)


@dataclass(frozen=True)
class KLLimit(StepSize):
    """alpha = min(1, sqrt(limit / (lr^2 <D, M>))): its KL, lr^2 alpha^2 <D, M> / 2, is at most limit / 2.

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
        return limited(self.limit, 1.0, now)


def limited(limit: float, longest: float, now: Situation) -> Decision:
    """alpha = min(longest, sqrt(limit / (lr^2 <D, M>))) and the momentum as it is set."""
    slope = now.read["slope"]
    if slope <= 0:
        return Decision(0.0, now.momentum)
    return plain(min(longest, (limit / slope) ** 0.5 / max(now.lr, 1e-30)), now)


def plain(alpha: float, now: Situation) -> Decision:
    """alpha and the momentum as it is set, with D^T F D taken as <D, M>."""
    slope = -now.lr * (alpha * now.read["slope"] + now.momentum * now.read["drift"])
    return Decision(alpha, now.momentum, slope, slope + 0.5 * (now.lr * alpha) ** 2 * now.read["slope"])
