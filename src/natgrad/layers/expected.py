"""What a model is expected to do with its parameters, by the classes of its modules; what it does, a pass shows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from natgrad.jets import JetLinear
from natgrad.layers.convolution import Convolution, TransposedConvolution
from natgrad.layers.form import Form
from natgrad.layers.inventory import WIDE, Fact, Inventory, Place
from natgrad.layers.layer import Coverage
from natgrad.layers.lookup import BagLookup, Lookup
from natgrad.layers.product import LINEAR, JetProduct, Product
from natgrad.layers.view import View

_NORMS = (_NormBase, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)
_RECURRENT = (nn.RNNBase, nn.RNNCellBase)


def expected(model: nn.Module, exclude: Sequence[str] = (), wide: int | None = WIDE) -> Coverage:
    """The layers that the modules of torch in ``model``, subclasses included, usually are."""
    inventory = Inventory(model, exclude, wide)
    facts = (fact for module in model.modules() for fact in _facts(inventory, module))
    inventory.add(fact for fact in facts if not inventory.excluded(fact.weight.parameter))
    found = inventory.coverage()
    reasons = {
        name: why if why in ("excluded", "complex") else "known after a pass" for name, why in found.uncovered.items()
    }
    return Coverage(found.layers, reasons, expected=True)


def _facts(inventory: Inventory, module: nn.Module) -> Iterator[Fact]:
    own = {name: p for name, p in module._parameters.items() if p is not None}
    kind = type(module).__name__

    def place(name: str, rows: slice | None = None) -> Place | None:
        if name not in own:
            return None
        p, view = own[name], View.whole(own[name])
        if rows is not None:
            view = View((rows.stop - rows.start, *view.size[1:]), view.stride, rows.start * view.stride[0])
        return Place(inventory.name(p), view)

    if isinstance(module, nn.MultiheadAttention):
        for k, letter in enumerate("qkv"):
            rows = slice(k * module.embed_dim, (k + 1) * module.embed_dim)
            packed = place("in_proj_weight", rows) if "in_proj_weight" in own else None
            weight = packed or place(f"{letter}_proj_weight")
            if weight:
                yield Fact(weight, place("in_proj_bias", rows), LINEAR, kind, letter)
    elif isinstance(module, _RECURRENT):
        for name in own:
            if name.startswith("weight_"):
                weight = place(name)
                assert weight is not None
                yield Fact(weight, place(name.replace("weight_", "bias_")), LINEAR, kind)
    elif (form := _form(module)) is not None and (weight := place("weight")):
        yield Fact(weight, place("bias"), form, kind)


def _form(module: nn.Module) -> Form | None:
    if isinstance(module, JetLinear):
        return JetProduct()
    if isinstance(module, nn.Linear):
        return LINEAR
    if f"{type(module).__module__}.{type(module).__qualname__}" == "transformers.pytorch_utils.Conv1D":
        return Product(outs=(1,), ins=(0,))
    if isinstance(module, nn.Bilinear):
        return Product((), (0,), (1, 2))
    if isinstance(module, _ConvNd):
        return _convolution(module)
    if isinstance(module, _NORMS) and isinstance(module.weight, nn.Parameter):
        return Product(groups=tuple(range(module.weight.ndim)), outs=(), ins=())
    if isinstance(module, nn.Embedding) and not module.scale_grad_by_freq:
        return Lookup(module.num_embeddings, module.padding_idx)
    if isinstance(module, nn.EmbeddingBag) and module.mode != "max" and not module.scale_grad_by_freq:
        return BagLookup(module.num_embeddings, module.padding_idx)
    if isinstance(module, nn.PReLU):
        return Product(groups=(0,), outs=(), ins=())
    return None


def _convolution(module: _ConvNd) -> Convolution:
    sides: Any = module.padding if not isinstance(module.padding, str) else (0,) * len(module.kernel_size)
    padding = tuple((p, p) for p in sides)
    sizes = (module.kernel_size, module.stride, padding, module.dilation, module.groups)
    if isinstance(module, _ConvTransposeNd):
        return TransposedConvolution(*sizes, tuple(module.output_padding))
    return Convolution(*sizes)
