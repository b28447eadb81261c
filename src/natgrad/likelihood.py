"""Likelihoods: what a model's output means, so that labels can be drawn from the model itself.

A likelihood turns the output f of the model into *seeds*: gradients of the negative log-likelihood (NLL) with respect
to f, which the engine sends backwards through the network. Three kinds, F = 1/count sum seed seed^T pulled back:

* ``sampled``: labels drawn from p(y | f);  * ``exact``: the columns of S with S S^T = Hessian of the NLL in f;
* ``empirical``: the true labels.

A *loss term* is one NLL; ``count`` is the number of terms. A loss that is a multiple of the NLL (``reduction="mean"``
over the outputs of a term, as in torch's ``MSELoss`` and ``BCEWithLogitsLoss``) has its Fisher multiplied by the same
factor, so that damping refers to the loss that is really minimised. Seeds carry the square root of that factor.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Pointer = str | int | Callable[[Any], Tensor] | None


@dataclass(frozen=True, kw_only=True)
class Likelihood(ABC):
    """The interface. Events are kept as (n, terms, dim): examples, loss terms of an example, outputs of a term.

    ``output`` points at the logits or means inside what the model returns: a key or attribute name, an index, or a
    function; ``None`` where the model returns a tensor.
    """

    output: Pointer = None

    def select(self, output: Any) -> Tensor:
        """The tensor that ``output`` points at; ``ValueError`` if there is none."""
        try:
            found = _look_up(output, self.output)
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise ValueError(f"{self!r}: no output at {self.output!r} in a {type(output).__name__}") from error
        if not isinstance(found, Tensor):
            raise ValueError(
                f"{type(self).__name__} needs a tensor of model outputs, got {type(found).__name__}; point at the "
                f"tensor with output=, a key, an index or a function "
                f"(for example {type(self).__name__}(output='logits'))"
            )
        if not found.is_floating_point() or found.ndim == 0:
            raise ValueError(
                f"{type(self).__name__} needs a floating-point output with a batch dimension, got "
                f"{found.dtype} of shape {tuple(found.shape)}"
            )
        self.check(found)
        return found

    def check(self, output: Tensor) -> None:
        """Raise ``ValueError`` where this likelihood has no meaning for outputs of this shape."""

    def events(self, output: Tensor) -> Tensor:
        """The output as (n, terms, dim)."""
        return output.reshape(output.shape[0], -1, output.shape[-1] if output.ndim > 1 else 1)

    def unevents(self, events: Tensor, output: Tensor) -> Tensor:
        """(n, terms, dim) in the shape of the output."""
        return events.reshape(output.shape)

    def weights(self, output: Tensor, targets: Tensor | None) -> Tensor | None:
        """The weight (n, terms) of each loss term, 0 where it is ignored; ``None`` if all are 1."""
        return None

    def counted(self, output: Tensor, targets: Tensor | None) -> Tensor | None:
        """What each loss term adds to the divisor of a mean loss: by default its weight."""
        return self.weights(output, targets)

    def scale(self, output: Tensor) -> float:
        """The loss as a multiple of the NLL."""
        return 1.0

    def capacity(self, output: Tensor) -> float:
        """The largest entropy of one loss term, in the units of the loss (nats, times its scale)."""
        return self.scale(output) * self.events(output).shape[-1] * self.entropy

    @property
    def entropy(self) -> float:
        """The largest entropy of one output in nats."""
        return 0.5

    @abstractmethod
    def check_targets(self, output: Tensor, targets: Tensor) -> None:
        """Raise ``ValueError`` for targets that do not fit the output."""

    @abstractmethod
    def residual(self, output: Tensor, uniform: Tensor) -> Tensor:
        """The gradient of the NLL at a label drawn by inversion from ``uniform`` (n, terms, dim) in (0, 1)."""

    @abstractmethod
    def factor(self, output: Tensor) -> Tensor:
        """S (dim, n, terms, dim): column c of the factor of the NLL's Hessian, S S^T = sum over the first dimension."""

    @abstractmethod
    def nll(self, output: Tensor, targets: Tensor) -> Tensor:
        """The sum of the negative log-likelihoods of the terms, weighted, up to a constant; differentiable."""

    @abstractmethod
    def hessian_product(self, output: Tensor, V: Tensor, targets: Tensor | None = None) -> Tensor:
        """The Hessian of the loss (scale and weights included) in the output, times V, in the shape of the output."""

    # What the engine calls.

    def sampled(
        self, output: Tensor, draws: int, generator: torch.Generator, targets: Tensor | None = None
    ) -> Iterator[Tensor]:
        """``draws`` seeds with labels from the model; one uniform number per output and draw, example by example."""
        n, terms, dim = self.events(output).shape
        uniform = torch.rand((n, terms, dim, draws), generator=generator, device=output.device)
        for draw in uniform.clamp_(1e-7, 1 - 1e-7).unbind(-1):
            yield self._seed(self.residual(output, draw.to(output.dtype)), output, targets)

    def exact(self, output: Tensor, targets: Tensor | None = None) -> Iterator[Tensor]:
        """terms * dim seeds, one per output direction of an example, scaled so that their *mean* is the Hessian."""
        columns = self.factor(output)
        dim, _, terms, _ = columns.shape
        for term in range(terms):
            here = torch.zeros(terms, 1, dtype=output.dtype, device=output.device)
            here[term] = (terms * dim) ** 0.5
            for column in columns:
                yield self._seed(column * here, output, targets)

    def empirical(self, output: Tensor, targets: Tensor) -> Iterator[Tensor]:
        """One seed: the gradient of the NLL at the true labels."""
        self.check_targets(output, targets)
        with torch.enable_grad():
            leaf = output.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(self.nll(leaf, targets), leaf)
        weights = self.weights(output, targets)
        if weights is not None:  # nll carries the weight, a seed its square root
            gradient = self.unevents(
                self.events(gradient) * weights.clamp(min=1e-30).rsqrt().unsqueeze(-1) * (weights > 0).unsqueeze(-1),
                output,
            )
        yield gradient * self.scale(output) ** 0.5

    def _seed(self, events: Tensor, output: Tensor, targets: Tensor | None) -> Tensor:
        weights = self.weights(output, targets)
        if weights is not None:
            events = events * weights.sqrt().unsqueeze(-1)
        return self.unevents(events * self.scale(output) ** 0.5, output)


