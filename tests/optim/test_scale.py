"""The unit of the loss is found out: sums, means and multiples train alike, and other losses are named."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from training import through_a_file

from natgrad import Bernoulli, Categorical, ConvexLoss, Gaussian, KLLimit, NaturalGradient

N, OUT, STEPS = 12, 5, 8
Loss = Callable[[Tensor, Tensor], Tensor]
DOUBLE = torch.float64


def network(*last: nn.Module) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, OUT), *last).to(DOUBLE)


def images(*last: nn.Module) -> nn.Sequential:
    """Class scores (n, C, h, w)."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(6, 7, 1), nn.Tanh(), nn.Conv2d(7, OUT, 1), *last).to(DOUBLE)


def inputs(step: int, *size: int) -> Tensor:
    return torch.randn(N, 6, *size, generator=torch.Generator().manual_seed(step), dtype=DOUBLE)


def classes(x: Tensor) -> Tensor:
    return x[:, :OUT].argmax(1)


def bits(x: Tensor) -> Tensor:
    return (x[:, :OUT] > 0).to(x.dtype)


def grey(x: Tensor) -> Tensor:
    return (x[:, :OUT] / 2 + 0.5).clamp(0, 1)


def real(x: Tensor) -> Tensor:
    return x[:, :OUT] * 3 + x[:, 1:]


def trained(
    likelihood: Any,
    loss: Loss,
    of: Callable[[Tensor], Tensor],
    model: nn.Module | None = None,
    size: tuple[int, ...] = (),
    told: bool = False,
    steps: int = STEPS,
    **settings: Any,
) -> tuple[nn.Module, NaturalGradient]:
    model = network() if model is None else model
    optimizer = NaturalGradient(model, likelihood=likelihood, **settings)
    for step in range(steps):
        x = inputs(step, *size)
        if told:
            optimizer.targets(of(x))
        optimizer.zero_grad()
        loss(model(x), of(x)).backward()
        optimizer.step()
    return model, optimizer


