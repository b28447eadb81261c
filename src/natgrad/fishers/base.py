"""The interface of an approximation: statistics in, matrix out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from natgrad.capture import Capture, Kind
from natgrad.fishers.statistics import Stats, pool
from natgrad.matrix import LinearMap, Matrix, NetworkMap


class Approximation(ABC):
    """A structured approximation of one layer's Fisher block: hyperparameters only, a frozen dataclass.

    To write one: say which statistics of a batch it needs (:meth:`observe`) and which matrix they make
    (:meth:`assemble`). Averaging over time, damping, placement and checkpoints are not its business, nor is cadence but
    for ``observe_every`` and ``refresh_every``, the steps between observations and new matrices that suit it.
    """

    observe_every: ClassVar[int] = 4
    refresh_every: ClassVar[int] = 10

    @property
    def reads(self) -> Literal["positions", "examples", "all"]:
        """What an observation may read a share of: its statistics are means over single positions, or over examples.

        ``"all"``, the default, is for methods that keep what they see, or follow it: no budget holds for them.
        """
        return "all"

    @property
    def sides(self) -> tuple[bool, bool]:
        """Whether its matrix has a factor for the outputs, and for the inputs, that is diagonal where it must be."""
        return False, False

    @abstractmethod
    def observe(self, seen: Capture) -> Stats:
        """The statistics of one batch."""

    @abstractmethod
    def assemble(self, stats: Stats, previous: Matrix | None = None) -> Matrix:
        """The matrix that the statistics stand for; ``previous`` is the layer's last one, for what is carried over."""

    def merge(self, old: Stats | None, new: Stats, decay: float) -> Stats:
        """Statistics over time, from those of one observation; ``old`` is ``None`` the first time.

        By default means are averaged and samples replaced. What is kept may differ from what was observed: a method
        that needs the old state to process a batch lets :meth:`observe` hand on the examples, and works here.
        """
        return {name: (old or new)[name].average(mean, decay if old else 0.0) for name, mean in new.items()}

    def correct(self, matrix: Matrix, seen: Sequence[Capture], decay: float) -> Matrix:
        """A cheap update of the matrix by the batches of one observation: by default none."""
        return matrix

    def invert(self, matrix: Matrix, damping: float) -> LinearMap:
        """The damped inverse that training steps are taken with: by default the matrix's own."""
        return matrix.inverse(damping)

    @property
    def together(self) -> bool:
        """Whether all layers are observed at once, by :meth:`observe_together`."""
        return False

    def observe_together(self, seen: Mapping[str, Sequence[Capture]]) -> Mapping[str, Stats]:
        """The statistics of one observation for every layer, in the order of the model; by default each on its own.

        A layer that no forward pass reached has no captures, and gets no statistics or empty ones.
        """
        return {name: pool(self.observe(capture) for capture in captures) for name, captures in seen.items()}

    @property
    def corrects(self) -> bool:
        """Whether :meth:`correct` does anything."""
        return type(self).correct is not Approximation.correct

    @property
    def seed(self) -> int:
        """As how many examples a new matrix counts where :meth:`correct` measures it anew; 0 where it goes on."""
        return 0

    @property
    def keeps(self) -> bool:
        """Whether training keeps the matrix, to correct it or as ``previous``, and not its inverse alone."""
        return self.corrects

    def sided(self, kind: Kind) -> Approximation | None:
        """What a layer of a ``kind`` other than plain gets: itself, if it reads what a side that is diagonal gives.

        ``"wide"``: a side is too wide for a covariance, which ``moment_a`` and ``moment_g`` of the capture heed;
        ``"tokens"``: inputs are sparse as well, and must not be read as ``a``; ``"mixed"``: tokens, and another use of
        the same weight the other way round, so that only products of ``a`` and ``g`` have a scale. ``None``, the
        default, is for KFAC.
        """
        return None

    def check(self, name: str, shape: torch.Size) -> None:
        """Raise ``ValueError`` if a layer of block shape (*groups, out, in) is too much for this approximation."""


@dataclass(frozen=True)
class Part:
    """What a coupled approximation sees of one layer: statistics over time, its own inverse, the damping in that."""

    stats: Stats
    inverse: LinearMap
    damping: float


class Coupled(Approximation):
    """An approximation whose inverse joins layers.

    Statistics, matrix and inverse stay per layer, so that cadence, failures and checkpoints are those of any other
    approximation; :meth:`couple` makes one map of the whole network out of them, whenever one of them has changed.
    """

    @property
    def together(self) -> bool:
        """Always."""
        return True

    @abstractmethod
    def couple(self, parts: Mapping[str, Part]) -> NetworkMap:
        """The map D = map @ M on dicts of blocks; it must accept an M that lacks some of the layers."""
