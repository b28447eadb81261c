"""Woodbury: the Fisher of the last examples, exactly, inverted in the space of the examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from natgrad.capture import Capture, Kind
from natgrad.fishers.base import Approximation, Coupled, Part
from natgrad.fishers.statistics import Samples, Statistic, Stats, as_capture, as_samples, pool
from natgrad.matrix import JointInverse, LinearMap, LowRank, Matrix, NetworkMap


@dataclass(frozen=True)
class Woodbury(Approximation):
    """F = 1/count sum_n vec(DW_n) vec(DW_n)^T over the examples of the last ``window`` observations, nothing left out.

    (F + damping I)^-1 M = (M - U^T (K + count damping I)^-1 U M) / damping by Woodbury's identity, with U = DW as
    (n, out in) and K = U U^T the Gram matrix (*groups, n, n); neither F nor DW is formed. The same step as
    ``ExactFisher`` on the same examples. Samples have no moving average: ``decay`` is not used.

    Cost: n^2 (in + out) + n^3 / 3 flops a refresh (if the weight is shared t^2 times the first, or (n^2 + n t) in out
    where that is less), 4 n t in out a step; memory n t (in + out) + n^2. ``n`` counts draws, or outputs of the exact
    estimator, times examples. A block of fewer weights than that, as of a norm, is kept as out in examples with the
    same F. Factor and products are in float64, see :class:`~natgrad.matrix.LowRank`.

    Raises ``ValueError`` for a ``window`` that is not a whole number of at least 1. Reference: Ren and Goldfarb, arXiv
    1906.02353.
    """

    window: int = 1
    observe_every: ClassVar[int] = 1  # F of other examples than those of M has little to say
    refresh_every: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if not isinstance(self.window, int) or isinstance(self.window, bool) or self.window < 1:
            raise ValueError(f"window must be a whole number of at least 1, got {self.window!r}")

    def observe(self, seen: Capture) -> Stats:
        """The examples themselves; of more of them than weights, as many with the same F."""
        return as_samples(_compressed(seen) if seen.a.shape[-3] > seen.a.shape[-1] * seen.g.shape[-1] else seen)

    def merge(self, old: Stats | None, new: Stats, decay: float) -> Stats:
        """The new examples, and those of the ``window`` - 1 observations before, each one older."""
        kept: dict[str, Statistic] = dict(new)
        for age in range(1, self.window):
            for name, statistic in new.items():
                kept[_aged(name, age)] = Samples(_zero(statistic.value)) if old is None else old[_aged(name, age - 1)]
        return kept

    def sided(self, kind: Kind) -> Approximation | None:
        """Itself, which forms no covariance, but not for tokens."""
        return self if kind == "wide" else None

    def assemble(self, stats: Stats, previous: Matrix | None = None) -> LowRank:
        """The Fisher of all the examples kept, every loss term weighing the same."""
        names = [name for name in stats if "-" not in name]
        batches = ({name: stats[_aged(name, age)] for name in names} for age in range(self.window))
        seen = as_capture(pool(batches))
        return LowRank(seen.a, seen.g, torch.as_tensor(seen.count))


@dataclass(frozen=True)
class JointWoodbury(Woodbury, Coupled):
    """The Fisher of the whole network on the last examples, cross terms between layers and groups included.

    As :class:`Woodbury` with whole gradients for DW: K = sum over layers of K_l, w = sum over layers of U_l M_l, and
    one system (n, n) for all layers. Layers that saw other examples than the rest (another number, for want of a batch
    dimension, or those of an older batch, for want of a call) are solved among themselves.

    Cost: n^2 sum (in + out) + n^3 / 3 flops at every observation and refresh, 4 n t sum in out a step.
    """

    def observe(self, seen: Capture) -> Stats:
        """The examples, and room for the mark of their batch."""
        return {**as_samples(seen), "batch": Samples(seen.a.new_zeros(1, 1, 1))}

    def observe_together(self, seen: Mapping[str, Sequence[Capture]]) -> Mapping[str, Stats]:
        """Every layer's examples, with one mark for all of them."""
        seen = {name: captures for name, captures in seen.items() if captures}
        sizes = [capture.g.abs().sum(dtype=torch.float64) for captures in seen.values() for capture in captures]
        if not sizes:
            return {}
        mark = Samples(torch.stack(sizes).sum().reshape(1, 1, 1))
        return {name: {**stats, "batch": mark} for name, stats in super().observe_together(seen).items()}

    def invert(self, matrix: Matrix, damping: float) -> LinearMap:
        """The inverse of the Fisher 0, M / damping: no layer is solved for alone."""
        assert isinstance(matrix, LowRank)
        return LowRank(_zero(matrix.a), _zero(matrix.g), matrix.count).inverse(damping)

    def couple(self, parts: Mapping[str, Part]) -> NetworkMap:
        """One solve for all layers that saw the same examples."""
        layers = {name: self.assemble(part.stats) for name, part in parts.items()}
        marks = torch.stack([self._marks(part.stats) for part in parts.values()]).tolist()
        groups: dict[tuple[float, ...], dict[str, LowRank]] = {}
        for mark, (name, matrix) in zip(marks, layers.items(), strict=True):
            groups.setdefault((matrix.a.shape[-3], *mark), {})[name] = matrix
        damping = max(part.damping for part in parts.values())
        return _Groups([JointInverse.of(group, damping) for group in groups.values()])

    def _marks(self, stats: Stats) -> Tensor:
        """The marks of the batches that the examples came with."""
        return torch.stack([stats[_aged("batch", age)].value.sum() for age in range(self.window)])


@dataclass(frozen=True)
class _Groups:
    """Maps of groups of layers, as one map."""

    maps: Sequence[NetworkMap]

    def __matmul__(self, M: Mapping[str, Tensor]) -> dict[str, Tensor]:
        D = {name: block for group in self.maps for name, block in (group @ M).items()}
        return {name: D[name] for name in M}


def _compressed(seen: Capture) -> Capture:
    """out in examples whose gradients are the rows of R, for the U = Q R of all: U^T U = R^T R."""
    out, width = seen.g.shape[-1], seen.a.shape[-1]
    R = torch.linalg.qr(torch.cat(list(seen.weight_gradients()), -3).flatten(-2), mode="r").R
    a = R.unflatten(-1, (out, width))  # (*groups, out in, out, in): position o has the gradient of row o
    g = torch.eye(out, dtype=a.dtype, device=a.device).expand(*a.shape[:-1], out)
    return Capture(a, g, seen.count, seen.rows, seen.examples)


def _zero(examples: Tensor) -> Tensor:
    """One example of zeros, at one position."""
    return torch.zeros_like(examples[..., :1, :1, :])


def _aged(name: str, age: int) -> str:
    return f"{name}-{age}" if age else name
