"""Shampoo for matrices that no rule reads: curvature of the mean gradients alone (Gupta, Koren and Singer 2018)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from natgrad.matrix.factorise import FactorisationError, eigh
from natgrad.optim.adamw import adamw_direction

_OBSERVE_EVERY, _REFRESH_EVERY = 5, 20  # and more often at first
_FLOOR = 1e-6  # of the largest eigenvalue


def is_matrix(p: Tensor, wide: int | None) -> bool:
    """Whether p has two sides, one of which is at most ``wide``."""
    sides = _matrix(p).shape
    return len(sides) == 2 and (wide is None or min(sides) <= wide)


def shampoo_step(
    parameters: Sequence[nn.Parameter], state: dict[Any, dict[str, Any]], group: Mapping[str, Any], wide: int | None
) -> None:
    """theta <- (1 - lr weight_decay) theta - lr c L^(-1/4) m R^(-1/4) on parameters (out, in) that have a gradient.

    m is the mean of the gradients M over time by beta_1, L and R those of M M^T and M^T M by beta_2; a side above
    ``wide`` has none. c gives the step the length that AdamW's would have (grafting), so that the settings of AdamW
    hold. Dimensions of size 1 are left out, those after the first count as one. L and R are observed every 5 steps and
    their roots renewed every 20, 9 to 25 (out^3 + in^3) flops, both more often at first; a step costs 2 out in
    (out + in); memory is 2 (out^2 + in^2) beside that of AdamW. References: Gupta, Koren and Singer, arXiv 1802.09568;
    grafting: Agarwal, Anil, Hazan, Koren and Zhang, arXiv 2002.11803.
    """
    for p in parameters:
        if p.grad is None:
            continue
        D, own = adamw_direction(p, state, group), state[p]
        dtype = torch.promote_types(p.dtype, torch.float32)
        M, m, step = _matrix(p.grad).to(dtype), _matrix(own["exp_avg"]).to(dtype), int(own["step"])
        for name in ("left", "right"):
            X = M if name == "left" else M.mT
            if wide is not None and len(X) > wide:
                continue
            if name not in own:
                own[name] = X.new_zeros(len(X), len(X))
            if step < 5 or step % _OBSERVE_EVERY == 0:
                own[name].lerp_(X @ X.mT, 1 - group["betas"][1])
            if step in (1, 2, 5, 10) or step % _REFRESH_EVERY == 0:
                own[f"{name}_root"] = _root(own[name], own.get(f"{name}_root"))
            root = own[f"{name}_root"]
            m = root @ m if name == "left" else m @ root
        length = D.norm() / m.norm().clamp(min=torch.finfo(m.dtype).tiny)
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.add_((m * length).to(p.dtype).view_as(p), alpha=-group["lr"])


def _root(X: Tensor, old: Tensor | None) -> Tensor:
    """X^(-1/4) up to a factor, for X with a floor under its eigenvalues; the old one where eigh fails."""
    try:
        values, Q = eigh(X)
    except FactorisationError:
        return torch.eye(len(X), dtype=X.dtype, device=X.device) if old is None else old
    largest = values.amax()
    relative = values / torch.where(largest > 0, largest, 1.0) + _FLOOR
    return (Q * relative.pow(-0.25)) @ Q.mT


def _matrix(p: Tensor) -> Tensor:
    """p without its dimensions of size 1, the rest but the first as one."""
    squeezed = p.squeeze()
    return squeezed.flatten(1) if squeezed.ndim > 1 else squeezed
