"""The Gram matrix of per-example gradients, and products with them, against a loop over examples."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import natgrad
from natgrad import Categorical, ExactFisher, TENGraD, Woodbury
from natgrad import capture as module
from natgrad.capture import Capture
from natgrad.labels import Estimator
from oracles import SHAPES, assert_equal, error, ggn, random_capture


def loop(seen: Capture) -> Tensor:
    """DW (*groups, n, out, in), one example after the other."""
    return torch.stack([(g.mT @ a) for a, g in zip(seen.a.unbind(-3), seen.g.unbind(-3), strict=True)], -3)


@pytest.mark.parametrize("chunk", [1 << 25, 700, 1], ids=["whole", "chunks", "one by one"])
@pytest.mark.parametrize("shape", SHAPES)
def test_law_16_both_ways_to_the_gram_matrix_are_inner_products_of_gradients(
    shape: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_CHUNK", chunk)
    seen = random_capture(1, shape, n=7)
    U = loop(seen).flatten(-2)
    for K in (seen.gram(), seen._gram_of_positions(), seen._gram_of_gradients()):
        assert_equal(K, U @ U.mT, 1e-13)


@pytest.mark.parametrize(
    ("n", "t", "out", "width", "gradients"),
    [(50, 1, 3, 4, False), (50, 8, 3, 4, True), (50, 2, 60, 80, False), (50, 8, 60, 80, True), (2, 8, 60, 80, False)],
)
def test_the_way_with_fewer_flops_is_taken(
    n: int, t: int, out: int, width: int, gradients: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = Capture(torch.randn(n, t, width), torch.randn(n, t, out), n, n * t)
    unused = "_gram_of_positions" if gradients else "_gram_of_gradients"
    monkeypatch.delattr(Capture, unused)
    assert seen.gram().shape == (n, n)


@pytest.mark.parametrize("shape", SHAPES)
def test_law_30_products_with_the_gradients_are_those_of_a_loop_over_examples(shape: str) -> None:
    seen = random_capture(2, shape, n=7)
    DW = loop(seen)
    V, w = torch.randn(*DW.shape[:-3], *DW.shape[-2:]), torch.randn(DW.shape[:-2])
    assert_equal(seen.along(V), torch.stack([(x * V).sum((-2, -1)) for x in DW.unbind(-3)], -1))
    weighted = [c[..., None, None] * x for c, x in zip(w.unbind(-1), DW.unbind(-3), strict=True)]
    assert_equal(seen.combine(w), torch.stack(weighted).sum(0))


# TENGraD: one outer product per example.


def gradients_of(approximation: Woodbury, seen: Capture) -> Tensor:
    matrix = approximation.assemble(approximation.observe(seen))
    return torch.cat(list(matrix.seen.weight_gradients()), -3)


def constant(seen: Capture, name: str) -> Capture:
    """The same with inputs, or gradients, as at the first position."""
    return replace(seen, **{name: getattr(seen, name)[..., :1, :].expand_as(getattr(seen, name))})


def test_tengrad_is_woodbury_without_weight_sharing() -> None:
    seen = random_capture(3)
    for average in (True, False):
        assert_equal(gradients_of(TENGraD(average=average), seen), loop(seen))


@pytest.mark.parametrize("name", ["a", "g"])
@pytest.mark.parametrize("shape", ["shared", "grouped"])
def test_tengrad_is_exact_where_inputs_or_gradients_are_the_same_at_all_positions(shape: str, name: str) -> None:
    seen = constant(random_capture(4, shape), name)
    assert_equal(gradients_of(TENGraD(), seen), loop(seen))
    assert_equal(gradients_of(TENGraD(average=False), seen), 4 * loop(seen))
    M = torch.randn(*seen.a.shape[:-3], 6, 8)
    found, expected = (x.assemble(x.observe(seen)).inverse(0.1) @ M for x in (TENGraD(), Woodbury()))
    assert_equal(found, expected)


def test_tengrad_divides_by_the_positions_that_an_example_has() -> None:
    seen = constant(random_capture(5, "shared"), "a")
    a, g = seen.a.clone(), seen.g.clone()
    a[:20, 2:], g[:20, 2:] = 0, 0  # half of the sequences are half as long
    short = Capture(a, g, 40.0, 120.0)
    assert_equal(gradients_of(TENGraD(), short), loop(short))


def test_tengrad_is_an_approximation_otherwise() -> None:
    seen = random_capture(6, "shared")
    assert error(gradients_of(TENGraD(), seen), loop(seen)) > 0.1


def test_tengrad_observes_what_weight_sharing_by_reduction_gives_woodbury() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 2))
    data = [(torch.randn(5, 2, 4, 4), torch.randint(2, (5,)))]
    mine = natgrad.fisher(model, TENGraD(), Categorical(), data)
    reduced = natgrad.fisher(model, Woodbury(), Categorical(), data, weight_sharing="reduce")
    assert_equal(mine.dense(), reduced.dense())


@pytest.mark.parametrize("estimator", ["exact", "sampled", "empirical"])
def test_woodbury_is_the_exact_fisher_of_every_estimator(estimator: Estimator) -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3))
    data = [(torch.randn(n, 2, 4, 4), torch.randint(3, (n,))) for n in (5, 3)]
    settings: dict[str, Any] = {"estimator": estimator, "draws": 2 if estimator == "sampled" else 1}
    found, expected = (
        natgrad.fisher(model, make(), Categorical(), data, **settings) for make in (Woodbury, ExactFisher)
    )
    assert_equal(found.dense(), expected.dense())


def test_woodbury_on_all_labels_is_the_gauss_newton_matrix() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3))
    x, y = torch.randn(5, 2, 4, 4), torch.randint(3, (5,))
    found = natgrad.fisher(model, Woodbury(), Categorical(), [(x, y)])
    for name, expected in ggn(model, x, lambda output: F.cross_entropy(output.view(5, 3), y)).items():
        assert_equal(found[name].dense(), expected)


@pytest.mark.parametrize("chunk", [1 << 25, 100], ids=["whole", "chunks"])
@pytest.mark.parametrize("out", [1, 4])
@pytest.mark.parametrize("groups", [(), (5,)], ids=["one", "groups"])
def test_the_joint_gram_matrix_is_that_of_whole_gradients(
    groups: tuple[int, ...], out: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_CHUNK", chunk)
    seen = Capture(torch.randn(*groups, 7, 3, 2), torch.randn(*groups, 7, 3, out), 7, 21)
    U = loop(seen).movedim(-3, 0).flatten(1)
    assert_equal(seen.joint_gram(), U @ U.mT, 1e-13)
