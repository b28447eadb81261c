"""Nothing but the model and the likelihood: what made the defaults explode or stand still, beside untuned AdamW."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_breast_cancer
from torch import Tensor, nn

from natgrad import Bernoulli, Categorical, Gaussian, NaturalGradient

LAST = 5  # measurements, whose mean is less by chance than the last one where a batch is a single example
Batch = tuple[Tensor, Tensor]
Batches = Callable[[int], Batch]


def perceptron(*widths: int, act: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    layers = [m for a, b in pairwise(widths) for m in (nn.Linear(a, b), act())]
    return nn.Sequential(*layers[:-1])


class Tied(nn.Module):
    """An embedding with torch's default N(0, 1) is the head as well: saturated, and wrong."""

    def __init__(self, words: int = 100, width: int = 24) -> None:
        super().__init__()
        self.embed, self.mix, self.norm = nn.Embedding(words, width), nn.Linear(width, width), nn.LayerNorm(width)
        self.head = nn.Linear(width, words, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        return self.head(self.norm(self.mix(h) + h)).transpose(1, 2)


def blobs(n: int = 1024, width: int = 20, classes: int = 5, scale: float = 1.0) -> Batch:
    """Overlapping classes."""
    g = torch.Generator().manual_seed(1)
    y = torch.randint(classes, (n,), generator=g)
    means = torch.randn(classes, width, generator=g)
    return scale * (means[y] + 1.5 * torch.randn(n, width, generator=g)), y


def raw() -> Batch:
    """A table as it is: features of scales from 1e-3 to 1e3."""
    x, y = load_breast_cancer(return_X_y=True)
    return torch.tensor(x), torch.tensor(y)


def times() -> Batch:
    """A Unix time and a feature of scale 1e6 beside those that matter."""
    x, _ = blobs(width=6)
    y = x[:, 2:3] + x[:, 3:4] ** 2
    x = torch.cat([1e6 * x[:, :1], 1.7e9 + 1e6 * x[:, 1:2], x[:, 2:]], 1)
    return x, y


def sentences() -> Batch:
    g = torch.Generator().manual_seed(0)
    x = torch.randint(100, (512, 9), generator=g)
    x[:, 1:] = (3 * x[:, :-1] + 1) % 100
    return x[:, :-1], x[:, 1:]


def pixels() -> Batch:
    g = torch.Generator().manual_seed(0)
    x = torch.sigmoid(2 * torch.randn(512, 4, generator=g) @ torch.randn(4, 36, generator=g))
    return x, x


def squares() -> Batch:
    x, _ = blobs(512, 10)
    return x, (x[:, :2] * x[:, 2:4] + x[:, 4:6].sin())


def dealt(data: Batch, size: int) -> Batches:
    x, y = data

    def batch(step: int) -> Batch:
        chosen = torch.randperm(len(x), generator=torch.Generator().manual_seed(step))[:size]
        return x[chosen], y[chosen]

    return batch


def with_tail(data: Batch, size: int, tail: int) -> Batches:
    """Two batches of one size and one of a few examples, as ``drop_last=False`` gives them."""
    x, y = data

    def batch(step: int) -> Batch:
        epoch, k = divmod(step, 3)
        deal = torch.randperm(2 * size + tail, generator=torch.Generator().manual_seed(epoch))
        chosen = deal[size * k : size * (k + 1)]
        return x[chosen], y[chosen]

    return batch


def half_square(y: Tensor, target: Tensor) -> Tensor:
    return 0.5 * (y - target).square().sum(1).mean()


def summed(y: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(y, target, reduction="sum")


def images(y: Tensor, target: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(y, target, reduction="sum")


CLASSIFIER: dict[str, Any] = {
    "model": lambda: perceptron(20, 48, 5),
    "likelihood": Categorical(),
    "loss": F.cross_entropy,
}
TABLE = {**CLASSIFIER, "model": lambda: perceptron(30, 48, 2), "data": raw}
CODER: dict[str, Any] = {"model": lambda: perceptron(36, 24, 6, 24, 36, act=nn.Tanh)}
ROWS: dict[str, dict[str, Any]] = {
    "saturated and wrong: raw features": {**TABLE, "size": 32},
    "saturated and wrong: raw features, full batch": {**TABLE, "size": 569},
    "saturated and wrong: a tied embedding": {
        "model": Tied, "likelihood": Categorical(class_dim=1), "loss": F.cross_entropy, "data": sentences, "size": 32,
    },
    "saturated and wrong: a tied embedding, full batch": {
        "model": Tied, "likelihood": Categorical(class_dim=1), "loss": F.cross_entropy, "data": sentences, "size": 512,
    },
    "one example a batch": {**CLASSIFIER, "data": blobs, "size": 1, "steps": 400, "seeds": 3},
    "a last batch of 1": {**CLASSIFIER, "data": blobs, "size": 256, "tail": 1},
    "a last batch of 5": {**CLASSIFIER, "data": blobs, "size": 256, "tail": 5},
    "a Unix time and a scale of 1e6": {
        "model": lambda: perceptron(6, 32, 1), "likelihood": Gaussian(), "loss": half_square, "data": times, "size": 64,
        "enough": 1e-3,  # of 5e14, on the way down: here either is ahead
    },
    "BCE mean under Bernoulli()": {
        **CODER, "likelihood": Bernoulli(), "loss": F.binary_cross_entropy_with_logits, "data": pixels, "size": 128,
    },
    "mse_loss under Gaussian()": {
        "model": lambda: perceptron(10, 32, 2), "likelihood": Gaussian(), "loss": F.mse_loss, "data": squares,
        "size": 64,
    },
    "a sum over the batch": {**CLASSIFIER, "loss": summed, "data": blobs, "size": 64},
    "large numbers without a likelihood": {**CODER, "likelihood": None, "loss": images, "data": pixels, "size": 128},
}  # fmt: skip


def trained(row: dict[str, Any], optimizer_of: Callable[[nn.Module], Any]) -> list[float]:
    """The loss on all data, before and after every ten steps; the mean over some seeds where one step is chance."""
    curves = [of_seed(row, optimizer_of, seed) for seed in range(row.get("seeds", 1))]
    return [sum(losses) / len(losses) for losses in zip(*curves, strict=True)]


def of_seed(row: dict[str, Any], optimizer_of: Callable[[nn.Module], Any], seed: int) -> list[float]:
    torch.manual_seed(seed)
    x, y = (t.float() if t.is_floating_point() else t for t in row["data"]())
    model = row["model"]().float()
    deal = with_tail((x, y), row["size"], row["tail"]) if "tail" in row else dealt((x, y), row["size"])
    optimizer, losses = optimizer_of(model), []
    for step in range(row.get("steps", 150)):
        if step % 10 == 0:
            losses.append(row["loss"](model(x), y).item())
        inputs, targets = deal(step)
        optimizer.zero_grad()
        row["loss"](model(inputs), targets).backward()
        optimizer.step()
    return [*losses, row["loss"](model(x), y).item()]


@pytest.mark.parametrize("name", ROWS)
def test_the_defaults_never_explode_and_end_no_worse_than_untuned_adamw(name: str) -> None:
    row = ROWS[name]
    losses = trained(row, lambda model: NaturalGradient(model, likelihood=row["likelihood"]))
    adamw = trained(row, lambda model: torch.optim.AdamW(model.parameters()))
    assert all(math.isfinite(loss) for loss in losses) and max(losses) < 3 * losses[0]
    last = LAST if "seeds" in row else 1
    ours, theirs = (sum(curve[-last:]) / last for curve in (losses, adamw))
    assert losses[-1] < losses[0]
    assert ours <= max(theirs, row.get("enough", 0.0) * losses[0])
