"""The scales of other libraries, as the page on migration translates them: their formulas, written out."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from small import classifier, digits
from torch import Tensor, nn

from natgrad import KFAC, Categorical, KLLimit, NaturalGradient
from natgrad.matrix import Tikhonov
from oracles import assert_equal

N, LR, DAMPING = 64, 0.1, 1e-3


def passed() -> tuple[list[Tensor], list[Tensor]]:
    """Of both linear layers: inputs with a one (n, in), and outputs (n, out)."""
    first, act, second = classifier()
    ones, x = torch.ones(N, 1), digits(N)[0]
    middle = first(x)
    a = [torch.cat([x, ones], 1), torch.cat([act(middle), ones], 1)]
    return a, [middle, second(act(middle))]


def moment(x: Tensor) -> Tensor:
    return x.detach().T @ x.detach() / N


def eigen(A: Tensor, G: Tensor, M: Tensor) -> Tensor:
    """M in the eigenbases, divided by products of eigenvalues plus damping."""
    (a, Q), (g, P) = torch.linalg.eigh(A), torch.linalg.eigh(G)
    divided: Tensor = P @ ((P.T @ M @ Q) / (torch.outer(g, a) + DAMPING)) @ Q.T
    return divided


def factored(A: Tensor, G: Tensor, M: Tensor) -> Tensor:
    """The root of damping added to each factor, balanced by their mean eigenvalues."""
    pi = math.sqrt(float(A.trace()) / len(A) / (float(G.trace()) / len(G)))
    left = torch.linalg.solve(G + math.sqrt(DAMPING) / pi * torch.eye(len(G)), M)
    solved: Tensor = torch.linalg.solve(A + math.sqrt(DAMPING) * pi * torch.eye(len(A)), left.T).T
    return solved


def clipped(limit: float, D: list[Tensor], M: list[Tensor]) -> list[Tensor]:
    """The step: lr D, scaled down to lr^2 <D, M> <= limit."""
    product = LR**2 * sum(float((d * m).sum()) for d, m in zip(D, M, strict=True))
    return [-LR * min(1.0, math.sqrt(limit / product)) * d for d in D]


def our_step(optimizer: NaturalGradient, model: nn.Sequential) -> list[Tensor]:
    """The change of every block."""
    x, y = digits(N)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    changes = [p.detach() - old for p, old in zip(model.parameters(), before, strict=True)]
    return [torch.cat([changes[k], changes[k + 1][:, None]], 1) for k in range(0, len(changes), 2)]


@pytest.mark.parametrize("kl_clip", [1e-3, 1e3])  # one that binds, and one that does not
def test_kfac_pytorch_with_eigenvalues(kl_clip: float) -> None:
    """G of the gradients of the mean loss. Their averages apart, which start from the identity."""
    a, outputs = passed()
    g = torch.autograd.grad(F.cross_entropy(outputs[1], digits(N)[1]), outputs)
    M = [g_.T @ a_.detach() for g_, a_ in zip(g, a, strict=True)]
    D = [eigen(moment(a_), moment(g_), M_) for a_, g_, M_ in zip(a, g, M, strict=True)]
    model = classifier()
    settings = {
        "overhead": None,
        "damping": DAMPING * N**2,
        "lr": LR * N**2,
        "step_size": KLLimit(limit=kl_clip * N**2),
    }
    optimizer = NaturalGradient(model, KFAC(rule=Tikhonov()), **settings)  # type: ignore[arg-type]
    for found, expected in zip(our_step(optimizer, model), clipped(kl_clip, D, M), strict=True):
        assert_equal(found, expected, 1e-8)


@pytest.mark.parametrize("norm_constraint", [1e-4, 1e3])
def test_kfac_jax_with_the_exact_fisher(norm_constraint: float) -> None:
    """G of the columns sqrt(p_c) (e_c - p), one term an example."""
    a, outputs = passed()
    g = torch.autograd.grad(F.cross_entropy(outputs[1], digits(N)[1]), outputs, retain_graph=True)
    M = [g_.T @ a_.detach() for g_, a_ in zip(g, a, strict=True)]
    p = outputs[1].detach().softmax(1)
    columns = [p[:, c : c + 1].sqrt() * (torch.eye(10)[c] - p) for c in range(10)]
    directions = [torch.autograd.grad(outputs[1], outputs, column, retain_graph=True) for column in columns]
    G = [sum((moment(d[k]) for d in directions), torch.zeros(())) for k in range(2)]
    D = [factored(moment(a_), G_, M_) for a_, G_, M_ in zip(a, G, M, strict=True)]
    model = classifier()
    likelihood = {"likelihood": Categorical(), "estimator": "exact"}
    settings = {"overhead": None, "damping": DAMPING, "lr": LR, "step_size": KLLimit(limit=norm_constraint)}
    optimizer = NaturalGradient(model, KFAC(), **likelihood, **settings)  # type: ignore[arg-type]
    for found, expected in zip(our_step(optimizer, model), clipped(norm_constraint, D, M), strict=True):
        assert_equal(found, expected, 1e-8)
