"""A step, a checkpoint, a copy: whole, or refused as a whole. What happened in other people's programs."""

from __future__ import annotations

import copy
import io
import math
import pickle
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from loop import OwnNorm, backward, batch, everything, mlp, optimizer_of, same, train, transposed, values
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils._python_dispatch import TorchDispatchMode

from natgrad import EKFAC, FNGD, KFAC, Categorical, JointWoodbury, KLLimit, NaturalGradient
from oracles import assert_equal

# More than one process.


@pytest.mark.parametrize("settings", [{}, {"adamw": False}, {"step_size": KLLimit()}])
def test_a_run_of_several_processes_is_refused(settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = mlp()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda *args: 2)
    with pytest.raises(RuntimeError, match="one process, and here are 2"):
        NaturalGradient(model, likelihood=Categorical(), **settings)
    assert not model._forward_hooks and "_compiled_call_impl" not in vars(model)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda *args: 1)
    train(model, NaturalGradient(model, likelihood=Categorical(), **settings), range(2))


def test_fngd_is_refused_in_a_run_of_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mlp()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda *args: 2)
    with pytest.raises(RuntimeError, match="one process, and here are 2"):
        FNGD(model, 3)
    assert "_compiled_call_impl" not in vars(model)


def _construct(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2)
    model = nn.Linear(2, 2)
    replica = nn.parallel.DistributedDataParallel(model)
    refused = 0
    for given in (model, replica):
        try:
            NaturalGradient(given)
        except RuntimeError as error:
            refused += "one process" in str(error)
    Path(folder, f"rank{rank}").write_text(str(refused))
    torch.distributed.destroy_process_group()


def test_two_processes_that_meet_are_refused(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_construct, (str(tmp_path),), nprocs=2)
    assert [(tmp_path / f"rank{rank}").read_text() for rank in range(2)] == ["2", "2"]


# A checkpoint that does not fit.


def of_adam(saved: Any) -> Any:
    model = mlp()
    adam = torch.optim.Adam(model.parameters())
    train(model, adam, range(2))
    return adam.state_dict()


def of_shapes(saved: Any) -> Any:
    model = mlp(7)
    optimizer = optimizer_of(model)
    train(model, optimizer, range(3))
    return optimizer.state_dict()


def of_layers_of_other_shapes(saved: Any) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 7), nn.Linear(7, 5), OwnNorm(5), nn.Linear(5, 3))
    optimizer = optimizer_of(model)
    train(model, optimizer, range(3))
    found = optimizer.state_dict()
    kept = {0: found["state"][0], 1: {}, 2: saved["state"][2], 3: saved["state"][3], 4: found["state"][6], 5: {}}
    return {**saved, "state": kept}


def of_approximation(saved: Any) -> Any:
    model = mlp()
    optimizer = optimizer_of(model, EKFAC())
    train(model, optimizer, range(3))
    return optimizer.state_dict()


def of_other_layers(saved: Any) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 5), nn.LayerNorm(5), nn.Linear(5, 3))
    optimizer = optimizer_of(model)
    train(model, optimizer, range(3))
    return optimizer.state_dict()


def without_a_layer(saved: Any) -> Any:
    last = max(saved["state"])
    for key in (last - 1, last):
        saved["state"][key] = {}
    return saved


def without_an_entry(saved: Any) -> Any:
    del saved["state"][0]["inverse.left"]
    return saved


def with_nan(name: str) -> Callable[[Any], Any]:
    def change(saved: Any) -> Any:
        for own in saved["state"].values():
            for key in own:
                if key.startswith(name):
                    own[key].fill_(math.nan)
        return saved

    return change


def with_infinite_momentum(saved: Any) -> Any:
    saved["state"][0]["momentum"].fill_(math.inf)
    return saved


def of_two_groups(saved: Any) -> Any:
    model = mlp()
    optimizer = optimizer_of(model, groups=[{"params": [model[0].weight, model[0].bias], "lr": 0.1}])
    train(model, optimizer, range(3))
    return optimizer.state_dict()


def without_clock(saved: Any) -> Any:
    del saved["param_groups"][0]["clock"]
    return saved


def with_a_swapped_statistic(saved: Any) -> Any:
    saved["state"][0]["stats.A"] = torch.eye(9)
    return saved


