"""The optimizers that race: how each is built, its defaults and the small space it is tuned over."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import natgrad
import natgrad.fngd as fngd_package
from natgrad.matrix import Tikhonov
from natgrad.race.muon import muon
from natgrad.race.tasks import Task

if TYPE_CHECKING:
    from optuna import Trial

Settings = Mapping[str, Any]
# `schedule` is taken by the runner, for every entry alike; all other settings reach the optimizer.
SCHEDULES = ("constant", "cosine", "warmup-cosine")
DECAYS = (0.0, 1e-2, 1e-1)


@dataclass(frozen=True)
class Entry:
    """A racer: `build(model, task, settings)` makes its optimizer, `space(trial)` draws settings.

    `variants` are settings with a name. One that `learns` in its first epoch is told the steps of it, `first_phase`.
    """

    name: str
    build: Callable[[nn.Module, Task, Settings], Any]
    space: Callable[[Trial], dict[str, Any]]
    defaults: Settings = field(default_factory=dict)
    natural: bool = False
    variants: Mapping[str, Settings] = field(default_factory=dict)
    learns: bool = False

    def start(self, model: nn.Module, task: Task, settings: Settings, steps: int) -> Any:
        """Its optimizer, for epochs of so many steps."""
        own = {key: value for key, value in settings.items() if key != "schedule"}
        return self.build(model, task, {"first_phase": steps, **own} if self.learns else own)

    @property
    def base(self) -> str:
        """The name without a step-size policy."""
        return self.name.partition("[")[0]


def sgd(model: nn.Module, task: Task, settings: Settings) -> torch.optim.Optimizer:
    """Stochastic gradient descent with momentum."""
    return torch.optim.SGD(model.parameters(), **settings)


def adamw(model: nn.Module, task: Task, settings: Settings) -> torch.optim.Optimizer:
    """Torch's AdamW (Loshchilov & Hutter 2019)."""
    beta1, beta2, rest = _betas(settings)
    return torch.optim.AdamW(model.parameters(), betas=(beta1, beta2), **rest)


def soap(model: nn.Module, task: Task, settings: Settings) -> Any:
    """SOAP (Vyas et al. 2024) of heavyball, on whole matrices and uncompiled."""
    import heavyball
    import heavyball.utils

    heavyball.utils.compile_mode = None
    beta1, beta2, rest = _betas(settings)
    whole = {"max_precond_dim": 2048, "merge_dims": False, "use_precond_schedule": False}
    return heavyball.SOAP(model.parameters(), betas=(beta1, beta2), shampoo_beta=beta2, **whole, **rest)


def shampoo(model: nn.Module, task: Task, settings: Settings) -> Any:
    """Scalable Shampoo (Anil et al. 2020) of pytorch_optimizer, on whole matrices.

    Roots come from its SVD, several times as fast as its Schur-Newton iteration on a CPU. That path adds no
    ridge: `matrix_eps`, where the statistics start, has to stand in for one. Step lengths are those of the sign.
    """
    from pytorch_optimizer import ScalableShampoo
    from pytorch_optimizer.optimizer.utils.graft import LayerWiseGrafting

    beta1, beta2, rest = _betas(settings)
    whole = {"block_size": 1024, "shape_interpretation": False, "use_svd": True}
    averaged = {"graft_type": LayerWiseGrafting.SQRTN, "moving_average_for_momentum": True}
    return ScalableShampoo(model.parameters(), betas=(beta1, beta2), **whole, **averaged, **rest)


def _betas(settings: Settings) -> tuple[float, float, dict[str, Any]]:
    rest = dict(settings)
    return rest.pop("beta1"), rest.pop("beta2"), rest


POLICIES: dict[str, Callable[[], Any]] = {
    "kl": lambda: natgrad.KLLimit(),
    "quadratic": lambda: natgrad.QuadraticModel(),
    "model": lambda: natgrad.Automatic(look=1, agreement=0.0, patience=50, decay=0.95),  # from the start, while trusted
    "common": lambda: natgrad.Automatic(precise=natgrad.QuadraticModel(per_layer=False)),
    "constant": lambda: natgrad.Constant(),
}


def natural(approximation: Callable[[], Any], **own: Any) -> Callable[[nn.Module, Task, Settings], Any]:
    """Natural gradient with one approximation; `step_size` may be a name of `POLICIES`, or "default".

    `own` are settings that suit the approximation better than the defaults of the library.
    """

    def build(model: nn.Module, task: Task, settings: Settings) -> Any:
        rest = _with_policy({**own, **settings})
        return natgrad.NaturalGradient(model, approximation(), likelihood=task.likelihood(), **rest)

    return build


def fngd(model: nn.Module, task: Task, settings: Settings) -> Any:
    """FNGD, which takes the gradients of the loss itself; `coefficients` is a name of `LOOK_UPS`."""
    rest = dict(settings)
    look_up = LOOK_UPS[rest.pop("coefficients", "position_mean")]()
    return natgrad.FNGD(model, coefficients=look_up, **rest)


