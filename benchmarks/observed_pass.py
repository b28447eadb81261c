"""Seconds of a forward pass that is observed, and of one that is not: medians of CPU time, on one thread.

`python benchmarks/observed_pass.py [--passes 75]`, under a minute. For another state of the library, put its `src`
first in `PYTHONPATH`. Models: an auto-encoder of eight layers, a residual network, a transformer, a perceptron.
"""

from __future__ import annotations

import argparse
import statistics
import time
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from natgrad import KFAC, Bernoulli, Categorical, KLLimit, NaturalGradient

WIDTHS = (784, 1000, 500, 250, 30, 250, 500, 1000, 784)


class Block(nn.Module):
    """A residual block."""

    def __init__(self, n_in: int, n_out: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False)
        self.norm, self.norm2 = nn.BatchNorm2d(n_out), nn.BatchNorm2d(n_out)
        self.second = nn.Conv2d(n_out, n_out, 3, 1, 1, bias=False)
        self.short = nn.Identity() if n_in == n_out and stride == 1 else nn.Conv2d(n_in, n_out, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Images (n, c, h, w)."""
        return F.relu(self.norm2(self.second(F.relu(self.norm(self.first(x))))) + self.short(x))


def autoencoder() -> nn.Module:
    """Of the sizes of the MNIST one."""
    pairs = pairwise(WIDTHS)
    return nn.Sequential(*[m for n_in, n_out in pairs for m in (nn.Linear(n_in, n_out), nn.Tanh())][:-1])


def resnet() -> nn.Module:
    """Three blocks."""
    blocks = Block(16, 16, 1), Block(16, 32, 2), Block(32, 64, 2)
    return nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def transformer() -> nn.Module:
    """Four layers of width 64."""
    layer = nn.TransformerEncoderLayer(64, 4, 256, dropout=0.0, batch_first=True)
    return nn.Sequential(nn.Embedding(64, 64), nn.TransformerEncoder(layer, 4), nn.Linear(64, 64))


def perceptron() -> nn.Module:
    """Two layers."""
    return nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))


def main() -> None:
    """Print a row for every model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--passes", type=int, default=75)
    passes = parser.parse_args().passes
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tasks = {
        "auto-encoder": (autoencoder, torch.rand(250, 784), Bernoulli()),
        "residual network": (resnet, torch.randn(32, 3, 32, 32), Categorical()),
        "transformer": (transformer, torch.randint(64, (16, 32)), Categorical()),
        "perceptron": (perceptron, torch.randn(128, 64), Categorical()),
    }
    print(f"{'model':18}{'observed (ms)':>15}{'plain (ms)':>12}")
    for name, (make, x, likelihood) in tasks.items():
        model = make()
        optimizer = NaturalGradient(model, KFAC(), likelihood=likelihood, step_size=KLLimit())
        seconds: dict[bool, list[float]] = {True: [], False: []}
        for k in range(6 + 2 * passes):
            optimizer._engine.armed = armed = k % 2 == 0
            start = time.process_time()
            y = model(x)
            if k >= 6:  # the first ones find out what the layers are
                seconds[armed].append(time.process_time() - start)
            y.sum().backward()
            optimizer._engine.discard()
            model.zero_grad()
        observed, plain = (1e3 * statistics.median(seconds[armed]) for armed in (True, False))
        print(f"{name:18}{observed:15.3f}{plain:12.3f}")


if __name__ == "__main__":
    main()
