"""FNGD: an optimizer whose natural gradient is a weighted sum of the gradients of the batch."""

from natgrad.fngd.coefficients import (
    Coefficients,
    Examples,
    Iteration,
    PositionMean,
    Quantile,
    Recompute,
    Sample,
    Scalar,
)
from natgrad.fngd.optimizer import FNGD

__all__ = [
    "FNGD",
    "Coefficients",
    "Examples",
    "Iteration",
    "PositionMean",
    "Quantile",
    "Recompute",
    "Sample",
    "Scalar",
]
