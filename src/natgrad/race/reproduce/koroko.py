"""How Koroko et al. train (arXiv 2201.10285 and 2303.18083, released code), in the units of this library.

Their losses are means over outputs, and their G carries the square of that scale: s = 1/outputs for a mean of binary
cross entropies, 2/outputs for a mean square, 1 for classes. Where theirs are lr, lambda and kappa, ours are lr/s,
lambda/s and kappa s; the damped step is then the same but for pi, which balances the factors' damping: they have none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from natgrad import Approximation, KLLimit
from natgrad.capture import Capture
from natgrad.fishers import Stats
from natgrad.matrix import LinearMap, Matrix
from natgrad.optim.step_size import Decision, Situation
from natgrad.optim.step_size.kl_limit import limited
from natgrad.race.reproduce.study import Row

if TYPE_CHECKING:
    from optuna import Trial


@dataclass(frozen=True)
class UnscaledKLLimit(KLLimit):
    """alpha = min(1, sqrt(limit / <D, M>)): a KL limit without the lr^2 that the KL of the step has."""

    def decide(self, now: Situation) -> Decision:
        """alpha from the limit; 0 where <D, M> is not positive."""
        return limited(self.limit * now.lr**2, 1.0, now)


@dataclass(frozen=True)
class Frozen(Approximation):
    """``base`` as it was at its first observation, for good.

    In the released code the counter of steps advances with the updates of the statistics only, and both wait for a
    multiple of 100 of it: after the first update nothing is ever refreshed.
    """

    base: Approximation

    def observe(self, seen: Capture) -> Stats:
        """As ``base``."""
        return self.base.observe(seen)

    def merge(self, old: Stats | None, new: Stats, decay: float) -> Stats:
        """The old."""
        return old or self.base.merge(None, new, 0.0)

    def assemble(self, stats: Stats, previous: Matrix | None = None) -> Matrix:
        """As ``base``."""
        return self.base.assemble(stats)

    def invert(self, matrix: Matrix, damping: float) -> LinearMap:
        """As ``base``."""
        return self.base.invert(matrix, damping)


def first_order(sgd: float = 0.3, adam: float = 1e-3) -> tuple[Row, Row]:
    """SGD and Adam, tuned from the published learning rates."""
    return Row("sgd", "sgd", first={"lr": sgd}), Row("adam", "adamw", first={"lr": adam})


def row(
    name: str,
    entry: str,
    scale: float,
    lr: float,
    damping: float,
    approximation: Callable[[], Approximation] | None = None,
) -> Row:
    """A natural entry under the papers' rule, tuned from their best (lr, damping) over their grid's range."""
    settings = {
        "step_size": UnscaledKLLimit(1e-2 * scale),
        "momentum": 0.9,
        "observe_every": 100,
        "refresh_every": 100,
        "observe_fraction": 0.25,
        "decay": 0.95,
    }

    def space(trial: Trial) -> dict[str, Any]:
        return {
            "lr": trial.suggest_float("lr", 1e-3, 1, log=True) / scale,
            "damping": trial.suggest_float("damping", 1e-4, 1, log=True) / scale,
        }

    first = {"lr": lr / scale, "damping": damping / scale}
    return Row(name, entry, settings=settings, first=first, space=space, approximation=approximation)
