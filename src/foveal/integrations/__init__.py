"""Sparse attention inside models and pipelines: one call to put it in, one to take it out, one file to keep it."""

from foveal.integrations.overview import summary
from foveal.integrations.persist import load, save
from foveal.integrations.processor import dense, densify, sparsify

__all__ = ["dense", "densify", "load", "save", "sparsify", "summary"]
