"""``natgrad.fisher``: the Fisher of a model over data, one structured matrix per layer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from typing import Any

import torch
from torch import nn

from natgrad.capture import Capture
from natgrad.engine import Engine
from natgrad.fishers import Approximation, Coupled, Stats, check_layers, for_layer, pool
from natgrad.labels import Estimator, Labels, check_estimator
from natgrad.layers import WIDE, Layer, check_wide, expected
from natgrad.likelihoods import Objective
from natgrad.masks import Mask
from natgrad.matrix import Blocks, Grouped, Matrix
from natgrad.record import Record, Sharing


@torch.no_grad()
def fisher(
    model: nn.Module,
    approximation: Approximation,
    likelihood: Objective,
    batches: Iterable[tuple[Any, Any]],
    *,
    estimator: Estimator = "exact",
    draws: int = 1,
    weight_sharing: Sharing = "expand",
    seed: int = 0,
    wide: int | None = WIDE,
    mask: Mask = None,
    batch_dim: int | None = None,
) -> Blocks:
    """F = 1/count sum_n E_y[vec(DW_n) vec(DW_n)^T] of every covered layer, under ``approximation``.

    Undamped and un-averaged over time; over all the data, each batch weighing by its examples. The model is read in
    ``eval()`` mode and left as it was.

    Args:
        model: any module; parameters whose use no rule reads and frozen ones are left out.
        approximation: the structure, for example ``KFAC()``.
        likelihood: what the outputs mean; decides the scale of the loss (mean over its terms).
        batches: (inputs, targets) pairs; inputs may be a tensor, a tuple of positional or a dict of keyword arguments.
            An approximation that measures in a basis (EKFAC) reads them twice; an iterator is then kept in memory.
        estimator: ``"exact"`` (one backward pass per output direction), ``"sampled"`` (``draws`` labels from the
            model), ``"empirical"`` (the targets; its scale is right only for a well-specified model).
        draws: labels drawn per example by ``"sampled"``.
        weight_sharing: ``"expand"`` or ``"reduce"`` (Eschenhagen et al. 2023) for weights used at several positions.
        seed: of the drawn labels.
        wide: sides of more inputs or outputs are diagonal, ``None`` for none; embeddings have a diagonal side always.
            Where the approximation cannot have one, KFAC stands in (:meth:`~natgrad.Approximation.sided`).

        mask: which positions (n, t) of the examples exist: the name of an argument of the model, such as
            ``"attention_mask"``, or a function of all of them. Others count nowhere.
        batch_dim: the dimension of the examples in the first tensor that the model is given, ``None`` to find out by
            sizes, and by what attention and recurrences know.

    Returns:
        A mapping from layer name, as in ``named_modules``, to :class:`~natgrad.matrix.Matrix`, whose ``dense()`` is the
        (out (in+1)) square matrix, weights row by row with the bias as the last column.

    Raises:
        ValueError: on an unknown estimator, data that do not fit, no data, or no layer that is covered.
    """
    _check(estimator, draws, weight_sharing)
    if isinstance(approximation, Coupled):
        raise ValueError(f"{type(approximation).__name__} joins layers in its inverse and has no matrix per layer")
    check_wide(wide)
    check_layers(approximation, expected(model, wide=wide).layers.values())
    labels = Labels(likelihood, estimator, draws)
    if approximation.corrects and isinstance(batches, Iterator):
        batches = list(batches)
    with (
        evaluating(model),
        closing(Engine(model, labels, only_training=False, wide=wide, mask=mask, batch_dim=batch_dim)) as engine,
    ):
        matrices = _estimate(engine, model, approximation, batches, weight_sharing, seed)
    return Blocks({name: Grouped(M) if len(M.shape) == 3 else M for name, M in matrices.items()})


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in ``eval()`` mode; afterwards every module is in its own mode again."""
    was_training = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, training in was_training.items():
            module.training = training


def _estimate(
    engine: Engine,
    model: nn.Module,
    approximation: Approximation,
    batches: Iterable[tuple[Any, Any]],
    sharing: Sharing,
    seed: int,
) -> dict[str, Matrix]:
    stats: dict[str, Stats] = {}
    for layer, seen in passes(engine, model, batches, sharing, seed):
        here = pool(for_layer(approximation, layer.kind).observe(capture) for capture in seen)
        stats[layer.name] = pool([stats[layer.name], here]) if layer.name in stats else here
    if not stats:
        uses = (f"{name} is {why}" for name, why in engine.inventory.coverage().uncovered.items() if "rule" in why)
        raise ValueError("; ".join(["the batches are empty, or reach no layer that is covered", *uses]))
    check_layers(approximation, engine.layers.values())
    used = {name: for_layer(approximation, layer.kind) for name, layer in engine.layers.items() if name in stats}
    matrices = {name: chosen.assemble(chosen.merge(None, stats[name], 0.0)) for name, chosen in used.items()}
    if approximation.corrects:
        total = dict.fromkeys(matrices, 0.0)
        for layer, seen in passes(engine, model, batches, "expand", seed):  # eigenvalues are those of F
            weight = sum(float(capture.count) for capture in seen)
            total[layer.name] += weight
            decay = 1 - weight / total[layer.name] if weight else 1.0
            matrices[layer.name] = used[layer.name].correct(matrices[layer.name], seen, decay)
    return matrices


def passes(
    engine: Engine,
    model: nn.Module,
    batches: Iterable[tuple[Any, Any]],
    sharing: Sharing,
    seed: int,
) -> Iterator[tuple[Layer, list[Capture]]]:
    """Run the model over the data, and yield what each layer saw of each batch; the same random labels at each pass.

    A batch that does not reach a layer counts there with gradients of zero.
    """
    assert engine.labels is not None
    engine.labels.reseed(seed)
    earlier: list[Record] = []  # of batches, without what their layers saw
    known: set[str] = set()
    for inputs, targets in batches:
        engine.labels.targets = targets
        engine.armed = True
        with torch.enable_grad():
            call(model, inputs)
        engine.armed = False
        for record in engine.everything():
            for layer in engine.layers.values():
                missed = [] if layer.name in known else [batch.absent(layer) for batch in earlier]
                known.add(layer.name)
                yield layer, missed + (list(record.captures(layer, sharing)) or [record.absent(layer)])
            earlier.append(Record(rows=record.rows, terms=record.terms, which=record.which))


def call(model: nn.Module, inputs: Any) -> Any:
    """The model at a tensor, a tuple of positional or a dict of keyword arguments."""
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, (tuple, list)) else model(inputs)


def _check(estimator: str, draws: int, sharing: str) -> None:
    check_estimator(estimator)
    if sharing not in ("expand", "reduce"):
        raise ValueError(f"weight_sharing must be 'expand' or 'reduce', got {sharing!r}")
    if not isinstance(draws, int) or draws < 1:
        raise ValueError(f"draws must be a whole number of at least 1, got {draws!r}")
