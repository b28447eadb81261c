"""Weighted layers leave sum_n w_n grad_n in ``.grad``, and alter nothing else that a backward pass gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from test_capture import LAYERS, every_layer, recorded
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils.checkpoint import checkpoint

from natgrad.fngd import Examples
from natgrad.fngd.gradients import by_autograd, weighted_bias, weighted_operand
from natgrad.fngd.weighting import Plan, Weighting
from natgrad.layers import Layer
from natgrad.look import look
from oracles import assert_equal

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")

N = 5
W = torch.tensor([0.5, -1.0, 2.0, 0.0, 1.7], dtype=torch.float64)


def in_order(which: Examples, g: Tensor) -> Tensor:
    return W.to(g.device)[which.start : which.start + len(g)]


def layers_of(model: nn.Module, x: Tensor) -> Mapping[str, Layer]:
    return look(model, (x.clone().requires_grad_(),)).coverage().layers


@contextmanager
def weighted(
    model: nn.Module,
    x: Tensor,
    weights: Callable[[Examples, Tensor], Tensor] | None = in_order,
    needs_ids: bool = False,
) -> Iterator[Weighting]:
    layers = layers_of(model, x)
    weighting = Weighting(model, needs_ids)
    weighting.follow(Plan(layers, dict.fromkeys(layers, weights) if weights else {}, tuple(model.parameters())))
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
    """A norm whose parameters are used in ways that have no rule."""

    def forward(self, input: Tensor) -> Tensor:
        return F.layer_norm(input, tuple(self.normalized_shape)) * self.weight.abs() + self.bias.tanh()


class Deep(nn.Module):
    """A layer behind a parameter without rule, one with a change in place after it, and one called twice."""

    def __init__(self, again: bool | None = None) -> None:
        super().__init__()
        self.conv, self.norm, self.twice = nn.Conv1d(2, 4, 3, padding=1), OwnNorm(6), nn.Linear(6, 6)
        self.head, self.again = nn.Linear(24, 3), again

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x) if self.again is None else checkpoint(self.body, x, use_reentrant=self.again))

    def body(self, x: Tensor) -> Tensor:
        h = self.norm(torch.relu_(self.conv(x)))
        return self.twice(torch.tanh(self.twice(h))).flatten(1)


def deep(again: bool | None = None) -> tuple[Deep, Tensor]:
    torch.manual_seed(1)
    return Deep(again), torch.randn(N, 2, 6)


@every_layer
def test_the_gradient_of_a_layer_is_that_of_autograd(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    module, x = make(), torch.randn(N, *shape)
    record, layers = recorded(nn.Sequential(module), x)  # g is y
    y = module(x)
    parameters = [p for layer in layers.values() for p in layer.parameters]  # a bias may be a layer of its own
    expected = torch.autograd.grad(y, parameters, y.detach() * W.view(-1, *(1,) * (y.ndim - 1)))
    uses = [use for name in layers for use in record.calls[name]]
    with torch.no_grad():
        for use in uses:
            form, g, size = use.call.form, use.gradient(0), torch.Size(use.call.weight.view.size)
            of = next(k for k, p in enumerate(parameters) if p is use.call.weight.parameter)
            for compute in (weighted_operand, by_autograd):
                assert_equal(compute(form, use.x, g, W, size).reshape(expected[of].shape), expected[of])
            if use.call.bias is not None:
                assert_equal(weighted_bias(form, g, W, expected[1].shape), expected[1])


ALIKE = {name for name in LAYERS if "Conv1D" in name}
"""Those whose rule is not that of a product that computes: the examples of the layer weigh 1."""


@pytest.mark.parametrize("name", LAYERS)
def test_a_weighted_layer_is_weighted_example_by_example_or_says_that_it_is_not(name: str) -> None:
    make, shape = LAYERS[name]
    model = nn.Sequential(make(), nn.ReLU(inplace=True), nn.Flatten())
    x = torch.randn(N, *shape)
    expected, (plain, passed_on) = by_a_loop(model, x), gradients(model, x)
    with weighted(model, x) as weighting:
        for _ in range(2):  # the first pass finds out what can be weighed
            weighting.begin(0)
            found, mine = gradients(model, x)
            for parameter in expected:
                assert_equal(found[parameter], plain[parameter] if name in ALIKE else expected[parameter])
            assert torch.equal(mine, passed_on)
        assert weighting.plan.alike == (set(weighting.plan.layers) if name in ALIKE else set())
        assert weighting.armed == (name not in ALIKE)


def test_earlier_layers_and_other_parameters_receive_what_they_would_without_weights() -> None:
    model, x = deep()
    expected, (plain, passed_on) = by_a_loop(model, x), gradients(model, x)
    with weighted(model, x):
        found, mine = gradients(model, x)
    for name in ("conv", "twice", "head"):
        for kind in ("weight", "bias"):
            assert_equal(found[f"{name}.{kind}"], expected[f"{name}.{kind}"])
    for name in ("norm.weight", "norm.bias"):
        assert torch.equal(found[name], plain[name])
    assert torch.equal(mine, passed_on)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recomputed_forward_pass_is_weighted_alike(reentrant: bool) -> None:
    found = []
    for again in (None, reentrant):
        model, x = deep(again)
        with weighted(model, x):
            found.append(gradients(model, x)[0])
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_positions_count_on_over_micro_batches_until_the_next_step() -> None:
    model, x = deep()
    expected = by_a_loop(model, x)
    with weighted(model, x) as weighting:
        for _ in range(2):
            weighting.begin(0)
            model.zero_grad()
            for part in x.split(2):
                (0.5 * model(part).square().sum()).backward()
            for name in ("conv.weight", "twice.bias", "head.weight"):
                gradient = model.get_parameter(name).grad
                assert gradient is not None
                assert_equal(gradient, expected[name])


@pytest.mark.parametrize("how", ["eval", "no weights", "closed"])
def test_outside_of_training_gradients_are_plain(how: str) -> None:
    model, x = deep()
    expected, _ = gradients(model, x)
    with weighted(model, x) as weighting:
        if how == "eval":
            model.eval()
        else:
            weighting.follow(Plan()) if how == "no weights" else weighting.close()
        found, _ = gradients(model, x)
        if how == "eval":  # and does not count
            model.train()
            assert_equal(gradients(model, x)[0]["head.weight"], by_a_loop(deep()[0], x)["head.weight"])
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_without_gradients_nothing_is_weighted_and_nothing_kept() -> None:
    model, x = deep()
    with weighted(model, x), torch.no_grad():
        assert not model(x).requires_grad
    assert all(p.requires_grad for p in model.parameters())


def test_a_frozen_parameter_stays_frozen_and_its_layer_weighted() -> None:
    for frozen in ("conv.bias", "head.weight"):
        model, x = deep()
        model.get_parameter(frozen).requires_grad_(False)
        expected = by_a_loop(model, x)
        with weighted(model, x):
            found, _ = gradients(model, x)
        assert frozen not in found and not model.get_parameter(frozen).requires_grad
        for name in ("conv.weight", "twice.weight"):
            assert_equal(found[name], expected[name])


def test_a_layer_frozen_after_the_hooks_were_set_gets_no_gradient() -> None:
    model, x = deep()
    with weighted(model, x):
        model.conv.weight.requires_grad_(False)
        found, _ = gradients(model, x)
    assert "conv.weight" not in found and not model.conv.weight.requires_grad
    assert_equal(found["head.weight"], by_a_loop(model, x)["head.weight"])


def test_a_layer_that_raises_keeps_its_parameters_trained() -> None:
    model, x = deep()
    expected = by_a_loop(model, x)
    with weighted(model, x):
        with pytest.raises(RuntimeError):
            model(torch.randn(N, 3, 6))
        assert all(p.requires_grad for p in model.parameters()) and not _get_current_function_mode_stack()
        assert_equal(gradients(model, x)[0]["head.weight"], expected["head.weight"])


def test_an_interrupted_pass_leaves_nothing_behind() -> None:
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    model, x = deep()
    expected = by_a_loop(model, x)
    with weighted(model, x):
        handle = model.head.register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(x)
        assert not _get_current_function_mode_stack()
        handle.remove()
        assert_equal(gradients(model, x)[0]["conv.weight"], expected["conv.weight"])


def test_a_second_derivative_is_refused() -> None:
    model, x = deep()
    with weighted(model, x):
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

    with weighted(model, x, by_size):
        found, _ = gradients(model, x)
    y = model(x).detach()
    assert torch.equal(seen[0], y)
    assert_equal(found["0.weight"], (y / y.norm(dim=1, keepdim=True)).mT @ x)


def test_under_autocast_the_product_runs_in_low_precision_and_the_gradient_is_that_of_the_parameter() -> None:
    model, x = deep()
    model, x = model.float(), x.float()
    with torch.autocast("cpu", torch.bfloat16):
        expected = by_a_loop(model, x)
        with weighted(model, x):
            found, _ = gradients(model, x)
    for name in ("conv.weight", "head.weight", "head.bias"):
        assert found[name].dtype == torch.float32
        assert_equal(found[name], expected[name], 0.05)


def test_ids_must_be_told_and_be_as_many_as_the_examples() -> None:
    model, x = deep()
    with weighted(model, x, needs_ids=True) as weighting:
        with pytest.raises(ValueError, match=r"optimizer\.examples\(ids\)"):
            model(x)
        weighting.ids = torch.arange(3)
        with pytest.raises(ValueError, match="3 ids, but the batch has 5 examples"):
            model(x)
        assert all(p.requires_grad for p in model.parameters())


def test_layers_without_weights_are_watched_for_which_examples_reach_them_alone() -> None:
    model, x = deep()
    expected, passed_on = gradients(model, x)
    with weighted(model, x, None, needs_ids=True) as weighting:
        weighting.begin(3)
        for ids in (torch.arange(5), torch.arange(5, 10)):
            weighting.ids = ids
            found, mine = gradients(model, x)
        assert list(weighting.told) == [0, 5] and torch.equal(weighting.told[5], torch.arange(5, 10))
        assert weighting.ids is None
    assert torch.equal(mine, passed_on) and all(torch.equal(found[name], expected[name]) for name in found)


# Operations that are no layers of torch.


class Written(nn.Module):
    """Weights of its own: two uses of a weight of which one is scaled, and a bias that two products share."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.weight, self.other = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4, 4))
        self.bias = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(F.linear(self.norm(x).flatten(0, 1), self.weight, self.bias))
        h = torch.tanh(F.linear(h, self.other, self.bias))
        return F.linear(h, self.weight / 2).unflatten(0, x.shape[:2]).flatten(1)


