"""What a model does with its parameters, from one pass without data."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.func import functional_call
from torch.utils._pytree import tree_leaves, tree_map

from natgrad.hooks import as_written
from natgrad.layers import WIDE, Inventory
from natgrad.operations import Watch, whole
from natgrad.sorting import learn

if TYPE_CHECKING:
    from torch._subclasses.fake_tensor import FakeTensorMode

_LOG = logging.getLogger("torch._subclasses.fake_tensor")  # which shouts at what is tried here


def look(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    exclude: Sequence[str] = (),
    wide: int | None = WIDE,
    method: str = "forward",
) -> Inventory:
    """The inventory of ``model`` after one pass on tensors without data, or on real ones where the model reads values.

    Parameters, buffers and random numbers are as before.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode  # seconds, in some versions of torch

    inventory = Inventory(model, tuple(exclude), wide)
    kwargs = dict(kwargs or {})
    quiet = _LOG.disabled
    try:
        with warnings.catch_warnings(), FakeTensorMode(allow_non_fake_inputs=True) as fake:
            warnings.simplefilter("ignore")  # of torch, which looks at gradients
            _LOG.disabled = True
            places, names = tree_map(lambda x: _faked(fake, x), (tuple(args), kwargs))
            _pass(inventory, method, places, names, fake)
    except Exception:  # of a model that reads values
        inventory = Inventory(model, tuple(exclude), wide)
        with torch.random.fork_rng():
            _pass(inventory, method, tuple(args), kwargs, None)
    finally:
        _LOG.disabled = quiet
    return inventory


def _pass(
    inventory: Inventory, method: str, args: tuple[Any, ...], kwargs: dict[str, Any], fake: FakeTensorMode | None
) -> None:
    model = inventory.model
    stand = {name: _stand_in(p, fake) for name, p in inventory.parameters.items()}
    places = {id(p): stand[name] for name, p in inventory.parameters.items()}
    every = {}
    for path, module in model.named_modules():  # every module once, also where it has several names
        prefix = f"{path}." if path else ""
        for name, x in [*module._parameters.items(), *module._buffers.items()]:
            if x is not None:
                if id(x) not in places:
                    places[id(x)] = x.clone() if fake is None else _faked(fake, x)
                every[prefix + name] = places[id(x)]
    watched = {id(p) for p in inventory.watched}
    pairs = ((x, inventory.parameters[name]) for name, x in stand.items())
    watch = Watch(whole({x: p for x, p in pairs if id(p) in watched}))
    with torch.enable_grad(), as_written(), _renamed(model, method) as called, watch:
        output = functional_call(called, every, args, kwargs, tie_weights=False)
    learn(inventory, watch, _reached(watch, output), watch.calls)


def _stand_in(p: nn.Parameter, fake: FakeTensorMode | None) -> Tensor:
    return p if fake is None else fake.from_tensor(p.detach()).requires_grad_(p.requires_grad)


def _faked(fake: FakeTensorMode, x: Any) -> Any:
    return fake.from_tensor(x) if isinstance(x, Tensor) else x


def _reached(watch: Watch, output: Any) -> set[int]:
    """Which operations without a rule the output depends on."""
    strays = {k: get_gradient_edge(y) for k, (_, _, y) in enumerate(watch.strays) if y is not None}
    heads = [x for x in tree_leaves(output) if isinstance(x, Tensor) and x.requires_grad]
    if not strays or not heads:
        return set()
    seeds = [torch.ones_like(x) for x in heads]
    gradients = torch.autograd.grad(heads, list(strays.values()), seeds, allow_unused=True)
    return {k for k, gradient in zip(strays, gradients, strict=True) if gradient is not None}


@contextmanager
def _renamed(model: nn.Module, method: str) -> Iterator[nn.Module]:
    """The model, one of whose methods is called in place of its forward."""
    if method == "forward":
        yield model
        return
    vars(model)["forward"] = getattr(model, method)
    try:
        yield model
    finally:
        del vars(model)["forward"]
