"""When to observe and when to refresh."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Cadence:
    """Statistics every ``observe_every`` steps on ``fraction`` of the batch, matrices every ``refresh_every`` steps.

    Before the first full period refreshes are denser, at steps 0, 1, 2, 4, 8 ..., since the first statistics are poor.
    ``staggered`` spreads the refreshes of the layers over the period.
    """

    observe_every: int = 4
    refresh_every: int = 10
    fraction: float = 1.0
    staggered: bool = False

    @property
    def patience(self) -> int:
        """For how many steps refreshes may fail before the old inverse serves no more."""
        return 2 * self.refresh_every

    def observes(self, step: int) -> bool:
        """Whether this step takes statistics."""
        return step % self.observe_every == 0 or self._warms_up(step)

    def refreshes(self, step: int, layer: int, layers: int) -> bool:
        """Whether this step renews the matrix of layer number ``layer`` of ``layers``."""
        phase = layer * self.refresh_every // layers if self.staggered else 0
        return step % self.refresh_every == phase or self._warms_up(step)

    def _warms_up(self, step: int) -> bool:
        return step < self.refresh_every and (step & (step - 1)) == 0
