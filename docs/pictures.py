"""Draw the pictures of the documentation: `make docs`, or `python docs/pictures.py`. One function per picture.

All pictures show the same layer: the last one of a small digits classifier, after a few natural-gradient steps, in
float64 and on one thread, so that they come out the same everywhere up to rounding.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
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
    FNGD,
    KFAC,
    KPSVD,
    SNGD,
    TEKFAC,
    TKFAC,
    Approximation,
    BlockTridiagonal,
    Categorical,
    CorrectedKFAC,
    Deflated,
    Diagonal,
    ExactFisher,
    KLLimit,
    KrylovNicolaides,
    KrylovResidual,
    NaturalGradient,
    Nicolaides,
    ResidualSpace,
    SpectralSpace,
    TENGraD,
    TwoLevel,
    Woodbury,
)
from natgrad.capture import Capture
from natgrad.engine import Engine
from natgrad.fishers import Coupled, Part
from natgrad.labels import Labels
from natgrad.layers import expected
from natgrad.matrix import (
    Factored,
    Kronecker,
    LinearMap,
    LowRank,
    NetworkMap,
    OneSided,
    Spectral,
    Tikhonov,
    eigh_root,
)
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


def coefficients(model: nn.Module, steps: int, n: int) -> tuple[Tensor, Tensor, list[float]]:
    """What FNGD learns of the layer on shuffled batches, the model standing still.

    |DW_n| and N c, over its mean, of the last batch; and the spread of the average over batches after each of them.
    """
    torch.manual_seed(0)
    x, y = digits()
    optimizer = FNGD(model, first_phase=steps, normalise=True, lr=0.0)
    state, spread, sums = optimizer.state[model.get_parameter(f"{LAYER}.weight")], [], torch.zeros(1, n)
    for _ in range(steps):
        chosen = torch.randperm(len(x))[:n]
        optimizer.zero_grad()
        output = model(x[chosen])
        nn.functional.cross_entropy(output, y[chosen]).backward()
        optimizer.step()
        before, sums = sums, state["total"].clone()
        spread.append(float((sums / state["seen"]).std()))
    a = torch.cat([model[:2](x[chosen]), torch.ones(n, 1)], -1).detach()  # type: ignore[index]
    g = (output.softmax(-1) - nn.functional.one_hot(y[chosen], 10)).detach()
    return a.norm(dim=1) * g.norm(dim=1), (sums - before).flatten(), spread


def fngd() -> Figure:
    """Coefficients of a batch against the size of the gradient, and their spread in an average over batches."""
    figure, axes = panels(2)
    size, c, spread = coefficients(trained(), 64, 128)
    axes[0].plot(size, c, ".", color=INK)
    axes[0].set(title="coefficients of a batch", xlabel="$|DW_n|$", ylabel="c / mean c")
    steps = torch.arange(1, len(spread) + 1)
    axes[1].loglog(steps, spread, color=INK, label="position_mean")
    axes[1].loglog(steps, spread[0] / steps.sqrt(), "--", color=PALE, label="1 / sqrt(batches)")
    axes[1].set(title="spread over the positions", xlabel="batches averaged")
    axes[1].legend()
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


@cache
def deep() -> tuple[nn.Module, dict[str, list[Capture]]]:
    """A 9-3-3-10 tanh classifier after 40 steps, and what its layers saw of all digits, all labels summed over."""
    torch.manual_seed(0)
    layers = [nn.Linear(9, 3), nn.Tanh(), nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 10)]
    model, (x, y) = nn.Sequential(*layers).double(), digits()
    optimizer = NaturalGradient(model, KFAC(), likelihood=Categorical(), step_size=KLLimit(0.01), damping=0.01)
    for _ in range(40):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    engine = Engine(model, Labels(Categorical(), "exact"))
    engine.armed = True
    model(x)
    (record,) = engine.everything()
    engine.close()
    return model, {name: list(record.captures(layer)) for name, layer in engine.layers.items()}


def network_fisher() -> Tensor:
    """The Fisher of all layers together, from per-example gradients."""
    _, seen = deep()
    rows = [
        torch.cat([torch.cat([DW.flatten(1) for DW in c.weight_gradients()]) for c in captures])
        for captures in seen.values()
    ]
    gradients = torch.cat(rows, 1)
    return gradients.mT @ gradients / sum(float(c.count) for c in seen["0"])


def joint_map(approximation: Coupled, damping: float) -> tuple[NetworkMap, dict[str, LinearMap]]:
    """The map of the network, and the inverses of the layers."""
    _, seen = deep()
    parts = {}
    for name, new in approximation.observe_together(seen).items():
        stats = approximation.merge(None, new, 0.0)
        parts[name] = Part(stats, approximation.invert(approximation.assemble(stats), damping), damping)
    return approximation.couple(parts), {name: part.inverse for name, part in parts.items()}


def flat(M: Mapping[str, Tensor]) -> Tensor:
    """All blocks as one vector."""
    return torch.cat([block.flatten() for block in M.values()])


def block_tridiagonal() -> Figure:
    """The Fisher of a network of three layers, KFAC's, and that of block-tridiagonal KFAC."""
    damping = 1e-4
    F = network_fisher()
    joint, conditional = joint_map(BlockTridiagonal(), damping)
    shapes = {name: block.shape for name, block in conditional.items()}

    def image(e: Tensor) -> Tensor:
        sizes = [shape.numel() for shape in shapes.values()]
        return flat(joint @ {name: part.view(shapes[name]) for name, part in zip(shapes, e.split(sizes), strict=True)})

    joined = torch.linalg.inv(torch.stack([image(e) for e in torch.eye(len(F), dtype=F.dtype)]))
    blocks = natgrad.fisher(deep()[0], KFAC(), Categorical(), [digits()]).dense()
    figure, axes = panels(3)
    for here, values, name in (
        (axes[0], F, "exact F of three layers"),
        (axes[1], blocks, f"KFAC: error {float((F - blocks).norm() / F.norm()):.2f}"),
        (axes[2], joined, f"tridiagonal: error {float((F - joined).norm() / F.norm()):.2f}"),
    ):
        top = float(F.abs().max())
        here.imshow(values, cmap="RdBu_r", norm=SymLogNorm(top / 100, vmin=-top, vmax=top), interpolation="nearest")
        here.set(title=name, xticks=[], yticks=[])
    return figure


