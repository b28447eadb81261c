"""Ways to call a model and to use its output that nobody here wrote, with the right values."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from loop import N, backward, batch, everything, mlp, optimizer_of, same, train, values
from torch import Tensor, nn

from natgrad import KFAC, Bernoulli, Categorical, Constant, ExactFisher, NaturalGradient
from oracles import assert_equal

# Groups.


@pytest.mark.parametrize("biases", [{"weight_decay": 0.0}, {"weight_decay": 0.0, "lr": 0.3}, {"lr": 0.0}])
def test_weight_decay_on_matrices_alone_is_the_step_written_by_hand(biases: Any) -> None:
    """theta <- (1 - lr wd) theta - lr P, where every parameter has the lr and the decay of its own group."""
    model = mlp()
    model[2] = nn.LayerNorm(5)
    twin = copy.deepcopy(model)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    optimizer = optimizer_of(
        model, ExactFisher(), estimator="exact", step_size=Constant(), momentum=0.5, damping=0.1, lr=0.7,
        groups=[{"params": matrices, "weight_decay": 0.2}, {"params": vectors, **biases}],
    )  # fmt: skip
    momentum: dict[str, Tensor] = {}
    for seed in range(3):
        backward(model, optimizer, batch(seed))
        before = values(model)
        optimizer.step()
        for layer in optimizer.layers.values():
            P = optimizer.state[layer.weight]["momentum"]
            k = P[0].numel() if P.ndim > 2 else P.numel()  # of a group, as those of a norm are
            matrix = optimizer.state[layer.weight]["stats.F"].reshape(-1, k, k) + 0.1 * torch.eye(k)
            M = layer.pack([p.grad for p in layer.parameters if p.grad is not None]).reshape(-1, k)
            D = torch.linalg.solve(matrix, M)
            old = momentum.get(layer.name, torch.zeros_like(D))
            momentum[layer.name] = 0.5 * old + D
            parts = layer.unpack(momentum[layer.name].reshape(P.shape))
            for p, part in zip(layer.parameters, parts, strict=True):
                own = {"lr": 0.7, "weight_decay": 0.2} if p.ndim > 1 else {"lr": 0.7, "weight_decay": 0.0, **biases}
                number = [q is p for q in model.parameters()].index(True)
                wanted = (1 - own["lr"] * own["weight_decay"]) * before[number] - own["lr"] * part
                assert_equal(p.detach(), wanted, 1e-9)
    assert "0" in optimizer.layers and optimizer.layers["0"].bias is not None
    assert list(twin.state_dict()) == list(model.state_dict())


# Inputs.


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).tanh())


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "coo": lambda x: x.to_sparse(),
    "csr": lambda x: x.to_sparse_csr(),
    "coalesced later": lambda x: torch.sparse_coo_tensor(x.nonzero().T, x[x != 0], x.shape, check_invariants=True),
}


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("likelihood", [Categorical(), None], ids=["likelihood", "own loss"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_sparse_input_trains_as_the_dense_one(layout: str, likelihood: Any) -> None:
    trained = []
    for sparse in (True, False):
        model = Dense()
        optimizer = optimizer_of(model, likelihood=likelihood)
        for seed in range(3):
            x, y = batch(seed)
            x = x * (x > 0)
            backward(model, optimizer, (LAYOUTS[layout](x) if sparse else x, y))
            optimizer.step()
        trained.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        assert optimizer.state[model.first.weight]["observations"] == 3
    assert_equal(trained[0], trained[1], 1e-10)


class Ragged(nn.Module):
    """Sequences of several lengths, as one nested tensor."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.last = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.nested.to_padded_tensor(self.inner(x), 0.0)
        return self.last(h.sum(1))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
