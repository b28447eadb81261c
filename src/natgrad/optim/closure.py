"""What a step begins with: the user's closure, and gradients that can be read."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn


def evaluate(closure: Callable[[], Any] | None, failed: Callable[[], None]) -> Any:
    """What the closure returns, with gradients enabled; ``failed`` is called where it raises."""
    if closure is None:
        return None
    try:
        with torch.enable_grad():
            return closure()
    except BaseException:
        failed()
        raise


def write_out(parameters: Iterable[nn.Parameter]) -> None:
    """Make sparse gradients dense."""
    for p in parameters:
        if p.grad is not None and p.grad.is_sparse:
            p.grad = p.grad.to_dense()
