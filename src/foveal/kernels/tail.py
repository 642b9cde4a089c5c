"""The pooled tail: what block-sparse attention leaves unread, approximated by its means and merged by log-sum-exp.

A query block i reads the keys of its critical blocks. Every other block j, of n_j valid keys, counts as n_j copies of
its mean key and mean value, kbar_j and vbar_j, for each query by itself:

    t_j = q kbar_j^T * scale + log n_j            over the unread blocks j of i
    O^t = sum_j exp(t_j - LSE^t) vbar_j,          LSE^t = log sum_j exp(t_j)
    O   = (1 - w) O^s + w O^t,                    w = exp(LSE^t) / (exp(LSE^s) + exp(LSE^t))

which is one softmax over the keys that are read and the means. It is exact where the keys of each unread block agree.
Gradients are exact for a fixed selection, and reach keys and values through their means.
Shape legend: B batch, H heads, Lq / Lk query / key tokens, Tq / Tk query / key blocks, D head dim.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from foveal.blocks import BlockSelection, pool_blocks
from foveal.checks import is_transformed, without_autocast
from foveal.kernels.api import block_sparse_attention
from foveal.kernels.choice import block_sizes
from foveal.kernels.cpu import CHUNK_SCORES, CHUNK_SCORES_DEVICE, blocked


def attend_with_tail(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selection: BlockSelection,
    scale: float,
    impl: str,
    precision: str = "input",
) -> Tensor:
    """Softmax attention over the critical blocks and the means of all others, differentiable.

    Args:
        query: [B, H, Lq, D]. key, value: [B, H, Lk, D].
        selection: the critical blocks. Marginal and negligible blocks are unread alike.
        impl: "torch", "triton" or "gluon".
        precision: of the products over the critical blocks; those with the means keep that of the inputs.

    Returns:
        [B, H, Lq, D] in the dtype of `query`.
    """
    options = {"scale": scale, "impl": impl, "precision": precision}
    output, lse = block_sparse_attention(query, key, value, selection, return_lse=True, **options)
    means = (pool_blocks(x, selection.block_k, selection.key_block_sizes) for x in (key, value))
    tail, tail_lse = pooled_tail(query, *means, _biases(selection, lse.dtype), selection.block_q, scale, impl)
    return _merged(output, lse, tail, tail_lse).to(query.dtype)


def pooled_tail(
    query: Tensor, mean_key: Tensor, mean_value: Tensor, bias: Tensor, block_q: int, scale: float, impl: str
) -> tuple[Tensor, Tensor]:
    """O^t in the dtype of `query` and LSE^t [B, H, Lq]; 0 and -inf for a row that reads everything. Differentiable.

    Args:
        query: [B, H, Lq, D].
        mean_key, mean_value: [B, H, Tk, D], float32, or float64 for float64 queries.
        bias: [B, H, Tq, Tk] in that dtype, log n_j for unread blocks, -inf for others.
        impl: "torch", or "triton" or "gluon" for Triton's kernels.
    """
    if impl == "torch" and is_transformed(query, mean_key, mean_value):
        return _composed(query, mean_key, mean_value, bias, block_q, scale)
    return _forward_op(query, mean_key, mean_value, bias, block_q, scale, impl != "torch")


def _biases(selection: BlockSelection, dtype: torch.dtype) -> Tensor:
    sizes = selection.key_block_sizes
    if sizes is None:
        sizes = block_sizes(selection.key_length, selection.block_k, selection.critical.device)[None]
    return torch.where(selection.critical_mask(), -math.inf, sizes.to(dtype).log()[:, None, None])


def _merged(output: Tensor, lse: Tensor, tail: Tensor, tail_lse: Tensor) -> Tensor:
    # A row without a tail has none, also if it has nothing else: -inf - -inf would be NaN.
    difference = torch.where(tail_lse == -math.inf, -math.inf, tail_lse - lse)
    share = difference.sigmoid()[..., None]
    return output * (1 - share) + tail * share


def _chunks(query: Tensor, mean_key: Tensor, bias: Tensor, block_q: int, scale: float) -> Iterator[tuple]:
    """(blocks of rows, their queries [R, bq, D], their scores [R, bq, Tk]) of one head, in chunks that fit a cache."""
    rows = blocked(query, block_q).to(mean_key.dtype)
    budget = CHUNK_SCORES.get(query.device.type, CHUNK_SCORES_DEVICE)
    step = max(1, budget // (block_q * mean_key.shape[0]))
    for start in range(0, rows.shape[0], step):
        part = slice(start, start + step)
        yield part, rows[part], rows[part] @ mean_key.T * scale + bias[part, None]


@torch.library.custom_op("foveal::pooled_tail_fwd", mutates_args=())
def _forward_op(
    query: Tensor, mean_key: Tensor, mean_value: Tensor, bias: Tensor, block_q: int, scale: float, on_kernels: bool
) -> tuple[Tensor, Tensor]:
    if on_kernels:
        from foveal.kernels.triton.tail import tail_forward

        return tail_forward(query, mean_key.contiguous(), mean_value.contiguous(), bias.contiguous(), block_q, scale)
    batch, heads, length, _ = query.shape
    output = torch.empty_like(query)
    lse = mean_key.new_empty(query.shape[:3])
    for b in range(batch):
        for h in range(heads):
            outputs, lses = [], []
            for _, _, scores in _chunks(query[b, h], mean_key[b, h], bias[b, h], block_q, scale):
                top = scores.amax(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).min)
                weights = scores.sub_(top).exp_()
                total = weights.sum(-1, keepdim=True)
                outputs.append(weights @ mean_value[b, h] / total.clamp(min=torch.finfo(total.dtype).tiny))
                lses.append(top + total.log())
            output[b, h] = torch.cat(outputs).flatten(0, 1)[:length]
            lse[b, h] = torch.cat(lses).flatten()[:length]
    return output, lse


@_forward_op.register_fake
def _(query, mean_key, mean_value, bias, block_q, scale, on_kernels):
    return torch.empty_like(query), mean_key.new_empty(query.shape[:3])


@torch.library.custom_op("foveal::pooled_tail_bwd", mutates_args=())
def _backward_op(
    grad: Tensor,
    delta: Tensor,
    lse: Tensor,
    query: Tensor,
    mean_key: Tensor,
    mean_value: Tensor,
    bias: Tensor,
    block_q: int,
    scale: float,
    on_kernels: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dQ and the gradients of the means; `delta` is rowsum(dO * O) less the gradient of the LSE, [B, H, Lq]."""
    if on_kernels:
        from foveal.kernels.triton.tail import tail_backward

        grad = grad if grad.stride(-1) == 1 else grad.contiguous()
        inputs = query, mean_key.contiguous(), mean_value.contiguous(), bias.contiguous()
        return tail_backward(inputs, grad, delta.contiguous(), lse, block_q, scale)
    grads = torch.empty_like(query), torch.zeros_like(mean_key), torch.zeros_like(mean_value)
    lse = lse.masked_fill(lse == -math.inf, math.inf)
    for b in range(query.shape[0]):
        for h in range(query.shape[1]):
            grad_query, grad_key, grad_value = [], grads[1][b, h], grads[2][b, h]
            rows_of = (blocked(x, block_q) for x in (grad[b, h], delta[b, h][:, None], lse[b, h][:, None]))
            d_out, head_delta, head_lse = (x.to(mean_key.dtype) for x in rows_of)
            for part, rows, scores in _chunks(query[b, h], mean_key[b, h], bias[b, h], block_q, scale):
                weights = scores.sub_(head_lse[part]).exp_()
                d_scores = (d_out[part] @ mean_value[b, h].T).sub_(head_delta[part]).mul_(weights)
                grad_query.append(d_scores @ mean_key[b, h] * scale)
                grad_key += d_scores.flatten(0, 1).T @ rows.flatten(0, 1) * scale
                grad_value += weights.flatten(0, 1).T @ d_out[part].flatten(0, 1)
            grads[0][b, h] = torch.cat(grad_query).flatten(0, 1)[: query.shape[2]]
    return grads


