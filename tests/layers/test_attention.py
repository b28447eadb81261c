"""nn.MultiheadAttention and torch's Transformer: projections that are never called as modules."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from functional import EVERYTHING, Slices, assert_captured, assert_exact_fisher, blocks_by_hand, record_of
from test_capture import armed
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils.checkpoint import checkpoint

import natgrad
from natgrad import FNGD, KFAC, Categorical, Constant, Gaussian, NaturalGradient
from natgrad.labels import Labels
from natgrad.look import look
from natgrad.optim.directions import Directions
from natgrad.optim.precision import Precision
from natgrad.reconstruction.fisher_layer import fisher_layers_of
from oracles import assert_equal

E, HEADS, N, T = 6, 2, 4, 5


class Attend(nn.Module):
    """x (n, T, E) through attention, a nonlinearity and a read-out of every position: (n, (T) 3)."""

    def __init__(self, mode: str = "self", call: dict[str, Any] | None = None, **settings: Any) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(E, HEADS, **{"batch_first": True, **settings})
        for name, p in self.attn.named_parameters():
            if "bias" in name:
                nn.init.normal_(p)
        self.mode, self.call = mode, call or {}

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.tokens(x)
        call = dict(self.call)
        if "key_padding_mask" in call:
            call["key_padding_mask"] = (x[..., 0] > 0.5) & (torch.arange(x.shape[1]) > 0)
        if not self.attn.batch_first:
            query, key, value = (z.transpose(0, 1) for z in (query, key, value))
        y = self.attn(query, key, value, **call)[0]
        y = y if self.attn.batch_first else y.transpose(0, 1)
        return torch.tanh(y).flatten(1)

    def tokens(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.mode == "self":
            return x, x, x
        if self.mode == "cross":
            memory = x[:, 1:].cos()
            return x, memory, memory
        return x, x.cos()[..., : self.attn.kdim], x.sin()[..., : self.attn.vdim]


CAUSAL = torch.triu(torch.ones(T, T, dtype=torch.bool), 1)
CASES: dict[str, Callable[[], Attend]] = {
    "self": Attend,
    "time first": lambda: Attend(batch_first=False),
    "without weights": lambda: Attend(call={"need_weights": False}),
    "time first, without weights": lambda: Attend(batch_first=False, call={"need_weights": False}),
    "cross": lambda: Attend("cross"),
    "cross, without weights": lambda: Attend("cross", {"need_weights": False}),
    "three inputs": lambda: Attend("three"),
    "other widths": lambda: Attend("three", kdim=3, vdim=4),
    "other widths without bias": lambda: Attend("three", kdim=3, vdim=4, bias=False),
    "without bias": lambda: Attend(bias=False),
    "more keys": lambda: Attend(add_bias_kv=True, add_zero_attn=True),
    "padding": lambda: Attend(call={"key_padding_mask": True}),
    "causal": lambda: Attend(call={"attn_mask": CAUSAL, "is_causal": True, "need_weights": False}),
    "mask": lambda: Attend(call={"attn_mask": torch.linspace(-2, 2, T * T).view(T, T)}),
    "weights of heads": lambda: Attend(call={"average_attn_weights": False}),
}
every_case = pytest.mark.parametrize("make", CASES.values(), ids=CASES.keys())


def slices_of(attn: nn.MultiheadAttention, prefix: str = "attn.") -> Slices:
    rows = {"q": slice(0, E), "k": slice(E, 2 * E), "v": slice(2 * E, 3 * E)}
    packed = attn.in_proj_weight is not None
    slices: dict[str, tuple[str, slice, str | None, slice]] = {}
    for letter, own in rows.items():
        weight, part = ("in_proj_weight", own) if packed else (f"{letter}_proj_weight", EVERYTHING)
        name = f"in_proj.{letter}" if packed else f"{letter}_proj"
        slices[f"{prefix}{name}"] = f"{prefix}{weight}", part, f"{prefix}in_proj_bias", own
    slices[f"{prefix}out_proj"] = f"{prefix}out_proj.weight", EVERYTHING, f"{prefix}out_proj.bias", EVERYTHING
    return slices


@every_case
def test_captured_gradients_are_those_of_every_example_and_the_output_is_the_same(make: Callable[[], Attend]) -> None:
    model = make()
    assert_captured(model, torch.randn(N, T, E), slices_of(model.attn))


def test_captured_gradients_are_those_of_vmap() -> None:
    model, x = Attend(), torch.randn(N, T, E)
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return 0.5 * functional_call(model, parameters, (x.unsqueeze(0),)).square().sum()

    expected = blocks_by_hand(vmap(grad(loss), (None, 0))(parameters, x), slices_of(model.attn))
    record, _, layers = record_of(model, x)
    for name, layer in layers.items():
        (capture,) = record.captures(layer)
        (DW,) = capture.weight_gradients()
        assert float((DW - expected[name]).norm()) < 1e-10 * float(1 + expected[name].norm())


@every_case
def test_the_exact_fisher_is_the_dense_ggn(make: Callable[[], Attend]) -> None:
    model = make()
    assert_exact_fisher(model, torch.randn(N, T, E), slices_of(model.attn))


@pytest.mark.parametrize("need_weights", [True, False])
def test_dropout_draws_the_numbers_that_it_draws_without_an_engine(need_weights: bool) -> None:
    model, x = Attend(call={"need_weights": need_weights}, dropout=0.4), torch.randn(N, T, E)

    def seen() -> list[Tensor]:
        torch.manual_seed(1)
        output = model(x)
        model.zero_grad()
        output.square().sum().backward()
        return [
            output.detach(),
            torch.get_rng_state(),
            *(p.grad.clone() for p in model.parameters() if p.grad is not None),
        ]

    alone = seen()
    with armed(model, None) as engine:
        watched = seen()
        assert len(engine.everything()) == 1
    assert all(torch.equal(one, other) for one, other in zip(alone, watched, strict=True))


def test_one_sequence_without_a_batch_is_one_example() -> None:
    attn, x = nn.MultiheadAttention(E, HEADS), torch.randn(T, E)

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = attn

        def forward(self, x: Tensor) -> Tensor:
            return self.attn(x, x, x)[0]

    model = Whole()
    with armed(model, None) as engine:
        model(x).square().sum().backward()
        (record,) = engine.everything()
    assert {uses[0].x.shape for uses in record.calls.values()} == {(1, T, E)}
    (capture,) = record.captures(engine.layers["attn.in_proj.v"])
    (DW,) = capture.weight_gradients()
    assert attn.in_proj_weight.grad is not None
    assert_equal(DW[0, :, :-1], attn.in_proj_weight.grad[2 * E :])


# What is covered.


def test_a_step_is_the_damped_inverse_of_every_block() -> None:
    model, x = Attend(), torch.randn(16, T, E)
    before = copy.deepcopy(model)
    optimizer = NaturalGradient(
        model,
        KFAC(),
        likelihood=Gaussian(),
        estimator="exact",
        step_size=Constant(),
        lr=0.5,
        momentum=0.0,
        damping=0.1,
        overhead=None,
    )
    (0.5 * model(x).square().sum() / 16).backward()
    gradients = {name: p.grad.clone().unsqueeze(0) for name, p in model.named_parameters() if p.grad is not None}
    optimizer.step()
    moved = {
        name: (old - new).detach().unsqueeze(0)
        for (name, new), old in zip(model.named_parameters(), before.parameters(), strict=True)
    }
    slices = slices_of(model.attn)
    step, M = blocks_by_hand(moved, slices), blocks_by_hand(gradients, slices)
    matrices = natgrad.fisher(before, KFAC(), Gaussian(), [(x, None)])
    for name in slices:
        assert_equal(step[name][0], 0.5 * (matrices[name].inverse(0.1) @ M[name][0]))


def test_parts_that_are_frozen_or_excluded_have_no_layer() -> None:
    model, x = Attend(add_bias_kv=True), torch.randn(N, T, E)
    assert look(model, (x,)).coverage().uncovered == {
        f"attn.bias_{letter}": f"used by multi_head_attention_forward as bias_{letter}: no rule" for letter in "kv"
    }
    model.attn.in_proj_weight.requires_grad_(False)
    found = look(model, (x,)).coverage()
    biases = [f"attn.in_proj_bias.{letter}" for letter in "qkv"]
    assert list(found.layers) == [*biases, "attn.out_proj"]
    found = look(model, (x,), exclude=["attn.out_proj"]).coverage()
    assert "attn.out_proj" not in found.layers
    reasons = {name: why for name, why in found.uncovered.items() if name.startswith("attn.out_proj")}
    assert reasons == {f"attn.out_proj.{name}": "excluded" for name in ("weight", "bias")}


def test_a_frozen_bias_leaves_blocks_without_its_column() -> None:
    model = Attend()
    model.attn.in_proj_bias.requires_grad_(False)
    assert_captured(model, torch.randn(N, T, E), slices_of(model.attn))


def test_an_attention_of_ones_own_is_what_it_computes() -> None:
    class Mine(nn.MultiheadAttention):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            y, weights = super().forward(*args, **kwargs)
            return 3 * y.sin(), weights

    model = Attend()
    mine = Mine(E, HEADS, batch_first=True)
    mine.load_state_dict(model.attn.state_dict())
    model.attn = mine
    assert_captured(model, torch.randn(N, T, E), slices_of(mine))


def test_a_module_whose_weight_another_operation_uses_is_covered() -> None:
    class Inside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.never_called = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            weight, bias = self.never_called.parameters()
            return F.linear(self.used(x), weight, bias)

    model, x = Inside(), torch.randn(N, 3)
    optimizer = NaturalGradient(model, likelihood=Gaussian(), overhead=None)
    model(x).square().sum().backward()
    optimizer.step()
    assert list(optimizer.layers) == ["used", "never_called"]
    assert "100.0 % of 24" in repr(optimizer) and "AdamW" not in repr(optimizer)


def test_a_layer_that_is_never_used_does_not_count_as_covered() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x) + self.unused.weight.exp().sum()

    model, x = Unused(), torch.randn(N, 3)
    optimizer = NaturalGradient(model, likelihood=Gaussian(), overhead=None)
    assert "100.0 % of 24" in repr(optimizer)  # as far as modules tell
    before = model.unused.weight.detach().clone()
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    assert list(optimizer.layers) == ["used"]
    assert optimizer.uncovered == {
        "unused.weight": "used by exp: no rule", "unused.bias": "not used in what was seen"
    }  # fmt: skip
    assert "50.0 % of 24" in repr(optimizer)
    assert not torch.equal(before, model.unused.weight)


def test_methods_that_need_whole_weights_leave_packed_projections_alone() -> None:
    model, x = nn.Sequential(Attend(), nn.Linear(T * E, 2)), torch.randn(N, T, E)
    optimizer = FNGD(model, first_phase=3)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    assert list(optimizer.layers) == ["0.attn.out_proj", "1"]
    reason = "linear; FNGD has no rule for a part of a parameter"
    assert optimizer.uncovered == {f"0.attn.in_proj_{name}": reason for name in ("weight", "bias")}
    optimizer.zero_grad()
    before = model(x).detach()
    natgrad.reconstruct(model, [(x, None)])
    assert [fisher_layer.layer.name for fisher_layer in fisher_layers_of(model)] == ["0.attn.out_proj", "1"]
    assert_equal(model(x).detach(), before, 1e-9)
    natgrad.restore(model)
    assert_equal(model(x).detach(), before, 1e-9)


# It leaves the model alone.


def test_eval_and_no_grad_are_left_alone_and_so_are_copies_and_checkpoints() -> None:
    model, x = Attend(), torch.randn(N, T, E)
    keys = list(model.state_dict())
    with torch.no_grad():
        model.train()(x)
        fast = model.eval()(x)  # by torch's fused kernel
        optimizer = NaturalGradient(model, likelihood=Gaussian())
        assert list(model.state_dict()) == keys
        assert torch.equal(model(x), fast)
        assert torch.equal(copy.deepcopy(model)(x), fast)
        model.train()(x)
    assert not optimizer._engine.pending


def test_a_copy_of_a_watched_model_is_not_watched() -> None:
    model, x = Attend(), torch.randn(N, T, E)
    with armed(model, None) as engine:
        copied = copy.deepcopy(model)
        (0.5 * copied(x).square().sum()).backward()
        assert engine.everything() == []


def test_nothing_is_active_unless_armed() -> None:
    model, x = Attend(), torch.randn(N, T, E)
    with armed(model, None) as engine:
        active = []
        model.attn.register_forward_pre_hook(lambda *_: active.append(torch._C._len_torch_function_stack()))
        model(x)
        engine.armed = False
        model(x)
        engine.armed = True
        with torch.no_grad():
            model(x)
        model.eval()(x)
    assert active == [1, 0, 0, 0]
    assert torch._C._len_torch_function_stack() == 0


def test_an_error_inside_leaves_nothing_active() -> None:
    model = Attend()
    with armed(model, None):
        with pytest.raises(AssertionError, match="embedding dimension"):
            model(torch.randn(N, T, E + 1))
        assert torch._C._len_torch_function_stack() == 0
        model(torch.randn(N, T, E)).sum().backward()


def test_a_resumed_run_continues_bit_for_bit() -> None:
    batches = [torch.randn(8, T, E) for _ in range(6)]

    def steps(model: nn.Module, optimizer: NaturalGradient, data: list[Tensor]) -> list[Tensor]:
        for x in data:
            optimizer.zero_grad()
            (0.5 * model(x).square().sum() / 8).backward()
            optimizer.step()
        return [p.detach().clone() for p in model.parameters()]

    model = Attend()
    twin = copy.deepcopy(model)
    whole = steps(model, NaturalGradient(model, likelihood=Gaussian()), batches)
    first = NaturalGradient(twin, likelihood=Gaussian())
    steps(twin, first, batches[:3])
    resumed = Attend()
    resumed.load_state_dict(twin.state_dict())
    second = NaturalGradient(resumed, likelihood=Gaussian())
    second.load_state_dict(first.state_dict())
    assert all(torch.equal(one, other) for one, other in zip(steps(resumed, second, batches[3:]), whole, strict=True))


# torch's Transformer.


def small(**settings: Any) -> dict[str, Any]:
    return {"d_model": E, "nhead": HEADS, "dim_feedforward": 4, "dropout": 0.0, **settings}


class Encode(nn.Module):
    def __init__(self, **settings: Any) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(**small(**settings))
        self.enc = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        for p in self.enc.parameters():
            nn.init.normal_(p, std=0.5)
        self.first = settings.get("batch_first", False)

    def forward(self, x: Tensor) -> Tensor:
        return (self.enc(x) if self.first else self.enc(x.transpose(0, 1)).transpose(0, 1)).flatten(1)


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_the_layers_of_an_encoder_capture_every_example(batch_first: bool, norm_first: bool) -> None:
    model = Encode(batch_first=batch_first, norm_first=norm_first)
    slices: dict[str, Any] = {}
    for number in range(2):
        prefix = f"enc.layers.{number}."
        slices |= slices_of(model.enc.layers[number].self_attn, f"{prefix}self_attn.")
        for name in ("linear1", "linear2"):
            slices[prefix + name] = f"{prefix}{name}.weight", EVERYTHING, f"{prefix}{name}.bias", EVERYTHING
        for name in ("norm1", "norm2"):
            slices[prefix + name] = f"{prefix}{name}.weight", EVERYTHING, f"{prefix}{name}.bias", EVERYTHING
    assert_captured(model, torch.randn(N, T, E), slices)


def test_every_projection_of_a_transformer_is_seen() -> None:
    class Translate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Transformer(E, HEADS, 1, 1, 4, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x, x[:, 1:]).flatten(1)

    model = Translate()
    record, _, layers = record_of(model, torch.randn(N, T, E))
    matrices = {name for name, p in model.named_parameters() if p.ndim == 2}
    assert len(matrices) == 3 * 2 + 2 * 2
    seen = [name for name, layer in layers.items() if list(record.captures(layer))]
    assert len([name for name in seen if "norm" not in name]) == 3 * 4 + 2 * 2


def test_a_checkpointed_encoder_is_seen_as_it_is_without() -> None:
    class Saved(Encode):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(super().forward, x, use_reentrant=False)

    model, x = Encode(batch_first=True), torch.randn(N, T, E)
    saved = Saved(batch_first=True)
    saved.load_state_dict(model.state_dict())
    for y in (torch.randn(N, T * E), None):
        (one, first, layers), (other, second, others) = record_of(model, x, y), record_of(saved, x, y)
        assert torch.equal(first, second) and list(layers) == list(others)
        for name, layer in layers.items():
            (mine,), (theirs,) = one.captures(layer), other.captures(others[name])
            assert torch.equal(mine.a, theirs.a) and torch.equal(mine.g, theirs.g)


def test_a_transformer_trains_with_the_defaults_and_is_covered() -> None:
    """The task is to name the token that the first one points at."""
    torch.manual_seed(0)
    words, width = 6, 64

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.read = nn.Linear(words + T, width)
            layer = nn.TransformerEncoderLayer(width, 4, 128, 0.1, batch_first=True)
            self.enc = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
            self.head = nn.Linear(width, words)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.enc(self.read(x))[:, 0])

    model = Model()
    optimizer = NaturalGradient(model, likelihood=Categorical())
    losses = []
    for _ in range(80):
        tokens = torch.randint(words, (64, T))
        x = torch.cat([F.one_hot(tokens, words), torch.eye(T).expand(64, T, T)], -1).double()
        y = tokens.gather(1, tokens[:, :1] % (T - 1) + 1).squeeze(1)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(losses[::8])
    assert losses[0] > 1.5 and sum(losses[-5:]) / 5 < 0.7
    assert float(repr(optimizer).splitlines()[-1].split()[0]) >= 99.0


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # by torch's own tracing, where a graph breaks
def test_a_compiled_model_takes_the_same_steps() -> None:
    model, x = Attend(), torch.randn(8, T, E)
    plain = copy.deepcopy(model)
    losses: list[list[float]] = []
    for net, run in ((plain, plain), (model, torch.compile(model, backend="eager"))):
        optimizer = NaturalGradient(net, likelihood=Gaussian())
        losses.append([])
        for _ in range(3):
            optimizer.zero_grad()
            loss = 0.5 * run(x).square().sum() / 8
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
        assert "AdamW" not in repr(optimizer)
    assert losses[0] == losses[1]


def test_the_exact_quadratic_model_reads_the_parts_of_a_parameter() -> None:
    """Jacobian products by forward mode, against the samples of every output."""
    model, x = Attend(), torch.randn(8, T, E)
    with armed(model, labels := Labels(Gaussian(), "exact")) as engine:
        engine.keep_inputs = True
        model(x)
        records = engine.everything()
    layers = engine.layers
    M, D, P = ({name: torch.randn(layer.shape) for name, layer in layers.items()} for _ in range(3))
    directions = Directions(layers, M, D, P, records, Precision(), model, labels)
    assert_equal(directions.exact_curvature(), directions.sampled_curvature())
