"""Losses given as functions, and sums of losses: against the GGN by autograd, J^T H J of the loss as written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import natgrad
from natgrad import (
    KFAC,
    Approximation,
    Bernoulli,
    Categorical,
    ConvexLoss,
    ExactFisher,
    ExactQuadraticModel,
    Gaussian,
    JointWoodbury,
    Likelihood,
    LossSum,
    NaturalGradient,
    QuadraticModel,
)
from natgrad.labels import Labels
from oracles import assert_equal, error, ggn

N = 12


def logcosh(f: Tensor, y: Tensor) -> Tensor:
    return (f - y).cosh().log()


def pinball(f: Tensor, y: Tensor) -> Tensor:
    """A smooth quantile loss: tau r + softplus(-r)."""
    return 0.8 * (y - f) + F.softplus(f - y)


def simplex(f: Tensor, y: Tensor) -> Tensor:
    """Not elementwise: log sum exp, and a coupling of all outputs."""
    return f.logsumexp(-1) - f[0] * y[0] + 0.1 * (f.sum() - y.sum()) ** 4


def real(*shape: int) -> Tensor:
    return 2 * torch.randn(N, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def whole(*shape: int, below: int = 3) -> Tensor:
    return torch.randint(below, (N, *shape), generator=torch.Generator().manual_seed(2))


@dataclass(frozen=True)
class Case:
    """The loss of one term, targets, and the loss of the batch as a user writes it."""

    likelihood: ConvexLoss
    targets: Tensor
    loss: Callable[[Tensor, Tensor], Tensor]
    same: Likelihood | None = None
    """The likelihood that has this loss."""
    positions: int = 0


def poisson(f: Tensor, y: Tensor) -> Tensor:
    return F.poisson_nll_loss(f, y)


def tokens(f: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(f.flatten(0, 1), y.flatten())


CASES = {
    "huber": Case(ConvexLoss(F.huber_loss, reduction="mean"), real(3), F.huber_loss),
    "logcosh": Case(ConvexLoss(logcosh), real(3), lambda f, y: logcosh(f, y).sum() / N),
    "pinball": Case(ConvexLoss(pinball), real(3), lambda f, y: pinball(f, y).sum() / N),
    "pinball by output": Case(ConvexLoss(pinball, event_dims=0), real(3), lambda f, y: pinball(f, y).mean()),
    "poisson": Case(ConvexLoss(poisson, reduction="mean"), whole(3).double(), poisson),
    "poisson, targets unknown": Case(ConvexLoss(poisson, False, reduction="mean"), whole(3).double(), poisson),
    "not elementwise": Case(ConvexLoss(simplex), real(3), lambda f, y: torch.stack([*map(simplex, f, y)]).mean()),
    "MSELoss": Case(ConvexLoss(F.mse_loss, reduction="mean"), real(3), F.mse_loss, Gaussian(reduction="mean")),
    "half square": Case(
        ConvexLoss(lambda f, y: (f - y) ** 2 / 2), real(3), lambda f, y: (f - y).square().sum() / 2 / N, Gaussian()
    ),
    "cross entropy": Case(ConvexLoss(F.cross_entropy), whole(), F.cross_entropy, Categorical()),
    "cross entropy of tokens": Case(ConvexLoss(F.cross_entropy), whole(4), tokens, Categorical(), positions=4),
    "binary cross entropy": Case(
        ConvexLoss(F.binary_cross_entropy_with_logits, reduction="mean"),
        whole(3, below=2).double(),
        F.binary_cross_entropy_with_logits,
        Bernoulli(reduction="mean"),
    ),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def inputs(case: Case) -> Tensor:
    return torch.randn(N, *((case.positions,) if case.positions else ()), 4)


# The Fisher.


@every_case
def test_law_25_the_fisher_is_the_ggn_of_the_loss_as_the_user_writes_it(case: Case) -> None:
    model, x = network(), inputs(case)
    found = natgrad.fisher(model, ExactFisher(), case.likelihood, [(x, case.targets)])
    for name, expected in ggn(model, x, lambda output: case.loss(output, case.targets)).items():
        assert_equal(found[name].dense(), expected)


@every_case
def test_a_known_loss_gives_what_its_likelihood_gives(case: Case) -> None:
    if case.same is None:
        return
    model, x = network(), inputs(case)
    output = model(x).detach()
    assert case.likelihood.scale(output) * 2 ** (case.same == Gaussian(reduction="mean")) == case.same.scale(output)
    for make in (KFAC, ExactFisher):
        found, expected = (
            natgrad.fisher(model, make(), likelihood, [(x, case.targets)])
            for likelihood in (case.likelihood, case.same)
        )
        for name in expected:
            assert_equal(found[name].dense(), expected[name].dense())


@every_case
def test_law_24_random_vectors_have_the_hessian_for_their_covariance(case: Case) -> None:
    """3,000 draws: the relative error is below .1; with 100 times fewer it is about ten times that."""
    output = network()(inputs(case)).detach()

    def covariance(estimator: Any, draws: int = 1) -> Tensor:
        labels = Labels(case.likelihood, estimator, draws, case.targets)
        seeds = torch.stack([seed.flatten(1) for seed in labels.seeds(output)])
        return torch.einsum("sni,snj->nij", seeds, seeds) / len(seeds)

    few, many = (error(covariance("sampled", draws), covariance("exact")) for draws in (30, 3000))
    assert many < 0.1
    assert 3 < few / many < 33


def test_one_output_a_term_is_exact_after_one_draw() -> None:
    model, x, y = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)), torch.randn(N, 4), torch.randn(N, 1)
    exact, drawn = (
        natgrad.fisher(model, ExactFisher(), ConvexLoss(logcosh), [(x, y)], estimator=estimator)
        for estimator in ("exact", "sampled")
    )
    for name in exact:
        assert_equal(drawn[name].dense(), exact[name].dense())


@every_case
def test_the_empirical_seed_is_the_gradient_of_the_loss(case: Case) -> None:
    output = network()(inputs(case)).detach().requires_grad_()
    labels = Labels(case.likelihood, "empirical", targets=case.targets)
    (seed,) = labels.seeds(output.detach())
    count = labels.terms(output.detach())
    (gradient,) = torch.autograd.grad(case.loss(output, case.targets), output)
    assert isinstance(count, float)
    assert_equal(seed * case.likelihood.scale(output) ** 0.5 / (count * N), gradient)


def test_a_batch_draws_the_same_vectors_whole_or_in_parts() -> None:
    output, y = torch.randn(60, 3), torch.randn(60, 3)

    def drawn(parts: int) -> Tensor:
        labels = Labels(ConvexLoss(simplex), "sampled", 3)
        labels.reseed(0)
        found = []
        for part, labels.targets in zip(output.chunk(parts), y.chunk(parts), strict=True):
            found.append(torch.stack(list(labels.seeds(part))))
        return torch.cat(found, 1)

    assert_equal(drawn(7), drawn(1), 1e-12)


# Training.


@pytest.mark.parametrize("name", ["logcosh", "poisson", "not elementwise"])
def test_the_quadratic_model_reads_the_same_curvature_with_and_without_samples(name: str) -> None:
    """One step, all else equal, through exact seeds and through forward-mode products with the Hessian."""
    case, x, steps = CASES[name], torch.randn(N, 4), []
    for policy in (QuadraticModel(limit=None, per_layer=False), ExactQuadraticModel(limit=None, per_layer=False)):
        torch.manual_seed(5)
        model = network()
        optimizer = NaturalGradient(
            model, likelihood=case.likelihood, estimator="exact", step_size=policy, precision=torch.float64
        )
        optimizer.targets(case.targets)
        case.loss(model(x), case.targets).backward()
        optimizer.step()
        steps.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert_equal(steps[0], steps[1], 1e-9)


def test_poisson_regression_trains_without_being_told_targets() -> None:
    x = torch.randn(200, 4)
    y = torch.poisson((x[:, :3] + 0.5).exp())
    model = network()
    optimizer = NaturalGradient(model, likelihood=ConvexLoss(F.poisson_nll_loss, False, reduction="mean"))
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = F.poisson_nll_loss(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    best = F.poisson_nll_loss(x[:, :3] + 0.5, y)  # the rates that drew them
    assert losses[-1] < best + 0.05 * (losses[0] - best)


# Refusals.

X = torch.ones(4, 3)
STRANGE: Any = 3


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (
            lambda: ConvexLoss(STRANGE),
            TypeError,
            r"loss must be a function of one term's output and target, got 3",
        ),
        (lambda: ConvexLoss(logcosh, reduction=STRANGE), ValueError, r"reduction must be 'sum' or 'mean', got 3"),
        (lambda: LossSum([]), ValueError, r"parts must be pairs \(coefficient, likelihood\), at least one, got \[\]"),
        (lambda: LossSum([STRANGE]), ValueError, r"parts must be pairs \(coefficient, likelihood\)"),
        (lambda: LossSum([(1.0, STRANGE)]), ValueError, r"parts must be pairs \(coefficient, likelihood\)"),
        (lambda: LossSum([(0.0, Gaussian())]), ValueError, r"coefficients must be finite numbers > 0, got \[0.0\]"),
    ],
)
def test_settings_without_meaning_are_refused(make: Callable[[], Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        make()


@pytest.mark.parametrize(
    ("likelihood", "targets", "message"),
    [
        (ConvexLoss(logcosh), None, r"needs to know the targets: call optimizer.targets\(y\) .* reads_targets=False"),
        (ConvexLoss(logcosh), torch.ones(5, 3), r"ConvexLoss needs targets of shape \(4, ...\), got \(5, 3\)"),
        (ConvexLoss(logcosh, event_dims=0), torch.ones(4), r"targets of shape \(4, 3, ...\), got \(4,\)"),
        (ConvexLoss(logcosh), [1.0, 2.0], r"ConvexLoss needs a tensor of targets, got list"),
        (ConvexLoss(lambda f, y: -(f**2)), X, r"not convex in the output: its Hessian has the eigenvalue -2 .*is -2\)"),
        (ConvexLoss(lambda f, y: f[0] * f[1] - f[2] ** 2), X, r"eigenvalue -2 \(the largest is 1\)"),
    ],
)
def test_losses_without_meaning_are_refused(likelihood: Any, targets: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(Labels(likelihood, "sampled", targets=targets).seeds(X))


def test_a_loss_that_is_flat_by_rounding_is_convex() -> None:
    f = 30 * torch.randn(50, 4, dtype=torch.float32)
    for seed in Labels(ConvexLoss(F.cross_entropy), "exact", targets=torch.zeros(50).long()).seeds(f):
        assert torch.isfinite(seed).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_softmax_that_is_nearly_certain_is_convex(dtype: torch.dtype) -> None:
    """Of p - p p^T nothing is left but rounding."""
    f = torch.tensor([[20.0, 0.0, 0.0], [18.0, 1.0, 0.0], [25.0, 0.0, 3.0]], dtype=dtype)
    for factor in (1, 2, 3):
        for seed in Labels(ConvexLoss(F.cross_entropy), "exact", targets=torch.zeros(3).long()).seeds(factor * f):
            assert torch.isfinite(seed).all()


@pytest.mark.parametrize("loss", [F.l1_loss, lambda f, y: (1 - f * y).clamp(min=0)], ids=["absolute", "hinge"])
def test_a_loss_without_curvature_warns(loss: Any) -> None:
    with pytest.warns(UserWarning, match=r"are 0 at every output of this batch \(is it piecewise linear\?\)"):
        (seed,) = Labels(ConvexLoss(loss), "sampled", targets=X).seeds(2 * X)
    assert not seed.any()


def test_autocast_does_not_round_the_hessian() -> None:
    """Products in a user's loss: in bfloat16 the Hessian of this one has a negative eigenvalue of 1/600."""
    w = torch.tensor([[1.37], [-2.11], [0.73]], dtype=torch.float32)
    likelihood = ConvexLoss(lambda f, y: 0.5 * ((f - y) @ (w @ w.mT)) @ (f - y))
    layer, x, y = nn.Linear(4, 3).float(), torch.randn(N, 4, dtype=torch.float32), torch.randn(N, 3).float()
    optimizer = NaturalGradient(layer, likelihood=likelihood)
    optimizer.targets(y)
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(x)
    (0.5 * ((output.float() - y) @ w).square().sum(1).mean()).backward()
    before = layer.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(layer.weight, before)


