"""Damping over time: constant, or adapted by how well the quadratic model predicts (Levenberg-Marquardt)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class LevenbergMarquardt:
    """Less damping while the model predicts the loss well, more where it does not (Martens and Grosse 2015, section
    6.5).

    Every ``every`` steps lambda is multiplied by ``factor``^every where ratio = actual / predicted change of the
    loss is above 3/4, and divided by it below 1/4. The actual change is estimated without a second pass: it is the
    mean of the slopes along the step at its two ends, <M_t, delta> and <M_t+1, delta>, the latter on the *next*
    batch, so that a step that only fitted the noise of its own batch is seen as one. Both changes are averaged over
    steps with ``decay``; one counts for at most the opposite of what was predicted. A step that had to be taken back
    raises lambda at once, by two such changes.

    lambda stays in [``minimum``, ``maximum``], in units of the negative log-likelihood per squared parameter: for a
    loss that is s times that (a mean over outputs) F is damped by s lambda, so that the steps do not depend on s.
    """

    of_likelihood: ClassVar[bool] = True  # or of the loss

    initial: float = 0.005
    factor: float = 0.95
    every: int = 5
    decay: float = 0.8
    minimum: float = 1e-3
    maximum: float = 1e6

    def __post_init__(self) -> None:
        """Refuse settings outside their range."""
        if not 0 < self.minimum <= self.initial <= self.maximum:
            raise ValueError(f"need 0 < minimum <= initial <= maximum, got {self}")
        if not (0 < self.factor <= 1 and 0 <= self.decay < 1 and self.every >= 1):
            raise ValueError(f"need 0 < factor <= 1, 0 <= decay < 1 and every >= 1, got {self}")

    def adapt(self, damping: float, ratio: float) -> float:
        """The next lambda."""
        change = self.factor**self.every
        if ratio > 0.75:
            damping *= change
        elif ratio < 0.25:
            damping /= change
        return min(max(damping, self.minimum), self.maximum)

    def rejected(self, damping: float) -> float:
        """The next lambda after a step that had to be taken back."""
        return min(damping / self.factor ** (2 * self.every), self.maximum)


@dataclass(frozen=True)
class ConstantDamping:
    """The same lambda at every step, in units of the loss per squared parameter."""

    of_likelihood: ClassVar[bool] = False

    initial: float
    every: int = 1
    decay: float = 0.0

    def __post_init__(self) -> None:
        """Refuse a damping that is not positive."""
        if not 0 < self.initial < float("inf"):
            raise ValueError(f"damping must be a finite number > 0, got {self.initial!r}")

    def adapt(self, damping: float, ratio: float) -> float:
        """lambda itself."""
        return damping

    def rejected(self, damping: float) -> float:
        """lambda itself."""
        return damping


@dataclass(frozen=True)
class TraceDamping(ConstantDamping):
    """A lambda for every layer, as Gao et al. (2021) damp TKFAC on convolutional networks.

    A convolution has its own mean eigenvalue, lambda_l = max(tr F_l / dim F_l, ``floor``); the other layers of the
    same network have ``initial`` times the largest of those. Without convolutions lambda is ``initial`` everywhere. The
    traces are those of the approximation when it is refreshed; reading them costs one transfer. What a quadratic model
    of the step adds to F is ``initial``.

    The paper gives the rule in words; the formula is the reconstruction that agrees with TEKFAC's (arXiv 2011.13609,
    eq. 3.4-3.5). Reference: arXiv 2011.10741, eq. 5.16.
    """

    floor: float = 1e-8

    def __post_init__(self) -> None:
        """Refuse numbers that are not positive."""
        super().__post_init__()
        if not 0 < self.floor < float("inf"):
            raise ValueError(f"floor must be a finite number > 0, got {self.floor!r}")

    def spread(self, damping: float, means: Mapping[str, float], convolutions: Collection[str]) -> dict[str, float]:
        """lambda of every layer from the mean eigenvalues of the layers and the names of the convolutions."""
        own = {name: max(means[name], self.floor) for name in means if name in convolutions}
        rest = damping * max(own.values(), default=1.0)
        return {name: own.get(name, rest) for name in means}


Damping = LevenbergMarquardt | ConstantDamping
