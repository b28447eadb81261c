"""Parameter groups: covered layers under the natural gradient, everything else under AdamW."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from natgrad.layers import Layer
from natgrad.optim.adamw import DEFAULTS
from natgrad.optim.validate import number


def build_groups(
    model: nn.Module,
    layers: Mapping[str, Layer],
    natural: Mapping[str, Any],
    adamw: Mapping[str, Any],
    overrides: Iterable[Mapping[str, Any]],
) -> list[dict[str, Any]]:
    """One or two groups (``rule`` "natural" or "adamw") for every override, and for the parameters that have none.

    Raises ``ValueError`` for an override without ``params``, of a foreign or repeated parameter, or of half a layer.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    covered = {id(p) for layer in layers.values() for p in layer.parameters}
    unknown = set(adamw) - set(DEFAULTS)
    if unknown:
        raise ValueError(f"adamw knows {', '.join(DEFAULTS)}, got {', '.join(sorted(unknown))}")
    left = {id(p): p for p in trained}
    groups: list[dict[str, Any]] = []
    for override in overrides:
        settings = {**override}
        chosen = list(settings.pop("params", ()))
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
    of = {id(p): index for index, group in enumerate(groups) for p in group["params"]}
    for layer in layers.values():
        if len({of[id(p)] for p in layer.parameters}) > 1:
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
