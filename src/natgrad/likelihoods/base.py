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

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from natgrad.likelihoods.forms import Reading, along

Inputs = Literal["logits", "probabilities"]
Pointer = str | int | Callable[[Any], Tensor] | None


@dataclass(frozen=True, kw_only=True)
class Objective(ABC):
    """What the engine asks of a loss: seeds, and in which numbers to read them.

    Outputs, targets, seeds and V are tensors like the output, or tuples of them where the loss reads several outputs.
    """

    output: Pointer = None

    @property
    def saturates(self) -> bool:
        """Whether the Hessian can vanish where the gradient does not: at probabilities of 0 and 1."""
        return False

    @abstractmethod
    def select(self, output: Any) -> Any:
        """The outputs that the loss reads, in what the model returns; ``ValueError`` if there are none."""

    @abstractmethod
    def terms(self, output: Any, targets: Any) -> Tensor | float:
        """What each loss term (n, terms) counts, or the number of terms of one example if all count 1."""

    @abstractmethod
    def scale(self, output: Any) -> float:
        """The loss as a multiple of the NLL."""

    @abstractmethod
    def capacity(self, output: Any) -> float:
        """The largest entropy of one loss term, in the units of the loss (nats, times its scale)."""

    @abstractmethod
    def sampled(self, output: Any, draws: int, generator: torch.Generator, targets: Any = None) -> Iterator[Any]:
        """``draws`` seeds with labels from the model."""

    @abstractmethod
    def exact(self, output: Any, targets: Any = None) -> Iterator[Any]:
        """Seeds, one per output direction of an example, whose *mean* of seed seed^T is the Hessian."""

    @abstractmethod
    def empirical(self, output: Any, targets: Any) -> Iterator[Any]:
        """One seed: the gradient of the NLL at the true labels."""

    @abstractmethod
    def hessian_product(self, output: Any, V: Any, targets: Any = None) -> Any:
        """The Hessian of the loss, summed over terms, in the output (scale and weights included), times V."""

    def reading(self, output: Any, gradient: Any, targets: Any = None) -> Reading | None:
        """The weights that a loss with this ``gradient`` in the output gives its terms, if it is of this form."""
        return None

    def misread(self, output: Any) -> str | None:
        """What is wrong with this likelihood for such outputs, whatever the loss, where that is sure."""
        return None

    def complaint(self, output: Any, gradient: Any) -> str | None:
        """What is wrong with this likelihood for a loss with this ``gradient`` in the output, where that is sure."""
        return None