LOOK_UPS: dict[str, Callable[[], Any]] = {
    "position_mean": fngd_package.PositionMean,
    "sample": fngd_package.Sample,
    "iteration": fngd_package.Iteration,
    "quantile": fngd_package.Quantile,
    "scalar": fngd_package.Scalar,
    "recompute": fngd_package.Recompute,
}


def _with_policy(settings: Settings) -> dict[str, Any]:
    rest = dict(settings)
    policy = rest.pop("step_size", "default")
    if policy != "default":
        rest["step_size"] = POLICIES[policy]() if isinstance(policy, str) else policy
    return rest


def _sgd_space(trial: Trial) -> dict[str, Any]:
    return {
        "lr": trial.suggest_float("lr", 1e-4, 1.0, log=True),
        "momentum": trial.suggest_categorical("momentum", [0.9, 0.95, 0.99]),
        "nesterov": trial.suggest_categorical("nesterov", [False, True]),
        "schedule": trial.suggest_categorical("schedule", SCHEDULES),
    }


def _adam_space(trial: Trial, low: float = 1e-4, high: float = 1e-2) -> dict[str, Any]:
    return {
        "lr": trial.suggest_float("lr", low, high, log=True),
        "beta1": trial.suggest_categorical("beta1", [0.9, 0.95]),
        "beta2": trial.suggest_categorical("beta2", [0.95, 0.99, 0.999]),
        "weight_decay": trial.suggest_categorical("weight_decay", DECAYS),
        "schedule": trial.suggest_categorical("schedule", SCHEDULES),
    }


def _muon_space(trial: Trial) -> dict[str, Any]:
    return {
        **_muon_rates(trial),
        "momentum": trial.suggest_categorical("momentum", [0.9, 0.95]),
        "weight_decay": trial.suggest_categorical("weight_decay", DECAYS),
        "ends": trial.suggest_categorical("ends", [False, True]),
        "schedule": trial.suggest_categorical("schedule", SCHEDULES),
    }


def _muon_rates(trial: Trial) -> dict[str, Any]:
    """Two rates under Muon's first rule of length; under the one that matches AdamW's steps, one for both."""
    rule = trial.suggest_categorical("adjust_lr_fn", ["original", "match_rms_adamw"])
    if rule == "match_rms_adamw":
        lr = trial.suggest_float("lr_of_both", 3e-4, 3e-2, log=True)
        return {"lr": lr, "adam_lr": lr, "adjust_lr_fn": rule}
    return {
        "lr": trial.suggest_float("lr", 1e-3, 1e-1, log=True),
        "adam_lr": trial.suggest_float("adam_lr", 1e-4, 1e-2, log=True),
        "adjust_lr_fn": rule,
    }


def _basis_space(trial: Trial) -> dict[str, Any]:
    return {**_adam_space(trial, 3e-4, 3e-2), "precondition_frequency": 10}


def _shampoo_space(trial: Trial) -> dict[str, Any]:
    return {
        "lr": trial.suggest_float("lr", 3e-4, 2e-2, log=True),
        "beta1": trial.suggest_categorical("beta1", [0.9, 0.95]),
        "beta2": trial.suggest_categorical("beta2", [0.95, 0.99, 0.999]),
        "weight_decay": trial.suggest_categorical("weight_decay", [0.0, 1e-4, 1e-2]),
        "matrix_eps": trial.suggest_categorical("matrix_eps", [1e-4, 1e-3, 1e-2, 1e-1]),
        "schedule": trial.suggest_categorical("schedule", SCHEDULES),
        **SHAMPOO_CADENCE,
    }


def _natural_space(trial: Trial) -> dict[str, Any]:
    return {
        "lr": trial.suggest_float("lr", 2e-3, 2e-1, log=True),
        "weight_decay": trial.suggest_categorical("weight_decay", DECAYS),
        "schedule": trial.suggest_categorical("schedule", SCHEDULES),
    }


def _limited_space(trial: Trial) -> dict[str, Any]:
    """Under a KL limit."""
    return {
        "lr": trial.suggest_float("lr", 1e-2, 1.0, log=True),
        "damping": trial.suggest_float("damping", 1e-3, 1e2, log=True),
        "schedule": trial.suggest_categorical("schedule", SCHEDULES),
    }


def _fngd_space(trial: Trial) -> dict[str, Any]:
    return {
        "lr": trial.suggest_float("lr", 1e-4, 1.0, log=True),
        "momentum": trial.suggest_categorical("momentum", [0.9, 0.95, 0.99]),
        "mu": trial.suggest_float("mu", 1e-2, 1e2, log=True),
        "schedule": trial.suggest_categorical("schedule", SCHEDULES),
    }


