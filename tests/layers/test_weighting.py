"""Weighted layers leave sum_n w_n grad_n in ``.grad``, and alter nothing else that a backward pass gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from test_capture import every_layer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from natgrad.fngd import Examples
from natgrad.fngd.gradients import by_autograd, weighted_gradients
from natgrad.fngd.weighting import Weighting
from natgrad.layers import Layer, cover
from oracles import assert_equal

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")

N = 5
W = torch.tensor([0.5, -1.0, 2.0, 0.0, 1.7], dtype=torch.float64)


def in_order(which: Examples, g: Tensor) -> Tensor:
    return W.to(g.device)[which.start : which.start + len(g)]


@contextmanager
def weighted(
    model: nn.Module, weights: Callable[[Examples, Tensor], Tensor] = in_order, needs_ids: bool = False
) -> Iterator[Weighting]:
    layers = cover(model).layers
    weighting = Weighting(model, needs_ids)
    weighting.watch(layers.values(), dict.fromkeys(layers, weights))
    yield weighting
    weighting.close()


def gradients(model: nn.Module, x: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """The gradients of a half square in the parameters and in the input."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    (0.5 * model(x).square().sum()).backward()
    assert x.grad is not None
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, x.grad


def by_a_loop(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """sum_n w_n grad_n, one example after the other."""
    total: dict[str, Tensor] = {}
    for example, w in zip(x, W, strict=True):
        for name, gradient in gradients(model, example.unsqueeze(0))[0].items():
            total[name] = total.get(name, 0) + w * gradient
    return total


class OwnNorm(nn.LayerNorm):
    """A norm that has no adapter."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input)


class Deep(nn.Module):
    """A layer behind a parameter without adapter, one with a change in place after it, and one called twice."""

    def __init__(self, again: bool = False) -> None:
        super().__init__()
        self.conv, self.norm, self.twice = nn.Conv1d(2, 4, 3, padding=1), OwnNorm(6), nn.Linear(6, 6)
        self.head, self.again = nn.Linear(24, 3), again

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.body, x, use_reentrant=False) if self.again else self.body(x))

    def body(self, x: Tensor) -> Tensor:
        h = self.norm(torch.relu_(self.conv(x)))
        return self.twice(torch.tanh(self.twice(h))).flatten(1)


def deep(again: bool = False) -> tuple[Deep, Tensor]:
    torch.manual_seed(1)
    return Deep(again), torch.randn(N, 2, 6)


@every_layer
def test_the_gradient_of_a_layer_is_that_of_autograd(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    module, x = make(), torch.randn(N, *shape)
    layer: Layer = cover(nn.Sequential(module)).layers["0"]
    y = module(x)
    g = torch.randn_like(y)
    scaled = g * W.view(-1, *(1,) * (y.ndim - 1))
    expected = torch.autograd.grad(y, layer.parameters, scaled)
    with torch.no_grad():
        read = layer.read((x,), {})
        found = weighted_gradients(layer, read, g, W)
        default = by_autograd(layer, read, g, W)
    for mine, slow, theirs in zip(found, default, expected, strict=True):
        assert_equal(mine, theirs)
        assert_equal(slow, theirs)


@every_layer
def test_a_weighted_layer_is_weighted_example_by_example(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    model = nn.Sequential(make(), nn.ReLU(inplace=True), nn.Flatten())
    x = torch.randn(N, *shape)
    expected, (_, passed_on) = by_a_loop(model, x), gradients(model, x)
    with weighted(model):
        found, mine = gradients(model, x)
    for name in expected:
        assert_equal(found[name], expected[name])
    assert torch.equal(mine, passed_on)


def test_earlier_layers_and_other_parameters_receive_what_they_would_without_weights() -> None:
    model, x = deep()
    expected, (plain, passed_on) = by_a_loop(model, x), gradients(model, x)
    with weighted(model):
        found, mine = gradients(model, x)
    for name in ("conv", "twice", "head"):
        for kind in ("weight", "bias"):
            assert_equal(found[f"{name}.{kind}"], expected[f"{name}.{kind}"])
    for name in ("norm.weight", "norm.bias"):
        assert torch.equal(found[name], plain[name])
    assert torch.equal(mine, passed_on)


def test_a_recomputed_forward_pass_is_weighted_alike() -> None:
    found = []
    for again in (False, True):
        model, x = deep(again)
        with weighted(model):
            found.append(gradients(model, x)[0])
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_positions_count_on_over_micro_batches_until_the_next_step() -> None:
    model, x = deep()
    expected = by_a_loop(model, x)
    with weighted(model) as weighting:
        for _ in range(2):
            weighting.begin(0)
            model.zero_grad()
            for part in x.split(2):
                (0.5 * model(part).square().sum()).backward()
            for name in ("conv.weight", "twice.bias", "head.weight"):
                assert_equal(model.get_parameter(name).grad, expected[name])  # type: ignore[arg-type]


@pytest.mark.parametrize("how", ["eval", "no weights", "closed"])
def test_outside_of_training_gradients_are_plain(how: str) -> None:
    model, x = deep()
    expected, _ = gradients(model, x)
    with weighted(model) as weighting:
        if how == "eval":
            model.eval()
        else:
            weighting.watch((), {}) if how == "no weights" else weighting.close()
        found, _ = gradients(model, x)
        if how == "eval":  # and does not count
            model.train()
            assert_equal(gradients(model, x)[0]["head.weight"], by_a_loop(deep()[0], x)["head.weight"])
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_without_gradients_nothing_is_weighted_and_nothing_kept() -> None:
    model, x = deep()
    with weighted(model), torch.no_grad():
        assert not model(x).requires_grad
    assert all(p.requires_grad for p in model.parameters())


def test_a_frozen_parameter_stays_frozen_and_its_layer_weighted() -> None:
    for frozen in ("conv.bias", "head.weight"):
        model, x = deep()
        model.get_parameter(frozen).requires_grad_(False)
        expected = by_a_loop(model, x)
        with weighted(model):
            found, _ = gradients(model, x)
        assert frozen not in found and not model.get_parameter(frozen).requires_grad
        for name in ("conv.weight", "twice.weight"):
            assert_equal(found[name], expected[name])


def test_a_layer_frozen_after_the_hooks_were_set_gets_no_gradient() -> None:
    model, x = deep()
    with weighted(model):
        model.conv.weight.requires_grad_(False)
        found, _ = gradients(model, x)
    assert "conv.weight" not in found and not model.conv.weight.requires_grad
    assert_equal(found["head.weight"], by_a_loop(model, x)["head.weight"])


def test_a_layer_that_raises_keeps_its_parameters_trained() -> None:
    model, _ = deep()
    with weighted(model), pytest.raises(RuntimeError):
        model(torch.randn(N, 3, 6))
    assert all(p.requires_grad for p in model.parameters())


def test_a_second_derivative_is_refused() -> None:
    model, x = deep()
    with weighted(model):
        (gradient,) = torch.autograd.grad(model(x).square().sum(), model.conv.weight, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            gradient.square().sum().backward()


def test_weights_may_depend_on_the_output_gradient() -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    x = torch.randn(N, 3)
    seen = []

    def by_size(which: Examples, g: Tensor) -> Tensor:
        seen.append(g)
        return 1 / g.norm(dim=1)

    with weighted(model, by_size):
        found, _ = gradients(model, x)
    y = model(x).detach()
    assert torch.equal(seen[0], y)
    assert_equal(found["0.weight"], (y / y.norm(dim=1, keepdim=True)).mT @ x)


def test_under_autocast_the_product_runs_in_low_precision_and_the_gradient_is_that_of_the_parameter() -> None:
    model, x = deep()
    model, x = model.float(), x.float()
    with torch.autocast("cpu", torch.bfloat16):
        expected = by_a_loop(model, x)
        with weighted(model):
            found, _ = gradients(model, x)
    for name in ("conv.weight", "head.weight", "head.bias"):
        assert found[name].dtype == torch.float32
        assert_equal(found[name], expected[name], 0.05)


def test_ids_must_be_told_and_be_as_many_as_the_examples() -> None:
    model, x = deep()
    with weighted(model, needs_ids=True) as weighting:
        with pytest.raises(ValueError, match=r"optimizer\.examples\(ids\)"):
            model(x)
        weighting.ids = torch.arange(3)
        with pytest.raises(ValueError, match="3 ids, but the batch has 5 examples"):
            model(x)
        assert all(p.requires_grad for p in model.parameters())


def test_layers_without_weights_are_watched_for_which_examples_reach_them_alone() -> None:
    model, x = deep()
    expected, passed_on = gradients(model, x)
    with weighted(model, needs_ids=True) as weighting:
        weighting.watch(cover(model).layers.values(), {})
        weighting.begin(3)
        for ids in (torch.arange(5), torch.arange(5, 10)):
            weighting.ids = ids
            found, mine = gradients(model, x)
        assert list(weighting.told) == [0, 5] and torch.equal(weighting.told[5], torch.arange(5, 10))
        assert weighting.ids is None
    assert torch.equal(mine, passed_on) and all(torch.equal(found[name], expected[name]) for name in found)
