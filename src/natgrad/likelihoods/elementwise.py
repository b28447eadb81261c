"""What likelihoods share whose terms are the last dimensions of the output, and those that treat outputs one by one."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from natgrad.likelihoods.base import Likelihood
from natgrad.likelihoods.forms import softmax_form


@dataclass(frozen=True, kw_only=True)
class Reduced(Likelihood):
    """``reduction`` says how the loss combines the outputs of one term.

    A term is the last ``event_dims`` dimensions of the output (all outputs of an image: 3), the terms are the leading
    ones; ``reduction="sum"`` adds over the outputs of a term, ``"mean"`` is torch's default mean over everything.
    """

    reduction: Literal["sum", "mean"] = "sum"
    event_dims: int = 1

    def __post_init__(self) -> None:
        """Refuse settings outside their range."""
        if self.reduction not in ("sum", "mean"):
            raise ValueError(f"reduction must be 'sum' or 'mean', got {self.reduction!r}")
        if self.event_dims < 0:
            raise ValueError(f"event_dims must be at least 0, got {self.event_dims!r}")

    def events(self, output: Tensor) -> Tensor:
        """The last ``event_dims`` dimensions as one."""
        dims = min(self.event_dims, output.ndim - 1)
        return output.reshape(output.shape[0], -1, output.shape[output.ndim - dims :].numel())

    def scale(self, output: Tensor) -> float:
        """1, or 1/dim under the mean."""
        return 1.0 if self.reduction == "sum" else 1.0 / self.events(output).shape[-1]


@dataclass(frozen=True, kw_only=True)
class Elementwise(Reduced):
    """One distribution per output."""

    def check_targets(self, output: Tensor, targets: Tensor) -> None:
        """The shape of the output."""
        if targets.shape != output.shape:
            raise ValueError(
                f"{type(self).__name__} needs targets of the output's shape {tuple(output.shape)}, "
                f"got {tuple(targets.shape)}"
            )

    def factor(self, output: Tensor, targets: Tensor | None = None) -> Tensor:
        """sqrt(h_c) e_c, h the diagonal Hessian."""
        h = self.curvature(self.events(output))
        return h.sqrt().unsqueeze(0) * torch.eye(h.shape[-1], dtype=h.dtype, device=h.device)[:, None, None, :]

    def hessian_product(self, output: Tensor, V: Tensor, targets: Tensor | None = None) -> Tensor:
        """h * v."""
        return self.scale(output) * self.curvature(output) * V

    @abstractmethod
    def curvature(self, events: Tensor) -> Tensor:
        """The second derivative of the NLL in each output."""


def as_softmax(output: Tensor, gradient: Tensor) -> str | None:
    """The complaint about a loss whose gradient is p - y, p the softmax over the last or the second dimension."""
    for dim in dict.fromkeys((output.ndim - 1, 1)) if output.ndim > 1 else ():
        classes = output.shape[dim]
        z, g = (x.movedim(dim, -1).flatten(0, -2) for x in (output, gradient))
        if classes > 2 and softmax_form(z, g).sure:
            say = "Categorical()" if dim == output.ndim - 1 else f"Categorical(class_dim={dim})"
            return (
                "the gradient of the loss at the output is that of cross_entropy, a softmax over the "
                f"{classes} entries of dimension {dim}: say {say}"
            )
    return None
