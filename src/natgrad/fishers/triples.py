"""Leading singular triples of a rearranged Fisher: by power iteration, by one application over time, by Lanczos.

A triple (s, u, v) is handed on as the pair sqrt(s) u, sqrt(s) v: the factors of one Kronecker product.
"""

from __future__ import annotations

import torch
from torch import Tensor

from natgrad.fishers.rearrangement import Pair, Rearrangement, inner, norm, unit


def identity(like: Rearrangement) -> Tensor:
    """The start for the leading triple, which is positive: I (*groups, out, out)."""
    g = like.seen.g
    return torch.eye(g.shape[-1], dtype=g.dtype, device=g.device).expand(*g.shape[:-3], -1, -1)


def indefinite(like: Rearrangement) -> Tensor:
    """The start for any other triple: x y^T + y x^T with the same random x and y at every call (*groups, out, out)."""
    g = like.seen.g
    generator = torch.Generator(g.device).manual_seed(0)
    x, y = torch.randn((2, g.shape[-1], 1), generator=generator, dtype=g.dtype, device=g.device)
    return (x * y.mT + y * x.mT).expand(*g.shape[:-3], -1, -1)


def power(Z: Rearrangement, V: Tensor, tolerance: float, iterations: int) -> Pair:
    """The leading triple by power iteration from V, until |Z v - s u| <= tolerance s; zero where s is mere rounding.

    The tolerance is at least 100 units of rounding. Reads one number from the device an iteration.
    """
    tolerance = max(tolerance, 100 * torch.finfo(V.dtype).eps)
    X, rounding = Z @ unit(V), Z.rounding
    for _ in range(iterations):
        U = unit(X)
        Y = Z.adjoint(U)
        s, V = norm(Y), unit(Y)
        X = Z @ V
        if not (norm(X - s * U) > tolerance * s + rounding).any():
            break
    root = torch.where(s > rounding, s, 0.0).sqrt()
    return root * U, root * V


def stream(Z: Rearrangement, old: Pair, start: Tensor, decay: float, times: int) -> Pair:
    """``old`` moved towards the triple of the averaged Fisher, Z being its newest part: X <- ema(X, Z v), Y alike.

    Both products are taken with the directions u = X/|X|, v = Y/|Y| of before: a direction that has just seen the batch
    would find its own noise in it. ``times`` > 1 repeats from the same ``old`` with the directions so found.
    """
    before = X, Y = old[0] * norm(old[0]), old[1] * norm(old[1])  # s u, s v
    for _ in range(times):
        seen_X = Z @ unit(Y, start)
        seen_Y = Z.adjoint(unit(X, seen_X))
        X, Y = torch.lerp(seen_X, before[0], decay), torch.lerp(seen_Y, before[1], decay)
    return _rooted(X), _rooted(Y)


def average(old: Pair, new: Pair, decay: float) -> Pair:
    """The moving average of both factors, ``new`` taken with the sign that agrees with ``old``."""
    sign = _sign(inner(unit(old[0]), new[0]) + inner(unit(old[1]), new[1]))
    return torch.lerp(sign * new[0], old[0], decay), torch.lerp(sign * new[1], old[1], decay)


def lanczos(Z: Rearrangement, V: Tensor, size: int, restarts: int, tolerance: float) -> tuple[Pair, Pair]:
    """The two leading triples by Golub-Kahan bidiagonalisation from V with a basis of ``size``, restarted.

    Z Q = P H with orthonormal P, Q (re-orthogonalised in full, twice) and H upper bidiagonal: the singular triples of
    H are those of Z in the two bases. It starts again from v_1 + v_2 until sum_j |Z^T u_j - s_j v_j| <= tolerance s_1;
    the other half of the residual, |Z v_j - s_j u_j|, is zero by construction and says nothing.
    """
    tolerance = max(tolerance, 100 * torch.finfo(V.dtype).eps)
    for _ in range(restarts):
        P, H, Q, beta = _bidiagonalise(Z, V, size)
        left, s, right = torch.linalg.svd(H)
        residual = (beta * left[..., -1, :2]).abs().sum(-1)
        (U1, V1), (U2, V2) = ((_combined(P, left[..., :, j]), _combined(Q, right[..., j, :])) for j in (0, 1))
        if not (residual > tolerance * s[..., 0]).any():
            break
        V = V1 + V2
    sign = _sign(U1.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None])
    Y1 = Z.adjoint(sign * U1)  # positive, as an image of Z^T; V1 is so only up to the tolerance
    first, second = norm(Y1).sqrt(), s[..., 1, None, None]
    second = torch.where(second > 100 * torch.finfo(V.dtype).eps * s[..., :1, None], second, 0.0).sqrt()
    return (first * sign * U1, first * unit(Y1)), (second * U2, second * V2)


def _bidiagonalise(Z: Rearrangement, V: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """P (*groups, size, in, in), H (*groups, size, size), Q (*groups, size, out, out), the last beta (*groups, 1)."""
    P: list[Tensor] = []
    Q, alphas, betas = [unit(V)], list[Tensor](), list[Tensor]()
    for k in range(size):
        w = _orthogonal(Z @ Q[k], P)
        least = 100 * torch.finfo(V.dtype).eps * (alphas[0] if alphas else norm(w))
        alphas.append(torch.where(norm(w) > least, norm(w), 0.0))
        P.append(unit(torch.where(alphas[k] > 0, w, 0.0)))
        z = _orthogonal(Z.adjoint(P[k]), Q)
        betas.append(torch.where(norm(z) > least, norm(z), 0.0))
        Q.append(unit(torch.where(betas[k] > 0, z, 0.0)))
    diagonal, above = (torch.cat(x, -1).squeeze(-2) for x in (alphas, betas))
    H = torch.diag_embed(diagonal) + torch.diag_embed(above[..., :-1], 1)
    return torch.stack(P, -3), H, torch.stack(Q[:-1], -3), above[..., -1:]


def _orthogonal(X: Tensor, basis: list[Tensor]) -> Tensor:
    """X less its part in the span of an orthonormal ``basis``, taken off twice."""
    for _ in range(2):
        for B in basis:
            X = X - inner(B, X) * B
    return X


def _combined(basis: Tensor, weights: Tensor) -> Tensor:
    return (basis * weights[..., None, None]).sum(-3)


def _sign(x: Tensor) -> Tensor:
    """-1 where x < 0, else 1."""
    return 1 - 2 * (x < 0).to(x.dtype)


def _rooted(X: Tensor) -> Tensor:
    """sqrt(|X|) X/|X|."""
    return norm(X).sqrt() * unit(X)
