"""What an approximation costs on a layer: counted by running it on tensors that have a shape and no data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from natgrad.capture import Capture
from natgrad.fishers import Approximation
from natgrad.layers import Layer
from natgrad.matrix import LinearMap
from natgrad.matrix.whitening import steepest, turned
from natgrad.optim.geometry import ROOT, Frobenius, Geometry
from natgrad.sparse import Sparse, SparseCapture

aten = torch.ops.aten
_FROBENIUS = Frobenius()


@dataclass(frozen=True)
class Cost:
    """The ``structure`` of a layer's matrix, the ``memory`` of its curvature in bytes, and floating-point operations.

    ``step``: of what gives the direction, turning a root; ``refresh``: of a new matrix and its inverse, or root.
    """

    structure: str
    memory: int
    step: int
    refresh: int


def cost(approximation: Approximation, layer: Layer, examples: int = 1, geometry: Geometry = _FROBENIUS) -> Cost | None:
    """The cost on a layer under a geometry; ``None`` if what is done depends on the data.

    Products and factorisations count, elementwise operations do not. Of a method that keeps samples the figures are for
    a batch of ``examples``, with one position each.
    """
    seen = layer.blank(examples, torch.device("cpu"))
    stats = approximation.merge(None, approximation.observe(seen), 0.0)
    stats = {name: statistic.restored(statistic.value.to("meta")) for name, statistic in stats.items()}
    M = torch.zeros(layer.shape, dtype=layer.parameters[0].dtype, device="meta")
    try:
        with Counting() as counting:
            matrix = approximation.assemble(stats)
            inverse, kind = geometry.prepare(approximation, matrix, 1.0)
            refresh = counting.flops
            _, step, turn = _steps(counting, inverse, kind, M, geometry)
    except (NotImplementedError, RuntimeError):
        return None
    kept = [*inverse.tensors().values(), *(matrix.tensors().values() if approximation.keeps else ())]
    kept += [] if turn is None else [turn]
    memory = size(
        [*(statistic.value for statistic in stats.values()), *kept, torch.zeros((), dtype=torch.float32, device="meta")]
    )
    return Cost(type(matrix).__name__, memory, step, refresh)


def _steps(
    counting: Counting, S: LinearMap, kind: int, M: Tensor, geometry: Geometry
) -> tuple[int, int, Tensor | None]:
    """Flops of a direction, and of one that turns a root; what the latter leaves."""
    before = counting.flops
    if kind != ROOT:
        S @ M
        return counting.flops - before, counting.flops - before, None
    turn = steepest(S, M, geometry.iterations)[1]
    turning = counting.flops - before
    turned(S, turn, M)
    return counting.flops - before - turning, turning, turn


@dataclass(frozen=True)
class Work:
    """How long curvature takes on a layer, in flops of a product that takes as long: ``observe`` and ``refresh``.

    Factorisations run at a fraction of a product's speed, and what is read has to be moved: a constant stands for
    either. ``fixed`` is what any of the two takes, however small the layer; ``plain`` is the layer's own part of a
    training step, forwards and backwards, and ``see`` of one backward pass to the outputs alone. ``turn`` is what a
    direction takes that turns a root, beyond any other.
    """

    plain: float
    see: float
    observe: float
    refresh: float
    fixed: float
    turn: float


def work(
    approximation: Approximation, layer: Layer, examples: int, positions: int, geometry: Geometry = _FROBENIUS
) -> Work | None:
    """That of a layer, and of an observation of so many examples; ``None`` if what is done depends on the data."""
    *groups, out, width = layer.shape
    rows = examples * positions
    numbers = math.prod(groups) * rows * (out + (1 if layer.form.tokens else width))
    products = 0.0 if layer.form.tokens else 2.0 * math.prod(groups) * rows * out * width
    launch = _LAUNCH.get(layer.weight.device.type, _LAUNCH["cuda"])
    with Counting() as counting:
        try:
            seen = _blank(layer, examples, positions)
            stats = approximation.merge(None, approximation.observe(seen), 0.0)
            observe = counting.slow
            matrix = approximation.assemble(stats)
            S, kind = geometry.prepare(approximation, matrix, 1.0)
            refresh = counting.slow - observe
            M = torch.zeros(layer.shape, dtype=layer.weight.dtype, device="meta")
            stale, turning, _ = _steps(counting, S, kind, M, geometry)
            if approximation.corrects:
                before = counting.slow
                geometry.prepare(approximation, approximation.correct(matrix, [seen], 0.5), 1.0)
                observe += counting.slow - before
        except (NotImplementedError, RuntimeError):
            return None
    plain = 3 * products + _MOVE * math.prod(groups) * rows * out + launch
    turn = turning - stale + launch if turning > stale else 0.0
    return Work(plain, products + launch, observe + _MOVE * numbers, refresh, 2 * launch, turn)


def _blank(layer: Layer, examples: int, positions: int) -> Capture:
    """What a layer would see at so many positions of so many examples, without data."""
    one = layer.blank(1, torch.device("meta"))
    if isinstance(one, SparseCapture):
        ids, values = (x.expand(examples, positions, 1) for x in (one.inputs.ids, one.inputs.values))
        g = one.g.expand(examples, positions, -1)
        return SparseCapture(Sparse(ids, values, one.inputs.width), g, 1.0, 1.0, diagonal=one.diagonal)
    a, g = (x.new_zeros(*x.shape[:-3], examples, positions, x.shape[-1]) for x in (one.a, one.g))
    return Capture(a, g, 1.0, 1.0, diagonal=one.diagonal)


def size(tensors: Iterable[Tensor]) -> int:
    """The memory of the tensors in bytes, each storage once."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


