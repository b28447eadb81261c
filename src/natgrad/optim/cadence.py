"""When to observe and when to refresh."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from natgrad.record import Share


@dataclass(frozen=True)
class Due:
    """What is to be done at a ``step``: a share of which layers is observed, and which matrices are renewed.

    Layers ``at_once`` are refreshed as soon as they have been observed for the first time. After ``patience`` steps of
    refreshes that fail an old inverse serves no more.
    """

    step: int
    observe: Mapping[str, Share]
    refresh: Collection[str]
    at_once: Collection[str] = ()
    patience: int = 0


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

    def due(self, step: int, layers: Collection[str]) -> Due:
        """What is due at a step, whatever it costs."""
        observed: Iterable[str] = layers if self.observes(step) else ()
        refreshed = [name for k, name in enumerate(layers) if self.refreshes(step, k, len(layers))]
        return Due(step, dict.fromkeys(observed, Share(self.fraction)), refreshed, layers, 2 * self.refresh_every)

    def observes(self, step: int) -> bool:
        """Whether this step takes statistics."""
        return latest(step, self.observe_every, self.refresh_every) == step

    def refreshes(self, step: int, layer: int, layers: int) -> bool:
        """Whether this step renews the matrix of layer number ``layer`` of ``layers``."""
        return latest(step, self.refresh_every, self.refresh_every, self.phase(layer, layers)) == step

    def phase(self, layer: int, layers: int) -> int:
        """The first step of a layer's refreshes."""
        return layer * self.refresh_every // layers if self.staggered else 0


def latest(step: int, every: int, dense: int, phase: int = 0) -> int:
    """The last step so far that is ``phase`` modulo ``every``, or 0, 1, 2, 4, 8, ... below ``dense``."""
    regular = step - (step - phase) % every
    last = min(step, dense - 1)
    return max(regular, -1, 1 << last.bit_length() - 1 if last else 0)
