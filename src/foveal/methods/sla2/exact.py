"""SLA2 without its linear branch, in PyTorch: attention over the blocks that the router chooses, and its gradient.

    O = softmax(q K^T * scale) V over the keys of the critical blocks

The output is that of `block_sparse_attention`. The choice has its gradient from `foveal.methods.routing`.
"""

from __future__ import annotations

from torch import Tensor

from foveal.blocks import BlockSelection
from foveal.kernels.api import block_sparse_attention
from foveal.kernels.values import Problem
from foveal.methods.routing import Ranked, with_choice
from foveal.methods.sla2.config import SLA2Config


def sla2_attention_exact(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    config: SLA2Config,
    selection: BlockSelection,
    scale: float,
    ranked: Ranked | None,
) -> Tensor:
    """O, [B, H, Lq, D], differentiable, in the scores of `ranked` too."""
    how = {"scale": scale, "impl": "torch", "precision": config.precision}
    if ranked is None:
        return block_sparse_attention(query, key, value, selection, **how)
    output, lse = block_sparse_attention(query, key, value, selection, return_lse=True, **how)
    return with_choice(output, lse, ranked, Problem(query, key, value, selection, scale))
