"""What a step would change, the change, and what is kept of it in the optimizer's state."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from natgrad.layers import Layer, View
from natgrad.optim.averages import Averages
from natgrad.optim.budget import Account
from natgrad.optim.curvature import LayerCurvature
from natgrad.optim.layerwise import State
from natgrad.optim.step_size import Decision


@dataclass(frozen=True)
class Proposal:
    """Everything a step would change, computed before anything is.

    ``moves`` are the directions D of the layers, as blocks; ``averages`` their averaged gradients, where D comes from
    these. ``account`` is what curvature has cost, under a budget.
    """

    curvature: State
    moves: Mapping[str, Tensor]
    averages: Averages | None
    decision: Decision
    drift: float
    lr: float
    account: Account | None = None


@dataclass(frozen=True)
class Moves:
    """The changes of a step, computed: nothing is left to do that could fail.

    ``momenta`` are the new P of the layers, by weight and name in its state; ``changes`` are (part, decay, change,
    factor) of every part of a parameter: it becomes decay part + factor change.
    """

    momenta: list[tuple[nn.Parameter, str, Tensor]]
    changes: list[tuple[Tensor, float, Tensor, float]]

    def apply(self, state: MutableMapping[Any, dict[str, Any]]) -> None:
        """In place."""
        for weight, name, P in self.momenta:
            state[weight][name] = P
        for part, decay, change, factor in self.changes:
            if decay != 1.0:
                part.mul_(decay)
            part.add_(change, alpha=factor)


def moves_of(
    proposal: Proposal, layers: Mapping[str, Layer], state: Mapping[Any, dict[str, Any]], settings: Mapping[int, Any]
) -> Moves:
    """P <- mu P + alpha D, theta <- theta - lr P; what stands still, for want of a gradient or of lr, has P = 0.

    P is the ``momentum`` in the state of a layer's weight; ``settings`` are the groups of parameters by their ids.
    Where D comes from averaged gradients, P is that average, and theta <- theta - lr alpha D.
    """
    mu, alpha = proposal.decision.mu, proposal.decision.alpha
    moves = Moves([], [])
    for name, layer in layers.items():
        parameters = layer.parameters
        key, group = f"{layer.slot}momentum", settings[id(parameters[0])]
        P, D = state[parameters[0]].get(key), proposal.moves.get(name)
        if P is None or P.shape != layer.shape:
            P = torch.zeros(layer.shape, dtype=layer.weight.dtype, device=layer.weight.device)
        if D is None or not group["lr"]:
            P = torch.zeros_like(P, dtype=layer.weight.dtype)
        if D is not None and proposal.averages is not None:
            P = proposal.averages.V[name]
            moves.momenta.append((parameters[0], f"{layer.slot}squares", proposal.averages.squares[name]))
        elif D is not None and group["lr"]:
            P = torch.mul(P, mu).to(D.dtype).add_(D, alpha=alpha)
        if f"{layer.slot}squares" not in state[parameters[0]] and proposal.averages is None:
            blank = torch.zeros(2, device=layer.weight.device)
            moves.momenta.append((parameters[0], f"{layer.slot}squares", blank))
        moves.momenta.append((parameters[0], key, P))
        if D is None:
            continue
        if proposal.averages is not None:
            step = alpha * D
        else:
            step = torch.add(mu * P, D, alpha=alpha) if group["nesterov"] else P
        for p, view, change in zip(parameters, layer.views, layer.unpack(step), strict=True):
            own = settings.get(id(p), group)
            decay = 1 - own["lr"] * own["weight_decay"] if own["weight_decay"] else 1.0
            relative = 1.0 if own is group or not group["lr"] else own["lr"] / group["lr"]
            moves.changes.append(_change(p, view, decay, change, -proposal.lr * relative))
    return moves


def _change(
    p: nn.Parameter, view: View, decay: float, change: Tensor, factor: float
) -> tuple[Tensor, float, Tensor, float]:
    """What :class:`Moves` does to a part of p: in place, or where p is not contiguous, by a change of all of it."""
    part = view.of(p)
    if part.untyped_storage().data_ptr() == p.untyped_storage().data_ptr():
        return part, decay, change, factor
    total = torch.zeros(p.shape, dtype=p.dtype, device=p.device)
    view.of(total).copy_((decay - 1) * part + factor * change)
    return p, 1.0, total, 1.0


@contextmanager
def whole(parameters: Iterable[nn.Parameter], state: MutableMapping[Any, dict[str, Any]]) -> Iterator[None]:
    """What is done to parameters and their state here is done whole, or taken back."""
    chosen = list(parameters)
    before = [(p, p.clone(), _copied(state.get(p, {}))) for p in chosen]
    try:
        yield
    except BaseException:
        for p, values, own in before:
            p.copy_(values)
            state[p] = own
        raise


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C waits for the end of this, which is short."""
    handler = signal.getsignal(signal.SIGINT)
    if not callable(handler) or threading.current_thread() is not threading.main_thread():
        yield  # it is not heard here
        return
    came: list[Any] = []
    signal.signal(signal.SIGINT, lambda *call: came.append(call))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if came:
            handler(*came[0])


def _copied(own: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in own.items()}


@contextmanager
def keeping(layers: Iterable[Layer], parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Set back what of these parameters is in one of the layers: the rest of them is stepped by another rule."""
    chosen = {id(p) for p in parameters}
    parts = [
        part
        for layer in layers
        for p, part in zip(layer.parameters, layer.parts(list(layer.parameters)), strict=True)
        if id(p) in chosen
    ]
    before = [part.clone() for part in parts]
    yield
    for part, values in zip(parts, before, strict=True):
        part.copy_(values)


def remember_layer(layer: Layer, curvature: LayerCurvature, state: MutableMapping[Any, dict[str, Any]]) -> None:
    """Every parameter gets an entry, and every layer all of its names: distributed checkpoints ask for both."""
    weight, *others = layer.parameters
    for p in others:
        state.setdefault(p, {})
    own, momentum = state[weight], f"{layer.slot}momentum"
    own.update({f"{layer.slot}{name}": value for name, value in curvature.state().items()})
    if momentum not in own or own[momentum].shape != layer.shape:
        own[momentum] = torch.zeros(layer.shape, dtype=weight.dtype, device=weight.device)
    if f"{layer.slot}squares" not in own:
        own[f"{layer.slot}squares"] = torch.zeros(2, device=weight.device)


def without_blanks(state: Mapping[Any, dict[str, Any]]) -> None:
    """Drop what flat checkpoints give for names that they lack: empty dicts."""
    for own in state.values():
        for name in [name for name, value in own.items() if isinstance(value, dict)]:
            del own[name]


def restore_dtypes(groups: Iterable[Mapping[str, Any]], state: Mapping[Any, dict[str, Any]], saved: Any) -> None:
    """Undo torch's cast of all state to the dtype of the parameter: statistics of bfloat16 layers are float32."""
    keys = (key for group in saved["param_groups"] for key in group["params"])
    for key, p in zip(keys, (p for group in groups for p in group["params"]), strict=True):
        for name, value in saved["state"].get(key, {}).items():
            if isinstance(value, Tensor) and value.dtype != state[p][name].dtype:
                state[p][name] = value.to(p.device)
