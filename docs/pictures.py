"""Draw the pictures of the documentation: `make docs`, or `python docs/pictures.py`. One function per picture.

All pictures show the same layer: the last one of a small digits classifier, after a few natural-gradient steps, in
float64 and on one thread, so that they come out the same everywhere up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.colors import SymLogNorm
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn

import natgrad
from natgrad import (
    EKFAC,
    KFAC,
    KPSVD,
    SNGD,
    TEKFAC,
    TKFAC,
    Approximation,
    Categorical,
    CorrectedKFAC,
    Deflated,
    Diagonal,
    ExactFisher,
    KLLimit,
    NaturalGradient,
    TENGraD,
    Woodbury,
)
from natgrad.matrix import Factored, Kronecker, LowRank, OneSided, Spectral, Tikhonov, eigh_root
from natgrad.matrix.damping import SpectralRule

HERE = Path(__file__).parent / "pictures"
LAYER = "2"  # 10 outputs, 5 inputs and the bias: a block of 60 x 60
PAIR = 3.1  # inches of one panel
INK, PALE = "#1f4e79", "#c8772b"


@cache
def digits() -> tuple[Tensor, Tensor]:
    """1,797 digits of 3 x 3 grey values (n, 9), and their classes."""
    data = load_digits()
    images = torch.tensor(data.images).unsqueeze(1) / 16
    return nn.functional.adaptive_avg_pool2d(images, 3).flatten(1), torch.tensor(data.target)


@cache
def trained() -> nn.Module:
    """A 9-5-10 tanh classifier after 40 steps."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 5), nn.Tanh(), nn.Linear(5, 10)).double()
    x, y = digits()
    optimizer = NaturalGradient(model, KFAC(), likelihood=Categorical(), step_size=KLLimit(0.01), damping=0.01)
    for _ in range(40):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model


@cache
def matrix(approximation: Approximation) -> natgrad.matrix.Matrix:
    """The Fisher of the layer under ``approximation``, all labels summed over."""
    return natgrad.fisher(trained(), approximation, Categorical(), [digits()])[LAYER]


def error(approximation: Approximation) -> float:
    """|F - approximation| / |F|, Frobenius norms."""
    F = matrix(ExactFisher()).dense()
    return float((F - matrix(approximation).dense()).norm() / F.norm())


def heat(axes: Axes, values: Tensor, title: str) -> None:
    """A symmetric matrix in colours that all panels share: logarithmic in size, red above 0, blue below."""
    top = float(matrix(ExactFisher()).dense().abs().max())
    axes.imshow(values, cmap="RdBu_r", norm=SymLogNorm(top / 100, vmin=-top, vmax=top), interpolation="nearest")
    axes.set(title=title, xticks=[], yticks=[])


def panels(number: int) -> tuple[Figure, list[Axes]]:
    """A row of square panels."""
    figure, axes = plt.subplots(1, number, figsize=(PAIR * number, PAIR), layout="constrained", squeeze=False)
    return figure, list(axes[0])


def matrices(*shown: tuple[str, Approximation]) -> Figure:
    """The exact matrix, then each approximation with its error."""
    figure, axes = panels(1 + len(shown))
    heat(axes[0], matrix(ExactFisher()).dense(), "exact F")
    for here, (name, approximation) in zip(axes[1:], shown, strict=True):
        heat(here, matrix(approximation).dense(), f"{name}: error {error(approximation):.2f}")
    return figure


def overview() -> Figure:
    """Readme: one layer's Fisher, and what each structure keeps of it."""
    return matrices(("Diagonal", Diagonal()), ("KFAC", KFAC()), ("EKFAC", EKFAC()))


def exact() -> Figure:
    """The matrix and its eigenvalues, which is why it needs damping."""
    figure, axes = panels(2)
    F = matrix(ExactFisher()).dense()
    heat(axes[0], F, "exact F of one layer")
    axes[1].semilogy(torch.linalg.eigvalsh(F).flip(0).clamp(min=1e-9), ".", color=INK)
    axes[1].axhline(1e-3, color=PALE)
    axes[1].text(0, 8e-4, "damping .001", color=PALE, va="top")
    axes[1].set(title="eigenvalues, 0 drawn as 1e-9", xlabel="rank")
    return figure


