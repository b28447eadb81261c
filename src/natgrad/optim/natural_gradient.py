"""``NaturalGradient``: the optimizer that drops into an ordinary training loop."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from natgrad.engine import Engine, Record, Sharing
from natgrad.fishers import KFAC, Approximation, Weighted, for_layer
from natgrad.labels import Estimator, Labels
from natgrad.layers import WIDE, Coverage, Layer
from natgrad.likelihoods import Objective
from natgrad.optim.adamw import DEFAULTS, adamw_step
from natgrad.optim.cadence import Cadence
from natgrad.optim.clock import new_clock, remember
from natgrad.optim.coverage import coverage_table, covered_by, matrices_of
from natgrad.optim.curvature import LayerCurvature
from natgrad.optim.damping import Damping
from natgrad.optim.directions import Directions
from natgrad.optim.groups import build_groups
from natgrad.optim.layerwise import Layerwise, State, blocks, largest
from natgrad.optim.proposal import Proposal, move
from natgrad.optim.shampoo import shampoo_step
from natgrad.optim.step_size import Automatic, Constant, Decision, Situation, StepSize, read_once
from natgrad.optim.validate import as_damping, check_settings


class NaturalGradient(torch.optim.Optimizer):
    """theta <- theta - lr (alpha D + mu P), with D = (F + damping I)^-1 grad for a structured Fisher F (Amari 1998).

    P is the previous direction; alpha and mu are the business of ``step_size``. Layers that have an adapter follow the
    natural gradient, every other parameter AdamW; ``print(optimizer)`` says which is which, and why. The training loop
    is the usual one, the model's ``forward`` is observed by hooks. Memory beside the model: statistics, matrix and
    inverse of the approximation and one direction. Cost: what the approximation says, and ``docs/step-size.md``.

    Args:
        model: the module itself, not its parameters.
        approximation: the structure of F, for example ``EKFAC()``; default ``KFAC()``.
        likelihood: what the outputs mean; with it F is the true Fisher, without it the empirical one.
        estimator: ``"sampled"`` (default with a likelihood), ``"exact"`` or ``"empirical"`` (default without).
        draws: labels drawn per example by ``"sampled"``.
        lr: learning rate; default as the policy has it (1 where the policy sets the length of the step).
        step_size: the policy for alpha and mu; default ``Automatic()``, for ``FNGD`` ``Constant()``.
        damping: a constant in units of F, or a policy: ``LevenbergMarquardt`` (default), ``TraceDamping``.
        momentum: mu of the policies that do not choose it.
        nesterov: look ahead by one step of the momentum.
        weight_decay: decoupled; a step removes lr * weight_decay of a weight, so mind that lr may be 1.
        decay: weight of the old statistics in the moving averages.
        observe_every: steps between observations, default as it suits the approximation (4, or 1); the first steps
            observe more often.
        refresh_every: steps between new matrices, default as it suits the approximation (10; 20 for eigenbases); the
            first steps refresh more often.
        observe_fraction: the share of the batch, its first examples, that statistics are taken on.
        staggered: spread the refreshes of the layers over the period.
        weight_sharing: ``"expand"`` or ``"reduce"`` for weights used at several positions.
        exclude: names of modules left to AdamW.
        wide: sides of more inputs or outputs get a diagonal in place of a covariance, ``None`` for none; the token side
            of an embedding always. Where the approximation has no such form, KFAC stands in, as ``print`` says.
        shampoo: whether matrices that no adapter covers follow Shampoo at the length of AdamW's step, which needs no
            more than their gradient, and not AdamW, as all that is not a matrix does.
        groups: dicts with ``params`` and their own ``lr`` or ``weight_decay``; the rest forms a group of its own.
        adamw: settings of the AdamW rule: ``lr``, ``betas``, ``eps``, ``weight_decay``.
        precision: of the products with an inverse: ``"auto"`` (bfloat16 where the hardware has matrix units for it and
            the block is large) or a dtype.
        grad_scaler: the ``GradScaler`` in use; needed for the empirical estimator alone.
        seed: of the drawn labels.

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
        observe_every: int | None = None,
        refresh_every: int | None = None,
        observe_fraction: float = 1.0,
        staggered: bool = False,
        weight_sharing: Sharing = "expand",
        exclude: Iterable[str] = (),
        wide: int | None = WIDE,
        shampoo: bool = False,
        groups: Iterable[Mapping[str, Any]] = (),
        adamw: Mapping[str, Any] | None = None,
        precision: torch.dtype | str = "auto",
        grad_scaler: Any = None,
        seed: int = 0,
    ) -> None:
        approximation = KFAC() if approximation is None else approximation
        if step_size is None:
            step_size = Constant() if isinstance(approximation, Weighted) else Automatic()
        estimator = estimator or ("empirical" if likelihood is None else "sampled")
        if refresh_every is None:
            refresh_every = getattr(approximation, "refresh_every", 1)
        if observe_every is None:
            observe_every = getattr(approximation, "observe_every", 1)
        lr = step_size.lr if lr is None and isinstance(step_size, StepSize) else lr
        check_settings(locals())
        found = covered_by(model, approximation, exclude, wide)
        cadence = Cadence(observe_every, refresh_every, observe_fraction, staggered)
        self.step_size, self.damping = step_size, as_damping(damping)
        self._curvature = Layerwise(
            approximation, found.layers, cadence, decay, weight_sharing, precision, self.damping
        )
        for layer in found.layers.values():
            for_layer(approximation, layer.kind).check(layer.name, layer.shape)
        natural = {"lr": lr, "momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay}
        super().__init__(build_groups(model, found.layers, natural, adamw or {}, groups), natural)
        self.model, self.layers, self.uncovered = model, found.layers, found.uncovered
        self.param_groups[0]["clock"] = new_clock(self.damping.initial)
        self._matrices = matrices_of(model, found, wide) if shampoo else {}
        self._wide = wide
        self._adamw, self._scaler, self._seed = {**DEFAULTS, **(adamw or {})}, grad_scaler, seed
        self._now = State()
        self._multiples: dict[str, float] = {}
        self._report: dict[str, float] = {}
        labels = None if estimator == "empirical" or likelihood is None else Labels(likelihood, estimator, draws)
        self._engine = Engine(model, found.layers.values(), labels)
        self._engine.keep_inputs = step_size.needs_inputs
        self._engine.needs_ids = isinstance(approximation, Weighted) and approximation.needs_ids
        self._arm()

    # What a user reads.

    @property
    def steps(self) -> int:
        """The number of steps done, skipped ones included."""
        return self._clock["steps"]

    @property
    def observe_every(self) -> int:
        """Steps from one observation to the next."""
        return self._curvature.cadence.observe_every

    @property
    def refresh_every(self) -> int:
        """Steps from one refresh of the matrices to the next."""
        return self._curvature.cadence.refresh_every

    def statistics(self) -> dict[str, float]:
        """Numbers to log, of the last step and in total; reading them may wait for the device."""
        gradients = [p.grad for group in self._natural_groups() for p in group["params"] if p.grad is not None]
        kept = [self._kept(layer) for layer in self.layers.values()]
        directions = [state["momentum"] for state in kept if "momentum" in state]
        return {
            **{name: float(value) for name, value in self._clock.items() if name != "memory"},
            **self._clock["memory"],
            **self._report,
            "damping": self._damping,
            "gradient_norm": _norm(gradients),
            "direction_norm": _norm(directions),
            "retries": float(sum(c.retries for c in self._now.values())),
            "failures": float(sum(c.failures for c in self._now.values())),
            **self._now.numbers(),
        }

    def targets(self, targets: Any) -> None:
        """Tell the true labels of the coming forward pass, for a likelihood that ignores some of them or reads them."""
        if self._engine.labels is not None:
            self._engine.labels.targets = targets

    def examples(self, ids: Tensor) -> None:
        """Tell which examples (n,) the coming forward pass is on, by their numbers >= 0 in the data."""
        whole = isinstance(ids, Tensor) and ids.ndim == 1 and not (ids.is_floating_point() or ids.dtype == torch.bool)
        if not whole or (ids.device.type == "cpu" and (ids < 0).any()):  # elsewhere it would wait for the device
            raise ValueError("ids must be a tensor (n,) of whole numbers >= 0, one per example")
        self._engine.ids = ids.to(next(self.model.parameters()).device)

    def __repr__(self) -> str:
        found, unread = Coverage(self.layers, self.uncovered), self._engine.unread
        return coverage_table(self.model, found, self._curvature.approximation, self._matrices, self._now, unread)

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
        Raises ``FactorisationError`` when a layer's refresh fails for the third time in a row.
        """
        loss = self._evaluate(closure)
        for p in self.model.parameters():
            if p.grad is not None and p.grad.is_sparse:
                p.grad = p.grad.to_dense()
        proposal = self._propose(self._engine.take())
        if proposal is None:
            self._clock["skipped"] += 1
            warnings.warn(f"step {self.steps} skipped: a gradient, an input or an output is not finite", stacklevel=2)
        else:
            self._apply(proposal)
        self._clock["steps"] += 1
        self._arm()
        return loss

    def _evaluate(self, closure: Callable[[], Any] | None) -> Any:
        if closure is None:
            return None
        try:
            with torch.enable_grad():
                return closure()
        except BaseException:
            self._engine.discard()
            self._arm()
            raise

    def _propose(self, records: list[Record]) -> Proposal | None:
        self._rescale(records)
        curvature = self._advance(records)
        names = [name for name, c in curvature.items() if c.refreshed and _has_gradient(self.layers[name])]
        if self._multiples and type(self.step_size) is Constant:
            return self._plain(curvature, names)
        directions, lr = self._directions({name: self.layers[name] for name in names}, curvature, records)
        sizes = {"rest": self._rest(names), "observed": self._curvature.size(self._now, curvature)}
        products = {name: size for name, size in sizes.items() if size is not None}
        if names and not records and self.step_size.needs_samples(self._clock["memory"]):
            raise RuntimeError(
                f"{type(self.step_size).__name__} reads samples at every step, but no forward pass of the model in "
                "training mode led to these gradients; call model.train() before it, or use KLLimit() as step_size"
            )
        if names:
            products |= {"slope": directions.slope(), "drift": directions.drift()}
            products |= self.step_size.products(directions, self._damping, self._clock["memory"])
        read = read_once(products)
        if not all(math.isfinite(value) for value in read.values()):
            return None
        momentum = next((group["momentum"] for group in self._natural_groups()), 0.0)
        capacity = 1.0 if self._engine.labels is None else self._engine.labels.capacity
        situation = Situation(read, lr, momentum, self._clock["memory"], capacity)
        idle = Decision(0.0, 0.0, memory=self.step_size.idle(self._clock["memory"]))
        decision = self.step_size.decide(situation) if names else idle
        moves = {name: self.layers[name].unpack(D) for name, D in directions.D.items()}
        return Proposal(curvature, moves, dict.fromkeys(names, 1.0), decision, read.get("drift", 0.0), lr)

    def _plain(self, curvature: State, names: list[str]) -> Proposal | None:
        """A step along multiples of the gradients at the cost of SGD: no blocks, no inner products, one number read."""
        if not math.isfinite(_norm([p.grad for p in self.model.parameters() if p.grad is not None])):
            return None
        shares, lr = self._rates(names)
        moves = {name: [p.grad for p in self.layers[name].parameters] for name in names}
        momentum = next((group["momentum"] for group in self._natural_groups()), 0.0)
        factors = {name: self._multiples[name] * share for name, share in shares.items()}
        return Proposal(curvature, moves, factors, Decision(1.0, momentum), 0.0, lr)

    def _advance(self, records: list[Record]) -> State:
        started = time.perf_counter()
        state = self._now or self._curvature.empty()
        advanced = self._curvature.advance(state, records, self.steps, self._damping)
        if any(advanced[name].refreshes > state[name].refreshes for name in state):
            self._report["refresh_seconds"] = time.perf_counter() - started
        return advanced

    def _directions(
        self, layers: dict[str, Layer], curvature: State, records: list[Record]
    ) -> tuple[Directions, float]:
        """The directions of the step, and the learning rate that they all share."""
        M = blocks(layers)
        D = self._curvature.precondition(curvature, M)
        kept = {name: self._kept(layer).get("momentum") for name, layer in layers.items()}
        P = {name: torch.zeros_like(M[name]) if block is None else block for name, block in kept.items()}
        precision, labels = self._curvature.precision, self._engine.labels
        directions = Directions(layers, M, D, P, records, precision, self.model, labels, curvature.joint is not None)
        if layers:
            directions = self.step_size.prepare(directions, self._damping, self._clock["memory"])
        shares, lr = self._rates(layers)
        every = list(shares.values())
        return (directions if all(share == 1.0 for share in every) else directions.scaled(every)), lr

    def _rates(self, names: Iterable[str]) -> tuple[dict[str, float], float]:
        """The largest learning rate of the groups, and what share of it every layer has."""
        rates = {key: group["lr"] for key, group in self._settings().items()}
        lr = max(rates.values(), default=0.0)
        return {name: rates[id(self.layers[name].parameters[0])] / lr if lr else 1.0 for name in names}, lr

    def _apply(self, proposal: Proposal) -> None:
        self._report |= remember(self._clock, self.damping, proposal.decision, proposal.drift, proposal.lr)
        if proposal.curvature is not self._now:
            for name, curvature in proposal.curvature.items():
                self._remember(self.layers[name], curvature)
        self._now = proposal.curvature
        move(proposal, self.layers, self.state, self._settings())
        for group in self.param_groups:
            if group["rule"] == "adamw":
                matrices = {id(p) for p in self._matrices.values()}
                adamw_step([p for p in group["params"] if id(p) not in matrices], self.state, group)
                shampoo_step([p for p in group["params"] if id(p) in matrices], self.state, group, self._wide)
        rates = {key: group["lr"] for key, group in self._settings().items()}
        moved = {id(p) for name in proposal.moves for p in self.layers[name].parameters}
        unseen = [p for group in self._natural_groups() for p in group["params"] if id(p) not in moved]
        adamw_step([p for p in unseen if rates[id(p)]], self.state, self._adamw)

    def _remember(self, layer: Layer, curvature: LayerCurvature) -> None:
        """Every parameter gets an entry, and every layer all of its names: distributed checkpoints ask for both."""
        weight, *others = layer.parameters
        for p in others:
            self.state.setdefault(p, {})
        self.state[weight].update({f"{layer.slot}{name}": value for name, value in curvature.state().items()})
        if f"{layer.slot}momentum" not in self.state[weight]:
            zeros = torch.zeros(layer.shape, dtype=weight.dtype, device=weight.device)
            self.state[weight][f"{layer.slot}momentum"] = zeros

    # Helpers.

    @property
    def _damping(self) -> float:
        """lambda in the units of the loss, which may be a multiple of the negative log-likelihood."""
        scaled = self._engine.labels is not None and self.damping.of_likelihood
        return self._clock["damping"] * (self._engine.labels.scale if scaled and self._engine.labels else 1.0)

    @property
    def _clock(self) -> dict[str, Any]:
        return self.param_groups[0]["clock"]

    def _natural_groups(self) -> list[dict[str, Any]]:
        return [group for group in self.param_groups if group["rule"] == "natural"]

    def _settings(self) -> dict[int, dict[str, Any]]:
        """The natural group of every covered parameter, by the parameter's id."""
        return {id(p): group for group in self._natural_groups() for p in group["params"]}

    def _kept(self, layer: Layer) -> dict[str, Any]:
        """What the state holds of a layer."""
        state = self.state[layer.parameters[0]]
        return {name.removeprefix(layer.slot): value for name, value in state.items() if name.startswith(layer.slot)}

    def _rest(self, names: list[str]) -> Tensor | None:
        """A number that is finite if all gradients are that no inner product covers."""
        covered = {id(p) for name in names for p in self.layers[name].parameters}
        rest = [p.grad for p in self.model.parameters() if p.grad is not None and id(p) not in covered]
        return largest(rest)

    def _rescale(self, records: list[Record]) -> None:
        """Without a likelihood: gradients of the user's mean loss as those of the sum over all examples of the step."""
        if self._engine.labels is None:
            scale = sum(record.examples() for record in records)
            for record in records:
                record.scale = scale / (self._scaler.get_scale() if self._scaler is not None else 1.0)

    def _arm(self) -> None:
        """Record the coming step's forward passes if they are needed, with labels that depend on its number alone."""
        self._engine.armed = self.step_size.needs_samples(self._clock["memory"])
        self._engine.armed |= self._curvature.observes(self.steps)
        self._engine.begin(self.steps)
        if not self._multiples:
            self._multiples = self._curvature.multiples(self._now, self.steps)
            self._engine.weigh(self._curvature.weights(self._now, self.steps))
        if self._engine.labels is not None:
            self._engine.labels.reseed(self._seed * 1_000_003 + self.steps)

    # Checkpoints.

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a ``state_dict()``; a resumed run then continues bit for bit."""
        super().load_state_dict(state_dict)
        self._restore_dtypes(state_dict)
        self._now, self._report, self._multiples = State(), {}, {}
        states = {name: self._kept(layer) for name, layer in self.layers.items()}
        if all("observations" in state for state in states.values()):
            self._now = self._curvature.restored(states)
        self._arm()

    def _restore_dtypes(self, state_dict: dict[str, Any]) -> None:
        """Undo torch's cast of all state to the dtype of the parameter: statistics of bfloat16 layers are float32."""
        keys = (key for group in state_dict["param_groups"] for key in group["params"])
        for key, p in zip(keys, (p for group in self.param_groups for p in group["params"]), strict=True):
            for name, value in state_dict["state"].get(key, {}).items():
                if isinstance(value, Tensor) and value.dtype != self.state[p][name].dtype:
                    self.state[p][name] = value.to(p.device)


def _has_gradient(layer: Layer) -> bool:
    return layer.parameters[0].grad is not None


def _norm(tensors: list[Tensor]) -> float:
    wide = torch.promote_types(tensors[0].dtype, torch.float32) if tensors else torch.float32
    return float(torch.stack(torch._foreach_norm(tensors, 2, wide)).norm()) if tensors else 0.0
