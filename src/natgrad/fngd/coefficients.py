"""How the coefficients of the first phase find their examples again: six answers that the paper leaves open."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

_BINS = 32


@dataclass(frozen=True)
class Examples:
    """Which examples these are: those of step ``step`` of the epoch from position ``start`` on; their ``ids`` (n,)."""

    step: int = 0
    start: int = 0
    ids: Tensor | None = None


class Coefficients(ABC):
    """Where the coefficient of an example stands in the table of its layer: a row a batch, a column an example.

    Examples are told apart by what they are, and by g (n, ...), the gradients of the loss at the layer's output.
    """

    needs_ids: ClassVar[bool] = False
    """Whether it tells examples apart by the ids that ``optimizer.examples`` tells."""

    def learns(self, step: int, first_phase: int) -> bool:
        """Whether coefficients are solved for at this step: in the first phase."""
        return step < first_phase

    def row(self, which: Examples) -> int:
        """The row of these examples, by default the first and only one."""
        return 0

    @abstractmethod
    def columns(self, which: Examples, g: Tensor) -> Tensor:
        """The columns (n,) of these examples."""

    @abstractmethod
    def width(self, which: Examples, g: Tensor) -> int:
        """The number of columns that a table needs which these examples are entered in."""


class _ByPosition(Coefficients):
    def columns(self, which: Examples, g: Tensor) -> Tensor:
        """The positions in the batch, which are counted on over micro-batches."""
        return torch.arange(which.start, which.start + len(g), device=g.device)

    def width(self, which: Examples, g: Tensor) -> int:
        """One beyond the last position."""
        return which.start + len(g)


@dataclass(frozen=True)
class PositionMean(_ByPosition):
    """By the position in the batch, averaged over the first phase; counted on over micro-batches.

    Where data are shuffled positions are alike, and it tends to a constant, like 1/sqrt(batches).
    """


@dataclass(frozen=True)
class Iteration(_ByPosition):
    """By step of the epoch and position, for data in a frozen order."""

    def row(self, which: Examples) -> int:
        """The step of the epoch."""
        return which.step


@dataclass(frozen=True)
class Recompute(_ByPosition):
    """By nothing: solved for at every step, the first phase never ends."""

    def learns(self, step: int, first_phase: int) -> bool:
        """Always."""
        return True


@dataclass(frozen=True)
class Sample(Coefficients):
    """By the id of the example, which ``optimizer.examples(ids)`` tells before every forward pass.

    Stale under augmentation, and as training goes on.
    """

    needs_ids = True

    def columns(self, which: Examples, g: Tensor) -> Tensor:
        """The ids."""
        assert which.ids is not None
        return which.ids

    def width(self, which: Examples, g: Tensor) -> int:
        """One beyond the largest id."""
        assert which.ids is not None
        return int(which.ids.max()) + 1


@dataclass(frozen=True)
class Quantile(Coefficients):
    """By the rank in the (micro-)batch of the gradient's norm at the layer's output, in 32 bins."""

    def columns(self, which: Examples, g: Tensor) -> Tensor:
        """The bin that the rank of each example falls in."""
        squares = g.flatten(1).square().sum(1)
        return squares.argsort().argsort() * _BINS // len(squares)

    def width(self, which: Examples, g: Tensor) -> int:
        """The bins."""
        return _BINS


@dataclass(frozen=True)
class Scalar(Coefficients):
    """By nothing: the mean of a layer, which is SGD with a learning rate a layer; the ablation of all others."""

    def columns(self, which: Examples, g: Tensor) -> Tensor:
        """The one there is."""
        return torch.zeros(len(g), dtype=torch.int64, device=g.device)

    def width(self, which: Examples, g: Tensor) -> int:
        """One."""
        return 1
