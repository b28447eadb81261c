"""The map of a two-level method: fine inverses layer by layer, and a coarse solve over all layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from natgrad.fishers.coarse.observed import Blocks, ObservedFisher
from natgrad.matrix import LinearMap


@dataclass(frozen=True)
class CoarseSolve:
    """C = R0^T F_c^-1 R0, F_c = R0 (F + damping I) R0^T: rows R0_l (k, *groups, out, in), Cholesky factor.

    Where F_c cannot be factorised, which takes a damping near 0, C @ V is not finite.
    """

    rows: Blocks
    factor: Tensor

    @classmethod
    def of(cls, rows: Blocks, examples: ObservedFisher, damping: Mapping[str, float]) -> CoarseSolve:
        """From orthonormal rows."""
        shift = examples.same.new_tensor([damping[name] for name in rows])[examples.owner(rows)]
        factor, failed = torch.linalg.cholesky_ex(examples.gram(rows) + shift.diag())
        return cls(rows, torch.where(failed == 0, factor, torch.nan))

    def __matmul__(self, V: Blocks) -> dict[str, Tensor]:
        """C V."""
        inner = torch.cat([self.rows[name].flatten(1) @ V[name].flatten() for name in self.rows])
        b = torch.cholesky_solve(inner.unsqueeze(-1), self.factor).squeeze(-1)
        shares = b.split([len(rows) for rows in self.rows.values()])
        return {name: torch.tensordot(share, self.rows[name], 1) for name, share in zip(self.rows, shares, strict=True)}


@dataclass(frozen=True)
class TwoLevelMap:
    """The map that :class:`~natgrad.fishers.TwoLevel` describes, on dicts of blocks.

    ``basis`` makes the coarse rows of a layer of its inverse and its residual. A layer that M lacks is left out of the
    fine and of the coarse level.
    """

    examples: ObservedFisher
    fine: Mapping[str, LinearMap]
    damping: Mapping[str, float]
    basis: Callable[[LinearMap, Tensor], Tensor]
    moves: bool
    form: str
    omega: float

    def __matmul__(self, M: Blocks) -> dict[str, Tensor]:
        """The image of M; the fine one, chosen on the device, where the other is not a direction of descent."""
        if not M:
            return {}
        if len(M) < len(self.fine):
            fine = {name: inverse for name, inverse in self.fine.items() if name in M}
            return replace(self, examples=self.examples.among(list(fine)), fine=fine) @ M
        right = {name: M[name].to(seen.a.dtype) for name, seen in self.examples.seen.items()}
        fine_step = self._fine(right)
        step = self._step(right, fine_step)
        descends = torch.stack([(step[name] * right[name]).sum() for name in right]).sum() > 0  # false for NaN
        return {name: torch.where(descends, step[name], fine_step[name]).to(M[name].dtype) for name in M}

    def _step(self, M: Blocks, z: Blocks) -> dict[str, Tensor]:
        r = self._residual(M, z) if self.form == "residual" or self.moves else M
        C = self._coarse(r) if self.moves else self._fixed
        if self.form == "residual":
            return _plus(z, C @ r, self.omega)
        y = C @ M
        if self.form == "additive":
            return _plus(z, y, self.omega)
        w = self._fine(self._residual(M, y))
        return _plus(_plus(w, y), C @ self._damped(w), -1.0)

    def _fine(self, M: Blocks) -> dict[str, Tensor]:
        return {name: self.fine[name] @ block for name, block in M.items()}

    def _damped(self, z: Blocks) -> dict[str, Tensor]:
        """(F + damping I) z."""
        product = self.examples @ z
        return {name: product[name] + self.damping[name] * z[name] for name in product}

    def _residual(self, M: Blocks, z: Blocks) -> dict[str, Tensor]:
        return _plus(M, self._damped(z), -1.0)

    def _coarse(self, r: Blocks) -> CoarseSolve:
        rows = {name: self.basis(inverse, r[name]) for name, inverse in self.fine.items()}
        return CoarseSolve.of(rows, self.examples, self.damping)

    @cached_property
    def _fixed(self) -> CoarseSolve:
        return self._coarse({name: self.examples.seen[name].a.new_zeros(self.fine[name].shape) for name in self.fine})


def _plus(x: Blocks, y: Blocks, scale: float = 1.0) -> dict[str, Tensor]:
    return {name: x[name] + scale * y[name] for name in x}