def diagonal() -> Figure:
    """What is left when only the diagonal is kept."""
    return matrices(("Diagonal", Diagonal()))


def kfac() -> Figure:
    """The product and its two factors."""
    figure, axes = panels(4)
    product = matrix(KFAC())
    assert isinstance(product, Kronecker)
    heat(axes[0], matrix(ExactFisher()).dense(), "exact F")
    heat(axes[1], product.dense(), f"KFAC: error {error(KFAC()):.2f}")
    for here, factor, name in ((axes[2], product.left, "G (out, out)"), (axes[3], product.right, "A (in, in)")):
        top = float(factor.abs().max())
        here.imshow(factor, cmap="RdBu_r", vmin=-top, vmax=top, interpolation="nearest")
        here.set(title=name, xticks=[], yticks=[])
    return figure


def corrected(base: Approximation, better: Approximation, names: tuple[str, str]) -> Figure:
    """A product, its eigenvalue correction, and measured against assumed eigenvalues."""
    figure, axes = panels(4)
    product, spectral = matrix(base), matrix(better)
    assert isinstance(product, Kronecker) and isinstance(spectral, Spectral)
    heat(axes[0], matrix(ExactFisher()).dense(), "exact F")
    heat(axes[1], product.dense(), f"{names[0]}: error {error(base):.2f}")
    heat(axes[2], spectral.dense(), f"{names[1]}: error {error(better):.2f}")
    assumed = product.spectral().values.flatten().clamp(min=1e-9)
    kept = assumed > 1e-8  # softmax gradients sum to 0 over the classes: six eigenvalues are 0
    axes[3].loglog(assumed[kept], spectral.values.flatten()[kept], ".", color=INK)
    ends = [float(assumed[kept].min()), float(assumed.max())]
    axes[3].loglog(ends, ends, color=PALE)
    axes[3].set(title="eigenvalues", xlabel=f"products, {names[0]}", ylabel=f"measured, {names[1]}")
    return figure


def ekfac() -> Figure:
    """KFAC and EKFAC."""
    return corrected(KFAC(), EKFAC(), ("KFAC", "EKFAC"))


def tkfac() -> Figure:
    """KFAC and TKFAC: the same structure, other factors."""
    return matrices(("KFAC", KFAC()), ("TKFAC", TKFAC()))


def tekfac() -> Figure:
    """TKFAC and TEKFAC."""
    return corrected(TKFAC(), TEKFAC(), ("TKFAC", "TEKFAC"))


def of_examples(model: nn.Module, x: Tensor, y: Tensor, approximation: Approximation, name: str) -> LowRank:
    """A layer's Fisher of a few examples with their own labels, in the form that knows their Gram matrix."""
    found = natgrad.fisher(model, approximation, Categorical(), [(x, y)], estimator="empirical")[name]
    assert isinstance(found, LowRank)
    return found


def gram_of(axes: Axes, found: LowRank, top: float, title: str) -> None:
    """The Gram matrix of the examples."""
    axes.imshow(found.gram(), cmap="RdBu_r", norm=SymLogNorm(top / 100, vmin=-top, vmax=top), interpolation="nearest")
    axes.set(title=title, xticks=[], yticks=[])


def woodbury() -> Figure:
    """The same matrix in the space of the examples and in that of the weights."""
    figure, axes = panels(3)
    x, y = digits()
    order = y[:30].argsort()
    found = of_examples(trained(), x[:30][order], y[:30][order], Woodbury(), LAYER)
    K, F = found.gram(), found.dense()
    gram_of(axes[0], found, float(K.abs().max()), "K of 30 digits, by class")
    heat(axes[1], F, "F of the same digits")
    axes[2].semilogy(torch.linalg.eigvalsh(F).flip(0)[:30].clamp(min=1e-9), "o", color=PALE, mfc="none", label="F")
    axes[2].semilogy(torch.linalg.eigvalsh(K / 30).flip(0).clamp(min=1e-9), ".", color=INK, label="K / 30")
    axes[2].set(title="largest eigenvalues", xlabel="rank")
    axes[2].legend()
    return figure


