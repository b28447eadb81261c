"""One row per approximation: to add one, add a row; every law that its facts admit is then run on it.

Case("MINE", MINE, trace="fisher", below=KFAC)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from natgrad import (
    EKFAC,
    FOOF,
    KFAC,
    KPSVD,
    SNGD,
    TEKFAC,
    TKFAC,
    Approximation,
    CorrectedKFAC,
    Deflated,
    Diagonal,
    EigenCorrected,
    ExactFisher,
    JointFisher,
    JointWoodbury,
    Lanczos,
    NGPlus,
    TENGraD,
    TKFACExact,
    UnitWise,
    Woodbury,
)
from natgrad.matrix import Ridge

Whose = Literal["fisher", "positions"]  # the full Fisher, or the one without cross terms between positions


@dataclass(frozen=True)
class Case:
    """An approximation and the facts that the laws ask about."""

    name: str
    make: Callable[[], Approximation]
    exact: bool = False
    """Equals F on any data."""
    one_example: bool = True
    """Equals F for one example without weight sharing."""
    trace: Whose | None = None
    """Whose trace it has."""
    partial_traces: Whose | None = None
    """Whose two partial traces it has."""
    below: Callable[[], Approximation] | None = None
    """The approximation whose Frobenius error it never exceeds."""
    reads_gradients: bool = True
    """Is quadratic in g, as a Fisher is; else a metric of the inputs alone."""
    absolute: bool = True
    """Its damping has a unit: large ones give plain gradient descent, of step 1/damping."""
    equivariant: bool = False
    """Its undamped step does not depend on the coordinates of inputs and outputs."""
    definite: bool = True
    """It is positive semi-definite; its damped inverse is positive definite in any case."""
    products: int | None = None
    """It is the sum of so many Kronecker products of symmetric factors that is nearest to F."""

    def __str__(self) -> str:
        return self.name


def TEKFACExact() -> EigenCorrected:
    return EigenCorrected(TKFACExact())


TIGHT: dict[str, Any] = {"tolerance": 1e-13, "iterations": 5000}  # for laws that hold to rounding


CASES = (
    Case("ExactFisher", ExactFisher, exact=True, trace="fisher", partial_traces="fisher", equivariant=True),
    Case("Diagonal", Diagonal, one_example=False, trace="fisher"),
    Case("KFAC", KFAC, equivariant=True),
    Case("EKFAC", EKFAC, trace="fisher", below=KFAC),
    Case("TKFAC", TKFAC, trace="positions", partial_traces="positions"),
    Case("TKFACExact", TKFACExact, trace="fisher", partial_traces="fisher"),
    Case("TEKFAC", TEKFAC, trace="fisher", below=TKFAC),
    Case("TEKFACExact", TEKFACExact, trace="fisher", below=TKFACExact),
    Case("SNGD", SNGD, one_example=False, reads_gradients=False),
    Case("FOOF", FOOF, one_example=False, reads_gradients=False),
    Case("NGPlus", NGPlus, one_example=False),
    Case("UnitWise", UnitWise, one_example=False, trace="fisher", below=Diagonal),
    Case("KFAC-ridge", lambda: KFAC(rule=Ridge()), equivariant=True, absolute=False),
    Case("EKFAC-reseed", lambda: EigenCorrected(KFAC(), carry="reseed"), trace="fisher", below=KFAC),
    Case("EKFAC-keep", lambda: EigenCorrected(KFAC(), carry="keep"), trace="fisher", below=KFAC),
    Case("JointFisher", JointFisher, exact=True, trace="fisher", partial_traces="fisher", equivariant=True),
    Case("Woodbury", Woodbury, exact=True, trace="fisher", partial_traces="fisher"),
    Case("Woodbury-window", lambda: Woodbury(window=3), exact=True, trace="fisher", partial_traces="fisher"),
    Case("JointWoodbury", JointWoodbury, exact=True, trace="fisher", partial_traces="fisher"),
    Case("TENGraD", TENGraD),
    Case("KPSVD", lambda: KPSVD(**TIGHT), products=1, below=KFAC),
    Case("KPSVD-published", lambda: KPSVD(averaging="published", **TIGHT), products=1, below=TKFAC),
    Case("KPSVD-location", lambda: KPSVD(location=True, **TIGHT)),
    Case("KPSVD-corrected", lambda: EigenCorrected(KPSVD(**TIGHT)), trace="fisher", below=KPSVD),
    Case("Deflated", lambda: Deflated(**TIGHT), definite=False, products=2, below=KPSVD),
    Case("Deflated-published", lambda: Deflated(averaging="published", **TIGHT), definite=False, products=2),
    Case("Lanczos", lambda: Lanczos(tolerance=1e-13), definite=False, products=2, below=KPSVD),
    Case("CorrectedKFAC", lambda: CorrectedKFAC(**TIGHT), definite=False, below=KFAC),
    Case("CorrectedKFAC-published", lambda: CorrectedKFAC(averaging="published", **TIGHT), definite=False),
)
