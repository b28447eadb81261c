"""``FNGD``: the natural gradient as a weighted sum of gradients, its weights solved for in the first epoch."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from natgrad.engine import Engine
from natgrad.fngd.coefficients import Coefficients, PositionMean
from natgrad.fngd.first_phase import FirstPhase, Learnt, Share
from natgrad.fngd.kinds import fit, shared, turned
from natgrad.fngd.report import report
from natgrad.fngd.step import Move, take
from natgrad.fngd.system import System, Unit
from natgrad.fngd.table import Table
from natgrad.fngd.validate import check_settings, checked_ids
from natgrad.fngd.weighting import Plan, Weighting
from natgrad.layers import Coverage, Layer, expected
from natgrad.optim.adamw import DEFAULTS, adamw_step
from natgrad.optim.checkpoints import check_parameters, check_processes
from natgrad.optim.closure import evaluate, write_out
from natgrad.optim.fallback import Watch
from natgrad.optim.finiteness import finiteness, norm
from natgrad.optim.groups import adamw_settings, build_groups, extended, within
from natgrad.optim.proposal import restore_dtypes, uninterrupted
from natgrad.optim.step_size import read_once
from natgrad.record import Record


class FNGD(torch.optim.Optimizer):
    """theta <- theta - lr P with P <- momentum P + D, D = sum_n c_n DW_n and c = (K + N lambda I)^-1 1 per layer.

    With K_nm = <DW_n, DW_m> that is D = (E + lambda I)^-1 M for the empirical Fisher E of the batch, by an N x N
    system. The systems are solved in the first ``first_phase`` steps alone (one epoch: ``len(loader)``). After that c
    is looked up, and the user's backward pass sums gradients with these weights: an ordinary step, and a number a layer
    in place of a matrix. ``.grad`` is then sum_n w_n grad_n with w_n = c_n / mean c, and D = N mean c ``.grad``. An
    example that the first phase did not see, and a pass in ``eval()`` mode, weigh 1.

    The training loop is the usual one; the loss must be a mean over examples, and an incomplete batch has the first
    coefficients. The groups of a convolution share c. Weights that are used whole, at positions of the examples, follow
    FNGD, tokens and all else AdamW; where an operation cannot weigh its examples, as a norm, all have the mean
    coefficient of the layer. ``print(optimizer)`` says which is which, and why.

    Cost: N^2 (in + out) and N^3 / 3 flops a layer in a step of the first phase, which also keeps a and g; after it a
    product of g or x with N numbers. Memory beside one direction: two numbers a layer for every slot of the table.

    Args:
        model: the module itself, not its parameters.
        first_phase: the number of steps that solve for coefficients, ``len(loader)``.
        coefficients: how they are looked up afterwards: :class:`~natgrad.fngd.PositionMean` (default),
            :class:`~natgrad.fngd.Sample`, :class:`~natgrad.fngd.Iteration`, :class:`~natgrad.fngd.Quantile`,
            :class:`~natgrad.fngd.Scalar` or :class:`~natgrad.fngd.Recompute`.
        mu: the damping lambda, in a unit.
        unit: ``"trace/N^2"`` (tr(K)/N^2), ``"trace/N"`` or ``"absolute"``: see :class:`~natgrad.fngd.system.System`.
        share: of c, among all layers (``"joint"``), those of one ``"shape"``, or none (``"layer"``): from the sum of
            their K.
        normalise: divide c by its sum: steps then have the length of SGD's.
        lr: learning rate.
        momentum: the share of P that is kept.
        nesterov: look ahead by one step of the momentum.
        weight_decay: decoupled; a step removes lr * weight_decay of a weight.
        exclude: names of modules left to AdamW.
        groups: dicts with ``params`` and their own ``lr``, ``momentum``, ``nesterov`` or ``weight_decay``; the rest
            forms a group of its own.
        adamw: settings of the AdamW rule: ``lr``, ``betas``, ``eps``, ``weight_decay``; ``False`` leaves the parameters
            that FNGD does not step to an optimizer of your own.
        grad_scaler: the ``GradScaler`` in use.
        strict: refuse to leave a parameter to AdamW that ``exclude`` does not name, once a step shows it.

    Raises:
        TypeError, ValueError: for a setting of the wrong kind or outside its range, before anything is changed.

    Reference: Ou, Zhu, Huang and Liu, arXiv 2403.03473, which leaves open how c is looked up.
    """

    def __init__(
        self,
        model: nn.Module,
        first_phase: int,
        *,
        coefficients: Coefficients | None = None,
        mu: float = 1.0,
        unit: Unit = "trace/N^2",
        share: Share = "layer",
        normalise: bool = False,
        lr: float = 0.01,
        momentum: float = 0.9,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        exclude: Iterable[str] = (),
        groups: Iterable[Mapping[str, Any]] = (),
        adamw: Mapping[str, Any] | Literal[False] | None = None,
        grad_scaler: Any = None,
        strict: bool = False,
    ) -> None:
        model = getattr(model, "_orig_mod", model)  # of torch.compile
        coefficients = PositionMean() if coefficients is None else coefficients
        check_settings(locals())
        check_processes()
        self._first = FirstPhase(System(mu, unit, normalise), coefficients, share)
        natural = {"lr": lr, "momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay}
        self._expected = expected(model, tuple(exclude), wide=None)
        self.model, self.first_phase, self.coefficients = model, first_phase, coefficients
        super().__init__(build_groups(model, fit(model, self._expected), natural, adamw, groups), natural)
        held = self._held()
        elsewhere = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in held]
        self._adamw, self._scaler, self._watch = {**DEFAULTS, **(adamw or {})}, grad_scaler, Watch(strict, elsewhere)
        self._engine = Engine(model, lasting=False, exclude=tuple(exclude), wide=None)
        self._engine.close_with(self)
        uses = self._engine.inventory.saved()
        self.param_groups[0] |= {"clock": {"steps": 0, "skipped": 0}, "uses": uses, "apart": {}}
        self._weighting = Weighting(model, coefficients.needs_ids, self._engine)
        self._weighting.close_with(self)
        self._learnt: Any = None  # of which state of the inventory and the groups these layers are
        self._layers: Mapping[str, Layer] = {}
        self._enter_phase()
        self._arm()

    # What a user reads and tells.

    @property
    def steps(self) -> int:
        """The number of steps done, skipped ones included."""
        return self._clock["steps"]

    @property
    def learns(self) -> bool:
        """Whether the coming step solves for its coefficients."""
        return self.coefficients.learns(self.steps, self.first_phase)

    @property
    def layers(self) -> Mapping[str, Layer]:
        """The layers that FNGD steps, as far as they have been seen; before the first pass those that are expected."""
        return self._covered.layers

    @property
    def uncovered(self) -> Mapping[str, str]:
        """The trained parameters that are in none, and why."""
        return self._covered.uncovered

    def statistics(self) -> dict[str, float]:
        """Numbers to log, of the last step and in total; reading them may wait for the device."""
        momenta = [state["momentum"] for state in self.state.values() if "momentum" in state]
        parameters = [p for layer in self._layers.values() for p in layer.parameters]
        gradients = [p.grad for p in parameters if p.grad is not None]
        lengths = {"gradient_norm": norm(gradients), "direction_norm": norm(momenta)}
        return {**{name: float(value) for name, value in self._clock.items()}, **lengths}

    def examples(self, ids: Tensor) -> None:
        """Tell which examples (n,) the coming forward pass is on, by their numbers >= 0 in the data."""
        ids = checked_ids(ids).to(next(self.model.parameters()).device)
        if self.coefficients.needs_ids:
            self._weighting.ids = ids

    def __repr__(self) -> str:
        found, held = self._covered, self._held()
        tables = {name: self._table(layer) for name, layer in found.layers.items()} if self.state else {}
        others = [name for name, p in self.model.named_parameters() if id(p) not in held]
        return str(report(self.model, found, tables, self._weighting.plan.alike, others))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Train more parameters of the model, such as those unfrozen since; AdamW steps them after the first phase.

        Settings that the group lacks are those of the optimizer. Raises ``ValueError`` for parameters that are foreign,
        frozen, in a group already, or half a layer, and then changes nothing.
        """
        if "rule" in param_group:  # as build_groups makes them
            return super().add_param_group(param_group)
        inventory = self._engine.inventory
        inventory.refresh()
        for group in extended(self.model, self.param_groups, inventory, param_group, self.defaults, self._adamw):
            super().add_param_group(group)
        self._expected = expected(self.model, inventory.exclude, wide=None)

    # One step.

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients, and forget what was recorded for them."""
        self._engine.discard(only_live=True)
        if not self._engine.pending:
            self._arm()
        super().zero_grad(set_to_none)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step, after evaluating the closure once if there is one. All is computed first, then applied or not.

        A gradient that is not finite skips the step: a warning, ``statistics()["skipped"]``, and nothing else changes.
        """
        loss = evaluate(closure, self._restart)
        check_parameters(self.model, self.param_groups)
        self._learn_layers()
        write_out(self.model.parameters())
        learnt = self._learn(self._engine.take()) if self.learns else {}
        moves = self._moves(learnt)
        finite = self._finite(learnt)
        if not finite:
            warnings.warn(f"step {self.steps} skipped: a gradient, an input or an output is not finite", stacklevel=2)
        with uninterrupted():
            if finite:
                self._apply(learnt, moves)
            self._conclude(finite)
        return loss

    def _conclude(self, applied: bool) -> None:
        """Count the step, and make ready for the next one."""
        learnt_so_far = self.learns
        self._clock["steps"] += 1
        self._clock["skipped"] += not applied
        if self.learns != learnt_so_far:
            self._enter_phase()
        self._arm()

    def _restart(self) -> None:
        """Forget what was recorded, and be ready for the same step again."""
        self._engine.discard()
        self._arm()

    def _learn(self, records: list[Record]) -> dict[str, Learnt]:
        """The directions and the tables of the layers that the passes of this step reached."""
        scale = sum(record.examples() for record in records)  # gradients of a mean as those of a sum
        for record in records:
            record.scale = scale / (self._scaler.get_scale() if self._scaler is not None else 1.0)
        self._set_apart(shared(records))
        tables = self._tables()
        learnt = self._first.learn(self._layers, tables, records, self._place, self._weighting.told)
        known = [name for name in self._layers if name in learnt or tables[name].known]
        self._watch(self.model, replace(self._covered, layers=self._layers), known, self.param_groups)
        return learnt

    def _moves(self, learnt: Mapping[str, Learnt]) -> dict[str, Move]:
        """The directions of all layers that have a gradient and coefficients."""
        moves = {}
        for name, layer in self._layers.items():
            if not layer.has_gradient:
                continue
            if name in learnt:
                moves[name] = Move(layer.unpack(learnt[name].D.to(layer.parameters[0].dtype)))
            elif (scale := self._scale(name)) is not None:
                gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in layer.parameters]
                moves[name] = Move(layer.parts(gradients), scale)
        return moves

    def _scale(self, name: str) -> float | None:
        """By what the gradient of a layer makes a direction, N mean c; ``None`` where it has no coefficients."""
        if name not in self._multiples:
            table = self._table(self._layers[name])
            return float(table.scale) if table.known else None
        return self._multiples[name]

    def _finite(self, learnt: Mapping[str, Learnt]) -> bool:
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        found = finiteness([*gradients, *(new.D for new in learnt.values())])
        return found is None or math.isfinite(found)

    def _apply(self, learnt: Mapping[str, Learnt], moves: Mapping[str, Move]) -> None:
        for name, layer in self._layers.items():
            self._remember(layer, learnt[name].table if name in learnt else self._table(layer))
        for name, layer in self._layers.items():
            take(layer, moves.get(name), self.state, self._settings)
        for group in self.param_groups:
            if group["rule"] == "adamw":
                adamw_step(group["params"], self.state, group)
        moved = {id(p) for name in moves for p in self._layers[name].parameters}
        for group in self._natural:
            if group["lr"]:
                unseen = [p for p in group["params"] if id(p) not in moved]
                adamw_step(unseen, self.state, adamw_settings(group, self._adamw))

    # Helpers.

    @property
    def _clock(self) -> dict[str, Any]:
        return self.param_groups[0]["clock"]

    @property
    def _covered(self) -> Coverage:
        inventory, apart = self._engine.inventory, self.param_groups[0]["apart"]
        seen = inventory.facts or inventory.strays
        found, both = (inventory.coverage(), turned(inventory)) if seen else (self._expected, {})
        return fit(self.model, within(found, self.model, self._held()), {**both, **apart})

    def _held(self) -> frozenset[int]:
        return frozenset(id(p) for group in self.param_groups for p in group["params"])

    def _learn_layers(self) -> None:
        """Take over the layers that passes have shown since the last step."""
        inventory = self._engine.inventory
        inventory.add(())  # what is trained may have changed
        now = inventory.layers, self._held(), self.param_groups[0]["apart"]
        if self._learnt is None or self._learnt[0] is not now[0] or self._learnt[1:] != now[1:]:
            self._learnt, self.param_groups[0]["uses"] = now, inventory.saved()
            self._layers = self._covered.layers if inventory.layers else {}
            self._enter_phase()

    def _set_apart(self, reasons: Mapping[str, str]) -> None:
        """Leave layers to AdamW from now on."""
        new = {name: why for name, why in reasons.items() if name in self._layers}
        self.param_groups[0]["apart"] = {**self.param_groups[0]["apart"], **new}
        self._learn_layers()

    @property
    def _settings(self) -> dict[int, dict[str, Any]]:
        """The groups of the parameters that FNGD has, by the ids of these."""
        return {id(p): group for group in self._natural for p in group["params"]}

    @property
    def _natural(self) -> list[dict[str, Any]]:
        return [group for group in self.param_groups if group["rule"] == "natural"]

    @property
    def _place(self) -> int:
        """The number of the coming step in its epoch."""
        return self.steps % self.first_phase

    def _tables(self) -> dict[str, Table]:
        return {name: self._table(layer) for name, layer in self._layers.items()}

    def _table(self, layer: Layer) -> Table:
        """What the state holds of a layer, or an empty table."""
        weight, (total, seen) = layer.parameters[0], _names(layer)
        state = self.state.get(weight, {})
        return Table(state[total], state[seen]) if total in state else Table.empty(weight)

    def _remember(self, layer: Layer, table: Table) -> None:
        """Every parameter gets an entry, and every layer all of its names: distributed checkpoints ask for both."""
        for p in layer.parameters:
            if "momentum" not in self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
        self.state[layer.parameters[0]].update(zip(_names(layer), (table.total, table.seen), strict=True))

    def _enter_phase(self) -> None:
        """Read off the tables what the steps of the second phase need; in the first one there is nothing to read."""
        tables = {} if self.learns else {name: table for name, table in self._tables().items() if table.known}
        self._multiples = read_once({name: table.scale for name, table in tables.items()})
        weights = {name: table.weights(self.coefficients) for name, table in tables.items()}
        known = {name: found for name, found in weights.items() if found is not None}
        self._weighting.follow(Plan(self._layers, known, tuple(self._engine.inventory.watched)))

    def _arm(self) -> None:
        """Record the coming step's forward passes if they are needed."""
        self._engine.armed = self.learns
        self._engine.attach()
        self._weighting.attach()
        self._engine.begin()
        self._weighting.begin(self._place)

    # Checkpoints.

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a ``state_dict()``; a resumed run then continues bit for bit.

        Raises ``ValueError`` for one of another optimizer, and then changes nothing.
        """
        before, uses = {"state": self.state, "param_groups": self.param_groups}, self._engine.inventory.saved()
        super().load_state_dict(state_dict)
        try:
            restore_dtypes(self.param_groups, self.state, state_dict)
            self._restore()
        except ValueError:
            self.__setstate__(before)
            self._engine.inventory.restore(uses)
            self._learnt = None
            self._learn_layers()
            raise
        self._arm()

    def _restore(self) -> None:
        """Take over what a checkpoint says of the layers."""
        other = "the checkpoint is of another optimizer or version; it lacks "
        if self.param_groups[0].get("clock", {}).keys() != {"steps", "skipped"} or "apart" not in self.param_groups[0]:
            raise ValueError(f"{other}steps")
        self._engine.inventory.restore(self.param_groups[0]["uses"])
        self._learnt = None
        self._learn_layers()
        lacking = [name for name, layer in self._layers.items() if not self._holds(layer)]
        if lacking:
            raise ValueError(other + ", ".join(lacking))

    def _holds(self, layer: Layer) -> bool:
        """Whether the state is that of a layer under FNGD, or there is none."""
        state = self.state.get(layer.parameters[0], {})
        return not state or {"momentum", *_names(layer)} <= state.keys()


def _names(layer: Layer) -> tuple[str, str]:
    """What the table of a layer is called in the state of its weight."""
    return f"{layer.slot}total", f"{layer.slot}seen"
