"""Nothing falls back to AdamW without a word."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from natgrad.layers import Coverage


def refuse(uncovered: Mapping[str, str]) -> None:
    """Raise ``ValueError`` with every parameter that AdamW would step though it was not excluded, and why."""
    left = [f"{name} ({why})" for name, why in uncovered.items() if why != "excluded"]
    if left:
        raise ValueError(
            f"strict=True, but {len(left)} parameters would have no curvature: {', '.join(left)}; name their modules "
            "in exclude to leave them to AdamW"
        )


def no_samples(policy: object) -> RuntimeError:
    """The error of a step without a forward pass that was observed, under a policy that needs one."""
    return RuntimeError(
        f"{type(policy).__name__} reads samples at every step, but no forward pass of the model in training mode led "
        "to these gradients; call model.train() before it, or use KLLimit() as step_size"
    )


class Watch:
    """Says, once for each, which gradients come from layers that were not observed, and which nothing steps.

    A warning, or with ``strict`` a ``RuntimeError``.
    """

    def __init__(self, strict: bool) -> None:
        self._strict = strict
        self._told: set[str] = set()

    def __call__(
        self,
        model: nn.Module,
        found: Coverage,
        never_seen: Iterable[str],
        groups: Iterable[Mapping[str, Any]],
        unread: Mapping[str, str],
    ) -> None:
        """Look at the gradients of a step that observes, given the layers that no step so far has seen."""
        unseen = [name for name in never_seen if name not in self._told and _moves(found.layers[name].parameters)]
        stepped = {id(p) for group in groups for p in group["params"]}
        left = [
            name
            for name, p in model.named_parameters()
            if id(p) not in stepped and name not in found.uncovered and name not in self._told and _moves([p])
        ]
        told = [f"{name} ({unread[name]})" if name in unread else name for name in unseen]
        text = []
        if unseen:
            text.append(
                f"layers with gradients from a pass that was not observed: {', '.join(told)}; AdamW steps them; "
                "observed is what the very module that the optimizer was given calls in training mode, as far as its "
                "output depends on it"
            )
        if left:
            text.append(f"parameters unfrozen since: {', '.join(left)}; hand them to add_param_group to train them")
        if text and self._strict:
            raise RuntimeError("; ".join(text))
        self._told.update(unseen, left)
        if text:
            warnings.warn("; ".join(text), stacklevel=4)


def _moves(parameters: Iterable[nn.Parameter]) -> bool:
    return any(p.requires_grad and p.grad is not None and bool(p.grad.any()) for p in parameters)
