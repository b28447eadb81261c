"""Inputs with few entries that are not zero: tokens, each the one-hot vector of its number, and bags of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from natgrad.capture import Capture, Examples, per_chunk

_NONE = Examples()


@dataclass(frozen=True)
class Sparse:
    """Vectors a_nt = sum_k values_ntk e(ids_ntk) of length ``width`` at t positions of n examples; ids may repeat.

    ``ids`` and ``values`` are (n, t, k): k is 1 for tokens, the size of a bag for bags. A value of 0 is no entry.
    """

    ids: Tensor
    values: Tensor
    width: int

    @classmethod
    def cat(cls, parts: Sequence[Sparse]) -> Sparse:
        """Positions side by side."""
        k = max(part.ids.shape[-1] for part in parts)
        ids = torch.cat([F.pad(part.ids, (0, k - part.ids.shape[-1])) for part in parts], 1)
        values = torch.cat([F.pad(part.values, (0, k - part.values.shape[-1])) for part in parts], 1)
        return cls(ids, values, parts[0].width)

    def times(self, weights: Tensor) -> Sparse:
        """Every vector times a number (n, t)."""
        return replace(self, values=self.values * weights.unsqueeze(-1))

    def summed(self) -> Sparse:
        """The sum over positions, as one position."""
        return replace(self, ids=self.ids.flatten(1).unsqueeze(1), values=self.values.flatten(1).unsqueeze(1))

    def to(self, dtype: torch.dtype) -> Sparse:
        """The same with ``values`` cast."""
        return replace(self, values=self.values.to(dtype))

    @property
    def dtype(self) -> torch.dtype:
        """That of the values."""
        return self.values.dtype

    @property
    def used(self) -> Tensor:
        """Which positions have an entry: (n, t)."""
        return (self.values != 0).any(-1)

    @cached_property
    def merged(self) -> Sparse:
        """The same with every id at most once at a position: O(n t k log k)."""
        if self.ids.shape[-1] == 1:
            return self
        ids, values = _merged(self.ids.flatten(0, 1), self.values.flatten(0, 1).unsqueeze(-1))
        return replace(self, ids=ids.view_as(self.ids), values=values.view_as(self.values))

    def dense(self) -> Tensor:
        """a (n, t, width), written out."""
        return self.values.new_zeros(*self.ids.shape[:-1], self.width).scatter_add(-1, self.ids, self.values)


class SparseCapture(Capture):
    """What a layer saw whose inputs are :class:`Sparse`; ``a`` is written out for those who ask for it, and only then.

    What the approximations for such layers ask for costs O(n t k out + in out), with no n t in and no in^2. The input
    side is diagonal.
    """

    def __init__(
        self,
        inputs: Sparse,
        g: Tensor,
        count: float | Tensor,
        rows: float | Tensor,
        examples: Examples = _NONE,
        diagonal: tuple[bool, bool] = (False, True),
    ) -> None:
        fields = {"inputs": inputs, "g": g, "count": count, "rows": rows, "examples": examples, "diagonal": diagonal}
        for name, value in fields.items():
            object.__setattr__(self, name, value)

    inputs: Sparse

    @cached_property
    def a(self) -> Tensor:
        """The inputs written out, (n, t, in)."""
        return self.inputs.dense()

    @property
    def shared(self) -> bool:
        """Whether the weight is used at more than one position."""
        return self.g.shape[-2] > 1

    @property
    def norm_a(self) -> Tensor:
        """|a|^2 at every position: (n t, 1)."""
        return self.inputs.merged.values.square().sum(-1).view(-1, 1)

    def moment_a(self, weights: Tensor | None = None) -> Tensor:
        """The diagonal of sum w a a^T: (in, 1)."""
        merged = self.inputs.merged
        squares = merged.values.square()
        if weights is not None:
            squares = squares * weights.view(*squares.shape[:-1], 1)
        total = squares.new_zeros(merged.width, dtype=_wide(squares.dtype))
        return total.index_add(0, merged.ids.flatten(), squares.flatten().to(total.dtype)).unsqueeze(-1)

    def weight_gradients(self) -> Iterator[Tensor]:
        """Per-example gradients DW (n', out, in), in chunks of examples that fit in memory."""
        ids, rows = self._rows()
        step = per_chunk(self.inputs.width * self.g.shape[-1])
        for i, x in zip(ids.split(step), rows.split(step), strict=True):
            DW = x.new_zeros(len(x), self.inputs.width, x.shape[-1])
            yield DW.scatter_add(1, i.unsqueeze(-1).expand_as(x), x).mT

    def second_moment(self) -> Tensor:
        """sum_n DW_n^2 (out, in): the positions of one token added up first, example by example."""
        ids, rows = self._rows()
        total = rows.new_zeros(self.inputs.width, rows.shape[-1], dtype=_wide(rows.dtype))
        step = per_chunk(rows[0].numel())
        for i, x in zip(ids.split(step), rows.split(step), strict=True):
            i, x = _merged(i, x)
            total.index_add_(0, i.flatten(), x.flatten(0, 1).to(total.dtype).square())
        return total.mT

    def along(self, V: Tensor) -> Tensor:
        """u_n = <DW_n, V> for V (out, in): (n,)."""
        ids, rows = self._rows()
        return (F.embedding(ids, V.to(rows.dtype).mT) * rows).sum((-2, -1))

    def combine(self, w: Tensor) -> Tensor:
        """sum_n w_n DW_n: (out, in)."""
        ids, rows = self._rows()
        weighted = (rows * w.to(rows.dtype)[:, None, None]).flatten(0, 1)
        return rows.new_zeros(self.inputs.width, rows.shape[-1]).index_add(0, ids.flatten(), weighted).mT

    def project(self, left: Tensor, right: Tensor) -> SparseCapture:
        """The same examples in other coordinates; those of the inputs may only be scaled: ``right`` is (in, 1)."""
        inputs = replace(self.inputs, values=self.inputs.values * right.to(self.g.dtype).squeeze(-1)[self.inputs.ids])
        g = self.g * left.to(self.g.dtype).mT if left.shape[-1] == 1 else self.g @ left.to(self.g.dtype)
        return SparseCapture(inputs, g, self.count, self.rows, self.examples, self.diagonal)

    def to(self, dtype: torch.dtype) -> SparseCapture:
        """The same with values and ``g`` cast."""
        return SparseCapture(
            self.inputs.to(dtype), self.g.to(dtype), self.count, self.rows, self.examples, self.diagonal
        )

    def _rows(self) -> tuple[Tensor, Tensor]:
        """The entries of all positions of an example, ids (n, t k), and their rows of DW^T, (n, t k, out)."""
        ids, values = self.inputs.ids, self.inputs.values
        rows = values.to(self.g.dtype).unsqueeze(-1) * self.g.unsqueeze(-2)
        return ids.flatten(1), rows.flatten(1, 2)


class Together(Capture):
    """What a layer saw in ways that have no common form: captures of the same examples, one after the other."""

    def __init__(self, parts: Sequence[Capture]) -> None:
        first = parts[0]
        fields: dict[str, object] = {"parts": tuple(parts), "rows": sum(part.rows for part in parts)}
        fields |= {"count": first.count, "examples": first.examples, "diagonal": first.diagonal}
        for name, value in fields.items():
            object.__setattr__(self, name, value)

    parts: tuple[Capture, ...]

    @cached_property
    def a(self) -> Tensor:
        """The inputs of all of them, as positions of one layer."""
        return torch.cat([part.a for part in self.parts], -2)

    @cached_property
    def g(self) -> Tensor:
        """The output gradients of all of them."""
        return torch.cat([part.g for part in self.parts], -2)

    @property
    def size(self) -> int:
        """That of every part."""
        return self.parts[0].size

    @property
    def shared(self) -> bool:
        """Yes."""
        return True

    @property
    def norm_a(self) -> Tensor:
        """|a|^2, part by part."""
        return torch.cat([part.norm_a for part in self.parts], -2)

    @property
    def norm_g(self) -> Tensor:
        """|g|^2, part by part."""
        return torch.cat([part.norm_g for part in self.parts], -2)

    def moment_a(self, weights: Tensor | None = None) -> Tensor:
        """The sum over the parts."""
        return torch.stack([part.moment_a(w) for part, w in self._split(weights)]).sum(0)

    def moment_g(self, weights: Tensor | None = None) -> Tensor:
        """The sum over the parts."""
        return torch.stack([part.moment_g(w) for part, w in self._split(weights)]).sum(0)

    def weight_gradients(self) -> Iterator[Tensor]:
        """Per-example gradients DW, the sum over the parts."""
        for chunks in zip(*(part.weight_gradients() for part in self.parts), strict=True):
            yield torch.stack(chunks).sum(0)

    def along(self, V: Tensor) -> Tensor:
        """The sum over the parts."""
        return torch.stack([part.along(V) for part in self.parts]).sum(0)

    def combine(self, w: Tensor) -> Tensor:
        """The sum over the parts."""
        return torch.stack([part.combine(w) for part in self.parts]).sum(0)

    def project(self, left: Tensor, right: Tensor) -> Together:
        """Part by part."""
        return Together([part.project(left, right) for part in self.parts])

    def to(self, dtype: torch.dtype) -> Together:
        """Part by part."""
        return Together([part.to(dtype) for part in self.parts])

    def _split(self, weights: Tensor | None) -> list[tuple[Capture, Tensor | None]]:
        if weights is None:
            return [(part, None) for part in self.parts]
        return list(zip(self.parts, weights.split([len(part.norm_g) for part in self.parts], -2), strict=True))


def joined(parts: Sequence[Tensor | Sparse]) -> Tensor | Sparse:
    """Inputs of one kind, as positions of one layer."""
    sparse = [part for part in parts if isinstance(part, Sparse)]
    return Sparse.cat(sparse) if sparse else torch.cat([part for part in parts if isinstance(part, Tensor)], -2)


def masked(a: Tensor | Sparse, g: Tensor, kept: Tensor) -> tuple[Tensor | Sparse, Tensor]:
    """Inputs at the positions ``kept`` (n, t), 1 or 0; where a position has no input, without its gradient too."""
    if isinstance(a, Sparse):
        return a.times(kept), g * kept.unsqueeze(-1)
    return a * kept.unsqueeze(-1), g


def summed(a: Tensor | Sparse) -> Tensor | Sparse:
    """The sum over positions, as one position."""
    return a.summed() if isinstance(a, Sparse) else a.sum(-2, keepdim=True)


def _merged(ids: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """ids (n, m) and rows (n, m, d) with the rows of one id added up, and zeros in the places that become free."""
    ids, order = ids.sort(-1)
    first = torch.cat([torch.zeros_like(ids[:, :1]), (ids[:, 1:] != ids[:, :-1]).long()], -1)
    place = first.cumsum(-1)
    rows = rows.gather(1, order.unsqueeze(-1).expand_as(rows))
    merged = torch.zeros_like(rows).scatter_add(1, place.unsqueeze(-1).expand_as(rows), rows)
    return torch.zeros_like(ids).scatter(-1, place, ids), merged


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype for sums over many entries, which have no matrix unit that adds up in more digits."""
    return torch.promote_types(dtype, torch.float32)
