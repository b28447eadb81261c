"""Which tensors of a pass stand for parameters: these themselves, and views, copies and multiples of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from natgrad.layers.view import View
from natgrad.operations.call import Operand

Stray = tuple[nn.Parameter, str, Tensor | None]
"""A parameter, an operation that no rule reads, and its output."""


def whole(parameters: Iterable[nn.Parameter] | Mapping[Tensor, nn.Parameter]) -> dict[int, Operand]:
    """Parameters, or tensors that stand for them, such as fake ones, by their ids."""
    pairs = parameters.items() if isinstance(parameters, Mapping) else ((p, p) for p in parameters)
    return {id(x): Operand(p, View.whole(p)) for x, p in pairs}


class Operands:
    """What the tensors of one pass are of the parameters that are ``known``.

    ``strays`` are parameters whose copies have been changed in place.
    """

    def __init__(self, known: Mapping[int, Operand], strays: list[Stray]) -> None:
        self.known, self._strays = known, strays
        self._named = set(known)
        self._others: dict[int, tuple[Tensor, Operand | None, int]] = {}  # copies, with their versions, and data
        self._expanded: dict[int, Tensor] = {}

    def among(self, tensors: Iterable[Tensor]) -> bool:
        """Whether one of some tensors is a parameter, or may be a view or a copy of one."""
        named = self._named
        return any(id(x) in named or id(x._base) in named for x in tensors)

    def of(self, x: Any) -> Operand | None:
        """What ``x`` is of a parameter; ``None`` for all else."""
        known = self.known.get(id(x))
        if known is not None:
            return known
        if not isinstance(x, Tensor):
            return x if isinstance(x, Operand) else None
        other = self._others.get(id(x))
        if other is not None:
            return self._unchanged(*other)
        base = x._base
        if base is None or id(base) not in self._named:
            return None
        found = self.of(base)
        if found is None or (found.trained and x.grad_fn is None):
            return None
        view = found.view.within(x, base)
        return None if view is None else Operand(found.parameter, view, found.factor)

    def _unchanged(self, x: Tensor, operand: Operand | None, version: int) -> Operand | None:
        """What a copy stands for, unless it has been changed in place since."""
        if operand is None or x._version == version:
            return operand
        del self._others[id(x)]
        self._named.discard(id(x))
        self._strays.append((operand.parameter, "a copy that is changed in place", x))
        return None

    def alias(self, x: Tensor, of: Operand) -> None:
        """Let ``x`` stand for an operand, until the pass ends."""
        self._others[id(x)] = x, of, x._version
        self._named.add(id(x))

    def read(self, x: Tensor) -> None:
        """Let ``x`` be data, though it is a view of a parameter."""
        self._others[id(x)] = x, None, 0

    # Parameters that are repeated.

    def expanded(self, x: Tensor) -> None:
        """Let a parameter that was expanded to a batch of one example count as repeated."""
        self._expanded[id(x)] = x

    def repeats(self, x: Any, operand: Operand) -> bool:
        """Whether what an operand is of a parameter is repeated."""
        view = operand.view
        return id(x) in self._expanded or any(
            n > 1 and not step for n, step in zip(view.size, view.stride, strict=True)
        )

    def repeated(self, x: Any) -> bool:
        """Whether ``x`` is a parameter that is repeated."""
        if not isinstance(x, Tensor) or x._base is None:
            return False
        operand = self.of(x) if id(x) in self._expanded or 0 in x.stride() else None
        return operand is not None and self.repeats(x, operand)

    def alone(self, x: Any) -> Any:
        """A repeated parameter as a view of its own for every operation that reads it, which tells their gradients
        apart."""
        if not self.repeated(x):
            return x
        alone = x.view_as(x)
        if id(x) in self._expanded:
            self.expanded(alone)
        return alone


def tensors(values: Iterable[Any]) -> list[Tensor]:
    """The tensors among arguments, and in lists of them."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += [part for part in value if isinstance(part, Tensor)]
    return found
