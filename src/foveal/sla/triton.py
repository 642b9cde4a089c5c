"""SLA on GPUs: the linear branch rides in the epilogue of the block-sparse forward, and shares its backward's passes.

The marginal sum is one batched GEMM of the block mask with the key states, recomputed in the backward rather than
saved. States are made for a few heads at a time, so that the extra memory stays at about one head-sized state per query
block. Both passes are custom ops. Source: SLA (arXiv 2509.24006), Algorithms 1 and 2.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from foveal.block_sparse import gluon
from foveal.block_sparse.triton.backward import backward
from foveal.block_sparse.triton.forward import LinearTerm, forward
from foveal.block_sparse.triton.linear import (
    add_key_gradients,
    key_states,
    masked_sum,
    projection_gradients,
    query_gradients,
)
from foveal.block_sparse.triton.lists import column_lists, noncritical_mask, padded_blocks
from foveal.block_sparse.triton.tiles import TILE
from foveal.types import BlockSelection, SLAConfig

# States are made for so many heads at a time that those in flight stay within these bytes: in the forward H and the key
# states, in the backward the key states (and as much again). Fewer, larger chunks mean fewer launches.
FORWARD_BYTES = 224 * 2**20
BACKWARD_BYTES = 64 * 2**20
# Programs that share the sum over all keys of one head, for linear_scope "all".
PARTS = 16


def sla_attention_gpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    config: SLAConfig,
    selection: BlockSelection,
    scale: float,
    proj_weight: Tensor | None,
    proj_bias: Tensor | None,
    *,
    hopper: bool,
) -> Tensor:
    """O = O^s + O^l W^T + b, [B, H, Lq, D], differentiable; for the feature maps "softmax", "elu" and "relu".

    `hopper` takes the Gluon kernels for the sparse part and its epilogue; the rest is Triton's on every GPU.
    """
    output, _, _ = _forward_op(
        query,
        key,
        value,
        selection.critical,
        selection.critical_count,
        selection.marginal if config.linear_scope == "marginal" else None,
        selection.key_block_sizes,
        proj_weight,
        proj_bias,
        selection.block_q,
        selection.block_k,
        scale,
        config.feature_map,
        hopper,
        config.linear_scope == "all",
    )
    return output


def _mask_operand(
    critical: Tensor, counts: Tensor, marginal: Tensor | None, num_key_blocks: int, all_keys: bool
) -> Tensor | None:
    """The block mask as a GEMM operand, bfloat16 [B * H, padded Tq, padded Tk]; None to sum over every key."""
    if all_keys:
        return None
    if marginal is None:
        return noncritical_mask(critical, counts, num_key_blocks).flatten(0, 1)
    rows, columns = marginal.shape[-2:]
    marginal = marginal if marginal.dtype == torch.bfloat16 else (marginal != 0).to(torch.bfloat16)
    return F.pad(marginal, (0, padded_blocks(columns) - columns, 0, padded_blocks(rows) - rows)).flatten(0, 1)


class _Linear:
    """The states of one call: how they are summed over each query block's key blocks."""

    def __init__(self, query, key, value, sizes, mask, block_q, block_k, feature_map):
        self.key, self.value, self.sizes, self.mask = key, value, sizes, mask
        self.block_k, self.feature_map = block_k, feature_map
        self.pairs, self.head_dim = key.shape[0] * key.shape[1], key.shape[-1]
        self.key_tiles = -(-key.shape[2] // TILE)
        query_blocks = -(-query.shape[2] // block_q)
        self.rows, self.columns = (query_blocks, 1) if mask is None else mask.shape[1:]

    def chunks(self, state_bytes: int) -> Iterator[range]:
        """Pairs of batch and head, few enough for their key states to stay within `state_bytes`."""
        step = max(1, state_bytes // (self.columns * self.head_dim**2 * 2))
        for start in range(0, self.pairs, step):
            yield range(start, min(start + step, self.pairs))

    def new_states(self, pairs: int, blocks: int) -> Tensor:
        shape = (pairs, blocks, self.head_dim, self.head_dim)
        return torch.empty(shape, dtype=torch.bfloat16, device=self.key.device)

    def new_norms(self, blocks: int) -> Tensor:
        return torch.empty((self.pairs, blocks, self.head_dim), dtype=torch.float32, device=self.key.device)

    def sum_states(self, pairs: range, state: Tensor) -> Tensor:
        """Writes H of these pairs and returns their z; with one H for all rows where there is no mask."""
        key, value, sizes = self.key, self.value, self.sizes
        if self.mask is None:
            tiles = -(-self.key_tiles // PARTS)
            parts = -(-self.key_tiles // tiles)
            h, z = key_states(key, value, sizes, self.block_k, self.feature_map, pairs, tiles, parts, torch.float32)
            state.copy_(h.sum(1, keepdim=True))
            return z.sum(1, keepdim=True)
        tiles = self.block_k // TILE
        h, z = key_states(key, value, sizes, self.block_k, self.feature_map, pairs, tiles, self.columns, torch.bfloat16)
        torch.bmm(self.mask[pairs.start : pairs.stop], h.flatten(2), out=state.flatten(2))
        return z

    def sum_gradients(self, pairs: range, grad_state: Tensor, state: Tensor) -> None:
        """Writes G of these pairs, the gradient of the key states, from dH."""
        if self.mask is None:
            state.copy_(grad_state.sum(1, keepdim=True, dtype=torch.float32))
            return
        mask = self.mask[pairs.start : pairs.stop].transpose(1, 2)
        torch.bmm(mask, grad_state.flatten(2), out=state.flatten(2))

    def term(self, state: Tensor, norm: Tensor, weight: Tensor, bias: Tensor) -> LinearTerm:
        if self.mask is None:
            state, norm = state.expand(-1, self.rows, -1, -1), norm.expand(-1, self.rows, -1)
        return LinearTerm(state, norm, self.feature_map, weight, bias)


def _projection(weight: Tensor | None, bias: Tensor | None, query: Tensor) -> tuple[Tensor, Tensor]:
    """W in bfloat16 and b in float32; the identity and zeros where they are missing."""
    head_dim = query.shape[-1]
    if weight is None:
        weight = torch.eye(head_dim, dtype=torch.bfloat16, device=query.device)
    if bias is None:
        bias = torch.zeros(head_dim, dtype=torch.float32, device=query.device)
    return weight.to(torch.bfloat16).contiguous(), bias.float().contiguous()


@torch.library.custom_op("foveal::sla_triton_fwd", mutates_args=())
def _forward_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    critical: Tensor,
    counts: Tensor,
    marginal: Tensor | None,
    sizes: Tensor | None,
    proj_weight: Tensor | None,
    proj_bias: Tensor | None,
    block_q: int,
    block_k: int,
    scale: float,
    feature_map: str,
    hopper: bool,
    all_keys: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    critical, counts = critical.contiguous(), counts.contiguous()
    mask = _mask_operand(critical, counts, marginal, -(-key.shape[2] // block_k), all_keys)
    linear = _Linear(query, key, value, sizes, mask, block_q, block_k, feature_map)
    state = linear.new_states(linear.pairs, 1 if mask is None else linear.rows)
    norm = torch.cat(
        [
            linear.sum_states(pairs, state[pairs.start : pairs.stop])
            for pairs in linear.chunks(max(FORWARD_BYTES - state.nbytes, FORWARD_BYTES // 7))
        ]
    )
    if mask is not None:
        norm = masked_sum(mask, norm)
    term = linear.term(state, norm, *_projection(proj_weight, proj_bias, query))
    run = gluon.forward if hopper else forward
    return *run(query, key, value, critical, counts, sizes, block_q, block_k, scale, term), norm


@_forward_op.register_fake
def _(query, key, value, critical, counts, marginal, sizes, proj_weight, proj_bias, block_q, *options):
    batch, heads, length, head_dim = query.shape
    rows = 1 if options[-1] else padded_blocks(-(-length // block_q))
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    return torch.empty_like(query), lse, lse.new_empty((batch * heads, rows, head_dim))


@torch.library.custom_op("foveal::sla_triton_bwd", mutates_args=())
def _backward_op(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    norm: Tensor,
    critical: Tensor,
    counts: Tensor,
    marginal: Tensor | None,
    sizes: Tensor | None,
    proj_weight: Tensor | None,
    proj_bias: Tensor | None,
    block_q: int,
    block_k: int,
    scale: float,
    feature_map: str,
    hopper: bool,
    all_keys: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    critical, counts = critical.contiguous(), counts.contiguous()
    num_key_blocks = -(-key.shape[2] // block_k)
    mask = _mask_operand(critical, counts, marginal, num_key_blocks, all_keys)
    linear = _Linear(query, key, value, sizes, mask, block_q, block_k, feature_map)
    weight, bias = _projection(proj_weight, proj_bias, query)
    grad_query, delta = torch.empty_like(query), torch.empty_like(lse)
    normalised = torch.empty_like(query, dtype=torch.bfloat16, memory_format=torch.contiguous_format)
    grad_norm, key_state = linear.new_norms(linear.rows), linear.new_states(linear.pairs, linear.columns)
    for pairs in linear.chunks(BACKWARD_BYTES):
        chunk = slice(pairs.start, pairs.stop)
        state = linear.new_states(len(pairs), 1 if mask is None else linear.rows)
        linear.sum_states(pairs, state)
        grad_state = query_gradients(
            query,
            output,
            grad,
            linear.term(state, norm[chunk], weight, bias),
            block_q,
            pairs,
            grad_query,
            delta,
            normalised,
            grad_norm,
        )
        linear.sum_gradients(pairs, grad_state, key_state[chunk])
    del state, grad_state
    if mask is None:
        key_norm = grad_norm.sum(1, keepdim=True)
    else:
        key_norm = masked_sum(mask.transpose(1, 2), grad_norm)
    if proj_weight is None:
        grad_weight, grad_bias = torch.zeros_like(weight, dtype=torch.float32), torch.zeros_like(bias)
    else:
        grad_weight, grad_bias = projection_gradients(grad, normalised)
    del normalised
    columns = column_lists(critical, counts, num_key_blocks)
    arguments = (grad, query, key, value, delta, lse, critical, counts, columns, sizes, block_q, block_k, scale)
    if hopper:
        sparse_grad_query, grad_key, grad_value = gluon.backward(*arguments)
        grad_query += sparse_grad_query
    else:
        grad_query, grad_key, grad_value = backward(*arguments, grad_query)
    if mask is None:
        key_state, key_norm = key_state.expand(-1, num_key_blocks, -1, -1), key_norm.expand(-1, num_key_blocks, -1)
    add_key_gradients(key, value, key_state, key_norm, sizes, block_k, feature_map, grad_key, grad_value)
    return grad_query, grad_key, grad_value, grad_weight, grad_bias


@_backward_op.register_fake
def _(grad, query, key, value, output, lse, norm, *options):
    head_dim = query.shape[-1]
    shapes = (head_dim, head_dim), (head_dim,)
    return *(torch.empty_like(x) for x in (query, key, value)), *(lse.new_empty(shape) for shape in shapes)


def _setup_context(ctx, inputs, output) -> None:
    ctx.options = inputs[9:]
    ctx.save_for_backward(*inputs[:9], *output)


def _backward(ctx, grad: Tensor, *_):
    *inputs, output, lse, norm = ctx.saved_tensors
    query, key, value, critical, counts, marginal, sizes, weight, bias = inputs
    *grads, grad_weight, grad_bias = _backward_op(
        grad, query, key, value, output, lse, norm, critical, counts, marginal, sizes, weight, bias, *ctx.options
    )
    grad_weight = None if weight is None else grad_weight.to(weight.dtype)
    grad_bias = None if bias is None else grad_bias.to(bias.dtype)
    return *grads, None, None, None, None, grad_weight, grad_bias, *([None] * len(ctx.options))


_forward_op.register_autograd(_backward, setup_context=_setup_context)