def test_weights_that_are_used_apart_from_modules_are_weighted_however_their_positions_stand() -> None:
    torch.manual_seed(2)
    model, x = Written(), torch.randn(N, 3, 4)
    expected, (_, passed_on) = by_a_loop(model, x), gradients(model, x)
    with weighted(model, x) as weighting:
        for _ in range(2):  # the norm alone shows where examples are
            weighting.begin(0)
            found, mine = gradients(model, x)
            for name in ("weight", "other", "bias", "norm.weight"):
                assert_equal(found[name], expected[name])
            assert torch.equal(mine, passed_on)
        assert not weighting.plan.alike


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_the_input_products_of_a_recurrence_are_weighted_and_its_recurrent_ones_are_not(kind: type[nn.RNN]) -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(3)
            self.cells = kind(2, 3, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.cells(x)[0][:, -1]

    model, x = Last(), torch.randn(N, 4, 2)
    expected, (plain, passed_on) = by_a_loop(model, x), gradients(model, x)
    with weighted(model, x) as weighting:
        for _ in range(2):
            weighting.begin(0)
            found, mine = gradients(model, x)
            for name in ("weight_ih_l0", "bias_ih_l0"):
                assert_equal(found[f"cells.{name}"], expected[f"cells.{name}"])
            for name in ("weight_hh_l0", "bias_hh_l0"):
                assert_equal(found[f"cells.{name}"], plain[f"cells.{name}"])
            assert_equal(mine, passed_on)
        assert weighting.plan.alike == {"cells.hh_l0"}


def test_positions_that_the_examples_share_are_not_weighted() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(4)
            self.own, self.shared = nn.Linear(3, 2), nn.Linear(4, 2)
            self.register_buffer("table", torch.randn(7, 4))

        def forward(self, x: Tensor) -> Tensor:
            return self.own(x) + self.shared(self.table).mean(0)

    model, x = Shared(), torch.randn(N, 3)
    expected, (plain, _) = by_a_loop(model, x), gradients(model, x)
    with weighted(model, x):
        found, _ = gradients(model, x)
    assert_equal(found["own.weight"], expected["own.weight"])
    assert_equal(found["shared.weight"], plain["shared.weight"])