@dataclass(frozen=True, kw_only=True)
class Likelihood(Objective):
    """One loss term after the other. Events are kept as (n, terms, dim): examples, terms of an example, their outputs.

    ``output`` points at the logits or means inside what the model returns: a key or attribute name, an index, or a
    function; ``None`` where the model returns a tensor.
    """

    def absent(self, output: Any) -> bool:
        """Whether ``output`` points at None."""
        return self._pointed(output) is None

    def select(self, output: Any) -> Tensor:
        """The tensor that ``output`` points at; ``ValueError`` if there is none."""
        found = self._pointed(output)
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
        return self.parameter(found)

    def parameter(self, output: Tensor) -> Tensor:
        """The output as the parameter that all other methods read: by default itself."""
        return output

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

    def terms(self, output: Tensor, targets: Tensor | None) -> Tensor | float:
        """``counted``, or the number of terms of one example."""
        weights = self.counted(output, targets)
        return float(self.events(output).shape[1]) if weights is None else weights

    def scale(self, output: Tensor) -> float:
        """The loss as a multiple of the NLL: 1."""
        return 1.0

    def capacity(self, output: Tensor) -> float:
        """The scale times the largest entropy of every output."""
        return self.scale(output) * self.events(output).shape[-1] * self.entropy

    @property
    def entropy(self) -> float:
        """The largest entropy of one output in nats."""
        return 0.5

    @abstractmethod
    def check_targets(self, output: Tensor, targets: Tensor) -> None:
        """Raise ``ValueError`` for targets that do not fit the output."""

    @abstractmethod
    def residual(self, output: Tensor, uniform: Tensor, targets: Tensor | None = None) -> Tensor:
        """The gradient of the NLL at a label drawn by inversion from ``uniform`` (n, terms, dim) in (0, 1)."""

    @abstractmethod
    def factor(self, output: Tensor, targets: Tensor | None = None) -> Tensor:
        """S (dim, n, terms, dim): column c of the factor of the NLL's Hessian, S S^T = sum over the first dimension."""

    @abstractmethod
    def nll(self, output: Tensor, targets: Tensor) -> Tensor:
        """The sum of the negative log-likelihoods of the terms, weighted, up to a constant; differentiable."""

    @abstractmethod
    def hessian_product(self, output: Tensor, V: Tensor, targets: Tensor | None = None) -> Tensor:
        """The Hessian of the loss (scale and weights included) in the output, times V, in the shape of the output."""

    # What the engine calls.

    def reading(self, output: Tensor, gradient: Tensor, targets: Tensor | None = None) -> Reading | None:
        """By the targets, where they are known and the gradient is that of the NLL at them; else by its form."""
        if isinstance(targets, Tensor):
            known = along(gradient, self._gradient(output, targets))
            if known.own:
                terms = self.terms(output, targets)
                count = float(terms.sum() if isinstance(terms, Tensor) else terms * len(output))
                return Reading(known.c * count, known.c * count, True)
        return self.form_reading(output, gradient)

    def form_reading(self, output: Tensor, gradient: Tensor) -> Reading | None:
        """The weights of the terms by the form of the gradient alone."""
        return None

    def _gradient(self, output: Tensor, targets: Tensor) -> Tensor:
        """Of the NLL sum at the true labels."""
        self.check_targets(output, targets)
        with torch.enable_grad():
            leaf = output.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(self.nll(leaf, targets), leaf)
        return gradient

    def sampled(
        self, output: Tensor, draws: int, generator: torch.Generator, targets: Tensor | None = None
    ) -> Iterator[Tensor]:
        """``draws`` seeds with labels from the model."""
        for uniform in self._uniform(output, draws, generator):
            yield self._seed(self.residual(output, uniform, targets), output, targets)

    def exact(self, output: Tensor, targets: Tensor | None = None) -> Iterator[Tensor]:
        """terms * dim seeds, one per output direction of an example, scaled so that their *mean* is the Hessian."""
        columns = self.factor(output, targets)
        dim, _, terms, _ = columns.shape
        for term in range(terms):
            here = torch.zeros(terms, 1, dtype=output.dtype, device=output.device)
            here[term] = (terms * dim) ** 0.5
            for column in columns:
                yield self._seed(column * here, output, targets)

    def empirical(self, output: Tensor, targets: Tensor) -> Iterator[Tensor]:
        """One seed: the gradient of the NLL at the true labels."""
        gradient = self._gradient(output, targets)
        weights = self.weights(output, targets)
        if weights is not None:  # nll carries the weight, a seed its square root
            gradient = self.unevents(
                self.events(gradient) * weights.clamp(min=1e-30).rsqrt().unsqueeze(-1) * (weights > 0).unsqueeze(-1),
                output,
            )
        yield gradient * self.scale(output) ** 0.5

    def _uniform(self, output: Tensor, draws: int, generator: torch.Generator) -> Iterator[Tensor]:
        """``draws`` tensors (n, terms, dim) in (0, 1), drawn example by example."""
        n, terms, dim = self.events(output).shape
        uniform = torch.rand((n, terms, dim, draws), generator=generator, device=output.device)
        for draw in uniform.clamp_(1e-7, 1 - 1e-7).unbind(-1):
            yield draw.to(output.dtype)

    def _pointed(self, output: Any) -> Any:
        try:
            return look_up(output, self.output)
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise ValueError(f"{self!r}: no output at {self.output!r} in a {type(output).__name__}") from error

    def _seed(self, events: Tensor, output: Tensor, targets: Tensor | None) -> Tensor:
        weights = self.weights(output, targets)
        if weights is not None:
            events = events * weights.sqrt().unsqueeze(-1)
        return self.unevents(events * self.scale(output) ** 0.5, output)


def check_inputs(inputs: str) -> None:
    """Raise ``ValueError`` for a kind of output that is none."""
    if inputs not in get_args(Inputs):
        raise ValueError(f"inputs must be one of {', '.join(map(repr, get_args(Inputs)))}, got {inputs!r}")


def tiny(output: Tensor) -> float:
    """A probability next to 0."""
    return torch.finfo(output.dtype).eps


def look_up(output: Any, pointer: Pointer) -> Any:
    """What a pointer leads to."""
    if pointer is None:
        return output
    if callable(pointer):
        return pointer(output)
    if isinstance(pointer, str) and not isinstance(output, Mapping):
        return getattr(output, pointer)
    return output[pointer]