@dataclass(frozen=True, kw_only=True)
class Categorical(Likelihood):
    """Softmax over ``class_dim`` (default the last dimension; 1 for images of class scores (n, C, h, w)).

    Loss terms are all other positions. ``label_smoothing``, ``weight`` (one per class) and ``ignore_index`` mean what
    they mean in ``torch.nn.functional.cross_entropy``. The Hessian of a term is w (diag p - p p^T), with w = 1 without
    class weights (label smoothing does not change it), else (1 - smoothing) weight[target] + smoothing mean(weight);
    where targets are unknown their expectation under p. A term counts weight[target] in the number of terms, as in
    torch's mean (which leaves smoothing out of the divisor).
    """

    class_dim: int = -1
    label_smoothing: float = 0.0
    weight: Tensor | None = None
    ignore_index: int | None = None

    def __post_init__(self) -> None:
        """Refuse settings outside their range."""
        if not 0 <= self.label_smoothing <= 1:
            raise ValueError(f"label_smoothing must be in [0, 1], got {self.label_smoothing!r}")
        if self.weight is not None and (self.weight.ndim != 1 or not (self.weight >= 0).all()):
            raise ValueError("weight must be a vector of numbers >= 0, one per class")

    def check(self, output: Tensor) -> None:
        """At least two classes, and as many as there are class weights."""
        if output.ndim < 2 or not -output.ndim <= self.class_dim < output.ndim or output.shape[self.class_dim] < 2:
            raise ValueError(
                f"Categorical(class_dim={self.class_dim}) needs at least 2 classes, got an output of shape "
                f"{tuple(output.shape)}; for one logit an example use Bernoulli"
            )
        if self.weight is not None and len(self.weight) != output.shape[self.class_dim]:
            raise ValueError(f"{len(self.weight)} class weights for {output.shape[self.class_dim]} classes")

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
        """weight[target], 0 where the target is ``ignore_index``."""
        if self.ignore_index is not None and targets is None:
            raise ValueError(
                "Categorical(ignore_index=...) needs to know the targets: call optimizer.targets(y) before the forward"
            )
        if self.weight is None and self.ignore_index is None:
            return None
        return self._unless_ignored(self._chosen(output, targets), targets)

    def capacity(self, output: Tensor) -> float:
        """log C for C classes."""
        return math.log(output.shape[self.class_dim])

    def residual(self, output: Tensor, uniform: Tensor) -> Tensor:
        """p - onehot(y)."""
        p = self.events(output).softmax(-1)
        label = (p.cumsum(-1) < uniform[..., :1]).sum(-1, keepdim=True).clamp(max=p.shape[-1] - 1)
        return p.scatter_add(-1, label, torch.full_like(p[..., :1], -1.0))

    def factor(self, output: Tensor) -> Tensor:
        """sqrt(p_c) (e_c - p)."""
        p = self.events(output).softmax(-1)
        eye = torch.eye(p.shape[-1], dtype=p.dtype, device=p.device)
        return p.sqrt().movedim(-1, 0).unsqueeze(-1) * (eye[:, None, None, :] - p)

    def nll(self, output: Tensor, targets: Tensor) -> Tensor:
        """Cross entropy, summed."""
        events = self.events(output).flatten(0, 1)
        ignored = -100 if self.ignore_index is None else self.ignore_index
        weight = None if self.weight is None else self._class_weight(events)
        return F.cross_entropy(
            events,
            targets.reshape(-1),
            weight,
            ignore_index=ignored,
            reduction="sum",
            label_smoothing=self.label_smoothing,
        )

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
        kept = targets if self.ignore_index is None else targets.masked_fill(targets == self.ignore_index, 0)
        return class_weight[kept.reshape(events.shape[:2])]

    def _unless_ignored(self, weights: Tensor, targets: Tensor | None) -> Tensor:
        if targets is None or self.ignore_index is None:
            return weights
        return weights * (targets != self.ignore_index).reshape(weights.shape)

    def _class_weight(self, events: Tensor) -> Tensor:
        return torch.ones_like(events[0, 0]) if self.weight is None else self.weight.to(events)