@pytest.mark.parametrize("likelihood", [Categorical(), None], ids=["likelihood", "own loss"])
def test_layers_of_nested_tensors_follow_adamw_with_a_reason_and_the_others_train(likelihood: Any, layout: Any) -> None:
    model = Ragged()
    optimizer = optimizer_of(model, likelihood=likelihood)
    for seed in range(2):
        x, y = batch(seed)
        nested = torch.nested.nested_tensor([row.expand(2 + k % 3, 4) for k, row in enumerate(x)], layout=layout)
        before = values(model)
        backward(model, optimizer, (nested, y))
        optimizer.step()
        assert all(not torch.equal(a, p) for a, p in zip(before, values(model), strict=True))
    assert "nested" in optimizer.uncovered["inner.weight"] and "last" in optimizer.layers


@pytest.mark.parametrize("likelihood", [Categorical(), None], ids=["likelihood", "own loss"])
@pytest.mark.parametrize("how", [lambda x: x.copy_(torch.randn_like(x)), lambda x: x.zero_(), lambda x: x.mul_(2)])
def test_an_input_may_be_overwritten_after_the_backward_pass(how: Any, likelihood: Any) -> None:
    trained = []
    for reused in (True, False):
        torch.manual_seed(0)
        model, buffer = mlp(), torch.empty(N, 4)
        optimizer = optimizer_of(model, likelihood=likelihood)
        for seed in range(3):
            x, y = batch(seed)
            buffer.copy_(x)
            backward(model, optimizer, (buffer if reused else x, y))
            how(buffer)
            optimizer.step()
        trained.append(values(model))
    assert same(*trained)


class Kept(nn.Module):
    """Keeps its inner activations, which a user then changes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.h = self.first(x).tanh()
        return self.last(self.h)


@pytest.mark.parametrize("likelihood", [Categorical(), None], ids=["likelihood", "own loss"])
@pytest.mark.parametrize("how", [lambda x: x.mul_(2), lambda x: x[0].zero_(), lambda x: x.copy_(torch.ones_like(x))])
def test_an_activation_that_is_changed_in_place_is_an_error_by_name(how: Any, likelihood: Any) -> None:
    model = Kept()
    optimizer = optimizer_of(model, likelihood=likelihood)
    train(model, optimizer, range(2))
    backward(model, optimizer, batch(2))
    how(model.h.detach())
    before = everything(model, optimizer)
    with pytest.raises(RuntimeError, match=r"layer 'last': the input of its linear was changed in place"):
        optimizer.step()
    assert same(everything(model, optimizer), before)
    train(model, optimizer, range(3, 5))


# Outputs.


@dataclass
class Output:
    logits: Tensor
    loss: Tensor | None = None


class Wrapped(Dense):
    """Returns its logits in some form, and its loss where it is given labels."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        logits = super().forward(x)
        loss = None if labels is None else F.cross_entropy(logits, labels)
        if self.form == "dataclass":
            return Output(logits, loss)
        if self.form == "dict":
            return {"logits": logits, "loss": loss}
        if self.form == "tuple":
            return loss, logits
        return loss if self.form == "loss" else logits


POINTERS: dict[str, tuple[str, Callable[[Any], Tensor]]] = {
    "dataclass": ("dataclass", lambda o: o.logits),
    "a new tensor": ("dataclass", lambda o: o.logits.float().double()),
    "scaled": ("dict", lambda o: o["logits"] * 1.0),
    "flattened": ("tuple", lambda o: o[1].reshape(-1, 3)),
    "tuple": ("tuple", lambda o: o[1]),
}


@pytest.mark.parametrize("estimator", ["exact", "sampled"])
@pytest.mark.parametrize("pointer", POINTERS)
def test_an_output_may_be_anything_that_a_pointer_leads_out_of(pointer: str, estimator: Any) -> None:
    form, leads = POINTERS[pointer]
    trained = []
    for wrapped in (True, False):
        model = Wrapped(form if wrapped else "logits")
        likelihood = Categorical(output=leads) if wrapped else Categorical()
        optimizer = optimizer_of(model, KFAC(), likelihood=likelihood, estimator=estimator)
        for seed in range(3):
            x, y = batch(seed)
            optimizer.zero_grad()
            output = model(x, y)
            F.cross_entropy(leads(output) if wrapped else output, y).backward()
            optimizer.step()
        trained.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        assert set(optimizer.layers) == {"first", "last"} and not optimizer.uncovered
    assert_equal(trained[0], trained[1], 1e-5 if pointer == "a new tensor" else 1e-12)


