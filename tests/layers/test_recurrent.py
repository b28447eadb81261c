"""nn.RNN, nn.LSTM, nn.GRU and their cells: fused kernels, unrolled while an engine records."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from functional import EVERYTHING, Slices, assert_captured, assert_exact_fisher, blocks_by_hand, by_a_loop, record_of
from test_capture import armed
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

from natgrad import Categorical, Gaussian, NaturalGradient
from natgrad.labels import Labels
from oracles import assert_equal

IN, H, N, T = 3, 4, 4, 5


class Read(nn.Module):
    """x (n, T, IN) through a recurrence that starts from a state of the input's own: outputs and last states."""

    def __init__(self, rnn: nn.RNNBase, start: bool = False) -> None:
        super().__init__()
        self.rnn, self.start = rnn, start

    def forward(self, x: Tensor) -> Tensor:
        z = x if self.rnn.batch_first else x.transpose(0, 1)
        output, last = self.rnn(z, self.states(x)) if self.start else self.rnn(z)
        output = output if self.rnn.batch_first else output.transpose(0, 1)
        states = last if isinstance(last, tuple) else (last,)
        return torch.cat([output.flatten(1), *(state.transpose(0, 1).flatten(1) for state in states)], 1)

    def states(self, x: Tensor) -> Any:
        scans = self.rnn.num_layers * (1 + self.rnn.bidirectional)
        sizes = [self.rnn.proj_size or H, H] if isinstance(self.rnn, nn.LSTM) else [H]
        states = [x[:, 0, 0].sin().view(1, -1, 1).expand(scans, -1, size).contiguous() for size in sizes]
        return tuple(states) if len(states) == 2 else states[0]


def kind(make: Any, start: bool = False, **settings: Any) -> Callable[[], Read]:
    return lambda: Read(make(IN, H, **{"batch_first": True, **settings}), start)


CASES: dict[str, Callable[[], Read]] = {
    "rnn": kind(nn.RNN),
    "rnn with relu": kind(nn.RNN, nonlinearity="relu", num_layers=2),
    "lstm": kind(nn.LSTM),
    "lstm from a state": kind(nn.LSTM, True, num_layers=2, bidirectional=True),
    "lstm without bias": kind(nn.LSTM, bias=False, num_layers=2),
    "lstm, time first": kind(nn.LSTM, True, batch_first=False, num_layers=2),
    "lstm with projection": kind(nn.LSTM, True, proj_size=2, num_layers=2, bidirectional=True),
    "lstm with projection without bias": kind(nn.LSTM, proj_size=2, bias=False),
    "gru": kind(nn.GRU),
    "gru from a state": kind(nn.GRU, True, num_layers=2, bidirectional=True, batch_first=False),
    "gru without bias": kind(nn.GRU, bias=False, bidirectional=True),
}
every_case = pytest.mark.parametrize("make", CASES.values(), ids=CASES.keys())


def slices_of(rnn: nn.Module, prefix: str = "rnn.") -> Slices:
    names = [name.removeprefix("weight_") for name, _ in rnn.named_parameters() if name.startswith("weight")]
    return {
        f"{prefix}{name}": (f"{prefix}weight_{name}", EVERYTHING, f"{prefix}bias_{name}", EVERYTHING) for name in names
    }


@every_case
def test_captured_gradients_are_those_of_every_example_and_the_output_is_the_same(make: Callable[[], Read]) -> None:
    model = make()
    assert_captured(model, torch.randn(N, T, IN), slices_of(model.rnn), rounding=1e-14)


@every_case
def test_the_exact_fisher_is_the_dense_ggn(make: Callable[[], Read]) -> None:
    model = make()
    assert_exact_fisher(model, torch.randn(N, 3, IN), slices_of(model.rnn))


