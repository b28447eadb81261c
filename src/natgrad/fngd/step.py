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


def take(
    layer: Layer, move: Move | None, state: Mapping[Any, Mapping[str, Any]], settings: Mapping[int, Mapping[str, Any]]
) -> None:
    """P <- momentum P + D, theta <- theta - lr P; what stands still, for want of a gradient or of lr, has P = 0.

    P is the ``momentum`` in the state of every parameter; ``settings`` are the groups of parameters by their ids.
    """
    parameters = layer.parameters
    momenta = layer.parts([state[p]["momentum"] for p in parameters])
    directions = [None] * len(parameters) if move is None else move.tensors
    for p, theta, P, D in zip(parameters, layer.parts(list(parameters)), momenta, directions, strict=True):
        group = settings.get(id(p), settings[id(parameters[0])])
        if move is None or D is None or not group["lr"]:
            P.zero_()
            continue
        P.mul_(group["momentum"]).add_(D, alpha=move.factor)
        ahead = torch.add(group["momentum"] * P, D, alpha=move.factor) if group["nesterov"] else P
        if group["weight_decay"]:
            theta.mul_(1 - group["lr"] * group["weight_decay"])
        theta.add_(ahead, alpha=-group["lr"])
