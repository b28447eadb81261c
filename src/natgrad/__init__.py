"""natgrad: train PyTorch networks with the natural gradient."""

from natgrad.fisher import fisher
from natgrad.fishers import (
    EKFAC,
    KFAC,
    TEKFAC,
    TKFAC,
    Approximation,
    Diagonal,
    EigenCorrected,
    ExactFisher,
    JointFisher,
    JointWoodbury,
    TENGraD,
    TKFACExact,
    Woodbury,
)
from natgrad.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood
from natgrad.optim import (
    AdaptiveKLLimit,
    Automatic,
    Constant,
    ExactQuadraticModel,
    KLLimit,
    LevenbergMarquardt,
    NaturalGradient,
    QuadraticModel,
    StepSize,
    TraceDamping,
)

__version__ = "0.1.0"

__all__ = [
    "EKFAC",
    "KFAC",
    "TEKFAC",
    "TENGraD",
    "TKFAC",
    "AdaptiveKLLimit",
    "Approximation",
    "Automatic",
    "Bernoulli",
    "Categorical",
    "Constant",
    "Diagonal",
    "EigenCorrected",
    "ExactFisher",
    "ExactQuadraticModel",
    "Gaussian",
    "JointFisher",
    "JointWoodbury",
    "KLLimit",
    "LevenbergMarquardt",
    "Likelihood",
    "NaturalGradient",
    "QuadraticModel",
    "StepSize",
    "TKFACExact",
    "TraceDamping",
    "Woodbury",
    "fisher",
]
