"""Whose backward pass is it, and what is an example: rows of other people's programs, with the right values."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import natgrad
from natgrad import KFAC, Categorical, ExactFisher, Gaussian, KLLimit, NaturalGradient
from natgrad.engine import Engine
from natgrad.labels import Labels
from natgrad.record import Record
from oracles import assert_equal, error, ggn

N = 6


def recorded(model: nn.Module, *inputs: Any, step: Callable[[Any], Any] | None = None) -> Record:
    """The record of one pass and the backward pass of the sum of squares, without a likelihood."""
    engine = Engine(model)
    engine.armed = True
    output = model(*inputs)
    if step is not None:
        step(output)
    output.square().sum().backward()
    (record,) = engine.take()
    engine.close()
    return record


def gradients_of(record: Record, name: str) -> Tensor:
    """The per-example gradients (n, out, in + 1) of a layer."""
    (capture,) = record.captures(record.layers[name])
    return torch.cat(list(capture.weight_gradients()), -3)


def mlp() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


# Whose backward pass.


@pytest.mark.parametrize("foreign", ["penalty", "saliency", "hessian product", "dropped pass", "another loss"])
def test_only_the_backward_pass_that_fills_the_gradient_counts(foreign: str) -> None:
    model, x = mlp(), torch.randn(N, 4, requires_grad=True)
    wanted = gradients_of(recorded(model, x), "0")

    def elsewhere(output: Tensor) -> None:
        loss = output.square().sum()
        if foreign == "penalty":
            torch.autograd.grad(loss, x, create_graph=True)[0].square().sum()
        elif foreign == "saliency":
            torch.autograd.grad(output[:, 0].sum(), x, retain_graph=True)
        elif foreign == "hessian product":
            (G,) = torch.autograd.grad(loss, model[0].weight, create_graph=True)
            torch.autograd.grad((G * torch.ones_like(G)).sum(), model[0].weight, retain_graph=True)
        elif foreign == "dropped pass":
            torch.autograd.grad(model(2 * x).sum(), x)
        else:
            torch.autograd.grad((3 * output).sum(), list(model.parameters()), retain_graph=True)

    assert_equal(gradients_of(recorded(model, x, step=elsewhere), "0"), wanted)


def test_a_backward_pass_into_some_weights_counts_for_those_alone() -> None:
    model, x = mlp(), torch.randn(N, 4)
    engine = Engine(model)
    engine.armed = True
    loss = model(x).square().sum()
    loss.backward(inputs=[model[0].weight, model[0].bias], retain_graph=True)
    (2 * loss).backward(inputs=[model[2].weight, model[2].bias])
    (record,) = engine.take()
    whole = recorded(model, x)
    assert_equal(gradients_of(record, "0"), gradients_of(whole, "0"))
    assert_equal(gradients_of(record, "2"), 2 * gradients_of(whole, "2"))


@pytest.mark.parametrize("estimator", ["exact", "sampled"])
def test_a_likelihoods_pass_is_live_by_the_users_backward_pass_alone(estimator: Any) -> None:
    model, x = mlp(), torch.randn(N, 4, requires_grad=True)
    engine = Engine(model, Labels(Categorical(), estimator), lasting=False)
    engine.armed = True
    torch.autograd.grad(model(x).sum(), x)
    assert engine.take() == []
    F.cross_entropy(model(x), torch.zeros(N, dtype=torch.int64)).backward()
    assert len(engine.take()) == 1


@pytest.mark.parametrize("how", ["hook before", "hook after", "tensor", "in place"])
def test_a_gradient_is_that_at_the_operation_whatever_changes_its_output(how: str) -> None:
    model, x = mlp(), torch.randn(N, 4)
    if how == "hook before":
        model[0].register_forward_hook(lambda module, args, y: 3 * y)
    engine = Engine(model)
    if how == "hook after":
        model[0].register_forward_hook(lambda module, args, y: 3 * y)
    if how == "tensor":
        model[0].register_forward_hook(lambda module, args, y: y.clone().mul_(3))
    if how == "in place":
        model[0].register_forward_hook(lambda module, args, y: y.mul_(3))
    engine.armed = True
    model(x).square().sum().backward()
    (record,) = engine.take()
    expected = torch.autograd.grad(model(x).square().sum(), model[0].weight)[0]
    assert_equal(gradients_of(record, "0").sum(0)[:, :-1], expected)


# The engine's own passes.


class Once(torch.autograd.Function):
    """Twice its input; its backward pass takes what it needs from a stack, and can run once."""

    stack: ClassVar[list[Tensor]] = []

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        Once.stack.append(torch.full_like(x, 2.0))
        return 2 * x

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return Once.stack.pop() * g


class Reversible(nn.Module):
    def __init__(self, once: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.drop, self.last, self.once = nn.Linear(4, 5), nn.Dropout(0.5), nn.Linear(5, 3), once

    def forward(self, x: Tensor) -> Tensor:
        h = self.drop(self.first(x))
        return self.last((Once.apply(h) if self.once else 2 * h).tanh())


@pytest.mark.parametrize("estimator", ["exact", "sampled"])
def test_a_block_whose_backward_runs_once_trains_as_one_that_runs_again(estimator: Any) -> None:
    trained = []
    for once in (True, False):
        Once.stack.clear()
        model = Reversible(once)
        optimizer = NaturalGradient(model, likelihood=Categorical(), estimator=estimator, step_size=KLLimit())
        for step in range(3):
            torch.manual_seed(step)
            x, y = torch.randn(N, 4), torch.randint(3, (N,))
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        trained.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert_equal(trained[0], trained[1], 1e-12)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # in the user's own pass
def test_hooks_of_the_user_run_for_the_users_backward_pass_alone() -> None:
    model, x = mlp(), torch.randn(N, 4)
    counts = {"module": 0, "before": 0, "tensor": 0}

    def count(name: str) -> Callable[..., None]:
        def hook(*args: Any) -> None:
            counts[name] += 1

        return hook

    model[0].register_full_backward_hook(count("module"))
    model[2].register_full_backward_pre_hook(count("before"))
    model[0].register_forward_hook(lambda module, args, y: y.register_hook(count("tensor")) and None)
    engine = Engine(model, Labels(Categorical(), "exact"))
    engine.armed = True
    for _ in range(2):
        F.cross_entropy(model(x), torch.zeros(N, dtype=torch.int64)).backward()
    assert counts == {"module": 2, "before": 2, "tensor": 2}
    engine.close()
    F.cross_entropy(model(x), torch.zeros(N, dtype=torch.int64)).backward()
    assert counts == {"module": 3, "before": 3, "tensor": 3}


def test_a_hook_that_clips_does_not_clip_the_fisher() -> None:
    model, x = mlp(), torch.randn(N, 4)
    expected = natgrad.fisher(model, ExactFisher(), Categorical(), [(x, None)])["0"].dense()
    model[0].register_full_backward_hook(lambda module, before, after: tuple(0 * g for g in before if g is not None))
    model[0].register_forward_hook(lambda module, args, y: y.register_hook(lambda g: 0 * g) and None)
    assert_equal(natgrad.fisher(model, ExactFisher(), Categorical(), [(x, None)])["0"].dense(), expected)


@pytest.mark.parametrize("likelihood", [None, Categorical()])
def test_passes_without_a_backward_are_let_go_with_their_outputs(likelihood: Any) -> None:
    model = mlp()
    optimizer = NaturalGradient(model, likelihood=likelihood, step_size=KLLimit())
    engine = optimizer._engine
    for _ in range(300):
        model(torch.randn(N, 4))
    gc.collect()
    assert len(engine._records) == 0 and len(engine._waiting) <= 1
    kept = model(torch.randn(N, 4))
    gc.collect()
    assert engine.pending
    del kept
    gc.collect()
    assert not engine.pending


# What is an example.


class Flat(nn.Module):
    """Tokens (n, t) or, ``turned``, (t, n) to logits (n t, V), by the mean of the tokens before."""

    def __init__(self, turned: bool) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embed, self.dense, self.head = nn.Embedding(7, 4), nn.Linear(4, 5), nn.Linear(5, 3)
        self.turned = turned

    def forward(self, ids: Tensor) -> Tensor:
        h = self.dense(self.embed(ids)).tanh()
        time = 0 if self.turned else 1
        h = h.cumsum(time) / torch.arange(1, h.shape[time] + 1).view((-1, 1, 1) if self.turned else (1, -1, 1))
        return self.head(h.reshape(-1, 5))


def dense_ggn(model: nn.Module, x: Any, rows: int) -> dict[str, Tensor]:
    """The generalised Gauss-Newton matrix of the mean cross entropy, which is the Fisher; by autograd."""
    zeros = torch.zeros(rows, dtype=torch.int64)
    return ggn(model, x, lambda f: F.cross_entropy(f.reshape(rows, -1), zeros))


@pytest.mark.parametrize("turned", [False, True])
def test_exact_labels_are_exact_for_logits_of_flattened_positions(turned: bool) -> None:
    model, ids = Flat(turned), torch.randint(7, (3, 4))
    inputs = ids.T if turned else ids
    found = natgrad.fisher(model, ExactFisher(), Categorical(), [(inputs, None)], batch_dim=1 if turned else None)
    for name, expected in dense_ggn(model, (inputs,), 12).items():
        if name != "embed":
            assert_equal(found[name].dense(), expected)


class Sequences(nn.Module):
    """torch's own layers on sequences, which have the batch second by default; the output has it second, too."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.dense, self.kind = nn.Linear(3, 4), kind
        self.mix: Any = nn.LSTM(4, 4) if kind == "lstm" else nn.TransformerEncoderLayer(4, 2, 5, dropout=0.0)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.mix(self.dense(x))
        return self.head(h[0] if self.kind == "lstm" else h)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of vmap, in the oracle
