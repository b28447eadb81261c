"""Which parameters the methods of a user's own module multiply with, read from their source."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import nn

from natgrad.layers.functional import LinearPart


@dataclass(frozen=True)
class _Use:
    bias: str | None
    transposed: bool


def written_parts(module: nn.Module) -> dict[str, tuple[nn.Module, LinearPart]]:
    """The blocks of ``F.linear(x, self.W, self.b)``, ``x @ self.W.T + self.b``, ``x @ self.W`` and their like.

    That the products are of this form at run time is seen when they are computed. A parameter that is used in two ways,
    or by another name than ``self.W``, is not found.
    """
    parts: dict[str, tuple[nn.Module, LinearPart]] = {}
    for name, (use, *others) in _uses(type(module)).items():  # type: ignore[arg-type]
        weight = module._parameters.get(name)
        if others or weight is None or weight.ndim != 2:
            continue
        size = weight.shape[1] if use.transposed else weight.shape[0]
        bias = module._parameters.get(use.bias) if use.bias else None
        known = use.bias if bias is not None and bias.shape == (size,) else None
        parts[name] = module, LinearPart(name, known, size, transposed=use.transposed)
    return parts


@dataclass(frozen=True)
class Written:
    """A product with the weight of a module ``path`` inside, ``F.linear(x, self.path.weight)`` or its like.

    ``transposed`` if it is ``x @ self.path.weight``; ``biased`` if the bias of the same module is added.
    """

    path: str
    transposed: bool
    biased: bool


def written_uses(module: nn.Module) -> list[Written]:
    """The products that a module's methods write with weights of modules inside."""
    found = []
    for name, uses in _uses(type(module)).items():  # type: ignore[arg-type]
        path, _, last = name.rpartition(".")
        if path and last == "weight":
            biased = all(use.bias == f"{path}.bias" for use in uses)
            found += [Written(path, transposed, biased) for transposed in {use.transposed for use in uses}]
    return found


@cache
def _uses(kind: Any) -> dict[str, list[_Use]]:
    """For every attribute that is a factor somewhere, the different ways of using it."""
    uses: dict[str, list[_Use]] = {}
    for base in kind.__mro__:
        if base.__module__.partition(".")[0] in ("torch", "builtins"):
            continue
        for name, use in (found for method in vars(base).values() for found in _in(_tree(method))):
            known = uses.setdefault(name, [])
            known += [] if use in known else [use]
    return uses


def _tree(method: Any) -> ast.AST:
    """The source of a method: unlike that of its class it can also be had in a notebook."""
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(method)) if inspect.isfunction(method) else "")
    except (OSError, SyntaxError):  # there is none
        return ast.parse("")


def _in(node: ast.AST, bias: str | None = None) -> Iterator[tuple[str, _Use]]:
    match node:
        case ast.BinOp(left=product, op=ast.Add(), right=addend) if (name := _own(addend)) and _factors(product):
            yield from _in(product, name)
            return
    factors = _factors(node)
    if factors is not None:
        weight, known = factors
        name, transposed = _matrix(weight)
        if name:
            yield name, _Use(known or bias, transposed == _is_linear(node))
    for child in ast.iter_child_nodes(node):
        yield from _in(child)


def _factors(node: ast.AST) -> tuple[ast.expr, str | None] | None:
    """The right factor of a product, and the bias that it comes with."""
    match node:
        case ast.BinOp(op=ast.MatMult(), right=right):
            return right, None
        case ast.Call(func=ast.Attribute(attr="matmul"), args=[right]):
            return right, None
        case ast.Call(func=ast.Attribute(attr="matmul" | "linear") | ast.Name(id="linear"), args=[_, right, *rest]):
            bias = [*rest, *(keyword.value for keyword in node.keywords if keyword.arg == "bias")]
            return right, _own(bias[0]) if bias else None
    return None


def _is_linear(node: ast.AST) -> bool:
    match node:
        case ast.Call(func=ast.Attribute(attr="linear") | ast.Name(id="linear")):
            return True
    return False


def _matrix(node: ast.expr) -> tuple[str | None, bool]:
    """The attribute ``name``, or ``path.name`` of a module inside, and whether it is transposed here."""
    match node:
        case ast.Attribute(value=inner, attr="T" | "mT") | ast.Call(func=ast.Attribute(value=inner, attr="t"), args=[]):
            return _own(inner), True
        case ast.Call(func=ast.Attribute(value=inner, attr="transpose"), args=[_, _]):
            return _own(inner), True
    return _own(node), False


def _own(node: ast.expr) -> str | None:
    match node:
        case ast.Attribute(value=ast.Name(id="self"), attr=name):
            return name
        case ast.Attribute(value=ast.Attribute() as inner, attr=name) if path := _own(inner):
            return f"{path}.{name}"
    return None
