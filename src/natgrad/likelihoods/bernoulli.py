"""Binary outputs, given as logits."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from natgrad.likelihoods.base import Inputs, check_inputs, tiny
from natgrad.likelihoods.elementwise import Elementwise, as_softmax
from natgrad.likelihoods.forms import Reading, sigmoid_form


@dataclass(frozen=True, kw_only=True)
class Bernoulli(Elementwise):
    """Independent Bernoulli outputs; the NLL is ``binary_cross_entropy_with_logits``.

    ``inputs``: what the output is: ``"logits"``, or ``"probabilities"``, as after a sigmoid.
    """

    inputs: Inputs = "logits"

    def __post_init__(self) -> None:
        """Refuse settings outside their range."""
        super().__post_init__()
        check_inputs(self.inputs)

    def parameter(self, output: Tensor) -> Tensor:
        """Logits."""
        return output if self.inputs == "logits" else output.logit(eps=tiny(output))

    @property
    def saturates(self) -> bool:
        """Always."""
        return True

    @property
    def entropy(self) -> float:
        """log 2."""
        return math.log(2)

    def residual(self, output: Tensor, uniform: Tensor, targets: Tensor | None = None) -> Tensor:
        """sigmoid(f) - y."""
        p = self.events(output).sigmoid()
        return p - (uniform < p).to(p.dtype)

    def curvature(self, events: Tensor) -> Tensor:
        """p (1 - p)."""
        p = events.sigmoid()
        return p * (1 - p)

    def form_reading(self, output: Tensor, gradient: Tensor) -> Reading | None:
        """g = c (sigmoid(f) - y) with y of 0 or 1, or between."""
        z, g = (self.events(x).flatten(0, 1) for x in (output, gradient))
        found = sigmoid_form(z, g).reading
        return None if found is None else found.times(1 / z.shape[-1])

    def complaint(self, output: Tensor, gradient: Tensor) -> str | None:
        """Outputs that are probabilities; a softmax."""
        z, g = (x.flatten(1) for x in (output, gradient))
        if z.numel() < 16 or sigmoid_form(z, g).own:
            return None
        inside = bool(((z > 0) & (z < 1)).all())
        if inside and sigmoid_form(z.logit(), g * z * (1 - z)).sure:
            return (
                "the outputs are probabilities, and the gradient of the loss is that of binary_cross_entropy on them: "
                "say Bernoulli(inputs='probabilities')"
            )
        return as_softmax(output, gradient)

    def nll(self, output: Tensor, targets: Tensor) -> Tensor:
        """Binary cross entropy on logits, summed."""
        return F.binary_cross_entropy_with_logits(output, targets.to(output.dtype), reduction="sum")
