"""Woodbury in training: the steps of the dense Fisher, per layer and for the whole network."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_accumulation import check
from test_resume import BREAKS, batches_of, run
from torch import Tensor, nn
from training import Batch, batch, network, optimizer_of, same, train, values

import natgrad
from natgrad import (
    Approximation,
    Categorical,
    Constant,
    ExactFisher,
    JointFisher,
    JointWoodbury,
    KLLimit,
    NaturalGradient,
    TENGraD,
    Woodbury,
)
from natgrad.capture import Capture
from natgrad.fishers import Part, pool
from natgrad.matrix import FactorisationError
from oracles import assert_equal, block, dense_fisher, examples, jacobians, per_example_gradients, random_capture

DAMPING = 0.05
ONCE: dict[str, Any] = {
    "step_size": Constant(),
    "lr": 0.3,
    "momentum": 0.0,
    "damping": DAMPING,
    "observe_every": 1,
    "refresh_every": 1,
}


def covered() -> nn.Sequential:
    """A convolution, one with groups, and a linear layer; nothing else is trained."""
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2), nn.Tanh(), nn.Conv2d(4, 2, 2, groups=2, bias=False), nn.Flatten(), nn.Linear(8, 3)
    )


def images(n: int = 6) -> Batch:
    return torch.randn(n, 2, 7, 7), torch.randint(3, (n,))


def flat(blocks: dict[str, Tensor]) -> Tensor:
    """Blocks (n, ...) or Jacobians (n, P_l) of all layers as (n, P)."""
    return torch.cat([value.flatten(1) for value in blocks.values()], -1)


def moved(model: nn.Module, data: Batch, **settings: Any) -> tuple[Tensor, Tensor]:
    """The gradient of the mean loss, and the direction of one step, over all layers of a covered network."""

    def vector(tensors: dict[str, Tensor]) -> Tensor:
        layers = {name.rpartition(".")[0] for name in tensors}
        parts = [block(tensors[f"{k}.weight"][None], _first(tensors.get(f"{k}.bias"))) for k in sorted(layers)]
        return torch.cat([part.flatten() for part in parts])

    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model, NaturalGradient(model, **{**ONCE, **settings}), [data])
    gradient = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    step = {name: (before[name] - p.detach()) / ONCE["lr"] for name, p in model.named_parameters()}
    return vector(gradient), vector(step)


def _first(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias[None]


@pytest.mark.parametrize("make", [JointWoodbury, JointFisher])
def test_law_17_the_joint_step_is_the_dense_solve_of_the_whole_model(make: Any) -> None:
    model, (x, y) = covered(), images()
    U = flat(per_example_gradients(model, F.cross_entropy, x, y))
    M, D = moved(model, (x, y), approximation=make())
    assert_equal(D, torch.linalg.solve(U.mT @ U / len(x) + DAMPING * torch.eye(len(M)), M))


@pytest.mark.parametrize("make", [JointWoodbury, JointFisher])
def test_law_17_the_joint_step_on_all_labels_solves_the_gauss_newton_matrix_of_the_whole_model(make: Any) -> None:
    model, (x, y) = covered(), images()
    J = flat(jacobians(model, x))
    with torch.no_grad():
        p = model(x).softmax(-1)
    H = torch.block_diag(*(torch.diag(row) - torch.outer(row, row) for row in p)) / len(x)
    settings = {"likelihood": Categorical(), "estimator": "exact"}
    M, D = moved(model, (x, y), approximation=make(), **settings)
    assert_equal(D, torch.linalg.solve(J.mT @ H @ J + DAMPING * torch.eye(len(M)), M))


def test_the_joint_step_is_not_the_step_per_layer() -> None:
    model, data = covered(), images()
    twin = covered()
    twin.load_state_dict(model.state_dict())
    _, joint = moved(model, data, approximation=JointWoodbury())
    _, alone = moved(twin, data, approximation=Woodbury())
    assert (joint - alone).norm() > 0.05 * alone.norm()


@pytest.mark.parametrize("pair", [(Woodbury, ExactFisher), (JointWoodbury, JointFisher)], ids=["layer", "network"])
@pytest.mark.parametrize("estimator", ["exact", "sampled", "empirical"])
@pytest.mark.parametrize("step_size", [Constant(), KLLimit()], ids=lambda policy: type(policy).__name__)
def test_steps_are_those_of_the_exact_fisher_of_the_same_examples(pair: Any, estimator: Any, step_size: Any) -> None:
    settings = {
        **ONCE,
        "step_size": step_size,
        "momentum": 0.9,
        "decay": 0.0,
        "estimator": estimator,
        "draws": 3 if estimator == "sampled" else 1,
        "likelihood": None if estimator == "empirical" else Categorical(),
    }
    model = covered()
    start, batches = model.state_dict(), [images() for _ in range(5)]
    start = {name: value.clone() for name, value in start.items()}
    ends = []
    for make in pair:
        model.load_state_dict(start)
        train(model, NaturalGradient(model, make(), **settings), batches)
        ends.append(values(model))
    assert not same(ends[0], list(start.values()))
    for found, expected in zip(*ends, strict=True):
        assert_equal(found, expected, 1e-9)


# Which examples are kept.


def whole(parts: list[Capture]) -> Capture:
    a, g = (torch.cat(list(tensors), -3) for tensors in zip(*((p.a, p.g) for p in parts), strict=True))
    return Capture(a, g, sum(p.count for p in parts), sum(p.rows for p in parts))


@pytest.mark.parametrize("shape", ["unshared", "shared", "grouped"])
def test_a_window_keeps_the_last_batches_whatever_their_sizes(shape: str) -> None:
    approximation = Woodbury(window=3)
    batches = [random_capture(seed, shape, n=n) for seed, n in enumerate((9, 4, 7, 2, 8))]
    stats = None
    for number, seen in enumerate(batches):
        parts = [examples(seen, slice(0, 1)), examples(seen, slice(1, None))]
        stats = approximation.merge(stats, pool(approximation.observe(part) for part in parts), 0.9)
        matrix = approximation.assemble(stats)
        assert_equal(matrix.dense(), dense_fisher(whole(batches[max(0, number - 2) : number + 1])))
    assert matrix.a.shape[-3] == 7 + 2 + 8


def test_a_window_takes_sequences_of_different_lengths() -> None:
    long, short = random_capture(0, "shared"), random_capture(1, "unshared")
    approximation = Woodbury(window=2)
    stats = approximation.merge(approximation.merge(None, approximation.observe(long), 0.0), as_stats(short), 0.0)
    expected = (dense_fisher(long) + dense_fisher(short)) / 2
    assert_equal(approximation.assemble(stats).dense(), expected)


def as_stats(seen: Capture) -> Any:
    return Woodbury().observe(seen)


@pytest.mark.parametrize("make", [Woodbury, JointWoodbury, TENGraD])
@pytest.mark.parametrize("window", [0, -1, 1.5, True, "2"])
def test_a_window_that_is_no_number_of_batches_is_refused(make: Any, window: Any) -> None:
    with pytest.raises(ValueError, match="window must be a whole number of at least 1, got"):
        make(window=window)


def test_a_batch_without_loss_terms_leaves_the_plain_gradient() -> None:
    seen = random_capture(0)
    empty = Capture(seen.a, torch.zeros_like(seen.g), 0.0, 0.0)
    M = torch.randn(6, 8)
    assert_equal(Woodbury().assemble(as_stats(empty)).inverse(0.1) @ M, 10 * M)


# The optimizer's own promises.


GRAM = [Woodbury(), Woodbury(window=2), JointWoodbury(), JointWoodbury(window=2), TENGraD()]
ALL = [*GRAM, JointFisher()]


@pytest.mark.parametrize("approximation", ALL, ids=repr)
def test_four_micro_batches_equal_the_one_batch(approximation: Approximation) -> None:
    check(approximation=approximation, step_size=KLLimit(), refresh_every=approximation.refresh_every)
    check(approximation=approximation, step_size=KLLimit(), likelihood=None)


@pytest.mark.parametrize("approximation", ALL, ids=repr)
def test_a_resumed_run_equals_an_unbroken_one_bit_for_bit(approximation: Approximation) -> None:
    settings: dict[str, Any] = {
        "approximation": approximation,
        "refresh_every": approximation.refresh_every,
        "observe_every": 2,
    }
    assert same(run(batches_of(), BREAKS, **settings), run(batches_of(), **settings))


@pytest.mark.parametrize("approximation", GRAM, ids=repr)
def test_products_in_low_precision_are_refused_quietly(approximation: Approximation) -> None:
    settings: dict[str, Any] = {"approximation": approximation, "step_size": KLLimit()}
    assert same(*(run(batches_of(), precision=p, **settings) for p in ("auto", torch.bfloat16)))


@pytest.mark.parametrize("approximation", GRAM, ids=repr)
def test_an_inverse_without_damping_is_refused(approximation: Approximation) -> None:
    matrix = approximation.assemble(approximation.merge(None, approximation.observe(random_capture(0)), 0.0))
    with pytest.raises(FactorisationError, match="give a damping > 0"):
        approximation.invert(matrix, 0.0)
    with pytest.raises(ValueError, match="damping must be a finite number"):
        approximation.invert(matrix, -1.0)


def test_there_is_no_matrix_per_layer_to_read_of_a_joint_one() -> None:
    with pytest.raises(ValueError, match="JointWoodbury joins layers in its inverse"):
        natgrad.fisher(network(), JointWoodbury(), Categorical(), batches_of())


@pytest.mark.parametrize("approximation", ALL, ids=repr)
def test_a_bad_batch_changes_nothing(approximation: Approximation) -> None:
    model = network()
    optimizer = optimizer_of(model, approximation)
    train(model, optimizer, batches_of()[:3])
    before = values(model)
    x, y = batch(3)
    x[0, 0] = float("nan")
    with pytest.warns(UserWarning, match="step 3 skipped"):
        train(model, optimizer, [(x, y)])
    assert same(values(model), before)
    train(model, optimizer, batches_of()[4:6])
    assert not same(values(model), before)


# Layers that did not see the same examples.


class Tokens(nn.Module):
    """One layer sees the examples, the other every token of them and one more, which are no multiple of them."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(4, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.inner(F.pad(x.flatten(0, 1), (0, 0, 0, 1)))[:-1].tanh().unflatten(0, x.shape[:2])
        return self.outer(hidden.mean(1))


