"""nn.RNN, nn.LSTM, nn.GRU and their cells: fused kernels, unrolled while an engine records."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from functional import EVERYTHING, Slices, assert_captured, assert_exact_fisher, record_of
from test_capture import armed
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.checkpoint import checkpoint

from natgrad import Categorical, Gaussian, NaturalGradient
from natgrad.layers import cover
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
    record, _ = record_of(model, x, None)
    layers = cover(model).layers
    for name in ("rnn.ih_l0", "rnn.ih_l0_reverse"):
        (capture,) = record.captures(layers[name])
        assert torch.equal(capture.a[..., :-1], x)
    (forwards,), (backwards,) = (record.captures(layers[f"rnn.hh_l0{end}"]) for end in ("", "_reverse"))
    start = x[:, 0, :1].sin().expand(N, H)
    assert torch.equal(forwards.a[:, 0, :-1], start)
    assert torch.equal(backwards.a[:, -1, :-1], start)


@pytest.mark.parametrize("make", [nn.RNN, nn.LSTM, nn.GRU])
def test_gradients_and_dropout_are_those_without_an_engine(make: Any) -> None:
    model, x = kind(make, num_layers=3, dropout=0.4, bidirectional=True)(), torch.randn(N, T, IN)

    def seen() -> list[Tensor]:
        torch.manual_seed(1)
        z = x.clone().requires_grad_()
        output = model(z)
        model.zero_grad()
        output.square().sum().backward()
        gradients = [p.grad.clone() for p in (*model.parameters(), z) if p.grad is not None]
        return [output.detach(), *gradients, torch.get_rng_state().double()]

    alone = seen()
    with armed(model, None) as engine:
        watched = seen()
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


def test_a_packed_sequence_is_left_to_adamw_with_the_reason() -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = nn.GRU(IN, H, batch_first=True), nn.Linear(H, 2)

        def forward(self, x: Tensor) -> Tensor:
            lengths = torch.arange(len(x), 0, -1).clamp(max=T)
            return self.head(self.rnn(pack_padded_sequence(x, lengths, batch_first=True))[1][0])

    model, x = Packed(), torch.randn(N, T, IN)
    plain = model(x)
    optimizer = NaturalGradient(model, likelihood=Gaussian())
    before = [p.detach().clone() for p in model.rnn.parameters()]
    output = model(x)
    assert torch.equal(output, plain)
    (0.5 * output.square().sum() / N).backward()
    with pytest.warns(UserWarning, match=r"not observed: rnn.ih_l0 \(a PackedSequence has"):
        optimizer.step()
    rows = [line for line in repr(optimizer).splitlines() if line.startswith("rnn.")]
    assert len(rows) == 2 and all(row.endswith("a PackedSequence has no batch dimension: AdamW") for row in rows)
    share = 100 * (H + 1) * 2 / sum(p.numel() for p in model.parameters())
    assert repr(optimizer).splitlines()[-1].startswith(f"{share:.1f} %")
    assert not any(torch.equal(old, new) for old, new in zip(before, model.rnn.parameters(), strict=True))


def test_a_checkpointed_recurrence_repeats_what_was_recorded() -> None:
    class Saved(Read):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(super().forward, x, use_reentrant=False)

    model, x = kind(nn.LSTM)(), torch.randn(N, T, IN)
    saved = Saved(copy.deepcopy(model.rnn))
    for y in (torch.randn_like(model(x)), None):
        (one, first), (other, second) = record_of(model, x, y), record_of(saved, x, y)
        assert torch.equal(first, second)
        for name, layer in cover(model).layers.items():
            (mine,), (theirs,) = one.captures(layer), other.captures(cover(saved).layers[name])
            assert torch.equal(mine.a, theirs.a)
            assert_equal(theirs.g, mine.g)


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
    record, _ = record_of(model, x, None)
    (capture,) = record.captures(cover(model).layers["cell.ih"])
    assert torch.equal(capture.a[..., :IN], x)
    assert_exact_fisher(model, x, slices)


# Training.


def test_a_frozen_recurrent_weight_is_left_out() -> None:
    model = kind(nn.LSTM)()
    model.rnn.weight_hh_l0.requires_grad_(False)
    assert list(cover(model).layers) == ["rnn.ih_l0"]
    assert cover(model).uncovered == {"rnn.bias_hh_l0": "the layer's weight is frozen or not a plain parameter"}
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
    assert all(list(record.captures(layer)) for layer in cover(model).layers.values())


def _fused(model: nn.Module, x: Tensor) -> Tensor:
    """What torch gives on its own: for an LSTM in bfloat16 an error, on processors without AVX-512."""
    try:
        return model(x)
    except RuntimeError as refusal:
        if "could not create a primitive" not in str(refusal):
            raise
        pytest.skip("torch has no fused kernel for this on this processor")
