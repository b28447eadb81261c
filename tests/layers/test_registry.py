"""Rules and forms of a user's own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_capture import N, assert_per_example_gradients, captured, recorded
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function

import natgrad
from natgrad import KFAC, ExactFisher, Gaussian, NaturalGradient
from natgrad.layers import Form, form
from natgrad.layers.form import FORMS, with_ones
from natgrad.layers.product import LINEAR
from natgrad.look import look
from natgrad.operations import RULES, Watch, rule
from oracles import assert_equal

# A function of one's own: torch does not say what happens inside, the rule does.


def tripled(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """W 3x + b, as a fused kernel might compute it."""
    if has_torch_function((x, weight, bias)):
        return handle_torch_function(tripled, (x, weight, bias), x, weight, bias)
    with torch._C.DisableTorchFunction():
        return F.linear(3 * x, weight, bias)


def rule_of_tripled(watch: Watch, func: Any, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A linear map of 3x."""
    return watch.product(LINEAR, weight, bias, 3 * x, lambda w, b: func(x, w, b), operation="tripled")


class Tripled(nn.Linear):
    """A layer of this function."""

    def forward(self, input: Tensor) -> Tensor:
        return tripled(input, self.weight, self.bias)


@contextmanager
def ruled(function: Any, known: Any) -> Iterator[None]:
    """With a rule, which is taken back."""
    before = dict(RULES)
    rule(function)(known)
    try:
        yield
    finally:
        RULES.clear()
        RULES.update(before)


def test_a_function_of_ones_own_is_left_out_until_it_has_a_rule() -> None:
    model, x = nn.Sequential(Tripled(4, 3), nn.Tanh(), nn.Flatten()), torch.randn(N, 6, 4)
    found = look(model, (x,)).coverage()
    assert found.uncovered == {f"0.{name}": "used by tripled: no rule" for name in ("weight", "bias")}
    with ruled(tripled, rule_of_tripled):
        assert_per_example_gradients(model, x, torch.randn(N, 18))
        for bias in (True, False):
            model[0].bias.requires_grad_(bias)
            record, layers = recorded(model, x)
            layer = layers["0"]
            assert layer.operations == ("tripled",) and layer.biased == bias
            V = [torch.randn_like(p) for p in layer.parameters]
            u = record.directional(layer, V)
            assert u is not None
            assert_equal(u[0], captured(record, layer).along(layer.pack(V)))
        natgrad.fisher(model, KFAC(), Gaussian(), [(x, None)])["0"]
    assert not look(model, (x,)).layers


def test_a_rule_takes_the_place_of_the_librarys_own() -> None:
    def refusing(watch: Watch, func: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return watch.unread(func, input, weight, bias, name="a linear layer that is of no use")

    linear, x = nn.Linear(2, 2), torch.randn(N, 2)
    with ruled(F.linear, refusing):
        reason = "used by a linear layer that is of no use: no rule"
        assert look(linear, (x,)).coverage().uncovered == {"weight": reason, "bias": reason}
    assert look(linear, (x,)).coverage().uncovered == {}


def test_parameters_may_have_any_name() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernel, self.shift = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(3))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.kernel, self.shift)

    x, model = torch.randn(N, 4), nn.Sequential(Named())
    optimizer = NaturalGradient(model, likelihood=Gaussian())
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    assert list(optimizer.layers) == ["0.kernel"] and not optimizer.uncovered
    with pytest.raises(ValueError, match="no layer that can be reconstructed"):  # it changes modules
        natgrad.reconstruct(model, [(x, None)])


# A form of one's own: a circulant matrix, of which the parameter is the first row.


def circulant(x: Tensor, row: Tensor) -> Tensor:
    """y_o = sum_i row_(i - o) x_i."""
    if has_torch_function((x, row)):
        return handle_torch_function(circulant, (x, row), x, row)
    with torch._C.DisableTorchFunction():
        return _shifts(x) @ row


def _shifts(x: Tensor) -> Tensor:
    """(..., out, k) of x (..., d): entry (o, k) is x_(o + k)."""
    return torch.stack([x.roll(-o, -1) for o in range(x.shape[-1])], -2)


@form
@dataclass(frozen=True)
class Circulant(Form):
    """One output, at as many positions as the vector is long, of the inputs shifted by each."""

    def matrix(self, operand: Tensor) -> Tensor:
        return operand.unsqueeze(0)

    def operand(self, matrix: Tensor, shape: torch.Size) -> Tensor:
        return matrix.reshape(shape)

    def inputs(self, x: Tensor, biased: bool) -> Tensor:
        return with_ones(_shifts(x).reshape(len(x), -1, x.shape[-1]), biased)

    def outputs(self, y: Tensor) -> Tensor:
        return y.reshape(len(y), -1, 1)

    def product(self, operand: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
        return circulant(x, operand)


class Turning(nn.Module):
    """A layer of this form."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return circulant(x, self.weight)


def rule_of_circulant(watch: Watch, func: Any, x: Tensor, row: Tensor) -> Tensor:
    """The form, read off."""
    return watch.product(Circulant(), row, None, x, lambda w, _: func(x, w), operation="circulant")


@pytest.mark.parametrize("shape", [(4,), (2, 4)])
def test_a_form_of_ones_own_is_captured_and_trained(shape: tuple[int, ...]) -> None:
    model, x = nn.Sequential(Turning(), nn.Tanh(), nn.Flatten()), torch.randn(N, *shape)
    with ruled(circulant, rule_of_circulant):
        y = torch.randn_like(model(x))
        record, layers = recorded(model, x, y)
        layer = layers["0"]
        assert layer.shape == (1, 4) and captured(record, layer).a.shape == (N, 4 * (len(shape) * 2 - 2 or 1), 4)
        losses = (0.5 * (model(x[n : n + 1]) - y[n : n + 1]).square().sum() for n in range(N))
        expected = torch.stack([torch.autograd.grad(loss, layer.parameters)[0] for loss in losses])
        (DW,) = captured(record, layer).weight_gradients()
        assert_equal(DW.squeeze(1), expected)
        V = [torch.randn(4)]
        u = record.directional(layer, V)
        assert u is not None
        assert_equal(u[0], expected @ V[0])
        J = torch.stack([torch.autograd.grad(s, layer.parameters, retain_graph=True)[0] for s in model(x).flatten()])
        dense = natgrad.fisher(model, ExactFisher(), Gaussian(), [(x, None)])["0"].dense()
        assert_equal(dense, J.mT @ J / N)
        optimizer = NaturalGradient(model, likelihood=Gaussian())
        losses_of_steps = []
        for _ in range(4):
            optimizer.zero_grad()
            loss = 0.5 * (model(x) - y).square().sum() / N
            loss.backward()
            optimizer.step()
            losses_of_steps.append(loss.item())
        assert losses_of_steps[-1] < losses_of_steps[0] and not optimizer.uncovered
        again = NaturalGradient(model, likelihood=Gaussian())
        again.load_state_dict(optimizer.state_dict())
        assert list(again.layers) == ["0"] and again.layers["0"].form == Circulant()


def test_what_cannot_be_a_rule_is_refused() -> None:
    with pytest.raises(TypeError, match="rule needs functions, got 'linear'"):
        rule("linear")
    with pytest.raises(TypeError, match="a rule is a function, got 'a rule'"):
        rule(tripled)("a rule")  # type: ignore[type-var]
    assert tripled not in RULES and FORMS["Circulant"] is Circulant
