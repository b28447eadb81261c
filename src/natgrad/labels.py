"""Which labels the Fisher is taken over: drawn from the model, all of them, or the true ones (methods: estimators)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from natgrad.likelihoods import Objective

Estimator = Literal["exact", "sampled", "empirical"]


def check_estimator(estimator: str) -> str:
    """The name itself, or a ``ValueError`` that lists the names."""
    if estimator not in get_args(Estimator):
        raise ValueError(f"estimator must be one of {', '.join(map(repr, get_args(Estimator)))}, got {estimator!r}")
    return estimator


@dataclass
class Labels:
    """Output gradients for one forward pass: the likelihood, the estimator, and a generator of its own.

    ``targets`` are the true labels of the coming forward pass, for the estimator ``"empirical"`` and for ignored terms;
    ``source``, if there is one, finds them in the arguments of that pass. ``factor`` is the user's loss as a multiple
    of what the likelihood says, where it was found to be one.
    """

    likelihood: Objective
    estimator: Estimator = "sampled"
    draws: int = 1
    targets: Any = None
    source: Callable[..., Any] | None = None
    generator: torch.Generator | None = None
    capacity: float = 1.0
    scale: float = 1.0
    factor: float = 1.0

    def reseed(self, seed: int) -> None:
        """Start the stream of random labels anew; on a CPU a batch draws the same labels whole or in parts."""
        self._seed, self.generator = seed, None

    def select(self, output: Any) -> Any:
        """The outputs that the likelihood reads, detached copies of which the methods below read."""
        return self.likelihood.select(output)

    def terms(self, output: Any) -> Tensor | float:
        """What each loss term (n, terms) counts, or the number of terms of one example if all count 1."""
        self.capacity, self.scale = self.likelihood.capacity(output), self.likelihood.scale(output)
        return self.likelihood.terms(output, self.targets)

    def seeds(self, output: Any) -> Iterator[Any]:
        """Gradients of the NLL sum in the output, one per draw or direction; F is the mean over them."""
        if self.estimator == "exact":
            return self.likelihood.exact(output, self.targets)
        if self.estimator == "sampled":
            return self.likelihood.sampled(
                output,
                self.draws,
                self._stream((output[0] if isinstance(output, tuple) else output).device),
                self.targets,
            )
        if self.targets is None:
            raise ValueError("the empirical estimator needs targets")
        return self.likelihood.empirical(output, self.targets)

    def signs(self, seed: Tensor) -> Tensor:
        """A random sign for every row of a seed."""
        numbers = torch.rand(len(seed), generator=self._stream(seed.device), device=seed.device)
        return (2.0 * (numbers < 0.5) - 1.0).to(seed.dtype).view(-1, *(1,) * (seed.ndim - 1))

    def _stream(self, device: torch.device) -> torch.Generator:
        if self.generator is None or self.generator.device != device:
            self.generator = torch.Generator(device).manual_seed(self._seed)
        return self.generator

    _seed: int = 0