MISFITS: dict[str, Callable[[Any], Any]] = {
    "Adam": of_adam,
    "shapes": of_shapes,
    "shapes of layers": of_layers_of_other_shapes,
    "approximation": of_approximation,
    "other layers": of_other_layers,
    "layer missing": without_a_layer,
    "entry missing": without_an_entry,
    "nan in statistics": with_nan("stats"),
    "nan in an inverse": with_nan("inverse"),
    "nan in AdamW's": with_nan("exp_avg"),
    "infinite momentum": with_infinite_momentum,
    "groups": of_two_groups,
    "no clock": without_clock,
    "another shape": with_a_swapped_statistic,
    "a list": lambda saved: [saved],
    "none": lambda saved: None,
    "empty": lambda saved: {},
    "a model's": lambda saved: mlp().state_dict(),
}


@pytest.mark.parametrize("trained", [0, 3])
@pytest.mark.parametrize("misfit", MISFITS)
def test_a_checkpoint_that_does_not_fit_is_refused_and_changes_nothing(misfit: str, trained: int) -> None:
    source = mlp()
    other = optimizer_of(source)
    train(source, other, range(3))
    saved = MISFITS[misfit](copy.deepcopy(other.state_dict()))
    (model, optimizer), (twin, plain) = ((m, optimizer_of(m)) for m in (mlp(), mlp()))
    for m, o in ((model, optimizer), (twin, plain)):
        train(m, o, range(10, 10 + trained))
    before = everything(model, optimizer)
    with pytest.raises(ValueError):
        optimizer.load_state_dict(saved)
    assert same(everything(model, optimizer), before)
    for m, o in ((model, optimizer), (twin, plain)):
        train(m, o, range(20, 23))
    assert same(everything(model, optimizer), everything(twin, plain))


# A step is whole.


class Failing(TorchDispatchMode):
    """The allocation number ``at`` fails, as it does where there is no memory left."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.left, self.failed = at, False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        schema = func._schema
        if not schema.is_mutable and not any(result.alias_info is not None for result in schema.returns):
            self.left -= 1
            if self.left == 0:
                self.failed = True
                raise RuntimeError("out of memory")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("approximation", [KFAC(), EKFAC(), JointWoodbury()], ids=repr)
@pytest.mark.parametrize(("make", "shape"), [(mlp, (4,)), (transposed, (4, 2, 2))], ids=["mlp", "transposed"])
def test_a_step_in_which_an_allocation_fails_is_whole(make: Any, shape: tuple[int, ...], approximation: Any) -> None:
    model = make()
    optimizer = optimizer_of(model, approximation)
    train(model, optimizer, range(2), shape)
    saved, weights = copy.deepcopy(optimizer.state_dict()), values(model)

    def reset() -> tuple[nn.Module, NaturalGradient]:
        model = make()
        with torch.no_grad():
            for p, value in zip(model.parameters(), weights, strict=True):
                p.copy_(value)
        optimizer = optimizer_of(model, approximation)
        optimizer.load_state_dict(copy.deepcopy(saved))
        return model, optimizer

    model, optimizer = reset()
    train(model, optimizer, [5], shape)
    after = values(model), copy.deepcopy(optimizer.state_dict()["state"])
    model, optimizer = reset()
    before = values(model), copy.deepcopy(optimizer.state_dict()["state"])
    k, passed, torn = 0, False, []
    while not passed:
        k += 1
        backward(model, optimizer, batch(5, shape))  # again, where the last one left all as it was
        failing = Failing(k)
        with failing, suppress(RuntimeError):
            optimizer.step()
        passed = not failing.failed
        now = values(model), optimizer.state_dict()["state"]
        undone = same(now, before)
        if not (undone or same(now, after)):
            torn.append(k)
        if k % 7 == 0:
            backward(model, optimizer, batch(6, shape))
            optimizer.step()
            assert all(bool(p.isfinite().all()) for p in model.parameters())
        if not undone or k % 7 == 0:
            model, optimizer = reset()
    assert not torn and k > 20


# Ctrl-C.


class Stop:
    """Raises at one call of a module or of a hook."""

    def __init__(self) -> None:
        self.on = False

    def __call__(self, *args: Any) -> None:
        if self.on:
            self.on = False
            raise KeyboardInterrupt


def _hooks(model: nn.Module) -> list[int]:
    tables = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [len(getattr(m, name)) for m in model.modules() for name in tables]


@pytest.mark.parametrize("settings", [{}, {"likelihood": None}, {"estimator": "exact"}], ids=["drawn", "own", "exact"])
@pytest.mark.parametrize(
    "place", ["forward", "last layer", "module's backward", "tensor's backward", "step", "closure"]
)
def test_a_run_goes_on_after_an_interrupt_as_if_the_pass_had_not_been(
    place: str, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.overrides import _get_current_function_mode_stack

    trained = []
    for interrupted in (True, False):
        model, stop = mlp(), Stop()
        if place == "forward":
            model[1].register_forward_hook(lambda module, args, y, stop=stop: stop())
        if place == "last layer":
            model[3].register_forward_hook(lambda module, args, y, stop=stop: stop())
        if place == "module's backward":
            model[1].register_full_backward_hook(lambda module, inputs, outputs, stop=stop: stop())
        if place == "tensor's backward":
            model[1].register_forward_hook(
                lambda module, args, y, stop=stop: y.register_hook(lambda g: stop()) and None
            )
        optimizer = optimizer_of(model, **settings)
        train(model, optimizer, range(2))
        hooks = _hooks(model)
        if interrupted:
            with pytest.raises(KeyboardInterrupt):  # noqa: PT012
                if place == "step":
                    with monkeypatch.context() as patched:
                        patched.setattr(torch.Tensor, "add_", _interrupt)
                        train(model, optimizer, [9])
                elif place == "closure":

                    def closure() -> Any:
                        backward(model, optimizer, batch(9))  # noqa: B023
                        raise KeyboardInterrupt

                    optimizer.step(closure)
                else:
                    stop.on = True
                    train(model, optimizer, [9])
            assert not _get_current_function_mode_stack() and _hooks(model) == hooks
            x, _ = batch(3)
            optimizer.zero_grad()
            assert torch.equal(model(x), copy.deepcopy(model)(x))
        train(model, optimizer, range(2, 6))
        trained.append((values(model), optimizer.state_dict()["state"]))
    assert same(*trained)


def _on_the_way_back(y: Tensor, stop: Stop) -> None:
    y.register_hook(lambda g: stop())


def _interrupt(*args: Any, **kwargs: Any) -> Any:
    raise KeyboardInterrupt


class Interrupting(TorchDispatchMode):
    """Ctrl-C is pressed at the operation number ``at``, whatever it is."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.left = at

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.left -= 1
        if self.left == 0:
            signal.raise_signal(signal.SIGINT)
        return func(*args, **(kwargs or {}))


