"""Softmax outputs: one label of several classes per term."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from natgrad.likelihoods.base import Inputs, Likelihood, check_inputs, tiny
from natgrad.likelihoods.forms import Form, Reading, are_probabilities, sigmoid_form, softmax_form


@dataclass(frozen=True, kw_only=True)
class Categorical(Likelihood):
    """Softmax over ``class_dim`` (default the last dimension; 1 for images of class scores (n, C, h, w)).

    Loss terms are all other positions. ``label_smoothing``, ``weight`` (one per class) and ``ignore_index`` mean what
    they mean in ``torch.nn.functional.cross_entropy``. The Hessian of a term is w (diag p - p p^T), with w = 1 without
    class weights (label smoothing does not change it), else (1 - smoothing) weight[target] + smoothing mean(weight);
    where targets are unknown their expectation under p. A term counts weight[target] in the number of terms, as in
    torch's mean (which leaves smoothing out of the divisor).

    ``shift``: the output (n, T, C) at position t predicts the target at t + ``shift``, and the last ``shift`` positions
    are no loss terms. It is 1 for the causal models of transformers, which move their labels themselves.

    ``inputs``: what the output is: ``"logits"`` (log-probabilities are some), or ``"probabilities"``, as after a
    softmax.
    """

    class_dim: int = -1
    label_smoothing: float = 0.0
    weight: Tensor | None = None
    ignore_index: int | None = None
    shift: int = 0
    inputs: Inputs = "logits"

    def __post_init__(self) -> None:
        """Refuse settings outside their range."""
        check_inputs(self.inputs)
        if not 0 <= self.label_smoothing <= 1:
            raise ValueError(f"label_smoothing must be in [0, 1], got {self.label_smoothing!r}")
        if self.weight is not None and (self.weight.ndim != 1 or not (self.weight >= 0).all()):
            raise ValueError("weight must be a vector of numbers >= 0, one per class")
        if not isinstance(self.shift, int) or isinstance(self.shift, bool) or self.shift < 0:
            raise ValueError(f"shift must be a whole number of at least 0, got {self.shift!r}")

    def parameter(self, output: Tensor) -> Tensor:
        """Logits."""
        return output if self.inputs == "logits" else output.clamp(min=tiny(output)).log()

    def check(self, output: Tensor) -> None:
        """At least two classes, and as many as there are class weights."""
        if output.ndim < 2 or not -output.ndim <= self.class_dim < output.ndim or output.shape[self.class_dim] < 2:
            raise ValueError(
                f"Categorical(class_dim={self.class_dim}) needs at least 2 classes, got an output of shape "
                f"{tuple(output.shape)}; for one logit an example use Bernoulli"
            )
        if self.weight is not None and len(self.weight) != output.shape[self.class_dim]:
            raise ValueError(f"{len(self.weight)} class weights for {output.shape[self.class_dim]} classes")
        if self.shift and (output.ndim != 3 or self.events(output).shape[1] <= self.shift):
            raise ValueError(
                f"Categorical(shift={self.shift}) needs sequences of more than {self.shift} positions, got an output "
                f"of shape {tuple(output.shape)}"
            )

    def check_targets(self, output: Tensor, targets: Tensor) -> None:
        """Class indices (n, ...), one per term, in range."""
        expected = output.movedim(self.class_dim, -1).shape[:-1]
        if targets.shape != expected or targets.is_floating_point():
            raise ValueError(
                f"Categorical needs integer targets of shape {tuple(expected)}, got {targets.dtype} of shape "
                f"{tuple(targets.shape)}"
            )

    def events(self, output: Tensor) -> Tensor:
        """Classes last."""
        return output.movedim(self.class_dim, -1).reshape(output.shape[0], -1, output.shape[self.class_dim])

    def unevents(self, events: Tensor, output: Tensor) -> Tensor:
        """Classes back in their place."""
        return events.reshape(output.movedim(self.class_dim, -1).shape).movedim(-1, self.class_dim)

    def weights(self, output: Tensor, targets: Tensor | None) -> Tensor | None:
        """(1 - smoothing) weight[target] + smoothing mean(weight), 0 where the target is ``ignore_index``."""
        if self.weight is None:
            return self.counted(output, targets)
        everywhere = self.label_smoothing * self.weight.to(output).mean()
        return self._unless_ignored((1 - self.label_smoothing) * self._chosen(output, targets) + everywhere, targets)

    def counted(self, output: Tensor, targets: Tensor | None) -> Tensor | None:
        """weight[target], 0 where the target is ``ignore_index`` or beyond the end."""
        if self.ignore_index is not None and targets is None:
            raise ValueError(
                "Categorical(ignore_index=...) needs to know the targets: call optimizer.targets(y) before the forward "
                "pass, or once optimizer.targets(f), with f(*args, **kwargs) of the arguments of the model"
            )
        if self.weight is None and self.ignore_index is None and not self.shift:
            return None
        return self._unless_ignored(self._chosen(output, targets), targets)

    @property
    def saturates(self) -> bool:
        """Always."""
        return True

    def capacity(self, output: Tensor) -> float:
        """log C for C classes."""
        return math.log(output.shape[self.class_dim])

    def residual(self, output: Tensor, uniform: Tensor, targets: Tensor | None = None) -> Tensor:
        """p - onehot(y)."""
        p = self.events(output).softmax(-1)
        label = (p.cumsum(-1) < uniform[..., :1]).sum(-1, keepdim=True).clamp(max=p.shape[-1] - 1)
        return p.scatter_add(-1, label, torch.full_like(p[..., :1], -1.0))

    def factor(self, output: Tensor, targets: Tensor | None = None) -> Tensor:
        """sqrt(p_c) (e_c - p)."""
        p = self.events(output).softmax(-1)
        eye = torch.eye(p.shape[-1], dtype=p.dtype, device=p.device)
        return p.sqrt().movedim(-1, 0).unsqueeze(-1) * (eye[:, None, None, :] - p)

    def nll(self, output: Tensor, targets: Tensor) -> Tensor:
        """Cross entropy, summed."""
        events = self.events(output).flatten(0, 1)
        weight = None if self.weight is None else self._class_weight(events)
        return F.cross_entropy(
            events,
            self._shifted(targets).reshape(-1),
            weight,
            ignore_index=self._ignored,
            reduction="sum",
            label_smoothing=self.label_smoothing,
        )

    def form_reading(self, output: Tensor, gradient: Tensor) -> Reading | None:
        """g = c (p - y) with a label y of every term, which need not be known."""
        return self._form(output, gradient).reading

    def misread(self, output: Tensor) -> str | None:
        """Outputs that are probabilities."""
        if are_probabilities(self.events(output).flatten(0, 1)):
            return (
                "the outputs are probabilities (all positive, with sums of 1), and are read as logits, which takes the "
                "softmax twice: let the model return logits, with cross_entropy as the loss, or, if the loss takes the "
                "logarithm of the outputs, say Categorical(inputs='probabilities')"
            )
        return None

    def complaint(self, output: Tensor, gradient: Tensor) -> str | None:
        """A softmax over another dimension; a sigmoid."""
        if self._form(output, gradient).own:
            return None
        for dim in range(1, output.ndim):
            other = replace(self, class_dim=dim, weight=None)
            if dim != self.class_dim % output.ndim and output.shape[dim] > 2 and other._form(output, gradient).sure:
                return (
                    f"the gradient of the loss at an output of shape {tuple(output.shape)} is that of a softmax over "
                    f"dimension {dim}, and Categorical reads the classes in dimension {self.class_dim}: say "
                    f"Categorical(class_dim={dim})"
                )
        if output[0].numel() > 2 and sigmoid_form(output.flatten(1), gradient.flatten(1)).sure:
            return (
                "the gradient of the loss at the output is sigmoid(f) - y, that of binary cross entropy, and not of a "
                "softmax: say Bernoulli()"
            )
        return None

    def _form(self, output: Tensor, gradient: Tensor) -> Form:
        z, g = (self.events(x).flatten(0, 1) for x in (output, gradient))
        return softmax_form(z, g, self.label_smoothing)

    def hessian_product(self, output: Tensor, V: Tensor, targets: Tensor | None = None) -> Tensor:
        """w (p * v - p (p . v))."""
        p, v = self.events(output).softmax(-1), self.events(V)
        product = p * v - p * (p * v).sum(-1, keepdim=True)
        weights = self.weights(output, targets)
        return self.unevents(product if weights is None else product * weights.unsqueeze(-1), output)

    def _chosen(self, output: Tensor, targets: Tensor | None) -> Tensor:
        events = self.events(output)
        class_weight = self._class_weight(events)
        if targets is None:
            return events.softmax(-1) @ class_weight
        self.check_targets(output, targets)
        moved = self._shifted(targets)
        if self.shift or self.ignore_index is not None:
            moved = moved.masked_fill(moved == self._ignored, 0)
        return class_weight[moved.reshape(events.shape[:2])]

    def _unless_ignored(self, weights: Tensor, targets: Tensor | None) -> Tensor:
        if self.shift:
            weights = torch.cat([weights[:, : -self.shift], torch.zeros_like(weights[:, -self.shift :])], 1)
        if targets is None or self.ignore_index is None:
            return weights
        return weights * (self._shifted(targets) != self.ignore_index).reshape(weights.shape)

    @property
    def _ignored(self) -> int:
        return -100 if self.ignore_index is None else self.ignore_index

    def _shifted(self, targets: Tensor) -> Tensor:
        """The target of every position."""
        return F.pad(targets[:, self.shift :], (0, self.shift), value=self._ignored) if self.shift else targets

    def _class_weight(self, events: Tensor) -> Tensor:
        return torch.ones_like(events[0, 0]) if self.weight is None else self.weight.to(events)
