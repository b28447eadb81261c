"""Which tensors of a pass do not depend on its examples."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

_REPEATED = {"expand", "expand_as", "broadcast_to", "repeat", "repeat_interleave", "tile"}
"""Functions that repeat what they are given."""

_MADE = {"arange", "linspace", "eye", "range"}
"""Functions that make positions and the like of a few numbers."""


class Constants:
    """Some ``tensors``, until they are changed, ``parameters``, by their ids, and what is computed from both."""

    def __init__(self, tensors: Iterable[Tensor], parameters: Mapping[int, object]) -> None:
        self._known = {id(x): (x, x._version) for x in tensors}
        self._parameters = parameters

    def hold(self, tensors: Iterable[Tensor]) -> bool:
        """Whether none of some tensors depends on the examples."""
        for x in tensors:
            known = self._known.get(id(x))
            if (known is None or known[1] != x._version) and id(x) not in self._parameters:
                return False
        return True

    def follow(self, func: Any, given: list[Tensor], results: Iterable[Tensor]) -> None:
        """What is computed from constants is one, and so is what is made of numbers, such as positions; but not what
        repeats one, for every example."""
        name = getattr(func, "__name__", "")
        if name not in _REPEATED if given else name in _MADE:
            self._known.update((id(y), (y, y._version)) for y in results)
