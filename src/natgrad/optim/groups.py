"""Parameter groups: covered layers under the natural gradient, everything else under AdamW."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

from torch import nn

from natgrad.layers import Coverage, Layer
from natgrad.optim.adamw import DEFAULTS
from natgrad.optim.validate import number


def build_groups(
    parameters: Iterable[nn.Parameter],
    layers: Mapping[str, Layer],
    natural: Mapping[str, Any],
    adamw: Mapping[str, Any] | Literal[False] | None,
    overrides: Iterable[Mapping[str, Any]],
) -> list[dict[str, Any]]:
    """One or two groups (``rule`` "natural" or "adamw") for every override, and for the parameters that have none.

    Raises ``ValueError`` for an override without ``params``, of a foreign or repeated parameter, or of half a layer.
    """
    covered = {id(p) for layer in layers.values() for p in layer.parameters}
    left = {id(p): p for p in parameters if p.requires_grad and (adamw is not False or id(p) in covered)}
    adamw = adamw or {}
    unknown = set(adamw) - set(DEFAULTS)
    if unknown:
        raise ValueError(f"adamw knows {', '.join(DEFAULTS)}, got {', '.join(sorted(unknown))}")
    groups: list[dict[str, Any]] = []
    for override in overrides:
        settings = {**override}
        chosen = _parameters(settings)
        settings.pop("params", None)
        if not chosen or any(id(p) not in left for p in chosen):
            raise ValueError("a group needs params: trained parameters of the model, each in one group only")
        for p in chosen:
            del left[id(p)]
        groups += _split(chosen, covered, {**natural, **settings}, {**DEFAULTS, **adamw, **settings})
    groups += _split(list(left.values()), covered, dict(natural), {**DEFAULTS, **adamw})
    for group in groups:
        number(f"lr of the {group['rule']} rule", group["lr"], 0)
        number(f"weight_decay of the {group['rule']} rule", group["weight_decay"], 0)
        number("momentum", group.get("momentum", 0.0), 0, 1)
        group["first_lr"] = group["lr"]  # what a schedule's lr is compared with
    of = {id(p): index for index, group in enumerate(groups) for p in group["params"]}
    for layer in layers.values():
        if len({of.get(id(p)) for p in layer.parameters}) > 1:
            raise ValueError(f"layer {layer.name!r}: weight and bias must be in one parameter group")
    return groups


def _split(
    parameters: list[nn.Parameter], covered: set[int], natural: dict[str, Any], adamw: dict[str, Any]
) -> list[dict[str, Any]]:
    kinds = [
        {"params": [p for p in parameters if id(p) in covered], "rule": "natural", **natural},
        {"params": [p for p in parameters if id(p) not in covered], "rule": "adamw", **adamw},
    ]
    return [group for group in kinds if group["params"]]


def extended(
    model: nn.Module,
    groups: Iterable[Mapping[str, Any]],
    found: Coverage,
    more: Coverage,
    group: Mapping[str, Any],
    natural: Mapping[str, Any],
    adamw: Mapping[str, Any],
) -> tuple[list[dict[str, Any]], Coverage]:
    """What :func:`build_groups` makes of one more ``group``, and ``found`` with what of ``more`` that brings in."""
    stepped = {id(p) for group in groups for p in group["params"]}
    free = [p for p in model.parameters() if p.requires_grad and id(p) not in stepped]
    given = _parameters(group)
    chosen = {id(p) for p in given}
    layers = {n: layer for n, layer in more.layers.items() if any(id(p) in chosen for p in layer.parameters)}
    layers = {**layers, **found.layers}
    added = build_groups([p for p in free if id(p) in chosen], layers, natural, adamw, [{**group, "params": given}])
    order = {id(p): place for place, p in enumerate(model.parameters())}
    names = sorted(layers, key=lambda name: order[id(layers[name].parameters[0])])
    reasons = {name: why for name, why in more.uncovered.items() if id(model.get_parameter(name)) in chosen}
    return added, Coverage({name: layers[name] for name in names}, {**found.uncovered, **reasons})


def _parameters(group: Mapping[str, Any]) -> list[nn.Parameter]:
    params = group.get("params", ())
    return [params] if isinstance(params, nn.Parameter) else list(params)


def adamw_settings(group: Mapping[str, Any], adamw: Mapping[str, Any]) -> dict[str, Any]:
    """The AdamW rule for layers of a natural ``group`` that were never seen: its lr follows the group's schedule."""
    share = group["lr"] / group["first_lr"] if group["first_lr"] else float(bool(group["lr"]))
    return {**adamw, "lr": adamw["lr"] * share}
