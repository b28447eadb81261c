"""The rule of ``F.multi_head_attention_forward``: its projections are seen, packed or not."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from natgrad.layers.product import LINEAR
from natgrad.operations.registry import rule
from natgrad.operations.watch import Watch


@rule(F.multi_head_attention_forward)
def attention(
    watch: Watch,
    func: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    *more: Any,
    **kwargs: Any,
) -> Any:
    """torch's own code, with products that are seen; they are of (l, n, E) or (l n, E).

    A packed projection is one product, read as those of q, k and v.
    """
    query, key, value, bias_k, bias_v = map(watch.data, (query, key, value, bias_k, bias_v))
    weight, bias, *rest = map(watch.data, (in_proj_weight, in_proj_bias, *more))
    kwargs = {name: watch.data(x) for name, x in kwargs.items()}
    n = query.shape[1] if query.ndim == 3 else 1
    if query.ndim == 3:
        watch.batches.append((n, 1 if query.stride(0) >= query.stride(1) else 0))
    width = query.shape[-1]

    def linear(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        y = F.linear(x, w, b)
        whole, added, inputs = watch.operand(w), watch.operand(b), _first(x.detach(), n)
        if whole is None or whole.view.size[0] == whole.parameter.shape[0] == width:
            watch.saw(LINEAR, whole, added, inputs, y, lambda g: _first(g, n), first=True)
            return y
        for k in range(len(w) // width):
            rows = k * width, (k + 1) * width
            start = whole.view.offset // (width * w.shape[1])
            part = added and added.rows(*rows)
            watch.saw(LINEAR, whole.rows(*rows), part, inputs, y, _rows(n, *rows), part="qkv"[start + k], first=True)
        return y

    args = query, key, value, embed_dim_to_check, num_heads, weight, bias, bias_k, bias_v, *rest
    y = _with(linear, F.multi_head_attention_forward)(*args, **kwargs)
    for name, x in (("query", query), ("key", key), ("value", value), ("bias_k", bias_k), ("bias_v", bias_v)):
        watch.stray(x, f"{func.__name__} as {name}", y[0])
    return y


def _first(x: Tensor, n: int) -> Tensor:
    """(l, n, E) or (l n, E) as (n, l, E)."""
    return x.reshape(-1, n, x.shape[-1]).transpose(0, 1)


def _rows(n: int, start: int, stop: int) -> Callable[[Tensor], Tensor]:
    return lambda g: _first(g[..., start:stop], n)


def _with(linear: Callable[..., Tensor], function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of ``torch.nn.functional`` that takes ``linear`` for ``F.linear``, as do the helpers that it calls."""
    scope = {**vars(F), "linear": linear}
    for helper in (function, *(scope[name] for name in ("_in_projection_packed", "_in_projection"))):
        assert isinstance(helper, FunctionType)
        mine = FunctionType(helper.__code__, scope, helper.__name__, helper.__defaults__, helper.__closure__)
        mine.__kwdefaults__ = helper.__kwdefaults__
        scope[helper.__name__] = mine
    return scope[function.__name__]
