"""SLA2 as in the paper (arXiv 2602.12675, sections 3 and 4): the oracle for the fused code.

    O_s = softmax over the keys of the critical blocks                                                    (eq. 14)
    O_l = norm(phi(Q) phi(K)^T) V over the keys of all other blocks                                       (eq. 14)
    O   = alpha O_s + (1 - alpha) O_l, alpha = sigmoid(logit) of a head and a run of query blocks         (eq. 13)

With linear_scope="none" there is no O_l, and alpha is 1.

With precision="int8" O_s is that of queries and keys after a round trip through eight bits (`foveal.kernels.int8`).

routing="soft" has that soft mask in the forward: weights exp(s_ij) m_ij in O_s, and (1 - m_ij) phi(q_i) phi(k_j) in
O_l.

alpha is the share of a row's attention that falls on its critical blocks (eq. 7), so it is 1 where there are no others,
and 0 where there are none.

The router scores blocks by proj_q(pool(Q)) proj_k(pool(K))^T / sqrt(D) (eq. 16, Algorithm 2). For its gradient the mask
is hard + soft - (soft without gradient), with soft = sigmoid(score / tau + lambda) and lambda such that a row sums to
what it keeps (eq. 17). Of the change D that a block makes in a row's output, if it is read exactly and not linearly,
the exact part takes the block as a token of its mean key and mean value that counts as often as it has tokens.

Any floating dtype, dense memory, differentiated by autograd. Suffixes give shapes: B, H, M = Lq, N = Lk, D, S = query
blocks, T = key blocks, C = those of them that the router ranks (the first ones), R values of alpha per head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from foveal.blocks import BlockSelection, pool_blocks
from foveal.kernels.int8 import dequantized, lse_shift
from foveal.kernels.reference import block_sparse_attention_reference
from foveal.methods.sla.feature_maps import apply_feature_map
from foveal.methods.sla2.config import SLA2Config

EPSILON = 1e-5


def sla2_attention_reference(
    query_BHMD: Tensor,
    key_BHND: Tensor,
    value_BHND: Tensor,
    *,
    config: SLA2Config,
    selection: BlockSelection,
    scale: float,
    alpha_logits_HR: Tensor,
    ranked_BC: Tensor | None = None,
    proj_query_DD: Tensor | None = None,
    proj_key_DD: Tensor | None = None,
) -> Tensor:
    """The output [B, H, Lq, D], with tokens in the order in which the selection's blocks are cut.

    ranked_BC: bool [B or 1, C], the key blocks that the router could have kept; None without a gradient for it.
    proj_query_DD, proj_key_DD: also [H, D, D].
    """
    if config.routing == "soft":
        scores_BHST = _router_scores(query_BHMD, key_BHND, selection, ranked_BC, proj_query_DD, proj_key_DD, scale)
        weighed = query_BHMD, key_BHND, value_BHND, config, selection, scale, alpha_logits_HR
        return _soft_reference(*weighed, ranked_BC, scores_BHST)
    read, shift_BHM = (query_BHMD, key_BHND), 0
    if config.precision == "int8":
        read = dequantized(query_BHMD, key_BHND, selection)
        shift_BHM = lse_shift(query_BHMD, key_BHND, selection, scale)
    sparse_BHMD, lse_BHM = block_sparse_attention_reference(*read, value_BHND, selection, scale)
    lse_BHM = lse_BHM + shift_BHM
    dtype = torch.promote_types(query_BHMD.dtype, torch.float32)
    critical_BHST, linear_BHST = selection.critical_mask(), _linear_mask(selection, config)
    critical_BHMN, linear_BHMN = selection.expand(critical_BHST), selection.expand(linear_BHST)
    valid_BHND = selection.key_valid()[:, None, :, None]
    key_BHND, value_BHND = (torch.where(valid_BHND, x, 0).to(dtype) for x in (key_BHND, value_BHND))

    phi_query_BHMD = apply_feature_map(query_BHMD, config.feature_map)
    phi_key_BHND = apply_feature_map(key_BHND, config.feature_map)
    weights_BHMN = torch.where(linear_BHMN, phi_query_BHMD @ phi_key_BHND.transpose(-1, -2), 0)
    total_BHM1 = weights_BHMN.sum(-1, keepdim=True) + EPSILON
    linear_BHMD = weights_BHMN @ value_BHND / total_BHM1

    block_M = torch.arange(selection.query_length, device=query_BHMD.device) // selection.block_q
    row_M = block_M * alpha_logits_HR.shape[1] // selection.num_query_blocks
    alpha_BHM1 = torch.sigmoid(alpha_logits_HR.to(dtype))[:, row_M, None]
    alpha_BHM1 = torch.where(critical_BHMN.any(-1, keepdim=True), alpha_BHM1, 0)
    alpha_BHM1 = torch.where(linear_BHMN.any(-1, keepdim=True), alpha_BHM1, 1)
    output_BHMD = alpha_BHM1 * sparse_BHMD + (1 - alpha_BHM1) * linear_BHMD
    if ranked_BC is None:
        return output_BHMD.to(query_BHMD.dtype)

    # What follows is zero, and has a gradient for the projections.
    ranked = ranked_BC.shape[1]
    block_N = torch.arange(selection.key_length, device=key_BHND.device) // selection.block_k
    member_BTN = (torch.arange(ranked, device=key_BHND.device)[:, None] == block_N) & selection.key_valid()[:, None]
    member_BTN = member_BTN[:, None].to(dtype)
    size_BT1 = member_BTN.sum(-1, keepdim=True)
    row_SM = (torch.arange(selection.num_query_blocks, device=block_M.device)[:, None] == block_M).to(dtype)
    with torch.no_grad():
        mean_key_BHTD, mean_value_BHTD = (member_BTN @ x / size_BT1.clamp(min=1) for x in (key_BHND, value_BHND))
        mean_query_BHSD = row_SM @ query_BHMD.to(dtype) / row_SM.sum(-1, keepdim=True)
        log_share_BHMT = query_BHMD.to(dtype) @ mean_key_BHTD.transpose(-1, -2) * scale + size_BT1.log().mT
        log_share_BHMT = torch.where(size_BT1.mT > 0, log_share_BHMT - lse_BHM[..., None], -torch.inf)
        read_BHMT = critical_BHST[:, :, block_M, :ranked]
        share_BHMT = torch.where(read_BHMT, log_share_BHMT.clamp(max=0).exp(), torch.sigmoid(log_share_BHMT))
        exact_BHMTD = share_BHMT[..., None] * (mean_value_BHTD[:, :, None] - sparse_BHMD[..., None, :])
        state_BHTDD = (member_BTN[..., None] * phi_key_BHND[:, :, None]).mT @ value_BHND[:, :, None]
        sums_BHTD = member_BTN @ phi_key_BHND
        linear_BHMTD = torch.einsum("bhmd,bhtde->bhmte", phi_query_BHMD, state_BHTDD)
        normalizer_BHMT = phi_query_BHMD @ sums_BHTD.mT
        linear_BHMTD = linear_BHMTD - normalizer_BHMT[..., None] * linear_BHMD[..., None, :]
        change_BHMTD = alpha_BHM1[..., None] * exact_BHMTD - ((1 - alpha_BHM1) / total_BHM1)[..., None] * linear_BHMTD
    scores_BHST = (mean_query_BHSD @ proj_query_DD.to(dtype).mT) @ (mean_key_BHTD @ proj_key_DD.to(dtype).mT).mT * scale
    kept_BHST = critical_BHST[..., :ranked] & ranked_BC[:, None, None]
    soft_BHST = soft_top_k(
        scores_BHST.masked_fill(~ranked_BC[:, None, None], -torch.inf), kept_BHST, config.temperature
    )
    moved_BHST = soft_BHST - soft_BHST.detach()
    output_BHMD = output_BHMD + torch.einsum("bhmt,bhmtd->bhmd", moved_BHST[:, :, block_M], change_BHMTD)
    return output_BHMD.to(query_BHMD.dtype)


def _linear_mask(selection: BlockSelection, config: SLA2Config) -> Tensor:
    """bool [B, H, S, T]: what the linear branch sums over."""
    mask_BHST = selection.linear_mask("marginal") != 0
    return torch.zeros_like(mask_BHST) if config.linear_scope == "none" else mask_BHST


def _router_scores(
    query_BHMD: Tensor,
    key_BHND: Tensor,
    selection: BlockSelection,
    ranked_BC: Tensor,
    proj_query_DD: Tensor | None,
    proj_key_DD: Tensor | None,
    scale: float,
) -> Tensor:
    """proj_q(pool(Q)) proj_k(pool(K))^T * scale of the ranked blocks, [B, H, S, C]; -inf for what is no choice."""
    dtype = torch.promote_types(query_BHMD.dtype, torch.float32)
    query_BHSD = pool_blocks(query_BHMD.detach(), selection.block_q).to(dtype)
    sizes_BT = selection.key_block_sizes
    key_BHTD = pool_blocks(key_BHND.detach(), selection.block_k, sizes_BT).to(dtype)[:, :, : ranked_BC.shape[1]]
    if proj_query_DD is not None:
        query_BHSD = query_BHSD @ proj_query_DD.to(dtype).mT
    if proj_key_DD is not None:
        key_BHTD = key_BHTD @ proj_key_DD.to(dtype).mT
    return (query_BHSD @ key_BHTD.mT * scale).masked_fill(~ranked_BC[:, None, None], -torch.inf)


def _soft_reference(
    query_BHMD: Tensor,
    key_BHND: Tensor,
    value_BHND: Tensor,
    config: SLA2Config,
    selection: BlockSelection,
    scale: float,
    alpha_logits_HR: Tensor,
    ranked_BC: Tensor,
    scores_BHST: Tensor,
) -> Tensor:
    """The output with the soft mask in both branches: m of the ranked blocks, 1 or 0 of the others."""
    dtype, ranked = scores_BHST.dtype, ranked_BC.shape[1]
    hard_BHST, ranked_B11C = selection.critical_mask(), ranked_BC[:, None, None]
    soft_BHST = soft_top_k(scores_BHST, hard_BHST[..., :ranked] & ranked_B11C, config.temperature)
    mask_BHST = torch.where(ranked_B11C, soft_BHST, hard_BHST[..., :ranked].to(dtype))
    mask_BHST = torch.cat((mask_BHST, hard_BHST[..., ranked:].to(dtype)), -1)
    block_M = torch.arange(selection.query_length, device=query_BHMD.device) // selection.block_q
    block_N = torch.arange(selection.key_length, device=query_BHMD.device) // selection.block_k
    valid_BHND = selection.key_valid()[:, None, :, None]
    valid_BHMN = valid_BHND.transpose(-1, -2).to(dtype)
    mask_BHMN = mask_BHST[:, :, block_M][..., block_N]
    query_BHMD, output_dtype = query_BHMD.to(dtype), query_BHMD.dtype
    key_BHND, value_BHND = (torch.where(valid_BHND, x, 0).to(dtype) for x in (key_BHND, value_BHND))

    scores_BHMN = query_BHMD @ key_BHND.mT * scale
    weights_BHMN = mask_BHMN * valid_BHMN * torch.exp(scores_BHMN - scores_BHMN.detach().amax(-1, keepdim=True))
    total_BHM1 = weights_BHMN.sum(-1, keepdim=True)
    sparse_BHMD = weights_BHMN @ value_BHND / torch.where(total_BHM1 > 0, total_BHM1, 1)
    phi_query_BHMD, phi_key_BHND = (apply_feature_map(x, config.feature_map) for x in (query_BHMD, key_BHND))
    weights_BHMN = (1 - mask_BHMN) * valid_BHMN * (phi_query_BHMD @ phi_key_BHND.mT)
    linear_BHMD = weights_BHMN @ value_BHND / (weights_BHMN.sum(-1, keepdim=True) + EPSILON)

    row_M = block_M * alpha_logits_HR.shape[1] // selection.num_query_blocks
    alpha_BHM1 = torch.sigmoid(alpha_logits_HR.to(dtype))[:, row_M, None]
    linear_BHM1 = selection.expand(_linear_mask(selection, config)).any(-1, keepdim=True)
    alpha_BHM1 = torch.where(selection.expand(hard_BHST).any(-1, keepdim=True), alpha_BHM1, 0)
    alpha_BHM1 = torch.where(linear_BHM1, alpha_BHM1, 1)
    return (alpha_BHM1 * sparse_BHMD + (1 - alpha_BHM1) * linear_BHMD).to(output_dtype)


def soft_top_k(scores: Tensor, kept: Tensor, temperature: float) -> Tensor:
    """sigmoid(score / temperature + lambda), with lambda such that each row sums to the number of its kept blocks.

    lambda is found by bisection; one step of Newton's method from there, which changes nothing, gives its gradient.
    """
    scaled, target = scores / temperature, kept.sum(-1, keepdim=True)
    some = target < torch.isfinite(scaled).sum(-1, keepdim=True)
    with torch.no_grad():
        size = scaled.masked_fill(~torch.isfinite(scaled), 0).abs().amax(-1, keepdim=True) + 40
        low, high = -size, size
        for _ in range(100):
            middle = (low + high) / 2
            less = torch.sigmoid(scaled + middle).sum(-1, keepdim=True) < target
            low, high = torch.where(less, middle, low), torch.where(less, high, middle)
        at = torch.sigmoid(scaled + middle)
        slope = (at * (1 - at)).sum(-1, keepdim=True).clamp(min=torch.finfo(scaled.dtype).tiny)
    moved = torch.sigmoid(scaled + middle).sum(-1, keepdim=True)
    soft = torch.sigmoid(scaled + middle - (moved - moved.detach()) / slope)
    return torch.where(some & (target > 0), soft, soft.detach())