def test_positions_are_the_times_in_their_order() -> None:
    model, x = CASES["lstm from a state"](), torch.randn(N, T, IN)
    record, _, layers = record_of(model, x)
    for name in ("rnn.ih_l0", "rnn.ih_l0_reverse"):
        (capture,) = record.captures(layers[name])
        assert torch.equal(capture.a[..., :-1], x)
    (forwards,), (backwards,) = (record.captures(layers[f"rnn.hh_l0{end}"]) for end in ("", "_reverse"))
    start = x[:, 0, :1].sin().expand(N, H)
    assert torch.equal(forwards.a[:, 0, :-1], start)
    assert torch.equal(backwards.a[:, -1, :-1], start)


def outcome(model: nn.Module, x: Tensor) -> list[Tensor]:
    """The output, all gradients and the state of the random numbers, from one seed."""
    torch.manual_seed(1)
    z = x.clone().requires_grad_()
    output = model(z)
    model.zero_grad()
    output.square().sum().backward()
    gradients = [p.grad.clone() for p in (*model.parameters(), z) if p.grad is not None]
    return [output.detach(), *gradients, torch.get_rng_state().double()]


@pytest.mark.parametrize("make", [nn.RNN, nn.LSTM, nn.GRU])
def test_gradients_and_dropout_are_those_without_an_engine(make: Any) -> None:
    model, x = kind(make, num_layers=3, dropout=0.4, bidirectional=True)(), torch.randn(N, T, IN)

    alone = outcome(model, x)
    with armed(model, None) as engine:
        watched = outcome(model, x)
        assert len(engine.everything()) == 1
    assert len(alone) == len(watched) == 1 + 3 * 2 * 4 + 1 + 1
    for one, other in zip(alone, watched, strict=True):
        assert_equal(other, one, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_output_keeps_its_type(dtype: torch.dtype) -> None:
    model, x = kind(nn.LSTM, num_layers=2)().to(dtype), torch.randn(N, T, IN, dtype=dtype)
    plain = model(x)
    with armed(model, None):
        watched = model(x)
        assert watched.dtype == dtype
    assert_equal(watched.detach(), plain.detach(), 1e-6 if dtype == torch.float32 else 1e-2)


def test_a_fused_kernel_runs_unless_armed() -> None:
    model, x = kind(nn.LSTM)(), torch.randn(N, T, IN)
    with armed(model, None) as engine:
        names = []
        for engine.armed in (True, False):
            with torch.profiler.profile() as profile:
                model(x)
            names.append({event.key for event in profile.key_averages()})
    assert "aten::lstm" not in names[0]
    assert "aten::lstm" in names[1]


class Packed(nn.Module):
    """x (n, T, IN) packed by lengths that x itself tells, in any order: outputs, padded with zeros, and last states."""

    def __init__(self, rnn: nn.RNNBase, sort: bool = False) -> None:
        super().__init__()
        self.rnn, self.sort = rnn, sort

    def forward(self, x: Tensor) -> Tensor:
        lengths = 1 + (x[:, 0, 0].abs() * 100).long() % T
        if self.sort:
            lengths, order = lengths.sort(descending=True)
            x = x[order]
        z = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=self.sort)
        output, last = self.rnn(z)
        padded, _ = pad_packed_sequence(output, batch_first=True, total_length=T)
        states = last if isinstance(last, tuple) else (last,)
        y = torch.cat([padded.flatten(1), *(state.transpose(0, 1).flatten(1) for state in states)], 1)
        return y[order.argsort()] if self.sort else y


PACKED: dict[str, Callable[[], nn.RNNBase]] = {
    "rnn": lambda: nn.RNN(IN, H),
    "lstm": lambda: nn.LSTM(IN, H),
    "lstm of two directions and layers": lambda: nn.LSTM(IN, H, 2, bidirectional=True),
    "lstm with projection": lambda: nn.LSTM(IN, H, 2, bidirectional=True, proj_size=2),
    "gru": lambda: nn.GRU(IN, H),
    "gru of two directions and layers": lambda: nn.GRU(IN, H, 2, bidirectional=True),
    "gru without bias": lambda: nn.GRU(IN, H, bias=False),
}


