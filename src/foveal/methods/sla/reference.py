"""Sparse-linear attention as in the paper (SLA, arXiv 2509.24006, section 3): the oracle for the fused code.

    O^s = softmax over the critical blocks' keys                                                          (eq. 4)
    O^l = phi(Q) H / (phi(Q) Z + 1e-5),  H = sum of phi(K_j)^T V_j,  Z = sum of rowsum(phi(K_j)^T)        (eq. 5)
          over the marginal blocks j; written here with its token weights phi(Q) phi(K)^T, which is the same
    O   = O^s + O^l W^T + b                                                                               (eq. 6)

With precision="int8" O^s is that of queries and keys after a round trip through eight bits (`foveal.kernels.int8`).
With tail="pooled" O^s is one softmax over the critical blocks' keys and, for each other block of n valid keys, n copies
of the mean of its keys with the mean of its values.

Any floating dtype, dense memory, differentiated by autograd. Suffixes give shapes: B, H, M = Lq, N = Lk, D,
F = D_phi, T = Tk.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from foveal.blocks import BlockSelection
from foveal.kernels.int8 import dequantized, lse_shift
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
    if config.tail == "pooled":
        sparse_BHMD = _softmax_with_tail(query_BHMD, key_BHND, value_BHND, selection, scale, config.precision)
    else:
        read = (query_BHMD, key_BHND) if config.precision == "input" else dequantized(query_BHMD, key_BHND, selection)
        sparse_BHMD, _ = block_sparse_attention_reference(*read, value_BHND, selection, scale)
    if config.linear_scope == "none":
        return sparse_BHMD.to(query_BHMD.dtype)

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


def _softmax_with_tail(
    query_BHMD: Tensor,
    key_BHND: Tensor,
    value_BHND: Tensor,
    selection: BlockSelection,
    scale: float,
    precision: str,
) -> Tensor:
    dtype = torch.promote_types(query_BHMD.dtype, torch.float32)
    key_BHND, value_BHND = (torch.where(selection.key_valid()[:, None, :, None], x, 0) for x in (key_BHND, value_BHND))
    block_N = torch.arange(selection.key_length, device=key_BHND.device) // selection.block_k
    member_BTN = block_N == torch.arange(selection.num_key_blocks, device=key_BHND.device)[:, None]
    member_BTN = (member_BTN & selection.key_valid()[:, None]).to(dtype)
    count_BT = member_BTN.sum(-1)
    mean_BHTN = (member_BTN / count_BT.clamp(min=1)[..., None])[:, None]
    mean_key_BHTD, mean_value_BHTD = mean_BHTN @ key_BHND.to(dtype), mean_BHTN @ value_BHND.to(dtype)

    read_BHMN = selection.expand(selection.critical_mask())
    if precision == "int8":
        rounded_BHMD, rounded_BHND = dequantized(query_BHMD, key_BHND, selection)
        scores_BHMN = rounded_BHMD @ rounded_BHND.transpose(-1, -2) * scale
        scores_BHMN += lse_shift(query_BHMD, key_BHND, selection, scale)[..., None]
    else:
        scores_BHMN = (query_BHMD @ key_BHND.transpose(-1, -2) * scale).to(dtype)
    scores_BHMN = scores_BHMN.masked_fill(~read_BHMN, -math.inf)
    unread_BHMT = ~selection.critical_mask().repeat_interleave(selection.block_q, 2)[:, :, : selection.query_length]
    tail_BHMT = query_BHMD.to(dtype) @ mean_key_BHTD.transpose(-1, -2) * scale + count_BT.log()[:, None, None]
    tail_BHMT = tail_BHMT.masked_fill(~unread_BHMT, -math.inf)
    probs_BHMX = torch.softmax(torch.cat((scores_BHMN, tail_BHMT), -1), -1)
    return probs_BHMX @ torch.cat((value_BHND.to(dtype), mean_value_BHTD), 2)