@pytest.mark.parametrize("t", [2, 4])
@pytest.mark.parametrize("kind", ["lstm", "transformer"])
def test_exact_labels_are_exact_where_the_batch_is_second(kind: str, t: int) -> None:
    model, x = Sequences(kind), torch.randn(t, 4, 3)
    model.mix.requires_grad_(False)
    found = natgrad.fisher(model, ExactFisher(), Categorical(), [(x, None)])
    expected = dense_ggn(model, (x,), 4 * t)
    for name in ("dense", "head"):
        assert_equal(found[name].dense(), expected[name])


class Candidates(nn.Module):
    """Scores of k candidates of each of n queries, which layers see one under the other."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.one, self.two = nn.Linear(4, 5), nn.Linear(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x.flatten(0, 1)).tanh()).view(x.shape[:2])


def test_exact_labels_are_exact_for_candidates_that_are_scored_one_under_the_other() -> None:
    model, x = Candidates(), torch.randn(N, 3, 4)
    found = natgrad.fisher(model, ExactFisher(), Categorical(), [(x, None)])
    for name, expected in dense_ggn(model, (x,), N).items():
        assert_equal(found[name].dense(), expected)


class Stacked(nn.Module):
    """The second half of the examples after the first: no sizes tell which rows belong together."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.one = nn.Linear(4, 3)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return torch.cat([self.one(x), 2 * self.one(z)])


