"""Rules of the fused recurrences, LSTM, GRU and RNN, and of their cells: they run as the products that they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from natgrad.layers.product import LINEAR
from natgrad.operations.registry import rule
from natgrad.operations.watch import Watch

States = tuple[Tensor, ...]
Cell = Callable[[Tensor, Tensor, States], States]
"""(W_ih x + b_ih, W_hh h + b_hh, (h, ...)) -> the next states, h first."""


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


_CELLS: dict[Any, Cell] = {torch.lstm_cell: lstm, torch.gru_cell: gru}
_CELLS |= {torch.rnn_tanh_cell: rnn_tanh, torch.rnn_relu_cell: rnn_relu}
_SCANS: dict[Any, Cell] = {torch.lstm: lstm, torch.gru: gru, torch.rnn_tanh: rnn_tanh, torch.rnn_relu: rnn_relu}


@rule(*_CELLS)
def one_step(watch: Watch, func: Any, x: Tensor, hx: Tensor | States, *weights: Tensor | None) -> Tensor | States:
    """``torch.lstm_cell`` and the like: x (n, in), states (n, H), weights (W_ih, W_hh, b_ih, b_hh)."""
    if not any(watch.operand(w) for w in weights):
        return func(x, hx, *weights)
    dtype = _dtype(func, x, hx, *weights)
    states = tuple(state.to(dtype) for state in _states(hx))
    w_ih, w_hh, *biases = weights
    b_ih, b_hh = biases or (None, None)
    products = ((x, w_ih, b_ih), (states[0], w_hh, b_hh))
    sums = [watch.product(LINEAR, w, b, z, partial(F.linear, z), operation=func.__name__) for z, w, b in products]
    after = _CELLS[func](sums[0], sums[1], states)
    return after[0] if isinstance(hx, Tensor) else after


@rule(*_SCANS)
def unrolled(watch: Watch, func: Any, x: Tensor, *args: Any) -> States:
    """``torch.lstm`` and the like, step by step: the output, and the last state of every layer and direction.

    args are (hx, weights, biased, layers, dropout, training, bidirectional, batch_first), or those of a
    ``PackedSequence``, which has sizes of its batches in front and no ``batch_first``; it runs padded with zeros.
    """
    packed = not isinstance(args[1], list)
    sizes, (hx, weights, biased, layers, dropout, training, bidirectional, *rest) = (
        (args[0], args[1:]) if packed else (None, args)
    )
    x = watch.data(x)
    if not any(watch.operand(w) for w in weights):
        return func(x, *args)
    batch_first = bool(rest and rest[0])
    data = (sizes,) if packed else ()
    last = () if packed else (batch_first,)
    dtype = _dtype(func, x, *data, hx, weights, biased, layers, 0.0, False, bidirectional, *last)
    states = tuple(state.to(dtype) for state in _states(hx))
    x = x.transpose(0, 1) if batch_first else x
    kept = None
    if sizes is not None:
        kept = torch.arange(int(sizes[0]), device=x.device) < sizes.to(x.device).unsqueeze(-1)  # (t, n)
        x = x.new_zeros(*kept.shape, x.shape[-1]).index_put(kept.nonzero(as_tuple=True), x)
    watch.batches.append((x.shape[1], 0 if batch_first else 1))
    order = watch.orders.get(id(sizes), (None, None))[1]  # of the examples, where they were sorted by length
    scan = _Scan(watch, func, biased, kept, order)
    count = len(states[0])  # layers times directions
    each, ends = len(weights) // count, []
    for layer in range(layers):
        outputs = []
        for number in range(layer * count // layers, (layer + 1) * count // layers):
            start = tuple(state[number] for state in states)
            own, backwards = weights[number * each : (number + 1) * each], bidirectional and number % 2 == 1
            output, end = scan(x, start, own, backwards)
            outputs.append(output)
            ends.append(end)
        x = outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
        if layer < layers - 1 and dropout:
            x = _dropped(x, dropout, training, kept)
    finals = tuple(torch.stack(kind) for kind in zip(*ends, strict=True))
    if kept is not None:
        return x[kept], *finals
    return x.transpose(0, 1) if batch_first else x, *finals


@rule(torch._pack_padded_sequence, always=True)
def packed_sequence(watch: Watch, func: Any, input: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    """Remembers the order that the examples were brought into by their lengths."""
    data, sizes = func(input, *args)
    if watch.selected is not None and watch.selected[0] is input:
        watch.orders[id(sizes)] = sizes, watch.selected[1].argsort()
    return data, sizes


class _Scan:
    """One layer in one direction."""

    def __init__(self, watch: Watch, func: Any, biased: bool, kept: Tensor | None, order: Tensor | None) -> None:
        self._watch, self._cell, self._biased, self._kept = watch, _SCANS[func], biased, kept
        self._first = partial(_turned, order=order)
        self._told: dict[str, Any] = {
            "operation": func.__name__,
            "kept": None if kept is None else self._first(kept),
            "first": True,
        }

    def __call__(self, x: Tensor, states: States, weights: Sequence[Tensor], backwards: bool) -> tuple[Tensor, States]:
        """x (t, n, in): the outputs (t, n, H), and the last states."""
        w_ih, w_hh, *rest = weights
        b_ih, b_hh = rest[:2] if self._biased else (None, None)
        gates = self._watch.product(
            LINEAR, w_ih, b_ih, self._first(x), partial(F.linear, x), self._first, **self._told
        ).unbind(0)
        recurrent = _Repeated(w_hh, b_hh, len(x))
        projection = _Repeated(rest[-1], None, len(x)) if len(rest) % 2 else None
        outputs: list[Tensor] = [x] * len(x)
        for t in range(len(x) - 1, -1, -1) if backwards else range(len(x)):
            after = self._cell(gates[t], recurrent(states[0], t), states)
            if projection is not None:
                after = projection(after[0], t), *after[1:]
            if self._kept is not None:  # beyond its end a sequence keeps its state
                here = self._kept[t].unsqueeze(-1)
                after = tuple(torch.where(here, new, old) for new, old in zip(after, states, strict=True))
            states = after
            outputs[t] = states[0]
        for product in (recurrent, projection):
            if product is not None:
                product.tell(self._watch, self._first, self._told)
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

    def tell(self, watch: Watch, first: Callable[[Tensor], Tensor], told: dict[str, Any]) -> None:
        """Have the product seen."""
        if self._zeros is not None:
            watch.saw(LINEAR, self._w, self._b, first(torch.stack(self._inputs)), self._zeros, first, **told)


def _turned(y: Tensor, order: Tensor | None) -> Tensor:
    """(t, n, ...) as (n, t, ...), the examples in an order of their own."""
    return y.transpose(0, 1) if order is None else y.transpose(0, 1)[order]


def _dropped(x: Tensor, p: float, training: bool, kept: Tensor | None) -> Tensor:
    """Dropout between layers, which of a packed sequence draws no numbers for what is not there."""
    if kept is None:
        return F.dropout(x, p, training)
    return torch.zeros_like(x).index_put(kept.nonzero(as_tuple=True), F.dropout(x[kept], p, training))


def _states(hx: Tensor | States) -> States:
    return (hx,) if isinstance(hx, Tensor) else tuple(hx)


@torch.no_grad()
def _dtype(fused: Callable[..., Any], x: Tensor, *args: Any) -> torch.dtype:
    """What the fused kernel returns; autocast has it return one thing or another."""
    if not torch.is_autocast_enabled(x.device.type):
        return x.dtype
    result = fused(x, *args)
    return (result if isinstance(result, Tensor) else result[0]).dtype
