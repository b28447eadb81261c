"""The default: the quadratic model, and the adaptive KL limit where noise makes the model useless."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import Tensor

from natgrad.optim.step_size.adaptive_kl import AdaptiveKLLimit
from natgrad.optim.step_size.base import Decision, Memory, Situation, StepSize, average
from natgrad.optim.step_size.quadratic import QuadraticModel, minimum_along_d

if TYPE_CHECKING:
    from natgrad.optim.directions import Directions


_LAST_STEP = ("moved", "slope", "last", "promise", "known", "bend")


@dataclass(frozen=True)
class Automatic(StepSize):
    """The quadratic model while it describes the loss, the adaptive KL limit once it only describes the batch.

    Two things can be wrong with the model of ``precise``, and the slope <P, M> that the next batch finds along the
    step just taken tells both, without a further pass.

    *It reaches too far.* The model's KL limit is a trust region: it starts at a quarter, doubles after a step that
    kept a quarter of its promise, and shrinks after one that did not. A step at whose end the loss rises more steeply
    than it fell at its start is taken back, to the point where the line through both slopes is 0; the region shrinks
    to a quarter of that step's KL, and damping grows.

    *It fits the noise of a small batch.* Trust is the slope along D that the next batch finds at the old point (<P, M>
    plus the curvature term of the step, less what the old direction contributed), over the slope <D, M> that the batch
    itself claimed, as a moving average that starts at 1; it stays there without noise. Where trust is below
    ``threshold`` after ``patience`` comparisons, ``noisy`` takes over for good, starting at the KL of the steps so far.
    """

    precise: QuadraticModel = QuadraticModel()
    noisy: AdaptiveKLLimit = AdaptiveKLLimit()
    threshold: float = 0.7
    patience: int = 50
    decay: float = 0.95

    chooses_momentum = True

    def __post_init__(self) -> None:
        """Refuse settings outside their range."""
        if not (0 <= self.threshold <= 1 and self.patience >= 0 and 0 <= self.decay < 1):
            raise ValueError(f"need 0 <= threshold <= 1, patience >= 0 and 0 <= decay < 1, got {self}")

    @property
    def needs_inputs(self) -> bool:  # type: ignore[override]
        """As ``precise``."""
        return self.precise.needs_inputs

    def needs_samples(self, memory: Memory) -> bool:
        """While the quadratic model is in use."""
        return not memory.get("noisy", 0.0)

    def prepare(self, directions: Directions, damping: float, memory: Memory) -> Directions:
        """As the policy in use."""
        return directions if memory.get("noisy", 0.0) else self.precise.prepare(directions, damping, memory)

    def products(self, directions: Directions, damping: float, memory: Memory) -> Mapping[str, Tensor]:
        """Those of the policy in use."""
        return {} if memory.get("noisy", 0.0) else self.precise.products(directions, damping, memory)

    def idle(self, memory: Memory) -> Memory:
        """Without the last step: the next one finds nothing to compare it with."""
        return {name: value for name, value in memory.items() if name not in _LAST_STEP}

    def decide(self, now: Situation) -> Decision:
        """By the policy in use."""
        if now.memory.get("noisy", 0.0):
            decided = self.noisy.decide(now)
            return replace(decided, memory={**decided.memory, "noisy": 1.0})
        if now.memory.get("moved", 0.0) * now.read["drift"] < now.memory.get("slope", 0.0) and now.lr > 0:
            return self._taken_back(now)
        memory = self._judged(now)
        if memory["trust"] < self.threshold and memory["seen"] >= self.patience:
            return self._handed_over(now, memory)
        decided = replace(self.precise, limit=memory["cap"]).decide(now)
        return replace(decided, memory=memory | self._promised(now, decided, memory))

    def _taken_back(self, now: Situation) -> Decision:
        """P times mu < 0: from the end of the step, with slope s1 > 0, back to the 0 of the line from s0 < 0 to s1."""
        moved, start, end = now.memory["moved"], now.memory["slope"], -now.memory["moved"] * now.read["drift"]
        mu = -end / (end - start) * moved / now.lr
        cap = max(0.25 * now.memory["last"] / now.capacity, self._smallest)
        memory = {**self.idle(now.memory), "cap": cap, "back": now.memory["back"] + 1}
        slope = -now.lr * mu * now.read["drift"]
        return Decision(0.0, mu, slope, 0.5 * slope, memory, rejected=True)

    def _handed_over(self, now: Situation, memory: Memory) -> Decision:
        """Along D alone, with the KL that ``noisy`` starts from: its momentum makes that the KL of the steps so far."""
        limit = 2 * memory["mean_kl"] * (1 - now.momentum) ** 2
        bend = now.lr**2 * now.read["DFD"]
        alpha = min((limit / bend) ** 0.5 if bend > 0 else math.inf, max(minimum_along_d(now), 0.0))
        slope = -now.lr * alpha * now.read["slope"]
        return Decision(alpha, 0.0, slope, slope + 0.5 * alpha**2 * bend, {"noisy": 1.0, "limit": limit}, restart=True)

    @property
    def _largest(self) -> float:
        return math.inf if self.precise.limit is None else self.precise.limit

    @property
    def _smallest(self) -> float:
        return 1e-3 * min(self._largest, 1.0)

    def _judged(self, now: Situation) -> dict[str, float]:
        """The memory after comparing what the last step claimed with what this batch finds."""
        memory = {"trust": 1.0, "seen": 0.0, "cap": min(self._largest, 0.4) / 4, "back": 0.0, **now.memory}
        if memory.get("promise", 0.0) > 0:
            found = (now.read["drift"] + memory["bend"] - memory["known"]) / memory["promise"]
            memory["seen"] += 1
            memory["trust"] = average(memory["trust"], min(max(found, -1.0), 2.0), self.decay)
            cap = 2 * memory["cap"] if found > 0.25 else 0.7 * memory["cap"]
            memory["cap"] = min(max(cap, self._smallest), self._largest)
        return memory

    def _promised(self, now: Situation, decided: Decision, memory: Memory) -> dict[str, float]:
        kl = decided.predicted - decided.slope
        return {
            "moved": now.lr,
            "slope": decided.slope,
            "last": kl,
            "promise": decided.alpha * now.read["slope"],
            "known": decided.mu * now.read["drift"],
            "bend": now.lr * now.form("F", decided.alpha, decided.mu),
            "mean_kl": average(memory.get("mean_kl", kl), kl, self.decay),
        }
