"""Compiled models: observing passes run as written, all others the compiled graph, and nothing is compiled twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from training import batch, network, optimizer_of, train, values, weights

from natgrad import Constant, KLLimit, NaturalGradient, QuadraticModel
from oracles import assert_equal

BATCHES = [batch(step) for step in range(12)]
OBSERVED = [step in (0, 1, 2, 4, 8) for step in range(12)]


class Written(nn.Module):
    """The same network as a class of the user, which dynamo enters by another way."""

    def __init__(self) -> None:
        super().__init__()
        self.body = network()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x) * 1.0
        return y


class Mine(nn.Linear):
    """A layer of the user's own: torch does not compile its own layers alone."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 1.0


@pytest.fixture(autouse=True)
def _a_new_dynamo() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Run:
    """A compiled training run: which steps compiled something, and which called a compiled graph."""

    def __init__(self, make: Callable[[], nn.Module], how: str, **settings: Any) -> None:
        self.counter, self.graphs = CompileCounter(), 0
        self.model = make()
        if how == "in place, before":
            self.model.compile(backend=self._backend)
        call: Any = torch.compile(self.model, backend=self._backend) if how == "around, before" else self.model
        self.optimizer = optimizer_of(call, observe_every=4, **settings)
        if how == "in place, after":
            self.model.compile(backend=self._backend)
        if how == "around, after":
            call = torch.compile(self.model, backend=self._backend)
        if how == "a layer":
            layer = next(m for m in self.model.modules() if isinstance(m, nn.Linear))
            layer.__class__ = Mine
            layer.compile(backend=self._backend)
        self.loss = torch.compile(self._loss, backend=self._backend) if how == "the loss" else self._loss
        self.call, self.compiled, self.called = call, [], []
        for data in BATCHES:
            before, graphs = self.counter.frame_count, self.graphs
            self.optimizer.zero_grad()
            self.loss(*data).backward()
            self.compiled.append(self.counter.frame_count > before)
            self.called.append(self.graphs > graphs)
            self.optimizer.step()

    def _loss(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.call(x), y)

    def _backend(self, graph: Any, inputs: Any) -> Any:
        compiled = self.counter(graph, inputs)

        def call(*args: Any) -> Any:
            self.graphs += 1
            return compiled(*args)

        return call


WAYS = ["in place, before", "in place, after", "around, before", "around, after", "a layer"]


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("make", [network, Written])
def test_observing_steps_run_as_written_and_all_others_one_compiled_graph(make: Any, how: str) -> None:
    run = Run(make, how, step_size=KLLimit())
    plain = make()
    train(plain, optimizer_of(plain, observe_every=4, step_size=KLLimit()), BATCHES)
    assert run.called == [not observed for observed in OBSERVED]
    assert [step for step, compiled in enumerate(run.compiled) if compiled] == [3]  # the first that does not observe
    assert run.counter.frame_count == 1
    assert all(run.optimizer.state[w]["observations"] == 5 for w in weights(run.optimizer))
    for found, expected in zip(values(run.model), values(plain), strict=True):
        assert_equal(found, expected, 1e-10)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # of torch, at any break of a graph
def test_a_compiled_function_around_the_model_breaks_its_graph_there_when_a_step_observes() -> None:
    run = Run(network, "the loss", step_size=KLLimit())
    plain = network()
    train(plain, optimizer_of(plain, observe_every=4, step_size=KLLimit()), BATCHES)
    assert not any(run.compiled[4:])
    for found, expected in zip(values(run.model), values(plain), strict=True):
        assert_equal(found, expected, 1e-10)


def test_a_policy_that_reads_every_step_never_compiles() -> None:
    assert not any(Run(network, "around, after", step_size=QuadraticModel()).compiled)


def test_parameters_of_a_compiled_model_have_their_own_names() -> None:
    assert list(Run(network, "around, before", step_size=Constant()).optimizer.layers) == ["0", "3"]


def test_other_compiled_models_stay_compiled_while_a_step_observes() -> None:
    counter = CompileCounter()
    teacher = torch.compile(network(5), backend=counter)
    model = network()
    NaturalGradient(model)
    model(batch()[0])
    teacher(batch()[0])
    assert counter.frame_count == 1


def _around(model: nn.Module) -> Callable[[Tensor], Any]:
    def around(x: Tensor) -> Any:
        return model(x)

    return around


@pytest.mark.parametrize("make", [network, Written])
def test_a_model_compiled_as_one_graph_trains_and_a_graph_around_it_is_refused_by_name(make: Any) -> None:
    model, plain = make(), make()
    optimizer = optimizer_of(model, step_size=QuadraticModel())
    model.compile(backend="eager", fullgraph=True)
    train(model, optimizer, BATCHES[:3])
    train(plain, optimizer_of(plain, step_size=QuadraticModel()), BATCHES[:3])
    for found, expected in zip(values(model), values(plain), strict=True):
        assert_equal(found, expected, 1e-10)
    around: Any = torch.compile(_around(model), backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="NaturalGradient observes"):
        around(BATCHES[0][0])


def test_aot_autograd_trains_to_the_same_parameters() -> None:
    model, plain = network(), network()
    optimizer = optimizer_of(model, step_size=KLLimit())
    call: Any = torch.compile(model, backend="aot_eager")
    train(call, optimizer, BATCHES)
    train(plain, optimizer_of(plain, step_size=KLLimit()), BATCHES)
    for found, expected in zip(values(model), values(plain), strict=True):
        assert_equal(found, expected, 1e-10)
