"""TwoLevel: a block-diagonal inverse with a coarse correction that joins the layers (Koroko et al. 2023)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from typing import get_args

import torch

from natgrad.capture import Capture, Kind
from natgrad.fishers.base import Approximation, Coupled, Part
from natgrad.fishers.coarse import CoarseLevel, Form, Nicolaides
from natgrad.fishers.kfac import KFAC
from natgrad.fishers.sided import for_layer
from natgrad.fishers.statistics import Stats, pool
from natgrad.matrix import LinearMap, Matrix, NetworkMap

_FINE = "fine."  # before the names of the base's statistics


@dataclass(frozen=True)
class TwoLevel(Coupled):
    """The damped inverse of ``base``, block by block, and a coarse correction in a few directions of every layer.

    With B = F + damping I, F the Fisher of the latest examples over *all* layers, R0 (m, weights) the directions of
    ``space``, F_c = R0 B R0^T, C = R0^T F_c^-1 R0 and z = F_base^-1 M, the step is by ``form``

    * ``"residual"``: z + omega C (M - B z), the best correction of z in the span of R0: at omega = 1 the squared error
      in the B-norm falls by b^T F_c b, b = F_c^-1 R0 (M - B z). As a map it is not symmetric;
    * ``"additive"``: z + omega C M, symmetric positive definite; not better than z in general;
    * ``"balanced"``: (I - C B) F_base^-1 (I - B C) M + C M, symmetric positive definite; omega has to be 1.

    The additive form is the default: the residual one solves for the Fisher of one batch at the length of F_base^-1 M,
    which overshoots, and with step sizes chosen on batches it follows their noise (measured on the digits and on MNIST
    auto-encoders).

    A step along which the loss would not fall, <D, M> <= 0, is replaced by z. Layers that saw other examples than the
    rest are joined with none. ``damping`` enters B plainly, however ``base`` damps its blocks. Under
    ``weight_sharing="reduce"`` F is that of the reduced examples.

    Cost: that of ``base``; the residual 4 n t out in and the coarse matrix 2 n t out in a vector and layer, a step
    (the matrix an observation, where the space does not move), and m^3; memory n t (in + out) for the examples. Raises
    ``ValueError`` for settings that do not go together. References: Koroko, Anciaux-Sedrakian, Ben Gharbia, Garès,
    Haddou and Tran, arXiv 2303.18083; Tselepidis, Kohler and Orvieto, arXiv 2011.00573.
    """

    base: Approximation = KFAC()
    space: CoarseLevel = Nicolaides()
    form: Form = "additive"
    omega: float = 1.0

    def __post_init__(self) -> None:
        """Refuse what does not go together."""
        if not isinstance(self.base, Approximation) or isinstance(self.base, Coupled):
            raise ValueError(f"base must be an approximation that works layer by layer, got {self.base!r}")
        if not isinstance(self.space, CoarseLevel):
            raise ValueError(f"space must be a coarse space, for example Nicolaides(), got {self.space!r}")
        if self.form not in get_args(Form):
            raise ValueError(f"form must be one of {', '.join(map(repr, get_args(Form)))}, got {self.form!r}")
        if self.form not in self.space.forms:
            known = ", ".join(map(repr, self.space.forms))
            raise ValueError(f"{type(self.space).__name__} has the form {known} only, got {self.form!r}")
        if not (isfinite(self.omega) and self.omega > 0):
            raise ValueError(f"omega must be a finite number > 0, got {self.omega!r}")
        if self.form == "balanced" and self.omega != 1:
            raise ValueError(f"the balanced form has no omega, got {self.omega!r}")

    def observe(self, seen: Capture) -> Stats:
        """As a layer without others: the statistics of ``base`` and the examples."""
        return self.observe_together({"": [seen]})[""]

    def observe_together(self, seen: Mapping[str, Sequence[Capture]]) -> dict[str, Stats]:
        """The statistics of ``base``, and those of ``space``."""
        coarse = self.space.observe_together(seen)
        return {name: _joined(pool(map(self.base.observe, seen[name])), coarse[name]) for name in coarse}

    def merge(self, old: Stats | None, new: Stats, decay: float) -> Stats:
        """Each level by its own rule."""
        fine = self.base.merge(_fine(old) if old else None, _fine(new), decay)
        return _joined(fine, self.space.merge(_coarse(old) if old else None, _coarse(new), decay))

    def assemble(self, stats: Stats, previous: Matrix | None = None) -> Matrix:
        """The matrix of ``base``."""
        return self.base.assemble(_fine(stats), previous)

    def correct(self, matrix: Matrix, seen: Sequence[Capture], decay: float) -> Matrix:
        """As ``base`` does."""
        return self.base.correct(matrix, seen, decay)

    def invert(self, matrix: Matrix, damping: float) -> LinearMap:
        """As ``base`` does."""
        return self.base.invert(matrix, damping)

    def couple(self, parts: Mapping[str, Part]) -> NetworkMap:
        """The map of the class's description."""
        coarse = {name: replace(part, stats=_coarse(part.stats)) for name, part in parts.items()}
        return self.space.couple(coarse, self.form, self.omega)

    def sided(self, kind: Kind) -> Approximation:
        """What ``base`` has for such a layer, which then stays out of the coarse level."""
        return for_layer(self.base, kind)

    def check(self, name: str, shape: torch.Size) -> None:
        """What ``base`` refuses."""
        self.base.check(name, shape)

    @property
    def refresh_every(self) -> int:  # type: ignore[override]
        """That of ``base``."""
        return self.base.refresh_every

    @property
    def corrects(self) -> bool:
        """Whether ``base`` does."""
        return self.base.corrects

    @property
    def seed(self) -> int:
        """That of ``base``."""
        return self.base.seed

    @property
    def keeps(self) -> bool:
        """Whether ``base`` does."""
        return self.base.keeps


def _joined(fine: Stats, coarse: Stats) -> Stats:
    return {**{_FINE + name: statistic for name, statistic in fine.items()}, **coarse}


def _fine(stats: Stats) -> Stats:
    return {name.removeprefix(_FINE): statistic for name, statistic in stats.items() if name.startswith(_FINE)}


def _coarse(stats: Stats) -> Stats:
    return {name: statistic for name, statistic in stats.items() if not name.startswith(_FINE)}