def test_an_output_that_is_not_finite_gives_seeds_that_are_not() -> None:
    f = torch.tensor([[1.0, 2.0], [torch.nan, 0.0], [1e4, 0.0]])
    (seed,) = Labels(ConvexLoss(poisson, False), "sampled").seeds(f)
    assert torch.isfinite(seed[0]).all() and not torch.isfinite(seed[1:]).any()


# Sums of losses.


class Heads(nn.Module):
    """Two heads on one trunk; ``only`` says which."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(4, 5), nn.Tanh())
        self.classes, self.values = nn.Linear(5, 3), nn.Linear(5, 2)

    def forward(self, x: Tensor, only: str = "") -> dict[str, Tensor | None]:
        h = self.trunk(x)
        return {
            "classes": None if only == "values" else self.classes(h),
            "values": None if only == "classes" else self.values(h),
        }


PARTS = LossSum(
    [(0.7, Categorical(output="classes", ignore_index=1)), (3.0, Gaussian(output="values", reduction="mean"))]
)


class Whole(nn.Module):
    """Both outputs from one last layer, so that every layer takes part in both passes."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 5))

    def forward(self, x: Tensor, only: str = "") -> dict[str, Tensor | None]:
        y = self.net(x)
        return {
            "classes": None if only == "values" else y[:, :3],
            "values": None if only == "classes" else y[:, 3:],
        }


