"""Embeddings and bags of them: products with one-hot vectors, of which no more than the tokens is kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from natgrad.layers.form import Form, form
from natgrad.sparse import Sparse


@form
@dataclass(frozen=True)
class Lookup(Form):
    """s = W a on a = e(token); the block is the transposed operand, (out, number of tokens). x are ids (n, ...).

    The row of ``padding`` has no gradient: that token is the vector 0. Any dimensions of the operand after the first
    are outputs.
    """

    inner: ClassVar[int] = 0
    tokens: ClassVar[bool] = True
    thins: ClassVar[bool] = True

    width: int
    padding: int | None = None

    def matrix(self, operand: Tensor) -> Tensor:
        """(out, number of tokens)."""
        return operand.flatten(1).mT if operand.ndim > 1 else operand.unsqueeze(0)

    def operand(self, matrix: Tensor, shape: torch.Size) -> Tensor:
        """(number of tokens, ...)."""
        return matrix.mT.reshape(shape)

    def sparse(self, x: Tensor) -> Sparse:
        """One entry at every position but those of padding."""
        ids = x.reshape(len(x), -1, 1).long()
        return Sparse(ids, _kept(ids, self.padding).to(torch.get_default_dtype()), self.width)

    def inputs(self, x: Tensor, biased: bool) -> Tensor:
        """The inputs written out, (n, t, number of tokens): for small cases."""
        return self.sparse(x).dense()

    def outputs(self, y: Tensor) -> Tensor:
        """(n, t, out)."""
        return y.reshape(y.shape[0], -1, y.shape[-1])

    def cast(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """x: tokens have no precision."""
        return x

    def product(self, operand: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
        """The rows of the tokens, 0 for padding."""
        return F.embedding(x, self.matrix(operand).mT) * _kept(x, self.padding).unsqueeze(-1)


@form
@dataclass(frozen=True)
class BagLookup(Lookup):
    """The same for sums of rows. x is int64 (n, ..., k, 2): the ids of a bag, and the bits of their float64 weights.

    Two tokens of one bag do meet, so that a diagonal input side is an approximation here.
    """

    inner: ClassVar[int] = 2

    def sparse(self, x: Tensor) -> Sparse:
        """One position a bag."""
        ids, w = (part.reshape(len(x), -1, x.shape[-2]) for part in _parts(x))
        return Sparse(ids, w.to(torch.get_default_dtype()), self.width)

    def product(self, operand: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
        """The weighted sum of every bag."""
        ids, w = _parts(x)
        return (F.embedding(ids, operand) * w.to(operand.dtype).unsqueeze(-1)).sum(-2)


def bags(ids: Tensor, weights: Tensor) -> Tensor:
    """Ids and float64 weights (n, k) as what :class:`BagLookup` reads."""
    return torch.stack([ids.long(), weights.contiguous().view(torch.int64)], -1)


def _kept(ids: Tensor, padding: int | None) -> Tensor:
    """Which tokens are not padding."""
    return torch.ones_like(ids, dtype=torch.bool) if padding is None else ids != padding


def _parts(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[..., 0], x[..., 1].contiguous().view(torch.float64)
