"""foveal: trainable sparse attention for video diffusion transformers (SLA and VSA).

It needs only torch. diffusers and the rest load when a function that uses them is called.
"""

from foveal import models as models  # diffusers loads a saved sparse model from this module if it was imported
from foveal.blocks import BlockSelection
from foveal.hosts import patch
from foveal.kernels.api import block_sparse_attention, select_blocks
from foveal.layout import TokenLayout, VideoGrid
from foveal.methods.cost import attention_cost
from foveal.methods.explain import Explanation, explain
from foveal.methods.sla.attention import SparseLinearAttention, sla_attention
from foveal.methods.sla.config import SLAConfig
from foveal.methods.sla2.attention import RoutedSparseLinearAttention, sla2_attention
from foveal.methods.sla2.config import SLA2Config
from foveal.methods.sla_vsa.attention import SparseLinearVideoAttention, sla_vsa_attention
from foveal.methods.sla_vsa.config import SLAVSAConfig
from foveal.methods.vsa.attention import VideoSparseAttention, vsa_attention
from foveal.methods.vsa.config import VSAConfig
from foveal.models import (
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
from foveal.models.report import Report, report, set_on_fallback

__version__ = "0.1.0"

__all__ = [
    "BlockSelection",
    "Explanation",
    "Policy",
    "Report",
    "RoutedSparseLinearAttention",
    "SLA2Config",
    "SLAConfig",
    "SLAVSAConfig",
    "SparseLinearAttention",
    "SparseLinearVideoAttention",
    "TokenLayout",
    "VSAConfig",
    "VideoGrid",
    "VideoSparseAttention",
    "attention_cost",
    "block_sparse_attention",
    "context_parallel_attention",
    "dense",
    "densify",
    "explain",
    "export_checkpoint",
    "get_policy",
    "load",
    "load_checkpoint",
    "patch",
    "reconfigure",
    "report",
    "save",
    "select_blocks",
    "set_on_fallback",
    "set_policy",
    "sla2_attention",
    "sla_attention",
    "sla_vsa_attention",
    "sparse_parameters",
    "sparsify",
    "summary",
    "unfreeze",
    "vsa_attention",
]
