"""Nothing falls back to AdamW without a word."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from natgrad.layers import Coverage
from natgrad.matrix import FactorisationError
from natgrad.optim.curvature import LayerCurvature
from natgrad.optim.step_size.base import Memory, StepSize


def without_samples(policy: StepSize, memory: Memory) -> Memory:
    """The memory of a policy for a step without a forward pass that was observed; says so, or raises."""
    why = (
        f"{type(policy).__name__} reads samples at every step, but no forward pass of the model in training mode led "
        "to these gradients"
    )
    instead = policy.unobserved(memory)
    if instead is None:
        raise RuntimeError(f"{why}; call model.train() before it, or use KLLimit() as step_size")
    warnings.warn(f"{why}: this step, and some after it, are of a set length", stacklevel=8)
    return dict(instead)


class Watch:
    """Says, once for each, which parameters have gradients and no curvature, and which nothing steps.

    A warning for what no pass was seen to use, for what nothing steps and for layers whose curvature cannot be
    factorised; with ``strict`` a ``RuntimeError``, for parameters whose use has no rule, too. ``elsewhere`` names
    parameters that another optimizer steps.
    """

    def __init__(self, strict: bool, elsewhere: Iterable[str] = ()) -> None:
        self._strict = strict
        self._told, self._fallen = set(elsewhere), set[str]()

    def __call__(
        self,
        model: nn.Module,
        found: Coverage,
        ready: Iterable[str],
        groups: Iterable[Mapping[str, Any]],
    ) -> None:
        """Look at the gradients of a step that observes; ``ready`` are the layers that have been seen."""
        covered = {id(p) for name in ready for p in found.layers[name].parameters}
        stepped = {id(p): group["rule"] for group in groups for p in group["params"]}
        unseen, unread, left = [], [], []
        for name, p in model.named_parameters():
            if name in self._told or id(p) in covered or stepped.get(id(p)) == "adamw" or not _moves([p]):
                continue
            why = found.uncovered.get(name, "")
            if id(p) not in stepped:
                left.append(name)
            elif "rule" in why or "common block" in why or why == "complex":
                unread.append(f"{name} ({why})")
            else:
                unseen.append(name)
        text = []
        if unseen:
            text.append(
                f"parameters with gradients from a pass that was not observed: {', '.join(unseen)}; AdamW steps them; "
                "observed is what the very module that the optimizer was given calls in training mode, as far as its "
                "output depends on it; name other methods in calls=, or set observe_in_eval=True"
            )
        if left:
            text.append(f"parameters unfrozen since: {', '.join(left)}; hand them to add_param_group to train them")
        if self._strict and (text or unread):
            more = (
                f"parameters that no rule reads: {', '.join(unread)}; name their modules in exclude" if unread else ""
            )
            raise RuntimeError("; ".join([*text, more] if more else text))
        self._told.update(unseen, left)
        if text:
            warnings.warn("; ".join(text), stacklevel=4)

    def fallen(self, layers: Mapping[str, str], before: Mapping[str, LayerCurvature]) -> None:
        """Say which layers AdamW steps from now on, since their curvature cannot be factorised, and why."""
        known = self._fallen.union(name for name, curvature in before.items() if curvature.aside)
        new = {name: reason for name, reason in layers.items() if name not in known}
        if not new:
            return
        text = "; ".join(f"layer {name!r}: {reason}" for name, reason in new.items())
        if self._strict:
            raise FactorisationError(text)
        self._fallen.update(new)
        warnings.warn(f"{text}; AdamW steps what has no inverse until a refresh succeeds", stacklevel=7)


def _moves(parameters: Iterable[nn.Parameter]) -> bool:
    return any(p.requires_grad and p.grad is not None and bool(p.grad.any()) for p in parameters)
