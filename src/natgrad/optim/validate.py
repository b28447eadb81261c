"""One clear error for every bad setting, before anything is changed."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from natgrad.fishers import Approximation
from natgrad.labels import check_estimator
from natgrad.layers import check_wide
from natgrad.likelihoods import Objective
from natgrad.optim.damping import ConstantDamping, Damping, LevenbergMarquardt
from natgrad.optim.step_size import StepSize


def number(name: str, value: Any, low: float, high: float = float("inf"), *, open_low: bool = False) -> None:
    """Raise unless ``value`` is a real number in [low, high), or (low, high)."""
    real = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not real or not low <= value < high or (open_low and value == low):
        bounds = f"{'>' if open_low else '>='} {low:g}" + ("" if high == float("inf") else f" and < {high:g}")
        raise ValueError(f"{name} must be a finite number {bounds}, got {value!r}")


def whole(name: str, value: Any, low: int) -> None:
    """Raise unless ``value`` is a whole number of at least ``low``."""
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise ValueError(f"{name} must be a whole number of at least {low}, got {value!r}")


def kind(name: str, value: Any, accepted: type | tuple[type, ...], example: str) -> None:
    """Raise unless ``value`` is of the accepted type."""
    if not isinstance(value, accepted):
        raise TypeError(f"{name} must be {example}, got {value!r}")


def as_damping(damping: float | Damping | None) -> Damping:
    """A damping policy: the default one, a constant for a number, or the policy given."""
    if damping is None:
        return LevenbergMarquardt()
    if isinstance(damping, (LevenbergMarquardt, ConstantDamping)):
        return damping
    number("damping", damping, 0, open_low=True)
    return ConstantDamping(damping)


def check_settings(settings: dict[str, Any]) -> None:
    """Check the arguments of ``NaturalGradient`` by their names."""
    kind("model", settings["model"], nn.Module, "a torch.nn.Module (the model itself, not its parameters)")
    example = "an approximation such as KFAC() (an object, not a class)"
    kind("approximation", settings["approximation"], Approximation, example)
    likelihood = settings["likelihood"]
    if likelihood is not None:
        kind("likelihood", likelihood, Objective, "a likelihood such as Categorical() (an object, not a class)")
    kind("step_size", settings["step_size"], StepSize, "a policy such as KLLimit() (an object, not a class)")
    check_estimator(settings["estimator"])
    if settings["estimator"] != "empirical" and likelihood is None:
        raise ValueError(
            f"estimator {settings['estimator']!r} needs a likelihood; without one only 'empirical' is possible"
        )
    if settings["step_size"].needs_inputs and settings["estimator"] == "empirical":
        raise ValueError(f"{settings['step_size']!r} needs a likelihood and an estimator that is not 'empirical'")
    if settings["grad_scaler"] is not None and not hasattr(settings["grad_scaler"], "get_scale"):
        raise TypeError(f"grad_scaler must be a torch.amp.GradScaler, got {settings['grad_scaler']!r}")
    for name in ("nesterov", "staggered", "shampoo", "strict", "observe_in_eval"):
        kind(name, settings[name], bool, "True or False")
    if settings["nesterov"] and settings["step_size"].chooses_momentum:
        raise ValueError(f"nesterov needs a policy that leaves the momentum alone, not {settings['step_size']!r}")
    if settings["weight_sharing"] not in ("expand", "reduce"):
        raise ValueError(f"weight_sharing must be 'expand' or 'reduce', got {settings['weight_sharing']!r}")
    precision = settings["precision"]
    if precision != "auto" and not (isinstance(precision, torch.dtype) and precision.is_floating_point):
        raise ValueError(f"precision must be 'auto' or a floating-point dtype, got {precision!r}")
    number("lr", settings["lr"], 0)
    number("momentum", settings["momentum"], 0, 1)
    number("weight_decay", settings["weight_decay"], 0)
    number("decay", settings["decay"], 0, 1)
    number("observe_fraction", settings["observe_fraction"], 0, 1.0000001, open_low=True)
    if settings["overhead"] is not None and settings["overhead"] != float("inf"):
        number("overhead", settings["overhead"], 0, open_low=True)
    for name in ("observe_every", "refresh_every", "draws"):
        whole(name, settings[name], 1)
    if settings["batch_dim"] is not None:
        whole("batch_dim", settings["batch_dim"], 0)
    if isinstance(settings["calls"], str):
        raise TypeError(f"calls must be names of methods, such as ({settings['calls']!r},), got one string")
    whole("seed", settings["seed"], 0)
    check_wide(settings["wide"])
