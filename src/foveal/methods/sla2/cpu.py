"""SLA2 in plain PyTorch around `block_sparse_attention` and SLA's linear branch, on any device."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from foveal.blocks import BlockSelection
from foveal.kernels.api import block_sparse_attention
from foveal.kernels.values import flatten
from foveal.methods.routing import Ranked
from foveal.methods.sla.linear import linear_output
from foveal.methods.sla2.config import SLA2Config
from foveal.methods.sla2.mixing import block_logits, branch_weights, to_tokens
from foveal.methods.sla2.routing import score_gradient_op


def sla2_attention_torch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    config: SLA2Config,
    selection: BlockSelection,
    scale: float,
    logits: Tensor,
    ranked: Ranked | None,
) -> Tensor:
    """alpha O_s + (1 - alpha) O_l, [B, H, Lq, D], differentiable, in the scores of `ranked` too.

    logits: [H, R], log-odds of alpha.
    """
    options = {"scale": scale, "impl": "torch", "return_lse": True, "precision": config.precision}
    sparse, lse = block_sparse_attention(query, key, value, selection, **options)
    linear = linear_output(query, key, value, config.branches, selection)
    logits = block_logits(logits.to(linear.dtype), selection.num_query_blocks)
    alpha, rest = branch_weights(logits, selection)
    of_tokens = (to_tokens(x, selection.block_q, query.shape[2]) for x in (alpha, rest))
    weighted = tuple(weight * x for weight, x in zip(of_tokens, (sparse, linear), strict=True))
    output = (weighted[0] + weighted[1]).to(query.dtype)
    if ranked is None:
        return output
    tensors, numbers = flatten(selection)
    options = numbers, ranked.temperature, config.feature_map, scale
    return _Choice.apply(output, ranked.scores, options, query, key, value, *weighted, lse, alpha, rest, *tensors)


class _Choice(torch.autograd.Function):
    """Its first argument, and a gradient for the scores by which the blocks were chosen."""

    @staticmethod
    def forward(ctx, output, scores, options, *tensors):
        ctx.options, ctx.num_tensors = options, len(tensors)
        ctx.save_for_backward(scores, *tensors)
        return output.view_as(output)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        scores, query, key, value, sparse, linear, lse, alpha, rest, *selection = ctx.saved_tensors
        numbers, temperature, feature_map, scale = ctx.options
        dots = ((grad.to(x.dtype) * x).sum(-1, dtype=lse.dtype) for x in (sparse, linear))
        facts = [alpha, rest, lse, *dots]
        inputs = grad, query, key, value, scores, selection, numbers, facts
        of_scores = score_gradient_op(*inputs, temperature, feature_map, scale)
        return grad, of_scores, None, *[None] * ctx.num_tensors
