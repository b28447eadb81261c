"""What is checked of a checkpoint before anything is changed, and of a model before a step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

_OF_SCHEDULES = {"initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum", "swa_lr"}  # torch's, not ours


def check_checkpoint(saved: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> None:
    """Raise ``ValueError`` unless a ``state_dict`` is one of an optimizer with such groups, all of it finite."""
    found = saved.get("param_groups") if isinstance(saved, Mapping) else None
    if not isinstance(found, Sequence) or not isinstance(saved.get("state"), Mapping):
        raise ValueError("the checkpoint is not the state_dict of an optimizer")
    sizes, mine = ([len(group.get("params", ())) for group in all_groups] for all_groups in (found, groups))
    if sizes != mine:
        raise ValueError(f"the checkpoint is of another model: groups of {sizes} parameters, and here of {mine}")
    for theirs, own in zip(found, groups, strict=True):
        lacking = sorted(own.keys() - theirs.keys() - _OF_SCHEDULES)
        if lacking:
            raise ValueError(f"the checkpoint is of another optimizer or version; it lacks {', '.join(lacking)}")
    clock = found[0]["clock"]
    if not isinstance(clock, Mapping) or groups[0]["clock"].keys() - clock.keys():
        raise ValueError("the checkpoint is of another optimizer or version: its clock is another")
    keys = (key for group in found for key in group["params"])
    parameters = (p for group in groups for p in group["params"])
    for key, p in zip(keys, parameters, strict=True):
        _check_state(saved["state"].get(key, {}), p)


def _check_state(state: Mapping[str, Any], p: nn.Parameter) -> None:
    for name, value in state.items():
        if not isinstance(value, Tensor):
            continue
        if name in ("exp_avg", "exp_avg_sq") and value.shape != p.shape:
            raise ValueError(
                f"the checkpoint is of another model: {name} of shape {tuple(value.shape)} for a parameter of shape "
                f"{tuple(p.shape)}"
            )
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise ValueError(f"the checkpoint is not finite: {name} of a parameter of shape {tuple(p.shape)}")


def check_parameters(model: nn.Module, groups: Iterable[Mapping[str, Any]]) -> None:
    """Raise ``ValueError`` where the model has other parameters than those that the optimizer steps."""
    own = {id(p) for p in model.parameters()}
    held = [p for group in groups for p in group["params"]]
    gone = [p for p in held if id(p) not in own]
    if gone:
        shapes = ", ".join(str(tuple(p.shape)) for p in gone[:3])
        raise ValueError(
            f"{len(gone)} parameters that the optimizer steps are no longer those of the model (shapes {shapes}): they "
            "were replaced, as load_state_dict(assign=True), to_empty() on the meta device or a new head do; make a "
            "new optimizer, or hand the new ones to add_param_group and delete the old ones from param_groups"
        )


def check_processes() -> None:
    """Raise ``RuntimeError`` in a run of several processes, whose statistics are not added up."""
    distributed = torch.distributed
    count = distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1
    if count > 1:
        raise RuntimeError(
            f"natgrad runs in one process, and here are {count}, each of which would train on its own curvature"
        )
