"""Rules of embeddings, bags of them, and of parameters that are indexed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from natgrad.layers.lookup import BagLookup, Lookup, bags
from natgrad.layers.view import View
from natgrad.operations.registry import rule, spelled
from natgrad.operations.watch import Watch

_SCALED = "embedding with scale_grad_by_freq: not the gradient of the loss"


@rule(F.embedding)
def embedding(
    watch: Watch,
    func: Any,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """Rows of W; that of ``padding_idx`` has no gradient."""
    rest = (padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)
    if scale_grad_by_freq:
        return watch.unread(func, input, weight, *rest, name=_SCALED)
    size = weight.shape[0]
    form = Lookup(size, None if padding_idx is None else padding_idx % size)
    return watch.product(form, weight, None, input, lambda w, _: func(input, w, *rest), operation="embedding")


@rule(F.embedding_bag)
def embedding_bag(
    watch: Watch,
    func: Any,
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    """Sums or means of rows of W."""
    rest = (
        offsets, max_norm, norm_type, scale_grad_by_freq, mode, sparse, per_sample_weights, include_last_offset,
        padding_idx,
    )  # fmt: skip
    if scale_grad_by_freq or mode == "max":
        name = "embedding_bag: mode 'max' is not linear in the weight" if mode == "max" else _SCALED
        return watch.unread(func, input, weight, *rest, name=name)
    if not input.is_floating_point() and watch.operand(weight) is None:
        return func(input, weight, *rest)
    size = weight.shape[0]
    padding = None if padding_idx is None else padding_idx % size
    starts = offsets[:-1] if include_last_offset and offsets is not None else offsets
    x = _bags(input, starts, per_sample_weights, padding, mode == "mean")
    compute = lambda w, _: func(input, w, *rest)  # noqa: E731
    return watch.product(BagLookup(size, padding), weight, None, x, compute, operation="embedding_bag")


@rule(*spelled("__getitem__"))
def indexed(watch: Watch, func: Any, weight: Tensor, index: Any) -> Tensor:
    """Rows of a parameter by their numbers."""
    if not (isinstance(index, Tensor) and index.dtype in (torch.int64, torch.int32)) or watch.operand(weight) is None:
        y = func(weight, index)
        watch.other(func, (weight,), y)
        return y
    if index.ndim == 0:
        return _part(watch, weight, int(index), func(weight, index))
    return _rows(watch, weight, index, lambda w: func(w, index))


@rule(*spelled("index_select"), always=True)
def index_select(watch: Watch, func: Any, weight: Tensor, dim: int, index: Tensor) -> Tensor:
    """The same along the first dimension."""
    if dim != 0 or watch.operand(weight) is None:
        y = func(weight, dim, index)
        watch.other(func, (weight,), y)
        watch.selected = y, index
        return y
    return _rows(watch, weight, index, lambda w: func(w, dim, index))


def _part(watch: Watch, weight: Tensor, number: int, y: Tensor) -> Tensor:
    """One entry of the first dimension, such as the matrix of an expert, which stands for the view that it copies."""
    operand = watch.operand(weight)
    assert operand is not None
    view = operand.view
    offset = view.offset + number % view.size[0] * view.stride[0]
    watch.alias(y, replace(operand, view=View(view.size[1:], view.stride[1:], offset)))
    return y


def _rows(watch: Watch, weight: Tensor, index: Tensor, compute: Any) -> Tensor:
    size, x = weight.shape[0], index % weight.shape[0]

    def read(y: Tensor) -> Tensor:
        return y.reshape(*index.shape, -1)

    return watch.product(Lookup(size), weight, None, x, lambda w, _: compute(w), read, operation="index")


def _bags(ids: Tensor, starts: Tensor | None, weights: Tensor | None, padding: int | None, mean: bool) -> Tensor:
    """The ids of every bag, filled up to the largest, and the float64 weights of its entries."""
    w = torch.ones_like(ids, dtype=torch.float64) if weights is None else weights.detach().double()
    if ids.ndim == 1:
        assert starts is not None
        ids, w = (_filled(x, starts) for x in (ids, w))
    if padding is not None:
        w = w * (ids != padding)
    if mean:
        w = w / (w != 0).sum(-1, keepdim=True).clamp(min=1)
    return bags(ids, w)


def _filled(x: Tensor, starts: Tensor) -> Tensor:
    """The entries x (m,) of bags that start at ``starts`` (n,), one bag a row, filled up with zeros."""
    place = torch.arange(len(x), device=x.device)
    bag = torch.searchsorted(starts.contiguous(), place.to(starts.dtype), right=True) - 1
    slot = place - starts[bag]
    k = int(slot.max()) + 1 if len(x) else 1
    return x.new_zeros(len(starts), k).index_put((bag, slot), x)
