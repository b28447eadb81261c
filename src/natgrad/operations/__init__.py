"""Which operations on weights are understood: a function mode that sees them, and a rule for each."""

from natgrad.operations import attention, convolutions, elementwise, jets, lookups, products, recurrent, user_hooks
from natgrad.operations.call import Call, Operand
from natgrad.operations.operands import whole
from natgrad.operations.registry import RULES, Rule, rule, spelled
from natgrad.operations.watch import Watch, stand_for, unseen

__all__ = [
    "RULES",
    "Call",
    "Operand",
    "Rule",
    "Watch",
    "attention",
    "convolutions",
    "elementwise",
    "jets",
    "lookups",
    "products",
    "recurrent",
    "rule",
    "user_hooks",
    "spelled",
    "stand_for",
    "unseen",
    "whole",
]
