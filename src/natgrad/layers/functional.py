"""Parameters that a module uses as weights of its own, without calling a module for each: attention, recurrences."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from natgrad.layers.base import is_trained
from natgrad.layers.linear import LinearAdapter

Read = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class LinearPart(LinearAdapter):
    """s = W x + b with ``size`` rows of the parameters named ``weight``, from ``start``, and ``bias``, from ``offset``.

    ``slot`` tells the parts of one parameter apart; a ``transposed`` weight is W^T, which has no parts.
    """

    weight: str
    bias: str | None
    size: int
    start: int = 0
    offset: int = 0
    slot: str = ""
    transposed: bool = False

    def trained(self, module: nn.Module) -> bool:
        """Whether the weight is a plain parameter, and trained."""
        return is_trained(module, self.weight)

    def has_bias(self, module: nn.Module) -> bool:
        """Whether the block has a bias column."""
        return not self.weight_only and is_trained(module, self.bias)

    def parameters(self, module: nn.Module) -> list[nn.Parameter]:
        """The whole parameters that the part belongs to."""
        names = [self.weight, self.bias] if self.has_bias(module) else [self.weight]
        return [getattr(module, name) for name in names if name]

    def parts(self, tensors: list[Tensor]) -> list[Tensor]:
        """The rows, as (size, in) and (size,)."""
        weight, *bias = tensors
        if self.transposed:
            return [weight.mT, *bias]
        return [weight[self.start : self.start + self.size], *(b[self.offset : self.offset + self.size] for b in bias)]

    def pack(self, module: nn.Module, tensors: list[Tensor]) -> Tensor:
        """[W | b] of the rows of whole tensors."""
        return super().pack(module, self.parts(tensors))

    def within(self, parameter: Tensor, w: Tensor) -> slice | None:
        """Where the part's rows are among those of w (out, in), rows of the weight; ``None`` if they are elsewhere."""
        mine = self.parts([parameter])[0]
        if w.shape[1:] != mine.shape[1:] or w.stride() != mine.stride():
            return None
        start = (mine.storage_offset() - w.storage_offset()) // max(1, mine.stride(0))
        return slice(start, start + self.size) if 0 <= start <= len(w) - self.size else None


Rule = Callable[..., Any]
"""An operation as torch has it, with ``exposed`` in front: the same result, by way of ``exposed.linear``."""


class Exposed(TorchFunctionMode):
    """While active, operations that hide a product with a weight of ``users`` run as one that is seen.

    ``users`` are (key, weight, part). ``saw(key, x, y, read)`` is told the input x (n, ..., in) and the output y of
    every product with a part's weight; ``read`` brings gradients like y into the form (n, ..., out).
    ``unread(key, reason)`` is told of a weight that was used in a way that cannot be followed. Nothing is computed
    otherwise than torch would, but for the recurrences, whose fused kernels become products: equal to rounding, with
    the same random numbers (cuDNN's dropout between layers has its own).
    """

    def __init__(
        self,
        users: Iterable[tuple[Any, Tensor, LinearPart]],
        rules: Mapping[Any, Rule],
        saw: Callable[[Any, Tensor, Tensor, Read], None],
        unread: Callable[[Any, str], None],
    ) -> None:
        super().__init__()
        self._saw, self._unread, self._rules = saw, unread, rules
        self._users: dict[int, list[tuple[Any, Tensor, LinearPart]]] = {}
        for user in users:
            self._users.setdefault(id(user[1]), []).append(user)

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
        whole = read or _batched
        for key, rows in self._used(w):
            self._saw(key, whole(x.detach()), y, partial(_rows, whole, rows))

    def unread(self, w: Tensor, reason: str) -> None:
        """Record that what w was used for is not known."""
        for key, _ in self._used(w):
            self._unread(key, reason)

    def _used(self, w: Tensor) -> Iterator[tuple[Any, slice]]:
        whole = w if id(w) in self._users else w._base
        for key, weight, part in self._users.get(id(whole), ()):
            rows = part.within(weight, w)
            if rows is not None:
                yield key, rows


def linear(exposed: Exposed, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear``; a product of two parameters is none with data."""
    if _is_parameter(input):
        exposed.unread(weight, "multiplied with another parameter")
        return F.linear(input, weight, bias)
    return exposed.linear(input, weight, bias)


def matmul(exposed: Exposed, input: Tensor, other: Tensor, **kwargs: Any) -> Tensor:
    """``torch.matmul`` and ``@``, for a right factor W^T."""
    y = torch.matmul(input, other, **kwargs)
    if other.ndim == 2 and _is_parameter(input):
        exposed.unread(other.mT, "multiplied with another parameter")
    elif other.ndim == 2:
        exposed.saw(input, other.mT, y)
    return y


def _is_parameter(x: Tensor) -> bool:
    whole = x if x._base is None else x._base
    return isinstance(whole, nn.Parameter) and whole.numel() == x.numel()


def _rows(read: Read, rows: slice, g: Tensor) -> Tensor:
    return read(g[..., rows])


def _batched(x: Tensor) -> Tensor:
    return x if x.ndim > 1 else x.unsqueeze(0)


RULES: dict[Any, Rule] = {F.linear: linear, **dict.fromkeys((torch.matmul, torch.Tensor.matmul), matmul)}
