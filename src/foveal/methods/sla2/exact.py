"""SLA2 without its linear branch, in PyTorch: attention over the blocks that the router chooses, and its gradient.

    O = softmax(q K^T * scale) V over the keys of the critical blocks

The output is that of `block_sparse_attention`. Behind it stands a node that changes nothing and gives the router's
scores their gradient: what reading a block changes, by its mean key and value; see `foveal.methods.sla2.routing`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from foveal.blocks import BlockSelection
from foveal.kernels.api import block_sparse_attention
from foveal.kernels.values import Problem, flatten, unflatten
from foveal.methods.sla2.config import SLA2Config
from foveal.methods.sla2.routing import Ranked, RowFacts, score_gradient


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
    tensors, numbers = flatten(selection)
    options = numbers, ranked.temperature, scale
    return _Choice.apply(output, ranked.scores, options, query, key, value, lse, *tensors)


class _Choice(torch.autograd.Function):
    """Its first argument, and a gradient for the scores by which the blocks were chosen."""

    @staticmethod
    def forward(ctx, output, scores, options, *tensors):
        ctx.options, ctx.num_tensors = options, len(tensors)
        ctx.save_for_backward(output, scores, *tensors)
        return output.view_as(output)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        output, scores, query, key, value, lse, *selection = ctx.saved_tensors
        inputs = grad, output, query, key, value, lse, scores, selection
        return grad, _score_gradient_op(*inputs, *ctx.options), None, *[None] * ctx.num_tensors


@torch.library.custom_op("foveal::sla2_exact_score_gradient", mutates_args=())
def _score_gradient_op(
    grad: Tensor,
    output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lse: Tensor,
    scores: Tensor,
    selection_tensors: list[Tensor],
    selection_numbers: list[int],
    temperature: float,
    scale: float,
) -> Tensor:
    problem = Problem(query, key, value, unflatten(selection_tensors, selection_numbers), scale)
    dots = (grad.to(output.dtype) * output).sum(-1, dtype=lse.dtype)
    alpha = lse.new_ones((*lse.shape[:2], problem.selection.num_query_blocks))
    facts = RowFacts(alpha, None, lse, dots, None)
    return score_gradient(problem, grad, Ranked(scores, temperature), facts, None)


@_score_gradient_op.register_fake
def _(grad, output, query, key, value, lse, scores, *rest):
    return torch.empty_like(scores)
