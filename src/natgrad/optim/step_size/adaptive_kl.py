"""A KL limit that the gradients set themselves."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from natgrad.optim.step_size.base import WARM_UP, Decision, Situation, StepSize, average
from natgrad.optim.step_size.kl_limit import limited


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

    def __post_init__(self) -> None:
        """Refuse settings outside their range."""
        if not (
            self.limit > 0 and self.longest > 0 and 0 <= self.target < 1 and self.rate >= 0 and 0 <= self.decay < 1
        ):
            need = "limit > 0, longest > 0, 0 <= target < 1, rate >= 0 and 0 <= decay < 1"
            raise ValueError(f"need {need}, got {self}")

    def decide(self, now: Situation) -> Decision:
        """alpha from the limit of this moment."""
        drift, size = now.memory.get("drift", 0.0), now.memory.get("size", 0.0)
        limit, seen = now.memory.get("limit", self.limit), now.memory.get("seen", 0.0)
        if now.read["drift"] != 0:
            size = average(size, abs(now.read["drift"]), self.decay)
            bound = 10 * size
            drift = average(drift, min(max(now.read["drift"], -bound), bound), self.decay)
            seen += 1
        if seen > WARM_UP and now.lr > 0:
            limit *= math.exp(self.rate * min(max(2 * (drift / size - self.target), -1.0), 1.0))
        if seen and now.lr > 0 and now.read["slope"] > 0:  # a limit that does not bind must not grow on
            limit = min(limit, 2 * (now.lr * self.longest) ** 2 * now.read["slope"])
        decided = limited(limit, self.longest, now)
        return replace(decided, memory={"limit": limit, "drift": drift, "size": size, "seen": seen})
