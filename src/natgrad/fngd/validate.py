"""One clear error for every bad setting, before anything is changed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from natgrad.fngd.coefficients import Coefficients
from natgrad.optim.validate import kind, number


def check_settings(settings: Mapping[str, Any]) -> None:
    """Check the arguments of ``FNGD`` by their names, but for those of its first phase."""
    kind("model", settings["model"], nn.Module, "a torch.nn.Module (the model itself, not its parameters)")
    steps = settings["first_phase"]
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise ValueError(f"first_phase must be a number of steps >= 1, such as len(loader), got {steps!r}")
    example = "a look-up such as PositionMean() (an object, not a class)"
    kind("coefficients", settings["coefficients"], Coefficients, example)
    number("lr", settings["lr"], 0)
    number("momentum", settings["momentum"], 0, 1)
    number("weight_decay", settings["weight_decay"], 0)
    for name in ("nesterov", "strict"):
        kind(name, settings[name], bool, "True or False")
    if settings["grad_scaler"] is not None and not hasattr(settings["grad_scaler"], "get_scale"):
        raise TypeError(f"grad_scaler must be a torch.amp.GradScaler, got {settings['grad_scaler']!r}")


def checked_ids(ids: Any) -> Tensor:
    """The ids of examples, or a ``ValueError``."""
    whole = isinstance(ids, Tensor) and ids.ndim == 1 and not (ids.is_floating_point() or ids.dtype == torch.bool)
    if not whole or (ids.device.type == "cpu" and (ids < 0).any()):  # elsewhere it would wait for the device
        raise ValueError("ids must be a tensor (n,) of whole numbers >= 0, one per example")
    return ids
