"""Weights of examples inside the user's own backward pass: a layer's ``.grad`` becomes a weighted sum of gradients.

An operation runs with its parameters held fixed, so that its own graph knows the gradient of its input alone. A
function on top of it hands the output gradient on unchanged, and gives the parameters the gradient of the weighted one:
one product for the weight, as always, no per-example gradient, and what earlier layers receive is not altered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import finalize, ref

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_leaves

from natgrad.calls import release_calls, watch_calls
from natgrad.engine import Engine
from natgrad.fngd.coefficients import Examples
from natgrad.fngd.gradients import weighted_bias, weighted_operand
from natgrad.hooks import as_written, out_of_graph
from natgrad.layers import Form, Layer
from natgrad.operations import Operand, Watch, whole
from natgrad.operations.call import Read
from natgrad.rows import Rows, rows_of

Weights = Callable[[Examples, Tensor], Tensor]
"""The weights (n,) of examples at one layer, which may depend on the gradients g (n, ...) at its output."""


@dataclass
class Plan:
    """Which layers have ``weights``, by their names, and what passes have shown of them since.

    ``others`` are parameters that have none; the first pass looks at all, since what it sees says where the examples
    are. ``counted``: whether they are a dimension of any positions; ``None`` before that pass. ``alike``: the layers
    that an operation uses which cannot be weighed.
    """

    layers: Mapping[str, Layer] = field(default_factory=dict)
    weights: Mapping[str, Weights] = field(default_factory=dict)
    others: tuple[nn.Parameter, ...] = ()
    counted: bool | None = None
    alike: set[str] = field(default_factory=set)

    @property
    def weighed(self) -> list[Layer]:
        """The layers whose examples differ in weight."""
        return [self.layers[name] for name in self.weights if name not in self.alike]

    def names(self) -> dict[int, str]:
        """The layers that are weighed, by the ids of their parameters."""
        return {id(p): layer.name for layer in self.weighed for p in layer.parameters}

    def watched(self) -> list[nn.Parameter]:
        """The parameters that a pass looks at."""
        if self.counted is not None and self.weighed:
            return [p for layer in self.weighed for p in layer.parameters]
        return [*(p for layer in self.layers.values() for p in layer.parameters), *self.others]


class Weighting:
    """Weighs examples in passes of ``model`` in training mode by its ``plan``, and knows which they are.

    With ``needs_ids`` no pass begins before it was told the ``ids`` (n,) of its examples; ``told`` are those of the
    passes since :meth:`begin`, by the position of their first example. While ``engine`` is armed it sees the passes,
    and they are not weighed.
    """

    def __init__(self, model: nn.Module, needs_ids: bool = False, engine: Engine | None = None) -> None:
        self.ids: Tensor | None = None
        self.told: dict[int, Tensor] = {}
        self._model, self._needs_ids, self._engine = model, needs_ids, engine
        self._which, self._running = Examples(), False
        self._last: Weigher | None = None
        self._outside = False  # whether a pass of this step was made outside of a backward pass
        self.around = out_of_graph(self._around)
        self.follow(Plan())
        self.attach()

    def attach(self) -> None:
        """See the calls of the model, also if it has been compiled since."""
        watch_calls(self._model, self)

    def follow(self, plan: Plan) -> None:
        """Weigh by this plan from the next forward pass on."""
        self.plan, self.armed = plan, bool(plan.weighed or self._needs_ids)

    def begin(self, step: int) -> None:
        """Count the examples of this step of the epoch from the next forward pass on."""
        self._which, self.told, self._outside, self._last = Examples(step), {}, False, None

    def close(self) -> None:
        """Leave the model as it was."""
        self.follow(Plan())
        release_calls(self._model, self)

    def close_with(self, owner: object) -> None:
        """Close as soon as nobody holds ``owner`` any more."""
        finalize(owner, _close, ref(self)).atexit = False

    # A pass.

    def _around(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The pass, weighed if it is one to weigh."""
        if not self._running and self._last is not None and self._repeats:
            with as_written(), self._last.again():
                return call(*args, **kwargs)
        if self._running or not self._wanted():
            return call(*args, **kwargs)
        with as_written():
            if self._needs_ids and self.ids is None:
                raise ValueError("coefficients of examples need ids: call optimizer.examples(ids) before model(x)")
            self._outside = torch._C._current_graph_task_id() == -1
            self._running = True
            try:
                output, count = self._seen(call, args, kwargs)
            finally:
                self._running = False
            self.follow(self.plan)  # what it has shown may leave nothing to weigh
            if count:
                self._tell(count)
        return output

    @property
    def _repeats(self) -> bool:
        """Whether an activation checkpoint around the model computes again a pass that was weighed."""
        return self._outside and torch.is_grad_enabled() and torch._C._current_graph_task_id() != -1

    def _wanted(self) -> bool:
        training = torch.is_grad_enabled() and self._model.training
        if not training or torch._C._functorch.peek_interpreter_stack() is not None or torch._C._get_tracing_state():
            return False
        inside = torch._C._current_graph_task_id() != -1  # where an activation checkpoint computes again what it was
        return not (inside and self._outside)

    def _seen(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, int]:
        """What the call returns, and the number of its examples."""
        engine = self._engine
        if engine is not None and engine.armed:
            before = engine._which.start
            output = call(*args, **kwargs)
            return output, engine._which.start - before
        self._last = weigher = Weigher(self.plan, replace(self._which, ids=self.ids))
        with weigher:
            output = call(*args, **kwargs)
        return output, weigher.finish(tree_leaves((args, kwargs)))

    def _tell(self, count: int) -> None:
        """The pass had ``count`` examples, which were those of ``ids``."""
        ids, start = self.ids, self._which.start
        self._which, self.ids = replace(self._which, start=start + count), None
        if ids is None:
            return
        if len(ids) != count:
            raise ValueError(f"examples(ids) told {len(ids)} ids, but the batch has {count} examples")
        self.told[start] = ids


