"""What an entry of the list is, and how its model is built."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Built = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]


def same(value: Any) -> Tensor:
    """The output of a model that returns a tensor."""
    return value


@dataclass(frozen=True)
class Entry:
    """A model: how it is built, how logits (n, ...) are read from its output, and where its inputs have the examples.

    ``dim`` is ``None`` where examples share an input, as the nodes of one graph do. ``single`` is for models that have
    an operation without float64.
    """

    family: str
    name: str
    build: Callable[[], Built]
    output: Callable[[Any], Tensor] = same
    dim: int | None = 0
    single: bool = False


def images(size: int) -> Tensor:
    """Two of them."""
    return torch.randn(2, 3, size, size)


def less(options: dict[str, Any], *names: str) -> dict[str, Any]:
    """The options without these."""
    return {key: value for key, value in options.items() if key not in names}


def in_double(value: Any) -> Any:
    """A tensor in double precision, complex ones too; indices as they are."""
    if not isinstance(value, Tensor) or not (value.is_floating_point() or value.is_complex()):
        return value
    return value.to(torch.complex128 if value.is_complex() else torch.float64)


def stir(model: nn.Module) -> None:
    """Move weights that start as one constant: zeros and small scales would hide what lies behind them."""
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad and bool((p == p.flatten()[0]).all()):
                p.add_(0.1 * torch.randn_like(p))


def built(entry: Entry, seed: int = 0) -> Built:
    """The model and its inputs, in float64 unless it cannot be, with all random numbers from ``seed``."""
    torch.manual_seed(seed)
    model, args, kwargs = entry.build()
    if not entry.single:
        model._apply(in_double)
        args = tuple(map(in_double, args))
        kwargs = {key: in_double(value) for key, value in kwargs.items()}
    stir(model)
    return model, args, kwargs