def test_layers_with_examples_of_their_own_are_solved_on_their_own() -> None:
    model, twin = Tokens(), Tokens()
    twin.load_state_dict(model.state_dict())
    data = torch.randn(6, 5, 4), torch.randint(2, (6,))
    for net, approximation in ((model, JointWoodbury()), (twin, Woodbury())):
        train(net, NaturalGradient(net, approximation, **ONCE), [data])
    for found, expected in zip(values(model), values(twin), strict=True):
        assert_equal(found, expected)


def test_a_layer_that_misses_a_batch_is_not_matched_with_it() -> None:
    approximation = JointWoodbury()
    seen = {name: random_capture(seed, n=9) for seed, name in enumerate("abc")}
    stats = approximation.observe_together({name: [capture] for name, capture in seen.items()})
    later = approximation.observe_together({name: [random_capture(7 + ord(name), n=9)] for name in "ab"})
    M = {name: torch.randn(6, 8) for name in "abc"}
    parts = {name: Part(s, approximation.invert(approximation.assemble(s), 0.1), 0.1) for name, s in stats.items()}
    mixed = {name: Part(later.get(name, part.stats), part.inverse, 0.1) for name, part in parts.items()}
    found = approximation.couple(mixed) @ M
    pair = approximation.couple({name: mixed[name] for name in "ab"}) @ {name: M[name] for name in "ab"}
    alone = approximation.assemble(stats["c"]).inverse(0.1) @ M["c"]
    assert_equal(found["c"], alone)
    for name in "ab":
        assert_equal(found[name], pair[name])


