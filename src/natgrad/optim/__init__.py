"""The optimizer and its policies."""

from natgrad.optim.damping import LevenbergMarquardt
from natgrad.optim.natural_gradient import NaturalGradient
from natgrad.optim.step_size import Constant, ExactQuadraticModel, KLLimit, QuadraticModel, StepSize

__all__ = [
    "Constant",
    "ExactQuadraticModel",
    "KLLimit",
    "LevenbergMarquardt",
    "NaturalGradient",
    "QuadraticModel",
    "StepSize",
]
