"""The registry of rules: one for each operation on weights that is understood."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

import torch

Rule = Callable[..., Any]
"""An operation on weights: called with the watch, the function and its arguments, it returns the function's result."""

RULES: dict[Any, Rule] = {}
"""The rules by the functions of torch that they are for."""

ALWAYS: set[Rule | None] = set()
"""Those that are called also where no parameter is involved."""

Known = TypeVar("Known", bound=Rule)


def rule(*functions: Any, always: bool = False) -> Callable[[Known], Known]:
    """Let the decorated function be the rule of these functions of torch, or of your own.

    A rule is called with the watch, the function, and its arguments. It computes what the function would, and tells the
    watch what it has seen (:meth:`~natgrad.operations.Watch.product`). A function of your own has to dispatch through
    ``torch.overrides.handle_torch_function``. It is called where a parameter is among the arguments, or a view or copy
    of one, or ``always``. The last rule given for a function counts. Raises ``TypeError`` for
    anything that is not a function.
    """
    for function in functions:
        if not callable(function):
            raise TypeError(f"rule needs functions, got {function!r}")

    def enter(known: Known) -> Known:
        if not callable(known):
            raise TypeError(f"a rule is a function, got {known!r}")
        RULES.update(dict.fromkeys(functions, known))
        ALWAYS.update([known] if always else ())
        return known

    return enter


def spelled(*names: str) -> list[Any]:
    """The functions of these names in ``torch``, and the methods of its tensors."""
    places = (torch, torch.Tensor)
    return list({getattr(place, name) for name in names for place in places if hasattr(place, name)})


@cache
def fits(rule: Rule, count: int, *names: str) -> bool:
    """Whether a rule takes so many arguments, and some by these names."""
    try:
        inspect.signature(rule).bind(None, None, *range(count), **dict.fromkeys(names))
    except TypeError:
        return False
    return True
