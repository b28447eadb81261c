"""The step that a layer takes along its direction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from natgrad.layers import Layer


@dataclass(frozen=True)
class Move:
    """The direction D of a layer: ``factor`` times tensors like the parts of its parameters."""

    tensors: Sequence[Tensor]
    factor: float = 1.0


def take(layer: Layer, move: Move | None, state: Mapping[Any, Mapping[str, Any]], group: Mapping[str, Any]) -> None:
    """P <- momentum P + D, theta <- theta - lr P; what stands still, for want of a gradient or of lr, has P = 0.

    P is the ``momentum`` in the state of every parameter.
    """
    parameters = layer.parameters
    momenta = layer.parts([state[p]["momentum"] for p in parameters])
    if move is None or not group["lr"]:
        for P in momenta:
            P.zero_()
        return
    for theta, P, D in zip(layer.parts(list(parameters)), momenta, move.tensors, strict=True):
        P.mul_(group["momentum"]).add_(D, alpha=move.factor)
        ahead = torch.add(group["momentum"] * P, D, alpha=move.factor) if group["nesterov"] else P
        if group["weight_decay"]:
            theta.mul_(1 - group["lr"] * group["weight_decay"])
        theta.add_(ahead, alpha=-group["lr"])
