"""foveal: trainable sparse attention for video diffusion transformers (SLA and VSA).

Needs torch alone; diffusers and the rest load when something that uses them is called.
"""

from foveal import models as models  # diffusers loads a saved sparse model from it, if it was imported
from foveal.block_sparse.api import block_sparse_attention
from foveal.cost import attention_cost
from foveal.integrations import (
    Policy,
    context_parallel_attention,
    dense,
    densify,
    export_checkpoint,
    get_policy,
    load,
    load_checkpoint,
    reconfigure,
    save,
    set_policy,
    sparse_parameters,
    sparsify,
    summary,
    unfreeze,
)
from foveal.selection import select_blocks
from foveal.sla.attention import SparseLinearAttention, sla_attention
from foveal.types import BlockSelection, SLAConfig, VSAConfig
from foveal.video_grid import VideoGrid
from foveal.vsa.attention import VideoSparseAttention, vsa_attention

__version__ = "0.1.0"

__all__ = [
    "BlockSelection",
    "Policy",
    "SLAConfig",
    "SparseLinearAttention",
    "VSAConfig",
    "VideoGrid",
    "VideoSparseAttention",
    "attention_cost",
    "block_sparse_attention",
    "context_parallel_attention",
    "dense",
    "densify",
    "export_checkpoint",
    "get_policy",
    "load",
    "load_checkpoint",
    "reconfigure",
    "save",
    "select_blocks",
    "set_policy",
    "sla_attention",
    "sparse_parameters",
    "sparsify",
    "summary",
    "unfreeze",
    "vsa_attention",
]
