"""What the tests of attention, recurrences and weights without modules share."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from test_capture import armed
from torch import Tensor, nn

import natgrad
from natgrad import ExactFisher, Gaussian
from natgrad.labels import Labels
from natgrad.layers import Layer
from natgrad.record import Record
from oracles import assert_equal, block

Slices = Mapping[str, tuple[str, slice, str | None, slice]]
"""For every layer its weight and the rows of it, its bias and the rows of it."""

EVERYTHING = slice(None)


def record_of(model: nn.Module, x: Tensor, y: Tensor | None = None) -> tuple[Record, Tensor, Mapping[str, Layer]]:
    """The record of a pass, of half the square to y or of the user's backward pass; its output, and the layers."""
    labels = None if y is None else Labels(Gaussian(), "empirical", targets=y)
    with armed(model, labels) as engine:
        output = model(x)
        if y is None:
            (0.5 * output.square().sum()).backward()
        (record,) = engine.everything()
    return record, output.detach(), engine.layers


def by_a_loop(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """The gradients (n, ...) of half the square to y in every parameter, one example after the other."""
    parameters = dict(model.named_parameters())
    trained = [name for name, p in parameters.items() if p.requires_grad]
    rows = []
    for i in range(len(x)):
        loss = 0.5 * (model(x[i : i + 1]) - y[i : i + 1]).square().sum()
        rows.append(torch.autograd.grad(loss, [parameters[name] for name in trained]))
    return {name: torch.stack(each) for name, each in zip(trained, zip(*rows, strict=True), strict=True)}


def blocks_by_hand(gradients: Mapping[str, Tensor], slices: Slices) -> dict[str, Tensor]:
    """Gradients (n, ...) of the parameters as the blocks (n, out, in) of the layers; a vector is a column."""
    blocks = {}
    for name, (weight, rows, bias, own) in slices.items():
        part = gradients[weight][:, rows]
        part = part.unsqueeze(-1) if part.ndim == 2 else part
        column = gradients[bias][:, own] if bias and bias in gradients else None
        blocks[name] = block(part, column)  # groups one above the other
    return blocks


def assert_captured(
    model: nn.Module, x: Tensor, slices: Slices, skipped: frozenset[str] = frozenset(), rounding: float = 0.0
) -> None:
    """The layers are those of ``slices``, their captured gradients those of every example, the output is untouched."""
    with torch.enable_grad():
        plain = model(x).detach()
    y = torch.randn_like(plain)
    for target in (y, None):
        model.zero_grad()
        record, output, seen = record_of(model, x, target)
        layers = {name: layer for name, layer in seen.items() if name not in skipped}
        assert sorted(layers) == sorted(slices)
        assert float((output - plain).norm()) <= rounding * float(plain.norm())
        expected = blocks_by_hand(by_a_loop(model, x, torch.zeros_like(y) if target is None else y), slices)
        for name, layer in layers.items():
            (capture,) = record.captures(layer)
            (DW,) = capture.weight_gradients()
            scale = expected[name].norm().clamp(min=1e-3)  # a key's bias has gradients of rounding alone
            DW = DW if DW.ndim == 3 else DW.movedim(0, 1).flatten(1, 2)
            assert DW.shape == expected[name].shape, name
            assert float((DW - expected[name]).norm() / scale) < 1e-10, name


def assert_exact_fisher(model: nn.Module, x: Tensor, slices: Slices) -> None:
    """natgrad.fisher is J^T J / n of the model's output in every block, J by autograd."""
    parameters = dict(model.named_parameters())
    model.eval()
    output = model(x).flatten()
    rows = [torch.autograd.grad(value, list(parameters.values()), retain_graph=True) for value in output]
    J = {name: torch.stack(each) for name, each in zip(parameters, zip(*rows, strict=True), strict=True)}
    found = natgrad.fisher(model, ExactFisher(), Gaussian(), [(x, None)])
    for name, rows_of in blocks_by_hand(J, slices).items():
        flat = rows_of.flatten(1)
        assert_equal(found[name].dense(), flat.mT @ flat / len(x))