MADE: dict[str, Any] = {
    "KFAC": optimizer_of,
    "EKFAC": lambda model: optimizer_of(model, EKFAC()),
    "FNGD": lambda model: FNGD(model, first_phase=20),
}


@pytest.mark.parametrize("made", MADE.values(), ids=MADE.keys())
def test_a_step_in_which_ctrl_c_is_pressed_is_whole(made: Any) -> None:
    model = mlp()
    optimizer = made(model)
    train(model, optimizer, range(2))
    for k in range(1, 2000):
        backward(model, optimizer, batch(k))
        clone = mlp()
        clone.load_state_dict(model.state_dict())
        plain = made(clone)
        plain.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        backward(clone, plain, batch(k))
        before = values(model), copy.deepcopy(optimizer.state_dict())
        plain.step()
        interrupting = Interrupting(k)
        with interrupting, suppress(KeyboardInterrupt):
            optimizer.step()
        now, after = (values(model), optimizer.state_dict()), (values(clone), plain.state_dict())
        assert same(now, before) or same(now, after), k
        if interrupting.left > 0:
            break
    assert k > 20


# Parameters of other kinds, and other parameters.


class Fourier(nn.Module):
    """A spectral convolution, as in a Fourier neural operator, between two linear layers."""

    def __init__(self, scale: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(1, 4), nn.Linear(4, 3)
        self.modes = nn.Parameter(torch.randn(4, 4, 3, dtype=torch.complex128) / 4)
        self.scale = nn.Parameter(torch.ones(4, dtype=torch.complex128)) if scale else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x.unsqueeze(-1)).mT
        spectrum = torch.einsum("ncm,com->nom", torch.fft.rfft(h)[..., :3], self.modes)
        if self.scale is not None:
            spectrum = spectrum * self.scale[:, None]
        return self.last((h + torch.fft.irfft(spectrum, n=h.shape[-1])).mT.tanh()).mean(1)