@pytest.mark.parametrize("sort", [False, True])
@pytest.mark.parametrize("make", PACKED.values(), ids=PACKED.keys())
def test_packed_sequences_capture_every_example_at_the_steps_that_it_has(
    make: Callable[[], nn.RNNBase], sort: bool
) -> None:
    """The examples of the layers are in their own order, also where torch sorts them by length."""
    model, x = Packed(make(), sort), torch.randn(N, T, IN)
    lengths = 1 + (x[:, 0, 0].abs() * 100).long() % T
    order = lengths.sort(descending=True).indices
    assert len(set(lengths.tolist())) > 1 and order.tolist() != list(range(N))
    y = torch.randn_like(model(x))
    for target in (y, None):
        model.zero_grad()
        record, output, layers = record_of(model, x, target)
        assert_equal(output, model(x).detach(), 1e-14)
        expected = blocks_by_hand(
            by_a_loop(model, x, torch.zeros_like(y) if target is None else y), slices_of(model.rnn)
        )
        assert sorted(layers) == sorted(expected)
        for name, layer in layers.items():
            (capture,) = record.captures(layer)
            assert float(capture.rows) == float(lengths.sum())
            (DW,) = capture.weight_gradients()
            assert_equal(DW, expected[name][order] if sort else expected[name])
    assert_exact_fisher(model, x, slices_of(model.rnn))


@pytest.mark.parametrize("make", [nn.RNN, nn.LSTM, nn.GRU])
def test_gradients_and_dropout_of_packed_sequences_are_those_without_an_engine(make: Any) -> None:
    model, x = Packed(make(IN, H, 3, dropout=0.4, bidirectional=True)), torch.randn(N, T, IN)

    alone = outcome(model, x)
    with armed(model, None) as engine:
        watched = outcome(model, x)
        assert len(engine.everything()) == 1
    for one, other in zip(alone, watched, strict=True):
        assert_equal(other, one, 1e-12)


def test_a_model_of_packed_sequences_is_trained_whole() -> None:
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = nn.GRU(IN, H, batch_first=True), nn.Linear(H, 2)

        def forward(self, x: Tensor) -> Tensor:
            lengths = torch.arange(len(x), 0, -1).clamp(max=T)
            return self.head(self.rnn(pack_padded_sequence(x, lengths, batch_first=True))[1][0])

    model, x = Tagger(), torch.randn(N, T, IN)
    optimizer = NaturalGradient(model, likelihood=Gaussian())
    for _ in range(2):
        optimizer.zero_grad()
        (0.5 * model(x).square().sum() / N).backward()
        optimizer.step()
    assert list(optimizer.layers) == ["rnn.ih_l0", "rnn.hh_l0", "head"] and not optimizer.uncovered
    assert "100.0 %" in repr(optimizer)


def test_a_checkpointed_recurrence_repeats_what_was_recorded() -> None:
    class Saved(Read):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(super().forward, x, use_reentrant=False)

    model, x = kind(nn.LSTM)(), torch.randn(N, T, IN)
    saved = Saved(copy.deepcopy(model.rnn))
    for y in (torch.randn_like(model(x)), None):
        (one, first, layers), (other, second, others) = record_of(model, x, y), record_of(saved, x, y)
        assert torch.equal(first, second) and list(layers) == list(others)
        for name, layer in layers.items():
            (mine,), (theirs,) = one.captures(layer), other.captures(others[name])
            assert torch.equal(mine.a, theirs.a)
            assert_equal(theirs.g, mine.g)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("likelihood", [False, True])
def test_the_users_gradients_through_a_checkpointed_recurrence_are_those_without_an_engine(
    likelihood: bool, use_reentrant: bool
) -> None:
    """What is computed again in the backward pass is what was computed before: checkpoints match tensors by order."""

    class Saved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = (Read(nn.LSTM(IN, IN, batch_first=True)) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.both, x.clone().requires_grad_(), use_reentrant=use_reentrant)

        def both(self, x: Tensor) -> Tensor:
            inner = checkpoint(self.first, x, use_reentrant=use_reentrant)
            return torch.cat([self.second(inner[:, : T * IN].view(-1, T, IN)), inner], 1)

    model, x = Saved(), torch.randn(N, T, IN)
    gradients = []
    for watched in (False, True):
        model.zero_grad()
        labels = Labels(Gaussian(), "exact") if likelihood else None
        with armed(model, labels) as engine:
            engine.armed = watched
            model(x).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) == 8
    for found, expected in zip(*gradients, strict=True):
        assert_equal(found, expected, 1e-12)


