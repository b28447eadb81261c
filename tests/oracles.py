"""What the tests compare with: dense matrices, autograd, closed forms. Nothing here knows how natgrad computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacrev, vmap
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvTransposeNd

from natgrad.capture import Capture
from natgrad.matrix import (
    Clamp,
    Dense,
    Diagonal,
    Factored,
    Grouped,
    Kronecker,
    KroneckerSum,
    LowRank,
    Matrix,
    OneSided,
    Relative,
    Ridge,
    Rows,
    Spectral,
    Tikhonov,
    Unit,
)


def error(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected| in the Frobenius norm."""
    assert found.shape == expected.shape, f"{tuple(found.shape)} is not {tuple(expected.shape)}"
    return float((found - expected).norm() / expected.norm().clamp(min=1e-300))


def assert_equal(found: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    """Equal to a relative ``tolerance`` in the Frobenius norm; NaN is never equal."""
    assert error(found, expected) <= tolerance, f"relative error {error(found, expected):.3g} > {tolerance:g}"


def rounding(A: Tensor) -> float:
    """d u (cond(A) + 10): how far rounding can lead two ways to A^-1 M, or A^-1 A and I, apart; A (*groups, d, d).

    A stable method solves a system A + E exactly, which changes the result by cond(A) |E| / |A| of itself. For Cholesky
    that ratio is at most d (3 d + 1) u (Higham 2002, theorem 10.4), with u half the eps of the dtype; errors of both
    signs add up like the root of their number, which leaves about d u. The products on the way, of sums of d terms,
    cost d u each whatever the condition; no method nor its dense twin here takes more than ten.
    """
    return A.shape[-1] * torch.finfo(A.dtype).eps / 2 * (float(torch.linalg.cond(A).max()) + 10)


# Captures.

SHAPES = ("unshared", "shared", "grouped")


def random_capture(seed: int, shape: str = "unshared", n: int = 40, out: int = 6, width: int = 8) -> Capture:
    """Correlated inputs and output gradients, g scaled by 0.3 + |a_1|, the last input constant 1 (the bias)."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    lead = {"unshared": (n, 1), "shared": (n, 4), "grouped": (3, n, 4)}[shape]
    groups = lead[:-2]
    a = normal(*lead, width) @ normal(*groups, width, width).unsqueeze(-3)
    a = a + 0.5 * normal(*lead[:-1], 1, width)  # positions of one example resemble each other
    a[..., -1] = 1.0
    g = normal(*lead, out) @ normal(*groups, out, out).unsqueeze(-3)
    g = (g + 0.5 * normal(*lead[:-1], 1, out)) * (0.3 + a[..., :1].abs())
    return Capture(a, g, count=n, rows=n * lead[-1])


def examples(seen: Capture, chosen: slice) -> Capture:
    """Some of the examples of a capture."""
    a, g = seen.a[..., chosen, :, :], seen.g[..., chosen, :, :]
    n = a.shape[-3]
    return Capture(a, g, n, n * a.shape[-2])


# The dense Fisher.


def dense_fisher(seen: Capture) -> Tensor:
    """1/count sum_n vec(DW_n) vec(DW_n)^T, DW_n = sum_t g_nt a_nt^T, by a loop over examples."""
    n = seen.a.shape[-3]
    rows = [(seen.g[..., i, :, :].mT @ seen.a[..., i, :, :]).flatten(-2) for i in range(n)]
    return torch.stack([row.unsqueeze(-1) * row.unsqueeze(-2) for row in rows]).sum(0) / seen.count


def position_fisher(seen: Capture) -> Tensor:
    """The same without cross terms between positions: every position as an example of its own."""
    alone = Capture(seen.flat_a.unsqueeze(-2), seen.flat_g.unsqueeze(-2), seen.count, seen.rows)
    return dense_fisher(alone)


def partial_traces(F: Tensor, out: int, width: int) -> tuple[Tensor, Tensor]:
    """(in, in) and (out, out): what remains of F (out in, out in) after tracing over the other index."""
    parts = F.unflatten(-1, (out, width)).unflatten(-3, (out, width))  # (..., out, in, out, in)
    return torch.einsum("...oioj->...ij", parts), torch.einsum("...oipi->...op", parts)


def rearranged(F: Tensor, out: int, width: int) -> Tensor:
    """Z (in in, out out) with |F - S kron R| = |Z - vec(R) vec(S)^T|."""
    parts = F.unflatten(-1, (out, width)).unflatten(-3, (out, width))  # (..., out, in, out, in)
    return torch.einsum("...oipj->...ijop", parts).flatten(-4, -3).flatten(-2)


def on_symmetric(Z: Tensor) -> Tensor:
    """The part of a rearranged Fisher that maps symmetric matrices to symmetric ones."""

    def projection(size: int) -> Tensor:
        eye = torch.eye(size**2)
        return (eye + eye.unflatten(0, (size, size)).transpose(0, 1).flatten(0, 1)) / 2

    width, out = (round(size**0.5) for size in Z.shape[-2:])
    return projection(width) @ Z @ projection(out)


# Damping.


def kron(left: Tensor, right: Tensor) -> Tensor:
    """The Kronecker product over the last two dimensions."""
    size = left.shape[-1] * right.shape[-1]
    product = left[..., :, None, :, None] * right[..., None, :, None, :]
    return product.reshape(*product.shape[:-4], size, size)


def damped(matrix: Matrix, damping: float) -> Tensor:
    """The dense matrix that ``matrix.inverse(damping)`` must be the inverse of, by the rule that it carries."""
    if isinstance(matrix, Grouped):
        return torch.block_diag(*damped(matrix.inner, damping))
    F = matrix.dense()
    if isinstance(matrix, (Dense, Diagonal, LowRank)):
        return _plus(F, damping)
    if isinstance(matrix, OneSided):
        return F + (damping + matrix.eps * _trace(_written_out(matrix.factor)))[..., None, None] * torch.eye(
            F.shape[-1]
        )
    if isinstance(matrix, Rows):
        ridge = damping + matrix.eps * _trace(matrix.values)
        return F + torch.diag_embed(ridge.repeat_interleave(matrix.shape[-1], -1))
    if isinstance(matrix, KroneckerSum):
        return _clamped(matrix, damping)
    assert isinstance(matrix, (Kronecker, Spectral))
    return _by_rule(matrix, matrix.rule, F, damping)


def _by_rule(matrix: Kronecker | Spectral, rule: Any, F: Tensor, damping: float) -> Tensor:
    if isinstance(rule, Tikhonov):
        return _plus(F, damping)
    if isinstance(rule, Relative):
        mean = F.diagonal(dim1=-2, dim2=-1).mean(-1)
        if isinstance(matrix, Kronecker):
            return _by_rule(matrix, rule.rule, F, damping * float(mean.mean()))
        return F + damping * mean[..., None, None] * torch.eye(F.shape[-1])
    assert isinstance(matrix, Kronecker)
    G, A = _written_out(matrix.left), _written_out(matrix.right)
    if isinstance(rule, Ridge):
        left, right = (X + damping * _trace(X)[..., None, None] * torch.eye(X.shape[-1]) for X in (G, A))
        return kron(left, right)
    pi = torch.ones(G.shape[:-2])
    if isinstance(rule, Factored):
        pi = (_trace(A) / A.shape[-1] / (_trace(G) / G.shape[-1])).sqrt()
    else:
        assert isinstance(rule, Unit)
    pi = pi[..., None, None]
    root, I_out, I_in = damping**0.5, torch.eye(G.shape[-1]), torch.eye(A.shape[-1])
    return _plus(F + pi * root * kron(G, I_in) + root / pi * kron(I_out, A), damping)  # methods 0.8


def _clamped(matrix: KroneckerSum, damping: float) -> Tensor:
    """B^1/2 max(I + B^-1/2 C B^-1/2, tau) B^1/2 for the damped first product B and the second one C (methods 8)."""
    assert isinstance(matrix.guard, Clamp)
    first = Kronecker(matrix.left, matrix.right, matrix.rule)
    values, Q = torch.linalg.eigh(damped(first, damping))
    half = (Q * values.sqrt().unsqueeze(-2)) @ Q.mT
    second = kron(matrix.second_left, matrix.second_right)
    values, Q = torch.linalg.eigh(_plus(half.inverse() @ second @ half.inverse(), 1.0))
    return half @ (Q * values.clamp(min=matrix.guard.tau).unsqueeze(-2)) @ Q.mT @ half


def _plus(F: Tensor, damping: float) -> Tensor:
    return F + damping * torch.eye(F.shape[-1])


def _written_out(X: Tensor) -> Tensor:
    """A side (d, d), or of a diagonal side the column (d, 1), as a matrix."""
    return torch.diag_embed(X.squeeze(-1)) if X.shape[-1] == 1 else X


def _trace(X: Tensor) -> Tensor:
    return X.diagonal(dim1=-2, dim2=-1).sum(-1)


# Autograd.


def block(weight: Tensor, bias: Tensor | None) -> Tensor:
    """Weight-like (n, out, *in) and bias-like (n, out) tensors as n of the library's blocks (n, out, in + 1)."""
    flat = weight.flatten(2)
    return flat if bias is None else torch.cat([flat, bias.unsqueeze(-1)], -1)


def block_of(module: nn.Module, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The same for any kind of layer that has its tensors in another order; groups are one above the other."""
    n = len(weight)
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, _NormBase)):
        return block(weight.reshape(n, -1, 1), None if bias is None else bias.reshape(n, -1))
    if isinstance(module, _ConvTransposeNd):
        groups = weight.chunk(module.groups, 1)
        return block(torch.cat([group.transpose(1, 2) for group in groups], 1), bias)
    if type(module).__name__ == "Conv1D":
        return block(weight.transpose(1, 2), bias)
    return block(weight, bias)


def jacobians(model: nn.Module, inputs: Any, select: Callable[[Any], Tensor] = lambda y: y) -> dict[str, Tensor]:
    """The Jacobian (outputs of the batch, out (in+1)) of the model in every layer that has a trained weight."""
    parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    frozen = {name: p.detach() for name, p in model.named_parameters() if not p.requires_grad}
    args = inputs if isinstance(inputs, tuple) else (inputs,)

    def outputs(parameters: dict[str, Tensor]) -> Tensor:
        return select(functional_call(model, {**frozen, **parameters}, args)).flatten()

    return {name: J.flatten(1) for name, J in _blocks(model, jacrev(outputs)(parameters)).items()}


def per_example_gradients(
    model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor
) -> dict[str, Tensor]:
    """Gradients (n, out, in+1) of the loss of each example alone, by ``vmap(grad)``."""
    parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    frozen = {name: p.detach() for name, p in model.named_parameters() if not p.requires_grad}

    def alone(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        output = functional_call(model, {**frozen, **parameters}, (x.unsqueeze(0),))
        return loss(output, y.unsqueeze(0))

    return _blocks(model, vmap(grad(alone), in_dims=(None, 0, 0))(parameters, x, y))


def ggn(model: nn.Module, inputs: Any, loss: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """J^T H J per layer, H the Hessian of the user's own ``loss`` of the whole batch in the output."""
    with torch.no_grad():
        output = model(*inputs) if isinstance(inputs, tuple) else model(inputs)
    H = hessian(lambda flat: loss(flat.view_as(output)))(output.flatten())
    return {name: J.mT @ H @ J for name, J in jacobians(model, inputs).items()}


def _blocks(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    names = [name.removesuffix("weight").removesuffix(".") for name in tensors if name.endswith("weight")]
    prefix = {name: f"{name}." if name else "" for name in names}
    return {
        name: block_of(model.get_submodule(name), tensors[prefix[name] + "weight"], tensors.get(prefix[name] + "bias"))
        for name in names
    }