class Rotation(nn.Module):
    """A linear layer of complex numbers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.turn, self.last = nn.Linear(4, 5, dtype=torch.complex128), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.turn(x + 0j).real.tanh())


@pytest.mark.parametrize("likelihood", [Categorical(), None], ids=["likelihood", "own loss"])
@pytest.mark.parametrize("make", [Fourier, lambda: Fourier(True), Rotation], ids=["modes", "scale", "linear"])
def test_complex_parameters_step_as_under_adamw(make: Any, likelihood: Any) -> None:
    model, twin = make(), make()
    rule: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.1}
    optimizer = optimizer_of(model, likelihood=likelihood, adamw=rule)
    plain = torch.optim.AdamW([p for p in twin.parameters() if p.is_complex()], **rule)
    for seed in range(4):
        backward(model, optimizer, batch(seed))
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            q.grad = None if p.grad is None else p.grad.clone()
        optimizer.step()
        plain.step()
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            if p.is_complex():
                assert torch.equal(p, q)
    rows = [line for line in str(optimizer).splitlines() if any(n in line for n in ("modes", "scale", "turn"))]
    assert rows and all("complex" in row and "AdamW" in row for row in rows)
    assert "last" in optimizer.layers and float(optimizer.state[model.last.weight]["momentum"].norm()) > 0


CASTS: dict[str, Callable[[Any], Any]] = {
    "double": lambda model: model.double(),
    "bfloat16": lambda model: model.bfloat16(),
    "there and back": lambda model: model.bfloat16().float(),
    "one layer": lambda model: model[0].double() and model[2].double(),
}


@pytest.mark.parametrize("approximation", [KFAC(), EKFAC(), JointWoodbury()], ids=["KFAC", "EKFAC", "JointWoodbury"])
@pytest.mark.parametrize("policy", [KLLimit(), None], ids=["limit", "default"])
@pytest.mark.parametrize("cast", CASTS)
def test_a_model_may_change_its_dtype_in_mid_training(cast: str, policy: Any, approximation: Any) -> None:
    model = mlp().float()
    optimizer = optimizer_of(model, approximation, step_size=policy)

    def step(seed: int) -> Tensor:
        x, y = batch(seed)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x.to(model[0].weight.dtype)).float(), y)
        loss.backward()
        optimizer.step()
        return loss.detach()

    if cast == "one layer":
        model[3].register_forward_pre_hook(lambda module, args: (args[0].to(module.weight.dtype),))
    for seed in range(3):
        step(seed)
    CASTS[cast](model)
    before = values(model)
    for seed in range(3, 8):
        assert bool(step(seed).isfinite())
    moved = [not torch.equal(a, b) for a, b in zip(before, values(model), strict=True)]
    assert moved[0] and moved[1] and moved[4] and moved[5]  # AdamW's steps may be less than a rounding
    for p in model.parameters():
        own = optimizer.state[p]
        for name in ("momentum", "exp_avg", "exp_avg_sq"):
            assert name not in own or own[name].dtype == p.dtype
    saved = copy.deepcopy(optimizer.state_dict())
    twin = copy.deepcopy(model)
    again = optimizer_of(twin, approximation)
    again.load_state_dict(saved)
    assert same(again.state_dict()["state"], saved["state"])


def test_a_model_made_double_in_mid_training_goes_on_as_one_that_was_double() -> None:
    trained = []
    for dtype in (torch.float32, torch.float64):
        model = mlp().to(dtype)
        optimizer = optimizer_of(model)
        for seed in range(6):
            if seed == 3:
                model.double()
            x, y = batch(seed)
            optimizer.zero_grad()
            F.cross_entropy(model(x.to(model[0].weight.dtype)), y).backward()
            optimizer.step()
        trained.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert_equal(trained[0], trained[1], 1e-5)


def new_head(model: Any) -> None:
    torch.manual_seed(7)
    model[3] = nn.Linear(5, 3)


def assigned(model: Any) -> None:
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)


def through_meta(model: Any) -> None:
    saved = copy.deepcopy(model.state_dict())
    model.to("meta").to_empty(device="cpu")
    model.load_state_dict(saved)


def new_parameter(model: Any) -> None:
    model[0].bias = nn.Parameter(torch.zeros(5))


def lost_bias(model: Any) -> None:
    model[0].bias = None


def weight_norm(model: Any) -> None:
    nn.utils.parametrizations.weight_norm(model[0])


REPLACEMENTS = [new_head, assigned, through_meta, new_parameter, lost_bias, weight_norm]


@pytest.mark.parametrize("when", ["before the first pass", "between two steps", "between pass and step"])
@pytest.mark.parametrize("replace", REPLACEMENTS)
@pytest.mark.parametrize("made", [optimizer_of, MADE["FNGD"]], ids=["KFAC", "FNGD"])
def test_parameters_that_were_replaced_are_one_clear_error_and_nothing_moves(
    made: Any, replace: Any, when: str
) -> None:
    model = mlp()
    optimizer = made(model)
    if when != "before the first pass":
        train(model, optimizer, range(3))
    if when == "between pass and step":
        backward(model, optimizer, batch(5))
    replace(model)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    before = values(model), [p.detach().clone() for p in held], copy.deepcopy(optimizer.state_dict())
    for _ in range(2):
        with pytest.raises(ValueError, match="no longer those of the model"):  # noqa: PT012
            if when == "between pass and step":
                optimizer.step()
            else:
                train(model, optimizer, [5])
        assert same((values(model), [p.detach() for p in held], optimizer.state_dict()), before)
    fresh = made(model)
    train(model, fresh, range(5, 8))
    assert all(not torch.equal(a, p) for a, p in zip(before[0], values(model), strict=True))
    assert str(optimizer)


@pytest.mark.parametrize("replace", [new_head, assigned, new_parameter])
def test_new_parameters_can_be_handed_over_in_place_of_the_old_ones(replace: Any) -> None:
    model = mlp()
    optimizer = optimizer_of(model)
    train(model, optimizer, range(3))
    replace(model)
    own = {id(p) for p in model.parameters()}
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if id(p) in own]
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    optimizer.add_param_group({"params": [p for p in model.parameters() if id(p) not in held]})
    before = values(model)
    train(model, optimizer, range(5, 9))
    assert all(not torch.equal(a, p) for a, p in zip(before, values(model), strict=True))
    assert {"0", "3"} <= set(optimizer.layers) and "0" in str(optimizer)
    copy.deepcopy(optimizer.state_dict())


@pytest.mark.parametrize("method", [prune.l1_unstructured, prune.random_unstructured, prune.ln_structured])
def test_a_layer_may_be_pruned_in_mid_training(method: Any) -> None:
    """While it is, its weight is a product with a mask: what is masked stays, and the rest is trained."""
    model = mlp()
    optimizer = optimizer_of(model)
    train(model, optimizer, range(3))
    more = {"n": 2, "dim": 0} if method is prune.ln_structured else {}
    method(model[0], "weight", amount=0.4, **more)
    mask, before = model[0].weight_mask.clone(), values(model)
    train(model, optimizer, range(3, 7))
    assert all(not torch.equal(a, p) for a, p in zip(before, values(model), strict=True))
    assert torch.equal(model[0].weight == 0, mask == 0)
    assert "0.weight_orig" in str(optimizer) or "0.weight" in str(optimizer)
    saved, twin = copy.deepcopy(optimizer.state_dict()), mlp()
    again = optimizer_of(twin)  # which counts the parameters as they were
    method(twin[0], "weight", amount=0.4, **more)
    twin.load_state_dict(model.state_dict())
    again.load_state_dict(saved)
    for m, o in ((model, optimizer), (twin, again)):
        train(m, o, range(7, 10))
    assert same(values(twin), values(model))
    prune.remove(model[0], "weight")
    train(model, optimizer, range(10, 12))
    assert not torch.equal(model[0].weight == 0, mask == 0)


# Copies.


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o)), copy.copy])
def test_a_copy_of_the_optimizer_says_what_to_do(duplicate: Any) -> None:
    model = mlp()
    optimizer = optimizer_of(model)
    train(model, optimizer, range(2))
    before = everything(model, optimizer)
    with pytest.raises((TypeError, AttributeError), match=r"new one of the copied model.*state_dict"):
        duplicate(optimizer).step()
    with pytest.raises((TypeError, AttributeError), match=r"new one of the copied model.*state_dict"):
        str(duplicate(optimizer))
    assert same(everything(model, optimizer), before)
    train(model, optimizer, range(2, 4))


def saved_and_loaded(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


COPIES: list[Any] = [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), saved_and_loaded]


@pytest.mark.parametrize("duplicate", COPIES, ids=["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("likelihood", [Categorical(), None], ids=["likelihood", "own loss"])
def test_a_copy_of_a_model_has_no_trace_of_its_optimizer(likelihood: Any, duplicate: Any) -> None:
    model = mlp()
    optimizer = optimizer_of(model, likelihood=likelihood)
    train(model, optimizer, range(2))
    twin = duplicate(model)
    assert vars(twin).keys() == vars(mlp()).keys()
    for mine, fresh in zip(twin.modules(), mlp().modules(), strict=True):
        assert vars(mine).keys() == vars(fresh).keys()
        for name, value in vars(mine).items():
            assert not name.endswith(("hooks", "_with_kwargs", "always_called")) or not value
    optimizer.zero_grad()
    twin(batch(0)[0]).sum().backward()
    assert not optimizer._engine.pending
    del optimizer, model
    own = optimizer_of(twin, likelihood=likelihood)
    train(twin, own, range(2, 4))
    plain = mlp()
    plain.load_state_dict(duplicate(twin).state_dict())
    both = []
    for m in (plain, duplicate(twin)):
        o = optimizer_of(m, likelihood=likelihood)
        train(m, o, range(4, 6))
        both.append(values(m))
    assert same(*both)
