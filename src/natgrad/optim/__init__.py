"""The optimizer and its policies."""

from natgrad.optim.coverage import coverage
from natgrad.optim.damping import LevenbergMarquardt, TraceDamping
from natgrad.optim.natural_gradient import NaturalGradient
from natgrad.optim.step_size import (
    AdaptiveKLLimit,
    Automatic,
    Constant,
    ExactQuadraticModel,
    KLLimit,
    QuadraticModel,
    StepSize,
)

__all__ = [
    "AdaptiveKLLimit",
    "Automatic",
    "Constant",
    "ExactQuadraticModel",
    "KLLimit",
    "LevenbergMarquardt",
    "NaturalGradient",
    "QuadraticModel",
    "StepSize",
    "TraceDamping",
    "coverage",
]
