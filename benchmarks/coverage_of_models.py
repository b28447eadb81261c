"""The share of parameters with curvature in public model definitions, and per-example gradients against autograd.

`python benchmarks/coverage_of_models.py --out benchmarks/coverage_of_models.md`, a few minutes on one core. The models,
listed in `zoo/`, are small, with random weights: nothing is downloaded. In an environment that has this project, they
need

    pip install torch==2.13.0 rich pillow transformers==5.23.0 aiohttp psutil pyparsing requests xxhash
    pip install --no-deps timm==1.0.31 segmentation_models_pytorch==0.6.0 torch_geometric==2.8.1

where the second line leaves out torchvision, of which these models use nothing.

Coverage is that of the model in training, in float64. Gradients are those of a random linear function of the logits of
every example, with batch norm at its running statistics and without dropout, from one pass over all examples: what
natgrad's captures say of every covered parameter, against `torch.func.vmap(torch.func.grad(...))`, or a loop over
examples where vmap cannot map a model. `--only` takes families or names; `--build` runs each model forward and backward
and compares the two references, without natgrad.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.modules import batchnorm, dropout
from torch.nn.utils import parametrizations
from torch.utils._pytree import tree_map
from zoo import FAMILIES, Entry, built, entries

ENOUGH = 0.99
SHORT = 160  # characters of a cell
HEAD = ("family", "model", "parameters", "operations seen", "covered", "not covered, and why", "gradients", "seconds")
STILL = (batchnorm._BatchNorm, dropout._DropoutNd, parametrizations._SpectralNorm)
Gradients = dict[str, Tensor]


@dataclass(frozen=True)
class Row:
    """One model of the table; ``covered`` is ``None`` where it failed."""

    family: str
    model: str
    parameters: int = 0
    seen: str = ""
    covered: float | None = None
    left: str = ""
    gradients: str = ""
    seconds: float = 0.0

    def cells(self) -> list[str]:
        """As text, in the order of the heading."""
        share = "failed" if self.covered is None else f"{100 * self.covered:.1f} %"
        size, time = f"{self.parameters:,}", f"{self.seconds:.1f}"
        return [self.family, self.model, size, short(self.seen), share, short(self.left), self.gradients, time]


def short(text: str, limit: int = SHORT) -> str:
    """One line of a cell."""
    text = " ".join(text.split()).replace("|", "\\|")
    return text if len(text) <= limit else text[: limit - 1] + "…"


# per-example gradients


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter once, by its first name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def random_weights(like: Tensor) -> Tensor:
    """Those of the scalar of every example, the same in every call."""
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(like.dtype)


def terms(value: Tensor) -> Tensor:
    """The scalars (n,) of the examples: the sum of their logits times fixed random weights."""
    return (value * random_weights(value)).reshape(len(value), -1).sum(1)


def by_loop(model: nn.Module, args: Any, kwargs: Any, output: Callable[[Any], Tensor]) -> Gradients:
    """One backward pass an example, all from one forward pass."""
    parameters = trained(model)
    rows = [
        torch.autograd.grad(term, list(parameters.values()), retain_graph=True, materialize_grads=True)
        for term in terms(output(model(*args, **kwargs)))
    ]
    return {name: torch.stack(each).detach() for name, each in zip(parameters, zip(*rows, strict=True), strict=True)}


def by_vmap(model: nn.Module, args: Any, kwargs: Any, output: Callable[[Any], Tensor], dim: int) -> Gradients:
    """All examples at once, each as a batch of one."""
    weights = random_weights(output(model(*args, **kwargs)))
    parameters = {name: p.detach() for name, p in trained(model).items()}

    def term(state: Gradients, weight: Tensor, one: Any) -> Tensor:
        places, names = tree_map(lambda x: x.unsqueeze(dim), one)
        return (output(functional_call(model, state, places, names)) * weight).sum()

    return vmap(grad(term), in_dims=(None, 0, dim))(parameters, weights, (args, kwargs))


def per_example_gradients(
    model: nn.Module, args: Any, kwargs: Any, output: Callable[[Any], Tensor], dim: int | None = 0
) -> Gradients:
    """Gradients (n, *shape) of the scalar of every example, of all trained parameters: by vmap, or else by a loop."""
    if dim is not None:
        try:
            return by_vmap(model, args, kwargs, output, dim)
        except Exception:  # of control flow, of in-place operations, of an operation without a rule
            pass
    return by_loop(model, args, kwargs, output)


def deviation(found: Gradients, expected: Gradients) -> tuple[float, str]:
    """The largest relative difference over parameters, and whose; gradients near zero are held against the largest."""
    top = max(float(G.abs().max()) for G in expected.values())
    worst, where = 0.0, ""
    for name, G in found.items():
        scale = max(float(expected[name].abs().max()), 1e-3 * top, 1e-30)
        apart = float((G - expected[name]).abs().max()) / scale
        if not apart <= worst:  # not a number is the worst
            worst, where = apart, name
    return worst, where


def still(model: nn.Module, args: Any, kwargs: Any) -> None:
    """Keep the model in training but for what mixes examples or draws: some compute otherwise in evaluation.

    Batch norm gets the statistics of these examples: those it starts with let deep networks fade.
    """
    modules = list(model.train().modules())
    for module in modules:
        if isinstance(module, batchnorm._BatchNorm):
            module.momentum = None  # of averages over all batches, of which this is the first
    with torch.no_grad():
        model(*args, **kwargs)
    for module in modules:
        if isinstance(module, STILL) or type(module).__name__ == "DropPath":
            module.eval()


# what natgrad says


def coverage_of(entry: Entry) -> tuple[str, float, str]:
    """Operations seen, share covered, and what is not with the reason."""
    import natgrad

    model, args, kwargs = built(entry)
    report = natgrad.coverage(model.train(), *args, **kwargs)
    left: dict[str, list[str]] = {}
    for row in report.rows:
        if row.rule != "natural":
            left.setdefault(row.why, []).extend(row.parameters)
    reasons = [f"{names[0]}{f' and {len(names) - 1} more' if names[1:] else ''}: {why}" for why, names in left.items()]
    return ", ".join(report.operations), report.covered, "; ".join(reasons)


def captured_gradients(
    model: nn.Module, args: Any, kwargs: Any, output: Callable[[Any], Tensor], dim: int | None
) -> tuple[Gradients, Gradients]:
    """Gradients (n, *shape) of the scalar of every example, of the covered parameters, from natgrad's captures; and the
    sums (1, *shape) over the examples, of those parameters whose use the examples share."""
    from natgrad.engine import Engine

    engine = Engine(model, only_training=False, batch_dim=dim or None)
    engine.armed = True
    terms(output(model(*args, **kwargs))).sum().backward()
    (record,) = engine.take()
    engine.close()
    names = {id(p): name for name, p in trained(model).items()}
    found: Gradients = {}
    shared: Gradients = {}
    for layer in record.layers.values():
        for capture in record.captures(layer):
            DW = torch.cat(list(capture.weight_gradients()), -3).movedim(-3, 0)
            alone = dim is not None and len(DW) == record.examples()
            rows = list(DW) if alone else [DW.sum(0)]
            for p in layer.parameters:
                known = found if alone else shared
                known.setdefault(names[id(p)], torch.zeros(len(rows), *p.shape, dtype=p.dtype))
            for k, block in enumerate(rows):
                tensors = [(found if alone else shared)[names[id(p)]][k] for p in layer.parameters]
                for part, values in zip(layer.parts(tensors), layer.unpack(block), strict=True):
                    part += values
    return found, {name: G + found.pop(name).sum(0) if name in found else G for name, G in shared.items()}


# the run


def check(entry: Entry) -> str:
    """How far captured gradients are from the reference."""
    model, args, kwargs = built(entry)
    still(model, args, kwargs)
    expected = per_example_gradients(model, args, kwargs, entry.output, entry.dim)
    found, shared = captured_gradients(model, args, kwargs, entry.output, entry.dim)
    summed = {name: G.sum(0, keepdim=True) for name, G in expected.items()}
    worst, where = max(deviation(found, expected), deviation(shared, summed))
    size = sizes({name: p for name, p in trained(model).items() if name in shared})
    note = f", {100 * size / sizes(trained(model)):.1f} % summed" if shared else ""
    return f"{worst:.0e}" + (f" ({where})" if worst > 1e-6 else "") + note


def build(entry: Entry) -> Row:
    """Forward and backward of a model in training, and the references against each other; covered: has a gradient."""
    model, args, kwargs = built(entry)
    parameters = trained(model)
    begin = time.perf_counter()
    entry.output(model.train()(*args, **kwargs)).sum().backward()
    seconds = time.perf_counter() - begin
    unused = {name: p for name, p in parameters.items() if p.grad is None}
    still(model, args, kwargs)
    looped, note = by_loop(model, args, kwargs, entry.output), "loop only"
    if entry.dim is not None:
        try:
            worst, where = deviation(by_vmap(model, args, kwargs, entry.output, entry.dim), looped)
            note = f"{worst:.0e} {where if worst > 1e-6 else ''}"
        except Exception as error:
            note = short(f"loop only: {type(error).__name__}: {error}", 100)
    share = 1 - sizes(unused) / sizes(parameters)
    left = f"no gradient: {', '.join(unused)}" if unused else ""
    return Row(entry.family, entry.name, sizes(parameters), "", share, left, note, seconds)


def measure(entry: Entry) -> Row:
    """Coverage and gradients of a model."""
    begin = time.perf_counter()
    seen, covered, left = coverage_of(entry)
    gradients = attempt(lambda: check(entry))
    size = sizes(trained(built(entry)[0]))
    return Row(entry.family, entry.name, size, seen, covered, left, gradients, time.perf_counter() - begin)


def sizes(parameters: dict[str, nn.Parameter]) -> int:
    """How many numbers they are."""
    return sum(p.numel() for p in parameters.values())


def attempt(run: Callable[[], str]) -> str:
    """What it says, or its error."""
    try:
        return run()
    except Exception as error:
        return short(f"{type(error).__name__}: {error}", 80)


def row(entry: Entry, one: Callable[[Entry], Row]) -> Row:
    """The model's row; with the error where it failed."""
    try:
        return one(entry)
    except Exception as error:
        return Row(entry.family, entry.name, left=f"{type(error).__name__}: {error}")


