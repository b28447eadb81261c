"""What users of other libraries have complained of: the situation of every complaint, and what must be true of it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, jacrev

import natgrad
from cases import CASES, Case
from natgrad import KFAC, Bernoulli, Categorical, ExactFisher, Gaussian, KLLimit, Likelihood, NaturalGradient
from natgrad.matrix import Grouped, Kronecker
from oracles import assert_equal, ggn

N, T = 6, 4


def steps(model: nn.Module, optimizer: NaturalGradient, loss: Callable[[], Tensor], number: int = 3) -> list[float]:
    losses = []
    for _ in range(number):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses


@pytest.mark.parametrize("need_weights", [True, False])
def test_the_output_projection_of_an_attention_is_listed_seen_and_stepped(need_weights: bool) -> None:
    """kfac-pytorch 267: ``out_proj`` is registered, its hooks never fire, and the first step raises."""
    model, x = nn.MultiheadAttention(8, 2, batch_first=True), torch.randn(4, 3, 8)
    optimizer = NaturalGradient(model, strict=True)
    steps(model, optimizer, lambda: model(x, x, x, need_weights=need_weights)[0].square().mean())
    table = str(optimizer).splitlines()
    assert set(optimizer.layers) == {"in_proj.q", "in_proj.k", "in_proj.v", "out_proj"} and not optimizer.uncovered
    assert [line.split()[0] for line in table[2:6]] == ["in_proj.q", "in_proj.k", "in_proj.v", "out_proj"]
    assert table[-1].startswith("100.0 % of 288") and "AdamW" not in str(optimizer)
    assert all(curvature.refreshed for curvature in optimizer._now.values())
    (out,) = (layer for name, layer in optimizer.layers.items() if name == "out_proj")
    assert optimizer.state[out.parameters[0]]


LOSSES: dict[str, tuple[Likelihood, nn.Module]] = {
    "CrossEntropyLoss": (Categorical(), nn.CrossEntropyLoss()),
    "MSELoss": (Gaussian(reduction="mean"), nn.MSELoss()),
    "BCEWithLogitsLoss": (Bernoulli(reduction="mean"), nn.BCEWithLogitsLoss()),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_factors_are_those_of_the_loss_that_is_minimised_and_not_twice_as_large(loss: str) -> None:
    """curvlinops 82: KFAC's factors are twice those of BackPACK and ASDL.

    For one linear layer G is the mean Hessian of torch's loss in the output, A the mean of a a^T.
    """
    likelihood, criterion = LOSSES[loss]
    model, x = nn.Sequential(nn.Linear(4, 3)), torch.randn(N, 4)
    y = torch.randint(3, (N,)) if loss == "CrossEntropyLoss" else torch.rand(N, 3)
    found = natgrad.fisher(model, KFAC(), likelihood, [(x, y)])["0"]
    assert isinstance(found, Kronecker)
    a = torch.cat([x, torch.ones(N, 1)], 1)
    hessians = [torch.func.hessian(lambda f, n=n: criterion(f, y[n]))(model(x)[n].detach()) for n in range(N)]
    assert_equal(found.right, a.mT @ a / N)
    assert_equal(found.left, torch.stack(hessians).mean(0))


class Pooled(nn.Module):
    """T inputs, of which ``outputs`` sums are read: the layer has T positions, the loss as many as sums."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.inner, self.head, self.outputs = nn.Linear(3, 4), nn.Linear(4, 2), outputs

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.inner(x))
        return self.head(h.unflatten(1, (self.outputs, -1)).sum(2))


@pytest.mark.parametrize("outputs", [1, 2, T])
@pytest.mark.parametrize("loss", ["CrossEntropyLoss", "MSELoss"])
def test_the_scale_does_not_depend_on_how_many_positions_a_layer_has(loss: str, outputs: int) -> None:
    """curvlinops 107: G is off where a layer has R positions and the loss R' != R; the mean is over the loss's."""
    likelihood, criterion = LOSSES[loss]
    model, x = Pooled(outputs), torch.randn(N, T, 3)
    y = torch.randint(2, (N, outputs)) if loss == "CrossEntropyLoss" else torch.randn(N, outputs, 2)
    exact = natgrad.fisher(model, ExactFisher(), likelihood, [(x, y)])

    def whole(output: Tensor) -> Tensor:
        return criterion(output.flatten(0, 1), y.flatten(0, 1))

    for name, expected in ggn(model, x, whole).items():
        assert_equal(exact[name].dense(), expected)
    kfac = natgrad.fisher(model, KFAC(), likelihood, [(x, y)])["head"]  # a linear head on positions of its own
    assert isinstance(kfac, Kronecker)
    features = torch.tanh(model.inner(x)).unflatten(1, (outputs, -1)).sum(2).flatten(0, 1).detach()
    a = torch.cat([features, torch.ones(len(features), 1)], 1)
    assert_equal(kfac.right, a.mT @ a / len(a))
    output, labels = model(x).detach().flatten(0, 1), y.flatten(0, 1)
    hessians = [torch.func.hessian(lambda f, n=n: criterion(f, labels[n]))(output[n]) for n in range(len(output))]
    assert_equal(kfac.left, torch.stack(hessians).mean(0))


