"""What an approximation costs on a layer: counted by running it on tensors that have a shape and no data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from natgrad.fishers import Approximation
from natgrad.layers import Layer

aten = torch.ops.aten


@dataclass(frozen=True)
class Cost:
    """The ``structure`` of a layer's matrix, the ``memory`` of its curvature in bytes, and floating-point operations.

    ``step``: of a product with the inverse; ``refresh``: of a new matrix and its inverse.
    """

    structure: str
    memory: int
    step: int
    refresh: int


def cost(approximation: Approximation, layer: Layer, examples: int = 1) -> Cost | None:
    """The cost on a layer; ``None`` if what is done depends on the data.

    Products and factorisations count, elementwise operations do not. Of a method that keeps samples the figures are for
    a batch of ``examples``, with one position each.
    """
    seen = layer.blank(examples, torch.device("cpu"))
    stats = approximation.merge(None, approximation.observe(seen), 0.0)
    stats = {name: statistic.restored(statistic.value.to("meta")) for name, statistic in stats.items()}
    try:
        with _Counting() as counting:
            matrix = approximation.assemble(stats)
            inverse = approximation.invert(matrix, 1.0)
            refresh = counting.flops
            inverse @ torch.zeros(layer.shape, dtype=layer.parameters[0].dtype, device="meta")
    except (NotImplementedError, RuntimeError):
        return None
    kept = [*inverse.tensors().values(), *(matrix.tensors().values() if approximation.keeps else ())]
    memory = size([*(statistic.value for statistic in stats.values()), *kept])
    return Cost(type(matrix).__name__, memory, counting.flops - refresh, refresh)


def size(tensors: Iterable[Tensor]) -> int:
    """The memory of the tensors in bytes, each storage once."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


class _Counting(TorchDispatchMode):
    """Counts operations, and answers for the data that tensors on "meta" lack: all is finite, and every number 1."""

    def __init__(self) -> None:
        from torch.utils.flop_counter import flop_registry  # not at every import of natgrad

        super().__init__()
        self.flops = 0
        self.known = flop_registry

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is aten._local_scalar_dense.default:
            return args[0].dtype == torch.bool or 1.0
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in _FACTORISATIONS:
            self.flops += round(_FACTORISATIONS[func.overloadpacket](*args))
        elif func.overloadpacket in self.known:
            self.flops += self.known[func.overloadpacket](*args, **(kwargs or {}), out_val=result)
        return result


def _cubes(factor: float) -> Callable[..., float]:
    """``factor`` d^3 for every matrix (d, d) of the first argument."""
    return lambda X, *others: factor * math.prod(X.shape[:-1]) * X.shape[-1] ** 2


def _solve(X: Tensor, B: Tensor, *others: Any) -> float:
    return X.shape[-1] ** 2 * B.numel() / X.shape[-1]


_FACTORISATIONS: dict[Any, Callable[..., float]] = {
    aten.linalg_cholesky_ex: _cubes(1 / 3),
    aten.cholesky_inverse: _cubes(2 / 3),
    aten._linalg_eigh: _cubes(9),  # LAPACK's tridiagonal reduction, its eigenvectors, and the way back
    aten.linalg_solve_triangular: _solve,
    aten.cholesky_solve: lambda B, X, *others: 2 * _solve(X, B),
    aten.linalg_inv_ex: _cubes(2),
    aten.linalg_qr: _cubes(4 / 3),
    aten._linalg_svd: _cubes(20),
}
