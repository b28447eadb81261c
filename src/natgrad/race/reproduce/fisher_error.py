"""How far approximations are from the Fisher along a run, without ever forming it.

With per-example gradients DW_n, K their Gram matrix and N = count, for every layer

    |F|^2 = |K|^2 / N^2,    <F, F~> = 1/N sum_n <DW_n, F~ DW_n>,    |F - F~|^2 = |F|^2 - 2 <F, F~> + |F~|^2.

All approximations see the same examples with the same drawn labels; they are neither damped nor averaged over time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import singledispatch
from itertools import count
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn

from natgrad.capture import Capture
from natgrad.engine import Engine
from natgrad.fishers import Approximation, pool
from natgrad.labels import Labels
from natgrad.matrix import Kronecker, KroneckerSum, Matrix, Spectral
from natgrad.race.bench import start
from natgrad.race.data import Dataset
from natgrad.race.entries import Entry, Settings
from natgrad.race.run import draws, feed, train_step
from natgrad.race.tasks import Task


@dataclass(frozen=True)
class Errors:
    """|F - F~| / |F| after `step` steps: by approximation, then by layer."""

    step: int
    relative: Mapping[str, Mapping[str, float]]

    def over_layers(self, approximation: str) -> float:
        """The mean over the layers."""
        return mean(self.relative[approximation].values())


def along(
    task: Task,
    data: Dataset,
    entry: Entry,
    settings: Settings,
    approximations: Mapping[str, Approximation],
    *,
    every: int,
    steps: int,
    examples: int,
    device: torch.device,
    seed: int = 0,
) -> Iterator[Errors]:
    """Train with `entry` and yield the errors every so many steps, on the first `examples` of the next batch."""
    racer = start(task, data, entry, settings, device)
    order, noise = draws(seed)
    deals = (batch for _ in count() for batch in feed(task, data, order, noise))
    for step, batch in zip(range(steps + 1), deals, strict=False):
        if step % every == 0:
            few = (batch[0][:examples], batch[1][:examples])
            yield Errors(step, errors(racer.model, approximations, task.likelihood(), few, seed=step))
        if step < steps:
            train_step(task, racer.model, racer.optimizer, *batch)


@torch.no_grad()
def errors(
    model: nn.Module,
    approximations: Mapping[str, Approximation],
    likelihood: Any,
    pair: tuple[Tensor, Tensor],
    seed: int,
) -> dict[str, dict[str, float]]:
    """|F - F~| / |F| of every approximation and covered layer on one batch, in evaluation mode, labels drawn once."""
    seen = captured(model, likelihood, pair, seed)
    squares = {name: capture.gram().square().sum() / capture.count**2 for name, capture in seen.items()}
    found: dict[str, dict[str, float]] = {}
    for title, approximation in approximations.items():
        matrices = {name: estimate(approximation, capture) for name, capture in seen.items()}
        found[title] = {name: _relative(matrices[name], seen[name], squares[name]) for name in seen}
    return found


def captured(model: nn.Module, likelihood: Any, pair: tuple[Tensor, Tensor], seed: int) -> dict[str, Capture]:
    """What every covered layer sees of one batch; the model is left as it was."""
    labels = Labels(likelihood, "sampled", targets=pair[1])
    labels.reseed(seed)
    engine = Engine(model, labels, only_training=False)
    training = {module: module.training for module in model.modules()}
    try:
        model.eval()
        engine.armed = True
        with torch.enable_grad():
            model(pair[0])
        (record,) = engine.everything()
    finally:
        engine.close()
        for module, mode in training.items():
            module.training = mode
    return {name: capture for name, layer in engine.layers.items() for capture in record.captures(layer)}


def estimate(approximation: Approximation, seen: Capture) -> Matrix:
    """The approximation's matrix for the examples of one capture."""
    matrix = approximation.assemble(approximation.merge(None, pool([approximation.observe(seen)]), 0.0))
    return approximation.correct(matrix, [seen], 0.0)


def _relative(matrix: Matrix, seen: Capture, square: Tensor) -> float:
    remainder = square - 2 * inner(matrix, seen) + matrix.norm().square().sum()
    return float(remainder.clamp(min=0).sqrt() / square.sqrt())


@singledispatch
def inner(matrix: Matrix, seen: Capture) -> Tensor:
    """<F, F~> = 1/N sum_n <DW_n, F~ DW_n>, summed over groups; for any matrix, from per-example gradients."""
    parts = [(DW * _by_example(matrix, DW)).sum() for DW in seen.weight_gradients()]
    return torch.stack(parts).sum() / seen.count


@inner.register
def _(matrix: Spectral, seen: Capture) -> Tensor:
    return (matrix.values * seen.project(matrix.left, matrix.right).second_moment()).sum() / seen.count


@inner.register
def _(matrix: Kronecker, seen: Capture) -> Tensor:
    return product(matrix.left, matrix.right, seen)


@inner.register
def _(matrix: KroneckerSum, seen: Capture) -> Tensor:
    return product(matrix.left, matrix.right, seen) + product(matrix.second_left, matrix.second_right, seen)


def product(left: Tensor, right: Tensor, seen: Capture) -> Tensor:
    """<F, left kron right>; without weight sharing DW_n = g a^T, and it is 1/N sum_n (g^T left g) (a^T right a)."""
    if seen.shared:
        parts = [(DW * (left.unsqueeze(-3) @ DW @ right.unsqueeze(-3))).sum() for DW in seen.weight_gradients()]
        return torch.stack(parts).sum() / seen.count
    a, g = seen.flat_a, seen.flat_g
    return (((g @ left) * g).sum(-1) * ((a @ right) * a).sum(-1)).sum() / seen.count


def _by_example(matrix: Matrix, DW: Tensor) -> Tensor:
    """The matrix applied to each example (*groups, n, out, in)."""
    return (matrix @ DW.movedim(-3, 0)).movedim(0, -3)