def two_level() -> Figure:
    """How much of the error of KFAC's step each coarse space leaves."""
    damping, F = 1e-2, network_fisher()
    B = F + damping * torch.eye(len(F), dtype=F.dtype)
    model, (x, y) = deep()[0], digits()
    model.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()
    layers = expected(model).layers
    M = {name: layer.pack([p.grad for p in layer.parameters]) for name, layer in layers.items()}
    exact = torch.linalg.solve(B, flat(M))
    spaces = (Nicolaides(), SpectralSpace(), KrylovNicolaides(), ResidualSpace(), KrylovResidual())
    left = {}
    for space in spaces:
        joint, fine = joint_map(TwoLevel(KFAC(), space), damping)
        errors = [step - exact for step in (flat(joint @ M), flat({name: fine[name] @ M[name] for name in M}))]
        left[type(space).__name__] = float((errors[0] @ B @ errors[0]) / (errors[1] @ B @ errors[1]))
    figure, axis = plt.subplots(figsize=(2 * PAIR, 0.7 * PAIR), layout="constrained")
    axis.barh(list(left), list(left.values()), color=INK)
    axis.bar_label(axis.containers[0], fmt="%.2f", padding=3)
    axis.invert_yaxis()
    axis.set(title="squared error of the step, KFAC's = 1, damping .01", xlim=(0, 1.15))
    return figure


def physics() -> Figure:
    """The error of a physics-informed network along training, as `benchmarks/physics.py` measured it."""
    newest = max((HERE.parents[1] / "benchmarks").glob("*/pinn.json"))
    figure, axes = plt.subplots(1, 2, figsize=(2.6 * PAIR, PAIR), layout="constrained", sharey=True)
    for (name, seeds), colour in zip(
        json.loads(newest.read_text())["curves"].items(), ("#999999", PALE, INK), strict=True
    ):
        for axis, against in zip(axes, ("step", "seconds"), strict=True):
            for curve in seeds:
                x, y = ([point[key] for point in curve[1:]] for key in (against, "error"))
                axis.loglog(x, y, color=colour, linewidth=1, label=name if curve is seeds[0] else None)
            axis.set(xlabel={"step": "steps", "seconds": "seconds on one core"}[against])
    axes[0].set(ylabel="relative error of u")
    axes[0].legend(fontsize=6)
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
    fngd,
    kpsvd,
    rank_two,
    damping,
    block_tridiagonal,
    two_level,
    physics,
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
