"""``natgrad.fisher`` on whole networks: against the GGN by autograd, and where Kronecker approximations are exact."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacrev

import natgrad
from natgrad import EKFAC, KFAC, TEKFAC, TKFAC, Approximation, Bernoulli, Categorical, Diagonal, ExactFisher, Gaussian
from natgrad.likelihoods import Likelihood
from natgrad.matrix import Grouped
from oracles import assert_equal, error, ggn, per_example_gradients


def half_square(count: int) -> Callable[[Tensor], Tensor]:
    """Half the squared norm over ``count``: its Hessian is I/count whatever the targets."""
    return lambda output: 0.5 * output.square().sum() / count


class Mean(nn.Module):
    """The mean over positions (n, t, d) -> (n, d), or over the pixels of an image."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1) if x.ndim == 3 else x.mean((2, 3))


class Sum(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sum(1) if x.ndim == 3 else x.sum((2, 3))


class Past(nn.Module):
    """Each position sees the mean of those before it, and itself: (n, t, d)."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None])


def deep_linear(*between: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3), *between, nn.Linear(3, 2))


# Laws 6 and 7: where KFAC is the GGN.

KRONECKER = [KFAC, EKFAC, TKFAC, TEKFAC]


@pytest.mark.parametrize("make", [*KRONECKER, ExactFisher])
def test_law_06_exact_on_deep_linear_networks_with_square_loss(make: Callable[[], Approximation]) -> None:
    model, x = deep_linear(), torch.randn(20, 5)
    found = natgrad.fisher(model, make(), Gaussian(), [(x, None)])
    for name, expected in ggn(model, x, half_square(20)).items():
        assert_equal(found[name].dense(), expected)


@pytest.mark.parametrize("make", KRONECKER)
@pytest.mark.parametrize(("event_dims", "count"), [(1, 80), (2, 20)], ids=["count n t", "count n"])
def test_law_06_expand_is_exact_where_positions_are_apart(
    make: Callable[[], Approximation], event_dims: int, count: int
) -> None:
    model, x = deep_linear(), torch.randn(20, 4, 5)
    found = natgrad.fisher(model, make(), Gaussian(event_dims=event_dims), [(x, None)])
    for name, expected in ggn(model, x, half_square(count)).items():
        assert_equal(found[name].dense(), expected)


@pytest.mark.parametrize("pooling", [Mean, Sum])
@pytest.mark.parametrize("make", KRONECKER)
def test_law_06_reduce_is_exact_where_positions_are_pooled(
    make: Callable[[], Approximation], pooling: Callable[[], nn.Module]
) -> None:
    model, x = deep_linear(pooling()), torch.randn(20, 4, 5)
    found = natgrad.fisher(model, make(), Gaussian(), [(x, None)], weight_sharing="reduce")
    for name, expected in ggn(model, x, half_square(20)).items():
        assert_equal(found[name].dense(), expected)


def test_law_07_expand_is_not_exact_before_a_pool_and_is_after_it() -> None:
    model, x = deep_linear(Mean()), torch.randn(20, 4, 5)
    found = natgrad.fisher(model, KFAC(), Gaussian(), [(x, None)])
    errors = [error(found[name].dense(), expected) for name, expected in ggn(model, x, half_square(20)).items()]
    assert errors[0] > 0.3 and errors[1] > 0.3 and errors[2] < 1e-10


def test_law_06_and_07_reduce_is_exact_for_the_last_convolution_before_a_sum_alone() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 2, 2, stride=2), Sum())
    x = torch.randn(20, 2, 6, 6)
    found = natgrad.fisher(model, KFAC(), Gaussian(), [(x, None)], weight_sharing="reduce")
    expected = ggn(model, x, half_square(20))
    assert_equal(found["1"].dense(), expected["1"])
    assert error(found["0"].dense(), expected["0"]) > 0.05


def test_law_07_empirical_labels_and_activations_are_not_exact() -> None:
    x, y = torch.randn(20, 5), torch.randn(20, 2)
    linear, curved = deep_linear(), deep_linear(nn.Tanh())
    empirical, oracle = (
        natgrad.fisher(linear, make(), Gaussian(), [(x, y)], estimator="empirical")["0"].dense()
        for make in (KFAC, ExactFisher)
    )
    assert error(empirical, ggn(linear, x, half_square(20))["0"]) > 0.1
    assert error(empirical, oracle) > 0.1
    exact = natgrad.fisher(curved, KFAC(), Gaussian(), [(x, None)])
    assert error(exact["0"].dense(), ggn(curved, x, half_square(20))["0"]) > 0.01


@pytest.mark.parametrize("make", KRONECKER)
def test_law_03_one_example_is_exact_with_any_activation_and_loss(make: Callable[[], Approximation]) -> None:
    model, x, y = deep_linear(nn.Tanh()), torch.randn(1, 5), torch.tensor([1])
    empirical = natgrad.fisher(model, make(), Categorical(), [(x, y)], estimator="empirical")
    for name, DW in per_example_gradients(model, F.cross_entropy, x, y).items():
        assert_equal(empirical[name].dense(), torch.outer(DW.flatten(), DW.flatten()))
    exact = natgrad.fisher(model, KFAC(), Categorical(), [(x, y)])
    for name, expected in ggn(model, x, lambda output: F.cross_entropy(output, y)).items():
        assert_equal(exact[name].dense(), expected)


# Law 25: the exact Fisher is the GGN of the user's loss.

WEIGHT = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)
TOKENS = torch.tensor([[-100, -100, 2, 1], [0, 1, -100, 2], [-100, 1, 1, -100]])


def flat_cross_entropy(output: Tensor, y: Tensor, **settings: Any) -> Tensor:
    return F.cross_entropy(output.flatten(0, 1), y.flatten(), **settings)


def vision() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 3, 3, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3))


def language() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), Past(), nn.Linear(5, 4), nn.Tanh(), Past(), nn.Linear(4, 3))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], Likelihood, Tensor, Callable[..., Tensor]]] = {
    "classes": (vision, (3, 2, 6, 6), Categorical(), torch.tensor([0, 2, 1]), F.cross_entropy),
    "classes, weighted and smoothed": (
        vision,
        (3, 2, 6, 6),
        Categorical(weight=WEIGHT, label_smoothing=0.2),
        torch.tensor([0, 2, 1]),
        lambda output, y: F.cross_entropy(output, y, WEIGHT, label_smoothing=0.2),
    ),
    "MSELoss": (vision, (3, 2, 6, 6), Gaussian(reduction="mean"), torch.zeros(3, 3), F.mse_loss),
    "BCEWithLogitsLoss": (
        vision,
        (3, 2, 6, 6),
        Bernoulli(reduction="mean"),
        torch.ones(3, 3),
        F.binary_cross_entropy_with_logits,
    ),
    "tokens that see the past": (language, (3, 4, 4), Categorical(), TOKENS.clamp(min=0), flat_cross_entropy),
    "tokens behind an ignored prompt": (
        language,
        (3, 4, 4),
        Categorical(ignore_index=-100),
        TOKENS,
        flat_cross_entropy,
    ),
    "pixels": (
        lambda: nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 3, 3, padding=1)),
        (3, 1, 3, 2),
        Categorical(class_dim=1, ignore_index=2),
        torch.randint(3, (3, 3, 2), generator=torch.Generator().manual_seed(0)),
        lambda output, y: F.cross_entropy(output, y, ignore_index=2),
    ),
}
every_network = pytest.mark.parametrize(
    ("make", "shape", "likelihood", "y", "loss"), NETWORKS.values(), ids=NETWORKS.keys()
)


@every_network
def test_law_25_exact_fisher_is_the_ggn_of_the_users_loss(
    make: Callable[[], nn.Module],
    shape: tuple[int, ...],
    likelihood: Likelihood,
    y: Tensor,
    loss: Callable[..., Tensor],
) -> None:
    model, x, y = make(), torch.randn(shape), y.double() if y.is_floating_point() else y
    expected = ggn(model, x, lambda output: loss(output, y))
    found = natgrad.fisher(model, ExactFisher(), likelihood, [(x, y)])
    assert list(found) == list(expected)
    for name, block in expected.items():
        assert_equal(found[name].dense(), block)


@every_network
def test_law_04_traces_of_whole_networks(
    make: Callable[[], nn.Module],
    shape: tuple[int, ...],
    likelihood: Likelihood,
    y: Tensor,
    loss: Callable[..., Tensor],
) -> None:
    model, x, y = make(), torch.randn(shape), y.double() if y.is_floating_point() else y
    expected = ggn(model, x, lambda output: loss(output, y))
    for approximation in (Diagonal(), EKFAC(), natgrad.TKFACExact()):
        found = natgrad.fisher(model, approximation, likelihood, [(x, y)])
        for name, block in expected.items():
            assert_equal(found[name].trace(), block.trace())
    diagonal = natgrad.fisher(model, Diagonal(), likelihood, [(x, y)])
    for name, block in expected.items():
        assert_equal(diagonal[name].dense(), block.diagonal().diag())


def test_law_25_of_a_linear_model_it_is_the_hessian() -> None:
    layer, x, y = nn.Linear(4, 3), torch.randn(6, 4), torch.randint(3, (6,))
    model = nn.Sequential(layer)
    weights = torch.cat([layer.weight.detach(), layer.bias.detach()[:, None]], 1)

    def loss(flat: Tensor) -> Tensor:
        W = flat.view(3, 5)
        return F.cross_entropy(functional_call(model, {"0.weight": W[:, :-1], "0.bias": W[:, -1]}, (x,)), y)

    found = natgrad.fisher(model, ExactFisher(), Categorical(), [(x, y)])
    assert_equal(found["0"].dense(), hessian(loss)(weights.flatten()))


def test_the_empirical_fisher_is_the_second_moment_of_per_example_gradients() -> None:
    model, x, y = vision(), torch.randn(6, 2, 6, 6), torch.randint(3, (6,))
    found = natgrad.fisher(model, ExactFisher(), Categorical(), [(x, y)], estimator="empirical")
    for name, DW in per_example_gradients(model, F.cross_entropy, x, y).items():
        assert_equal(found[name].dense(), DW.flatten(1).mT @ DW.flatten(1) / 6)


def test_a_grouped_convolution_is_the_diagonal_blocks_of_its_groups() -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 2, groups=2), nn.Tanh(), nn.Flatten())
    x = torch.randn(5, 4, 3, 3)
    found = natgrad.fisher(model, ExactFisher(), Gaussian(), [(x, None)])["0"]
    assert isinstance(found, Grouped) and found.shape == (6, 9)
    half = 3 * 9
    expected = ggn(model, x, half_square(5))["0"]
    blocks = torch.block_diag(expected[:half, :half], expected[half:, half:])
    assert_equal(found.dense(), blocks)


# Law 24.


@pytest.mark.parametrize("likelihood", [Categorical(), Bernoulli(), Gaussian(), Gaussian(reduction="mean")], ids=repr)
def test_law_24_sampled_converges_to_exact_at_one_over_root_draws(likelihood: Likelihood) -> None:
    """Relative error below .1 with 1,600 draws; with 16 times fewer 4 times that, between 2 and 8 (one seed)."""
    model, x = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), torch.randn(8, 4)
    exact = natgrad.fisher(model, ExactFisher(), likelihood, [(x, None)]).dense()
    few, many = (
        error(
            natgrad.fisher(model, ExactFisher(), likelihood, [(x, None)], estimator="sampled", draws=draws).dense(),
            exact,
        )
        for draws in (100, 1600)
    )
    assert many < 0.1 and 2 < few / many < 8


def test_sampled_labels_are_those_of_the_seed_and_do_not_depend_on_the_batches() -> None:
    model, x = vision(), torch.randn(8, 2, 6, 6)

    def sampled(batches: list[tuple[Tensor, None]], seed: int) -> Tensor:
        found = natgrad.fisher(model, EKFAC(), Categorical(), batches, estimator="sampled", draws=2, seed=seed)
        return found.dense()

    whole = sampled([(x, None)], 0)
    assert_equal(sampled([(x[:3], None), (x[3:], None)], 0), whole)
    assert error(sampled([(x, None)], 1), whole) > 0.01


# Law 26: what one loss term counts.

APPROXIMATIONS = [ExactFisher, Diagonal, KFAC, EKFAC, TKFAC, natgrad.TKFACExact, TEKFAC]


@pytest.mark.parametrize("make", APPROXIMATIONS)
@pytest.mark.parametrize("estimator", ["exact", "empirical", "sampled"])
def test_law_26_the_same_matrix_whole_or_in_batches(make: Callable[[], Approximation], estimator: Any) -> None:
    model, x, y = vision(), torch.randn(7, 2, 6, 6), torch.randint(3, (7,))
    parts = [(x[:1], y[:1]), (x[1:5], y[1:5]), (x[5:], y[5:])]
    whole, split = (
        natgrad.fisher(model, make(), Categorical(weight=WEIGHT), batches, estimator=estimator).dense()
        for batches in ([(x, y)], parts)
    )
    assert_equal(split, whole)


@pytest.mark.parametrize("make", APPROXIMATIONS)
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("estimator", ["exact", "empirical"])
def test_law_26_padding_of_any_length_changes_nothing(
    make: Callable[[], Approximation], sharing: Any, estimator: Any
) -> None:
    """Padding at the end that is ignored by the loss and not seen by any term."""
    model, x = language(), torch.randn(9, 4, 4)  # factors of full rank, so that eigenvectors are determined
    y = torch.tensor([[0, 1, 2, -100], [1, 1, -100, -100], [2, 0, 1, 1]]).repeat(3, 1)
    found = []
    for padding in (0, 1, 5):
        longer = torch.cat([x, 10 * torch.randn(9, padding, 4)], 1)
        targets = F.pad(y, (0, padding), value=-100)
        likelihood = Categorical(ignore_index=-100)
        found.append(
            natgrad.fisher(
                model, make(), likelihood, [(longer, targets)], weight_sharing=sharing, estimator=estimator
            ).dense()
        )
    assert_equal(found[1], found[0])
    assert_equal(found[2], found[0])


@pytest.mark.parametrize("make", [EKFAC, TEKFAC])
def test_law_04_reduce_takes_the_basis_alone_and_leaves_the_trace(make: Callable[[], Approximation]) -> None:
    """The eigenvalues are measured on the full per-example gradients, under either treatment of shared weights."""
    model, x, y = vision(), torch.randn(6, 2, 6, 6), torch.randint(3, (6,))
    found = natgrad.fisher(model, make(), Categorical(), [(x, y)], weight_sharing="reduce")
    for name, block in ggn(model, x, lambda output: F.cross_entropy(output, y)).items():
        assert_equal(found[name].trace(), block.trace())


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_law_26_an_example_that_is_wholly_ignored_changes_nothing(sharing: Any) -> None:
    model, x = language(), torch.randn(4, 4, 4)
    y = torch.cat([TOKENS, torch.full((1, 4), -100)])
    likelihood = Categorical(ignore_index=-100)
    with_it, without = (
        natgrad.fisher(model, KFAC(), likelihood, [(x[:n], y[:n])], weight_sharing=sharing).dense() for n in (4, 3)
    )
    assert_equal(with_it, without)


# What it leaves alone, what it reads, what it refuses.


def test_the_model_is_left_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 3))
    model[1].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random, modes = torch.get_rng_state(), [module.training for module in model.modules()]
    natgrad.fisher(model, EKFAC(), Categorical(), [(torch.randn(6, 4, generator=torch.Generator()), None)])
    assert torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_the_model_is_left_as_it_was_after_an_error() -> None:
    model = vision().train()
    with pytest.raises(RuntimeError):
        natgrad.fisher(model, KFAC(), Categorical(), [(torch.randn(6, 5, 6, 6), None)])
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 3), nn.Linear(2, 3)

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        return {"logits": self.left(x) + self.right(y)}


def test_inputs_may_be_a_tuple_a_list_or_a_dict() -> None:
    model, x, y = TwoInputs(), torch.randn(6, 4), torch.randn(6, 2)
    forms: list[Any] = [(x, y), [x, y], {"x": x, "y": y}]
    found = [natgrad.fisher(model, KFAC(), Categorical(output="logits"), [(inputs, None)]).dense() for inputs in forms]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("make", [KFAC, EKFAC])
def test_batches_may_be_an_iterator_that_can_be_read_once(make: Callable[[], Approximation]) -> None:
    model, x = vision(), torch.randn(6, 2, 6, 6)
    batches = [(x[:4], None), (x[4:], None)]
    once = natgrad.fisher(model, make(), Categorical(), iter(batches))
    assert torch.equal(once.dense(), natgrad.fisher(model, make(), Categorical(), batches).dense())


def test_it_works_without_grad_and_covers_trained_parameters_alone() -> None:
    model, x = deep_linear(nn.PReLU(3)), torch.randn(6, 5)
    model[1].weight.requires_grad_(False)
    model[3].requires_grad_(False)
    with torch.no_grad():
        found = natgrad.fisher(model, KFAC(), Gaussian(), [(x, None)])
    assert list(found) == ["0", "1.bias", "2"]
    exact = natgrad.fisher(model, ExactFisher(), Gaussian(), [(x, None)])
    for name, parameter in (("1.bias", "1.bias"), ("2", "2.weight")):
        value = model.get_parameter(parameter).detach()
        jacobian = jacrev(lambda v, p=parameter: functional_call(model, {p: v}, (x,)))(value).flatten(0, 1).detach()
        F_dense = jacobian.mT @ jacobian / 6
        assert_equal(
            exact[name].dense(), F_dense if name == "1.bias" else F_dense.diagonal().diag()
        )  # slopes one by one


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"estimator": "mc"}, "estimator must be one of 'exact', 'sampled', 'empirical', got 'mc'"),
        ({"weight_sharing": "sum"}, "weight_sharing must be 'expand' or 'reduce', got 'sum'"),
        ({"draws": 0}, "draws must be a whole number of at least 1, got 0"),
        ({"estimator": "empirical"}, "the empirical estimator needs targets"),
    ],
)
def test_settings_that_have_no_meaning_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        natgrad.fisher(deep_linear(), KFAC(), Gaussian(), [(torch.randn(6, 5), None)], **settings)


class Slopes(nn.Module):
    """Scales every input by a positive number."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.zeros(5))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.slope.exp()


def test_no_data_no_layers_and_too_large_layers_are_refused() -> None:
    x = torch.randn(6, 5)
    with pytest.raises(ValueError, match=r"the batches are empty, or reach no layer that is covered$"):
        natgrad.fisher(deep_linear(), KFAC(), Gaussian(), [])
    with pytest.raises(ValueError, match="reach no layer that is covered; slope is used by exp: no rule"):
        natgrad.fisher(Slopes(), KFAC(), Gaussian(), [(x, None)])
    with pytest.raises(ValueError, match=r"ExactFisher: layer '0' has a block of 4 x 6 weights, above limit=20"):
        natgrad.fisher(deep_linear(), ExactFisher(limit=20), Gaussian(), [(x, None)])
    with pytest.raises(ValueError, match=r"EigenCorrected needs a base with an eigenbasis; Diagonal\(\) has none"):
        natgrad.fisher(deep_linear(), natgrad.EigenCorrected(Diagonal()), Gaussian(), [(x, None)])
    with pytest.raises(ValueError, match="carry must be 'rotate', 'reseed' or 'keep', got 'drop'"):
        natgrad.EigenCorrected(KFAC(), carry="drop")  # type: ignore[arg-type]
