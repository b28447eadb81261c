from itertools import pairwise

import pytest
import torch
from torch import nn

from natgrad.layers import expected
from natgrad.look import look
from natgrad.race import networks
from natgrad.race.tasks import FACES, RELU, TASKS
from natgrad.race.transformer import Transformer

PADDING = 0


@pytest.fixture
def small() -> Transformer:
    torch.manual_seed(0)
    return Transformer(words=11, padding=PADDING, width=8, heads=2, layers=1, hidden=12).eval()


def shapes(model: nn.Module) -> list[tuple[int, int]]:
    return [(m.in_features, m.out_features) for m in model.modules() if isinstance(m, nn.Linear)]


def test_the_published_auto_encoder_has_relu_after_all_layers_but_the_last() -> None:
    layers = list(RELU(*FACES))
    assert shapes(RELU(*FACES)) == list(pairwise([625, 2000, 1000, 500, 30, 500, 1000, 2000, 625]))
    assert [type(m) for m in layers] == [nn.Linear, nn.ReLU] * 7 + [nn.Linear]
    assert all((m.bias == 0.01).all() for m in layers if isinstance(m, nn.Linear))


def test_the_tanh_auto_encoder_has_a_linear_code() -> None:
    layers = list(networks.autoencoder(9, 5, 2))
    assert [type(m) for m in layers] == [nn.Linear, nn.Tanh, nn.Linear, nn.Linear, nn.Tanh, nn.Linear]


def test_the_deep_linear_network_has_64_layers_and_no_activation() -> None:
    model = networks.deep_linear(784, 10, depth=64)
    assert shapes(model) == [(784, 10)] + [(10, 10)] * 63
    assert {type(m) for m in model} == {nn.Linear, nn.BatchNorm1d} and len(model) == 127
    assert model(torch.randn(4, 784)).shape == (4, 10)


def test_resnet18_is_the_standard_one_for_small_images() -> None:
    model = networks.resnet18(3)
    assert sum(p.numel() for p in model.parameters()) == 11_173_962
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == 17 + 3, "three shortcuts beside the 17 of the name"
    assert sum(m.stride == (2, 2) for m in convolutions) == 3 + 3
    narrow = networks.resnet18(3, width=16)
    assert narrow[:-3](torch.randn(2, 3, 32, 32)).shape == (2, 128, 4, 4)
    assert narrow(torch.randn(2, 3, 32, 32)).shape == (2, 10)


def test_a_residual_block_with_silent_branch_is_its_shortcut() -> None:
    block = networks.Basic(4, 4, 1).eval()
    nn.init.zeros_(block.conv2.weight)
    x = torch.randn(2, 4, 5, 5)
    assert torch.equal(block(x), x.relu())


def test_a_word_depends_on_no_later_word_of_the_target(small: Transformer) -> None:
    x = torch.randint(1, 11, (3, 2, 6))
    other = x.clone()
    other[:, 1, 4:] = 1 + other[:, 1, 4:] % 10
    before, after = small(x), small(other)
    assert torch.equal(before[:, :4], after[:, :4]) and not torch.allclose(before[:, 4:], after[:, 4:])


def test_a_word_depends_on_the_source_but_not_on_its_padding(small: Transformer) -> None:
    x = torch.randint(1, 11, (3, 2, 6))
    wider = torch.nn.functional.pad(x, (0, 3), value=PADDING)
    torch.testing.assert_close(small(wider)[:, :6], small(x))
    other = x.clone()
    other[:, 0, -1] = 1 + other[:, 0, -1] % 10
    assert not torch.allclose(small(other), small(x))


def test_natural_gradients_cover_all_of_the_transformer(small: Transformer) -> None:
    norms = sum(isinstance(module, torch.nn.LayerNorm) for module in small.modules())
    for found in (look(small, (torch.randint(1, 11, (3, 2, 6)),)).coverage(), expected(small)):
        assert not found.uncovered
        tables = [layer for layer in found.layers.values() if layer.kind == "tokens"]
        assert len(tables) == sum(isinstance(module, torch.nn.Embedding) for module in small.modules()) > 0
        assert len(found.layers) == 6 + 10 + 1 + norms + len(tables)
        assert all(len(x.parameters) == (1 if x in tables else 2) for x in found.layers.values())


def test_all_tasks_have_a_name_of_their_own() -> None:
    assert all(name == task.name for name, task in TASKS.items())
