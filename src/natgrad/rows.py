"""Which dimension of what an operation saw are the examples: matched by sizes with the rows of the output."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from natgrad.labels import Labels
from natgrad.operations import Watch


class Arrangement(NamedTuple):
    """Positions (..., a N b, ...) of N examples at dimension ``dim``, as (N, ...); ``shared`` ones as (1, ...)."""

    sizes: torch.Size
    dim: int = 0
    before: int = 1
    after: int = 1
    shared: bool = False

    def __call__(self, x: Tensor) -> Tensor:
        """x (positions..., *rest) as (N, ..., *rest)."""
        if self.shared or not self.sizes:
            return x.unsqueeze(0)
        if self.before == self.after == 1:
            return x if self.dim == 0 else x.movedim(self.dim, 0)
        n = self.sizes[self.dim] // (self.before * self.after)
        return x.unflatten(self.dim, (self.before, n, self.after)).movedim(self.dim + 1, 0)

    @property
    def positions(self) -> tuple[int, int]:
        """(N, t)."""
        n = 1 if self.shared or not self.sizes else self.sizes[self.dim] // (self.before * self.after)
        return n, self.sizes.numel() // max(1, n)


@dataclass(frozen=True)
class Rows:
    """How many examples a pass has (``count``, ``None`` if that is not known), and the dimension that they prefer.

    ``each`` are the rows that the output has of an example, next to each other unless ``apart``; ``second``: the
    output has its examples in the second dimension.
    """

    count: int | None = None
    dim: int = 0
    each: int = 1
    apart: bool = False
    second: bool = False

    def arrangement(self, sizes: torch.Size, first: bool = False, shared: bool = False) -> Arrangement:
        """Where the examples are among positions of these sizes: a dimension of their number, the one they prefer
        before others, else a multiple of it in front; that, too, where several others have their number, such as the
        sides of square windows. If they are known to be ``first``, no other is looked at.

        Positions that fit nowhere count as examples themselves; those that are known to be ``shared`` are one.
        """
        n = self.count
        if shared:
            return Arrangement(sizes, shared=True)
        if n is None or not sizes:
            return Arrangement(sizes)
        preferred = 0 if first else self.dim
        if preferred < len(sizes) and sizes[preferred] == n:
            return Arrangement(sizes, preferred)
        exact = [] if first else [d for d in range(len(sizes)) if sizes[d] == n]
        several = sizes[0] > n > 0 and sizes[0] % n == 0
        if exact and (len(exact) == 1 or not several):
            return Arrangement(sizes, exact[0])
        if several:
            times = sizes[0] // n
            return Arrangement(sizes, 0, times, 1) if self.apart else Arrangement(sizes, 0, 1, times)
        return Arrangement(sizes)

    def matches(self, sizes: torch.Size) -> bool:
        """Whether positions of these sizes can be told apart by example."""
        n = self.count
        return n is None or (bool(sizes) and (n in sizes or (sizes[0] > n and sizes[0] % n == 0)))

    # The output, and what is sent back from it.

    def turned(self, x: Tensor) -> Tensor:
        """An output (t, N, ...) as (N, t, ...), or back."""
        return x.transpose(0, 1) if self.second else x

    def targets(self, targets: Any, output: Tensor) -> Any:
        """Targets (t, N, ...) as (N, t, ...)."""
        fits = self.second and isinstance(targets, Tensor) and targets.shape[:2] == output.shape[:2]
        return targets.transpose(0, 1) if fits else targets

    def by_example(self, terms: Tensor | float) -> Tensor | float:
        """Weights of loss terms (rows, terms), or the number of those of a row, as those of examples."""
        if self.each == 1:
            return terms
        if not isinstance(terms, Tensor):
            return terms * self.each
        shape = (self.each, -1) if self.apart else (-1, self.each)
        rows = terms.unflatten(0, shape)
        return (rows.transpose(0, 1) if self.apart else rows).flatten(1)

    def seeds(self, labels: Labels, output: Any, mixed: bool) -> Iterator[Any]:
        """The seeds of the labels; exact ones reach one row of an example at a time.

        If they may be ``mixed``, that is if the examples of an operation are known by sizes alone or not at all, every
        row of an exact seed has a random sign: the mean over signs of the square of any sum of rows is the sum of their
        squares, and where a sum has but one row the sign is of no account.
        """
        for seed in labels.seeds(output):
            if labels.estimator != "exact" or not isinstance(seed, Tensor):
                yield seed
                continue
            if mixed:
                seed = seed * labels.signs(seed)
            if self.each == 1:
                yield seed
                continue
            number = torch.arange(len(seed), device=seed.device)
            number = number // (len(seed) // self.each) if self.apart else number % self.each
            for k in range(self.each):
                here = (number == k).to(seed.dtype).view(-1, *(1,) * (seed.ndim - 1))
                yield seed * here * self.each**0.5


def rows_of(batch_dim: int | None, inputs: Iterable[Any], outputs: Sequence[Tensor] | None, watch: Watch) -> Rows:
    """The examples of a pass: by ``batch_dim`` of its first input, by what operations know of them, else by sizes.

    The rows of the output are examples, if a tensor of the input has as many, or else as many each as the first input
    of more than one example has to have.
    """
    tensors = [x for x in inputs if isinstance(x, Tensor) and x.ndim > (batch_dim or 0)]
    rows = max(map(len, outputs)) if outputs else None
    count: int | None
    if batch_dim is not None and tensors:
        count, dim = tensors[0].size(batch_dim), batch_dim
    elif _turned(tensors, rows):
        count, dim = rows, 1
    else:
        count, dim = _known(tensors, outputs, watch) or (_by_sizes([x.size(0) for x in tensors], rows, watch), 0)
    if rows is None or count is None or not outputs:
        return Rows(count, dim)
    if len(outputs) > 1:
        return Rows(rows, dim)
    if dim == 1 and _second(outputs[0], count):
        return Rows(count, dim, second=True)
    if rows == count or count == 0 or rows % count:
        return Rows(rows, dim)
    return Rows(count, dim, rows // count, apart=dim == 1)


def _turned(tensors: Sequence[Tensor], rows: int | None) -> bool:
    """Whether only the second dimension of the first input has as many entries as the output has rows."""
    several = bool(tensors) and tensors[0].ndim > 1 and not tensors[0].is_nested
    return several and tensors[0].size(1) == rows and rows not in (x.size(0) for x in tensors)


def _known(tensors: Sequence[Tensor], outputs: Sequence[Tensor] | None, watch: Watch) -> tuple[int, int] | None:
    """The number of examples that operations know of, and their dimension, if all agree and inputs and outputs do."""
    if not watch.batches:
        return None
    sizes = {size for x in tensors for size in (x.shape[:2] if not x.is_nested else [x.size(0)])}
    pairs = [pair for pair in dict.fromkeys(watch.batches) if pair[0] in sizes]
    if len({n for n, _ in pairs}) != 1:
        return None
    n = pairs[0][0]
    fits = not outputs or max(map(len, outputs)) % n == 0 or (len(outputs) == 1 and _second(outputs[0], n))
    return pairs[0] if fits else None


def _by_sizes(sizes: Sequence[int], rows: int | None, watch: Watch) -> int | None:
    """The first size of an input that the rows of the output are a multiple of, or that operations have."""
    if rows in sizes:
        return rows
    several = [n for n in sizes if n > 1] or list(sizes)
    if rows is not None:
        return next((n for n in several if n and rows % n == 0), rows)
    return next((n for n in several if any(Rows(n).matches(call.sizes) for call in watch.calls)), None)


def _second(output: Tensor, n: int) -> bool:
    """Whether the output is (t, n, ...)."""
    return output.ndim > 2 and output.shape[1] == n
