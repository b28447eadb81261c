"""The optimizer and its policies."""

from natgrad.optim.coverage import coverage
from natgrad.optim.damping import LevenbergMarquardt, TraceDamping
from natgrad.optim.geometry import Frobenius, Geometry, SpectralDescent
from natgrad.optim.natural_gradient import NaturalGradient
from natgrad.optim.step_size import (
    AdaptiveKLLimit,
    Automatic,
    Constant,
    ExactQuadraticModel,
    KLLimit,
    LayerLength,
    QuadraticModel,
    StepSize,
)

__all__ = [
    "AdaptiveKLLimit",
    "Automatic",
    "Constant",
    "ExactQuadraticModel",
    "Frobenius",
    "Geometry",
    "KLLimit",
    "LayerLength",
    "LevenbergMarquardt",
    "NaturalGradient",
    "QuadraticModel",
    "SpectralDescent",
    "StepSize",
    "TraceDamping",
    "coverage",
]
