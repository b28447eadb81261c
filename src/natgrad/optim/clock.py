"""What the optimizer as a whole remembers between steps: plain numbers, which travel in checkpoints."""

from __future__ import annotations

from typing import Any

from natgrad.optim.damping import Damping
from natgrad.optim.step_size import Decision
from natgrad.scale import Gauge

Clock = dict[str, Any]


def new_clock(damping: float) -> Clock:
    """Before the first step; ``capacity`` and ``scale`` are those of the likelihood, once it is seen."""
    zeros = ("slope", "predicted", "last_lr", "actual", "expected")
    start: Clock = {"steps": 0, "skipped": 0, "damping": damping, "averaged": 0, "news": 0, "account": {}, "memory": {}}
    return {**start, "capacity": 1.0, "scale": 1.0, **dict.fromkeys(zeros, 0.0), **Gauge().numbers()}


def remember(clock: Clock, damping: Damping, decision: Decision, drift: float, lr: float) -> dict[str, float]:
    """Adapt lambda to how the last step's prediction compares with the slope found along it, and note this decision.

    ``drift`` is <P, M>, P the last step. Numbers to report are returned.
    """
    report = {"alpha": decision.alpha, "mu": decision.mu, "kl": decision.predicted - decision.slope}
    if clock["predicted"] < 0:
        actual = 0.5 * (clock["slope"] - clock["last_lr"] * drift)
        actual = min(actual, -clock["predicted"])  # one bad step must not outweigh many good ones
        clock["actual"] = damping.decay * clock["actual"] + (1 - damping.decay) * actual
        clock["expected"] = damping.decay * clock["expected"] + (1 - damping.decay) * clock["predicted"]
        report["ratio"] = clock["actual"] / clock["expected"]
        if clock["steps"] % damping.every == 0:
            clock["damping"] = damping.adapt(clock["damping"], report["ratio"])
    if decision.restart:
        clock["damping"] = damping.initial
    if decision.rejected:
        clock["damping"] = damping.rejected(clock["damping"])
    clock |= {"slope": decision.slope, "predicted": decision.predicted, "last_lr": lr}
    clock["memory"] = dict(decision.memory)
    return report
