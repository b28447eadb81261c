"""What a step would change, the change, and what is kept of it in the optimizer's state."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from natgrad.layers import Layer
from natgrad.optim.curvature import LayerCurvature
from natgrad.optim.layerwise import State
from natgrad.optim.step_size import Decision


@dataclass(frozen=True)
class Proposal:
    """Everything a step would change, computed before anything is.

    ``moves`` are the directions D of the layers, as tensors like their parameters.
    """

    curvature: State
    moves: Mapping[str, Sequence[Tensor]]
    decision: Decision
    drift: float
    lr: float


def move(
    proposal: Proposal, layers: Mapping[str, Layer], state: Mapping[Any, dict[str, Any]], settings: Mapping[int, Any]
) -> None:
    """P <- mu P + alpha D, theta <- theta - lr P; what stands still, for want of a gradient or of lr, has P = 0.

    P is the ``momentum`` in the state of a layer's weight; ``settings`` are the groups of parameters by their ids.
    """
    alpha, mu = proposal.decision.alpha, proposal.decision.mu
    for name, layer in layers.items():
        parameters = layer.parameters
        P, group = state[parameters[0]][f"{layer.slot}momentum"], settings[id(parameters[0])]
        moves = proposal.moves.get(name)
        if moves is None or not group["lr"]:
            P.zero_()
        if moves is None:
            continue
        for parameter, step, D in zip(layer.parts(list(parameters)), layer.unpack(P), moves, strict=True):
            if group["lr"]:
                step.mul_(mu).add_(D, alpha=alpha)
            if group["nesterov"]:
                step = torch.add(mu * step, D, alpha=alpha)
            if group["weight_decay"]:
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.add_(step, alpha=-proposal.lr)


def remember_layer(layer: Layer, curvature: LayerCurvature, state: MutableMapping[Any, dict[str, Any]]) -> None:
    """Every parameter gets an entry, and every layer all of its names: distributed checkpoints ask for both."""
    weight, *others = layer.parameters
    for p in others:
        state.setdefault(p, {})
    own, momentum = state[weight], f"{layer.slot}momentum"
    own.update({f"{layer.slot}{name}": value for name, value in curvature.state().items()})
    if momentum not in own or own[momentum].numel() != curvature.inverse.shape.numel():
        own[momentum] = torch.zeros(layer.shape, dtype=weight.dtype, device=weight.device)


def restore_dtypes(groups: Iterable[Mapping[str, Any]], state: Mapping[Any, dict[str, Any]], saved: Any) -> None:
    """Undo torch's cast of all state to the dtype of the parameter: statistics of bfloat16 layers are float32."""
    keys = (key for group in saved["param_groups"] for key in group["params"])
    for key, p in zip(keys, (p for group in groups for p in group["params"]), strict=True):
        for name, value in saved["state"].get(key, {}).items():
            if isinstance(value, Tensor) and value.dtype != state[p][name].dtype:
                state[p][name] = value.to(p.device)
