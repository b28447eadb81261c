"""What the engine records of a layer gives the per-example gradients of ``vmap(grad)``, whatever the layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from natgrad import Gaussian
from natgrad.capture import Capture
from natgrad.engine import Engine
from natgrad.jets import JetLinear
from natgrad.labels import Labels
from natgrad.layers import Layer, expected
from natgrad.look import look
from natgrad.record import Record, Share
from oracles import assert_equal, block_of, per_example_gradients

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")

N = 5


def flatten(*modules: nn.Module) -> nn.Sequential:
    """A network that ends with one vector per example, through a nonlinearity."""
    return nn.Sequential(*modules, nn.Tanh(), nn.Flatten())


def randomised(module: nn.Module) -> nn.Module:
    """A norm with weights and running statistics that are not those it starts with."""
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(0.5 + torch.rand_like(tensor))
    return module


class Conv1D(nn.Module):
    """A linear layer with its weight as (in, out), as in GPT-2."""

    __module__, __qualname__ = "transformers.pytorch_utils", "Conv1D"

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(0.1 * torch.randn(nx, nf)), nn.Parameter(torch.randn(nf))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(4, 3), (4,)),
    "linear of sequences": (lambda: nn.Linear(4, 3), (6, 4)),
    "linear of images": (lambda: nn.Linear(4, 3), (2, 3, 4)),
    "linear without bias": (lambda: nn.Linear(4, 3, bias=False), (6, 4)),
    "linear on jets": (lambda: JetLinear(4, 3), (5, 4)),
    "linear on jets without bias": (lambda: JetLinear(4, 3, bias=False), (5, 4)),
    "conv1d": (lambda: nn.Conv1d(2, 3, 3, stride=2, padding=1), (2, 7)),
    "conv1d same, even kernel": (lambda: nn.Conv1d(2, 3, 4, padding="same"), (2, 7)),
    "conv1d valid": (lambda: nn.Conv1d(2, 3, 3, padding="valid"), (2, 7)),
    "conv1d depthwise": (lambda: nn.Conv1d(4, 4, 3, groups=4), (4, 7)),
    "conv2d": (lambda: nn.Conv2d(2, 3, (2, 3), stride=(2, 1), padding=(1, 2), dilation=(1, 2)), (2, 6, 7)),
    "conv2d without bias": (lambda: nn.Conv2d(2, 3, 3, bias=False), (2, 5, 5)),
    "conv2d 1x1": (lambda: nn.Conv2d(2, 3, 1), (2, 4, 4)),
    "conv2d stride above kernel": (lambda: nn.Conv2d(2, 3, 2, stride=3), (2, 7, 8)),
    "conv2d same, dilated": (lambda: nn.Conv2d(2, 3, 3, padding="same", dilation=2), (2, 6, 6)),
    "conv2d groups": (lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1), (4, 5, 4)),
    "conv2d groups without bias": (lambda: nn.Conv2d(4, 6, 3, groups=2, bias=False), (4, 5, 4)),
    "conv3d": (lambda: nn.Conv3d(2, 3, (1, 2, 3), stride=(1, 2, 1), padding=(0, 1, 1)), (2, 3, 4, 5)),
    "conv3d groups, dilated": (lambda: nn.Conv3d(2, 4, 2, groups=2, dilation=(1, 2, 1)), (2, 3, 4, 3)),
    **{
        f"conv2d {mode}{', same' if same else ''}": (
            lambda mode=mode, same=same: nn.Conv2d(  # type: ignore[misc]
                2, 3, (3, 2), padding="same" if same else (2, 1), padding_mode=mode
            ),
            (2, 5, 6),
        )
        for mode in ("zeros", "reflect", "replicate", "circular")
        for same in (False, True)
    },
    "conv1d circular": (lambda: nn.Conv1d(2, 3, 3, padding=2, padding_mode="circular", stride=2), (2, 7)),
    "conv3d replicate": (lambda: nn.Conv3d(2, 3, 2, padding=1, padding_mode="replicate"), (2, 3, 4, 3)),
    "transposed1d": (lambda: nn.ConvTranspose1d(2, 3, 3, stride=2, padding=1, output_padding=1), (2, 5)),
    "transposed1d, cropped": (lambda: nn.ConvTranspose1d(2, 3, 2, stride=3, padding=2, bias=False), (2, 5)),
    "transposed1d, stride above kernel": (lambda: nn.ConvTranspose1d(2, 3, 2, stride=4), (2, 5)),
    "transposed2d": (
        lambda: nn.ConvTranspose2d(2, 3, (2, 3), stride=(2, 1), padding=(1, 0), dilation=(3, 2)), (2, 3, 4)
    ),
    "transposed2d groups": (
        lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=(1, 0), groups=2), (4, 3, 2)
    ),
    "transposed3d groups, dilated": (
        lambda: nn.ConvTranspose3d(4, 2, 2, stride=(1, 2, 1), dilation=(2, 1, 1), groups=2, bias=False), (4, 2, 3, 2)
    ),
    "layer norm": (lambda: randomised(nn.LayerNorm(4)), (4,)),
    "layer norm of sequences": (lambda: randomised(nn.LayerNorm(4)), (6, 4)),
    "layer norm of two dimensions": (lambda: randomised(nn.LayerNorm((3, 4))), (5, 3, 4)),
    "layer norm without bias": (lambda: randomised(nn.LayerNorm(4, bias=False)), (6, 4)),
    "rms norm": (lambda: randomised(nn.RMSNorm(4)), (6, 4)),
    "group norm": (lambda: randomised(nn.GroupNorm(2, 4)), (4, 3, 2)),
    "group norm of vectors": (lambda: randomised(nn.GroupNorm(2, 6)), (6,)),
    "batch norm 1d, eval": (lambda: randomised(nn.BatchNorm1d(4)).eval(), (4,)),
    "batch norm 1d of sequences, eval": (lambda: randomised(nn.BatchNorm1d(4)).eval(), (4, 3)),
    "batch norm 2d, eval": (lambda: randomised(nn.BatchNorm2d(3)).eval(), (3, 2, 4)),
    "batch norm 3d, eval": (lambda: randomised(nn.BatchNorm3d(3)).eval(), (3, 2, 2, 3)),
    "instance norm 1d": (lambda: randomised(nn.InstanceNorm1d(3, affine=True)), (3, 5)),
    "instance norm 2d": (lambda: randomised(nn.InstanceNorm2d(3, affine=True)), (3, 2, 4)),
    "instance norm 3d, eval": (
        lambda: randomised(nn.InstanceNorm3d(3, affine=True, track_running_stats=True)).eval(), (3, 2, 2, 3)
    ),
    "Conv1D of transformers": (lambda: Conv1D(3, 4), (6, 4)),
}  # fmt: skip
every_layer = pytest.mark.parametrize(("make", "shape"), LAYERS.values(), ids=LAYERS.keys())


def half_square(output: Tensor, y: Tensor) -> Tensor:
    return 0.5 * (output - y).square().sum()


@contextmanager
def armed(model: nn.Module, labels: Labels | None = None, **settings: Any) -> Iterator[Engine]:
    engine = Engine(model, labels, **settings)
    engine.armed = True
    yield engine
    engine.close()


def recorded(model: nn.Module, x: Tensor, y: Tensor | None = None) -> tuple[Record, Mapping[str, Layer]]:
    """The record of one forward pass, of the half square to ``y`` through the likelihood or of the user's backward; and
    the layers."""
    labels = None if y is None else Labels(Gaussian(), "empirical", targets=y.unsqueeze(0) if y.ndim == 1 else y)
    with armed(model, labels, only_training=False) as engine:
        output = model(x)
        if y is None:
            half_square(output, torch.zeros_like(output)).backward()
        (record,) = engine.everything()
    return record, engine.layers


def captured(record: Record, layer: Layer) -> Capture:
    (capture,) = record.captures(layer)
    return capture


def weight_gradients(record: Record, layers: Mapping[str, Layer], name: str) -> Tensor:
    """DW (n, out, in) of one layer; a grouped layer's groups one above the other, an added bias as the last column."""
    (DW,) = captured(record, layers[name]).weight_gradients()
    DW = DW if DW.ndim == 3 else DW.movedim(0, 1).flatten(1, 2)
    if f"{name}.bias" not in layers:
        return DW
    (column,) = captured(record, layers[f"{name}.bias"]).weight_gradients()
    return torch.cat([DW, column], -1)


