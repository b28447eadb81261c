"""Change the coordinates of a layer: parameters, gradients that wait for a step, and the momentum of SGD."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from natgrad.layers import Layer
from natgrad.reconstruction.metric import Metric

_VELOCITY = "momentum_buffer"


@torch.no_grad()
def carry(
    layer: Layer,
    old: Metric | None,
    new: Metric | None,
    optimizer: torch.optim.Optimizer | None = None,
    keep_velocity: bool = True,
) -> None:
    """From the coordinates of ``old`` to those of ``new``, ``None`` being W: the block and its velocity are mapped by
    S_new^-1 S_old, the gradient by the inverse transposed."""
    parameters = layer.parameters

    def to(block: Tensor) -> Tensor:
        block = old.S @ block if old else block
        return new.inverse @ block if new else block

    def back(gradient: Tensor) -> Tensor:
        gradient = old.inverse @ gradient if old else gradient
        return new.S @ gradient if new else gradient

    def mapped(tensors: list[Tensor | None], by: Callable[[Tensor], Tensor]) -> list[Tensor]:
        full = [torch.zeros_like(p) if t is None else t for p, t in zip(parameters, tensors, strict=True)]
        return layer.unpack(by(layer.pack(full)))

    for p, value in zip(parameters, mapped([p.detach() for p in parameters], to), strict=True):
        p.copy_(value)
    gradients = [p.grad for p in parameters]
    if any(gradient is not None for gradient in gradients):
        for p, gradient in zip(parameters, mapped(gradients, back), strict=True):
            p.grad = gradient.clone(memory_format=torch.contiguous_format)
    if optimizer is None:
        return
    velocities = [optimizer.state[p].get(_VELOCITY) if p in optimizer.state else None for p in parameters]
    if any(velocity is not None for velocity in velocities):
        for p, velocity in zip(parameters, mapped(velocities, to), strict=True):
            optimizer.state[p][_VELOCITY] = (
                velocity.clone(memory_format=torch.contiguous_format) if keep_velocity else None
            )


def check_optimizer(optimizer: torch.optim.Optimizer | None, layers: Iterable[Layer]) -> None:
    """Refuse an optimizer whose state cannot be mapped, or that steps other parameters."""
    if optimizer is None:
        return
    if not isinstance(optimizer, torch.optim.SGD):
        raise TypeError(f"optimizer must be a torch.optim.SGD, got a {type(optimizer).__name__}")
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if not any(id(p) in held for layer in layers for p in layer.parameters):
        raise ValueError("the optimizer holds no parameter of the reconstructed layers")