def progress(chosen: list[Entry]) -> Iterable[Entry]:
    """The entries, with a bar where rich is installed."""
    try:
        from rich.console import Console
        from rich.progress import track
    except ImportError:
        return chosen
    return track(chosen, "models", console=Console(stderr=True))


def table(head: Iterable[str], rows: Iterable[list[str]]) -> str:
    """Of markdown."""
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def totals(rows: list[Row]) -> Iterator[list[str]]:
    """Per family: models, those that ran, those that are covered."""
    for family in [*dict.fromkeys(row.family for row in rows), "all"]:
        shares = [row.covered for row in rows if family in (row.family, "all")]
        ran = [share for share in shares if share is not None]
        enough = sum(share >= ENOUGH for share in ran)
        yield [family, str(len(shares)), str(len(ran)), f"{enough} ({100 * enough / max(len(shares), 1):.0f} %)"]


def report(rows: list[Row]) -> str:
    """Totals, then every model."""
    summary = table(("family", "models", "ran", f"covered to {100 * ENOUGH:.0f} % or more"), totals(rows))
    return f"{summary}\n\n{table(HEAD, (row.cells() for row in rows))}\n"


def main() -> None:
    """Print the table, and write it where ``--out`` says."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="file of the table")
    parser.add_argument("--only", nargs="*", default=[], help=f"names of models, or of {', '.join(FAMILIES)}")
    parser.add_argument("--build", action="store_true", help="forward and backward alone, without natgrad")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of the libraries, about sizes that nobody would train
    wanted = set(options.only)
    chosen = [entry for entry in entries() if not wanted or wanted & {entry.family, entry.name}]
    text = report([row(entry, build if options.build else measure) for entry in progress(chosen)])
    print(text)
    if options.out:
        options.out.write_text(text)


if __name__ == "__main__":
    main()