class Counting(TorchDispatchMode):
    """Counts operations, ``slow`` with factorisations at their speed, and answers for the data that tensors on "meta"
    lack: all is finite, and every number 1."""

    def __init__(self) -> None:
        from torch.utils.flop_counter import flop_registry  # not at every import of natgrad

        super().__init__()
        self.flops = 0
        self.slow = 0.0
        self.known = flop_registry

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is aten._local_scalar_dense.default:
            return args[0].dtype == torch.bool or 1.0
        result = _elementwise(func, args, kwargs or {})
        if result is not None:
            return result
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in _FACTORISATIONS:
            count = _FACTORISATIONS[func.overloadpacket](*args)
            self.flops += round(count)
            self.slow += count * (2 if func.overloadpacket in _COUNTED_HIGH else 4)
        elif func.overloadpacket in self.known:
            count = self.known[func.overloadpacket](*args, **(kwargs or {}), out_val=result)
            self.flops += count
            self.slow += count
        return result


def _elementwise(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """What an elementwise operation gives on tensors without data, for which torch takes a hundred times as long."""
    operation = func.overloadpacket
    if (operation not in _ELEMENTWISE and func is not aten.all.default) or "out" in kwargs:
        return None
    tensors = [x for x in args if isinstance(x, Tensor)]
    if not all(x.is_meta and (x.is_floating_point() or x.dtype == torch.bool) for x in tensors):
        return None
    if func is aten.all.default:
        return torch.empty((), dtype=torch.bool, device="meta")
    shapes = {x.shape for x in tensors} - {torch.Size(())} or {torch.Size(())}
    shape = shapes.pop() if len(shapes) == 1 else torch.broadcast_shapes(*shapes)
    pair: list[Any] = [x for x in args[:2] if isinstance(x, (Tensor, int, float))]
    own = torch.result_type(*pair) if len(pair) == 2 else tensors[0].dtype
    return torch.empty(shape, dtype=torch.bool if operation in _QUESTIONS else own, device="meta")


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
_QUESTIONS = {aten.eq, aten.ne, aten.gt, aten.ge, aten.lt, aten.le, aten.isfinite, aten.bitwise_and, aten.bitwise_or}
_ELEMENTWISE = _QUESTIONS | {
    aten.mul,
    aten.add,
    aten.sub,
    aten.div,
    aten.abs,
    aten.clamp,
    aten.pow,
    aten.sqrt,
    aten.reciprocal,
}
_COUNTED_HIGH = {aten._linalg_eigh, aten._linalg_svd}
# One core, 50 to 100 GFLOP/s: Cholesky, its inverse and solves run at .07, .25 and .5 of a product's speed for sides
# of 64, 256 and 1,024; eigh and SVD, whose counts above are generous, at .25, .5 and 1. A copy takes 1 to 5 ns.
_MOVE = 64.0
_LAUNCH = {"cpu": 6e6, "cuda": 3e9}  # flops in the .1 ms that a layer's kernels and Python take in a training step
