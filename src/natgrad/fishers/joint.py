"""The exact Fisher of a whole network, written out: the oracle of every method that joins layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from natgrad.capture import Capture
from natgrad.fishers.base import Coupled, Part
from natgrad.fishers.exact import ExactFisher
from natgrad.fishers.statistics import Mean, Statistic, Stats, pool
from natgrad.matrix import Dense, NetworkMap


@dataclass(frozen=True)
class JointFisher(ExactFisher, Coupled):
    """F = E[vec(DW) vec(DW)^T] with DW the gradient in all layers together, a dense matrix (P, P) (Amari 1998).

    ``limit``: the largest number P of weights in the covered layers together, since memory is P^2 and a refresh costs
    P^3 flops; an observation costs n P^2. Raises ``ValueError`` above it, and where the layers did not see the same
    examples, of which there must be as many at every step.

    Reference: Amari, "Natural gradient works efficiently in learning", Neural Computation 10(2), 1998.
    """

    def observe(self, seen: Capture) -> Stats:
        """The block of the layer; its rows of F as if it were alone."""
        return self._observe(seen, _whole(seen))

    def observe_together(self, seen: Mapping[str, Sequence[Capture]]) -> Mapping[str, Stats]:
        """The block of every layer, and its rows of F."""
        seen = {name: captures for name, captures in seen.items() if captures}
        self._check(seen)
        parts = []
        for together in zip(*seen.values(), strict=True):
            U = torch.cat([_whole(capture) for capture in together], -1)
            parts.append([self._observe(capture, U) for capture in together])
        return {name: pool(stats) for name, stats in zip(seen, zip(*parts, strict=True), strict=True)}

    def merge(self, old: Stats | None, new: Stats, decay: float) -> dict[str, Statistic]:
        """Moving averages; ``ValueError`` where other layers took part than before."""
        if old is not None and old["rows"].value.shape != new["rows"].value.shape:
            raise ValueError(
                "JointFisher: not the same layers took part in the forward pass as before; use JointWoodbury"
            )
        return dict(super().merge(old, new, decay))

    def couple(self, parts: Mapping[str, Part]) -> NetworkMap:
        """(F + damping I)^-1 through Cholesky."""
        F = torch.cat([part.stats["rows"].value for part in parts.values()], -2)
        damping = max(part.damping for part in parts.values())
        return _DenseMap(
            Dense(F, (1, len(F))).inverse(damping), {name: part.inverse.shape for name, part in parts.items()}
        )

    def check(self, name: str, shape: torch.Size) -> None:
        """Refuse layers above ``limit``."""
        self._refuse(shape.numel())

    def _observe(self, seen: Capture, U: Tensor) -> Stats:
        return {**super().observe(seen), "rows": Mean(_whole(seen).mT @ U, seen.count)}

    def _check(self, seen: Mapping[str, Sequence[Capture]]) -> None:
        examples = {name: [capture.a.shape[-3] for capture in captures] for name, captures in seen.items()}
        if len({tuple(numbers) for numbers in examples.values()}) > 1:
            raise ValueError(f"JointFisher: layers saw examples that cannot be matched, {examples}; use JointWoodbury")
        first = [captures[0] for captures in seen.values()]
        self._refuse(sum(x.a[..., 0, 0, :].numel() * x.g.shape[-1] for x in first))

    def _refuse(self, weights: int) -> None:
        if weights > self.limit:
            raise ValueError(
                f"JointFisher: the layers have {weights} weights or more, above limit={self.limit}; use JointWoodbury "
                "(the Gram form of the same matrix), or raise the limit"
            )


@dataclass(frozen=True)
class _DenseMap:
    """A dense map on the blocks of all layers, laid end to end."""

    inverse: Dense
    shapes: Mapping[str, torch.Size]

    def __matmul__(self, M: Mapping[str, Tensor]) -> dict[str, Tensor]:
        like = next(iter(M.values()))
        whole = [
            M[name].flatten() if name in M else like.new_zeros(shape.numel()) for name, shape in self.shapes.items()
        ]
        D = (self.inverse @ torch.cat(whole).unsqueeze(0)).squeeze(0)
        parts = dict(zip(self.shapes, D.split([shape.numel() for shape in self.shapes.values()]), strict=True))
        return {name: parts[name].view(self.shapes[name]) for name in M}


def _whole(seen: Capture) -> Tensor:
    """Per-example gradients (n, P_l), groups included."""
    return torch.cat(list(seen.weight_gradients()), -3).movedim(-3, 0).flatten(1)
