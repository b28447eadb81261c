"""Structured symmetric positive semi-definite matrices acting on weight-shaped tensors."""

from natgrad.matrix.base import LinearMap, Matrix
from natgrad.matrix.blocks import Blocks, Grouped, NetworkMap
from natgrad.matrix.congruence import Congruence
from natgrad.matrix.damping import Factored, Relative, Ridge, Tikhonov, Unit
from natgrad.matrix.dense import Dense
from natgrad.matrix.diagonal import Diagonal
from natgrad.matrix.factorise import FactorisationError
from natgrad.matrix.kronecker import Kronecker
from natgrad.matrix.kronecker_sum import Clamp, FirstOnly, KroneckerSum, Magnitude
from natgrad.matrix.low_rank import JointInverse, LowRank
from natgrad.matrix.one_sided import OneSided
from natgrad.matrix.roots import Nystrom, Root, denman_beavers, eigh_root, inverse_roots, newton_schulz
from natgrad.matrix.rows import Rows
from natgrad.matrix.spectral import Spectral

__all__ = [
    "Blocks",
    "Clamp",
    "Congruence",
    "Dense",
    "Diagonal",
    "FactorisationError",
    "Factored",
    "FirstOnly",
    "Grouped",
    "JointInverse",
    "Kronecker",
    "KroneckerSum",
    "LinearMap",
    "LowRank",
    "Magnitude",
    "Matrix",
    "NetworkMap",
    "Nystrom",
    "OneSided",
    "Relative",
    "Ridge",
    "Root",
    "Rows",
    "Spectral",
    "Tikhonov",
    "Unit",
    "denman_beavers",
    "eigh_root",
    "inverse_roots",
    "newton_schulz",
]
