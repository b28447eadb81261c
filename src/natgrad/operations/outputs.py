"""Where the gradient of the output of an operation is found."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from natgrad.operations.call import Read


def found_at(y: Tensor, read: Read | None) -> tuple[Tensor, Read]:
    """Where the gradient of an output is found whatever happens to it in place: at y, or if it is a view of another
    tensor, at that."""
    base, read = y._base, read or _same
    if base is None or base.grad_fn is None or not base.is_contiguous():
        return y, read
    size, stride, offset = y.size(), y.stride(), y.storage_offset() - base.storage_offset()

    def within(g: Tensor) -> Tensor:
        g = g.contiguous()
        return read(g.as_strided(size, stride, g.storage_offset() + offset))

    return base, within


def edge_of(y: Tensor) -> GradientEdge:
    """``get_gradient_edge``, at once for what an operation of torch has made."""
    node = y.grad_fn
    if node is None or isinstance(node, torch._C._FunctionBase):
        return get_gradient_edge(y)
    return GradientEdge(node, y.output_nr)


def _same(y: Tensor) -> Tensor:
    return y
