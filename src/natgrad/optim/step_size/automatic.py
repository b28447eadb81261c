"""The default: steps of a set length, and the quadratic model where the batch stands for the loss."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import Tensor

from natgrad.optim.geometry import Geometry
from natgrad.optim.step_size.base import Decision, Memory, Situation, StepSize, average
from natgrad.optim.step_size.layer_length import LayerLength
from natgrad.optim.step_size.quadratic import QuadraticModel

if TYPE_CHECKING:
    from natgrad.optim.directions import Directions


_OF_MODEL = ("precise", "trust", "seen", "cap", "reach", "back")
_HOPELESS = 0.8  # of the agreement that is needed, after half of the comparisons
_LONG = 3.0  # times patience: a model trusted for so long may come back
_NEAR = 0.001  # the root mean square of the first step: about that of a noisy one
_LAST_STEP = ("moved", "slope", "last", "promise", "known", "bend")


@dataclass(frozen=True)
class Automatic(StepSize):
    """Steps of a set length at first; the quadratic model once batches are seen to stand for the loss, while they do.

    *Do they?* The first ``look`` steps are ``noisy`` ones and short, up to half of their length. In the metric of F^-1,
    where noise is largest, the gradient M of each is compared with the average V of those before: their cosine is 1
    where every batch has the gradient of the loss, and near 0 where noise outweighs it. Where the mean over the earlier
    half of them, but for the first few, is above ``agreement``, or else that over the later half, ``precise`` takes
    over; where neither is, or the earlier one is far below it, ``noisy`` stays, and nothing more is measured. (Late
    steps are long enough to change gradients by themselves.) Without a likelihood ``noisy`` always stays: the
    empirical Fisher is no curvature of the loss, and a model of it depends on the unit of the loss.

    *Do they still?* The slope that the next batch finds along the step just taken tells. Trust is that slope along D at
    the old point (<P, M> plus the curvature term of the step, less what the old direction contributed), over the slope
    <D, M> that the batch itself claimed, as a moving average that starts at 1; it stays there without noise. Where it
    is below ``threshold`` after ``patience`` comparisons, ``noisy`` is back: for good, or if trust has held for three
    times ``patience``, with another look.

    *Does the model reach too far?* Its KL limit is a trust region: it starts at a quarter, doubles after a step that
    kept a quarter of its promise, and shrinks after one that did not. Where probabilities can saturate, so that samples
    see no KL however long a step is, the root mean square of a step is bounded in the same way, at first by about that
    of a noisy one. A step at whose end the loss rises more steeply than it fell at its start is taken back, to the
    point where the line through both slopes is 0; the region shrinks to a quarter of that step's KL, and damping grows.

    A learning rate is that of ``noisy``; as a multiple of its default it scales the steps of ``precise`` too.
    """

    precise: QuadraticModel = QuadraticModel()
    noisy: StepSize = LayerLength()
    agreement: float = 0.75
    look: int = 10
    threshold: float = 0.7
    patience: int = 10
    decay: float = 0.9

    chooses_momentum = True

    def __post_init__(self) -> None:
        """Refuse settings outside their range."""
        shares = 0 <= self.threshold <= 1 and 0 <= self.agreement <= 1 and 0 <= self.decay < 1
        if not (shares and self.patience >= 0 and self.look >= 1):
            need = "0 <= threshold <= 1, 0 <= agreement <= 1, patience >= 0, look >= 1 and 0 <= decay < 1"
            raise ValueError(f"need {need}, got {self}")

    @property
    def lr(self) -> float:  # type: ignore[override]
        """That of ``noisy``."""
        return self.noisy.lr

    @property
    def needs_inputs(self) -> bool:  # type: ignore[override]
        """As ``precise``."""
        return self.precise.needs_inputs

    def _now(self, memory: Memory) -> StepSize:
        return self.precise if memory.get("precise", 0.0) else self.noisy

    def _looks(self, memory: Memory) -> bool:
        return not memory.get("precise", 0.0) and memory.get("looked", 0.0) < self.look

    def needs_samples(self, memory: Memory) -> bool:
        """As the policy in use."""
        return self._now(memory).needs_samples(memory)

    def geometry(self, memory: Memory) -> Geometry:
        """That of the policy in use."""
        return self._now(memory).geometry(memory)

    def averages(self, memory: Memory) -> float | None:
        """As the policy in use."""
        return self._now(memory).averages(memory)

    def unit(self, memory: Memory) -> float:
        """1 / lr of ``noisy`` for the model, so that its own lr is 1 by default."""
        return self.precise.lr / self.noisy.lr if memory.get("precise", 0.0) else 1.0

    def share_of_pretrained(self, memory: Memory) -> float:
        """As the policy in use."""
        return self._now(memory).share_of_pretrained(memory)

    def prepare(self, directions: Directions, damping: float, memory: Memory) -> Directions:
        """As the policy in use."""
        return self._now(memory).prepare(directions, damping, memory)

    def products(self, directions: Directions, damping: float, memory: Memory) -> Mapping[str, Tensor]:
        """Those of the policy in use, and at first what compares gradients."""
        own = self._now(memory).products(directions, damping, memory)
        if directions.labels is None:
            return own
        if memory.get("precise", 0.0):
            return {**own, **directions.sizes()} if directions.labels.likelihood.saturates else own
        if not self._looks(memory):
            return own
        if "looked" in memory:
            return {**own, **directions.agreement()}
        return {**own, **dict.fromkeys(("MV", "MM", "VV"), 0 * directions.along.sum())}  # there is no average yet

    def idle(self, memory: Memory) -> Memory:
        """Without the last step: the next one finds nothing to compare it with."""
        return {name: value for name, value in memory.items() if name not in _LAST_STEP}

    def unobserved(self, memory: Memory) -> Memory:
        """That of ``noisy``, which looks again whether batches stand for the loss."""
        return {name: value for name, value in self.idle(memory).items() if name not in (*_OF_MODEL, "looked")}

    def decide(self, now: Situation) -> Decision:
        """By the policy in use."""
        if not now.memory.get("precise", 0.0):
            decided = self.noisy.decide(now)
            if "MV" in now.read:  # short steps, so that gradients can be compared
                short = (now.memory.get("looked", 0.0) + 1) / (2 * self.look)
                decided = replace(decided, alpha=min(decided.alpha, short))
            return replace(decided, memory={**decided.memory, **self._looked(now)})
        if now.memory.get("moved", 0.0) * now.read["drift"] < now.memory.get("slope", 0.0) and now.lr > 0:
            return self._taken_back(now)
        memory = self._judged(now)
        decided = _within(memory["reach"], replace(self.precise, limit=memory["cap"]).decide(now), now)
        if memory["trust"] < self.threshold and memory["seen"] >= self.patience:
            again = ("looked",) if memory["seen"] >= _LONG * self.patience else ()
            kept = {name: value for name, value in self.idle(memory).items() if name not in (*_OF_MODEL, *again)}
            return replace(decided, memory=kept, restart=True)
        last = self._promised(now, decided) if now.lr else {}  # a step of length 0 shows nothing
        return replace(decided, memory={**self.idle(memory), **last})

    def _looked(self, now: Situation) -> dict[str, float]:
        """What is known of the batches after one more comparison."""
        looked, mean = now.memory.get("looked", 0.0), now.memory.get("agreement", 0.0)
        known = {"looked": looked, "agreement": mean}
        if not self._looks(now.memory) or not now.read.get("VV", 0.0) > 0:
            return known
        cosine = now.read["MV"] / max(now.read["MM"] * now.read["VV"], 1e-300) ** 0.5
        looked, half = looked + 1, self.look // 2
        count = looked - half if looked > half else looked - half // 2  # of either half; at first curvature is young
        mean = mean + (cosine - mean) / count if count > 0 else mean
        if looked == half and not _HOPELESS * self.agreement <= mean <= self.agreement:
            looked = float(self.look)  # it is clear already
        trusted = looked == self.look and mean > self.agreement
        return {"looked": looked, "agreement": mean} | ({"precise": 1.0} if trusted else {})

    def _taken_back(self, now: Situation) -> Decision:
        """P times mu < 0: from the end of the step, with slope s1 > 0, back to the 0 of the line from s0 < 0 to s1."""
        moved, start, end = now.memory["moved"], now.memory["slope"], -now.memory["moved"] * now.read["drift"]
        mu = -end / (end - start) * moved / now.lr
        cap = max(0.25 * now.memory["last"] / now.capacity, self._smallest)
        reach = 0.25 * now.memory.get("reach", _NEAR)
        memory = {**self.idle(now.memory), "cap": cap, "reach": reach, "back": now.memory["back"] + 1}
        slope = -now.lr * mu * now.read["drift"]
        return Decision(0.0, mu, slope, 0.5 * slope, memory, rejected=True)

    @property
    def _largest(self) -> float:
        return math.inf if self.precise.limit is None else self.precise.limit

    @property
    def _smallest(self) -> float:
        return 1e-3 * min(self._largest, 1.0)

    def _judged(self, now: Situation) -> dict[str, float]:
        """The memory after comparing what the last step claimed with what this batch finds."""
        memory = {"trust": 1.0, "seen": 0.0, "cap": min(self._largest, 0.4) / 4, "reach": _NEAR, "back": 0.0}
        memory |= now.memory
        if memory.get("promise", 0.0) > 0:
            found = (now.read["drift"] + memory["bend"] - memory["known"]) / memory["promise"]
            memory["seen"] += 1
            memory["trust"] = average(memory["trust"], min(max(found, -1.0), 2.0), self.decay)
            change = 2.0 if found > 0.25 else 0.7
            memory["cap"] = min(max(change * memory["cap"], self._smallest), self._largest)
            memory["reach"] = max(change * memory["reach"], 1e-3 * _NEAR)
        return memory

    def _promised(self, now: Situation, decided: Decision) -> dict[str, float]:
        kl = decided.predicted - decided.slope
        return {
            "moved": now.lr,
            "slope": decided.slope,
            "last": kl,
            "promise": decided.alpha * now.read["slope"],
            "known": decided.mu * now.read["drift"],
            "bend": now.lr * now.form("F", decided.alpha, decided.mu),
        }


def _within(reach: float, decided: Decision, now: Situation) -> Decision:
    """The same step, shortened to a root mean square of ``reach`` where that is measured."""
    if "DID" not in now.read:
        return decided
    size = now.lr * max(now.form("I", decided.alpha, decided.mu), 0.0) ** 0.5
    if size <= reach:
        return decided
    share, kl = reach / size, decided.predicted - decided.slope
    slope = share * decided.slope
    return replace(
        decided, alpha=share * decided.alpha, mu=share * decided.mu, slope=slope, predicted=slope + share**2 * kl
    )
