"""Which layers are understood, and how: one adapter per kind of layer."""

from natgrad.layers.base import Adapter
from natgrad.layers.covering import WIDE, check_wide, cover
from natgrad.layers.functional import Exposed
from natgrad.layers.layer import Coverage, Layer
from natgrad.layers.registry import RULES, adapter_of, register, unregister

__all__ = [
    "RULES",
    "WIDE",
    "Adapter",
    "Coverage",
    "Exposed",
    "Layer",
    "adapter_of",
    "check_wide",
    "cover",
    "register",
    "unregister",
]
