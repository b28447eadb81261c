"""Races: one task trained with several optimizers side by side, under the same rules for all of them."""
