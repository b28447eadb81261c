"""Likelihoods against autograd and against torch's own losses; sampled labels by Monte Carlo with stated draws."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, hessian

from natgrad import Bernoulli, Categorical, Gaussian, Likelihood
from natgrad.labels import Labels
from oracles import assert_equal, error

WEIGHT = torch.tensor([0.5, 2.0, 1.0, 0.25], dtype=torch.float64)
TOKENS = torch.tensor([[0, 3, -100], [1, -100, -100], [2, 2, 1], [3, 0, 1], [-100, 1, 0]])


@dataclass(frozen=True)
class Case:
    """A likelihood, an output it reads, targets, and torch's loss, whose Hessian the likelihood must give."""

    likelihood: Likelihood
    output: Callable[[], Tensor]
    targets: Callable[[], Tensor]
    loss: Callable[[Tensor, Tensor], Tensor]


def normal(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def classes(*shape: int, below: int = 4) -> Callable[[], Tensor]:
    return lambda: torch.randint(below, shape, generator=torch.Generator().manual_seed(2))


def bits(*shape: int) -> Callable[[], Tensor]:
    return lambda: classes(*shape, below=2)().double()


def half_square(output: Tensor, y: Tensor) -> Tensor:
    return 0.5 * (output - y).square().sum() / len(output)


CASES = {
    "cross entropy": Case(Categorical(), normal(5, 4), classes(5), F.cross_entropy),
    "tokens": Case(
        Categorical(),
        normal(5, 3, 4),
        classes(5, 3),
        lambda output, y: F.cross_entropy(output.flatten(0, 1), y.flatten()),
    ),
    "image of classes": Case(Categorical(class_dim=1), normal(5, 4, 3, 2), classes(5, 3, 2), F.cross_entropy),
    "label smoothing": Case(
        Categorical(label_smoothing=0.2),
        normal(5, 4),
        classes(5),
        lambda output, y: F.cross_entropy(output, y, label_smoothing=0.2),
    ),
    "class weights": Case(
        Categorical(weight=WEIGHT), normal(5, 4), classes(5), lambda output, y: F.cross_entropy(output, y, WEIGHT)
    ),
    "class weights and label smoothing": Case(
        Categorical(weight=WEIGHT, label_smoothing=0.3),
        normal(5, 4),
        classes(5),
        lambda output, y: F.cross_entropy(output, y, WEIGHT, label_smoothing=0.3),
    ),
    "ignored tokens": Case(
        Categorical(ignore_index=-100),
        normal(5, 3, 4),
        lambda: TOKENS,
        lambda output, y: F.cross_entropy(output.flatten(0, 1), y.flatten()),
    ),
    "ignored tokens, weighted and smoothed": Case(
        Categorical(ignore_index=2, weight=WEIGHT, label_smoothing=0.1),
        normal(5, 3, 4),
        lambda: TOKENS.clamp(min=0),
        lambda output, y: F.cross_entropy(
            output.flatten(0, 1), y.flatten(), WEIGHT, ignore_index=2, label_smoothing=0.1
        ),
    ),
    "causal, labels as the inputs": Case(
        Categorical(shift=1),
        normal(5, 3, 4),
        classes(5, 3),
        lambda output, y: F.cross_entropy(output[:, :-1].flatten(0, 1), y[:, 1:].flatten()),
    ),
    "causal by two, weighted, smoothed and ignored": Case(
        Categorical(shift=2, ignore_index=-100, weight=WEIGHT, label_smoothing=0.1),
        normal(5, 4, 4),
        lambda: torch.cat([TOKENS, TOKENS[:, :1]], 1),
        lambda output, y: F.cross_entropy(
            output[:, :-2].flatten(0, 1), y[:, 2:].flatten(), WEIGHT, label_smoothing=0.1
        ),
    ),
    "causal, classes in the middle": Case(
        Categorical(shift=1, class_dim=1),
        normal(5, 4, 3),
        classes(5, 3),
        lambda output, y: F.cross_entropy(output[:, :, :-1], y[:, 1:]),
    ),
    "bernoulli summed": Case(
        Bernoulli(),
        normal(5, 4),
        bits(5, 4),
        lambda output, y: F.binary_cross_entropy_with_logits(output, y, reduction="sum") / 5,
    ),
    "bernoulli mean": Case(Bernoulli(reduction="mean"), normal(5, 4), bits(5, 4), F.binary_cross_entropy_with_logits),
    "one logit": Case(Bernoulli(), normal(5), bits(5), F.binary_cross_entropy_with_logits),
    "bernoulli image": Case(
        Bernoulli(reduction="mean", event_dims=3),
        normal(5, 1, 3, 2),
        bits(5, 1, 3, 2),
        F.binary_cross_entropy_with_logits,
    ),
    "half square": Case(Gaussian(), normal(5, 4), normal(5, 4), half_square),
    "MSELoss": Case(Gaussian(reduction="mean"), normal(5, 4), normal(5, 4), F.mse_loss),
    "MSELoss of positions": Case(Gaussian(reduction="mean"), normal(5, 3, 4), normal(5, 3, 4), F.mse_loss),
    "MSELoss of images": Case(
        Gaussian(reduction="mean", event_dims=3), normal(5, 2, 3, 2), normal(5, 2, 3, 2), F.mse_loss
    ),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def estimated(likelihood: Likelihood, estimator: Any, output: Tensor, targets: Tensor, draws: int = 1) -> Tensor:
    """1/count times the mean over the seeds of seed seed^T, example by example (other blocks 0)."""
    labels = Labels(likelihood, estimator, draws, targets)
    count = labels.terms(output)
    total = count.sum() if isinstance(count, Tensor) else count * len(output)
    seeds = torch.stack([seed.reshape(len(seed), -1) for seed in labels.seeds(output)])
    blocks = torch.einsum("sni,snj->nij", seeds, seeds) / len(seeds)
    return torch.block_diag(*blocks) / total


def true_hessian(case: Case) -> Tensor:
    output, targets = case.output(), case.targets()
    return hessian(lambda flat: case.loss(flat.view_as(output), targets))(output.flatten())


# The Hessian.


@every_case
def test_law_25_exact_seeds_give_the_hessian_of_torchs_loss(case: Case) -> None:
    output, targets = case.output(), case.targets()
    assert_equal(estimated(case.likelihood, "exact", output, targets), true_hessian(case))


@every_case
def test_law_25_hessian_product(case: Case) -> None:
    output, targets = case.output(), case.targets()
    V = torch.randn_like(output)
    count = Labels(case.likelihood, targets=targets).terms(output)
    total = count.sum() if isinstance(count, Tensor) else count * len(output)
    product = case.likelihood.hessian_product(output, V, targets) / total
    assert product.shape == output.shape
    assert_equal(product.flatten(), true_hessian(case) @ V.flatten())


@every_case
def test_law_25_fails_without_the_scale_of_the_loss(case: Case) -> None:
    """The laws above see the factor 2/dim of MSELoss: a likelihood that sums in place of it is not equal."""
    if getattr(case.likelihood, "reduction", "sum") == "sum":
        return
    summed = type(case.likelihood)(event_dims=case.likelihood.event_dims)  # type: ignore[call-arg, attr-defined]
    found = estimated(summed, "exact", case.output(), case.targets())
    assert error(found, true_hessian(case)) > 0.3


def test_law_25_mse_mean_is_two_over_dim_times_the_half_square() -> None:
    output = normal(5, 4)()
    assert Gaussian(reduction="mean").scale(output) == 2 / 4
    assert Gaussian(reduction="mean", event_dims=2).scale(normal(5, 3, 4)()) == 2 / 12
    assert Bernoulli(reduction="mean").scale(output) == 1 / 4


@every_case
def test_law_24_sampled_labels_converge_to_the_hessian(case: Case) -> None:
    """3,000 draws: the relative error is below .1; with 100 times fewer it is about ten times that."""
    output, targets = case.output(), case.targets()
    expected = true_hessian(case)
    many = error(estimated(case.likelihood, "sampled", output, targets, 3000), expected)
    few = error(estimated(case.likelihood, "sampled", output, targets, 30), expected)
    assert many < 0.1
    assert 3 < few / many < 33


@every_case
def test_sampled_labels_have_mean_zero_gradient(case: Case) -> None:
    """3,000 draws: each mean is within 5 standard errors of 0."""
    output, targets = case.output(), case.targets()
    seeds = torch.stack(list(Labels(case.likelihood, "sampled", 3000, targets).seeds(output)))
    assert (seeds.mean(0).abs() <= 5 * seeds.std(0) / 3000**0.5 + 1e-12).all()


@every_case
def test_the_empirical_seed_is_the_gradient_of_the_loss(case: Case) -> None:
    """A seed times the square root of what its term weighs is the gradient of the loss, times count and scale."""
    output, targets = case.output(), case.targets()
    (seed,) = Labels(case.likelihood, "empirical", targets=targets).seeds(output)
    likelihood = case.likelihood
    count, weights = likelihood.counted(output, targets), likelihood.weights(output, targets)
    total = Labels(likelihood, targets=targets).terms(output)
    total = total.sum() if isinstance(total, Tensor) else total * len(output)
    root = 1.0 if weights is None else weights.sqrt().unsqueeze(-1)
    gradient = likelihood.unevents(likelihood.events(seed) * root, output) * likelihood.scale(output) ** 0.5
    assert (count is None) == (weights is None)
    assert_equal(gradient / total, grad(lambda f: case.loss(f, targets))(output))


# Labels.


def drawn(likelihood: Likelihood, output: Tensor, draws: int = 3, parts: int = 1, seed: int = 0) -> Tensor:
    labels = Labels(likelihood, "sampled", draws)
    labels.reseed(seed)
    return torch.cat([torch.stack(list(labels.seeds(part))) for part in output.chunk(parts)], 1)


@pytest.mark.parametrize("likelihood", [Categorical(), Bernoulli(), Gaussian()], ids=lambda x: type(x).__name__)
def test_a_batch_draws_the_same_labels_whole_or_in_parts(likelihood: Likelihood) -> None:
    output = normal(60, 3, 4)()
    whole = drawn(likelihood, output)
    for parts in (2, 7, 60):
        assert_equal(drawn(likelihood, output, parts=parts), whole, 1e-14)
    assert not torch.equal(drawn(likelihood, output, seed=1), whole)


def test_labels_do_not_touch_the_global_random_numbers() -> None:
    before = torch.get_rng_state()
    drawn(Gaussian(), normal(5, 4)())
    assert torch.equal(torch.get_rng_state(), before)


def test_draws_differ_from_each_other_and_from_batch_to_batch() -> None:
    labels, output = Labels(Gaussian(), "sampled", 2), normal(5, 4)()
    first, second = (torch.stack(list(labels.seeds(output))) for _ in range(2))
    assert not torch.equal(first[0], first[1]) and not torch.equal(first, second)


def test_drawn_classes_follow_the_model_and_are_never_impossible() -> None:
    """60,000 draws: frequencies within 5 standard errors of p; a class of probability 0 is never drawn."""
    logits = torch.tensor([[0.0, 1.0, -1.0, -1e4]]).expand(60_000, -1)
    p = logits[0].softmax(-1)
    (seed,) = Labels(Categorical(), "sampled").seeds(logits)
    frequency = (p - seed).mean(0)
    assert ((frequency - p).abs() <= 5 * (p * (1 - p) / 60_000).sqrt()).all()
    assert frequency[3] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_logits_give_finite_seeds(dtype: torch.dtype) -> None:
    output = torch.tensor([[1e4, -1e4, 0.0], [-1e4, -1e4, 1e4]], dtype=dtype)
    for likelihood in (Categorical(), Bernoulli()):
        for estimator in ("exact", "sampled"):
            for seed in Labels(likelihood, estimator).seeds(output):
                assert torch.isfinite(seed).all() and seed.dtype == dtype


def test_class_weights_without_targets_are_their_expectation_under_the_model() -> None:
    output = normal(5, 4)()
    weights = Categorical(weight=WEIGHT, label_smoothing=0.2).weights(output, None)
    assert weights is not None
    assert_equal(weights, (0.8 * output.softmax(-1) @ WEIGHT + 0.2 * WEIGHT.mean()).unsqueeze(-1))


# Pointers.


@dataclass
class Returned:
    logits: Tensor
    hidden: Tensor


X = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("pointer", "returned"),
    [
        (None, X),
        (0, (X, X + 1)),
        (-1, [X + 1, X]),
        ("logits", {"logits": X, "hidden": X + 1}),
        ("logits", Returned(X, X + 1)),
        (lambda y: y["deep"][0].logits, {"deep": [Returned(X, X + 1)]}),
    ],
    ids=["tensor", "tuple", "list", "dict", "dataclass", "function"],
)
def test_a_pointer_finds_the_output(pointer: Any, returned: Any) -> None:
    assert Categorical(output=pointer).select(returned) is X


# Refusals.


@pytest.mark.parametrize(
    ("likelihood", "returned", "message"),
    [
        (
            Categorical(),
            (X, X),
            r"Categorical needs a tensor of model outputs, got tuple; point at the tensor with output=",
        ),
        (Gaussian(output="logits"), {"scores": X}, r"no output at 'logits' in a dict"),
        (Gaussian(output="logits"), Returned, r"no output at 'logits' in a type"),
        (Gaussian(output=5), (X, X), r"no output at 5 in a tuple"),
        (Gaussian(output=0), Returned(X, X), r"no output at 0 in a Returned"),
        (Gaussian(), X.long(), r"Gaussian needs a floating-point output with a batch dimension, got torch.int64"),
        (Bernoulli(), torch.tensor(1.0), r"Bernoulli needs a floating-point output with a batch dimension"),
        (Categorical(), torch.ones(5), r"needs at least 2 classes, got an output of shape \(5,\)"),
        (Categorical(), torch.ones(5, 1), r"needs at least 2 classes, .* for one logit an example use Bernoulli"),
        (Categorical(class_dim=2), X, r"Categorical\(class_dim=2\) needs at least 2 classes"),
        (Categorical(weight=WEIGHT), X, r"4 class weights for 3 classes"),
    ],
)
def test_outputs_without_meaning_are_refused(likelihood: Likelihood, returned: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        likelihood.select(returned)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Categorical(label_smoothing=1.5), r"label_smoothing must be in \[0, 1\], got 1.5"),
        (lambda: Categorical(weight=torch.tensor([1.0, -1.0])), r"weight must be a vector of numbers >= 0"),
        (lambda: Categorical(weight=torch.ones(2, 2)), r"weight must be a vector of numbers >= 0, one per class"),
        (lambda: Gaussian(reduction="none"), r"reduction must be 'sum' or 'mean', got 'none'"),  # type: ignore[arg-type]
        (lambda: Bernoulli(event_dims=-1), r"event_dims must be at least 0, got -1"),
    ],
)
def test_settings_out_of_range_are_refused(make: Callable[[], Likelihood], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("likelihood", "targets", "message"),
    [
        (Categorical(), None, r"the empirical estimator needs targets"),
        (Categorical(), torch.zeros(2), r"Categorical needs integer targets of shape \(2,\), got torch.float64"),
        (
            Categorical(),
            torch.zeros(2, 3).long(),
            r"Categorical needs integer targets of shape \(2,\), got .* \(2, 3\)",
        ),
        (Gaussian(), torch.zeros(2), r"Gaussian needs targets of the output's shape \(2, 3\), got \(2,\)"),
        (Bernoulli(), torch.zeros(2, 1), r"Bernoulli needs targets of the output's shape \(2, 3\), got \(2, 1\)"),
    ],
)
def test_targets_that_do_not_fit_are_refused(likelihood: Likelihood, targets: Tensor | None, message: str) -> None:
    targets = targets if targets is None or not targets.is_floating_point() else targets.double()
    with pytest.raises(ValueError, match=message):
        list(Labels(likelihood, "empirical", targets=targets).seeds(X.double()))