@dataclass(frozen=True, kw_only=True)
class _Elementwise(Likelihood):
    """One distribution per output; ``reduction`` says how the loss combines the outputs of one term.

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

    def check_targets(self, output: Tensor, targets: Tensor) -> None:
        """The shape of the output."""
        if targets.shape != output.shape:
            raise ValueError(
                f"{type(self).__name__} needs targets of the output's shape {tuple(output.shape)}, "
                f"got {tuple(targets.shape)}"
            )

    def factor(self, output: Tensor) -> Tensor:
        """sqrt(h_c) e_c, h the diagonal Hessian."""
        h = self.curvature(self.events(output))
        return h.sqrt().unsqueeze(0) * torch.eye(h.shape[-1], dtype=h.dtype, device=h.device)[:, None, None, :]

    def scale(self, output: Tensor) -> float:
        """1, or 1/dim under the mean."""
        return 1.0 if self.reduction == "sum" else 1.0 / self.events(output).shape[-1]

    def hessian_product(self, output: Tensor, V: Tensor, targets: Tensor | None = None) -> Tensor:
        """h * v."""
        return self.scale(output) * self.curvature(output) * V

    @abstractmethod
    def curvature(self, events: Tensor) -> Tensor:
        """The second derivative of the NLL in each output."""


@dataclass(frozen=True, kw_only=True)
class Bernoulli(_Elementwise):
    """Independent Bernoulli outputs given as logits; the NLL is ``binary_cross_entropy_with_logits``."""

    @property
    def entropy(self) -> float:
        """log 2."""
        return math.log(2)

    def residual(self, output: Tensor, uniform: Tensor) -> Tensor:
        """sigmoid(f) - y."""
        p = self.events(output).sigmoid()
        return p - (uniform < p).to(p.dtype)

    def curvature(self, events: Tensor) -> Tensor:
        """p (1 - p)."""
        p = events.sigmoid()
        return p * (1 - p)

    def nll(self, output: Tensor, targets: Tensor) -> Tensor:
        """Binary cross entropy on logits, summed."""
        return F.binary_cross_entropy_with_logits(output, targets.to(output.dtype), reduction="sum")


@dataclass(frozen=True, kw_only=True)
class Gaussian(_Elementwise):
    """Independent unit-variance normal outputs; the NLL is half the squared error.

    ``reduction="sum"``: the loss is 1/2 |f - y|^2 per term. ``"mean"``: torch's ``MSELoss``, 2/dim times that.
    """

    def residual(self, output: Tensor, uniform: Tensor) -> Tensor:
        """f - y, a standard normal number."""
        return torch.special.ndtri(uniform)

    def curvature(self, events: Tensor) -> Tensor:
        """1."""
        return torch.ones_like(events)

    def scale(self, output: Tensor) -> float:
        """1, or 2/dim under the mean, which torch takes of the whole square."""
        return 1.0 if self.reduction == "sum" else 2.0 / self.events(output).shape[-1]

    def nll(self, output: Tensor, targets: Tensor) -> Tensor:
        """Half the squared error, summed."""
        return 0.5 * (output - targets).square().sum()


def _look_up(output: Any, pointer: Pointer) -> Any:
    if pointer is None:
        return output
    if callable(pointer):
        return pointer(output)
    if isinstance(pointer, str) and not isinstance(output, Mapping):
        return getattr(output, pointer)
    return output[pointer]
