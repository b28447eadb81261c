"""Step-size policies, one file each."""

from natgrad.optim.step_size.adaptive_kl import AdaptiveKLLimit
from natgrad.optim.step_size.automatic import Automatic
from natgrad.optim.step_size.base import Decision, Situation, StepSize, read_once
from natgrad.optim.step_size.kl_limit import Constant, KLLimit
from natgrad.optim.step_size.layer_length import LayerLength
from natgrad.optim.step_size.quadratic import ExactQuadraticModel, QuadraticModel

__all__ = [
    "AdaptiveKLLimit",
    "Automatic",
    "Constant",
    "Decision",
    "ExactQuadraticModel",
    "KLLimit",
    "LayerLength",
    "QuadraticModel",
    "Situation",
    "StepSize",
    "read_once",
]
