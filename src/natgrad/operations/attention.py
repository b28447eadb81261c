"""The rule of ``F.multi_head_attention_forward``: its projections are seen, packed or not."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from natgrad.layers.product import LINEAR
from natgrad.operations.registry import rule
from natgrad.operations.watch import Watch


@rule(F.multi_head_attention_forward)
def attention(watch: Watch, func: Any, query: Tensor, *args: Any, **kwargs: Any) -> Any:
    """torch's own code, with products that are seen; they are of (l, n, E) or (l n, E).

    A packed projection is one product, read as those of q, k and v.
    """
    query = watch.data(query)
    args = tuple(watch.data(x) for x in args)
    kwargs = {name: watch.data(x) for name, x in kwargs.items()}
    n = query.shape[1] if query.ndim == 3 else 1
    if query.ndim == 3:
        watch.batches.append((n, 1 if query.stride(0) >= query.stride(1) else 0))
    width = query.shape[-1]

    def linear(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        y = F.linear(x, w, b)
        whole = watch.operand(w)
        if whole is None or whole.view.size[0] == whole.parameter.shape[0] == width:
            watch.saw(LINEAR, w, b, _first(x, n), y, lambda g: _first(g, n), first=True)
            return y
        for k in range(len(w) // width):
            rows = slice(k * width, (k + 1) * width)
            start = whole.view.offset // (width * w.shape[1])
            read = _rows(n, rows)
            bias = None if b is None else b[rows]
            watch.saw(LINEAR, w[rows], bias, _first(x, n), y, read, part="qkv"[start + k], first=True)
        return y

    y = _with(linear, F.multi_head_attention_forward)(query, *args, **kwargs)
    given = inspect.signature(func).bind(query, *args, **kwargs).arguments
    for name in ("query", "key", "value", "bias_k", "bias_v"):
        watch.stray(given.get(name), f"{func.__name__} as {name}", y[0])
    return y


def _first(x: Tensor, n: int) -> Tensor:
    """(l, n, E) or (l n, E) as (n, l, E)."""
    return x.reshape(-1, n, x.shape[-1]).transpose(0, 1)


def _rows(n: int, rows: slice) -> Callable[[Tensor], Tensor]:
    return lambda g: _first(g[..., rows], n)


def _with(linear: Callable[..., Tensor], function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of ``torch.nn.functional`` that takes ``linear`` for ``F.linear``, as do the helpers that it calls."""
    scope = {**vars(F), "linear": linear}
    for helper in (function, *(scope[name] for name in ("_in_projection_packed", "_in_projection"))):
        assert isinstance(helper, FunctionType)
        mine = FunctionType(helper.__code__, scope, helper.__name__, helper.__defaults__, helper.__closure__)
        mine.__kwdefaults__ = helper.__kwdefaults__
        scope[helper.__name__] = mine
    return scope[function.__name__]
