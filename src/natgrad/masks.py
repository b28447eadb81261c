"""Masks: which positions of the examples exist. Others count in no loss term and send nothing back."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

Mask = str | Callable[..., Tensor | None] | None
"""Which positions (n, t) of the examples exist: the name of an argument of the model, or a function of all of them."""


def checked_mask(model: nn.Module, mask: Mask, methods: Iterable[str] = ()) -> Mask:
    """The mask itself; ``TypeError`` for none of its kinds, ``ValueError`` for a name that is no argument of forward or
    of one of the methods."""
    if mask is None or callable(mask):
        return mask
    if not isinstance(mask, str):
        raise TypeError(
            f"mask must be the name of an argument of the model, or a function of all of them, got {mask!r}"
        )
    own = inspect.signature(model.forward).parameters
    others = (inspect.signature(getattr(model, name)).parameters for name in methods if hasattr(model, name))
    if not any(mask in some or any(p.kind is p.VAR_KEYWORD for p in some.values()) for some in (own, *others)):
        raise ValueError(f"mask={mask!r} is no argument of the model, whose forward takes {', '.join(own)}")
    return mask


def existing(function: Callable[..., Any], mask: Mask, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The mask (n, t) of a call of a function, as booleans; ``ValueError`` for what is none."""
    if mask is None:
        return None
    if callable(mask):
        found = mask(*args, **kwargs)
    else:
        found = kwargs[mask] if mask in kwargs else _argument(function, mask, args)
    if found is not None and (not isinstance(found, Tensor) or found.ndim != 2):
        got = f"one of shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(f"mask must lead to a tensor (n, t) that is not 0 where a position exists, got {got}")
    return None if found is None else found != 0


def _argument(function: Callable[..., Any], name: str, args: tuple[Any, ...]) -> Any:
    """An argument by its name, ``None`` where it is not given."""
    names = list(inspect.signature(function).parameters)
    return args[names.index(name)] if name in names and names.index(name) < len(args) else None


def masks(mask: Tensor, output: Any) -> bool:
    """Whether the positions of a mask are those of an output (n, t, ...)."""
    return isinstance(output, Tensor) and output.ndim > 2 and output.shape[:2] == mask.shape


def masked(seed: Tensor, mask: Tensor) -> Tensor:
    """A seed (n, t, ...) that is 0 at positions that do not exist."""
    return seed * mask.view(*mask.shape, *(1,) * (seed.ndim - 2)).to(seed.dtype)


def weighted(terms: Tensor | float, mask: Tensor | None, output: Any) -> Tensor | float:
    """The weights of loss terms, 0 at positions that do not exist."""
    if mask is None or not masks(mask, output):
        return terms
    weights = mask.to(output.dtype)
    return weights * (terms if isinstance(terms, Tensor) else terms / mask.shape[1])