def targets_of(n: int) -> tuple[Tensor, Tensor]:
    return torch.arange(n) % 3, torch.linspace(-1, 1, 2 * n).view(n, 2)


def joint_loss(output: dict[str, Any], y: tuple[Tensor, Tensor]) -> Tensor:
    classes, values = output["classes"], output["values"]
    first = 0.0 if classes is None else 0.7 * F.cross_entropy(classes, y[0], ignore_index=1)
    second = 0.0 if values is None else 3.0 * F.mse_loss(values, y[1])
    return torch.as_tensor(first + second)


class Flat(nn.Module):
    """The outputs of a model side by side."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.model(x)["classes"], self.model(x)["values"]], 1)


def expected_sum(model: Heads, x: Tensor, y: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    def loss(flat: Tensor) -> Tensor:
        return joint_loss({"classes": flat[:, :3], "values": flat[:, 3:]}, y)

    return {name.removeprefix("model."): F for name, F in ggn(Flat(model), x, loss).items()}


def test_law_25_the_fisher_of_a_sum_is_the_ggn_of_the_sum() -> None:
    model, x, y = Heads(), torch.randn(N, 4), targets_of(N)
    found = natgrad.fisher(model, ExactFisher(), PARTS, [(x, y)])
    expected = expected_sum(model, x, y)
    assert found.keys() == expected.keys()
    for name in expected:
        assert_equal(found[name].dense(), expected[name])


def test_law_24_sampled_labels_of_a_sum_are_independent() -> None:
    """4,000 draws: the relative error is below .1, and ten times smaller than with 40."""
    model, x, y = Heads(), torch.randn(N, 4), targets_of(N)
    expected = expected_sum(model, x, y)["trunk.0"]
    distance = [
        error(
            natgrad.fisher(model, ExactFisher(), PARTS, [(x, y)], estimator="sampled", draws=draws)["trunk.0"].dense(),
            expected,
        )
        for draws in (40, 4000)
    ]
    assert distance[1] < 0.1
    assert 3 < distance[0] / distance[1] < 33


def test_a_sum_may_come_from_several_forward_passes() -> None:
    """Other inputs, and other numbers of them, for every part: the Fisher is c_1 F_1 + c_2 F_2."""
    model, a, b = Heads(), torch.randn(N, 4), torch.randn(2 * N, 4)
    y, z = targets_of(N)[0], targets_of(2 * N)[1]
    passes = [((a, "classes"), (y, None)), ((b, "values"), (None, z))]
    found = natgrad.fisher(model, ExactFisher(), PARTS, passes)
    first = natgrad.fisher(model, ExactFisher(), PARTS.parts[0][1], [((a, "classes"), y)])
    second = natgrad.fisher(model, ExactFisher(), PARTS.parts[1][1], [((b, "values"), z)])
    assert_equal(found["trunk.0"].dense(), 0.7 * first["trunk.0"].dense() + 3.0 * second["trunk.0"].dense())


def step(policy: Any, approximation: Any, passes: bool = False) -> Tensor:
    torch.manual_seed(5)
    model, x, y = Whole(), torch.randn(N, 4), targets_of(N)
    optimizer = NaturalGradient(
        model, approximation, likelihood=PARTS, estimator="exact", step_size=policy, damping=0.1
    )
    for only in ("classes", "values") if passes else ("",):
        optimizer.targets(y)
        joint_loss(model(x, only), y).backward()
    optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_the_quadratic_model_of_a_sum_is_the_same_with_and_without_samples() -> None:
    policies = (QuadraticModel(limit=None, per_layer=False), ExactQuadraticModel(limit=None, per_layer=False))
    samples, exact = (step(policy, KFAC()) for policy in policies)
    assert_equal(samples, exact, 1e-9)


@pytest.mark.parametrize("make", [ExactFisher, JointWoodbury])
def test_a_step_in_one_pass_is_the_step_in_one_pass_for_every_part(make: Callable[[], Approximation]) -> None:
    policy = QuadraticModel(limit=None, per_layer=False)
    once, apart = (step(policy, make(), passes) for passes in (False, True))
    assert_equal(once, apart, 1e-9)


def test_the_unit_of_a_sum_is_the_mean_over_its_parts_and_its_entropy_their_sum() -> None:
    """The first part has scale .7 and three classes, the second 3 * 2/2 and two normal numbers."""
    whole = PARTS.select({"classes": X, "values": X[:, :2]})
    alone = PARTS.select({"classes": None, "values": X[:, :2]})
    first, second = (part.capacity(output) for (_, part), output in zip(PARTS.parts, whole, strict=True))
    assert PARTS.scale(whole) == (0.7 + 3.0) / 2 and PARTS.scale(alone) == 3.0
    assert PARTS.capacity(whole) == 0.7 * first + 3 * second and PARTS.capacity(alone) == 3 * second


def test_parts_that_do_not_fit_are_refused() -> None:
    for outputs, message in (
        ({"classes": X, "values": X[:2]}, r"the same examples, at least one, got \[\(4, 3\), \(2, 3\)\]"),
        ({"classes": None, "values": None}, r"the same examples, at least one, got \[None, None\]"),
        ({"classes": X}, r"no output at 'values' in a dict"),
    ):
        with pytest.raises(ValueError, match=message):
            PARTS.select(outputs)
    output = PARTS.select({"classes": X, "values": X})
    for targets in (X, [X]):
        with pytest.raises(ValueError, match=r"a sequence of 2 targets, one \(or None\) for every part"):
            list(Labels(PARTS, "sampled", targets=targets).seeds(output))
    with pytest.raises(ValueError, match=r"empirical estimator needs targets, but parts \[1\] have none"):
        list(Labels(PARTS, "empirical", targets=[torch.zeros(4).long(), None]).seeds(output))


# Pointers.


def test_a_pointer_may_make_a_tensor_that_the_loss_does_not_read() -> None:
    """The likelihood sees classes last, the loss does not: the forward pass still counts as used."""
    layer = nn.Linear(4, 6)
    model = nn.Sequential(layer, nn.Unflatten(1, (3, 2)))
    optimizer = NaturalGradient(model, likelihood=Categorical(output=lambda y: y.movedim(1, -1)))
    before = layer.weight.detach().clone()
    F.cross_entropy(model(torch.randn(N, 4)), whole(2)).backward()
    optimizer.step()
    assert not torch.equal(layer.weight, before)
