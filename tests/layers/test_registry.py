"""Adapters of a user's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from test_capture import N, armed, assert_per_example_gradients, captured, recorded
from torch import Tensor, nn

import natgrad
from natgrad import FNGD, KFAC, Gaussian
from natgrad.layers import cover
from oracles import assert_equal


class Scaled(nn.Linear):
    """A linear layer of scaled inputs."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(3 * input)


class ScaledAdapter(natgrad.Adapter):
    """Its adapter, by the defaults."""

    def inputs(self, module: nn.Module, x: Tensor) -> Tensor:
        return super().inputs(module, 3 * x)


def test_a_registered_layer_is_covered_by_the_defaults_until_it_is_no_longer() -> None:
    model, x = nn.Sequential(Scaled(4, 3)), torch.randn(N, 6, 4)
    assert cover(model).uncovered["0.weight"] == "no adapter for Scaled"
    natgrad.register(Scaled, ScaledAdapter())
    try:
        assert_per_example_gradients(model, x, torch.randn(N, 6, 3))
        record, layer = recorded(model, x), cover(model).layers["0"]
        for bias in (True, False):
            model[0].bias.requires_grad_(bias)
            V = [torch.randn_like(p) for p in layer.parameters]
            u = record.directional(layer, V)
            assert u is not None
            assert_equal(u[0], captured(record, layer).along(layer.pack(V)))
        natgrad.fisher(model, KFAC(), Gaussian(), [(x, None)])["0"]
    finally:
        natgrad.unregister(Scaled)
    assert cover(model).layers == {}


def test_a_registered_adapter_takes_the_place_of_the_librarys_own() -> None:
    class Refusing(natgrad.Adapter):
        def refuses(self, module: nn.Module) -> str | None:
            return "of no use"

    natgrad.register(nn.Linear, Refusing())
    try:
        assert cover(nn.Linear(2, 2)).uncovered == {"weight": "of no use", "bias": "of no use"}
    finally:
        natgrad.unregister(nn.Linear)
    assert cover(nn.Linear(2, 2)).uncovered == {}


def test_parameters_may_have_other_names() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernel, self.shift = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(3))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.kernel, self.shift)

    class NamedAdapter(natgrad.Adapter):
        names = ("kernel", "shift")

    natgrad.register(Named, NamedAdapter())
    try:
        x = torch.randn(N, 4)
        model = nn.Sequential(Named())
        optimizer = FNGD(model, 1, lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        before = model(x).detach()
        natgrad.reconstruct(model, [(x, None)])
        assert_equal(model(x).detach(), before, 1e-9)
        natgrad.restore(model)
        assert [name for name, _ in model.named_parameters()] == ["0.kernel", "0.shift"]
    finally:
        natgrad.unregister(Named)


def test_the_default_forward_runs_no_hook() -> None:
    model = nn.Sequential(nn.Conv1d(2, 3, 2))
    with armed(model, None):
        layer, calls = cover(model).layers["0"], []
        model[0].register_forward_hook(lambda *_: calls.append(1))
        layer.adapter.forward(layer.module, [torch.randn(3, 2, 2)], torch.randn(N, 2, 5))
    assert not calls


def test_what_cannot_be_registered_is_refused() -> None:
    with pytest.raises(TypeError, match="register needs a class of modules, got 'Linear'"):
        natgrad.register("Linear", ScaledAdapter())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"register needs an adapter \(an object, not a class\)"):
        natgrad.register(Scaled, ScaledAdapter)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"no adapter was registered for .*Scaled"):
        natgrad.unregister(Scaled)
