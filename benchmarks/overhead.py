"""CPU seconds of training steps under a budget for curvature, beside AdamW's and those of the bare cadence.

`python benchmarks/overhead.py [--steps 60] [--models "unet,wide unet"]`: every optimizer trains a copy of
its own, step by step in turn, in one process on one thread; the unit is AdamW's median step. `mean after` is over the
steps after the tenth; `plain` is the median of those that neither observe nor refresh, which no budget changes;
`curvature` is what the others cost on average beyond it, and `planned` what the counted flops say.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from natgrad import EKFAC, KFAC, Categorical, KLLimit, NaturalGradient


def block(n_in: int, n_out: int) -> nn.Module:
    """A convolution with its norm."""
    return nn.Sequential(nn.Conv2d(n_in, n_out, 3, padding=1), nn.GroupNorm(8, n_out), nn.ReLU())


class UNet(nn.Module):
    """Three levels of widths w to 8 w; classes of pixels."""

    def __init__(self, w: int) -> None:
        super().__init__()
        self.down = nn.ModuleList([block(3, w), block(w, 2 * w), block(2 * w, 4 * w)])
        self.middle = block(4 * w, 8 * w)
        self.up = nn.ModuleList([block(12 * w, 4 * w), block(6 * w, 2 * w), block(3 * w, w)])
        self.head = nn.Conv2d(w, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Images (n, 3, h, w)."""
        kept = []
        for down in self.down:
            x = down(x)
            kept.append(x)
            x = F.max_pool2d(x, 2)
        x = self.middle(x)
        for up, skip in zip(self.up, reversed(kept), strict=True):
            x = up(torch.cat([F.interpolate(x, scale_factor=2.0), skip], 1))
        return self.head(x).flatten(2).mT


class Transformer(nn.Module):
    """Two layers of width 128 on 64 tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(128, 128)
        layer = nn.TransformerEncoderLayer(128, 4, 512, dropout=0.0, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(128, 128)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (n, t)."""
        return self.head(self.encoder(self.embedding(x)))


def perceptron() -> nn.Module:
    """Three layers."""
    return nn.Sequential(nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 10))


def classes(size: tuple[int, ...], count: int) -> Callable[[], Tensor]:
    """Labels drawn at random."""
    return lambda: torch.randint(count, size)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], Callable[[], Tensor]]] = {
    "unet": (lambda: UNet(8), lambda: torch.randn(8, 3, 32, 32), classes((8, 32, 32), 4)),
    "wide unet": (lambda: UNet(16), lambda: torch.randn(8, 3, 32, 32), classes((8, 32, 32), 4)),
    "transformer": (Transformer, lambda: torch.randint(128, (16, 64)), classes((16, 64), 128)),
    "perceptron": (perceptron, lambda: torch.randn(128, 256), classes((128,), 10)),
}


def optimizers(models: list[nn.Module]) -> dict[str, torch.optim.Optimizer]:
    """One for every model, by name."""
    settings: dict[str, dict[str, Any]] = {
        "KFAC, bare cadence": {"overhead": None},
        "KFAC, overhead .2": {},
        "KFAC, overhead .05": {"overhead": 0.05},
        "EKFAC, overhead .2": {"approximation": EKFAC()},
    }
    made: dict[str, torch.optim.Optimizer] = {"AdamW": torch.optim.AdamW(models[0].parameters())}
    for model, (name, own) in zip(models[1:], settings.items(), strict=True):
        chosen = {"approximation": KFAC(), "likelihood": Categorical(), "step_size": KLLimit(), **own}
        made[name] = NaturalGradient(model, **chosen)
    return made


def kind(optimizer: torch.optim.Optimizer, before: dict[str, tuple[int, int]]) -> bool:
    """Whether the step that was just done neither observed nor refreshed."""
    if not isinstance(optimizer, NaturalGradient):
        return True
    after = {name: (c.observations, c.refreshes) for name, c in optimizer._now.items()}
    plain = after == before
    before.clear()
    before.update(after)
    return plain


def main() -> None:
    """Print a table for every model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--models", default=",".join(MODELS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in options.models.split(","):
        make, draw, label = MODELS[name]
        torch.manual_seed(0)
        models = []
        for _ in range(5):
            torch.manual_seed(0)
            models.append(make())
        entries = optimizers(models)
        seconds: dict[str, list[float]] = {entry: [] for entry in entries}
        plain: dict[str, list[bool]] = {entry: [] for entry in entries}
        known: dict[str, dict[str, tuple[int, int]]] = {entry: {} for entry in entries}
        for _ in range(options.steps):
            x, y = draw(), label()
            for model, (entry, optimizer) in zip(models, entries.items(), strict=True):
                start = time.process_time()
                optimizer.zero_grad()
                F.cross_entropy(model(x).flatten(0, -2), y.flatten()).backward()
                optimizer.step()
                seconds[entry].append(time.process_time() - start)
                plain[entry].append(kind(optimizer, known[entry]))
        unit = statistics.median(seconds["AdamW"])
        print(f"\n{name}: AdamW {1000 * unit:.1f} ms a step; {options.steps} steps\n")
        print("| | first step | largest of ten | mean of ten | mean after | plain | curvature | planned |")
        print("|---|---|---|---|---|---|---|---|")
        for entry, times in seconds.items():
            ten, after = [t / unit for t in times[:10]], [t / unit for t in times[10:]]
            still = [t for t, quiet in zip(after, plain[entry][10:], strict=True) if quiet]
            usual = statistics.median(still or after)
            optimizer = entries[entry]
            plan = optimizer._plan if isinstance(optimizer, NaturalGradient) else None
            numbers = ten[0], max(ten), statistics.mean(ten), statistics.mean(after), usual
            words = [f"{number:.2f}" for number in (*numbers, statistics.mean(after) - usual)]
            print("| " + " | ".join([entry, *words, f"{plan.rate():.2f}" if plan else ""]) + " |")
            if plan:
                periods = [(turn.observe_every, turn.refresh_every) for turn in plan.turns.values()]
                ranges = [f"{min(p)} to {max(p)}" for p in zip(*periods, strict=True)]
                shares = [turn.share.fraction / turn.share.stride for turn in plan.turns.values()]
                print(f"<!-- observed every {ranges[0]}, renewed every {ranges[1]}, shares from {min(shares):.3g} -->")


if __name__ == "__main__":
    main()
