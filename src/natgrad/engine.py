"""The engine: watches the operations of a forward pass, and records what each weight saw, with which output gradients.

While ``armed``, a forward pass of the model leaves one :class:`Record` behind. With :class:`~natgrad.labels.Labels` the
gradients are those of the model's own loss terms, sent backwards to the outputs of the operations alone when the pass
ends: the user's graph stays, and ``.grad`` is never touched. Without, they are taken from the user's own backward pass,
if it fills the ``.grad`` of the weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any
from weakref import WeakSet, finalize, ref

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils._pytree import tree_leaves

from natgrad.calls import function_of, release_calls, watch_calls
from natgrad.capture import Examples
from natgrad.hooks import Quiet, as_written, out_of_graph, quiet, sending
from natgrad.labels import Labels
from natgrad.layers import WIDE, Inventory, Layer
from natgrad.masks import Mask, checked_mask, existing, masked, masks, weighted
from natgrad.operations import Call, Watch, whole
from natgrad.record import Record
from natgrad.rows import rows_of
from natgrad.sorting import Sorting
from natgrad.verification import Verification


class Engine:
    """Records passes of ``model`` while ``armed``, in training mode if ``only_training``.

    A pass is a call of the model, or of one of its methods in ``calls``. ``batch_dim`` is the dimension of the examples
    in the first tensor that a pass is given, ``None`` to find out by sizes. Records are kept until they are asked for,
    or if not ``lasting`` until a backward pass has reached them or their outputs are gone.
    """

    def __init__(
        self,
        model: nn.Module,
        labels: Labels | None = None,
        only_training: bool = True,
        *,
        exclude: Iterable[str] = (),
        wide: int | None = WIDE,
        calls: Iterable[str] = (),
        batch_dim: int | None = None,
        mask: Mask = None,
        lasting: bool = True,
    ) -> None:
        self.armed = False
        self.keep_inputs = False
        self.compares = False  # whether records keep the gradients that the user's loss leaves at the outputs
        self.probes = False  # whether some gradients are kept as backward passes leave them:
        self.altered: list[tuple[Tensor, Tensor]] = []  # those, and what they are when records are taken
        self.labels = labels
        self.inventory = Inventory(model, tuple(exclude), wide)
        self._model, self._only_training, self._batch_dim, self._lasting = model, only_training, batch_dim, lasting
        self._methods = tuple(calls)
        self._which, self._mask = Examples(), checked_mask(model, mask, self._methods)
        self._records: list[Record] = []  # reached by a backward pass, or needing none
        self._waiting: WeakSet[Record] = WeakSet()  # alive as long as their outputs are
        self._filled: dict[int, set[int]] = {}  # of every backward pass, the parameters whose gradient it filled
        self._taps: dict[int, Any] = {}  # of parameters
        self._probed: dict[int, tuple[Tensor, Tensor]] = {}
        self._running = False
        self._once: dict[tuple[int, bool], bool] = {}
        self._verification, self._sorting = Verification(self.inventory), Sorting(self.inventory)
        self._hooked = False  # whether modules have backward hooks of the user
        self._own: list[tuple[str, int, torch.Size]] = []
        self._watched = self.inventory.watched
        self._operands = whole(self._watched)
        self._outside = False  # whether a pass of this step was made outside of a backward pass
        self.around = out_of_graph(self._around)
        self.attach()

    def attach(self) -> None:
        """See the calls of the model, also if it has been compiled since."""
        watch_calls(self._model, self, self._methods)

    @property
    def layers(self) -> dict[str, Layer]:
        """The layers that have been seen."""
        return self.inventory.layers

    def close_with(self, owner: object) -> None:
        """Close as soon as nobody holds ``owner`` any more; the model, which holds this engine, does not hold both."""
        finalize(owner, _close, ref(self)).atexit = False

    def close(self) -> None:
        """Leave the model as it was."""
        release_calls(self._model, self)
        self._forget()

    def begin(self) -> None:
        """Count the examples of a step from the next forward pass on."""
        self._which, self._outside = Examples(), False

    def everything(self) -> list[Record]:
        """All records, which are then forgotten."""
        records = self._records
        for record in records:
            record.settle(None)
        self._forget()
        return records

    def take(self) -> list[Record]:
        """The records of passes whose backward pass filled gradients; these and all others are then forgotten."""
        records = [record for record in self._records if record.tasks & self._filled.keys()]
        for record in records:
            record.check()
            record.settle(self._filled)
            strays = ((*stray, True) for stray, tasks in record.strays.items() if tasks & self._filled.keys())
            self.inventory.add((), strays)
        present = [(then, p.grad) for p, then in self._probed.values() if p.grad is not None]
        self.altered = [(then, now) for then, now in present if then.shape == now.shape]
        self._forget()
        return records

    @property
    def pending(self) -> bool:
        """Whether there are records."""
        return bool(self._records) or len(self._waiting) > 0

    def discard(self, only_live: bool = False) -> None:
        """Forget the records; with ``only_live`` keep those whose backward pass may still come."""
        if only_live:
            self._records = [record for record in self._records if not record.tasks & self._filled.keys()]
            self._filled = {}
        else:
            self._forget()

    def _forget(self) -> None:
        self._records, self._waiting, self._filled, self._probed = [], WeakSet(), {}, {}
        for tap in self._taps.values():
            tap.remove()
        self._taps = {}

    # A pass.

    def _around(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The pass, recorded if it is one to record."""
        if self._running or not self._wanted():
            return call(*args, **kwargs)
        self._outside = torch._C._current_graph_task_id() == -1
        record = Record(which=self._which)
        if self.labels is not None:
            record.random = torch.random.get_rng_state()
        with as_written():
            modules, leaves = _modules(self._model), _leaves(*args, *kwargs.values())
            self._renew(modules)
            fragile = () if self._lasting else leaves
            watch = Watch(self._operands, self._noting(record), fragile, self._constants(modules))
            self._running = True
            try:
                with quiet(modules) as self._hooked, watch:
                    output = call(*args, **kwargs)
                if watch.calls or watch.strays:
                    self._finish(record, watch, call, args, kwargs, leaves, output)
            finally:
                self._running = False
        return output

    def _constants(self, modules: Iterable[nn.Module]) -> list[Tensor]:
        """What no example changes, beside the parameters that are watched."""
        others = [p for p in self.inventory.parameters.values() if id(p) not in self._operands]
        return others + [b for m in modules for b in m._buffers.values() if b is not None]

    def _renew(self, modules: Iterable[nn.Module]) -> None:
        """Read the parameters of the model anew if they are others."""
        own = [(name, id(p), p.shape) for m in modules for name, p in m._parameters.items() if p is not None]
        if own != self._own:
            self.inventory.refresh()
            self._own, self._watched = own, self.inventory.watched
            self._operands = whole(self._watched)

    def _wanted(self) -> bool:
        """Whether a pass that begins is one to record."""
        training = torch.is_grad_enabled() and (self._model.training or not self._only_training)
        if not training or torch._C._functorch.peek_interpreter_stack() is not None or torch._C._get_tracing_state():
            return False
        inside = torch._C._current_graph_task_id() != -1  # where an activation checkpoint computes again what it was
        return not (inside and self._outside)

    def _noting(self, record: Record) -> Callable[[Call, Tensor], None] | None:
        """Without labels, take the gradients of the user's backward pass as they come by."""
        if self.labels is not None:
            return None

        def note(call: Call, y: Tensor) -> None:
            by_task = record.collect(call)

            def hook(gradient: Tensor) -> None:
                task = torch._C._current_graph_task_id()
                by_task[task] = by_task[task] + gradient.detach() if task in by_task else gradient.detach()
                record.tasks.add(task)

            y.register_hook(Quiet(hook))

        return note

    def _finish(
        self,
        record: Record,
        watch: Watch,
        call: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        leaves: list[Any],
        output: Any,
    ) -> None:
        """Make a record of what was seen in a pass."""
        record.mask = existing(function_of(call, self._model), self._mask, args, kwargs)
        reached: set[int] = set()
        nodes = [one.edge.node for one in watch.calls if one.edge is not None]
        if self.labels is None:
            record.rows = rows_of(self._batch_dim, leaves, None, watch)
            for one in watch.calls:
                one.edge = None  # lets go of the graph
        else:
            if self.labels.source is not None:
                self.labels.targets = self.labels.source(*args, **kwargs)
            selected = self.labels.select(output)
            outputs = selected if isinstance(selected, tuple) else (selected,)
            record.rows = rows_of(self._batch_dim, leaves, outputs, watch)
            again = (
                partial(self._again, record, call, args, kwargs) if self._runs_once(outputs, len(watch.calls)) else None
            )
            reached = self._send_back(record, watch, selected, self.labels, again)
            self._await(record, nodes, outputs, _leaves(output))
            if self.compares and any(x is selected for x in _leaves(output)) and _has_gradient(selected):
                self._keep_left(record, [selected], self.labels.targets)
        record.targets = None if self.labels is None else self.labels.targets
        if self.keep_inputs:
            record.inputs = args, kwargs
        if self.labels is None:
            self._follow_strays(record, watch)
            if self.compares:
                self._keep_left(record, {id(x): x for x in _leaves(output) if _has_gradient(x)}.values())
        self._sorting.sort(record, watch, reached)
        self._verification.check(record)
        self._which = Examples(self._which.start + record.examples())
        if not record.calls:
            return
        self._tap(watch)
        (self._records.append if self._lasting else self._waiting.add)(record)

    def _await(self, record: Record, nodes: Sequence[Any], outputs: Sequence[Tensor], returned: Sequence[Any]) -> None:
        """See that the user's backward pass comes: at what is returned, or if the outputs are other tensors, made by a
        pointer, at the operations."""
        alive = Quiet(partial(self._alive, record))
        tensors = {id(x): x for x in returned if isinstance(x, Tensor)}
        if all(id(x) in tensors for x in outputs):
            for x in tensors.values():
                if x.grad_fn is not None:  # a parameter would keep the hook for ever
                    x.register_hook(alive)
        else:
            for node in nodes:
                node.register_prehook(alive)

    def _keep_left(self, record: Record, outputs: Iterable[Tensor], targets: Any = None) -> None:
        """See what the user's loss leaves at outputs, to be compared with what the likelihood says."""
        for x in outputs:
            left = record.await_gradient(x)
            record.known = record.rows.targets(targets, left.output)
            x.register_hook(Quiet(partial(_add, left.by_task)))

    def _follow_strays(self, record: Record, watch: Watch) -> None:
        """Without labels: see which operations without a rule the user's loss depends on."""
        for p, what, y in watch.strays:
            tasks = record.strays.setdefault((self.inventory.name(p), what), set())
            if y is not None:
                y.register_hook(Quiet(partial(_enter, tasks)))

    def _alive(self, record: Record, gradient: Tensor) -> None:
        record.tasks.add(torch._C._current_graph_task_id())

    def _tap(self, watch: Watch) -> None:
        """Note which backward passes fill the gradients of what was used."""

        trained = [p for p in self._watched if p.requires_grad]
        small = {id(p) for p in sorted(trained, key=Tensor.numel)[:3]}

        def fill(p: Tensor) -> None:
            if self.probes and id(p) in small and p.grad is not None and p.grad.layout is torch.strided:
                self._probed[id(p)] = p, p.grad.detach().clone()
            task = torch._C._current_graph_task_id()
            self._filled.setdefault(task, set()).add(id(p))
            for record in [waiting for waiting in self._waiting if task in waiting.tasks]:
                self._waiting.discard(record)
                self._records.append(record)

        used = {id(call.weight.parameter): call.weight.parameter for call in watch.calls}
        if self.probes:
            used |= {id(p): p for p in trained if id(p) in small}
        for key in used.keys() - self._taps.keys():
            self._taps[key] = used[key].register_post_accumulate_grad_hook(fill)

    def _runs_once(self, outputs: Sequence[Tensor], calls: int) -> bool:
        """Whether the graph has functions of a user, whose backward may not run more than once."""
        key = calls, self._model.training
        if key not in self._once:
            self._once[key] = any(isinstance(node, BackwardCFunction) for node in _nodes(outputs))
        return self._once[key]

    def _again(
        self, record: Record, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, list[GradientEdge]]:
        """The outputs and the edges of the same pass in a graph of its own, random numbers and buffers as they were."""
        assert self.labels is not None and record.random is not None
        modules = _modules(self._model)
        buffers = [(b, b._version, b.clone()) for m in modules for b in m._buffers.values() if b is not None]
        with torch.random.fork_rng():
            torch.random.set_rng_state(record.random)
            with quiet(modules), Watch(self._operands, constants=self._constants(modules)) as watch:
                selected = self.labels.select(call(*args, **kwargs))
        with torch.no_grad():
            for buffer, version, before in buffers:
                if buffer._version != version:
                    buffer.copy_(before)
        return selected, [one.edge for one in watch.calls if one.edge is not None]

    def _send_back(
        self,
        record: Record,
        watch: Watch,
        selected: Any,
        labels: Labels,
        again: Callable[[], tuple[Any, list[GradientEdge]]] | None = None,
    ) -> set[int]:
        """Give the calls the gradients of the seeds; returns which strays the outputs depend on.

        Every seed goes through the graph of the user's pass, or if that is ``again`` through one of its own.
        """
        outputs, rows = selected if isinstance(selected, tuple) else (selected,), record.rows
        strays = {k: get_gradient_edge(y) for k, (_, _, y) in enumerate(watch.strays) if y is not None}
        edges = [call.edge for call in watch.calls if call.edge is not None]
        for call in watch.calls:
            call.edge = None  # lets go of the graph
        tracked = [k for k, output in enumerate(outputs) if output.requires_grad]
        if not tracked:
            return set()
        plain = tuple(x.detach() if x.dtype.itemsize >= 4 else x.detach().float() for x in outputs)
        whole = plain if isinstance(selected, tuple) else rows.turned(plain[0])
        reached: set[int] = set()
        with (
            torch.autocast(plain[0].device.type, enabled=False),
            sending(self._hooked),
        ):  # of the loss, which a user may write
            told, labels.targets = labels.targets, rows.targets(labels.targets, plain[0])
            record.terms = weighted(rows.by_example(labels.terms(whole)), record.mask, whole)
            mixed = labels.estimator == "exact" and (
                rows.each > 1 or not all(rows.matches(call.sizes) and not call.shared for call in watch.calls)
            )
            held = self._verification.asked(watch, self._watched, self._model.training)
            for seed in rows.seeds(labels, whole, mixed):
                seeds = seed if isinstance(seed, tuple) else (rows.turned(seed),)
                if record.mask is not None and masks(record.mask, whole):
                    seeds = (rows.turned(masked(rows.turned(seeds[0]), record.mask)),)
                if again is not None:
                    fresh, edges = again()
                    outputs, strays = fresh if isinstance(fresh, tuple) else (fresh,), {}
                back = [seeds[k].to(outputs[k].dtype) for k in tracked]
                gradients = torch.autograd.grad(
                    [outputs[k] for k in tracked],
                    [*edges, *strays.values(), *held],  # type: ignore[arg-type]
                    back,
                    retain_graph=True,
                    allow_unused=True,
                )
                here, after, whole_gradients = _cut(gradients, len(edges), len(strays))
                for call, gradient in zip(watch.calls, here, strict=True):
                    call.gradients.append(gradient)
                reached |= {k for k, g in zip(strays, after, strict=True) if g is not None}
                record.whole |= {p: g for p, g in zip(held, whole_gradients, strict=True) if g is not None}
                held = []
            labels.targets = told
        for x in watch.retained:
            x.grad = None
        record.scale = len(watch.calls[0].gradients) ** -0.5 if watch.calls else 1.0
        return reached


