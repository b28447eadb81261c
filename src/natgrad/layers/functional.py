"""Parameters that a module uses as weights of its own, without calling a module for each: attention, recurrences."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from natgrad.layers.base import is_trained
from natgrad.layers.linear import LinearAdapter

Read = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class LinearPart(LinearAdapter):
    """s = W x + b with ``size`` rows of the parameters named ``weight``, from ``start``, and ``bias``, from ``offset``.

    ``slot`` tells the parts of one parameter apart.
    """

    weight: str
    bias: str | None
    size: int
    start: int = 0
    offset: int = 0
    slot: str = ""

    def trained(self, module: nn.Module) -> bool:
        """Whether the weight is a plain parameter, and trained."""
        return is_trained(module, self.weight)

    def has_bias(self, module: nn.Module) -> bool:
        """Whether the block has a bias column."""
        return is_trained(module, self.bias)

    def parameters(self, module: nn.Module) -> list[nn.Parameter]:
        """The whole parameters that the part belongs to."""
        names = [self.weight, self.bias] if self.has_bias(module) else [self.weight]
        return [getattr(module, name) for name in names if name]

    def parts(self, tensors: list[Tensor]) -> list[Tensor]:
        """The rows."""
        starts = (self.start, self.offset)
        return [tensor[start : start + self.size] for tensor, start in zip(tensors, starts, strict=False)]

    def pack(self, module: nn.Module, tensors: list[Tensor]) -> Tensor:
        """[W | b] of the rows of whole tensors."""
        return super().pack(module, self.parts(tensors))

    def within(self, parameter: Tensor, w: Tensor) -> slice | None:
        """Where the part's rows are among those of w, some rows of its weight; ``None`` if they are elsewhere."""
        if w.shape[1:] != parameter.shape[1:] or w.stride() != parameter.stride():
            return None
        start = self.start - (w.storage_offset() - parameter.storage_offset()) // max(1, parameter.stride(0))
        return slice(start, start + self.size) if 0 <= start <= len(w) - self.size else None


class Used(Protocol):
    """A layer whose parameters are used in the forward pass of ``owner``."""

    adapter: Any
    module: nn.Module
    owner: nn.Module | None


Rule = Callable[..., Any]
"""An operation as torch has it, with ``exposed`` in front: the same result, by way of ``exposed.linear``."""


class Exposed(TorchFunctionMode):
    """While active, operations that hide a product with a weight of ``layers`` run as one that is seen.

    ``saw(layer, x, y, read)`` is told the input x (n, ..., in) and the output y of every product with a part's weight;
    ``read`` brings y, and gradients like it, into the form (n, ..., out). ``unread(layer, reason)`` is told of the
    weights that were used in a way that cannot be followed. Nothing is computed otherwise than torch would, but for the
    recurrences, whose fused kernels become products, equal to rounding and in the same random numbers.
    """

    def __init__(
        self,
        layers: Iterable[Used],
        rules: Mapping[Any, Rule],
        saw: Callable[[Any, Tensor, Tensor, Read], None],
        unread: Callable[[Any, str], None],
    ) -> None:
        super().__init__()
        self._saw, self._unread, self._rules = saw, unread, rules
        self._users: dict[int, list[Used]] = {}
        for layer in layers:
            self._users.setdefault(id(layer.adapter.parameters(layer.module)[0]), []).append(layer)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """``func``, by its rule where it has one."""
        rule = self._rules.get(func)
        return func(*args, **(kwargs or {})) if rule is None else rule(self, *args, **(kwargs or {}))

    def linear(self, x: Tensor, w: Tensor, b: Tensor | None = None, read: Read | None = None) -> Tensor:
        """x w^T + b, recorded for every layer whose weight is w, or rows of it."""
        y = F.linear(x, w, b)
        self.saw(x, w, y, read)
        return y

    def saw(self, x: Tensor, w: Tensor, y: Tensor, read: Read | None = None) -> None:
        """Record that y = x w^T + b; y may be any tensor that has the same gradient."""
        for layer, rows in self._used(w):
            whole = read or _batched
            self._saw(layer, whole(x.detach()), y, lambda g, rows=rows: whole(g[..., rows]))

    def unread(self, w: Tensor, reason: str) -> None:
        """Record that what w was used for is not known."""
        for layer, _ in self._used(w):
            self._unread(layer, reason)

    def _used(self, w: Tensor) -> Iterable[tuple[Used, slice]]:
        parameter = w if id(w) in self._users else w._base
        for layer in self._users.get(id(parameter), ()):
            assert parameter is not None
            rows = layer.adapter.within(parameter, w)
            if rows is not None:
                yield layer, rows


def _batched(x: Tensor) -> Tensor:
    return x if x.ndim > 1 else x.unsqueeze(0)
