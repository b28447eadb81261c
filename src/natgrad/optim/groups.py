"""Parameter groups: covered layers under the natural gradient, everything else under AdamW."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any, Literal

from torch import nn

from natgrad.layers import Coverage, Inventory
from natgrad.optim.adamw import DEFAULTS
from natgrad.optim.validate import number


def build_groups(
    model: nn.Module,
    found: Coverage,
    natural: Mapping[str, Any],
    adamw: Mapping[str, Any] | Literal[False] | None,
    overrides: Iterable[Mapping[str, Any]],
) -> list[dict[str, Any]]:
    """One or two groups for every override, and for the parameters that have none: ``rule`` "adamw" for parameters that
    are excluded, "natural" for all others, of which those without curvature follow AdamW there.

    ``found`` is what is expected; without ``adamw`` what is not expected to have curvature is left out. Raises
    ``ValueError`` for an override without ``params``, or of a foreign or repeated parameter.
    """
    first = {id(p) for name, p in model.named_parameters() if found.uncovered.get(name) == "excluded"}
    covered = {id(p) for layer in found.layers.values() for p in layer.parameters}
    left = {id(p): p for p in model.parameters() if p.requires_grad and (adamw is not False or id(p) in covered)}
    adamw = adamw or {}
    unknown = set(adamw) - set(DEFAULTS)
    if unknown:
        raise ValueError(f"adamw knows {', '.join(DEFAULTS)}, got {', '.join(sorted(unknown))}")
    for name in ("lr", "weight_decay"):
        number(f"{name} of the adamw rule", {**DEFAULTS, **adamw}[name], 0)
    groups: list[dict[str, Any]] = []
    for override in overrides:
        settings = {**override}
        chosen = _parameters(settings)
        settings.pop("params", None)
        if not chosen or any(id(p) not in left for p in chosen):
            raise ValueError("a group needs params: trained parameters of the model, each in one group only")
        for p in chosen:
            del left[id(p)]
        groups += _split(chosen, first, natural, {**DEFAULTS, **adamw}, settings)
    groups += _split(list(left.values()), first, natural, {**DEFAULTS, **adamw}, {})
    return [_completed(group, adamw) for group in groups]


def _split(
    parameters: list[nn.Parameter],
    first: set[int],
    natural: Mapping[str, Any],
    adamw: Mapping[str, Any],
    own: Mapping[str, Any],
) -> list[dict[str, Any]]:
    known: dict[str, Any] = {}
    if "pretrained" in natural:  # of an optimizer that asks
        known = {"own_lr": "lr" in own, "pretrained": natural["pretrained"]}
    kinds = [
        {"params": [p for p in parameters if id(p) not in first], "rule": "natural", **natural, **own, **known},
        {"params": [p for p in parameters if id(p) in first], "rule": "adamw", **adamw, **own, **known},
    ]
    return [group for group in kinds if group["params"]]


def _completed(group: dict[str, Any], adamw: Mapping[str, Any]) -> dict[str, Any]:
    """The group, checked, with what its learning rates were at first."""
    number(f"lr of the {group['rule']} rule", group["lr"], 0)
    number(f"weight_decay of the {group['rule']} rule", group["weight_decay"], 0)
    number("momentum", group.get("momentum", 0.0), 0, 1)
    group["first_lr"] = group["lr"]  # what a schedule's lr is compared with
    if group["rule"] == "natural":
        group["adamw_lr"] = adamw.get("lr", DEFAULTS["lr"])  # of what has no curvature
    return group


def extended(
    model: nn.Module,
    groups: Iterable[Mapping[str, Any]],
    inventory: Inventory,
    group: Mapping[str, Any],
    natural: Mapping[str, Any],
    adamw: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """What :func:`build_groups` makes of one more ``group``."""
    stepped = {id(p) for known in groups for p in known["params"]}
    chosen = _parameters(group)
    own = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    if not chosen or any(id(p) not in own or id(p) in stepped for p in chosen) or len({*map(id, chosen)}) < len(chosen):
        raise ValueError("a group needs params: trained parameters of the model, each in one group only")
    first = {id(p) for p in chosen if inventory.excluded(own[id(p)])}
    settings = {key: value for key, value in group.items() if key != "params"}
    return [_completed(one, adamw) for one in _split(chosen, first, natural, adamw, settings)]


def within(found: Coverage, model: nn.Module, held: Collection[int]) -> Coverage:
    """What is covered of the parameters ``held``, by their ids: a layer is without a bias that is not among them."""
    names = {id(p): name for name, p in model.named_parameters()}
    layers, uncovered = {}, dict(found.uncovered)
    for name, layer in found.layers.items():
        left = {names[id(p)]: "in no group of parameters" for p in layer.parameters if id(p) not in held}
        if id(layer.weight) in held:
            layers[name] = replace(layer, bias=None, bias_view=None) if left else layer
        elif layer.bias is not None:
            left = {names[id(layer.bias)]: "its weight is in no group", **left}
        uncovered |= left
    return Coverage(layers, uncovered, found.expected)


def _parameters(group: Mapping[str, Any]) -> list[nn.Parameter]:
    params = group.get("params", ())
    return [params] if isinstance(params, nn.Parameter) else list(params)


def shortened(settings: dict[str, Any], share: float, counts: bool) -> dict[str, Any]:
    """The settings with a ``share`` of their lr, where it ``counts``."""
    return {**settings, "lr": share * settings["lr"]} if counts and share != 1.0 else settings


def adamw_settings(group: Mapping[str, Any], adamw: Mapping[str, Any]) -> dict[str, Any]:
    """The AdamW rule for layers of a natural ``group`` that were never seen: its lr follows the group's schedule."""
    left = group["lr"] / group["first_lr"] if group["first_lr"] else float(bool(group["lr"]))
    return {**adamw, "lr": group["adamw_lr"] * left}
