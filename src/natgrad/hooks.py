"""What lets hooks live in real training loops: copied models, compiled models, activation checkpoints."""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
import torch.utils.checkpoint as checkpoints
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack

_REENTRANT = checkpoints.CheckpointFunction
_GENERATOR: Callable[..., Any] = checkpoints._checkpoint_without_reentrant_generator
_open: list[ExitStack] = []  # of all engines, whose passes may overlap in any order
_before = ExitStack()  # restores what was before the first of them
_FULLGRAPH = "a pass that NaturalGradient observes runs uncompiled: leave out fullgraph=True"


def _only_within_a_graph(function: Callable[..., Any] | None) -> None:
    """``torch.compile`` follows ``function`` where it traces a caller, and does not compile it by itself."""
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None and function is not None:
        dynamo.eval_frame.skip_code(function.__code__)


def out_of_graph(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, at whose calls ``torch.compile`` breaks its graph."""
    if "torch._dynamo" not in sys.modules:  # then nothing can be compiled, and importing it takes seconds
        return function
    for skipped in (function, as_written):
        _only_within_a_graph(skipped)
    return torch.compiler.disable(function, recursive=False, reason=_FULLGRAPH)


def as_written() -> ExitStack:
    """Until this is closed, the code of the model runs as it is written, for hooks to see all of it.

    Nothing is compiled, neither within a compiled caller nor below; reentrant checkpoints, whose layers run without
    a graph, become non-reentrant ones: the same numbers, with a graph that has edges. Raises ``RuntimeError`` within a
    caller compiled with ``fullgraph=True``.
    """
    if "torch._dynamo" in sys.modules:
        frames = torch._C._dynamo.eval_frame
        frames.set_eval_frame(None)  # until the compiled caller, if there is one, returns
        if getattr(frames, "set_fullgraph_compiled_frame_count", lambda count: -1)(-1) >= 0:
            raise RuntimeError(_FULLGRAPH)
    opened = ExitStack()
    if not _open:
        if "torch._dynamo" in sys.modules:
            _before.enter_context(torch.compiler.set_stance("force_eager"))
        _before.enter_context(_one_kind_of_checkpoint())
    _open.append(opened)
    opened.callback(_close, opened)
    return opened


def _close(opened: ExitStack) -> None:
    _open.remove(opened)
    if not _open:
        _before.close()


@contextmanager
def _one_kind_of_checkpoint() -> Iterator[None]:
    names = ("CheckpointFunction", "_checkpoint_without_reentrant_generator")
    before = {name: vars(checkpoints)[name] for name in names}
    vars(checkpoints).update(zip(names, (_Plain, _repeated), strict=True))
    try:
        yield
    finally:
        vars(checkpoints).update(before)


def _repeated(function: Callable[..., Any], *settings: Any, **named: Any) -> Any:
    """What a checkpoint does before and after ``function``.

    That is computed again as it was, by the rules of the modes that are active now: their kernels keep tensors of their
    own.
    """
    modes = [mode for mode in _get_current_function_mode_stack() if hasattr(mode, "again")]

    def again(*args: Any, **kwargs: Any) -> Any:
        with _one_kind_of_checkpoint(), ExitStack() as opened:
            for mode in modes:
                opened.enter_context(mode.again())
            return function(*args, **kwargs)

    return _GENERATOR(again, *settings, **named)


class _Plain:
    """Stands in for ``CheckpointFunction``."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
        if not any(isinstance(x, Tensor) and x.requires_grad for x in args):  # a reentrant one has no gradient then
            return _REENTRANT.apply(function, preserve_rng_state, *args)

        def again(*args: Any) -> Any:
            with _one_kind_of_checkpoint():  # of checkpoints within, too, when it is computed again
                return function(*args)

        return checkpoints.checkpoint(again, *args, use_reentrant=False, preserve_rng_state=preserve_rng_state)


# Hooks of a user.

_senders: dict[int, int] = {}  # how often each thread is sending gradients back that are not the user's


@contextmanager
def sending(hooked: bool = True) -> Iterator[None]:
    """While gradients are sent back that are not the user's, the hooks that were made :func:`quiet` do nothing."""
    me = threading.get_ident()
    _senders[me] = _senders.get(me, 0) + 1
    try:
        with warnings.catch_warnings() if hooked else nullcontext():
            if hooked:
                warnings.filterwarnings("ignore", "Full backward hook is firing")  # of hooks that do nothing now
            yield
    finally:
        _senders[me] -= 1
        if not _senders[me]:
            del _senders[me]


def _foreign() -> bool:
    """Whether the gradients under way are not the user's: this thread sends them, or it is one of a device's, which
    Python does not know, and some thread does."""
    if threading.get_ident() in _senders:
        return True
    return bool(_senders) and isinstance(threading.current_thread(), threading._DummyThread)


class Quiet:
    """A hook of a user that does nothing while gradients are sent back that are not the user's."""

    def __init__(self, hook: Callable[..., Any]) -> None:
        self._hook = hook

    def __call__(self, *args: Any) -> Any:
        """What the hook returns."""
        return None if _foreign() else self._hook(*args)


@contextmanager
def quiet(modules: Iterable[nn.Module]) -> Iterator[bool]:
    """The backward hooks of modules whose forward runs here are :class:`Quiet` in that pass; whether there are any."""
    tables = [table for m in modules for table in (m._backward_hooks, m._backward_pre_hooks) if table]
    before = [dict(table) for table in tables]
    for table in tables:
        table.update({key: Quiet(hook) for key, hook in table.items()})
    try:
        yield bool(tables)
    finally:
        for table, hooks in zip(tables, before, strict=True):
            for key, hook in hooks.items():
                if isinstance(table.get(key), Quiet):
                    table[key] = hook
