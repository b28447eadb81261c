"""The two interfaces: a linear map on weight-shaped tensors, and a symmetric PSD matrix that has a damped inverse."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import fields, replace
from typing import Any, Self

import torch
from torch import Tensor


class LinearMap(ABC):
    """A linear map on tensors (..., out, in), written as a product: ``map @ M``.

    Subclasses are frozen dataclasses whose tensor fields may carry leading dimensions (groups of a grouped
    convolution); these broadcast against the leading dimensions of ``M``.
    """

    @property
    @abstractmethod
    def shape(self) -> torch.Size:
        """The shape (*groups, out, in) of the tensors it acts on."""

    @abstractmethod
    def __matmul__(self, M: Tensor) -> Tensor:
        """The image of ``M`` (..., out, in), in the dtype of ``M``."""

    @abstractmethod
    def dense(self) -> Tensor:
        """The matrix (*groups, out * in, out * in), row-major: ``dense() @ M.flatten() = (self @ M).flatten()``."""

    def tensors(self) -> dict[str, Tensor]:
        """Its tensor fields by name; with :meth:`with_tensors` the way in and out of a checkpoint."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def with_tensors(self, tensors: dict[str, Tensor]) -> Self:
        """The same kind of map with other tensor fields."""
        return replace(self, **tensors)  # type: ignore[type-var]

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """The same map with its tensors moved or cast, as by ``Tensor.to``."""
        return self.with_tensors({name: value.to(*args, **kwargs) for name, value in self.tensors().items()})


class Matrix(LinearMap):
    """A symmetric positive semi-definite matrix on tensors (..., out, in)."""

    @abstractmethod
    def inverse(self, damping: float) -> LinearMap:
        """The damped inverse; the class says which damping rule it follows. Raises ``FactorisationError``."""

    @abstractmethod
    def trace(self) -> Tensor:
        """The trace, of shape (*groups)."""

    def floored(self, eps: float) -> Self:
        """The same with eps tr(X) I added to every X that its inverse factorises: of the size of what rounding leaves
        of a sum of outer products in a precision of ``eps``. By default itself."""
        return self

    def norm(self) -> Tensor:
        """The Frobenius norm, of shape (*groups); where a class does not know better, of the matrix written out."""
        return torch.linalg.matrix_norm(self.dense())


def check_damping(damping: float, name: str = "damping") -> float:
    """The damping itself if it is a finite number of at least 0, else a ``ValueError``."""
    if not 0 <= damping < float("inf"):
        raise ValueError(f"{name} must be a finite number >= 0, got {damping!r}")
    return damping