@pytest.mark.parametrize("form", ["loss", "tuple", "dataclass", "dict"])
def test_a_model_that_returns_its_loss_has_the_empirical_fisher_of_that_loss(form: str) -> None:
    model, plain = Wrapped(form), Wrapped("logits")
    optimizers = [optimizer_of(m, ExactFisher(), likelihood=None) for m in (model, plain)]
    losses: dict[str, Callable[[Any], Tensor]] = {
        "loss": lambda o: o, "tuple": lambda o: o[0], "dataclass": lambda o: o.loss, "dict": lambda o: o["loss"]
    }  # fmt: skip
    for seed in range(3):
        x, y = batch(seed)
        for m, optimizer in zip((model, plain), optimizers, strict=True):
            optimizer.zero_grad()
            loss = losses[form](m(x, y)) if m is model else F.cross_entropy(m(x), y)
            loss.backward()
            optimizer.step()
    assert same(values(model), values(plain))
    x, y = batch(0)
    fresh, gradients = Wrapped(form), []
    first = optimizer_of(fresh, ExactFisher(), likelihood=None)
    for i in range(N):
        (g,) = torch.autograd.grad(F.cross_entropy(Dense.forward(fresh, x[i : i + 1]), y[i : i + 1]), fresh.last.weight)
        gradients.append(g.reshape(-1))
    losses[form](fresh(x, y)).backward()
    first.step()
    G, found = torch.stack(gradients), first.state[fresh.last.weight]["stats.F"].reshape(18, 18)
    chosen = [6 * row + column for row in range(3) for column in range(5)]
    square = first.statistics()["loss_square"]  # of the unit
    assert_equal(square * found[chosen][:, chosen], G.mT @ G / N)


@pytest.mark.parametrize("estimator", ["exact", "sampled"])
def test_unbatched_outputs_are_one_example(estimator: Any) -> None:
    trained = []
    for unbatched in (True, False):
        model = Dense()
        likelihood = Categorical(output=lambda y: y.unsqueeze(0)) if unbatched else Categorical()
        optimizer = optimizer_of(model, ExactFisher(), likelihood=likelihood, estimator=estimator)
        for seed in range(3):
            x, y = batch(seed)
            x, y = x[:1], y[:1]
            backward(model, optimizer, (x[0], y[0]) if unbatched else (x, y))
            optimizer.step()
        trained.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert_equal(trained[0], trained[1], 1e-10)


class Probable(Dense):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        return logits.softmax(-1) if self.kind == "softmax" else logits.sigmoid() if self.kind == "sigmoid" else logits


@pytest.mark.parametrize("estimator", ["exact", "sampled"])
@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_probabilities_train_as_the_logits_behind_them(kind: str, estimator: Any) -> None:
    trained, make = [], Categorical if kind == "softmax" else Bernoulli
    for probable in (True, False):
        model = Probable(kind if probable else "")
        likelihood = make(inputs="probabilities") if probable else make()
        optimizer = optimizer_of(model, ExactFisher(), likelihood=likelihood, estimator=estimator)
        for seed in range(3):
            x, y = batch(seed)
            optimizer.zero_grad()
            output = model(x)
            if kind == "softmax":
                loss = F.nll_loss(output.log(), y) if probable else F.cross_entropy(output, y)
            else:
                z = F.one_hot(y, 3).double()
                each = F.binary_cross_entropy if probable else F.binary_cross_entropy_with_logits
                loss = each(output, z, reduction="sum") / N
            loss.backward()
            optimizer.step()
        trained.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert_equal(trained[0], trained[1], 1e-8)


