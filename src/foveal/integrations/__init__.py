"""Sparse attention inside models and pipelines: one call to put it in, one to take it out, one file to keep it."""

from foveal.integrations.checkpoints import export_checkpoint, load_checkpoint
from foveal.integrations.context_parallel import context_parallel_attention
from foveal.integrations.overview import summary
from foveal.integrations.parameters import quantizable, sparse_parameters, unfreeze
from foveal.integrations.persist import load, save
from foveal.integrations.policy import Policy, get_policy, set_policy
from foveal.integrations.processor import dense, densify, sparsify
from foveal.integrations.reconfigure import reconfigure

__all__ = [
    "Policy",
    "context_parallel_attention",
    "dense",
    "densify",
    "export_checkpoint",
    "get_policy",
    "load",
    "load_checkpoint",
    "quantizable",
    "reconfigure",
    "save",
    "set_policy",
    "sparse_parameters",
    "sparsify",
    "summary",
    "unfreeze",
]
