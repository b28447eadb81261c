"""``NaturalGradient``: the optimizer that drops into an ordinary training loop."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from natgrad.engine import Engine
from natgrad.fishers import KFAC, Approximation, check_layers
from natgrad.labels import Estimator, Labels
from natgrad.layers import WIDE, Coverage, Layer, expected
from natgrad.likelihoods import Objective
from natgrad.masks import Mask
from natgrad.optim.adamw import DEFAULTS, adamw_step
from natgrad.optim.averages import Averages
from natgrad.optim.budget import Account, Budget, Plan, Turn
from natgrad.optim.cadence import Cadence
from natgrad.optim.checkpoints import check_checkpoint, check_parameters, check_processes
from natgrad.optim.clock import new_clock, remember
from natgrad.optim.closure import evaluate, write_out
from natgrad.optim.coverage import matrices_of, report
from natgrad.optim.damping import Damping
from natgrad.optim.directions import Directions
from natgrad.optim.fallback import Watch, without_samples
from natgrad.optim.finiteness import finiteness, norm
from natgrad.optim.groups import adamw_settings, build_groups, extended, shortened, within
from natgrad.optim.layerwise import Layerwise, State, blocks
from natgrad.optim.precision import Precision
from natgrad.optim.pretrained import ask
from natgrad.optim.proposal import (
    Proposal,
    keeping,
    moves_of,
    remember_layer,
    restore_dtypes,
    uninterrupted,
    whole,
    without_blanks,
)
from natgrad.optim.scheduling import Schedule
from natgrad.optim.shampoo import shampoo_step
from natgrad.optim.step_size import Automatic, Decision, Situation, StepSize, read_once
from natgrad.optim.validate import as_damping, check_settings
from natgrad.record import Record, Sharing
from natgrad.scale import Gauge, gauged


class NaturalGradient(torch.optim.Optimizer):
    """theta <- theta - lr (alpha D + mu P), with D = (F + damping I)^-1 grad for a structured Fisher F (Amari 1998).

    P is the previous direction; alpha and mu are the business of ``step_size``. Weights whose use is seen follow the
    natural gradient, every other parameter AdamW; ``print(optimizer)`` says which is which, and why. The training loop
    is the usual one, calls of the model are observed. Memory beside the model: statistics, matrix and
    inverse of the approximation and one direction. Cost: what the approximation says, and ``docs/step-size.md``.

    Args:
        model: the module itself, not its parameters.
        approximation: the structure of F, for example ``EKFAC()``; default ``KFAC()``.
        likelihood: what the outputs mean; with it F is the true Fisher, without it the empirical one.
        estimator: ``"sampled"`` (default with a likelihood), ``"exact"`` or ``"empirical"`` (default without).
        draws: labels drawn per example by ``"sampled"``.
        lr: learning rate; default as the policy has it (.02 for ``Automatic``: the length of a step, as for AdamW).
            Weights that have learnt something before their first step (:func:`~natgrad.optim.pretrained.is_pretrained`)
            go a twentieth of that in steps of a set length, and under the AdamW rule where ``adamw`` has no lr; but not
            in groups that were made with an lr of their own. ``pretrained`` of a group is ``None`` until it is known.
        step_size: the policy for alpha and mu; default ``Automatic()``.
        damping: a constant in units of F, or a policy: ``LevenbergMarquardt`` (default), ``TraceDamping``.
        momentum: mu of the policies that do not choose it.
        nesterov: look ahead by one step of the momentum.
        weight_decay: decoupled; a step removes lr * weight_decay of a weight.
        decay: weight of the old statistics in the moving averages.
        overhead: the share of a plain training step that curvature may take on average. From counted flops follow,
            layer by layer, what share of examples and positions is observed, how often, and how often matrices are
            renewed; the first steps included. ``None``: no limit. Settings below overrule it.
        observe_every: steps between observations, at the least as it suits the approximation (4, or 1); the first
            steps observe more often.
        refresh_every: steps between new matrices, at the least as it suits the approximation (10; 20 for eigenbases);
            the first steps refresh more often.
        observe_fraction: the share of the batch, its first examples, that statistics are taken on.
        staggered: spread the refreshes of the layers over the period.
        weight_sharing: ``"expand"`` or ``"reduce"`` for weights used at several positions.
        exclude: names of modules left to AdamW.
        wide: sides of more inputs or outputs get a diagonal in place of a covariance, ``None`` for none; the token side
            of an embedding always. Where the approximation has no such form, KFAC stands in, as ``print`` says.
        shampoo: whether matrices that no rule reads follow Shampoo at the length of AdamW's step, which needs no
            more than their gradient, and not AdamW, as all that is not a matrix does.
        groups: dicts with ``params`` and their own ``lr`` or ``weight_decay``; the rest forms a group of its own.
        adamw: settings of the AdamW rule: ``lr``, ``betas``, ``eps``, ``weight_decay``; ``False`` leaves what is
            not expected to have curvature to an optimizer of your own.
        precision: of the products with an inverse: ``"auto"`` (bfloat16 where the block is large and products in it
            are measured to be faster; the choice is part of a checkpoint) or a dtype.
        grad_scaler: the ``GradScaler`` in use; needed for the empirical estimator where every step is clipped.
        seed: of the drawn labels.
        strict: refuse to leave a parameter to AdamW that ``exclude`` does not name, once a step shows it; a layer whose
            matrix cannot be factorised then raises ``FactorisationError``.
        calls: names of methods of the model, other than ``forward``, whose calls are passes too.
        observe_in_eval: observe passes in ``eval()`` mode too.
        batch_dim: the dimension of the examples in the first tensor that the model is given, ``None`` to find out by
            sizes, and by what attention and recurrences know.
        mask: which positions (n, t) of the examples exist: the name of an argument of the model, such as
            ``"attention_mask"``, or a function of all of them. Others count nowhere.

    Raises:
        TypeError, ValueError: for a setting of the wrong kind or outside its range, before anything is changed.

    Reference: Martens and Grosse, arXiv 1503.05671.
    """

    def __init__(
        self,
        model: nn.Module,
        approximation: Approximation | None = None,
        *,
        likelihood: Objective | None = None,
        estimator: Estimator | None = None,
        draws: int = 1,
        lr: float | None = None,
        step_size: StepSize | None = None,
        damping: float | Damping | None = None,
        momentum: float = 0.9,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        decay: float = 0.85,
        overhead: float | None = 0.1,
        observe_every: int | None = None,
        refresh_every: int | None = None,
        observe_fraction: float | None = None,
        staggered: bool = False,
        weight_sharing: Sharing = "expand",
        exclude: Iterable[str] = (),
        wide: int | None = WIDE,
        shampoo: bool = False,
        groups: Iterable[Mapping[str, Any]] = (),
        adamw: Mapping[str, Any] | Literal[False] | None = None,
        precision: torch.dtype | str = "auto",
        grad_scaler: Any = None,
        seed: int = 0,
        strict: bool = False,
        calls: Iterable[str] = (),
        observe_in_eval: bool = False,
        batch_dim: int | None = None,
        mask: Mask = None,
    ) -> None:
        model = getattr(model, "_orig_mod", model)  # of torch.compile
        approximation = KFAC() if approximation is None else approximation
        step_size = Automatic() if step_size is None else step_size
        estimator = estimator or ("empirical" if likelihood is None else "sampled")
        periods = {"observe": observe_every, "refresh": refresh_every, "fraction": observe_fraction}
        given = frozenset(name for name, value in periods.items() if value is not None)
        refresh_every = getattr(approximation, "refresh_every", 1) if refresh_every is None else refresh_every
        observe_every = getattr(approximation, "observe_every", 1) if observe_every is None else observe_every
        observe_fraction = 1.0 if observe_fraction is None else observe_fraction
        by_default = lr is None
        lr = getattr(step_size, "lr", None) if lr is None else lr
        check_settings(locals())
        check_processes()
        assert lr is not None  # as has been checked
        self._expected = expected(model, tuple(exclude), wide)
        check_layers(approximation, self._expected.layers.values())
        cadence = Cadence(observe_every, refresh_every, observe_fraction, staggered)
        fast = Precision.measured(precision, self._expected.layers.values())
        self.step_size, self.damping = step_size, as_damping(damping)
        self._curvature = Layerwise(approximation, {}, decay, weight_sharing, fast, self.damping)
        free = overhead is None or math.isinf(overhead) or approximation.together
        budget = None if free or overhead is None else Budget(overhead, cadence, given)
        self._schedule = Schedule(approximation, cadence, budget, estimator != "empirical")
        natural = {"lr": lr, "momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay}
        natural["pretrained"] = None if by_default and step_size.share_of_pretrained({}) != 1.0 else False
        self.model = model
        super().__init__(build_groups(model, self._expected, natural, adamw, groups), natural)
        self.param_groups[0] |= {"clock": new_clock(self.damping.initial), "bfloat16": dict(fast.chosen)}
        held = self._held()
        self._elsewhere = {name for name, p in model.named_parameters() if p.requires_grad and id(p) not in held}
        self._learnt: tuple[Any, Any] = ({}, held)
        self._followed: set[int] = set()  # of the parameters of layers, their ids
        self._shampoo, self._wide, self._watch = shampoo, wide, Watch(strict, self._elsewhere)
        self._adamw, self._scaler, self._seed = {**DEFAULTS, **(adamw or {})}, grad_scaler, seed
        self._shared = not adamw or "lr" not in adamw  # whether the AdamW rule heeds ``pretrained``
        self._now, self._gauge = State(), Gauge()
        self._report: dict[str, float] = {}
        labels = None if estimator == "empirical" or likelihood is None else Labels(likelihood, estimator, draws)
        watched: dict[str, Any] = {
            "exclude": tuple(exclude),
            "wide": wide,
            "calls": tuple(calls),
            "batch_dim": batch_dim,
            "mask": mask,
        }
        self._engine = Engine(model, labels, not observe_in_eval, lasting=False, **watched)
        self._engine.close_with(self)
        self._known = self._engine.inventory.parameters
        self.param_groups[0]["uses"] = self._engine.inventory.saved()
        self._engine.keep_inputs = step_size.needs_inputs
        self._arm()

    # What a user reads.

    @property
    def steps(self) -> int:
        """The number of steps done, skipped ones included."""
        return self._clock["steps"]

    @property
    def observe_every(self) -> int:
        """Steps from one observation to the next, of the layers that are observed most often."""
        return min((turn.observe_every for turn in self._turns.values()), default=self._schedule.cadence.observe_every)

    @property
    def refresh_every(self) -> int:
        """Steps from one refresh of the matrices to the next, of the layers that are renewed most often."""
        return min((turn.refresh_every for turn in self._turns.values()), default=self._schedule.cadence.refresh_every)

    def statistics(self) -> dict[str, float]:
        """Numbers to log, of the last step and in total; reading them may wait for the device."""
        gradients = [p.grad for group in self._natural for p in group["params"] if p.grad is not None]
        kept = [self._kept(layer) for layer in self._curvature.layers.values()]
        directions = [state["momentum"] for state in kept if "momentum" in state]
        return {
            **{name: float(value) for name, value in self._clock.items() if name not in ("memory", "account")},
            **self._clock["memory"],
            **self._report,
            "damping": self._damping,
            "gradient_norm": norm(gradients),
            "direction_norm": norm(directions),
            "retries": float(sum(c.retries for c in self._now.values())),
            "failures": float(sum(c.failures for c in self._now.values())),
            "aside": float(sum(c.aside for c in self._now.values())),
            **self._now.numbers(),
        }

    def targets(self, targets: Any) -> None:
        """Tell the true labels of the coming forward pass, for a likelihood that ignores some of them or reads them.

        Or tell once how to find them: a function that every pass calls with the arguments of the model, as in
        ``optimizer.targets(lambda *_, labels, **rest: labels)`` where the model is called with ``labels=...``.
        """
        labels = self._engine.labels
        if labels is not None:
            labels.source, labels.targets = (targets, None) if callable(targets) else (None, targets)

    @property
    def layers(self) -> Mapping[str, Layer]:
        """The layers that have been seen; before the first pass that was observed, those that are expected."""
        return self._covered.layers

    @property
    def uncovered(self) -> Mapping[str, str]:
        """The trained parameters that are in none, and why."""
        return self._covered.uncovered

    def __repr__(self) -> str:
        found, held = self._covered, self._held()
        matrices = matrices_of(self.model, found, self._wide) if self._shampoo else {}
        others = [name for name, p in self.model.named_parameters() if id(p) not in held]
        rule, plan, geometry = self._curvature.approximation, self._plan, self._curvature.geometry
        told = report(self.model, found, rule, matrices, self._now, others, plan=plan, geometry=geometry)
        learnt, share = any(g["pretrained"] for g in self.param_groups), self.step_size.share_of_pretrained({})
        return str(told) + (f"\nweights had learnt before: their lr counts {share:g} times" if learnt else "")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Train more parameters of the model, such as those unfrozen since, with their curvature where they have any.

        Settings that the group lacks are those of the optimizer. Raises ``ValueError`` for parameters that are foreign,
        frozen, in a group already, or half a layer, and then changes nothing.
        """
        if "rule" in param_group:  # as build_groups makes them
            return super().add_param_group(param_group)
        self._engine.inventory.refresh()
        for group in extended(
            self.model, self.param_groups, self._engine.inventory, param_group, self.defaults, self._adamw
        ):
            super().add_param_group(group)
        self._expected = expected(self.model, self._engine.inventory.exclude, self._wide)
        self._clock["news"] = 1
        self._arm()

    # One step.

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients, and forget what was recorded for them."""
        self._engine.discard(only_live=True)
        if not self._engine.pending:
            self._arm()  # labels start anew: a step that a GradScaler skipped has used some
        super().zero_grad(set_to_none)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step, after evaluating the closure once if there is one. All is computed first, then applied or not.

        A gradient that is not finite skips the step: a warning, ``statistics()["skipped"]``, and nothing else changes.
        A matrix that cannot be factorised leaves its layer with the old inverse for a while, then to AdamW, with a
        warning, until a refresh succeeds; ``statistics()`` counts these as ``failures`` and ``aside``.
        """
        loss = evaluate(closure, self._restart)
        with torch.autocast(next(self.model.parameters()).device.type, enabled=False):
            proposal = self._next()
            with uninterrupted():
                self._conclude(proposal)
        return loss

    def _next(self) -> Proposal | None:
        """The step to take, ``None`` to skip it."""
        check_parameters(self.model, self.param_groups)
        records = self._engine.take()
        self._learn_layers()
        write_out(self._engine.inventory.parameters.values())
        ask(self.param_groups, self.step_size)
        before, proposal = (self._clock["memory"], self._curvature, self._schedule.geometry), None
        try:
            proposal = self._propose(records)
        finally:
            if proposal is None:
                self._clock["memory"], self._curvature, self._schedule.geometry = before
        return proposal

    def _conclude(self, proposal: Proposal | None) -> None:
        """Take the step, or skip it, and be ready for the next one."""
        if proposal is None:
            self._clock["skipped"] += 1
            warnings.warn(f"step {self.steps} skipped: a gradient, an input or an output is not finite", stacklevel=3)
        else:
            self._apply(proposal)
        self._clock["steps"] += 1
        self._arm()

    def _restart(self) -> None:
        """Forget what was recorded, and be ready for the same step again."""
        self._engine.discard()
        self._arm()

    def _propose(self, records: list[Record]) -> Proposal | None:
        self._rescale(records)
        if not records and self._free:
            self._do_without_samples()
        self._group_of = {id(p): group for group in self._shortened() for p in group["params"]}
        account = self._schedule.counted(self._account, self._curvature.layers, records)
        free = self._free
        curvature = self._advance(records, account)
        change = (self._now, curvature)
        account = self._schedule.charged(account, self._curvature.layers, self.steps, free, bool(records), *change)
        layers = self._curvature.layers
        names = [name for name, c in curvature.items() if c.refreshed and layers[name].has_gradient]
        chosen = {name: layers[name] for name in names}
        serves = self._schedule.serves(account, layers, free)
        directions, averages, curvature, lr = self._directions(chosen, curvature, records, serves)
        sizes = {"rest": self._rest(names), "observed": self._curvature.size(self._now, curvature)}
        products = {name: size for name, size in sizes.items() if size is not None}
        if names:
            if averages is None:
                products |= {"slope": directions.slope(), "drift": directions.drift()}
            else:
                products["along"] = directions.along.sum()
            products |= self.step_size.products(directions, self._damping, self._clock["memory"])
        read = read_once(products)
        if not all(math.isfinite(value) for value in read.values()):
            return None
        self._watch.fallen({n: c.reason for n, c in curvature.items() if c.aside}, self._now)
        labels = self._engine.labels
        capacity = 1.0 if labels is None else labels.factor * labels.capacity
        scheduled = any("initial_lr" in g or g["lr"] != g["first_lr"] for g in self._natural)
        terms = 0.0 if labels is None else sum(record.size() for record in records)
        situation = Situation(read, lr, self._momentum, self._clock["memory"], capacity, scheduled, terms)
        idle = Decision(0.0, 0.0, memory=self.step_size.idle(self._clock["memory"]))
        decision = self.step_size.decide(situation) if names else idle
        return Proposal(curvature, directions.D, averages, decision, read.get("drift", 0.0), lr, account)

    def _do_without_samples(self) -> None:
        """Hand over to what needs none, where layers have gradients; ``RuntimeError`` where the policy cannot."""
        layers = self._curvature.layers
        if any(c.ready and name in layers and layers[name].has_gradient for name, c in self._now.items()):
            self._clock["memory"] = without_samples(self.step_size, self._clock["memory"])
            self._choose_geometry()

    def _advance(self, records: list[Record], account: Account) -> State:
        started = time.perf_counter()
        state = self._curvature.filled(self._now, self._kept)
        due = self._schedule.due(account, self._curvature.layers, self.steps, self._free)
        advanced = self._curvature.advance(state, records, due, self._damping)
        if self._watches(account):
            recorded = {name for record in records for name in record.calls} - due.observe.keys()
            ready = [name for name, c in advanced.items() if c.ready or c.wide or name in recorded]
            self._watch(self.model, self._covered, ready, self.param_groups)
        if any(advanced[name].refreshes > state[name].refreshes for name in state):
            self._report["refresh_seconds"] = time.perf_counter() - started
        return advanced

    def _directions(
        self, layers: dict[str, Layer], curvature: State, records: list[Record], serves: Mapping[str, int]
    ) -> tuple[Directions, Averages | None, State, float]:
        """The directions of the step, the averages that they come from, the curvature as it is turned to them, and the
        learning rate that all layers share."""
        M, memory = blocks(layers, self._unit), self._clock["memory"]
        beta = self.step_size.averages(memory)
        other = (beta is None) == bool(self._clock.get("averaged", 0))  # than the last step's: P is of another kind
        states = {name: {} if other else self._kept(layer) for name, layer in layers.items()}
        kept = {name: state.get("momentum") for name, state in states.items()}
        P = {n: torch.zeros_like(M[n]) if p is None or p.shape != M[n].shape else p.to(M[n]) for n, p in kept.items()}
        squares = {name: state.get("squares") for name, state in states.items()}
        averages = None if beta is None else Averages.after(M, P, squares, beta)
        ahead = M if beta is None or averages is None else averages.ahead(M, beta)
        D, curvature = self._curvature.directions(curvature, ahead, serves, self.steps)
        precision, labels = self._curvature.precision, self._engine.labels
        joint = curvature.joint is not None
        directions = Directions(
            layers, M, D, P, records, precision, self.model, labels, joint, curvature, ahead, averages
        )
        if layers:
            directions = self.step_size.prepare(directions, self._damping, self._clock["memory"])
        shares, lr = self._rates(layers)
        every = list(shares.values())
        return (
            (directions if all(share == 1.0 for share in every) else directions.scaled(every)),
            averages,
            curvature,
            lr,
        )

    def _rates(self, names: Iterable[str]) -> tuple[dict[str, float], float]:
        """The largest learning rate of the groups, and what share of it every layer has."""
        rates = {key: group["lr"] for key, group in self._group_of.items()}
        lr = max(rates.values(), default=0.0)
        unit = self.step_size.unit(self._clock["memory"])
        return {name: rates[id(self._curvature.layers[name].weight)] / lr if lr else 1.0 for name in names}, unit * lr

    def _apply(self, proposal: Proposal) -> None:
        """Apply a step, whole: what can fail comes first, and is taken back if it does."""
        layers = self._curvature.layers
        moves = moves_of(proposal, layers, self.state, self._group_of)
        moved, kept = self._entries(proposal.moves), [layers[name] for name in proposal.moves]
        rules = list(self._rest_of_groups(moved))
        stepped = [p for parameters, _ in rules for p in parameters if p.grad is not None]
        with whole(stepped, self.state), keeping(kept, [p for p in stepped if id(p) in moved]):
            for parameters, settings in rules:
                self._first_order(parameters, settings)
        moves.apply(self.state)
        if proposal.curvature is not self._now:
            for name, curvature in proposal.curvature.items():
                remember_layer(layers[name], curvature, self.state)
        self._now = proposal.curvature
        self._clock["news"] = 0
        if self._engine.labels is not None:
            self._clock.update(capacity=self._engine.labels.capacity, scale=self._engine.labels.scale)
        self._clock["averaged"] = int(proposal.averages is not None)
        if proposal.averages is not None:
            self._clock["predicted"] = 0.0  # there is no slope to compare it with
        self._clock.update(self._gauge.numbers())
        self._report |= remember(self._clock, self.damping, proposal.decision, proposal.drift, proposal.lr)
        if proposal.account is not None and proposal.account is not self._account:
            self._clock["account"] = self._schedule.saved(proposal.account)
        if not self._engine.inventory.facts and not any(group["lr"] for group in self.param_groups):
            self._foresee()

    def _rest_of_groups(self, moved: Mapping[int, int]) -> Iterator[tuple[list[nn.Parameter], dict[str, Any]]]:
        """The parameters that a first-order rule steps, being those not ``moved`` whole, and its settings."""
        share = self.step_size.share_of_pretrained({}) if self._shared else 1.0
        for group in self.param_groups:
            if group["rule"] == "adamw":
                chosen, settings, given = group["params"], group, group["own_lr"]
            else:
                rest = (p for p in group["params"] if moved.get(id(p), 0) < p.numel())
                chosen = [p for p in rest if group["lr"] or id(p) not in self._followed]
                settings, given = adamw_settings(group, self._adamw), False
            yield chosen, shortened(settings, share, group["pretrained"] and not given)

    def _foresee(self) -> None:
        """Name the state of the layers that are expected: distributed checkpoints ask for it before there is a pass."""
        layers = self._expected.layers
        for name, curvature in replace(self._curvature, layers=layers).filled(State()).items():
            remember_layer(layers[name], curvature, self.state)

    def _first_order(self, parameters: Iterable[nn.Parameter], group: dict[str, Any]) -> None:
        """AdamW, or Shampoo for those that it is wanted for."""
        matrices = {id(p) for p in matrices_of(self.model, self._covered, self._wide).values()} if self._shampoo else ()
        adamw_step([p for p in parameters if id(p) not in matrices], self.state, group)
        shampoo_step([p for p in parameters if id(p) in matrices], self.state, group, self._wide)

    # Helpers.

    @property
    def _free(self) -> bool:
        """Whether passes are observed anyway."""
        return self.step_size.needs_samples(self._clock["memory"])

    @property
    def _account(self) -> Account:
        return self._schedule.account(self._clock["account"])

    def _watches(self, account: Account) -> bool:
        """Whether the coming step observes."""
        return self._schedule.watches(account, self._curvature.layers, self.steps, self._free)

    @property
    def _plan(self) -> Plan | None:
        """The plan under a budget."""
        return self._schedule.plan(self._account, self._curvature.layers, self._free)

    @property
    def _turns(self) -> Mapping[str, Turn]:
        """That for every layer."""
        return self._plan.turns if self._plan is not None else {}

    @property
    def _damping(self) -> float:
        """lambda in the units of the loss, which may be a multiple of the negative log-likelihood."""
        scaled = self._engine.labels is not None and self.damping.of_likelihood
        labels = self._engine.labels
        return self._clock["damping"] * (labels.factor * labels.scale if scaled and labels else 1.0)

    @property
    def _clock(self) -> dict[str, Any]:
        return self.param_groups[0]["clock"]

    @property
    def _covered(self) -> Coverage:
        inventory = self._engine.inventory
        inventory.refresh()
        if inventory.parameters is not self._known:  # the model has others since
            self._known = inventory.parameters
            self._expected = expected(self.model, inventory.exclude, self._wide)
        found = inventory.coverage() if inventory.facts or inventory.strays else self._expected
        return within(found, self.model, self._held())

    def _held(self) -> frozenset[int]:
        return frozenset(id(p) for group in self.param_groups for p in group["params"])

    def _learn_layers(self) -> None:
        """Take over the layers that passes have shown since the last step."""
        inventory = self._engine.inventory
        inventory.refresh()
        inventory.add(())  # what is trained may have changed
        (layers, groups), held = self._learnt, self._held()
        if layers is not inventory.layers or groups != held:
            covered = self._covered.layers
            found = covered if inventory.layers else {}
            check_layers(self._curvature.approximation, found.values())
            self._learnt = inventory.layers, held
            self._followed = {id(p) for layer in covered.values() for p in layer.parameters}
            for p in [p for p in self.state if id(p) not in held]:  # taken out of param_groups
                del self.state[p]
            self._curvature = replace(self._curvature, layers=found)
            self.param_groups[0]["uses"] = inventory.saved()

    def _entries(self, names: Iterable[str]) -> dict[int, int]:
        """How many entries of every parameter these layers have."""
        entries: dict[int, int] = {}
        for layer in (self._curvature.layers[name] for name in names):
            for view, p in zip(layer.views, layer.parameters, strict=True):
                entries[id(p)] = entries.get(id(p), 0) + math.prod(view.size)
        return entries

    @property
    def _momentum(self) -> float:
        return next((group["momentum"] for group in self._natural), 0.0)

    def _shortened(self) -> Iterator[dict[str, Any]]:
        """The natural groups, with the lr that counts."""
        share = self.step_size.share_of_pretrained(self._clock["memory"])
        for group in self._natural:
            yield shortened(group, share, group["pretrained"] and not group["own_lr"])

    @property
    def _natural(self) -> list[dict[str, Any]]:
        return [group for group in self.param_groups if group["rule"] == "natural"]

    def _kept(self, layer: Layer) -> dict[str, Any]:
        """What the state holds of a layer."""
        state = self.state.get(layer.parameters[0], {})
        return {name.removeprefix(layer.slot): value for name, value in state.items() if name.startswith(layer.slot)}

    def _rest(self, names: list[str]) -> Tensor | None:
        """A number that is finite if all gradients are that no inner product covers."""
        covered = self._entries(names)
        rest = (p for p in self._engine.inventory.parameters.values() if covered.get(id(p), 0) < p.numel())
        return finiteness([p.grad for p in rest if p.grad is not None])

    def _rescale(self, records: list[Record]) -> None:
        """Seeds in the unit of the user's loss; without a likelihood, the gradients of that loss as those of the sum
        over all examples of the step, in a unit that does not depend on its own."""
        labels, scaler = self._engine.labels, self._scaler
        announced = None if scaler is None or labels is not None else 1 / scaler.get_scale()
        self._gauge = gauged(Gauge.of(self._clock), records, labels, self._engine.altered, announced)
        if labels is None:
            n = sum(record.examples() for record in records)
            for record in records:
                record.scale = n * self._gauge.altered / self._unit
        else:
            labels.factor = self._gauge.factor
            for record in records if labels.factor != 1.0 else ():
                record.scale *= labels.factor**0.5

    @property
    def _unit(self) -> float:
        """That in which a loss without a likelihood is counted: its own, if a constant damping refers to that."""
        measured = self._engine.labels is None and self.damping.of_likelihood
        return self._gauge.unit if measured else 1.0

    def _arm(self) -> None:
        """Record the coming step's forward passes if they are needed, with labels that depend on its number alone."""
        self._choose_geometry()
        self._engine.armed = self._free or bool(self._clock["news"]) or self._watches(self._account)
        self._engine.compares = Gauge.of(self._clock).open
        self._engine.probes = self._engine.compares or self._engine.labels is None
        self._engine.attach()
        self._engine.begin()
        if self._engine.labels is not None:
            self._engine.labels.reseed((self._seed * 1_000_003 + self.steps) % 2**63)

    def _choose_geometry(self) -> None:
        """That of the policy as it is now."""
        geometry = self.step_size.geometry(self._clock["memory"])
        geometry = geometry.empirical() if self._engine.labels is None else geometry
        if geometry != self._curvature.geometry and not self._curvature.approximation.together:
            self._curvature, self._schedule.geometry = replace(self._curvature, geometry=geometry), geometry

    # Checkpoints.

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a ``state_dict()``; a resumed run then continues bit for bit.

        Raises ``ValueError`` for what does not fit whole (another approximation, model or optimizer, a layer missing,
        numbers that are not finite), and then changes nothing.
        """
        check_checkpoint(state_dict, self.param_groups)
        before, uses = {"state": self.state, "param_groups": self.param_groups}, self._engine.inventory.saved()
        precision = self._curvature.precision
        try:
            super().load_state_dict(state_dict)
            restore_dtypes(self.param_groups, self.state, state_dict)
            without_blanks(self.state)
            now = self._restored()
        except (ValueError, KeyError, TypeError, RuntimeError) as error:
            self.__setstate__(before)
            self._curvature = replace(self._curvature, precision=precision)
            self._engine.inventory.restore(uses)
            self._learn_layers()
            raise ValueError(str(error)) from error
        self._now, self._report, self._gauge = now, {}, Gauge.of(self._clock)
        if self._engine.labels is not None:
            self._engine.labels.capacity, self._engine.labels.scale = self._clock["capacity"], self._clock["scale"]
        for name, curvature in now.items():
            remember_layer(self._curvature.layers[name], curvature, self.state)
        self._arm()

    def _restored(self) -> State:
        """The curvature that the state holds."""
        self._engine.inventory.restore(self.param_groups[0].get("uses", {}))
        self._curvature = replace(
            self._curvature, precision=replace(self._curvature.precision, chosen=self.param_groups[0]["bfloat16"])
        )
        self._choose_geometry()
        self._learn_layers()
        states = {name: self._kept(layer) for name, layer in self._curvature.layers.items()}
        known = {name for name, state in states.items() if "observations" in state}
        if not known:
            return State()
        if known != states.keys():
            raise ValueError(f"the checkpoint lacks the curvature of {', '.join(sorted(states.keys() - known))}")
        for name, layer in self._curvature.layers.items():
            if "momentum" in states[name] and states[name]["momentum"].shape != layer.shape:
                found, wanted = tuple(states[name]["momentum"].shape), tuple(layer.shape)
                raise ValueError(f"layer {name!r}: the checkpoint has a block of {found}, and here it is {wanted}")
        return self._curvature.restored(states)

    def __getattr__(self, name: str) -> Any:
        if "_engine" not in vars(self):
            raise AttributeError(
                f"{name}: this is a copy of a NaturalGradient, which has no model; make a new one of the copied model, "
                "and give it the state_dict() of the old one"
            )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
