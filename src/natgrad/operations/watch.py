"""The function mode that sees every operation on a parameter while it is active."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from natgrad.layers.form import Form
from natgrad.layers.lookup import Lookup
from natgrad.layers.product import ADDED
from natgrad.layers.view import View
from natgrad.operations.call import Call, Operand, Read
from natgrad.operations.constants import Constants
from natgrad.operations.operands import Operands, Stray, tensors
from natgrad.operations.outputs import edge_of, found_at
from natgrad.operations.registry import ALWAYS, RULES, Rule, fits


class Watch(TorchFunctionMode):
    """While active, sees the operations that take a parameter that is ``known``, or a view, cast or multiple of one.

    Of ``inputs``, which a user may overwrite, copies are kept. ``constants`` do not depend on the examples, nor do the
    parameters.

    ``calls`` are the uses that a rule has read; ``strays`` the outputs of other operations, with the parameter and the
    name of the operation. Nothing is computed otherwise than torch would, but for recurrences, whose fused kernels
    become products: equal to rounding, with the same random numbers (cuDNN's dropout between layers has its own).
    """

    def __init__(
        self,
        known: Mapping[int, Operand],
        noted: Callable[[Call, Tensor], None] | None = None,
        inputs: Iterable[Any] = (),
        constants: Iterable[Tensor] = (),
    ) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.computed: set[int] = set()  # parameters that computed tensors stand for
        self.retained: list[Tensor] = []  # of which a user wants the gradient
        self.strays: list[Stray] = []
        self.batches: list[tuple[int, int]] = []  # numbers of examples that operations know of, and their dimension
        self.transformed = False  # whether a transform of torch.func was at work, where nothing is seen
        self.orders: dict[
            int, tuple[Tensor, Tensor]
        ] = {}  # of packed sequences, by their sizes: which examples they are
        self.selected: tuple[Tensor, Tensor] | None = None  # the last tensor of which rows were selected, and which
        self._noted, self._silent = noted, False
        self._fragile = {memory for x in inputs if (memory := _memory(x)) is not None}
        self._constants, self._shared = Constants(constants, known), False
        self._operands = operands = Operands(known, self.strays)
        self.operand, self.alias, self.expanded = operands.of, operands.alias, operands.expanded  # for rules

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """``func``, by its rule where it has one."""
        kwargs = kwargs or {}
        if func in _ASKED:
            return func(*args, **kwargs)
        if torch._C._functorch.peek_interpreter_stack() is not None:
            self.transformed = True
            return func(*args, **kwargs)
        given, rule = tensors((*args, *kwargs.values())), RULES.get(func)
        constant = self._constants.hold(given)
        if (rule in ALWAYS or self._operands.among(given)) and torch.is_grad_enabled():
            self._shared = constant
            result = self._ruled(rule, func, given, args, kwargs)
        else:
            result = func(*args, **kwargs)
        if constant:
            self._constants.follow(func, given, tensors((result,)))
        return result

    def _ruled(
        self, rule: Rule | None, func: Any, given: list[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """What an operation on parameters returns, by its rule where it has one that takes these arguments."""
        if any(map(self._operands.repeated, given)) and getattr(func, "__name__", "") not in _OF_TENSORS:
            alone = self._operands.alone
            args, kwargs = _map(alone, args), {name: _map(alone, x) for name, x in kwargs.items()}
        if rule is not None and (not kwargs or fits(rule, len(args), *kwargs)):
            return rule(self, func, *args, **kwargs)
        result = func(*args, **kwargs)
        self.other(func, (*args, *kwargs.values()), result)
        return result

    # What rules call.

    def constant(self, x: Any) -> bool:
        """Whether ``x`` is known not to depend on the examples."""
        return not isinstance(x, Tensor) or self._constants.hold((x,))

    def data(self, x: Any, only: bool = False) -> Any:
        """What an operation reads as data: ``x``; a parameter that is repeated there, or ``only`` that of one example,
        is a use in itself."""
        operand = self.operand(x)
        if operand is None or not (only or self._operands.repeats(x, operand)):
            return x
        read = x.view_as(x)
        if self.added(x, read, "expand", data=True):
            self._operands.read(read)
        return read

    def again(self) -> Watch:
        """A watch of the same parameters that notes nothing: it has a pass that is repeated compute what it did."""
        watch = Watch(self._operands.known)
        watch._silent = True
        return watch

    def __enter__(self) -> Watch:
        """See operations from now on."""
        _ACTIVE.append(self)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        """See no more."""
        super().__exit__(*error)
        _ACTIVE.remove(self)

    def product(
        self,
        form: Form,
        weight: Any,
        bias: Any,
        x: Tensor,
        compute: Callable[[Any, Any], Any],
        read: Read | None = None,
        **more: Any,
    ) -> Any:
        """What ``compute(weight, bias)`` returns, read as an operation of ``form`` at x (positions..., *inner)."""
        y = compute(weight, bias)
        self.saw(form, weight, bias, x, y, read, **more)
        return y

    def saw(
        self,
        form: Form,
        weight: Any,
        bias: Any,
        x: Tensor,
        y: Tensor,
        read: Read | None = None,
        operation: str = "linear",
        part: str = "",
        kept: Tensor | None = None,
        version: int | None = None,
        first: bool = False,
        shared: bool | None = None,
    ) -> None:
        """Note that y is such an operation at x; ``read`` brings y into the form (positions..., *outer)."""
        used, added = self.operand(weight), self.operand(bias)
        used = used if used is not None and used.trained else None
        if self._silent or not y.requires_grad or (used is None and (added is None or not added.trained)):
            return
        odd = "nested tensors" if x.is_nested else "complex numbers" if y.is_complex() else ""
        if odd:
            self.stray(weight, f"{operation} of {odd}", y)
            self.stray(bias, f"{operation} of {odd}", y)
            return
        if used is not None and not used.view.distinct:
            self.stray(weight, f"{operation} of a weight that repeats", y)
            self.stray(bias, f"{operation} of a weight that repeats", y)
            return
        if added is not None and not (added.view.distinct and (used is None or _suits(form, used.view, added.view))):
            self.stray(bias, f"{operation} with a bias that repeats", y)
            added = None
            if used is None:
                return
        at, read = found_at(y, read)
        if x.layout != torch.strided:
            x = x.to_dense()
        shared = self._shared if shared is None else shared
        if self._fragile and _memory(x) in self._fragile:
            x, version = x.detach().clone(), 0
        version = x._version if version is None else version
        shape = at.shape if added else None
        edge, known = edge_of(at), used or added
        assert known is not None
        call = Call(known, added, form, operation, x.detach(), read, edge, version, part, kept, shape, first, shared)
        calls = [call] if used else [call.of_bias()]
        if used and added and used.factor != added.factor:  # the gradients of both have no common scale
            calls = [replace(call, bias=None, shape=None), replace(call.of_bias(), gradients=[])]
        for call in calls:
            self.calls.append(call)
            if self._noted is not None:
                self._noted(call, at)

    def stray(self, x: Any, operation: str, output: Any = None) -> None:
        """Note that a parameter is used in a way that no rule reads."""
        operand = self.operand(x)
        if operand is not None and operand.trained:
            edge = output if isinstance(output, Tensor) and output.requires_grad else None
            self.strays.append((operand.parameter, operation, edge))

    def unread(self, func: Any, *args: Any, name: str = "") -> Any:
        """What ``func`` returns, a use of parameters that no rule reads."""
        y = func(*args)
        for x in tensors(args):
            self.stray(x, name or getattr(func, "__name__", str(func)), y)
        return y

    # Operations without a rule.

    def other(self, func: Any, args: Iterable[Any], result: Any) -> None:
        """Follow what an operation without a rule does with parameters: views, casts, or a use that nothing reads."""
        found = [(x, operand) for x in tensors(args) if (operand := self.operand(x)) is not None]
        if not found:
            return
        name = getattr(func, "__name__", str(func))
        for y in tensors((result,)):
            if not y.requires_grad or self.operand(y) is not None:
                continue
            x, operand = found[0]
            if name in _COPIES and y.shape == x.shape and x is tensors(args)[0]:
                self.alias(y, operand)
                continue
            for x, operand in found:
                if not self._repeated(x, operand):
                    self.stray(x, name, y)

    def _repeated(self, x: Tensor, operand: Operand) -> bool:
        """Whether x is a parameter that an example has one of each: it is then a use in itself, added to nothing."""
        return self._operands.repeats(x, operand) and self.added(x, x, "expand", data=True)

    def added(self, x: Any, y: Tensor, operation: str, sign: float = 1.0, data: bool = False) -> bool:
        """Note that y is the sum of a parameter x, repeated along some dimensions, and something else; or is x itself.

        The last dimension that is not repeated are outputs, the others are tokens. ``data``: what it is added to is
        known to be data, which may be one example. Returns whether this is so.
        """
        found = self.operand(x)
        if found is None or x.ndim > y.ndim:
            return False
        lead = y.ndim - x.ndim
        sizes, strides = (1,) * lead + found.view.size, (0,) * lead + found.view.stride
        own = [d for d in range(y.ndim) if sizes[d] > 1 and strides[d]]
        rest = [d for d in range(y.ndim) if d not in own]
        if not rest or (sizes == tuple(y.shape) and not lead and not data and all(sizes[d] == 1 for d in rest)):
            return False  # perhaps a constant, or another parameter
        *rows, out = own or [-1]
        steps = [strides[d] for d in rows]
        if any(strides[a] != strides[b] * sizes[b] for a, b in pairwise(rows)):
            return False
        width, tokens = (sizes[out], math.prod(sizes[d] for d in rows)) if own else (1, 1)
        step = strides[out] if own else 1
        where = y.shape[:0] + tuple(y.shape[d] for d in rest)

        def read(g: Tensor) -> Tensor:
            g = g.permute(*rest, *own)
            return g.reshape(*where, tokens, width) if rows else g.reshape(*where, width)

        if rows:
            form: Form = Lookup(tokens)
            view = View((tokens, width), (steps[-1], step), found.view.offset)
            inputs = torch.arange(tokens, device=y.device).expand(*where, tokens)
        else:
            form, view = ADDED, View((width,), (step,), found.view.offset)
            inputs = torch.ones((), dtype=y.dtype, device=y.device).expand(*where, 1)
        operand = Operand(found.parameter, view, found.factor * sign)
        self.saw(form, operand, None, inputs, y, read, operation, shared=False if data else None)
        return True


def unseen() -> Any:
    """A context in which no watch sees anything."""
    return torch._C.DisableTorchFunction()


def stand_for(tensor: Tensor, parameter: nn.Parameter) -> Tensor:
    """Let a tensor that was computed from a parameter, of its shape, be seen as the parameter itself; returns it."""
    for watch in _ACTIVE:
        if watch.operand(parameter) is not None:
            watch.alias(tensor, Operand(parameter, View.whole(parameter)))
            watch.computed.add(id(parameter))
    return tensor


_ACTIVE: list[Watch] = []

_COPIES = {
    "to", "type", "type_as", "float", "double", "half", "bfloat16", "cpu", "cuda", "contiguous", "clone"
}  # fmt: skip
"""Operations whose result has the entries of what they are given, in memory of its own."""


_ASKED = {Tensor.dim, Tensor.size, Tensor.stride, Tensor.is_floating_point, Tensor.__len__} | {
    getattr(Tensor, name).__get__ for name in ("dtype", "device", "shape", "ndim", "is_nested", "requires_grad")
}
"""What is asked most often of tensors, and leads to no other."""

_OF_TENSORS = {"__get__", "__set__", "register_hook", "retain_grad", "requires_grad_"}
"""What is asked of a tensor itself, which no view of it can answer."""


def _map(function: Callable[[Any], Any], values: Any) -> Any:
    """The values, and those in lists and tuples of them, changed by a function."""
    if isinstance(values, (list, tuple)) and type(values) in (list, tuple):
        return type(values)(_map(function, value) for value in values)
    return function(values)


@cache
def _suits(form: Form, weight: View, bias: View) -> bool:
    """Whether a bias has an entry for every output."""
    matrix = form.matrix(torch.empty(weight.size, device="meta"))
    return math.prod(bias.size) == math.prod(matrix.shape[:-1])


def _memory(x: Any) -> int | None:
    """Where the entries of a tensor are, if it has a memory of its own."""
    if not isinstance(x, Tensor) or x.layout != torch.strided or x.is_nested:
        return None
    return x.untyped_storage().data_ptr()