SHAMPOO_CADENCE = {"preconditioning_compute_steps": 10, "start_preconditioning_step": 10}
ADAM = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "weight_decay": 0.0}
MUON = {"lr": 0.02, "momentum": 0.95, "weight_decay": 0.0, "adam_lr": 1e-3, "ends": False}
SOAP = {"lr": 1e-2, "beta1": 0.95, "beta2": 0.95, "weight_decay": 0.0, "precondition_frequency": 10}
SHAMPOO = {"lr": 4e-3, "beta1": 0.9, "beta2": 0.99, "weight_decay": 0.0, "matrix_eps": 1e-2, **SHAMPOO_CADENCE}
FNGD = {"lr": 0.01, "momentum": 0.9, "mu": 1.0}
FNGD_VARIANTS = {rule: {"coefficients": rule} for rule in ("scalar", "sample", "quantile", "recompute")}

TWO_LEVEL: dict[str, Callable[[], Any]] = {
    "two-level": lambda: natgrad.TwoLevel(),
    "two-level-nicolaides": lambda: natgrad.TwoLevel(form="residual"),
    "two-level-spectral": lambda: natgrad.TwoLevel(space=natgrad.SpectralSpace(), form="residual"),
    "two-level-residual": lambda: natgrad.TwoLevel(space=natgrad.ResidualSpace(), form="residual"),
    "two-level-krylov-nicolaides": lambda: natgrad.TwoLevel(space=natgrad.KrylovNicolaides(), form="residual"),
    "two-level-krylov-residual": lambda: natgrad.TwoLevel(space=natgrad.KrylovResidual(), form="residual"),
    "two-level-tselepidis": lambda: natgrad.TwoLevel(natgrad.KFAC(Tikhonov()), natgrad.Tselepidis()),
}

ENTRIES = {
    entry.name: entry
    for entry in (
        Entry("sgd", sgd, _sgd_space, {"lr": 0.01, "momentum": 0.9}),
        Entry("adamw", adamw, _adam_space, ADAM),
        Entry("muon", muon, _muon_space, MUON),
        Entry("soap", soap, _basis_space, SOAP),
        Entry("shampoo", shampoo, _shampoo_space, SHAMPOO),
        Entry("kfac", natural(lambda: natgrad.KFAC()), _natural_space, natural=True),
        Entry("ekfac", natural(lambda: natgrad.EKFAC()), _natural_space, natural=True),
        Entry("tkfac", natural(lambda: natgrad.TKFAC()), _natural_space, natural=True),
        Entry("tekfac", natural(lambda: natgrad.TEKFAC()), _natural_space, natural=True),
        Entry("woodbury", natural(lambda: natgrad.Woodbury(), step_size="kl"), _limited_space, natural=True),
        Entry("woodbury-joint", natural(lambda: natgrad.JointWoodbury(), step_size="kl"), _limited_space, natural=True),
        Entry("tengrad", natural(lambda: natgrad.TENGraD(), step_size="kl"), _limited_space, natural=True),
        Entry("sngd", natural(lambda: natgrad.SNGD()), _natural_space, natural=True),
        Entry("foof", natural(lambda: natgrad.FOOF()), _natural_space, natural=True),
        Entry("ngplus", natural(lambda: natgrad.NGPlus()), _natural_space, natural=True),
        Entry("kfac-tridiagonal", natural(lambda: natgrad.BlockTridiagonal()), _natural_space, natural=True),
        *(Entry(name, natural(make), _natural_space, natural=True) for name, make in TWO_LEVEL.items()),
        Entry("kpsvd", natural(lambda: natgrad.KPSVD()), _natural_space, natural=True),
        Entry("deflated", natural(lambda: natgrad.Deflated()), _natural_space, natural=True),
        Entry("lanczos", natural(lambda: natgrad.Lanczos()), _natural_space, natural=True),
        Entry("kfac-corrected", natural(lambda: natgrad.CorrectedKFAC()), _natural_space, natural=True),
        Entry("diagonal", natural(lambda: natgrad.Diagonal()), _natural_space, natural=True),
        Entry("fngd", fngd, _fngd_space, FNGD, variants=FNGD_VARIANTS, learns=True),
    )
}


def find(name: str) -> Entry:
    """Find the entry called `name`; "kfac[kl]" is the entry kfac with the step-size policy kl."""
    base, _, policy = name.removesuffix("]").partition("[")
    if base not in ENTRIES:
        raise ValueError(f"no entry {name!r}: there are {', '.join(ENTRIES)}")
    if not policy:
        return ENTRIES[base]
    chosen = ENTRIES[base]
    if policy in chosen.variants:
        return replace(chosen, name=name, defaults={**chosen.defaults, **chosen.variants[policy]})
    known = [*(POLICIES if chosen.natural else ()), *chosen.variants]
    if policy not in known:
        raise ValueError(f"no {policy!r} of {base}: there are {', '.join(known) or 'no variants of it'}")
    return replace(chosen, name=name, defaults={**chosen.defaults, "step_size": policy})


def with_policies(name: str, policies: Sequence[str]) -> list[Entry]:
    """The entry under each step-size policy, "default" being its own; first-order entries have one."""
    if not find(name).natural:
        return [find(name)]
    return [find(name if policy == "default" else f"{name}[{policy}]") for policy in policies]