@_backward_op.register_fake
def _(grad, delta, lse, query, mean_key, mean_value, bias, block_q, scale, on_kernels):
    return tuple(torch.empty_like(x) for x in (query, mean_key, mean_value))


@without_autocast
def _composed(
    query: Tensor, mean_key: Tensor, mean_value: Tensor, bias: Tensor, block_q: int, scale: float
) -> tuple[Tensor, Tensor]:
    """The same in operations that every transform of PyTorch knows."""
    length = query.shape[2]
    rows = F.pad(query.to(mean_key.dtype), (0, 0, 0, -length % block_q)).unflatten(2, (-1, block_q))
    scores = rows @ mean_key[:, :, None].transpose(-1, -2) * scale + bias[..., None, :]
    unread = (bias > -math.inf).any(-1)[..., None, None]
    top = torch.where(unread, scores.detach().amax(-1, keepdim=True), 0)
    weights = torch.exp(scores - top)
    total = torch.where(unread, weights.sum(-1, keepdim=True), 1)
    output = weights / total @ mean_value[:, :, None]
    lse = torch.where(unread, top + total.log(), -math.inf)
    return output.flatten(2, 3)[:, :, :length].to(query.dtype), lse.flatten(2, 4)[:, :, :length]


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.block_q, ctx.scale, ctx.on_kernels = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


@without_autocast
def _gradients(grad: Tensor, grad_lse: Tensor | None, inputs, output: Tensor, lse: Tensor, options):
    delta = (grad.to(lse.dtype) * output.to(lse.dtype)).sum(-1)
    if grad_lse is not None:
        delta = delta - grad_lse
    return _backward_op(grad, delta, lse, *inputs, *options)


def _backward(ctx, grad: Tensor | None, grad_lse: Tensor | None):
    *inputs, output, lse = ctx.saved_tensors
    grad = torch.zeros_like(output) if grad is None else grad
    again = torch.is_grad_enabled() and not torch.compiler.is_compiling()  # create_graph: it will be derived again
    if again and not ctx.on_kernels:
        wanted = [x for x in inputs[:3] if x.requires_grad]
        pairs = zip(_composed(*inputs, ctx.block_q, ctx.scale), (grad, grad_lse), strict=True)
        outputs, given = zip(*((x, g) for x, g in pairs if g is not None), strict=True)
        found = iter(torch.autograd.grad(outputs, wanted, given, create_graph=True, allow_unused=True))
        grads = tuple(next(found) if x.requires_grad else None for x in inputs[:3])
    else:
        grads = _gradients(grad, grad_lse, inputs, output, lse, (ctx.block_q, ctx.scale, ctx.on_kernels))
    return *grads, None, None, None, None


_forward_op.register_autograd(_backward, setup_context=_setup_context)
