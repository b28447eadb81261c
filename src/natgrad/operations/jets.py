"""The rule of dense layers on jets."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from natgrad.jets import jet_linear
from natgrad.layers.product import JetProduct
from natgrad.operations.registry import rule
from natgrad.operations.watch import Watch


@rule(jet_linear)
def jets(watch: Watch, func: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """W x at every position, plus b at the first."""
    return watch.product(JetProduct(), weight, bias, input, lambda w, b: func(input, w, b), operation="jet_linear")
