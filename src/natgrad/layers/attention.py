"""nn.MultiheadAttention: its projections, packed or not, and the one of its output; none of them is called."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from natgrad.layers.base import Adapter
from natgrad.layers.functional import Exposed, LinearPart, Rule
from natgrad.layers.linear import SequenceLinear
from natgrad.layers.norm import SequenceNorm


def attention_parts(module: nn.Module) -> dict[str, tuple[nn.Module, LinearPart]]:
    """The blocks of q, k and v, rows of ``in_proj_weight`` where all widths agree, and that of ``out_proj``."""
    assert isinstance(module, nn.MultiheadAttention)
    width, bias = module.embed_dim, None if module.in_proj_bias is None else "in_proj_bias"
    parts: dict[str, tuple[nn.Module, LinearPart]] = {}
    for number, letter in enumerate("qkv"):
        first = number * width
        if module._qkv_same_embed_dim:
            part = LinearPart("in_proj_weight", bias, width, first, first, f"{letter}.")
        else:
            part = LinearPart(f"{letter}_proj_weight", bias, width, 0, first)
        parts[f"in_proj.{letter}"] = module, part
    return {**parts, "out_proj": (module.out_proj, LinearPart("weight", "bias", width))}


def sequence_parts(module: nn.Module) -> dict[str, tuple[nn.Module, Adapter]]:
    """The dense layers and norms of torch's Transformer, called on sequences as its attention is."""
    blocks: Any = [module]
    if isinstance(module, (nn.TransformerEncoder, nn.TransformerDecoder)):
        blocks = [block for block in module.layers if isinstance(block, _BLOCKS)]
    if not blocks or not isinstance(blocks[0], _BLOCKS):
        return {}
    batch_first = blocks[0].self_attn.batch_first
    dense, norm = SequenceLinear(batch_first), SequenceNorm(batch_first)
    inner = {name: getattr(module, name, None) for name in ("linear1", "linear2", "norm", "norm1", "norm2", "norm3")}
    parts: dict[str, tuple[nn.Module, Adapter]] = {}
    for name, part in inner.items():
        if isinstance(part, nn.Linear) and type(part).forward is nn.Linear.forward:
            parts[name] = part, dense
        elif isinstance(part, nn.LayerNorm) and type(part).forward is nn.LayerNorm.forward:
            parts[name] = part, norm
    return parts


_BLOCKS = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)


@torch.compiler.disable  # it cannot follow functions made at run time
def attention(exposed: Exposed, query: Tensor, *args: Any, **kwargs: Any) -> Any:
    """``F.multi_head_attention_forward``: torch's own code, its projections seen; they are of (l, n, E) or (l n, E)."""
    n = query.shape[1] if query.ndim == 3 else 1

    def examples_first(x: Tensor) -> Tensor:
        return x.reshape(-1, n, x.shape[-1]).transpose(0, 1)

    def linear(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        return exposed.linear(x, w, b, examples_first)

    return _with(linear, F.multi_head_attention_forward)(query, *args, **kwargs)


def _with(linear: Callable[..., Tensor], function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of ``torch.nn.functional`` that takes ``linear`` for ``F.linear``, as do the helpers that it calls."""
    scope = {**vars(F), "linear": linear}
    for helper in (function, *(scope[name] for name in ("_in_projection_packed", "_in_projection"))):
        assert isinstance(helper, FunctionType)
        mine = FunctionType(helper.__code__, scope, helper.__name__, helper.__defaults__, helper.__closure__)
        mine.__kwdefaults__ = helper.__kwdefaults__
        scope[helper.__name__] = mine
    return scope[function.__name__]


RULES: dict[Any, Rule] = {F.multi_head_attention_forward: attention}
