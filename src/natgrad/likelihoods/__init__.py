"""Likelihoods, one file each."""

from natgrad.likelihoods.base import Likelihood, Objective
from natgrad.likelihoods.bernoulli import Bernoulli
from natgrad.likelihoods.categorical import Categorical
from natgrad.likelihoods.convex import ConvexLoss
from natgrad.likelihoods.gaussian import Gaussian
from natgrad.likelihoods.loss_sum import LossSum

__all__ = ["Bernoulli", "Categorical", "ConvexLoss", "Gaussian", "Likelihood", "LossSum", "Objective"]
