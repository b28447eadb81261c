"""The engine: forward hooks that record what each layer saw, and with which output gradients.

While ``armed``, a forward pass of the model leaves one :class:`Record` behind. With :class:`~natgrad.labels.Labels` the
gradients are those of the model's own loss terms, sent backwards to the layer outputs alone when the model's forward
ends: the user's graph stays, and ``.grad`` is never touched. Without, they are taken from the user's own backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any
from weakref import finalize, ref

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.utils._pytree import tree_leaves

from natgrad.capture import Examples
from natgrad.hooks import Hook, as_written, out_of_graph
from natgrad.labels import Labels
from natgrad.layers import RULES, Exposed, Layer
from natgrad.record import Call, Record


class Engine:
    """Records forward passes of ``model`` while ``armed``, for ``layers``, in training mode if ``only_training``."""

    def __init__(
        self,
        model: nn.Module,
        layers: Iterable[Layer],
        labels: Labels | None = None,
        only_training: bool = True,
    ) -> None:
        self.armed = False
        self.keep_inputs = False
        self.labels = labels
        self.unread: dict[str, str] = {}  # layers that could not be recorded, and why
        self._model, self._passing = model, 0
        self._which = Examples()
        self._only_training = only_training
        self._records: list[Record] = []
        self._current: Record | None = None
        self._open: ExitStack | None = None  # during a pass that is watched
        self._outside = False  # whether a pass of this step was made outside of a backward pass
        self._begin_pass, self._end_pass = out_of_graph(self._begin), out_of_graph(self._end)
        self._handles = [model.register_forward_pre_hook(Hook(self._enter))]
        self._last = model.register_forward_hook(Hook(self._leave), with_kwargs=True, always_call=True)
        self.watch(layers)

    def watch(self, layers: Iterable[Layer]) -> None:
        """Record these layers, too."""
        self._last.remove()  # to be the last again: the model may be a layer
        owners: dict[nn.Module, list[tuple[Layer, Layer]]] = {}
        for layer, use in [(one, use) for one in layers for use in one.uses]:
            if use.owner is None:
                hook = Hook(self._layer_hook(layer, use))
                self._handles.append(use.module.register_forward_hook(hook, with_kwargs=True))
            else:
                owners.setdefault(use.owner, []).append((layer, use))
        for owner, used in owners.items():
            opening, closing = self._exposing_hooks(owner, used)
            self._handles.append(owner.register_forward_pre_hook(Hook(opening)))
            self._handles.append(owner.register_forward_hook(Hook(closing), always_call=True))
        self._last = self._model.register_forward_hook(Hook(self._leave), with_kwargs=True, always_call=True)

    def close_with(self, owner: object) -> None:
        """Close as soon as nobody holds ``owner`` any more; the model, which holds this engine, does not hold both."""
        finalize(owner, _close, ref(self)).atexit = False

    def close(self) -> None:
        """Take all hooks off the model."""
        if self._open is not None:
            self._open.close()
        for handle in [*self._handles, self._last]:
            handle.remove()

    def begin(self) -> None:
        """Count the examples of a new step from the next forward pass on."""
        self._which, self._outside = Examples(), False

    def everything(self) -> list[Record]:
        """All records, which are then forgotten."""
        records, self._records = self._records, []
        return records

    def take(self) -> list[Record]:
        """The records that the user's backward pass reached; these and all others are then forgotten."""
        return [record for record in self.everything() if record.live]

    @property
    def pending(self) -> bool:
        """Whether there are records."""
        return bool(self._records)

    def discard(self, only_live: bool = False) -> None:
        """Forget the records; with ``only_live`` keep those whose backward pass may still come."""
        self._records = [record for record in self._records if only_live and not record.live]

    def _enter(self, model: nn.Module, args: tuple[Any, ...]) -> None:
        if self.armed and self._training:
            self._begin_pass()

    def _begin(self) -> None:
        if self._open is not None:  # a pass that was interrupted
            self._open.close()
        self._open, self._current = None, None
        inside = torch._C._current_graph_task_id() != -1
        if inside and self._outside:  # an activation checkpoint computes again what has been watched
            return
        self._outside, self._passing = not inside, 0
        self._open = as_written()
        self._current = Record(which=self._which)

    @property
    def _training(self) -> bool:
        return torch.is_grad_enabled() and (self._model.training or not self._only_training)

    def _layer_hook(self, layer: Layer, use: Layer) -> Callable[..., None]:
        read = partial(use.adapter.batched, use.module)

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            if self._current is not None and output.requires_grad:
                self._saw((layer, use), use.read(args, kwargs), output, read)

        return hook

    def _exposing_hooks(
        self, owner: nn.Module, used: list[tuple[Layer, Layer]]
    ) -> tuple[Callable[..., None], Callable[..., None]]:
        active: list[Exposed | None] = []

        def opening(module: nn.Module, args: tuple[Any, ...]) -> None:
            exposed = None
            if self.armed and self._training and module is owner:  # recorded or not: checkpoints repeat the operations
                users = [((layer, use), layer.parameters[0], use.adapter) for layer, use in used]
                exposed = Exposed(users, RULES, self._saw, self._unread)  # type: ignore[arg-type]
                exposed.__enter__()
            active.append(exposed)

        def closing(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            exposed = active.pop() if active else None
            if exposed is not None:
                exposed.__exit__(None, None, None)

        return opening, closing

    def _saw(self, used: tuple[Layer, Layer], x: Tensor, output: Tensor, read: Callable[[Tensor], Tensor]) -> None:
        """Record a use of a layer, (layer, use), with input x (n, ...); ``read`` brings its output into such a form."""
        layer, use = used
        if self._current is None or not output.requires_grad or not layer.parameters[0].requires_grad:
            return
        calls = self._current.calls.setdefault(layer.name, [])
        if any(call.output() is output for call in calls):  # a module called where its weight is looked out for
            return
        call = Call(x, None, read, use, ref(output))
        self._passing = self._passing or len(x)
        if self.labels is None:
            output.register_hook(_gather(self._current, call))
        else:
            call.edge = get_gradient_edge(output)
        calls.append(call)

    def _unread(self, used: tuple[Layer, Layer], reason: str) -> None:
        self.unread[used[0].name] = reason

    def _leave(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self._open is not None:
            self._end_pass(args, kwargs, output)

    def _end(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        record, self._current = self._current, None
        if self._open is not None:
            self._open.close()
            self._open = None
        if output is None:  # the model has raised
            return
        if self._passing:
            self._which, self._passing = replace(self._which, start=self._which.start + self._passing), 0
        if record is None or not record.calls:
            return
        if self.keep_inputs:
            record.inputs = (args, kwargs)
        if self.labels is not None:
            if self.labels.source is not None:
                self.labels.targets = self.labels.source(*args, **kwargs)
            record.targets = self.labels.targets
            self._send_back(record, self.labels, output)
        self._records.append(record)

    def _send_back(self, record: Record, labels: Labels, returned: Any) -> None:
        selected = labels.select(returned)
        outputs = selected if isinstance(selected, tuple) else (selected,)
        tracked = [k for k, output in enumerate(outputs) if output.requires_grad]
        if not tracked:
            return
        calls = [call for layer_calls in record.calls.values() for call in layer_calls]
        edges = [call.edge for call in calls if call.edge is not None]
        plain = tuple(x.detach() if x.dtype.itemsize >= 4 else x.detach().float() for x in outputs)
        whole = plain if isinstance(selected, tuple) else plain[0]
        heads = [outputs[k] for k in tracked]
        with torch.autocast(plain[0].device.type, enabled=False):  # of the loss, which a user may write
            record.terms, record.size = labels.terms(whole), max(map(len, plain))
            if labels.estimator == "exact":
                _refuse_stacked(record.calls, record.size)
            for seed in labels.seeds(whole):
                seeds = seed if isinstance(seed, tuple) else (seed,)
                back = [seeds[k].to(outputs[k].dtype) for k in tracked]
                gradients = torch.autograd.grad(heads, edges, back, retain_graph=True, allow_unused=True)
                for call, gradient in zip(calls, gradients, strict=True):
                    call.gradients.append(gradient)
        for call in calls:
            call.edge = None  # lets go of the graph
        record.scale = len(calls[0].gradients) ** -0.5
        for tensor in {id(x): x for x in (*heads, *tree_leaves(returned))}.values():  # a pointer may make a new tensor
            if isinstance(tensor, Tensor) and tensor.grad_fn is not None:  # a parameter would keep the hook for ever
                tensor.register_hook(lambda _: setattr(record, "live", True))


def _close(engine: ref[Engine]) -> None:
    alive = engine()
    if alive is not None:
        alive.close()


def _refuse_stacked(calls: Mapping[str, list[Call]], size: int) -> None:
    """One exact seed reaches all rows of the output, and would mix those that are one example to a layer."""
    for name, own in calls.items():
        if len(own) > 1 and sum(len(call.x) for call in own) == size:
            raise ValueError(
                f"layer {name!r} was called {len(own)} times with {len(own[0].x)} examples, but the output has {size}: "
                "with exact labels call it once on all of them, make one forward pass for each call, or sample labels"
            )


def _gather(record: Record, call: Call) -> Callable[[Tensor], None]:
    def hook(gradient: Tensor) -> None:
        record.live = True
        first = call.gradients[0] if call.gradients else None
        call.gradients = [gradient.detach() if first is None else first + gradient.detach()]

    return hook
