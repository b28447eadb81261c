"""Reconstruction: train plain SGD in coordinates in which it is the natural gradient."""

from natgrad.reconstruction.fisher_layer import FisherLayer
from natgrad.reconstruction.verbs import reconstruct, refresh, restore

__all__ = ["FisherLayer", "reconstruct", "refresh", "restore"]
