"""Steps of a length that is set, and not computed: what holds on noisy batches."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from natgrad.optim.averages import mean_squares
from natgrad.optim.geometry import Geometry, SpectralDescent
from natgrad.optim.step_size.base import Decision, Memory, Situation, StepSize

if TYPE_CHECKING:
    from natgrad.optim.directions import Directions

_STEADY = 1.25  # times |X| / |M| is the longest: at .95 noise alone, .17, gives a little more than rms

_NOISE, _AGREED = 0.2, 0.8  # |X| / |M| where a step is noise, at momentum .95, and where it is none
_NEAR = 0.02  # of its length, where a layer's minimum is so near that others count
_SEEN = 0.01  # of the capacity: a layer whose step changes predictions by less is not bounded
_WIDE = 64**0.5  # times rms lr: the most that a step moves an output


@dataclass(frozen=True)
class LayerLength(StepSize):
    """An average of gradients, then the map, then a length: every layer's step has a root mean square of rms lr.

    V <- momentum V + (1 - momentum) M; D = map(momentum V + (1 - momentum) M) by the map of ``norm``; theta <- theta -
    lr alpha rms D / |D|, |D| the root mean square of the entries of D in the layer. Nothing depends on the unit of the
    loss, and lr, schedules, warm-up and weight decay mean what they do for AdamW and Muon (``rms`` is that of a step
    of AdamW on noisy gradients; Liu et al., arXiv 2502.16982).

    A step is shorter where gradients have become small, as AdamW's is: where 1.25 |X| < rms |M|, X the average that D
    comes from and |M| that of the gradients of the last 100 steps, its root mean square is lr 1.25 |X| / |M|. That is
    where X is less than an average of pure noise, .17 |M|, would be. Else a network that has learnt all labels by heart
    would walk about at random.

    It is shorter, too, where inputs are many: a step of that length moves outputs by rms lr |a|, |a|^2 the mean squared
    norm of the inputs, if they have nothing to do with each other, and that is at most 8 rms lr, as with 64 inputs of
    size 1. Inputs larger than that count as 1 each.

    No layer goes beyond the minimum of its own quadratic model along D, by the Fisher that D comes from, unless its KL
    is less than a hundredth of the capacity: small gradients have a near minimum, too. As a rule that is 10 to 1,000
    times further, but where inputs have a scale of 10^6 it is near. Where it is nearer than a fiftieth of the length
    for any layer, and bounds k of them, each goes 1/k of the way, as they move at once. (At another lr than the default
    the bound moves with it. Matrices that are no Fisher, ``I kron A`` and the empirical ones of a loss without a
    likelihood, bound nothing.)

    alpha rises from 1 / ``warm_up`` to 1 over as many steps, while curvature is young. Without a schedule it then falls
    as 1 / (1 + steps / settle), which lets noise die out and never ends the training, as the sum has no bound;
    ``settle=None`` for none of that. Steps count here while the learning rate is what it was at first and no torch
    schedule holds it, each by the noise w in it: 1 where |X| / |M|, in the mean over layers, is at most 1.25 times that
    of pure noise (.2), and 0 where it is .8, as gradients still agree on the way.

    On batches of less than ``large`` loss terms (of a likelihood; the most that a step has had) alpha has a factor
    (terms / large)^(w / 4), unless a schedule holds the learning rate from the first step: the fewer there are, the
    more of a step is noise. ``large=None`` for none of that.

    Without an lr of the user's, learning rates count a twentieth for a model that has learnt something before: its
    weights are worth more than random ones, and gradients of what is left to learn are mostly noise.

    Memory: one block a layer. Cost: that of ``norm``; one number more is read.
    """

    rms: float = 0.2
    momentum: float = 0.95
    norm: Geometry = SpectralDescent()
    warm_up: int = 5
    settle: float | None = 400.0
    large: float | None = 256.0

    chooses_momentum = True
    lr = 0.02

    def __post_init__(self) -> None:
        """Refuse settings outside their range."""
        positive = all(value is None or value > 0 for value in (self.settle, self.large))
        if not (0 < self.rms < math.inf and 0 <= self.momentum < 1 and self.warm_up >= 1 and positive):
            need = "rms > 0, 0 <= momentum < 1, warm_up >= 1, and settle and large > 0 or None"
            raise ValueError(f"need {need}, got {self}")

    def geometry(self, memory: Memory) -> Geometry:
        """That of the settings."""
        return self.norm

    def share_of_pretrained(self, memory: Memory) -> float:
        """As 5e-5, where AdamW fine-tunes by custom, is of its 1e-3."""
        return 0.05

    def averages(self, memory: Memory) -> float | None:
        """The momentum."""
        return self.momentum

    def prepare(self, directions: Directions, damping: float, memory: Memory) -> Directions:
        """Every layer's D at its length; one factor for all where a map joins the layers."""
        means = mean_squares(directions.D)
        if directions.joint:
            counts = [float(D.numel()) for D in directions.D.values()]
            means = sum(count * mean for count, mean in zip(counts, means, strict=True)) / sum(counts)
        tiny = torch.finfo(means.dtype).tiny
        widest = _WIDE * self.rms / directions.inputs()
        wanted = torch.minimum(_STEADY * directions.steadiness, widest).clamp(max=self.rms)
        wanted = wanted.mean() if directions.joint else wanted
        lengths = (wanted / means.clamp(min=tiny).sqrt()).expand(len(directions.D))
        if directions.labels is not None:
            longest = directions.reach(_SEEN).clamp(min=0) / self.lr
            bounded = 1 if directions.joint else (longest < lengths).sum()
            parts = torch.where((longest < _NEAR * lengths).any(), bounded, 1)
            lengths = torch.minimum(lengths, longest / parts)
        return directions.scaled(lengths)

    def products(self, directions: Directions, damping: float, memory: Memory) -> Mapping[str, Tensor]:
        """The mean steadiness of the layers."""
        return {"steady": directions.steadiness.clamp(max=1).mean()}

    def _noise(self, steady: float) -> float:
        """How much of a step is noise, for what the average has left of the gradients; averages of pure noise have
        ((1 - momentum) / (1 + momentum))^(1/2), which is 39^(-1/2) at .95."""
        least = _NOISE * (39 * (1 - self.momentum) / (1 + self.momentum)) ** 0.5
        return 1.0 if least >= _AGREED else 1 - min(max((steady - least) / (_AGREED - least), 0.0), 1.0)

    def decide(self, now: Situation) -> Decision:
        """alpha = 1, or what is left of it: while curvature is young, on small batches, without a schedule."""
        noise = self._noise(now.read.get("steady", 0.0))
        settled = now.memory.get("settled", 0.0)
        warmed = min(now.memory.get("warmed", 0.0) + 1, self.warm_up)
        terms = max(now.memory.get("terms", 0.0), now.terms)
        held = now.memory.get("held", float(now.scheduled))  # from the start
        alpha = warmed / self.warm_up
        if self.settle is not None:
            alpha /= 1 + settled / self.settle
        if self.large is not None and terms and not held:
            alpha *= min(1.0, (terms / self.large) ** (0.25 * noise))
        known = {"warmed": warmed, "settled": settled + noise * (not now.scheduled), "terms": terms, "held": held}
        return Decision(alpha, 0.0, memory={**now.memory, **known})
