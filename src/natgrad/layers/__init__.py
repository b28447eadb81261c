"""How operations use weights, and the layers of a model that follow from the uses that were seen."""

from natgrad.layers.expected import expected
from natgrad.layers.form import Form, form
from natgrad.layers.inventory import WIDE, Fact, Inventory, Place, check_wide
from natgrad.layers.layer import Coverage, Layer
from natgrad.layers.view import View

__all__ = [
    "WIDE", "Coverage", "Fact", "Form", "Inventory", "Layer", "Place", "View", "check_wide", "expected", "form",
]  # fmt: skip
