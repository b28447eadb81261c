"""The interface of an approximation: statistics in, matrix out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from natgrad.capture import Capture
from natgrad.matrix import LinearMap, Matrix


@dataclass(frozen=True)
class Mean:
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
        return self.total / self.weight if self.weight else torch.zeros_like(self.total)

    def pool(self, other: Mean) -> Mean:
        """The mean over the examples of both."""
        return Mean(self.total + other.total, self.weight + other.weight)

    def average(self, new: Mean, decay: float) -> Mean:
        """decay * self + (1 - decay) * new, as a mean of weight 1."""
        return Mean(torch.lerp(new.value, self.value, decay)) if decay else Mean(new.value)


Stats = Mapping[str, Mean]


class Approximation(ABC):
    """A structured approximation of one layer's Fisher block: hyperparameters only, a frozen dataclass.

    To write one: say which statistics of a batch it needs (:meth:`observe`) and which matrix they make
    (:meth:`assemble`). Averaging over time, damping, placement and checkpoints are not its business, nor is cadence but
    for ``refresh_every``, the steps between new matrices that suit it.
    """

    refresh_every: ClassVar[int] = 10

    @abstractmethod
    def observe(self, seen: Capture) -> Stats:
        """The statistics of one batch."""

    @abstractmethod
    def assemble(self, stats: Stats, previous: Matrix | None = None) -> Matrix:
        """The matrix that the statistics stand for; ``previous`` is the layer's last one, for what is carried over."""

    def merge(self, old: Stats, new: Stats, decay: float) -> Stats:
        """Statistics over time: by default the moving average of every mean."""
        return {name: old[name].average(mean, decay) for name, mean in new.items()}

    def correct(self, matrix: Matrix, seen: Sequence[Capture], decay: float) -> Matrix:
        """A cheap update of the matrix by the batches of one observation: by default none."""
        return matrix

    def invert(self, matrix: Matrix, damping: float) -> LinearMap:
        """The damped inverse that training steps are taken with: by default the matrix's own."""
        return matrix.inverse(damping)

    @property
    def corrects(self) -> bool:
        """Whether :meth:`correct` does anything."""
        return type(self).correct is not Approximation.correct

    @property
    def keeps(self) -> bool:
        """Whether training keeps the matrix, to correct it or as ``previous``, and not its inverse alone."""
        return self.corrects

    def check(self, name: str, shape: torch.Size) -> None:
        """Raise ``ValueError`` if a layer of block shape (*groups, out, in) is too much for this approximation."""


def pool(parts: Iterable[Stats]) -> Stats:
    """The statistics over the examples of all the parts."""
    pooled: dict[str, Mean] = {}
    for stats in parts:
        pooled = {name: pooled[name].pool(mean) if name in pooled else mean for name, mean in stats.items()}
    return pooled