def tengrad() -> Figure:
    """The Gram matrix of a convolution, from all pairs of positions and from sums over positions."""
    figure, axes = panels(3)
    data = load_digits()
    y = torch.tensor(data.target[:30])
    order = y.argsort()
    x = torch.tensor(data.images[:30]).unsqueeze(1)[order] / 16
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(144, 10)).double()
    exact_, summed = (of_examples(model, x, y[order], make(), "0") for make in (Woodbury, TENGraD))
    K, S = exact_.gram(), summed.gram()
    top = float(K.abs().max())
    gram_of(axes[0], exact_, top, "K of a convolution, 30 digits")
    gram_of(axes[1], summed, top, f"TENGraD: error {float((K - S).norm() / K.norm()):.2f}")
    axes[2].loglog(K.diagonal(), S.diagonal(), ".", color=INK)
    ends = [float(K.diagonal().min()), float(K.diagonal().max())]
    axes[2].loglog(ends, ends, color=PALE)
    axes[2].set(title="$|DW_n|^2$", xlabel="exact", ylabel="TENGraD")
    return figure


def sngd() -> Figure:
    """One metric for all outputs, at the trace of F; and what its root does to the inputs."""
    figure, axes = panels(3)
    F, metric = matrix(ExactFisher()).dense(), matrix(SNGD())
    assert isinstance(metric, OneSided)
    scaled = metric.dense() * (F.trace() / metric.trace())
    heat(axes[0], F, "exact F")
    heat(axes[1], scaled, f"I kron A, rescaled: error {float((F - scaled).norm() / F.norm()):.2f}")
    A = metric.factor
    _, S = eigh_root(A, 1e-4 * A.trace())
    for values, colour, name in ((A, INK, "inputs a"), (S @ A @ S, PALE, "S a")):
        axes[2].semilogy(torch.linalg.eigvalsh(values).flip(0), "o-", color=colour, label=name)
    axes[2].set(title="eigenvalues of the covariance", xlabel="rank")
    axes[2].legend(frameon=False)
    return figure


def kpsvd() -> Figure:
    """Three Kronecker products."""
    return matrices(("KFAC", KFAC()), ("TKFAC", TKFAC()), ("KPSVD", KPSVD()))


def rank_two() -> Figure:
    """One product, and three ways to two; and what the sums have below zero."""
    figure, axes = panels(4)
    heat(axes[0], matrix(ExactFisher()).dense(), "exact F")
    for here, one in zip(axes[1:3], (CorrectedKFAC(), Deflated()), strict=True):
        heat(here, matrix(one).dense(), f"{type(one).__name__}: error {error(one):.2f}")
    for one, colour in ((CorrectedKFAC(), PALE), (Deflated(), INK)):
        axes[3].plot(torch.linalg.eigvalsh(matrix(one).dense())[:30], ".", color=colour, label=type(one).__name__)
    axes[3].axhline(0, color="grey", linewidth=0.5)
    axes[3].set(title="the 30 lowest eigenvalues", xlabel="rank")
    axes[3].legend()
    return figure


def damping() -> Figure:
    """What the two rules add to EKFAC's eigenvalues, at one damping."""
    figure, axes = panels(2)
    spectral = matrix(EKFAC())
    assert isinstance(spectral, Spectral)
    s = spectral.values
    kept = s > 1e-8
    ends = [float(s[kept].min()), float(s.max())]
    rules: tuple[SpectralRule, ...] = (Tikhonov(), Factored())
    for here, rule in zip(axes, rules, strict=True):
        here.loglog(s[kept], (s + rule.shift(s, 1e-3))[kept], ".", color=INK)
        here.loglog(ends, ends, color=PALE)
        here.set(title=f"{type(rule).__name__}, damping .001", xlabel="measured s", ylabel="damped s")
    return figure


PICTURES: tuple[Callable[[], Figure], ...] = (
    overview,
    exact,
    diagonal,
    kfac,
    ekfac,
    tkfac,
    tekfac,
    woodbury,
    tengrad,
    sngd,
    kpsvd,
    rank_two,
    damping,
)


def main() -> None:
    """Write all pictures."""
    torch.set_num_threads(1)
    HERE.mkdir(exist_ok=True)
    for draw in PICTURES:
        figure = draw()
        figure.savefig(HERE / f"{draw.__name__}.png", dpi=68, metadata={"Software": None})
        plt.close(figure)


if __name__ == "__main__":
    main()
