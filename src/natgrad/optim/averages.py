"""Averages of the gradients over time, for maps that are not linear in them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

LONG = 0.99  # weight of the old squares: a memory of a hundred steps


@dataclass(frozen=True)
class Averages:
    """Of every layer the average V of its gradients M, and of their mean squares.

    ``squares`` are tensors (2,): the average, plain at first and then moving with ``LONG``, and the number in it.
    """

    V: Mapping[str, Tensor]
    squares: Mapping[str, Tensor]

    @classmethod
    def after(
        cls, M: Mapping[str, Tensor], V: Mapping[str, Tensor], squares: Mapping[str, Tensor | None], beta: float
    ) -> Averages:
        """V <- beta V + (1 - beta) M."""
        return cls(
            {name: torch.lerp(M[name], V[name], beta) for name in M},
            {name: _with(squares.get(name), M[name].square().mean()) for name in M},
        )

    def ahead(self, M: Mapping[str, Tensor], beta: float) -> dict[str, Tensor]:
        """beta V + (1 - beta) M (Nesterov)."""
        return {name: torch.lerp(M[name], self.V[name], beta) for name in M}


def _with(old: Tensor | None, square: Tensor) -> Tensor:
    """One more square."""
    if old is None:
        return torch.stack([square, torch.ones_like(square)])
    mean, count = old.to(square).unbind()
    weight = (count / (count + 1)).clamp(max=LONG)
    return torch.stack([torch.lerp(square, mean, weight), count + 1])