class Siamese(nn.Module):
    """One module, called on two inputs whose outputs meet."""

    def __init__(self) -> None:
        super().__init__()
        self.tower, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        first, second = (torch.tanh(self.tower(z)) for z in x.unbind(1))
        return self.head(first * second)


def test_a_module_that_is_used_twice_has_the_fisher_of_both_uses() -> None:
    """Hooks that keep one tensor of a module: the later call overwrites the earlier, or cross terms are lost."""
    model, x, y = Siamese(), torch.randn(N, 2, 3), torch.randint(2, (N,))
    found = natgrad.fisher(model, ExactFisher(), Categorical(), [(x, y)])
    for name, expected in ggn(model, x, lambda output: F.cross_entropy(output, y)).items():
        assert_equal(found[name].dense(), expected)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    gradients = []
    for n in range(N):
        leaves = {name: p.requires_grad_() for name, p in parameters.items()}
        loss = F.cross_entropy(functional_call(model, leaves, (x[n : n + 1],)), y[n : n + 1])
        weight, bias = torch.autograd.grad(loss, [leaves["tower.weight"], leaves["tower.bias"]])
        gradients.append(torch.cat([weight, bias.unsqueeze(1)], 1).flatten())
    U = torch.stack(gradients)
    empirical = natgrad.fisher(model, ExactFisher(), Categorical(), [(x, y)], estimator="empirical")["tower"]
    assert_equal(empirical.dense(), U.mT @ U / N)


class OwnProduct(nn.Module):
    """A dense layer in a form of its own, of the weight or of what no rule reads."""

    def __init__(self, positive: bool = False) -> None:
        super().__init__()
        self.matrix, self.positive = nn.Parameter(torch.randn(4, 3)), positive

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("ni,oi->no", x, self.matrix.exp() if self.positive else self.matrix)


