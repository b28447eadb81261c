"""What the hooks of an optimizer cost on a forward pass that nothing is recorded of.

`python benchmarks/hooks.py`, a minute on one core. A hook costs the same whatever the batch is, so that its cost is
measured where it can be seen, on one example, as the difference of medians of passes with and without hooks that take
turns; the share is that of a pass of the task's batch. The last column is the ratio of such passes themselves, which a
machine that does other things at the same time blurs.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor, nn

from natgrad import KLLimit, NaturalGradient
from natgrad.race import networks

CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "MNIST auto-encoder": (lambda: networks.autoencoder(784, 1000, 500, 250, 30), (784,), 500),
    "small ResNet": (lambda: networks.resnet(channels=3), (3, 32, 32), 128),
}


def milliseconds(models: list[nn.Module], x: Tensor, repeats: int) -> list[list[float]]:
    """Times of forward passes of the models, which take turns in an order that turns, too."""
    times: list[list[float]] = [[] for _ in models]
    for repeat in range(repeats):
        for place in range(len(models)):
            number = (place + repeat) % len(models)
            begin = time.perf_counter()
            models[number](x)
            times[number].append(1000 * (time.perf_counter() - begin))
    return times


def main() -> None:
    """Print one row a network."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print("| network | layers | pass, ms | hooks, us | share | ratio of passes |")
    print("|---|---|---|---|---|---|")
    for name, (make, shape, batch) in CASES.items():
        bare = make()
        hooked = copy.deepcopy(bare)
        optimizer = NaturalGradient(hooked, step_size=KLLimit())
        optimizer._engine.armed = False  # as on a step that does not observe
        models = [bare, hooked]
        for model in models:
            model.train()
        one = torch.randn(2, *shape)  # two for batch normalisation
        milliseconds(models, one, 50)
        alone, watched = map(median, milliseconds(models, one, 2000))
        several = milliseconds(models, torch.randn(batch, *shape), 40)
        whole, hooks = median(several[0]), 1000 * (watched - alone)
        ratio = median(b / a for a, b in zip(*several, strict=True))
        share = f"{hooks / whole / 10:.2f} %"
        print(f"| {name} | {len(optimizer.layers)} | {whole:.1f} | {hooks:.0f} | {share} | {ratio:.3f} |")


if __name__ == "__main__":
    main()