@pytest.mark.parametrize("seed", [1.8e13, 10**15, 2**63 - 1])
def test_any_whole_number_is_a_seed(seed: float) -> None:
    model = mlp()
    optimizer = optimizer_of(model, seed=int(seed))
    train(model, optimizer, range(3))
    twin = mlp()
    train(twin, optimizer_of(twin, seed=int(seed)), range(3))
    other = mlp()
    train(other, optimizer_of(other, seed=1), range(3))
    assert same(values(model), values(twin)) and not same(values(model), values(other))


# Other ways in.


class Policy(nn.Module):
    """As in PPO: the actor and the critic are called by another method than ``forward``."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk, self.actor, self.critic = nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(5, 1)

    def get_value(self, x: Tensor) -> Tensor:
        return self.critic(self.trunk(x).tanh())

    def get_action_and_value(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.trunk(x).tanh()
        return self.actor(h), self.critic(h)


class Forward(Policy):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return super().get_action_and_value(x)


@pytest.mark.parametrize("likelihood", [Categorical(output=lambda o: o[0]), None], ids=["likelihood", "own loss"])
def test_a_method_that_is_named_is_a_pass_like_forward(likelihood: Any) -> None:
    trained = []
    for named in (True, False):
        model = Policy() if named else Forward()
        settings = {"calls": ("get_action_and_value",)} if named else {}
        optimizer = optimizer_of(model, likelihood=likelihood, **settings)
        for seed in range(3):
            x, y = batch(seed)
            optimizer.zero_grad()
            logits, value = model.get_action_and_value(x) if named else model(x)
            (F.cross_entropy(logits, y) + 0 * value.mean()).backward()
            optimizer.step()
        trained.append(values(model))
        assert {"trunk", "actor"} <= set(optimizer.layers)
        twin = copy.deepcopy(model)
        twin.get_action_and_value(batch(0)[0])[0].sum().backward()
        gc.collect()
        assert not optimizer._engine.pending
    assert same(*trained)


def test_a_method_that_the_model_does_not_have_is_refused() -> None:
    with pytest.raises(ValueError, match="Policy has no method 'get_action'"):
        NaturalGradient(Policy(), calls=("get_action",))


@pytest.mark.parametrize("likelihood", [Categorical(), None], ids=["likelihood", "own loss"])
def test_a_model_in_eval_mode_is_observed_where_that_is_asked_for(likelihood: Any) -> None:
    trained = []
    for evaluating in (True, False):
        model = mlp().train(not evaluating)
        optimizer = optimizer_of(model, likelihood=likelihood, observe_in_eval=evaluating)
        train(model, optimizer, range(3))
        trained.append(values(model))
        assert set(optimizer.layers) == {"0", "3"}
    assert same(*trained)
    model = mlp().eval()
    optimizer = optimizer_of(model, likelihood=likelihood)
    with pytest.warns(UserWarning, match="not observed"):
        train(model, optimizer, range(1))


# Traces.

TOOLS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "script": lambda model, x: torch.jit.script(model),
    "trace": lambda model, x: torch.jit.trace(model, x),
    "export": lambda model, x: torch.export.export(model, (x,)).module(),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("armed", [True, False])
@pytest.mark.parametrize("tool", TOOLS)
def test_a_watched_model_can_be_traced_and_goes_on_training(tool: str, armed: bool, copied: bool) -> None:
    torch.manual_seed(0)
    x, trained = batch(0)[0], []
    for traced in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 3))
        optimizer = optimizer_of(model)
        train(model, optimizer, range(2))
        if traced:
            optimizer._engine.armed = armed
            made = TOOLS[tool](copy.deepcopy(model) if copied else model, x)
            assert_equal(made(x).detach(), model(x).detach())
            assert_equal(made(x[:N]).detach(), model(x).detach())
        optimizer.zero_grad()
        train(model, optimizer, range(2, 5))
        trained.append(values(model))
    assert same(*trained)