def test_a_gradient_that_a_layer_lacks_is_0() -> None:
    approximation = JointWoodbury()
    stats = approximation.observe_together({name: [random_capture(ord(name))] for name in "abc"})
    joint = approximation.couple(
        {name: Part(s, approximation.invert(approximation.assemble(s), 0.1), 0.1) for name, s in stats.items()}
    )
    M = {name: torch.randn(6, 8) for name in "abc"}
    some = joint @ {"c": M["c"], "a": M["a"]}
    full = joint @ {**M, "b": torch.zeros(6, 8)}
    assert list(some) == ["c", "a"]
    for name, block_ in some.items():
        assert_equal(block_, full[name])


def test_the_dense_fisher_of_a_network_averages_over_time() -> None:
    approximation = JointFisher()
    names, batches = "ab", [{name: [random_capture(5 * k + ord(name), n=9)] for name in "ab"} for k in range(2)]
    old, new = (approximation.observe_together(seen) for seen in batches)
    merged = {name: approximation.merge(old[name], new[name], 0.7) for name in names}
    inverse = approximation.invert(approximation.assemble(merged["a"]), 0.1)
    M = {name: torch.randn(6, 8) for name in names}
    U = [torch.cat([next(seen[name][0].weight_gradients()).flatten(1) for name in names], 1) for seen in batches]
    F_ = 0.7 * U[0].mT @ U[0] / 9 + 0.3 * U[1].mT @ U[1] / 9
    expected = torch.linalg.solve(F_ + 0.1 * torch.eye(96), torch.cat([M[name].flatten() for name in names]))
    joint = approximation.couple({name: Part(stats, inverse, 0.1) for name, stats in merged.items()})
    assert_equal(torch.cat([block_.flatten() for block_ in (joint @ M).values()]), expected, 1e-8)
    with_zeros = joint @ {"a": torch.zeros(6, 8), "b": M["b"]}
    assert_equal((joint @ {"b": M["b"]})["b"], with_zeros["b"])


def test_a_network_too_large_for_a_dense_fisher_is_refused_by_name() -> None:
    for limit in (30, 40):  # layers of 36 and 21 weights: too many in one, too many together
        with pytest.raises(ValueError, match=f"weights or more, above limit={limit}; use JointWoodbury"):
            train(model := network(), optimizer_of(model, JointFisher(limit)), batches_of()[:1])


def test_a_dense_fisher_of_layers_that_cannot_be_matched_is_refused() -> None:
    model = Tokens()
    with pytest.raises(ValueError, match="layers saw examples that cannot be matched"):
        train(model, NaturalGradient(model, JointFisher(), **ONCE), [(torch.randn(6, 5, 4), torch.randint(2, (6,)))])
    approximation = JointFisher()
    seen = {name: [random_capture(ord(name), n=9)] for name in "ab"}
    both, one = approximation.observe_together(seen), approximation.observe_together({"a": seen["a"]})
    with pytest.raises(ValueError, match="not the same layers took part"):
        approximation.merge(both["a"], one["a"], 0.5)