def test_targets_of_weighted_terms_are_checked_too() -> None:
    with pytest.raises(ValueError, match=r"Categorical needs integer targets of shape \(5,\), got .* \(4,\)"):
        Labels(Categorical(weight=WEIGHT), targets=classes(4)()).terms(normal(5, 4)())


def test_ignored_terms_need_the_targets() -> None:
    with pytest.raises(ValueError, match=r"needs to know the targets: call optimizer.targets\(y\)"):
        Labels(Categorical(ignore_index=-100)).terms(normal(5, 4)())


def test_an_unknown_estimator_is_refused() -> None:
    from natgrad.labels import check_estimator

    assert check_estimator("exact") == "exact"
    with pytest.raises(ValueError, match="estimator must be one of 'exact', 'sampled', 'empirical', got 'type-2'"):
        check_estimator("type-2")


@pytest.mark.parametrize("shift", [-1, 1.0, True])
def test_a_shift_that_is_none_is_refused(shift: Any) -> None:
    with pytest.raises(ValueError, match=f"shift must be a whole number of at least 0, got {shift}"):
        Categorical(shift=shift)


@pytest.mark.parametrize("shape", [(5, 4), (5, 2, 4), (5, 3, 3, 4)])
def test_outputs_that_have_no_sequence_to_shift_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"Categorical\(shift=2\) needs sequences of more than 2 positions"):
        Categorical(shift=2).select(torch.randn(shape))


@pytest.mark.parametrize("estimator", ["exact", "sampled", "empirical"])
def test_the_last_positions_of_a_causal_model_are_no_terms(estimator: Any) -> None:
    output, y = torch.randn(5, 4, 3), torch.randint(3, (5, 4))
    labels = Labels(Categorical(shift=1), estimator, 2, y if estimator == "empirical" else None)
    terms = labels.terms(output)
    assert isinstance(terms, Tensor) and terms.sum() == 15 and not terms[:, -1].any()
    for seed in labels.seeds(output):
        assert seed.shape == output.shape and not seed[:, -1].any()
