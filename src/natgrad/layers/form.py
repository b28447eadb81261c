"""How an operation uses its weight: as a map from inputs (in) to outputs (out), at positions of examples."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from natgrad.sparse import Sparse


@dataclass(frozen=True)
class Form(ABC):
    """How one kind of operation computes s = W a.

    A form is a value: it says all that is needed to read an operation, and holds no tensor. The *operand* is the
    parameter as the operation was given it, or a view of it; the *block* is the operand as (*groups, out, in). What was
    read of a call, ``x``, and an output ``y`` have their positions in front, the examples being one of those
    dimensions; ``inner`` and ``outer`` count the dimensions after them. Below, x and y have their examples first.
    """

    inner: ClassVar[int] = 1
    outer: ClassVar[int] = 1
    tokens: ClassVar[bool] = False
    """Whether inputs are tokens, which :meth:`sparse` reads: their covariance is diagonal."""
    thins: ClassVar[bool] = False
    """Whether any positions of an example may be left out: :meth:`some` and :meth:`index` then say how."""

    @property
    def layout(self) -> tuple[Any, ...]:
        """What :meth:`matrix` depends on: forms of one layout have one block."""
        return (type(self).__name__,)

    @abstractmethod
    def matrix(self, operand: Tensor) -> Tensor:
        """The operand as (*groups, out, in): a view where there is one."""

    @abstractmethod
    def operand(self, matrix: Tensor, shape: torch.Size) -> Tensor:
        """The inverse of :meth:`matrix`, for an operand of this shape."""

    @abstractmethod
    def inputs(self, x: Tensor, biased: bool) -> Tensor:
        """What was read, (n, ...), as a (*groups, n, t, in); with the input of the bias last, if ``biased``."""

    @abstractmethod
    def outputs(self, y: Tensor) -> Tensor:
        """An output, (n, ...), as (*groups, n, t, out)."""

    @abstractmethod
    def product(self, operand: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
        """The output (n, ...) for what was read, with another operand and bias."""

    def places(self, y: Tensor) -> int:
        """The number t of positions of an output (n, ...)."""
        return self.outputs(y).shape[-2]

    def some(self, x: Tensor, biased: bool, stride: int, turn: int) -> Tensor:
        """:meth:`inputs` at every ``stride``-th position, the ``turn``-th choice of them, without the others."""
        if x.ndim <= self.inner + 1:
            return self.inputs(x, biased)
        return self.inputs(every(x.flatten(1, x.ndim - self.inner - 1), stride, turn), biased)

    def index(self, y: Tensor, stride: int, turn: int) -> Tensor:
        """The positions that :meth:`some` reads of an output (n, ...)."""
        return every(torch.arange(self.places(y), device=y.device).unsqueeze(0), stride, turn).squeeze(0)

    def features(self, y: Tensor) -> Tensor:
        """An output with all the dimensions that a bias has as the last one, the others being positions."""
        return y

    def sparse(self, x: Tensor) -> Sparse | None:
        """The inputs of ``tokens``, of which few entries are not zero, and which are never written out in training."""
        return None

    def cast(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """What was read, for products in another precision."""
        return x.to(dtype)

    def values(self) -> list[Any]:
        """The fields, as a checkpoint keeps them."""
        return [_plain(getattr(self, field.name)) for field in fields(self)]


FORMS: dict[str, type[Form]] = {}
"""The kinds of forms by name, for checkpoints."""


def form(kind: type[Form]) -> type[Form]:
    """Enter a class of forms, a frozen dataclass, into :data:`FORMS`."""
    FORMS[kind.__name__] = kind
    return kind


def with_ones(a: Tensor, biased: bool) -> Tensor:
    """``a`` with a last column of ones, if there is a bias."""
    return torch.cat([a, a.new_ones(*a.shape[:-1], 1)], -1) if biased else a


def every(x: Tensor, stride: int, turn: int) -> Tensor:
    """Every ``stride``-th entry of the second dimension, of its length at most; from the ``turn``-th on, in turn."""
    stride = min(stride, x.shape[1])
    return x[:, turn % stride :: stride] if stride > 1 else x


def split(a: Tensor, groups: int) -> Tensor:
    """The last dimension (groups d) of ``a`` as groups in front."""
    return a if groups == 1 else a.unflatten(-1, (groups, -1)).movedim(-2, 0)


def _plain(value: Any) -> Any:
    return [_plain(part) for part in value] if isinstance(value, tuple) else value
