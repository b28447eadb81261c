"""What the methods share that follow singular triples of the rearranged Fisher over time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from natgrad.capture import Capture, Kind
from natgrad.fishers.base import Approximation
from natgrad.fishers.kfac import KFAC
from natgrad.fishers.rearrangement import Pair, Rearrangement, unit
from natgrad.fishers.statistics import Mean, Stats, as_capture, as_samples
from natgrad.fishers.triples import average, power, stream
from natgrad.matrix import Factored, KroneckerSum
from natgrad.matrix.damping import FactoredRule, KroneckerRule
from natgrad.matrix.kronecker_sum import Guard


@dataclass(frozen=True)
class Singular(Approximation):
    """What is observed: the examples, as what becomes of them depends on the triples found so far.

    ``rule`` is the damping; ``location`` leaves out the cross terms between positions of shared weights; ``tolerance``
    bounds the residuals of a triple, relative to its singular value.
    """

    rule: KroneckerRule = Factored()
    location: bool = False
    tolerance: float = 1e-6

    def __post_init__(self) -> None:
        """Refuse a tolerance that is no small positive number."""
        if not 0 < self.tolerance < 1:
            raise ValueError(f"tolerance must be in (0, 1), got {self.tolerance!r}")

    def observe(self, seen: Capture) -> Stats:
        """The examples."""
        return as_samples(seen)

    def sided(self, kind: Kind) -> Approximation:
        """KFAC with the same damping."""
        return KFAC(self.rule).sided(kind)

    def rearranged(self, new: Stats) -> Rearrangement:
        """Z of the observed examples."""
        return Rearrangement(as_capture(new), self.location)


@dataclass(frozen=True)
class Followed(Singular):
    """Triples by power iteration, one at a time.

    * ``averaging``: ``"streaming"`` applies Z of each batch to the directions found so far and averages the products;
      ``"published"`` finds the triple of each batch and averages the factors.
    * ``inner``: applications an observation of the first.
    * ``iterations``: the most that a triple is iterated for, at the first observation, at each of the second kind, and
      wherever ``decay`` is 0 (1000 in the paper; a start that is averaged away need not be exact).
    """

    averaging: Literal["streaming", "published"] = "streaming"
    inner: int = 1
    iterations: int = 100

    def __post_init__(self) -> None:
        """Refuse an unknown ``averaging``, and numbers that are not whole and positive."""
        super().__post_init__()
        if self.averaging not in ("streaming", "published"):
            raise ValueError(f"averaging must be 'streaming' or 'published', got {self.averaging!r}")
        check_whole(inner=self.inner, iterations=self.iterations)

    def follow(self, Z: Rearrangement, old: Pair | None, start: Tensor, decay: float) -> tuple[Pair, Pair]:
        """The triple over time, and what the remainder of this batch is taken against."""
        if old is None:
            found = power(Z, start, self.tolerance, self.iterations)
            return found, found
        if decay and self.averaging == "streaming":
            kept = stream(Z, old, start, decay, self.inner)
            return kept, kept
        found = power(Z, unit(old[1], start), self.tolerance, self.iterations)
        return average(old, found, decay), found


def check_whole(least: int = 1, **numbers: int) -> None:
    """Raise ``ValueError`` unless all are whole numbers of at least ``least``."""
    for name, number in numbers.items():
        if not isinstance(number, int) or number < least:
            raise ValueError(f"{name} must be a whole number of at least {least}, got {number!r}")


def check_sum_rule(rule: KroneckerRule) -> None:
    """Raise ``ValueError`` for a damping under which a sum of two products has no closed inverse."""
    if not isinstance(rule, FactoredRule):
        raise ValueError(
            f"the rule of a sum of two products must damp its factors, as Factored() or Unit() do, got {rule!r}"
        )


def pair(stats: Stats | None, right: str, left: str) -> Pair | None:
    """Two of the statistics over time, if there are any."""
    return (stats[right].value, stats[left].value) if stats else None


def means(first: tuple[str, str], found: Pair) -> dict[str, Mean]:
    """A pair as two statistics over time."""
    return {name: Mean(factor) for name, factor in zip(first, found, strict=True)}


def kronecker_sum(stats: Stats, first: tuple[str, str], rule: KroneckerRule, guard: Guard) -> KroneckerSum:
    """S kron R + Q kron P, the statistics R and S having the names ``first``."""
    assert isinstance(rule, FactoredRule)
    R, S, P, Q = (stats[name].value for name in (*first, "P", "Q"))
    return KroneckerSum(S, R, Q, P, rule, guard)
