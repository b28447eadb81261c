"""What an approximation keeps of the batches: means, which are averaged over time, and samples, which are replaced."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from natgrad.capture import Capture


class Statistic(ABC):
    """One statistic of a layer: pooled over batches that belong together, averaged over time as suits its kind.

    Over time it is one tensor, ``value``, and its class makes it from that tensor alone.
    """

    @property
    @abstractmethod
    def value(self) -> Tensor:
        """The statistic itself."""

    @abstractmethod
    def pool(self, other: Self) -> Self:
        """The statistic of the examples of both."""

    @abstractmethod
    def average(self, new: Self, decay: float) -> Self:
        """The statistic over time, ``decay`` being the weight of what is old."""

    def restored(self, value: Tensor) -> Self:
        """The statistic over time that a ``value`` stands for: the way in from a checkpoint."""
        return type(self)(value)  # type: ignore[call-arg]

    def to(self, dtype: torch.dtype) -> Self:
        """The same over time, cast."""
        return self.restored(self.value.to(dtype))


@dataclass(frozen=True)
class Mean(Statistic):
    """A statistic that is a mean: ``total`` over examples, and the ``weight`` to divide it by.

    Batches that belong together are pooled (totals and weights add); over time values are averaged by a moving
    average. Means are all-reduced over workers.
    """

    total: Tensor
    weight: float | Tensor = 1.0

    @property
    def value(self) -> Tensor:
        """total / weight; 0 where the weight is 0."""
        if isinstance(self.weight, Tensor):
            return self.total / self.weight.clamp(min=torch.finfo(self.total.dtype).tiny)
        if self.weight == 1:
            return self.total  # over time: itself, and not a copy
        return self.total / self.weight if self.weight else torch.zeros_like(self.total)

    def pool(self, other: Mean) -> Mean:
        """The mean over the examples of both."""
        return Mean(self.total + other.total, self.weight + other.weight)

    def average(self, new: Mean, decay: float) -> Mean:
        """decay * self + (1 - decay) * new, as a mean of weight 1."""
        return Mean(torch.lerp(new.value, self.value, decay)) if decay else Mean(new.value)


@dataclass(frozen=True)
class Samples(Statistic):
    """A statistic that is a set of examples: a tensor (*groups, n, t, d).

    Batches that belong together are gathered (the shorter padded to the longer with zero positions); over time the new
    examples replace the old. Samples are all-gathered over workers.
    """

    examples: Tensor

    @property
    def value(self) -> Tensor:
        """The examples."""
        return self.examples

    def pool(self, other: Samples) -> Samples:
        """The examples of both."""
        t = max(self.value.shape[-2], other.value.shape[-2])
        return Samples(torch.cat([F.pad(x, (0, 0, 0, t - x.shape[-2])) for x in (self.value, other.value)], -3))

    def average(self, new: Samples, decay: float) -> Samples:
        """The new ones: samples have no average."""
        return new


Stats = Mapping[str, Statistic]


def pool(parts: Iterable[Stats]) -> dict[str, Statistic]:
    """The statistics over the examples of all the parts."""
    pooled: dict[str, Statistic] = {}
    for stats in parts:
        pooled = {name: pooled[name].pool(new) if name in pooled else new for name, new in stats.items()}
    return pooled


def as_samples(seen: Capture) -> dict[str, Statistic]:
    """A capture as statistics ``a``, ``g``, ``count`` and ``rows``; the last two are (1, 1, 1) and add up in a pool."""
    sizes = {"count": seen.count, "rows": seen.rows}
    numbers = {name: torch.as_tensor(size, dtype=seen.a.dtype, device=seen.a.device) for name, size in sizes.items()}
    return {
        "a": Samples(seen.a),
        "g": Samples(seen.g),
        **{name: Samples(number.reshape(1, 1, 1)) for name, number in numbers.items()},
    }


def as_capture(stats: Stats) -> Capture:
    """The capture of all the examples that :func:`as_samples` made statistics of."""
    return Capture(stats["a"].value, stats["g"].value, stats["count"].value.sum(), stats["rows"].value.sum())