def weights(model: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach()


def assert_alike(one: nn.Module, other: nn.Module) -> None:
    torch.testing.assert_close(weights(one), weights(other), rtol=1e-8, atol=1e-10)


def mean_of_outputs(f: Tensor, y: Tensor) -> Tensor:
    return 0.5 * (f - y).square().sum(1).mean()


def summed(f: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(f, y, reduction="sum")


def thousandfold(f: Tensor, y: Tensor) -> Tensor:
    return 1000 * F.cross_entropy(f, y)


def small(f: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(f, y) / 50


def scaled(likelihood: Any, factor: float) -> Any:
    """The same with a loss that is announced as a multiple."""

    class Announced(type(likelihood)):  # type: ignore[misc]
        def scale(self, output: Tensor) -> float:
            return factor * super().scale(output)

        def capacity(self, output: Tensor) -> float:
            return factor * likelihood.capacity(output)

        def hessian_product(self, output: Tensor, V: Tensor, targets: Any = None) -> Tensor:
            return factor * likelihood.hessian_product(output, V, targets)

    return Announced(**{name: getattr(likelihood, name) for name in likelihood.__dataclass_fields__})


FACTORS: list[tuple[str, Any, Loss, Callable[[Tensor], Tensor], float, bool]] = [
    ("bce_mean", Bernoulli(), F.binary_cross_entropy_with_logits, bits, 1 / OUT, False),
    ("bce_sum", Bernoulli(reduction="mean"), lambda f, y: F.binary_cross_entropy_with_logits(f, y, reduction="sum"),
     bits, N * OUT, False),
    ("bce_mean_told", Bernoulli(), F.binary_cross_entropy_with_logits, grey, 1 / OUT, True),
    ("mse", Gaussian(), F.mse_loss, real, 2 / OUT, True),
    ("mse_of_bits", Gaussian(), F.mse_loss, bits, 2 / OUT, False),
    ("half_squares", Gaussian(reduction="mean"), mean_of_outputs, real, OUT / 2, True),
    ("summed", Categorical(), summed, classes, N, False),
    ("thousandfold", Categorical(), thousandfold, classes, 1000, False),
    ("small", Categorical(label_smoothing=0.0), small, classes, 1 / 50, False),
    ("smoothed_sum", Categorical(label_smoothing=0.1),
     lambda f, y: F.cross_entropy(f, y, reduction="sum", label_smoothing=0.1), classes, N, False),
]  # fmt: skip


@pytest.mark.parametrize(("likelihood", "loss", "of", "factor", "told"), [row[1:] for row in FACTORS],
                         ids=[row[0] for row in FACTORS])  # fmt: skip
def test_another_reduction_trains_as_if_it_had_been_announced(
    likelihood: Any, loss: Loss, of: Callable[[Tensor], Tensor], factor: float, told: bool
) -> None:
    found, optimizer = trained(likelihood, loss, of, told=told)
    announced, other = trained(scaled(likelihood, factor), loss, of, told=told)
    assert optimizer.statistics()["loss_factor"] == pytest.approx(factor, rel=1e-9)
    assert other.statistics()["loss_factor"] == 1
    assert_alike(found, announced)


def poisson(f: Tensor, y: Tensor) -> Tensor:
    return F.poisson_nll_loss(f, y, reduction="none")


def test_a_loss_of_its_own_is_measured_at_the_targets() -> None:
    settings: dict[str, Any] = {"told": True, "damping": 0.01, "step_size": KLLimit()}
    found, optimizer = trained(ConvexLoss(poisson), lambda f, y: poisson(f, y).sum(), bits, **settings)
    announced = ConvexLoss(lambda f, y: N * poisson(f, y))
    assert optimizer.statistics()["loss_factor"] == pytest.approx(N)
    assert_alike(found, trained(announced, lambda f, y: poisson(f, y).sum(), bits, **settings)[0])


def test_the_announced_reductions_are_those() -> None:
    for likelihood, other, loss, of in (
        (Bernoulli(), Bernoulli(reduction="mean"), F.binary_cross_entropy_with_logits, bits),
        (Gaussian(), Gaussian(reduction="mean"), F.mse_loss, bits),
    ):
        assert_alike(trained(likelihood, loss, of)[0], trained(other, loss, of)[0])


def test_grey_targets_are_told_from_the_reductions_that_there_are() -> None:
    found, optimizer = trained(Bernoulli(), F.binary_cross_entropy_with_logits, grey)
    assert optimizer.statistics()["loss_factor"] == 1 / OUT
    assert_alike(found, trained(Bernoulli(reduction="mean"), F.binary_cross_entropy_with_logits, grey)[0])


@pytest.mark.parametrize("divided", [True, False])
def test_micro_batches_need_not_be_divided(divided: bool) -> None:
    models = [network(), network()]
    whole, parts = (NaturalGradient(model, likelihood=Categorical(), estimator="exact") for model in models)
    for step in range(4):
        x = inputs(step)
        whole.zero_grad()
        F.cross_entropy(models[0](x), classes(x)).backward()
        whole.step()
        parts.zero_grad()
        for half in x.chunk(2):
            (F.cross_entropy(models[1](half), classes(half)) / (2 if divided else 1)).backward()
        parts.step()
    assert parts.statistics()["loss_factor"] == (1 if divided else 2)
    if divided:
        assert_alike(models[0], models[1])


def test_the_matrix_of_exact_products_has_the_factor_too() -> None:
    from natgrad import ExactQuadraticModel

    settings: dict[str, Any] = {"step_size": ExactQuadraticModel()}
    assert_alike(
        trained(Categorical(), summed, classes, **settings)[0],
        trained(scaled(Categorical(), N), summed, classes, **settings)[0],
    )


def test_a_resumed_run_goes_on_with_the_factor() -> None:
    model, optimizer = trained(Categorical(), summed, classes, steps=2)
    straight, _ = trained(Categorical(), summed, classes, steps=5)
    again = network()
    again.load_state_dict(through_a_file(model.state_dict()))
    resumed = NaturalGradient(again, likelihood=Categorical())
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    for step in range(2, 5):
        x = inputs(step)
        resumed.zero_grad()
        summed(again(x), classes(x)).backward()
        resumed.step()
    assert torch.equal(weights(straight), weights(again))


# Mistakes are named.

MISTAKES: list[tuple[str, Any, Loss, Callable[[Tensor], Tensor], Callable[[], nn.Module], tuple[int, ...], str]] = [
    ("softmax_twice", Categorical(), F.cross_entropy, classes, lambda: network(nn.Softmax(1)), (), "softmax twice"),
    ("softmax_and_log", Categorical(), lambda f, y: F.nll_loss(f.log(), y), classes, lambda: network(nn.Softmax(1)), (),
     "inputs='probabilities'"),
    ("sigmoid_before", Bernoulli(), F.binary_cross_entropy, bits, lambda: network(nn.Sigmoid()), (),
     "inputs='probabilities'"),
    ("gaussian_of_classes", Gaussian(), F.cross_entropy, classes, network, (), r"say Categorical\(\)"),
    ("gaussian_of_images", Gaussian(), F.cross_entropy, classes, images, (3, 4), r"class_dim=1"),
    ("bernoulli_of_classes", Bernoulli(), F.cross_entropy, classes, network, (), r"say Categorical\(\)"),
    ("gaussian_of_bits", Gaussian(), F.binary_cross_entropy_with_logits, bits, network, (), r"say Bernoulli\(\)"),
    ("categorical_of_bits", Categorical(), F.binary_cross_entropy_with_logits, bits, network, (),
     r"say Bernoulli\(\)"),
    ("the_width", Categorical(), F.cross_entropy, classes, images, (3, 4), r"class_dim=1"),
]  # fmt: skip


@pytest.mark.parametrize(("likelihood", "loss", "of", "model", "size", "said"), [row[1:] for row in MISTAKES],
                         ids=[row[0] for row in MISTAKES])  # fmt: skip
def test_a_mistake_is_named_once(
    likelihood: Any,
    loss: Loss,
    of: Callable[[Tensor], Tensor],
    model: Callable[[], nn.Module],
    size: tuple[int, ...],
    said: str,
) -> None:
    with pytest.warns(UserWarning, match=said) as caught:
        trained(likelihood, loss, of, model(), size)
    assert len(caught) == 1


# What is no mistake is not.


def weighed(f: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(f, y, torch.tensor([1, 2, 5, 0.5, 9], dtype=DOUBLE))


def mixed(f: Tensor, y: Tensor) -> Tensor:
    return 0.7 * F.cross_entropy(f, y) + 0.3 * F.cross_entropy(f, y.roll(1))


def focal(f: Tensor, y: Tensor) -> Tensor:
    nll = F.cross_entropy(f, y, reduction="none")
    return ((1 - (-nll).exp()).square() * nll).mean()


def distilled(f: Tensor, y: Tensor) -> Tensor:
    teacher = (3 * F.one_hot(y, OUT) + torch.linspace(0, 1, OUT, dtype=DOUBLE)).softmax(1)
    return F.kl_div(f.log_softmax(1), teacher, reduction="batchmean")


def ignoring(f: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(f, y.where(torch.arange(N) % 3 > 0, -100))


def with_penalty(f: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(f, y) + 1e-3 * f.logsumexp(1).square().mean()


def of_a_part(f: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(f[:8], y[:8])


def advantages(f: Tensor, y: Tensor) -> Tensor:
    advantage = torch.linspace(-1, 1, N, dtype=DOUBLE)
    return (advantage * F.cross_entropy(f, y, reduction="none")).mean()


def hinge(f: Tensor, y: Tensor) -> Tensor:
    return F.multi_margin_loss(f, y)


def positives(f: Tensor, y: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(f, y, pos_weight=torch.tensor(3.0)) * OUT


def huber(f: Tensor, y: Tensor) -> Tensor:
    return F.huber_loss(f, y) * OUT


def absolute(f: Tensor, y: Tensor) -> Tensor:
    return (f - y).abs().sum(1).mean()


def normalised(f: Tensor, y: Tensor) -> Tensor:
    return F.nll_loss(f, y)


QUIET: list[tuple[str, Any, Loss, Callable[[Tensor], Tensor], tuple[nn.Module, ...]]] = [
    ("mean", Categorical(), F.cross_entropy, classes, ()),
    ("weighed", Categorical(), weighed, classes, ()),
    ("announced_weights", Categorical(weight=torch.tensor([1.0, 2, 5, 0.5, 9])), weighed, classes, ()),
    ("smoothed", Categorical(), lambda f, y: F.cross_entropy(f, y, label_smoothing=0.2), classes, ()),
    ("announced_smoothing", Categorical(label_smoothing=0.2), lambda f, y: F.cross_entropy(f, y, label_smoothing=0.2),
     classes, ()),
    ("mixed", Categorical(), mixed, classes, ()),
    ("focal", Categorical(), focal, classes, ()),
    ("distilled", Categorical(), distilled, classes, ()),
    ("ignoring", Categorical(), ignoring, classes, ()),
    ("penalty", Categorical(), with_penalty, classes, ()),
    ("part", Categorical(), of_a_part, classes, ()),
    ("advantages", Categorical(), advantages, classes, ()),
    ("hinge", Categorical(), hinge, classes, ()),
    ("squares", Categorical(), lambda f, y: mean_of_outputs(f, F.one_hot(y, OUT)), classes, ()),
    ("log_softmax", Categorical(), normalised, classes, (nn.LogSoftmax(1),)),
    ("probabilities", Categorical(inputs="probabilities"), lambda f, y: F.nll_loss(f.log(), y), classes,
     (nn.Softmax(1),)),
    ("bits", Bernoulli(reduction="mean"), F.binary_cross_entropy_with_logits, bits, ()),
    ("grey", Bernoulli(reduction="mean"), F.binary_cross_entropy_with_logits, grey, ()),
    ("positives", Bernoulli(), positives, bits, ()),
    ("real", Gaussian(), mean_of_outputs, real, ()),
    ("real_bits", Gaussian(), mean_of_outputs, bits, ()),
    ("huber", Gaussian(), huber, real, ()),
    ("absolute", Gaussian(), absolute, bits, ()),
    ("unused", Gaussian(), lambda f, y: 0 * f.sum(), real, ()),
]  # fmt: skip


@pytest.mark.parametrize(("likelihood", "loss", "of", "last"), [row[1:] for row in QUIET],
                         ids=[row[0] for row in QUIET])  # fmt: skip
def test_what_is_no_mistake_is_left_as_it_is(
    likelihood: Any, loss: Loss, of: Callable[[Tensor], Tensor], last: tuple[nn.Module, ...]
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, optimizer = trained(likelihood, loss, of, network(*last))
    assert optimizer.statistics()["loss_factor"] == 1


def test_a_gradient_penalty_is_no_mistake() -> None:
    model = network()
    optimizer = NaturalGradient(model, likelihood=Categorical())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(4):
            x = inputs(step).requires_grad_()
            f = model(x)
            (slope,) = torch.autograd.grad(f.square().sum(), x, create_graph=True)
            optimizer.zero_grad()
            (F.cross_entropy(f, classes(x)) + 0.01 * slope.square().mean()).backward()
            optimizer.step()
    assert optimizer.statistics()["loss_factor"] == 1


# Without a likelihood.

LOSSES: dict[str, Loss] = {
    "thousandfold": thousandfold,
    "sum": summed,
    "thousandth": lambda f, y: F.cross_entropy(f, y) / 1000,
}


@pytest.mark.parametrize("policy", ["default", "limited"])
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_without_a_likelihood_the_unit_of_the_loss_does_not_matter(loss: Loss, policy: str) -> None:
    settings: dict[str, Any] = {} if policy == "default" else {"step_size": KLLimit()}
    mean, _ = trained(None, F.cross_entropy, classes, steps=20, **settings)
    other, _ = trained(None, loss, classes, steps=20, **settings)
    assert (weights(mean) - weights(network())).abs().max() > 0.01
    assert_alike(mean, other)


def by_scaler(model: nn.Module, optimizer: NaturalGradient, scaler: Any, steps: int, clip: float | None = None) -> None:
    for step in range(steps):
        x = inputs(step)
        optimizer.zero_grad()
        scaler.scale(F.cross_entropy(model(x), classes(x))).backward()
        scaler.unscale_(optimizer)
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        scaler.step(optimizer)
        scaler.update()


@pytest.mark.parametrize(("likelihood", "clip"), [(None, None), (Categorical(), None), (Categorical(), 0.1)])
def test_a_grad_scaler_need_not_be_announced(likelihood: Any, clip: float | None) -> None:
    models = [network(), network()]
    plain, scaled = (NaturalGradient(model, likelihood=likelihood) for model in models)
    by_scaler(models[0], plain, torch.amp.GradScaler("cpu", enabled=False), 12, clip)
    by_scaler(models[1], scaled, torch.amp.GradScaler("cpu", growth_interval=3), 12, clip)
    assert (weights(models[0]) - weights(network())).abs().max() > 0.01
    assert_alike(models[0], models[1])


@pytest.mark.parametrize("likelihood", [None, Categorical()])
def test_gradients_may_be_divided_by_the_number_of_passes_after_them(likelihood: Any) -> None:
    models = [network(), network()]
    before, after = (NaturalGradient(model, likelihood=likelihood) for model in models)
    for step in range(6):
        for k, optimizer in enumerate((before, after)):
            optimizer.zero_grad()
            for part in inputs(step).chunk(3):
                (F.cross_entropy(models[k](part), classes(part)) / (1 if k else 3)).backward()
            if k:
                for p in models[k].parameters():
                    assert p.grad is not None
                    p.grad /= 3
            optimizer.step()
    assert_alike(models[0], models[1])


def test_clipping_still_shortens_a_step() -> None:
    free, clipped = (network(), network())
    for model, clip in ((free, None), (clipped, 0.1)):
        optimizer = NaturalGradient(model, step_size=KLLimit(limit=1e6), momentum=0.0)
        by_scaler(model, optimizer, torch.amp.GradScaler("cpu", enabled=False), 1, clip)
    x = inputs(0)
    start = network()
    F.cross_entropy(start(x), classes(x)).backward()
    size = torch.cat([p.grad.flatten() for p in start.parameters() if p.grad is not None]).norm()
    moved, less = (weights(model) - weights(start) for model in (free, clipped))
    torch.testing.assert_close(less, moved * (0.1 / size), rtol=1e-5, atol=1e-8)