# Cells, which are called at every step.


class Steps(nn.Module):
    """A cell from step to step; the last state."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for z in x.unbind(1):
            state = self.cell(z, state)
        return torch.cat(state, -1) if isinstance(state, tuple) else state  # type: ignore[return-value]


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.RNNCell(IN, H),
        lambda: nn.RNNCell(IN, H, nonlinearity="relu"),
        lambda: nn.LSTMCell(IN, H),
        lambda: nn.GRUCell(IN, H),
        lambda: nn.GRUCell(IN, H, bias=False),
    ],
    ids=["rnn", "rnn with relu", "lstm", "gru", "gru without bias"],
)
def test_cells_capture_every_example_and_all_their_calls(make: Callable[[], nn.Module]) -> None:
    model, x = Steps(make()), torch.randn(N, T, IN)
    slices = slices_of(model.cell, "cell.")
    assert list(slices) == ["cell.ih", "cell.hh"]
    assert_captured(model, x, slices, rounding=1e-14)
    record, _, layers = record_of(model, x)
    (capture,) = record.captures(layers["cell.ih"])
    assert torch.equal(capture.a[..., :IN], x)
    assert_exact_fisher(model, x, slices)


# Training.


def test_a_frozen_recurrent_weight_is_left_out() -> None:
    model = kind(nn.LSTM)()
    model.rnn.weight_hh_l0.requires_grad_(False)
    slices = slices_of(model.rnn)
    slices = {"rnn.ih_l0": slices["rnn.ih_l0"], "rnn.bias_hh_l0": ("rnn.bias_hh_l0", EVERYTHING, None, EVERYTHING)}
    assert_captured(model, torch.randn(N, T, IN), slices, rounding=1e-14)
    model = kind(nn.LSTM)()
    model.rnn.bias_hh_l0.requires_grad_(False)
    assert_captured(model, torch.randn(N, T, IN), slices_of(model.rnn))


def test_an_lstm_language_model_trains_with_the_defaults_and_is_covered() -> None:
    """The task is to say the letter before the last one again."""
    torch.manual_seed(0)
    words = 6

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = nn.LSTM(words, 24, 2, batch_first=True, dropout=0.1), nn.Linear(24, words)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.rnn(x)[0])

    model = Model()
    optimizer = NaturalGradient(model, likelihood=Categorical())
    losses = []
    for _ in range(80):
        tokens = torch.randint(words, (32, 12))
        y = torch.cat([tokens[:, :1], tokens[:, :-1]], 1)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(F.one_hot(tokens, words).double()).flatten(0, 1), y.flatten())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 1.7 and sum(losses[-5:]) / 5 < 0.5
    assert repr(optimizer).splitlines()[-1].startswith("100.0 %")


@pytest.mark.parametrize("make", [nn.RNN, nn.LSTM, nn.GRU])
def test_autocast_gives_the_type_that_the_fused_kernel_gives(make: Any) -> None:
    model, x = kind(make, True, num_layers=2)().float(), torch.randn(N, T, IN).float()
    with torch.autocast("cpu", torch.bfloat16):
        plain = _fused(model, x)
        with armed(model, None) as engine:
            watched = model(x)
            watched.float().square().sum().backward()
            (record,) = engine.everything()
    assert watched.dtype == plain.dtype
    assert_equal(watched.detach().float(), plain.detach().float(), 2e-2)
    assert len(engine.layers) == 4 and all(list(record.captures(layer)) for layer in engine.layers.values())


def _fused(model: nn.Module, x: Tensor) -> Tensor:
    """What torch gives on its own: for an LSTM in bfloat16 an error, on processors without AVX-512."""
    try:
        return model(x)
    except RuntimeError as refusal:
        if "could not create a primitive" not in str(refusal):
            raise
        pytest.skip("torch has no fused kernel for this on this processor")
