"""Real outputs with unit variance: the squared error."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from natgrad.likelihoods.elementwise import Elementwise, as_softmax
from natgrad.likelihoods.forms import Reading, sigmoid_form, zero_target_form


@dataclass(frozen=True, kw_only=True)
class Gaussian(Elementwise):
    """Independent unit-variance normal outputs; the NLL is half the squared error.

    ``reduction="sum"``: the loss is 1/2 |f - y|^2 per term. ``"mean"``: torch's ``MSELoss``, 2/dim times that.
    """

    def residual(self, output: Tensor, uniform: Tensor, targets: Tensor | None = None) -> Tensor:
        """f - y, a standard normal number."""
        return torch.special.ndtri(uniform)

    def curvature(self, events: Tensor) -> Tensor:
        """1."""
        return torch.ones_like(events)

    def scale(self, output: Tensor) -> float:
        """1, or 2/dim under the mean, which torch takes of the whole square."""
        return 1.0 if self.reduction == "sum" else 2.0 / self.events(output).shape[-1]

    def form_reading(self, output: Tensor, gradient: Tensor) -> Reading | None:
        """g = c (f - y), where many y are 0 or 1; otherwise targets must be told."""
        form = zero_target_form(output, gradient)
        terms = self.events(output).shape[:2].numel()
        return Reading(form.c * terms, form.c * terms, True) if form.own else None

    def complaint(self, output: Tensor, gradient: Tensor) -> str | None:
        """A softmax; a sigmoid."""
        found = as_softmax(output, gradient)
        if found is None and output.numel() >= 16 and sigmoid_form(output.flatten(1), gradient.flatten(1)).sure:
            return (
                "the gradient of the loss at the output is sigmoid(f) - y, that of binary cross entropy, and not of "
                "the squared error: say Bernoulli()"
            )
        return found

    def nll(self, output: Tensor, targets: Tensor) -> Tensor:
        """Half the squared error, summed."""
        return 0.5 * (output - targets).square().sum()
