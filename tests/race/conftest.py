from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from natgrad.race import networks
from natgrad.race.data import Dataset
from natgrad.race.tasks import TASKS, Task, categorical


def blobs(folder: Path | None) -> Dataset:
    """Four noisy clusters in eight dimensions: 96 points to train on, 32 to test."""
    generator = torch.Generator().manual_seed(0)
    centres = 3 * torch.randn(4, 8, generator=generator)
    y = torch.arange(128) % 4
    x = centres[y] + torch.randn(128, 8, generator=generator)
    return Dataset("blobs", (x[:96], y[:96]), (x[96:], y[96:]))


TINY = Task(
    name="tiny",
    data=blobs,
    model=lambda _: networks.perceptron(8, 6, 4),
    loss=F.cross_entropy,
    likelihood=categorical,
    batch=16,
    epochs=2,
)


@pytest.fixture(autouse=True)
def single_precision() -> Iterator[None]:
    """Races run in float32, whatever the other tests compute in."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    yield
    torch.set_default_dtype(before)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Task:
    """The tiny task, known to the command line under its name."""
    monkeypatch.setitem(TASKS, TINY.name, TINY)
    return TINY