def _cut(gradients: Sequence[Any], first: int, second: int) -> tuple[Sequence[Any], Sequence[Any], Sequence[Any]]:
    """The first so many, the next so many, and the rest."""
    return gradients[:first], gradients[first : first + second], gradients[first + second :]


def _leaves(*values: Any) -> list[Any]:
    """The leaves of nested values."""
    return [leaf for x in values for leaf in ((x,) if isinstance(x, Tensor) else tree_leaves(x))]


def _modules(model: nn.Module) -> list[nn.Module]:
    """All modules of a model, once."""
    found, stack = {id(model): model}, [model]
    while stack:
        for module in stack.pop()._modules.values():
            if module is not None and id(module) not in found:
                found[id(module)] = module
                stack.append(module)
    return list(found.values())


def _enter(tasks: set[int], gradient: Tensor) -> None:
    tasks.add(torch._C._current_graph_task_id())


def _has_gradient(x: Any) -> bool:
    """Whether this is a tensor that a backward pass reaches."""
    return isinstance(x, Tensor) and x.grad_fn is not None and x.is_floating_point()


def _add(by_task: dict[int, Tensor], gradient: Tensor) -> None:
    task, gradient = torch._C._current_graph_task_id(), gradient.detach()
    by_task[task] = by_task[task] + gradient if task in by_task else gradient


def _nodes(outputs: Sequence[Tensor]) -> Iterator[Any]:
    """The nodes of a graph."""
    stack, known = [x.grad_fn for x in outputs], set()
    while stack:
        node = stack.pop()
        if node is not None and node not in known:
            known.add(node)
            yield node
            stack += [following for following, _ in node.next_functions]


def _close(engine: ref[Engine]) -> None:
    alive = engine()
    if alive is not None:
        alive.close()
