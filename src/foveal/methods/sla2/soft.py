"""SLA2 with the soft top-k in the forward, as in the first stage of the paper's training (arXiv 2602.12675, eq. 17).

    m_ij = sigmoid(S_ij / tau + lambda_i)                    a row sums to what the hard choice keeps of it
    O_s  = softmax(q k^T * scale + log m) V                  every block is read, by its weight
    O_l  = phi(Q) H / (phi(Q) Z + eps), with H_i = sum of (1 - m_ij) h_j, and Z_i alike

With weights of 1 and 0 these are the branches of the hard choice. It is plain PyTorch, and takes the work of dense
attention and the memory of one head's scores.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from foveal.blocks import BlockSelection
from foveal.kernels.cpu import blocked
from foveal.methods.routing import Ranked, soft_top_k, soft_top_k_gradient
from foveal.methods.sla.feature_maps import apply_feature_map
from foveal.methods.sla.linear import EPSILON
from foveal.methods.sla2.config import SLA2Config
from foveal.methods.sla2.mixing import block_logits, branch_weights, to_tokens


class _SoftTopK(torch.autograd.Function):
    """`soft_top_k`, differentiable in the scores."""

    @staticmethod
    def forward(ctx, scores: Tensor, kept: Tensor, temperature: float) -> Tensor:
        ctx.save_for_backward(scores, kept)
        ctx.temperature = temperature
        return soft_top_k(scores, kept, temperature)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        scores, kept = ctx.saved_tensors
        return soft_top_k_gradient(scores, kept, ctx.temperature, grad), None, None


def soft_mask(selection: BlockSelection, ranked: Ranked) -> Tensor:
    """m, [B, H, Tq, Tk] in float32 or better; of blocks that are not the router's choice 1 where they are read."""
    hard, count = selection.critical_mask(), ranked.scores.shape[-1]
    chosen_from = ranked.scores != -torch.inf
    kept = (hard[..., :count] & chosen_from).sum(-1, keepdim=True)
    soft = _SoftTopK.apply(ranked.scores, kept, ranked.temperature)
    soft = torch.where(chosen_from, soft, hard[..., :count].to(soft.dtype))
    return torch.cat((soft, hard[..., count:].to(soft.dtype)), -1)


def sla2_attention_soft(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    config: SLA2Config,
    selection: BlockSelection,
    scale: float,
    logits: Tensor,
    ranked: Ranked,
) -> Tensor:
    """alpha O_s + (1 - alpha) O_l with the soft mask, [B, H, Lq, D], differentiable.

    selection: the hard choice, for how many blocks each row keeps. logits: [H, R], log-odds of alpha.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    mask, valid = soft_mask(selection, ranked).to(dtype), selection.key_valid()
    logits = block_logits(logits.to(dtype), selection.num_query_blocks)
    alpha, rest = branch_weights(logits, selection)
    if config.linear_scope == "none":
        alpha, rest, feature_map = torch.ones_like(alpha), torch.zeros_like(rest), None
    else:
        feature_map = config.feature_map
    weights = (to_tokens(x, selection.block_q, query.shape[2]).expand(*query.shape[:3], 1) for x in (alpha, rest))
    alpha, rest = weights
    heads = []
    for b in range(query.shape[0]):
        for h in range(query.shape[1]):
            inputs, weights = (tuple(x[b, h] for x in several) for several in ((query, key, value), (alpha, rest)))
            given = inputs, mask[b, h], weights, valid[b % valid.shape[0]], selection, feature_map, scale
            if torch.is_grad_enabled() and not torch.compiler.is_compiling():
                heads.append(checkpoint(_head, *given, use_reentrant=False))
            else:
                heads.append(_head(*given))
    return torch.stack(heads).unflatten(0, query.shape[:2])


def _head(
    inputs: tuple[Tensor, Tensor, Tensor],
    mask: Tensor,
    weights: tuple[Tensor, Tensor],
    valid: Tensor,
    selection: BlockSelection,
    feature_map: str | None,
    scale: float,
) -> Tensor:
    """One head's output, [Lq, D]; the mask is [Tq, Tk], the weights of the branches [Lq, 1], `valid` [Lk].

    The feature map is None without a linear branch.
    """
    (query, key, value), (alpha, rest) = inputs, weights
    block_q, block_k, (length, keys) = selection.block_q, selection.block_k, (query.shape[0], key.shape[0])
    # Padding may hold anything, NaN included, and 0 * NaN would spread it.
    key, value = (torch.where(valid[:, None], x, 0).to(mask.dtype) for x in (key, value))
    output_dtype, query = query.dtype, query.to(mask.dtype)

    least = torch.finfo(mask.dtype).tiny  # whose logarithm has a gradient
    shift = torch.where(mask > 0, mask.clamp(min=least).log(), -torch.inf)
    shift = shift.repeat_interleave(block_q, 0)[:length].repeat_interleave(block_k, 1)[:, :keys]
    scores = (query @ key.mT * scale + shift).masked_fill(~valid, -torch.inf)
    highest = scores.detach().amax(-1, keepdim=True)
    weights = (scores - highest.masked_fill(highest == -torch.inf, 0)).exp()
    exact = weights @ value / weights.sum(-1, keepdim=True).clamp(min=least)
    if feature_map is None:
        return exact.to(output_dtype)

    phi_query, phi_key = (apply_feature_map(x, feature_map) for x in (query, key))
    phi_key = torch.where(valid[:, None], phi_key, 0)
    with_ones = torch.cat((value, value.new_ones((keys, 1))), -1)
    states = blocked(phi_key, block_k).mT @ blocked(with_ones, block_k)
    sums = ((1 - mask) @ states.flatten(1)).unflatten(1, states.shape[1:])
    summed = (blocked(phi_query, block_q) @ sums).flatten(0, 1)[:length]
    linear = summed[:, :-1] / (summed[:, -1:] + EPSILON)
    return (alpha * exact + rest * linear).to(output_dtype)
