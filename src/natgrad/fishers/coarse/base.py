"""The interface of a coarse level, and coarse spaces on the Fisher of the observed examples."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

from natgrad.capture import Capture
from natgrad.fishers.base import Part
from natgrad.fishers.coarse.galerkin import TwoLevelMap
from natgrad.fishers.coarse.observed import ObservedFisher, observe_examples
from natgrad.fishers.statistics import Stats
from natgrad.matrix import LinearMap, NetworkMap

Form = Literal["residual", "additive", "balanced"]


class CoarseLevel(ABC):
    """What couples the layers of a :class:`~natgrad.fishers.TwoLevel`: statistics of its own, and the joint map."""

    forms: ClassVar[tuple[Form, ...]] = ("residual", "additive", "balanced")

    @abstractmethod
    def observe_together(self, seen: Mapping[str, Sequence[Capture]]) -> dict[str, Stats]:
        """The coarse statistics of one observation, for every layer that saw anything."""

    @abstractmethod
    def couple(self, parts: Mapping[str, Part], form: Form, omega: float) -> NetworkMap:
        """The map of the whole network; the statistics of ``parts`` are the coarse ones."""

    def merge(self, old: Stats | None, new: Stats, decay: float) -> Stats:
        """Over time: by default the new ones."""
        return new


class CoarseSpace(CoarseLevel):
    """A few directions R_k of every layer, in which the Fisher of the latest examples is inverted exactly.

    F_c = R0 (F + damping I) R0^T = Y^T Y / count + damping R0 R0^T with Y_nk = <DW_n, R_k>: (m, m). Every R_k lives in
    one layer; those of a layer are made orthonormal, over all groups of a convolution, which leaves their span and so
    the correction as it is. A new space is a subclass, a frozen dataclass with :meth:`vectors`.
    """

    moves: ClassVar[bool] = False
    """Whether the directions depend on the residual, so that they are made anew at every step."""

    @abstractmethod
    def vectors(self, inverse: LinearMap, r: Tensor) -> Tensor:
        """Directions (k, *groups, out, in) of one layer, from its fine inverse and, if it ``moves``, its residual r."""

    def basis(self, inverse: LinearMap, r: Tensor) -> Tensor:
        """Orthonormal directions with the same span."""
        V = self.vectors(inverse, r)
        return torch.linalg.qr(V.flatten(1).mT).Q.mT.reshape(-1, *V.shape[1:])

    def observe_together(self, seen: Mapping[str, Sequence[Capture]]) -> dict[str, Stats]:
        """The examples themselves, which later ones replace."""
        return observe_examples(seen)

    def couple(self, parts: Mapping[str, Part], form: Form, omega: float) -> NetworkMap:
        """The fine inverses and the coarse correction, on the examples of ``parts``."""
        fine = {name: part.inverse for name, part in parts.items()}
        damping = {name: part.damping for name, part in parts.items()}
        examples = ObservedFisher.of({name: part.stats for name, part in parts.items()})
        return TwoLevelMap(examples, fine, damping, self.basis, self.moves, form, omega)
