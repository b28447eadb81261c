"""nn.RNN, nn.LSTM, nn.GRU and their cells: a block for every weight matrix of every layer and direction."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from natgrad.layers.base import examples_first
from natgrad.layers.functional import Exposed, LinearPart, Rule

States = tuple[Tensor, ...]
_EXAMPLES_FIRST = partial(examples_first, batch_first=False)  # of (t, n, d)
Cell = Callable[[Tensor, Tensor, States], States]
"""(W_ih x + b_ih, W_hh h + b_hh, (h, ...)) -> the next states, h first."""


def recurrent_parts(module: nn.Module) -> dict[str, tuple[nn.Module, LinearPart]]:
    """The blocks ``ih_l0``, ``hh_l0`` and so on of a recurrence, or ``ih`` and ``hh`` of a cell; gates stand one above
    the other."""
    parts: dict[str, tuple[nn.Module, LinearPart]] = {}
    for name, weight in module._parameters.items():
        if name.startswith("weight_") and weight is not None:
            bias = name.replace("weight_", "bias_")
            known = bias if module._parameters.get(bias) is not None else None
            parts[name.removeprefix("weight_")] = module, LinearPart(name, known, len(weight))
    return parts


def lstm(gates: Tensor, more: Tensor, states: States) -> States:
    """c = f c + i g, h = o tanh c."""
    i, f, g, o = (gates + more).chunk(4, -1)
    c = f.sigmoid() * states[1] + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def gru(gates: Tensor, more: Tensor, states: States) -> States:
    """h = (1 - z) n + z h, where n has r times the recurrent part."""
    (r, z, n), (hr, hz, hn) = gates.chunk(3, -1), more.chunk(3, -1)
    n = (n + (r + hr).sigmoid() * hn).tanh()
    return ((states[0] - n) * (z + hz).sigmoid() + n,)


def rnn_tanh(gates: Tensor, more: Tensor, states: States) -> States:
    """h = tanh of the sum."""
    return ((gates + more).tanh(),)


def rnn_relu(gates: Tensor, more: Tensor, states: States) -> States:
    """h = relu of the sum."""
    return ((gates + more).relu(),)


def one_step(
    cell: Cell, fused: Callable[..., Any], exposed: Exposed, x: Tensor, hx: Tensor | States, *weights: Tensor | None
) -> Tensor | States:
    """``torch.lstm_cell`` and the like: x (n, in), states (n, H), weights (W_ih, W_hh, b_ih, b_hh)."""
    dtype = _dtype(fused, x, hx, *weights)
    states = tuple(state.to(dtype) for state in _states(hx))
    w_ih, w_hh, b_ih, b_hh = weights
    assert w_ih is not None and w_hh is not None
    after = cell(exposed.linear(x, w_ih, b_ih), exposed.linear(states[0], w_hh, b_hh), states)
    return after[0] if isinstance(hx, Tensor) else after


def unrolled(cell: Cell, fused: Callable[..., Any], exposed: Exposed, x: Tensor, *args: Any) -> States:
    """``torch.lstm`` and the like, step by step: the output, and the last state of every layer and direction.

    args are (hx, weights, biased, layers, dropout, training, bidirectional, batch_first), or those of a
    ``PackedSequence``, which is left to the fused kernel.
    """
    if not isinstance(args[1], list):
        for w in args[2]:
            exposed.unread(w, "a PackedSequence has no batch dimension")
        return fused(x, *args)
    hx, weights, biased, layers, dropout, training, bidirectional, batch_first = args
    dtype = _dtype(fused, x, hx, weights, biased, layers, 0.0, False, bidirectional, batch_first)
    states = tuple(state.to(dtype) for state in _states(hx))
    scans = len(states[0])  # layers times directions
    each, last = len(weights) // scans, []
    x = x.transpose(0, 1) if batch_first else x
    for layer in range(layers):
        outputs = []
        for scan in range(layer * scans // layers, (layer + 1) * scans // layers):
            start = tuple(state[scan] for state in states)
            own, backwards = weights[scan * each : (scan + 1) * each], bidirectional and scan % 2 == 1
            output, end = _scan(cell, exposed, x, start, own, biased, backwards)
            outputs.append(output)
            last.append(end)
        x = outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
        if layer < layers - 1:
            x = F.dropout(x, dropout, training)
    ends = tuple(torch.stack(kind) for kind in zip(*last, strict=True))
    return x.transpose(0, 1) if batch_first else x, *ends


def _states(hx: Tensor | States) -> States:
    return (hx,) if isinstance(hx, Tensor) else tuple(hx)


@torch.no_grad()
def _dtype(fused: Callable[..., Any], x: Tensor, *args: Any) -> torch.dtype:
    """What the fused kernel returns; autocast has it return one thing or another."""
    if not torch.is_autocast_enabled(x.device.type):
        return x.dtype
    result = fused(x, *args)
    return (result if isinstance(result, Tensor) else result[0]).dtype


def _scan(
    cell: Cell, exposed: Exposed, x: Tensor, states: States, weights: Sequence[Tensor], biased: bool, backwards: bool
) -> tuple[Tensor, States]:
    """One layer in one direction on x (t, n, in): its outputs (t, n, H), and its last states."""
    w_ih, w_hh, *rest = weights
    b_ih, b_hh = rest[:2] if biased else (None, None)
    gates = exposed.linear(x, w_ih, b_ih, _EXAMPLES_FIRST).unbind(0)
    recurrent = _Repeated(w_hh, b_hh, len(x))
    projection = _Repeated(rest[-1], None, len(x)) if len(rest) % 2 else None
    outputs: list[Tensor] = [x] * len(x)
    for t in range(len(x) - 1, -1, -1) if backwards else range(len(x)):
        states = cell(gates[t], recurrent(states[0], t), states)
        if projection is not None:
            states = projection(states[0], t), *states[1:]
        outputs[t] = states[0]
    for product in (recurrent, projection):
        if product is not None:
            product.tell(exposed)
    return torch.stack(outputs), states


class _Repeated:
    """x w^T + b, once at every one of ``steps`` times; seen as one product of (steps, n, in).

    Its gradient is that of zeros (steps, n, out), which are added.
    """

    def __init__(self, w: Tensor, b: Tensor | None, steps: int) -> None:
        self._w, self._b, self._inputs = w, b, [w] * steps
        self._zeros: Tensor | None = None

    def __call__(self, x: Tensor, t: int) -> Tensor:
        y = F.linear(x, self._w, self._b)
        if self._zeros is None:
            self._zeros = y.new_zeros(len(self._inputs), *y.shape, requires_grad=True)
            self._each = self._zeros.unbind(0)
        self._inputs[t] = x.detach()
        return y + self._each[t]

    def tell(self, exposed: Exposed) -> None:
        """Have the product seen."""
        if self._zeros is not None:
            exposed.saw(torch.stack(self._inputs), self._w, self._zeros, _EXAMPLES_FIRST)


_CELLS: dict[Any, Cell] = {torch.lstm_cell: lstm, torch.gru_cell: gru}
_CELLS |= {torch.rnn_tanh_cell: rnn_tanh, torch.rnn_relu_cell: rnn_relu}
_SCANS: dict[Any, Cell] = {torch.lstm: lstm, torch.gru: gru, torch.rnn_tanh: rnn_tanh, torch.rnn_relu: rnn_relu}
RULES: dict[Any, Rule] = {
    **{fused: partial(one_step, cell, fused) for fused, cell in _CELLS.items()},
    **{fused: partial(unrolled, cell, fused) for fused, cell in _SCANS.items()},
}