def assert_per_example_gradients(model: nn.Module, x: Tensor, y: Tensor, name: str = "0") -> None:
    for target, used in ((y, y), (None, torch.zeros_like(y))):
        by_autograd = per_example_gradients(model, half_square, x, used)[name]
        assert_equal(weight_gradients(*recorded(model, x, target), name), by_autograd)


@every_layer
def test_captured_gradients_are_per_example_gradients(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    model, x = flatten(make()), torch.randn(N, *shape)
    assert_per_example_gradients(model, x, torch.randn_like(model(x)))


@every_layer
def test_directional_is_the_inner_product_with_per_example_gradients(
    make: Callable[[], nn.Module], shape: tuple[int, ...]
) -> None:
    model, x = flatten(make()), torch.randn(N, *shape)
    y = torch.randn_like(model(x))
    gradients = per_example_gradients(model, half_square, x, y)["0"]
    record, layers = recorded(model, x, y)
    weight, *bias = list(model[0].parameters())
    V = {id(p): torch.randn_like(p) for p in (weight, *bias)}
    along_layers = [
        record.directional(layer, layer.parts([V[id(p)] for p in layer.parameters])) for layer in layers.values()
    ]
    u = torch.stack([along for along in along_layers if along is not None]).sum(0)
    along = block_of(model[0], *(V[id(p)].unsqueeze(0) for p in (weight, *bias)), *([] if bias else [None]))
    assert_equal(u, torch.einsum("noi,oi->n", gradients, along[0]).unsqueeze(0))


@every_layer
def test_pack_and_unpack_are_inverse_and_put_the_bias_last(
    make: Callable[[], nn.Module], shape: tuple[int, ...]
) -> None:
    module = make()
    layer = look(module, (torch.randn(N, *shape),)).layers[""]
    tensors = [torch.randn_like(p) for p in layer.parameters]
    packed = layer.pack(tensors)
    assert packed.shape == layer.shape
    weight, *bias = (tensor.unsqueeze(0) for tensor in tensors)
    stacked = block_of(module, weight, bias[0] if bias else None).squeeze(0)
    assert torch.equal(packed.reshape(-1, packed.shape[-1]), stacked)
    for back, tensor in zip(layer.unpack(packed), tensors, strict=True):
        assert torch.equal(back, tensor)


@every_layer
def test_inputs_times_the_block_are_the_outputs(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    """s = W a at every position, and the form's product is what the operation returned."""
    module, x = make(), torch.randn(N, *shape)
    record, layers = recorded(module, x)
    layer, (use,) = layers[""], record.calls[""]
    form, weights = use.call.form, [p.detach() for p in layer.parameters]
    with torch.no_grad():
        added = module.get_parameter("bias") if "bias" in layers else torch.zeros(())  # by hand, after the product
        y = use.how(use.call.read(module(x) - added))
        s = form.inputs(use.x, layer.biased) @ layer.pack(weights).mT.unsqueeze(-3)
        assert_equal(s, form.outputs(y), 1e-12)
        operand, *bias = layer.parts(weights)
        product = form.product(use.operand(layer, operand), bias[0] if bias else None, use.x)
        assert_equal(product, y, 1e-12)


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.Linear(4, 3), (4,)),
        (nn.Conv1d(2, 3, 3), (2, 7)),
        (nn.Conv2d(2, 3, 2, groups=1), (2, 4, 4)),
        (nn.ConvTranspose2d(2, 3, 2, stride=2), (2, 2, 3)),
        (nn.LayerNorm((2, 3)), (2, 3)),
        (nn.InstanceNorm1d(2, affine=True), (2, 5)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_an_unbatched_input_is_a_batch_of_one(module: nn.Module, shape: tuple[int, ...]) -> None:
    module = module.double()
    model = nn.Sequential(module)
    x = torch.randn(shape)
    record, layers = recorded(model, x)
    assert len(captured(record, layers["0"]).g.movedim(-3, 0)) == 1
    by_autograd = per_example_gradients(model, half_square, x.unsqueeze(0), torch.zeros_like(model(x)).unsqueeze(0))
    assert_equal(weight_gradients(record, layers, "0"), by_autograd["0"])


# Weights that are frozen, layers used twice, in place, in part.


def test_a_frozen_weight_is_not_covered_and_its_bias_is_a_layer_of_its_own() -> None:
    for module, shape in ((nn.Linear(4, 3), (6, 4)), (nn.Conv2d(2, 4, 2, groups=2), (2, 3, 4))):
        model, x = flatten(module), torch.randn(N, *shape)
        model[0].weight.requires_grad_(False)
        y = torch.randn_like(model(x))
        record, layers = recorded(model, x, y)
        assert list(layers) == ["0.bias"] and layers["0.bias"].parameters == [module.bias]
        losses = (half_square(model(x[n : n + 1]), y[n : n + 1]) for n in range(N))
        by_autograd = torch.stack([torch.autograd.grad(loss, layers["0.bias"].parameters)[0] for loss in losses])
        assert_equal(weight_gradients(record, layers, "0.bias").squeeze(-1), by_autograd)


def test_a_frozen_bias_leaves_a_block_without_its_column() -> None:
    for module, shape in ((nn.Linear(4, 3), (6, 4)), (nn.Conv2d(2, 4, 2, groups=2), (2, 3, 4))):
        model, x = flatten(module.double()), torch.randn(N, *shape)
        model[0].bias.requires_grad_(False)
        assert_per_example_gradients(model, x, torch.randn_like(model(x)))


class Recurrent(nn.Module):
    """One layer, called several times in a forward pass, with different numbers of positions."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.read = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.cell(x))  # (n, t, 4)
        for _ in range(2):
            h = torch.tanh(self.cell(h) + x)
        return self.read(torch.tanh(self.cell(h.mean(1))))


def test_a_layer_called_several_times_adds_up_its_calls() -> None:
    model, x = Recurrent(), torch.randn(N, 3, 4)
    y = torch.randn(N, 2)
    for name in ("cell", "read"):
        assert_per_example_gradients(model, x, y, name)
    record, layers = recorded(model, x, y)
    layer = layers["cell"]
    assert captured(record, layer).a.shape[-2] == 3 + 3 + 3 + 1
    V = [torch.randn_like(p) for p in layer.parameters]
    u = record.directional(layer, V)
    assert u is not None
    gradients = per_example_gradients(model, half_square, x, y)["cell"]
    assert_equal(u, torch.einsum("noi,oi->n", gradients, layer.pack(V)).unsqueeze(0))


@pytest.mark.parametrize("inner", [nn.Linear(4, 4), nn.Linear(4, 4, bias=False)])
def test_an_inplace_activation_after_the_layer(inner: nn.Module) -> None:
    model = nn.Sequential(inner.double(), nn.ReLU(inplace=True), nn.Linear(4, 3), nn.ReLU(inplace=True))
    x, y = torch.randn(N, 4), torch.randn(N, 3)
    for name in ("0", "2"):
        assert_per_example_gradients(model, x, y, name)


class Branching(nn.Module):
    """A layer that some forward passes leave out, and one whose output is thrown away."""

    def __init__(self) -> None:
        super().__init__()
        self.always, self.sometimes, self.wasted = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.use = False

    def forward(self, x: Tensor) -> Tensor:
        h = self.always(x)
        self.wasted(h)
        return self.sometimes(h) if self.use else h


@pytest.mark.parametrize("likelihood", [True, False])
def test_a_layer_that_is_not_reached_leaves_nothing(likelihood: bool) -> None:
    model, x, y = Branching(), torch.randn(N, 4), torch.randn(N, 4)
    model.use = True
    _, all_layers = recorded(model, x)
    for use in (False, True):
        model.use = use
        record, layers = recorded(model, x, y if likelihood else None)
        assert list(layers) == ["always", "sometimes", "wasted"][:: 1 if use else 2]
        assert [len(list(record.captures(layer))) for layer in all_layers.values()] == [1, int(use), 0]
        assert record.directional(layers["wasted"], [torch.zeros(4, 4), torch.zeros(4)]) is None


def test_batches_of_different_sizes_in_one_forward_are_refused_by_name() -> None:
    class Pairs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tower = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.tower(x) + self.tower(x[:1])

    record, layers = recorded(Pairs(), torch.randn(N, 4), torch.zeros(N, 2))
    with pytest.raises(ValueError, match="layer 'tower' was called with batches of different sizes"):
        captured(record, layers["tower"])


def test_a_fraction_of_the_batch_is_its_first_examples() -> None:
    model, x = flatten(nn.Conv2d(4, 6, 3, groups=2)), torch.randn(N, 4, 5, 4)
    record, layers = recorded(model, x, torch.randn_like(model(x)))
    layer, whole = layers["0"], captured(record, layers["0"])
    for fraction, n in ((0.4, 2), (0.01, 1), (1.0, 5)):
        (part,) = record.captures(layer, share=Share(fraction))
        assert torch.equal(part.a, whole.a[:, :n]) and torch.equal(part.g, whole.g[:, :n])
        assert part.count == n and part.rows == n * part.a.shape[-2]


def test_reduce_sums_inputs_and_averages_gradients_over_positions() -> None:
    model, x = flatten(nn.Linear(4, 3)), torch.randn(N, 6, 4)
    record, layers = recorded(model, x, torch.randn_like(model(x)))
    layer, whole = layers["0"], captured(record, layers["0"])
    (reduced,) = record.captures(layer, "reduce")
    assert_equal(reduced.a, whole.a.sum(1, keepdim=True))
    assert_equal(reduced.g, whole.g.mean(1, keepdim=True))
    assert (reduced.rows, reduced.count) == (N, whole.count)


# Coverage.


class Renamed(nn.Linear):
    """Another name for the same."""


class Doubled(nn.Linear):
    """What is added to the layer's output does not change what the layer is."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Standardised(nn.Conv1d):
    """A convolution with a weight of mean 0."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2), keepdim=True)
        return F.conv1d(x, weight, self.bias, self.stride, self.padding)


class Offset(nn.LayerNorm):
    """A norm whose scale is 1 + w, as in Gemma."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, 1 + self.weight, self.bias, self.eps)


def test_what_a_subclass_computes_decides() -> None:
    cases: list[tuple[nn.Module, tuple[int, ...]]] = [
        (Renamed(4, 3), (6, 4)), (Doubled(4, 3), (6, 4)), (randomised(Offset(4)), (6, 4)),
    ]  # fmt: skip
    for module, shape in cases:
        model, x = flatten(module), torch.randn(N, *shape)
        assert_per_example_gradients(model, x, torch.randn_like(model(x)))


def test_a_forward_that_was_replaced_is_what_counts() -> None:
    linear, x = nn.Linear(4, 3), torch.randn(N, 6, 4)
    model = flatten(linear)
    vars(linear)["forward"] = lambda x: F.linear(3 * x, -linear.weight, linear.bias)
    assert_per_example_gradients(model, x, torch.randn_like(model(x)))
    record, layers = recorded(model, x)
    assert list(layers) == ["0", "0.bias"]  # of factors -1 and 1
    assert_equal(captured(record, layers["0"]).a, 3 * x)


def test_a_standardised_weight_is_left_out_with_the_reason_and_its_bias_is_not() -> None:
    model, x = flatten(Standardised(2, 3, 3)), torch.randn(N, 2, 6)
    found = look(model, (x,)).coverage()
    assert list(found.layers) == ["0.bias"]
    assert set(found.uncovered) == {"0.weight"} and "mean" in found.uncovered["0.weight"]


class Sundry(nn.Module):
    """Parameters that are used in every way that there is."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.act, self.embed = nn.Linear(4, 4), nn.PReLU(4), nn.Embedding(3, 4)
        self.left_out, self.unused, self.frozen = (
            nn.Linear(4, 4),
            nn.Linear(4, 4),
            nn.Linear(4, 4).requires_grad_(False),
        )
        self.power, self.wasted = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        self.wasted.exp()
        x = self.act(self.read(x)) + self.embed.weight[0]
        return self.frozen(self.left_out(x) * self.power.exp()) @ self.embed.weight.T


def test_every_parameter_is_covered_or_has_a_reason() -> None:
    model, x = Sundry(), torch.randn(N, 4)
    found = look(model, (x,), exclude=["left_out"]).coverage()
    assert found.uncovered == {
        "power": "used by exp: no rule",
        "wasted": "used by exp: no rule",
        "embed.weight": "used whole and in parts, or in two ways that have no common block",
        "left_out.weight": "excluded",
        "left_out.bias": "excluded",
        "unused.weight": "not used in what was seen",
        "unused.bias": "not used in what was seen",
    }
    assert list(found.layers) == ["read", "act"]
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    covered = {id(p) for layer in found.layers.values() for p in layer.parameters}
    assert covered | {id(model.get_parameter(name)) for name in found.uncovered} == trained


def test_what_is_expected_before_a_pass_is_what_a_pass_finds() -> None:
    for make, shape in LAYERS.values():
        model = flatten(make())
        found, before = look(model, (torch.randn(N, *shape),)).coverage(), expected(model)
        assert before.expected and not found.expected
        if isinstance(model[0], Conv1D):  # its bias is added by hand
            assert list(before.layers) == ["0"] and list(found.layers) == ["0", "0.bias"]
            continue
        assert list(before.layers) == list(found.layers) == ["0"] and not before.uncovered
        assert before.layers["0"].shape == found.layers["0"].shape
