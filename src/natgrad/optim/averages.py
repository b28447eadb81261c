"""Averages of the gradients over time, for maps that are not linear in them."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

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
        cls, M: Mapping[str, Tensor], V: Mapping[str, Tensor], squares: Mapping[str, Any], beta: float
    ) -> Averages:
        """V <- beta V + (1 - beta) M."""
        blocks = list(M.values())
        means = mean_squares(M)
        old = [torch.zeros(2) if squares.get(name) is None else squares[name] for name in M]
        mean, count = torch.stack([pair.to(means) for pair in old]).unbind(1) if old else (means, means)
        weight = (count / (count + 1)).clamp(max=LONG)
        pairs = torch.stack([torch.lerp(means, mean, weight), count + 1], 1)
        moved = torch._foreach_lerp(blocks, [V[name] for name in M], beta) if blocks else []
        return cls(dict(zip(M, moved, strict=True)), dict(zip(M, pairs.unbind(), strict=True)))

    def ahead(self, M: Mapping[str, Tensor], beta: float) -> dict[str, Tensor]:
        """beta V + (1 - beta) M (Nesterov)."""
        if not M:
            return {}
        return dict(zip(M, torch._foreach_lerp(list(M.values()), [self.V[name] for name in M], beta), strict=True))


def mean_squares(blocks: Mapping[str, Tensor]) -> Tensor:
    """Of the entries of every block, in float32 or wider: squares of float16 vanish."""
    if not blocks:
        return torch.zeros(0)
    wide = functools.reduce(torch.promote_types, {X.dtype for X in blocks.values()}, torch.float32)
    norms = torch._foreach_norm(list(blocks.values()), dtype=wide)
    counts = norms[0].new_tensor([float(X.numel()) for X in blocks.values()])
    return torch.stack(list(norms)).square() / counts
