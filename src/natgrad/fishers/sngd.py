"""SNGD: the metric of the layer's inputs, I kron A (structured natural gradient descent)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from natgrad.capture import Capture, Kind
from natgrad.fishers.base import Approximation
from natgrad.fishers.statistics import Mean, Stats
from natgrad.matrix import Matrix, OneSided
from natgrad.matrix.base import check_damping


@dataclass(frozen=True)
class SNGD(Approximation):
    """F ~ I kron A with A = E[a a^T] over positions, so that D = M (A + (eps tr A + damping) I)^-1.

    Not a Fisher of the loss: the metric has no g, so its scale is not that of the Fisher (the learning rate has to
    make up for it) and it does not change with the labels. It is KFAC with G = I; gradient descent in whitened inputs.
    ``eps`` is the relative ridge, which grows with in; ``damping`` is added to it. :func:`natgrad.reconstruct` takes
    the same step with any optimizer that is plain SGD, by inserting S = (A + eps tr(A) I)^(-1/2) in the network.

    Cost: 2 n t in^2 flops an observation, in^3 a refresh, 2 out in^2 a step; memory 2 in^2. ``ValueError`` for an
    ``eps`` that is not a finite number >= 0. References: arXiv 2412.07441 and 2109.10100; the shared input metric with
    a dense A is one reading of them: their released code has one metric per neuron (:class:`UnitWise`).
    """

    eps: float = 1e-4

    def __post_init__(self) -> None:
        """Refuse a negative or infinite ``eps``."""
        check_damping(self.eps, "eps")

    def observe(self, seen: Capture) -> Stats:
        """A, and a tensor (*groups, out) that hands on the number of outputs."""
        g = seen.g
        return {"A": Mean(seen.moment_a(), seen.rows), "outputs": Mean(g.new_zeros((*g.shape[:-3], g.shape[-1])))}

    @property
    def reads(self) -> Literal["positions", "examples", "all"]:
        """Single positions."""
        return "positions"

    @property
    def sides(self) -> tuple[bool, bool]:
        """The inputs."""
        return False, True

    def sided(self, kind: Kind) -> Approximation | None:
        """With A diagonal; it has no form for inputs that are the gradients of another use."""
        return None if kind == "mixed" else self

    def assemble(self, stats: Stats, previous: Matrix | None = None) -> OneSided:
        """I kron A."""
        A = stats["A"].value
        return OneSided(A, (stats["outputs"].value.shape[-1], A.shape[-2]), eps=self.eps)
