"""What the first phase leaves of a layer: its coefficients, added up where they can be found again."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from natgrad.fngd.coefficients import Coefficients, Examples
from natgrad.fngd.weighting import Weights


@dataclass(frozen=True)
class Table:
    """Sums of w = N c (rows, columns), and of how many examples; it grows with what is entered."""

    total: Tensor
    seen: Tensor

    @classmethod
    def empty(cls, like: Tensor) -> Self:
        """The table of a layer that nothing is known of, at least in float32."""
        nothing = like.new_zeros((1, 0), dtype=torch.promote_types(like.dtype, torch.float32))
        return cls(nothing, nothing)

    @property
    def known(self) -> bool:
        """Whether anything was entered."""
        return self.total.numel() > 0

    @property
    def scale(self) -> Tensor:
        """The mean of w over all examples, the number N mean c; 1 where there is none."""
        number = self.seen.sum()
        return torch.where(number > 0, self.total.sum() / number, torch.ones_like(number))

    def entered(self, where: Coefficients, which: Examples, g: Tensor, w: Tensor, counts: Tensor) -> Table:
        """With the w (n,) of these examples; ``counts`` is 0 where they have no gradient, and else 1."""
        columns, row = where.columns(which, g), where.row(which)
        slots, width = (torch.full_like(columns, row), columns), where.width(which, g)
        rows, before = self.total.shape
        growth = (0, max(0, width - before), 0, max(0, row + 1 - rows))
        values = (self.total, w), (self.seen, counts.expand_as(w))
        sums = (F.pad(x, growth).index_put(slots, value.to(x.dtype), accumulate=True) for x, value in values)
        return Table(*sums)

    def weights(self, where: Coefficients) -> Weights | None:
        """c / mean c of examples, looked up, and 1 for the unseen; ``None`` if all are 1."""
        if self.total.numel() == 1:
            return None
        table = torch.where(self.seen > 0, self.total / (self.seen * self.scale), torch.ones_like(self.total))
        return partial(_look_up, F.pad(table, (0, 1, 0, 1), value=1.0), where)


def _look_up(table: Tensor, where: Coefficients, which: Examples, g: Tensor) -> Tensor:
    """The weights (n,); the last row and the last column of the table are for the unseen."""
    row = table[min(where.row(which), len(table) - 1)]
    return row[where.columns(which, g).clamp(max=len(row) - 1)]
