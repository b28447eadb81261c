"""Sums of losses: several heads, or a residual and a boundary condition."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from natgrad.likelihoods.base import Likelihood, Objective, look_up


class _Part(NamedTuple):
    """A part that is in this forward pass: its place, likelihood, output and targets, and c_k / count_k."""

    place: int
    likelihood: Likelihood
    output: Tensor
    targets: Tensor | None
    factor: float | Tensor


@dataclass(frozen=True)
class LossSum(Objective):
    """The loss is sum_k c_k L_k with L_k the mean over the loss terms of part k; F = sum_k c_k F_k.

    ``parts`` are pairs (c_k, likelihood), every likelihood with an ``output`` that points at its own tensor, all with
    the examples first. Where the model returns None for a part, that part is not in this forward pass: the parts may
    come from several passes before one step, each part equally often and with all layers taking part. Passes with the
    same parts weigh equally, whatever their numbers of examples, as means of means do. Targets, where one is needed,
    are a sequence with one entry, or None, for every part. The default damping and step size count in units of the
    last pass: where parts of very different c_k come apart, that with the largest should come last.

    Raises ``ValueError`` for no parts, a coefficient that is not positive, a pass without any part, and outputs of one
    pass that differ in their number of examples.
    """

    parts: Sequence[tuple[float, Likelihood]]

    def __post_init__(self) -> None:
        """Refuse parts without meaning."""
        pairs = [isinstance(part, tuple) and len(part) == 2 and isinstance(part[1], Likelihood) for part in self.parts]
        if not pairs or not all(pairs):
            raise ValueError(f"parts must be pairs (coefficient, likelihood), at least one, got {self.parts!r}")
        if not all(0 < c < math.inf for c, _ in self.parts):
            raise ValueError(f"coefficients must be finite numbers > 0, got {[c for c, _ in self.parts]}")

    def select(self, output: Any) -> tuple[Tensor, ...]:
        """The tensors of all parts, empty where the model returned None."""
        whole = look_up(output, self.output)
        found = [None if part.absent(whole) else part.select(whole) for _, part in self.parts]
        present = [tensor for tensor in found if tensor is not None]
        if len({len(tensor) for tensor in present}) != 1:
            shapes = [tensor if tensor is None else tuple(tensor.shape) for tensor in found]
            raise ValueError(f"LossSum needs outputs for the same examples, at least one, got {shapes}")
        return tuple(present[0].new_empty(0) if tensor is None else tensor for tensor in found)

    def terms(self, output: tuple[Tensor, ...], targets: Any) -> Tensor:
        """(n, 1), all equal; those of all passes of a step add up to 1, and every part has the same share of it."""
        present = [tensor for tensor in output if len(tensor)]
        n = len(present[0])
        return present[0].new_full((n, 1), len(present) / (n * len(self.parts)))

    def scale(self, output: tuple[Tensor, ...]) -> float:
        """The mean over the parts of c_k times their scale."""
        scales = [c * part.scale(tensor) for (c, part), tensor in self._present(output)]
        return sum(scales) / len(scales)

    @property
    def saturates(self) -> bool:
        """If all parts do."""
        return all(part.saturates for _, part in self.parts)

    def capacity(self, output: tuple[Tensor, ...]) -> float:
        """The sum over the parts of c_k times their capacity."""
        return sum(c * part.capacity(tensor) for (c, part), tensor in self._present(output))

    def sampled(
        self, output: tuple[Tensor, ...], draws: int, generator: torch.Generator, targets: Any = None
    ) -> Iterator[tuple[Tensor, ...]]:
        """Seeds of all parts at once, whose labels are independent."""
        parts = self._parts(output, targets)
        seeds = [part.likelihood.sampled(part.output, draws, generator, part.targets) for part in parts]
        return self._joined(output, parts, seeds)

    def empirical(self, output: tuple[Tensor, ...], targets: Any) -> Iterator[tuple[Tensor, ...]]:
        """One seed: the gradients at the true labels of all parts."""
        parts = self._parts(output, targets)
        missing = [part.place for part in parts if part.targets is None]
        if missing:
            raise ValueError(f"the empirical estimator needs targets, but parts {missing} have none")
        seeds = [part.likelihood.empirical(part.output, part.targets) for part in parts if part.targets is not None]
        return self._joined(output, parts, seeds)

    def exact(self, output: tuple[Tensor, ...], targets: Any = None) -> Iterator[tuple[Tensor, ...]]:
        """The seeds of one part after the other."""
        parts = self._parts(output, targets)
        directions = [part.likelihood.events(part.output)[0].numel() for part in parts]
        for part, own in zip(parts, directions, strict=True):
            factor = (part.factor * sum(directions) / own) ** 0.5
            for seed in part.likelihood.exact(part.output, part.targets):
                yield tuple(factor * seed if k == part.place else torch.zeros_like(o) for k, o in enumerate(output))

    def hessian_product(
        self, output: tuple[Tensor, ...], V: tuple[Tensor, ...], targets: Any = None
    ) -> tuple[Tensor, ...]:
        """Part by part."""
        products = [torch.zeros_like(tensor) for tensor in output]
        for part in self._parts(output, targets):
            H = part.likelihood.hessian_product
            products[part.place] = part.factor * H(part.output, V[part.place], part.targets)
        return tuple(products)

    def _joined(
        self, output: tuple[Tensor, ...], parts: list[_Part], seeds: list[Iterator[Tensor]]
    ) -> Iterator[tuple[Tensor, ...]]:
        for together in zip(*seeds, strict=True):
            whole = [torch.zeros_like(tensor) for tensor in output]
            for part, seed in zip(parts, together, strict=True):
                whole[part.place] = part.factor**0.5 * seed
            yield tuple(whole)

    def _present(self, output: tuple[Tensor, ...]) -> list[tuple[tuple[float, Likelihood], Tensor]]:
        return [(part, tensor) for part, tensor in zip(self.parts, output, strict=True) if len(tensor)]

    def _parts(self, output: tuple[Tensor, ...], targets: Any) -> list[_Part]:
        if targets is None:
            targets = [None] * len(self.parts)
        if isinstance(targets, Tensor) or len(targets) != len(self.parts):
            raise ValueError(f"LossSum needs a sequence of {len(self.parts)} targets, one (or None) for every part")
        found = []
        for k, ((c, likelihood), tensor) in enumerate(zip(self.parts, output, strict=True)):
            if len(tensor):
                terms = likelihood.terms(tensor, targets[k])
                count = terms.sum().clamp(min=1e-30) if isinstance(terms, Tensor) else terms * len(tensor)
                found.append(_Part(k, likelihood, tensor, targets[k], c / count))
        return found
