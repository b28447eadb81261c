"""One use of a weight in one operation: what was read of it, and where its output stands in the graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from natgrad.layers.form import Form
from natgrad.layers.product import Product
from natgrad.layers.view import View

Read = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Operand:
    """What an operation was given: ``factor`` times a view of a parameter, plus any constant."""

    parameter: nn.Parameter
    view: View
    factor: float = 1.0

    @property
    def trained(self) -> bool:
        """Whether the parameter is."""
        return self.parameter.requires_grad

    def rows(self, start: int, stop: int) -> Operand:
        """Some entries of the first dimension."""
        return Operand(self.parameter, self.view.rows(start, stop), self.factor)


@dataclass
class Call:
    """An operation on a weight, and perhaps a bias, at what was read of its input.

    ``x`` is (positions..., *inner); ``read`` brings the output, or its gradient, into the form (positions...,
    *outer), one gradient for every seed. ``kept`` (positions...) says which positions exist, where not all do.
    ``version`` is that of the input when it was read. ``shape`` is that of the output, where a bias is added.
    ``first``: the examples are known to be the first dimension of the positions; ``shared``: the input does not depend
    on the examples, which share all positions.
    """

    weight: Operand
    bias: Operand | None
    form: Form
    operation: str
    x: Tensor
    read: Read
    edge: GradientEdge | None
    version: int = 0
    part: str = ""
    kept: Tensor | None = None
    shape: torch.Size | None = None
    first: bool = False
    shared: bool = False
    gradients: list[Tensor | None] = field(default_factory=list)

    @property
    def told(self) -> tuple[Any, ...]:
        """What the layers follow from."""
        bias = self.bias and (id(self.bias.parameter), self.bias.view)
        return id(self.weight.parameter), self.weight.view, bias, self.form, self.operation, self.part

    @property
    def sizes(self) -> torch.Size:
        """The dimensions of positions."""
        return self.x.shape[: self.x.ndim - self.form.inner]

    def gradient(self, seed: int) -> Tensor:
        """That of one seed, (positions..., *outer); zeros where this seed does not reach the operation."""
        found = self.gradients[seed]
        if found is None:
            found = torch.zeros_like(next(g for g in self.gradients if g is not None))
        g = self.read(found)
        return g if self.weight.factor == 1.0 else g * self.weight.factor

    @property
    def reached(self) -> bool:
        """Whether any seed reaches it."""
        return any(g is not None for g in self.gradients)

    def of_bias(self) -> Call:
        """The same operation as a use of its bias, which is added."""
        assert self.bias is not None and self.shape is not None
        dtype = self.x.dtype if self.x.is_floating_point() else torch.get_default_dtype()
        read, features = self.read, self.form.features
        one = torch.ones((), dtype=dtype, device=self.x.device)
        ones = one.expand(*features(read(one.expand(self.shape))).shape[:-1], 1)  # where it is added
        form = Product(outs=tuple(range(len(self.bias.view.size))), ins=())
        return replace(
            self, weight=self.bias, bias=None, form=form, x=ones, read=lambda y: features(read(y)), version=0
        )
