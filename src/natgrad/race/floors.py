"""The floor of a step: the operations that its products with the inverse need, whatever the code around them does."""

from collections.abc import Callable

from torch import nn

Flops = Callable[[int, int, int], int]  # of one layer, from its rows, its columns and the examples of a batch


def kronecker(out: int, width: int, n: int) -> int:
    """G M A: two products."""
    return 2 * out * width * (out + width)


def spectral(out: int, width: int, n: int) -> int:
    """Into an eigenbasis and back: four products."""
    return 2 * kronecker(out, width, n)


def input_side(out: int, width: int, n: int) -> int:
    """M A: one product."""
    return 2 * out * width * width


def output_side(out: int, width: int, n: int) -> int:
    """G M: one product."""
    return 2 * out * out * width


def gram(out: int, width: int, n: int) -> int:
    """<DW_n, M> for every example, and a weighted sum of the DW_n."""
    return 4 * n * out * width


def two_level(out: int, width: int, n: int) -> int:
    """A Kronecker product, the examples' response to it, and the Fisher's product with it."""
    return kronecker(out, width, n) + gram(out, width, n)


def nothing(out: int, width: int, n: int) -> int:
    """No product at all."""
    return 0


FLOORS: dict[str, Flops] = {
    "diagonal": nothing,
    "fngd": nothing,
    "kfac": kronecker,
    "tkfac": kronecker,
    "kpsvd": kronecker,
    "ekfac": spectral,
    "tekfac": spectral,
    "deflated": spectral,
    "lanczos": spectral,
    "kfac-corrected": spectral,
    "kfac-tridiagonal": spectral,
    "woodbury": gram,
    "woodbury-joint": gram,
    "tengrad": gram,
    "sngd": input_side,
    "foof": input_side,
    "ngplus": output_side,
    "two-level": two_level,
    "two-level-tselepidis": spectral,
}


def floor_flops(name: str, model: nn.Module, examples: int) -> int | None:
    """Operations of the products of one step of the entry ``name``; None where they are not known.

    Those of methods in example space depend on the positions of a convolution, and are known for dense layers only.
    """
    family = "two-level" if name.startswith("two-level") and name not in FLOORS else name
    layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    flops = FLOORS.get(family)
    if flops is None or (flops in (gram, two_level) and any(isinstance(m, nn.Conv2d) for m in layers)):
        return None
    shapes = [m.weight.flatten(1).shape for m in layers]
    return sum(flops(out, width, examples) for out, width in shapes)
