"""Hooks that a user puts on tensors in a pass do not run when gradients are sent back that are not the user's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from natgrad.hooks import Quiet
from natgrad.operations.registry import rule
from natgrad.operations.watch import Watch


@rule(torch.Tensor.register_hook, always=True)
def register_hook(watch: Watch, func: Any, tensor: Tensor, hook: Any) -> Any:
    """The hook, made quiet."""
    return func(tensor, Quiet(hook))


@rule(torch.Tensor.retain_grad, always=True)
def retain_grad(watch: Watch, func: Any, tensor: Tensor) -> None:
    """Remembers the tensor, whose ``.grad`` what is sent back must not fill."""
    watch.retained.append(tensor)
    func(tensor)