def test_random_signs_make_exact_labels_right_on_average_where_rows_cannot_be_told() -> None:
    model, x = Stacked(), (torch.randn(4, 4), torch.randn(4, 4))
    expected = dense_ggn(model, x, 8)["one"]
    drawn = [
        natgrad.fisher(model, ExactFisher(), Categorical(), [(x, None)], seed=s)["one"].dense() for s in range(400)
    ]
    assert error(torch.stack(drawn).mean(0), expected) < 0.05
    assert error(drawn[0], expected) > 0.05


class Sometimes(nn.Module):
    """An expert that no example may reach, or those of some batches."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.always, self.expert = nn.Linear(4, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.always(x)
        chosen = x[:, 0] > 0
        return h.index_put((chosen,), h[chosen] + self.expert(h[chosen]))


def split_batches() -> tuple[Tensor, Tensor]:
    x, z = torch.randn(N, 4), torch.randn(N, 4)
    x[:, 0], z[:, 0] = x[:, 0].abs(), -z[:, 0].abs()
    return x, z


@pytest.mark.parametrize("order", [1, -1])
def test_a_layer_that_part_of_the_batches_reach_is_averaged_over_all_examples(order: int) -> None:
    model, batches = Sometimes(), list(split_batches())[::order]
    found = natgrad.fisher(model, ExactFisher(), Categorical(), [(x, None) for x in batches])
    whole = torch.cat(batches)
    for name, expected in dense_ggn(model, (whole,), len(whole)).items():
        assert_equal(found[name].dense(), expected)


def test_a_layer_that_part_of_the_micro_batches_reach_is_averaged_over_all_of_the_step() -> None:
    matrices = []
    for micro in (True, False):
        model = Sometimes()
        optimizer = NaturalGradient(
            model, ExactFisher(), likelihood=Categorical(), estimator="exact", step_size=KLLimit(), damping=0.1
        )
        torch.manual_seed(0)
        x, z = split_batches()
        for part in [x, z] if micro else [torch.cat([x, z])]:
            F.cross_entropy(model(part), torch.zeros(len(part), dtype=torch.int64), reduction="sum").backward()
        optimizer.step()
        matrices.append(optimizer.state[model.expert.weight]["stats.F"])
    assert_equal(matrices[0], matrices[1])


def test_a_layer_without_an_example_stays_and_the_others_train() -> None:
    model = Sometimes()
    optimizer = NaturalGradient(model, likelihood=Categorical(), step_size=KLLimit())
    before = model.expert.weight.detach().clone(), model.always.weight.detach().clone()
    _, z = split_batches()
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model(z), torch.zeros(N, dtype=torch.int64)).backward()
        optimizer.step()
    assert torch.equal(model.expert.weight, before[0]) and not torch.equal(model.always.weight, before[1])


def test_masked_positions_count_nowhere() -> None:
    """With a mask the Fisher is that of the positions that exist: for padding of any length and content."""

    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(6)
            self.dense, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            return self.head(self.dense(x).tanh())

    model, x = Tagger(), torch.randn(N, 5, 4)
    mask = torch.arange(5) < torch.tensor([5, 3, 1, 4, 2, 5])[:, None]
    padded = torch.where(mask[..., None], x, torch.tensor(50.0))
    batch = {"x": padded, "attention_mask": mask.long()}
    for approximation in (ExactFisher(), KFAC()):
        for way in ("attention_mask", lambda x, attention_mask: attention_mask):
            found = natgrad.fisher(model, approximation, Categorical(), [(batch, None)], mask=way)
            alone = natgrad.fisher(model, approximation, Categorical(), [(x[mask].unsqueeze(1), None)])
            for name in found:
                if isinstance(approximation, KFAC):
                    assert_equal(found[name].dense(), alone[name].dense())
    plain = nn.Sequential(nn.Linear(4, 3))
    F_ = natgrad.fisher(plain, ExactFisher(), Gaussian(), [((padded,), None)], mask=lambda x: mask)["0"].dense()
    alone_ = natgrad.fisher(plain, ExactFisher(), Gaussian(), [((x[mask],), None)])["0"].dense()
    assert_equal(F_, alone_)


# Contexts.


def test_a_step_inside_autocast_is_that_outside() -> None:
    trained = []
    for inside in (True, False):
        model = mlp().float()
        optimizer = NaturalGradient(model, likelihood=Categorical(), step_size=KLLimit())
        x, y = torch.randn(N, 4, generator=torch.Generator().manual_seed(0)).float(), torch.zeros(N, dtype=torch.int64)
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            with torch.autocast("cpu", torch.bfloat16, enabled=inside):
                optimizer.step()
        trained.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*trained)


def test_transforms_of_torch_func_see_a_watched_model_and_record_nothing() -> None:
    model, x = mlp(), torch.randn(N, 4)
    optimizer = NaturalGradient(model, likelihood=Categorical(), step_size=KLLimit())
    parameters = dict(model.named_parameters())

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, (x.unsqueeze(0),)).square().sum()

    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    assert_equal(found["0.weight"].sum(0).detach(), torch.autograd.grad(model(x).square().sum(), model[0].weight)[0])
    torch.func.jvp(model, (x,), (x,))
    gc.collect()
    assert not optimizer._engine.pending
    F.cross_entropy(model(x), torch.zeros(N, dtype=torch.int64)).backward()
    optimizer.step()
    assert optimizer.state[model[0].weight]["observations"] == 1


def test_a_grouped_transposed_convolution_keeps_its_momentum() -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.ConvTranspose2d(4, 4, 2, groups=2), nn.Flatten(), nn.Linear(36, 3))
    optimizer = NaturalGradient(model, likelihood=Categorical(), step_size=KLLimit())
    before = model[0].weight.detach().clone()
    F.cross_entropy(model(torch.randn(N, 4, 2, 2)), torch.zeros(N, dtype=torch.int64)).backward()
    optimizer.step()
    P = optimizer.state[model[0].weight]["momentum"]
    layer = optimizer.layers["0"]
    moved = layer.pack([model[0].weight.detach() - before, torch.zeros(4)])[..., :-1]
    assert float(P.norm()) > 0
    assert_equal(moved / moved.norm(), -P[..., :-1] / P[..., :-1].norm(), 1e-6)