def _close(weighting: ref[Weighting]) -> None:
    alive = weighting()
    if alive is not None:
        alive.close()


class Weigher(Watch):
    """While active, weighs the examples of operations on the weights of a plan that compute with what they are given.

    ``which``: the examples; ``rows``: where they are, which is known when the pass is over.
    """

    def __init__(self, plan: Plan, which: Examples, known: Mapping[int, Operand] | None = None) -> None:
        super().__init__(whole(plan.watched()) if known is None else known)
        self.plan, self.which, self.rows = plan, which, Rows()
        self._layers = plan.names()

    def again(self) -> Weigher:
        """One that has a pass which is repeated compute what it did."""
        twin = Weigher(Plan(), self.which, self._operands.known)
        twin._layers, twin._silent = self._layers, True
        return twin

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
        """What ``compute(weight, bias)`` returns, which hands back weighted gradients."""
        given = weight, bias
        names = [self._layer(p) for p in given]
        y = compute(*(p if name is None else p.detach() for p, name in zip(given, names, strict=True)))
        for layer in dict.fromkeys(name for name in names if name is not None):
            use = _Use(self, layer, form, read or _same, more.get("first", False))
            own = (p if name == layer else None for p, name in zip(given, names, strict=True))
            y = _Weighted.apply(y, x.detach(), use, *own)
        super().saw(form, weight, bias, x, y, read, **more)
        return y

    def saw(self, form: Form, weight: Any, bias: Any, x: Tensor, y: Tensor, *rest: Any, **more: Any) -> None:
        """Note an operation that has computed already, whose examples weigh alike."""
        if not self._silent:
            self.plan.alike |= {name for p in (weight, bias) if (name := self._layer(p)) is not None}
        super().saw(form, weight, bias, x, y, *rest, **more)

    def weights(self, name: str, g: Tensor) -> Tensor:
        """Those of the examples of g (n, ...) at a layer: 1 if they are not those of the pass, or weigh alike."""
        ids, count = self.which.ids, self.rows.count
        known = count in (None, len(g)) and (ids is None or len(ids) == len(g)) and name not in self.plan.alike
        return self.plan.weights[name](self.which, g).to(g.dtype) if known else g.new_ones(len(g))

    def finish(self, inputs: Iterable[Any]) -> int:
        """See no more, and find the examples of the pass; returns their number, 0 if nothing was seen."""
        self._silent = True
        if not self.calls:
            return 0
        tensors = [x for x in inputs if isinstance(x, Tensor)]
        self.rows = rows_of(None, tensors, None, self)
        if self.plan.counted and self.rows.count is None:
            here = (x.shape[self.rows.dim] for x in tensors if x.ndim > self.rows.dim)
            self.rows = replace(self.rows, count=next(here, None))
        if self.plan.counted is None:
            self.plan.counted = self.rows.count is not None
        sizes = self.calls[0].sizes
        self.calls.clear()
        self.strays.clear()
        return self.rows.count or (sizes[0] if sizes else 1)

    def _layer(self, x: Any) -> str | None:
        """The layer whose weight or bias this is, if it is weighed and trained."""
        found = self.operand(x)
        if found is None or not found.trained or (isinstance(x, Tensor) and not x.requires_grad):
            return None
        return self._layers.get(id(found.parameter))


def _same(y: Tensor) -> Tensor:
    return y


@dataclass(frozen=True)
class _Use:
    """An operation of a layer in a pass."""

    weigher: Weigher
    name: str
    form: Form
    read: Read
    first: bool

    def gradients(self, x: Tensor, g: Tensor, shapes: list[torch.Size | None]) -> list[Tensor | None]:
        """The weighted ones of a weight and a bias of these ``shapes``."""
        g, sizes = self.read(g), x.shape[: x.ndim - self.form.inner]
        how = self.weigher.rows.arrangement(sizes, self.first)
        x, g = how(self.form.cast(x, g.dtype)), how(g)
        w, (weight, bias) = self.weigher.weights(self.name, g), shapes
        return [
            None if weight is None else weighted_operand(self.form, x, g, w, weight),
            None if bias is None else weighted_bias(self.form, g, w, bias),
        ]


class _Weighted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, use: _Use, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x)
        ctx.use, ctx.shapes = use, [None if p is None else p.shape for p in (weight, bias)]
        return y.detach()  # an alias, which may be changed in place, as an input handed back may not

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        return (g, None, None, *ctx.use.gradients(x, g, ctx.shapes))
