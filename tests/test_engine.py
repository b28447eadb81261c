"""The engine records and leaves no trace: not in gradients, not in random numbers, not in records nobody asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from natgrad import Categorical
from natgrad.engine import Engine
from natgrad.labels import Labels
from natgrad.record import Record
from oracles import assert_equal

ESTIMATORS = [None, "exact", "sampled", "empirical"]
every_estimator = pytest.mark.parametrize("estimator", ESTIMATORS)


def network() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Dropout(0.3), nn.Linear(18, 5), nn.Linear(5, 3)
    )


def data(n: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 1, 5, 5, generator=generator), torch.randint(3, (n,), generator=generator)


def labels_of(estimator: Any, y: Tensor | None = None, draws: int = 2) -> Labels | None:
    return None if estimator is None else Labels(Categorical(), estimator, draws, y)


@contextmanager
def engine_on(model: nn.Module, labels: Labels | None, **settings: Any) -> Iterator[Engine]:
    engine = Engine(model, labels, **settings)
    engine.armed = True
    yield engine
    engine.close()


def captures(model: nn.Module, record: Record) -> list[Tensor]:
    return [
        tensor
        for layer in record.layers.values()
        for capture in record.captures(layer)
        for tensor in (capture.a, capture.g)
    ]


# It leaves no trace.


def train(model: nn.Module, steps: int = 3) -> list[Tensor]:
    """What a user sees of a few steps: losses, gradients, and the state of the random numbers."""
    torch.manual_seed(5)
    seen: list[Tensor] = []
    for step in range(steps):
        x, y = data(seed=step)
        model.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        seen += [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
    return [*seen, torch.get_rng_state(), torch.rand(3)]


@every_estimator
def test_law_27_gradients_and_random_numbers_are_bitwise_the_same_with_the_engine_armed(estimator: str | None) -> None:
    alone = train(network())
    model = network()
    with engine_on(model, labels_of(estimator, data()[1])) as engine:
        watched = train(model)
        assert len(engine.everything()) == 3
    assert len(alone) == len(watched)
    assert all(torch.equal(one, other) for one, other in zip(alone, watched, strict=True))


@pytest.mark.parametrize("estimator", ["exact", "sampled", "empirical"])
def test_law_27_grad_is_untouched_by_a_forward_pass(estimator: str) -> None:
    model, (x, y) = network(), data()
    with engine_on(model, labels_of(estimator, y)):
        model(x)
    assert all(p.grad is None for p in model.parameters())


def test_closing_takes_every_hook_off() -> None:
    model = network()
    with engine_on(model, None):
        pass
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_the_record_of_a_likelihood_lets_go_of_the_graph() -> None:
    model, (x, _) = network(), data()
    with engine_on(model, labels_of("sampled")) as engine:
        model(x).sum().backward()
        (record,) = engine.take()
    calls = [call for layer_calls in record.calls.values() for call in layer_calls]
    assert calls and all(use.call.edge is None for use in calls)
    assert not any(tensor.requires_grad for tensor in captures(model, record))


# It records when it should.


@every_estimator
def test_nothing_is_recorded_in_eval_or_without_grad_or_unarmed(estimator: str | None) -> None:
    model, (x, y) = network(), data()
    with engine_on(model, labels_of(estimator, y)) as engine:
        with torch.no_grad():
            model(x)
        model.eval()
        model(x)
        model.train()
        engine.armed = False
        model(x)
        assert engine.everything() == []
        engine.armed = True
        model(x)
        assert len(engine.everything()) == 1


def test_eval_mode_is_recorded_where_it_is_asked_for() -> None:
    model, (x, _) = network().eval(), data()
    with engine_on(model, labels_of("exact"), only_training=False) as engine:
        model(x)
        assert len(engine.everything()) == 1


@every_estimator
def test_take_drops_records_without_a_backward(estimator: str | None) -> None:
    model, (x, y) = network(), data()
    with engine_on(model, labels_of(estimator, y)) as engine:
        model(x)
        F.cross_entropy(model(x + 1), y).backward()
        model(x)
        (record,) = engine.take()
        assert torch.equal(record.calls["0"][0].x, x + 1)
        assert engine.everything() == []


@every_estimator
def test_several_forwards_before_one_backward_are_records_of_their_own(estimator: str | None) -> None:
    model, (x, y) = network().eval(), data(6)
    parts = [slice(0, 1), slice(1, 4), slice(4, 6)]
    labels = labels_of(estimator, y)
    with engine_on(model, labels, only_training=False) as engine:
        losses = []
        for part in parts:
            if labels is not None:
                labels.targets = y[part]
            losses.append(F.cross_entropy(model(x[part]), y[part], reduction="sum"))
        torch.stack(losses).sum().backward()
        together = engine.take()
        if labels is not None:
            labels.reseed(0)
            labels.targets = y
        F.cross_entropy(model(x), y, reduction="sum").backward()
        (whole,) = engine.take()
    assert [record.examples() for record in together] == [1, 3, 2]
    for layer in whole.layers.values():
        for seed, capture in enumerate(whole.captures(layer)):
            pieces = [list(record.captures(layer))[seed] for record in together]
            assert_equal(torch.cat([piece.a for piece in pieces]), capture.a, 1e-12)
            assert_equal(torch.cat([piece.g for piece in pieces]), capture.g, 1e-12)


def test_discard_may_keep_what_a_backward_may_still_reach() -> None:
    model, (x, y) = network(), data()
    with engine_on(model, None) as engine:
        F.cross_entropy(model(x), y).backward()
        waiting = F.cross_entropy(model(x), y)
        engine.discard(only_live=True)
        waiting.backward()
        assert len(engine.take()) == 1
        model(x)
        engine.discard()
        assert engine.everything() == []


def test_two_backwards_through_one_graph_add_up() -> None:
    model, (x, y) = network().eval(), data()
    with engine_on(model, None, only_training=False) as engine:
        loss = F.cross_entropy(model(x), y)
        loss.backward(retain_graph=True)
        (once,) = [captures(model, record) for record in engine.everything()]
        loss = F.cross_entropy(model(x), y)
        loss.backward(retain_graph=True)
        loss.backward()
        (twice,) = [captures(model, record) for record in engine.everything()]
    assert_equal(twice[-1], 2 * once[-1])
    assert torch.equal(twice[-2], once[-2])


def test_a_forward_that_raises_leaves_no_record_behind() -> None:
    class Failing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.fails = nn.Linear(2, 2), True

        def forward(self, x: Tensor) -> Tensor:
            y = self.layer(x)
            if self.fails:
                raise RuntimeError("broken")
            return y

    model = Failing()
    with engine_on(model, None) as engine:
        with pytest.raises(RuntimeError, match="broken"):
            model(torch.randn(3, 2))
        model.layer(torch.randn(7, 2))
        model.fails = False
        model(torch.randn(3, 2)).sum().backward()
        assert [record.examples() for record in engine.take()] == [3]


def test_a_layer_called_outside_of_the_model_is_not_recorded() -> None:
    model, (x, _) = network(), data()
    with engine_on(model, None) as engine:
        model[0](x).sum().backward()
        assert engine.everything() == []


def test_inputs_are_kept_only_on_demand() -> None:
    model, (x, _) = network(), data()
    with engine_on(model, None) as engine:
        model(x)
        engine.keep_inputs = True
        model(x)
        without, with_inputs = engine.everything()
    assert without.inputs is None
    assert with_inputs.inputs is not None and with_inputs.inputs[0][0] is x


# What it records.


@pytest.mark.parametrize(("estimator", "seeds"), [(None, 1), ("exact", 3), ("sampled", 2), ("empirical", 1)])
def test_one_capture_per_seed_and_the_count_of_terms(estimator: str | None, seeds: int) -> None:
    model, (x, y) = network(), data()
    with engine_on(model, labels_of(estimator, y)) as engine:
        F.cross_entropy(model(x), y).backward()
        (record,) = engine.take()
    for layer in record.layers.values():
        seen = list(record.captures(layer))
        assert len(seen) == seeds
        assert all(capture.count == 4 / seeds for capture in seen), "they pool to the terms there are"
        u = record.directional(layer, [p.detach() for p in layer.parameters])
        assert u is not None and u.shape == (seeds, 4)
        V = layer.pack([p.detach() for p in layer.parameters])
        for along, capture in zip(u, seen, strict=True):
            (DW,) = capture.weight_gradients()
            assert_equal(along, torch.einsum("noi,oi->n", DW, V))


def test_scale_multiplies_the_gradients_of_the_users_own_loss() -> None:
    """The mean over four examples: their un-averaged gradients are four times what the backward pass carries."""
    model, (x, y) = network().eval(), data()
    found = []
    for reduction, scale in (("sum", 1.0), ("mean", 4.0)):
        with engine_on(model, None, only_training=False) as engine:
            F.cross_entropy(model(x), y, reduction=reduction).backward()
            (record,) = engine.take()
        record.scale = scale
        layer = record.layers["4"]
        (capture,) = record.captures(layer)
        directional = record.directional(layer, [p.detach() for p in layer.parameters])
        assert directional is not None
        found.append((capture.g, directional))
    assert_equal(found[1][0], found[0][0])
    assert_equal(found[1][1], found[0][1])


def test_half_precision_models_are_captured_in_single_precision() -> None:
    model = nn.Sequential(nn.Linear(4, 3)).bfloat16()
    with engine_on(model, labels_of("sampled")) as engine:
        model(torch.randn(5, 4, dtype=torch.bfloat16)).float().sum().backward()
        (record,) = engine.take()
    assert {tensor.dtype for tensor in captures(model, record)} == {torch.float32}


def test_autocast_captures_single_precision_too() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3)).float()
    x, y = torch.randn(6, 4, dtype=torch.float32), torch.randint(3, (6,))
    with engine_on(model, labels_of("sampled")) as engine:
        with torch.autocast("cpu", torch.bfloat16):
            output = model(x)
        F.cross_entropy(output.float(), y).backward()
        (record,) = engine.take()
    assert {tensor.dtype for tensor in captures(model, record)} == {torch.float32}


class Returning(nn.Module):
    def __init__(self, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.layer, self.wrap = nn.Linear(4, 3), wrap

    def forward(self, *, x: Tensor) -> Any:
        return self.wrap(self.layer(x))


@pytest.mark.parametrize(
    ("pointer", "wrap"),
    [
        (0, lambda y: (y, None)),
        ("logits", lambda y: {"logits": y, "loss": y.sum()}),
        (lambda out: out[1][0], lambda y: [0, [y]]),
    ],
    ids=["tuple", "dict", "function"],
)
def test_outputs_inside_a_structure_and_keyword_inputs(pointer: Any, wrap: Callable[[Tensor], Any]) -> None:
    model = Returning(wrap)
    with engine_on(model, Labels(Categorical(output=pointer))) as engine:
        model(x=torch.randn(5, 4))
        assert engine.everything()[0].examples() == 5
    with (
        engine_on(model, Labels(Categorical(output="nowhere"))),
        pytest.raises(ValueError, match="no output at 'nowhere'"),
    ):
        model(x=torch.randn(5, 4))


def test_checkpointed_layers_give_the_gradients_of_ordinary_ones() -> None:
    """Recomputation in the backward pass must not be counted as further calls."""
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            h: Tensor = checkpoint(lambda x: torch.tanh(self[0](x)), x, use_reentrant=False)
            y: Tensor = self[1](h)
            return y

    torch.manual_seed(0)
    model = Checkpointed(nn.Linear(4, 5), nn.Linear(5, 3))
    plain = nn.Sequential(model[0], nn.Tanh(), model[1])
    x, y = torch.randn(6, 4, requires_grad=True), torch.randint(3, (6,))
    for estimator in ("exact", "empirical", None):
        found = []
        for network_ in (model, plain):
            with engine_on(network_, labels_of(estimator, y)) as engine:
                F.cross_entropy(network_(x), y).backward()
                (record,) = engine.take()
            found.append(captures(network_, record))
        assert len(found[0]) == len(found[1])
        for one, other in zip(*found, strict=True):
            assert_equal(one, other)
