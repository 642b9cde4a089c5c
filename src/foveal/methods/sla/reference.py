"""Sparse-linear attention as in the paper (SLA, arXiv 2509.24006, section 3): the oracle for the fused code.

    O^s = softmax over the critical blocks' keys                                                          (eq. 4)
    O^l = phi(Q) H / (phi(Q) Z + 1e-5),  H = sum of phi(K_j)^T V_j,  Z = sum of rowsum(phi(K_j)^T)        (eq. 5)
          over the marginal blocks j; written here with its token weights phi(Q) phi(K)^T, which is the same
    O   = O^s + O^l W^T + b                                                                               (eq. 6)

Any floating dtype, dense memory, differentiated by autograd. Suffixes give shapes: B, H, M = Lq, N = Lk, D, F = D_phi.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from foveal.blocks import BlockSelection
from foveal.kernels.reference import block_sparse_attention_reference
from foveal.methods.sla.config import SLAConfig
from foveal.methods.sla.feature_maps import apply_feature_map

EPSILON = 1e-5


def sla_attention_reference(
    query_BHMD: Tensor,
    key_BHND: Tensor,
    value_BHND: Tensor,
    *,
    config: SLAConfig,
    selection: BlockSelection,
    scale: float,
    proj_weight_DD: Tensor | None = None,
    proj_bias_D: Tensor | None = None,
    feature_weight_DD: Tensor | None = None,
) -> Tensor:
    """The output [B, H, Lq, D], with tokens in the order in which the selection's blocks are cut."""
    sparse_BHMD, _ = block_sparse_attention_reference(query_BHMD, key_BHND, value_BHND, selection, scale)
    if config.linear_scope == "none":
        return sparse_BHMD

    blocks = selection.linear_mask(config.linear_scope)
    if blocks is None:
        blocks = torch.ones_like(selection.critical_mask())
    summed_BHMN = selection.expand(blocks)
    key_BHND, value_BHND = (torch.where(selection.key_valid()[:, None, :, None], x, 0) for x in (key_BHND, value_BHND))

    phi_query_BHMF = apply_feature_map(query_BHMD, config.feature_map, feature_weight_DD)
    phi_key_BHNF = apply_feature_map(key_BHND, config.feature_map, feature_weight_DD)
    weights_BHMN = torch.where(summed_BHMN, phi_query_BHMF @ phi_key_BHNF.transpose(-1, -2), 0)
    total_BHM1 = weights_BHMN.sum(-1, keepdim=True)
    linear_BHMD = weights_BHMN @ value_BHND.to(weights_BHMN.dtype) / (total_BHM1 + EPSILON)

    if proj_weight_DD is not None:
        dtype = linear_BHMD.dtype
        bias_D = None if proj_bias_D is None else proj_bias_D.to(dtype)
        linear_BHMD = F.linear(linear_BHMD, proj_weight_DD.to(dtype), bias_D)
    return (sparse_BHMD + linear_BHMD).to(query_BHMD.dtype)