class Unlike(nn.Module):
    """Its second layer looks like any other, is never called, and its weight is used in a way that has no rule."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.second.parameters()
        return torch.einsum("ni,oi->no", torch.tanh(self.first(x)), weight.sinh()) + bias


def test_a_dense_layer_in_a_form_of_its_own_is_one() -> None:
    """kfac-jax 114: the same network is found as dense layers in one framework and as orphans in another, unsaid."""
    model, x = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), OwnProduct()), torch.randn(N, 3)
    report = natgrad.coverage(model, x)
    assert report.covered == 1.0 and not report.fallbacks
    found = natgrad.fisher(model, ExactFisher(), Gaussian(), [(x, None)])
    assert list(found) == ["0", "2.matrix"]
    W = model.get_parameter("2.matrix").detach()
    J = jacrev(lambda W: functional_call(model, {"2.matrix": W}, (x,)))(W).detach().flatten(0, 1).flatten(1)
    assert_equal(found["2.matrix"].dense(), J.mT @ J / N)


def test_a_parameter_without_curvature_is_named_with_the_reason_before_training() -> None:
    """As above, where it has none."""
    model, x = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), OwnProduct(positive=True)), torch.randn(N, 3)
    report = natgrad.coverage(model, x)
    assert report.fallbacks == {"2.matrix": "used by exp: no rule"} and report.covered == 0.5
    assert natgrad.coverage(model).fallbacks == {"2.matrix": "known after a pass"}
    optimizer = NaturalGradient(model, strict=True)
    with pytest.raises(RuntimeError, match=r"2\.matrix \(used by exp: no rule\)"):
        steps(model, optimizer, lambda: model(x).square().mean(), 1)
    assert "2.matrix" in str(NaturalGradient(model)) and "AdamW" in str(NaturalGradient(model))


def test_a_layer_that_turns_out_to_have_no_curvature_is_named_at_the_first_step() -> None:
    """kfac-jax 344: from one version to the next parameters are registered as another kind, without a word."""
    model, x, y = Unlike(), torch.randn(N, 3), torch.randint(2, (N,))
    assert natgrad.coverage(model).covered == 1.0 and natgrad.coverage(model).expected  # as it looks before
    optimizer = NaturalGradient(model, likelihood=Categorical(), strict=True)
    with pytest.raises(RuntimeError, match=r"no rule reads: second.weight \(used by sinh: no rule\); name"):
        steps(model, optimizer, lambda: F.cross_entropy(model(x), y), 1)
    optimizer = NaturalGradient(model, likelihood=Categorical(), overhead=None)
    steps(model, optimizer, lambda: F.cross_entropy(model(x), y), 1)
    assert str(optimizer).splitlines()[-1].startswith("69.2 % of 26")  # the bias has its own
    optimizer = NaturalGradient(model, likelihood=Categorical(), step_size=KLLimit())
    model.eval()
    with pytest.warns(UserWarning, match="not observed: first.weight, first.bias, second.weight, second.bias; AdamW"):
        steps(model, optimizer, lambda: F.cross_entropy(model(x), y), 1)


def test_norms_have_curvature() -> None:
    """kfac-pytorch 23: BatchNorm and LayerNorm are passed over, and no preconditioner touches them."""
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.LayerNorm(16), nn.Linear(16, 3)
    )
    x, y = torch.randn(N, 1, 4, 4), torch.randint(3, (N,))
    optimizer = NaturalGradient(model, likelihood=Categorical(), strict=True)
    losses = steps(model, optimizer, lambda: F.cross_entropy(model(x), y), 6)
    assert losses[-1] < losses[0] and natgrad.coverage(model).covered == 1.0
    assert {"1", "4"} <= {name for name, curvature in optimizer._now.items() if curvature.refreshed}


def test_kfac_of_a_network_with_batch_norm_in_evaluation_mode() -> None:
    """backpack 259: this network raises NotImplementedError; its norms' blocks are exact, one feature after another."""
    layers: list[nn.Module] = []
    for n_in, n_out in ((1, 3), (3, 2)):
        layers += [nn.Conv2d(n_in, n_out, 3, stride=3), nn.BatchNorm2d(n_out), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(2, 3))
    x, y = torch.randn(30, 1, 9, 9), torch.randint(3, (30,))
    model(x)  # running statistics
    model.eval()
    found = natgrad.fisher(model, KFAC(), Categorical(), [(x, y)])
    assert list(found) == ["0", "1", "3", "4", "7"]
    exact = natgrad.fisher(model, ExactFisher(), Categorical(), [(x, y)])
    expected = ggn(model, x, lambda output: F.cross_entropy(output, y))
    for name in ("1", "4"):
        matrix = exact[name]
        assert isinstance(matrix, Grouped)
        blocks = matrix.inner.dense()  # (features, 2, 2)
        dense = expected[name].unflatten(0, (len(blocks), 2)).unflatten(-1, (len(blocks), 2))
        assert_equal(blocks, torch.stack([dense[j, :, j] for j in range(len(blocks))]))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_factors_of_low_rank_train_without_a_failure_in_single_precision(case: Case) -> None:
    """optimizers 265: roots of eigenvalues that are 0 but for rounding blow up, early in training most of all.

    Dead inputs, inputs twice over, more inputs than examples, and a unit that never fires.
    """
    model = nn.Sequential(nn.Linear(12, 6), nn.ReLU(), nn.Linear(6, 3)).float()
    with torch.no_grad():
        model.get_parameter("0.bias")[2] = -1e6
    optimizer = NaturalGradient(
        model, case.make(), likelihood=Categorical(), observe_every=1, refresh_every=1, step_size=KLLimit()
    )
    batches = [torch.randn(6, 5) for _ in range(2)]
    losses = []
    for step in range(20):
        x = batches[step % 2]
        wide = torch.cat([x, x, torch.zeros(6, 2)], 1).float()
        y = (x[:, :3] + 0.5 * x[:, 2:]).argmax(1)
        losses += steps(model, optimizer, lambda wide=wide, y=y: F.cross_entropy(model(wide), y), 1)  # type: ignore[misc]
    told = optimizer.statistics()
    assert told["skipped"] == told["failures"] == 0
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert losses[-1] + losses[-2] < losses[0] + losses[1]
