"""The three verbs: every layer is written as W = S W' with S = F~^(-1/2) a fixed map, the *local Fisher layer*.

The gradient in W' is S M, so gradient descent on W' moves W by S S M = F~^-1 M; with momentum too.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import TypeVar

import torch
from torch import nn

from natgrad.fisher import evaluating
from natgrad.fishers import SNGD, Approximation
from natgrad.labels import Estimator
from natgrad.layers import Layer
from natgrad.likelihoods import Objective
from natgrad.look import look
from natgrad.matrix import Root, eigh_root
from natgrad.reconstruction.carry import carry, check_optimizer
from natgrad.reconstruction.fisher_layer import fisher_layers_of, install, uninstall
from natgrad.reconstruction.metric import Activations, Batches, Metric, Settings, gather

Model = TypeVar("Model", bound=nn.Module)
INPUTS = SNGD()


def reconstruct(
    model: Model,
    batches: Batches,
    approximation: Approximation = INPUTS,
    *,
    likelihood: Objective | None = None,
    activations: Activations | None = None,
    estimator: Estimator = "sampled",
    damping: float = 0.0,
    root: Root = eigh_root,
    exclude: Iterable[str] = (),
    optimizer: torch.optim.Optimizer | None = None,
    seed: int = 0,
) -> Model:
    """Write every covered layer as W = S W' with S S = (F~ + damping)^-1, so that SGD on W' is natural: in place.

    The function stays, the parameters are the same objects with new values W' = S^-1 W, and the bias is the last column
    of W. Steps of ``torch.optim.SGD``, momentum included, are those of ``approximation`` with S held fixed. Not so for
    Adam, and weight decay on W' is decay in the norm of F~. Layers that the data do not reach stay as they are.

    Args:
        model: any module; parameters that no rule reads, frozen, tied or excluded ones, and those that are not
            called as modules (attention, recurrences) stay as they are.
        batches: (inputs, targets) pairs for the statistics, read once, in ``eval()`` mode.
        approximation: the metric. ``SNGD()``: inputs only; ``KFAC(rule=Ridge())`` with ``damping=1e-4``: both sides;
            ``UnitWise()``: one matrix per output; or any other whose matrix has a root.
        likelihood: what the outputs mean; needed where the approximation reads output gradients.
        activations: in its stead, functions by layer name: g is then the slope f'(s) of the layer's own activation (1
            for layers that are not named), nothing is sent back, and every position is an example.
        estimator: labels for ``likelihood``: ``"sampled"``, ``"exact"`` or ``"empirical"``.
        damping: of the matrix, by its own rule; ``SNGD`` and ``UnitWise`` have a ridge besides.
        root: how the roots are taken: ``eigh_root``, ``denman_beavers``, ``newton_schulz`` or ``Nystrom(rank)`` of
            :mod:`natgrad.matrix`.
        exclude: names of modules to leave as they are.
        optimizer: an SGD that has momentum already, which is then carried over as by :func:`refresh`.
        seed: of the sampled labels.

    Cost: a forward pass of the batches (and a backward pass for ``likelihood``), one root per factor (memory 2 in^2
    for ``SNGD``), and the product S W' in every forward pass, 2 out in^2 flops for ``SNGD``. References: SNGD, arXiv
    2412.07441; whitened networks: Desjardins, Simonyan, Pascanu and Kavukcuoglu, arXiv 1507.00210.

    Raises:
        ValueError: if nothing is covered or reached, the model is reconstructed already, or the arguments do not fit.
        FactorisationError: if a matrix is not positive definite. The model is left as it was.
    """
    settings = Settings(approximation, likelihood, activations, estimator, damping, root, seed)
    if fisher_layers_of(model):
        raise ValueError("the model is reconstructed already: refresh it, or restore it first")
    exclude, batches = tuple(exclude), iter(batches)
    first = next(batches, None)
    if first is None:
        raise ValueError("the batches are empty, or reach no covered layer")
    layers = _suitable(model, first[0], exclude)
    if not layers:
        raise ValueError("the model has no layer that can be reconstructed")
    for layer in layers.values():
        approximation.check(layer.name, layer.shape)
    settings.check_names(layers)
    check_optimizer(optimizer, layers.values())
    new = {}
    for name, stats in gather(model, chain([first], batches), layers, settings, seed).items():
        new[name] = Metric.of(name, approximation.merge(None, stats, 0.0), settings)
    for name, metric in new.items():
        carry(layers[name], None, metric, optimizer)
        install(layers[name], _holder(model, layers[name]), settings, metric)
    return model


def _suitable(model: nn.Module, inputs: object, exclude: tuple[str, ...]) -> dict[str, Layer]:
    """The layers that modules have as their ``weight``, whole, and alone."""
    args = () if isinstance(inputs, dict) else inputs if isinstance(inputs, (tuple, list)) else (inputs,)
    kwargs = inputs if isinstance(inputs, dict) else {}
    with evaluating(model):
        found = look(model, args, kwargs, exclude, None).layers
    return {
        name: layer
        for name, layer in found.items()
        if layer.kind == "plain" and layer.whole and len(layer.names) == 1 and layer.names[0].endswith("weight")
        if hasattr(_holder(model, layer), "weight") and (layer.bias is None or layer.bias is _holder(model, layer).bias)
    }


def _holder(model: nn.Module, layer: Layer) -> nn.Module:
    """The module that has the weight of a layer."""
    return model.get_submodule(layer.names[0].rpartition(".")[0])


def refresh(
    model: Model,
    batches: Batches,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    decay: float = 0.95,
    keep_velocity: bool = True,
) -> Model:
    """Renew S from new data, and keep the function and the velocity: W' <- S_new^-1 S W', as does the momentum of SGD.

    Statistics are averaged with the old ones, whose weight is ``decay`` (less at first: min(1 - 1/k, decay) at the k-th
    observation). Gradients that wait for a step are carried over too. ``optimizer`` is the SGD whose momentum is to
    follow; with ``keep_velocity=False`` it starts at 0 instead. Layers that the data do not reach keep their metric.

    Raises ``ValueError`` if the model is not reconstructed, ``TypeError`` for an optimizer that is not SGD, and
    ``FactorisationError``; all leave the model as it was. Cost: that of :func:`reconstruct`.
    """
    found = fisher_layers_of(model)
    if not found:
        raise ValueError("the model is not reconstructed")
    settings = found[0].settings
    if any(fisher_layer.settings is not settings for fisher_layer in found):
        raise ValueError("the model was reconstructed in parts: refresh each part")
    if not 0 <= decay < 1:
        raise ValueError(f"decay must be a number >= 0 and < 1, got {decay!r}")
    fisher_layers = {fisher_layer.layer.name: fisher_layer for fisher_layer in found}
    layers = {name: fisher_layer.layer for name, fisher_layer in fisher_layers.items()}
    check_optimizer(optimizer, layers.values())
    k = max(int(fisher_layer.observations) for fisher_layer in found)
    new = {}
    for name, stats in gather(model, batches, layers, settings, settings.seed + k).items():
        weight = min(1 - 1 / (int(fisher_layers[name].observations) + 1), decay)
        new[name] = fisher_layers[name].metric.merged(name, stats, weight, settings)
    for name, metric in new.items():
        carry(layers[name], fisher_layers[name].metric, metric, optimizer, keep_velocity)
        fisher_layers[name].metric = metric
    return model


def restore(model: Model, optimizer: torch.optim.Optimizer | None = None) -> Model:
    """The inverse of :func:`reconstruct`, in place: the same module classes and parameters, with the trained W = S W'.

    ``optimizer`` is an SGD whose momentum is to follow. Raises ``ValueError`` if the model is not reconstructed or a
    weight was parametrized once more.
    """
    fisher_layers = fisher_layers_of(model)
    if not fisher_layers:
        raise ValueError("the model is not reconstructed")
    for fisher_layer in fisher_layers:
        for name, parametrized in fisher_layer.chains().items():
            if len(parametrized) > 1:
                raise ValueError(f"{fisher_layer.layer.name}.{name} was parametrized once more: remove that first")
    check_optimizer(optimizer, [fisher_layer.layer for fisher_layer in fisher_layers])
    for fisher_layer in fisher_layers:
        carry(fisher_layer.layer, fisher_layer.metric, None, optimizer)
        uninstall(fisher_layer)
    return model
