"""The AdamW rule for parameters without curvature: norm scales, odd shapes, layers that were never seen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

DEFAULTS: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}


def adamw_step(parameters: Sequence[nn.Parameter], state: dict[Any, dict[str, Any]], group: dict[str, Any]) -> None:
    """One step of ``torch.optim.AdamW`` on the parameters that have a gradient."""
    chosen = [p for p in parameters if p.grad is not None]
    if not chosen:
        return
    for p in chosen:
        _begin(p, state)

    def gather(name: str) -> list[Tensor]:
        return [state[p][name] for p in chosen]

    settings = {name: group.get(name, default) for name, default in DEFAULTS.items()}
    beta1, beta2 = settings.pop("betas")
    adamw(
        list(chosen), [p.grad for p in chosen if p.grad is not None],
        gather("exp_avg"), gather("exp_avg_sq"), [], gather("step"),
        amsgrad=False, beta1=beta1, beta2=beta2, maximize=False, **settings,
    )  # fmt: skip


def adamw_direction(p: nn.Parameter, state: dict[Any, dict[str, Any]], group: Mapping[str, Any]) -> Tensor:
    """What AdamW would take lr times, after counting the gradient in: m / (sqrt(v) + eps), without weight decay."""
    assert p.grad is not None
    _begin(p, state)
    own, (beta1, beta2) = state[p], group["betas"]
    own["step"] += 1
    own["exp_avg"].lerp_(p.grad, 1 - beta1)
    own["exp_avg_sq"].lerp_(p.grad.square(), 1 - beta2)
    step = float(own["step"])
    root = (own["exp_avg_sq"] / (1 - beta2**step)).sqrt()
    return own["exp_avg"] / (1 - beta1**step) / (root + group["eps"])


def _begin(p: nn.Parameter, state: dict[Any, dict[str, Any]]) -> None:
    if "exp_avg" not in state[p]:
        state[p] |= {"step": torch.zeros(()), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    if state[p]["exp_avg"].dtype != p.dtype:  # which may have changed
        state[p] |= {name: state[p][name].to(p.dtype) for name in ("exp_avg", "exp_avg_sq")}
