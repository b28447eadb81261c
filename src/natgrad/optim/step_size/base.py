"""Step-size policies: how much of the natural gradient and how much of the previous direction.

With D the preconditioned gradient and P the previous direction, the next direction is ``alpha D + mu P`` and a
parameter moves by ``-lr`` times it. A policy says which inner products it needs (:meth:`StepSize.products`, on the
device) and what it makes of their values (:meth:`StepSize.decide`, after the one host read of a step).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from natgrad.optim.geometry import Frobenius, Geometry

if TYPE_CHECKING:
    from natgrad.optim.directions import Directions

Memory = Mapping[str, float]
WARM_UP = 5  # comparisons before a policy acts on one


@dataclass(frozen=True)
class Situation:
    """What a policy decides on: the scalars read, the learning rate and momentum, and what it remembered last time.

    ``read`` always has ``slope`` = <D, M> and ``drift`` = <P, M>, M the gradient. ``capacity`` is the largest
    entropy of one loss term in nats, the scale on which a KL divergence is large or small. ``scheduled``: whether a
    schedule sets the learning rate. ``terms``: how many loss terms the step has, 0 where that was not seen.
    """

    read: Mapping[str, float]
    lr: float = 1.0
    momentum: float = 0.9
    memory: Memory = field(default_factory=dict)
    capacity: float = 1.0
    scheduled: bool = False
    terms: float = 0.0

    def form(self, name: str, alpha: float, mu: float) -> float:
        """(alpha D + mu P)^T X (alpha D + mu P) for the matrix X = ``name``."""
        dd, dp, pp = (self.read[pair[0] + name + pair[1]] for pair in ("DD", "DP", "PP"))
        return alpha * alpha * dd + 2 * alpha * mu * dp + mu * mu * pp


@dataclass(frozen=True)
class Decision:
    """alpha and mu; the slope of the loss along the step and the change of the loss that is predicted; the memory.

    ``restart``: whether damping should return to where it started. ``rejected``: whether the step
    takes the last one back.
    """

    alpha: float
    mu: float
    slope: float = 0.0
    predicted: float = 0.0
    memory: Memory = field(default_factory=dict)
    restart: bool = False
    rejected: bool = False


class StepSize(ABC):
    """A policy: a frozen dataclass of settings; what it must remember travels in ``Decision.memory``."""

    chooses_momentum = False  # or takes it from the settings
    needs_inputs = False  # whether the model is run again, on its own inputs
    lr = 1.0  # the default learning rate under this policy

    def geometry(self, memory: Memory) -> Geometry:
        """In which norm the step is the steepest: by default the natural gradient's."""
        return Frobenius()

    def averages(self, memory: Memory) -> float | None:
        """The decay of an average of gradients that is taken before the map, or ``None`` where P are directions."""
        return None

    def unit(self, memory: Memory) -> float:
        """What a learning rate is multiplied by."""
        return 1.0

    def share_of_pretrained(self, memory: Memory) -> float:
        """What a learning rate that was not given is multiplied by, for weights that have learnt something before."""
        return 1.0

    def needs_samples(self, memory: Memory) -> bool:
        """Whether the next step's products read the captured samples."""
        return False

    def prepare(self, directions: Directions, damping: float, memory: Memory) -> Directions:
        """The directions to decide on: a policy may scale D, layer by layer, without a read."""
        return directions

    def products(self, directions: Directions, damping: float, memory: Memory) -> Mapping[str, Tensor]:
        """Scalars to be read beside slope and drift."""
        return {}

    def idle(self, memory: Memory) -> Memory:
        """The memory after a step that moved no layer."""
        return memory

    def unobserved(self, memory: Memory) -> Memory | None:
        """The memory with which a step needs no samples, for want of an observed pass; ``None`` if there is none."""
        return None

    @abstractmethod
    def decide(self, now: Situation) -> Decision:
        """alpha and mu from the scalars."""


def read_once(products: Mapping[str, Tensor]) -> dict[str, float]:
    """The values of all scalars in one transfer to the host."""
    if not products:
        return {}
    dtype = torch.float64 if any(value.dtype == torch.float64 for value in products.values()) else torch.float32
    values = torch.stack([value.to(dtype) for value in products.values()]).tolist()
    return dict(zip(products, values, strict=True))


def average(old: float, new: float, decay: float) -> float:
    """An exponential moving average."""
    return decay * old + (1 - decay) * new
