"""The calls of a model, which watchers may run themselves: no hook, and nothing that a copy or a trace would inherit.

``nn.Module`` calls ``_compiled_call_impl`` where there is one, and leaves it out of copies and pickles. Here it is a
:class:`Calls`, which has a model run as ever unless one of its watchers is ``armed``.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import partial, wraps
from typing import Any, Protocol
from weakref import ref

import torch
from torch import nn

_MARK = -1  # among the numbers of hooks, where it is that of none: torch.compile then does not go past the call


class Watcher(Protocol):
    """What wants to run calls of a model itself while it is ``armed``."""

    armed: bool

    def around(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What ``call(*args, **kwargs)`` returns."""


class _Marked(OrderedDict[int, bool]):
    """With the mark, which copies and pickles are without."""

    def __init__(self, flags: Mapping[int, bool]) -> None:
        super().__init__(flags)
        self[_MARK] = True

    def __reduce__(self) -> Any:
        return OrderedDict, (list(_unmarked(self).items()),)


def _unmarked(flags: Mapping[int, bool]) -> OrderedDict[int, bool]:
    return OrderedDict((key, flag) for key, flag in flags.items() if key != _MARK)


class Calls:
    """The calls of one model, and of those of its methods that are named, by way of its watchers."""

    def __init__(self, model: nn.Module) -> None:
        self._model = ref(model)
        self._compiled = vars(model).get("_compiled_call_impl")
        self.watchers: list[Watcher] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model at these arguments."""
        model = self._model()
        assert model is not None
        plain = model._call_impl if self._compiled is None else self._compiled
        for watcher in self.watchers:
            if watcher.armed and not torch.compiler.is_exporting():
                return self.watched(plain, *args, **kwargs)
        return plain(*args, **kwargs)

    def watched(self, plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The same, run by the watchers that are armed, one inside the other."""
        for watcher in self.watchers:
            if watcher.armed:
                plain = partial(_around, watcher, plain)
        return plain(*args, **kwargs)


def _around(watcher: Watcher, plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return watcher.around(plain, args, kwargs)


def function_of(call: Callable[..., Any], model: nn.Module) -> Callable[..., Any]:
    """What the arguments of a call are those of: a method of ``model``, or its forward."""
    while isinstance(call, partial) and call.func is _around:
        call = call.args[1]
    return call if isinstance(call, partial) else model.forward


def calls_of(model: nn.Module) -> Calls | None:
    """The calls of a model that is watched."""
    calls = vars(model).get("_compiled_call_impl")
    return calls if isinstance(calls, Calls) else None


def watch_calls(model: nn.Module, watcher: Watcher, methods: tuple[str, ...] = ()) -> None:
    """Let ``watcher`` run the calls of ``model``, and of its ``methods``, while it is armed; again if it does already.

    Raises ``ValueError`` for a method that the model does not have.
    """
    unknown = [name for name in methods if not callable(getattr(type(model), name, None))]
    if unknown:
        raise ValueError(f"{type(model).__name__} has no method {', '.join(map(repr, unknown))}")
    calls = calls_of(model)
    if calls is None:  # or the model has been compiled since
        calls = Calls(model)
        vars(model)["_compiled_call_impl"] = calls
        vars(model)["_forward_hooks_with_kwargs"] = _Marked(model._forward_hooks_with_kwargs)
    if watcher not in calls.watchers:
        calls.watchers.append(watcher)
    for name in methods:
        method = getattr(type(model), name)
        if not hasattr(method, "_watched"):
            setattr(type(model), name, _method(method))


def release_calls(model: nn.Module, watcher: Watcher) -> None:
    """Let the model run without ``watcher``; as if there had been none after the last one."""
    calls = calls_of(model)
    if calls is None or watcher not in calls.watchers:
        return
    calls.watchers.remove(watcher)
    if not calls.watchers:
        vars(model)["_compiled_call_impl"] = calls._compiled
        if calls._compiled is None:
            del vars(model)["_compiled_call_impl"]
        vars(model)["_forward_hooks_with_kwargs"] = _unmarked(model._forward_hooks_with_kwargs)


def _method(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method whose calls go by way of the watchers of the model that it is called on, if there are any."""

    @wraps(method)
    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        calls = calls_of(self)
        plain = partial(method, self)
        return plain(*args, **kwargs) if calls is None else calls.watched(plain, *args, **kwargs)

    call._watched = True  # type: ignore[attr-defined]
    return call
