import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from natgrad.layers import expected
from natgrad.look import look
from natgrad.race import language
from natgrad.race.entries import ENTRIES
from natgrad.race.run import Rules, run
from natgrad.race.tasks import TASKS
from natgrad.race.transformer import CausalTransformer

NAMES = ("lstm-lm", "transformer-lm")


def small(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "lstm-lm":
        return language.LSTM(words=11, width=4, hidden=6)
    return CausalTransformer(words=11, width=8, heads=2, layers=1, hidden=12)


def test_windows_are_the_text_and_the_byte_after_each() -> None:
    text = bytes(range(200))
    x, y = language.windows(text)
    assert x.shape == y.shape == (3, 64)
    assert x.flatten().tolist() == list(text[:192]) and torch.equal(y, x + 1)


def test_the_text_is_english_and_its_end_is_for_test() -> None:
    found = language.manual(None)
    assert found.test is not None and found.name.startswith("help topics of Python 3.")
    text = bytes(found.train[0].flatten().tolist()).decode(errors="replace")
    assert len(text) > 300_000 and text.count(" the ") > 2000
    assert 0.09 < found.test[0].numel() / (found.test[0].numel() + found.train[0].numel()) < 0.11


@pytest.mark.parametrize("name", NAMES)
def test_a_model_sees_the_past_alone(name: str) -> None:
    model = small(name)
    x = torch.randint(11, (2, 9))
    y = x.clone()
    y[:, 5:] = (y[:, 5:] + 1) % 11
    before, after = model(x), model(y)
    assert before.shape == (2, 9, 11)
    torch.testing.assert_close(after[:, :5], before[:, :5])
    assert ((after - before)[:, 5:].abs().amax((1, 2)) > 1e-4).all()


def test_the_lstm_is_the_one_of_torch() -> None:
    model, other = language.LSTM(words=11, width=4, hidden=6), nn.LSTM(4, 6, batch_first=True)
    weights = {"weight_ih_l0": model.input.weight, "weight_hh_l0": model.state.weight, "bias_ih_l0": model.input.bias}
    other.load_state_dict({**weights, "bias_hh_l0": torch.zeros(24)})
    x = torch.randint(11, (2, 9))
    torch.testing.assert_close(model(x), model.head(other(model.embedding(x))[0]))


@pytest.mark.parametrize("name", NAMES)
def test_every_weight_matrix_is_covered(name: str) -> None:
    model = small(name)
    for found in (look(model, (torch.randint(11, (2, 9)),)).coverage(), expected(model)):
        covered = {id(p) for layer in found.layers.values() for p in layer.parameters}
        assert all(id(p) in covered for p in model.parameters() if p.ndim == 2)


def test_bits_per_byte_of_a_model_that_knows_nothing_are_eight() -> None:
    class Uniform(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.zeros(*x.shape, 256)

    found = language.manual(None)
    assert math.isclose(language.bits_per_byte(Uniform(), found), 8, rel_tol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_natural_gradient_learns_more_than_the_frequencies_of_bytes(name: str) -> None:
    """15 steps on 16 short sequences: the loss is below the entropy of the single bytes."""
    task, found = replace(TASKS[name], batch=16), language.manual(None)
    x, y = (part[:16, :24] for part in found.train)
    frequency = y.flatten().bincount(minlength=256) / y.numel()
    entropy = -(frequency * frequency.clamp(min=1e-12).log()).sum()
    entry = ENTRIES["kfac"]
    short = type(found)(found.name, (x, y))
    done = run(task, short, entry, settings={"step_size": "quadratic", "overhead": None}, seed=0, rules=Rules(15))
    assert done.stopped == "" and done.curve[-1].loss < entropy
