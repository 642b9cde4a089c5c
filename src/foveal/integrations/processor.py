"""The former address of what `foveal.models` has now."""

from foveal.models.convert import dense, densify, sparsify
from foveal.models.processor import SparseAttentionProcessor, sparse_processors, state_of
from foveal.models.state import ForwardState, Phase

__all__ = [
    "ForwardState",
    "Phase",
    "SparseAttentionProcessor",
    "dense",
    "densify",
    "sparse_processors",
    "sparsify",
    "state_of",
]
