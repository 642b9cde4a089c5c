"""Block-sparse attention in plain PyTorch: gathers only the kept blocks, on any device, forward and backward.

Rows of blocks are sorted by how many key blocks they keep and worked off in chunks that fit the cache, so time and
memory follow the kept blocks, also where counts differ from row to row. Both passes are custom ops: opaque to
`torch.compile`, which therefore sees one node and no graph break. Reading the counts makes the host wait for the
device: on CUDA this implementation is a fallback, not a fast path.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from foveal.blocks import BlockSelection
from foveal.checks import is_transformed, without_autocast

# Scores in flight at a time. On a CPU a chunk should stay in the core's own cache: 2^19 float32 scores are 2 MiB
# (measured at L = 8192, keep 5 %, D = 64: 2^17 ... 2^21 in docs/performance.md). Devices want larger launches.
CHUNK_SCORES = {"cpu": 2**19}
CHUNK_SCORES_DEVICE = 2**25


def block_sparse_attention_torch(
    query: Tensor, key: Tensor, value: Tensor, selection: BlockSelection, scale: float
) -> tuple[Tensor, Tensor]:
    """The output [B, H, Lq, D] and LSE [B, H, Lq] (float32, or float64 for float64 inputs), differentiable."""
    inputs = query, key, value
    lists = selection.critical, selection.critical_count, selection.key_block_sizes
    options = selection.block_q, selection.block_k, scale
    if is_transformed(*inputs):
        return _composed(inputs, lists, *options)
    return _forward_op(*inputs, *lists, *options)


def blocked(x: Tensor, block: int) -> Tensor:
    """[L, D] to [T, block, D], the last block padded with zeros; a view where the blocks are full."""
    return F.pad(x, (0, 0, 0, -x.shape[0] % block)).unflatten(0, (-1, block))


def work_dtype(x: Tensor) -> torch.dtype:
    """The dtype products run in: half precision is slow on CPUs, and native everywhere else."""
    return torch.float32 if x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16) else x.dtype


def _chunks(counts: Tensor, scores_per_pair: int, device_type: str) -> Iterator[tuple[Tensor, int]]:
    """Rows of one head in chunks of like counts: (row indices, how many key blocks they keep at most)."""
    order = counts.argsort(descending=True, stable=True)
    kept = counts[order].tolist()
    budget = CHUNK_SCORES.get(device_type, CHUNK_SCORES_DEVICE)
    start = 0
    while start < len(kept) and kept[start] > 0:
        stop = min(len(kept), start + max(1, budget // (kept[start] * scores_per_pair)))
        while kept[stop - 1] == 0:
            stop -= 1
        yield order[start:stop], kept[start]
        start = stop


def _masked(critical: Tensor, counts: Tensor, sizes: Tensor, block_k: int, width: int, uniform: bool) -> Tensor | None:
    """bool [R, 1, width * block_k], False for keys that do not count in a chunk; None where all do."""
    per_block = sizes[critical]
    if not uniform:
        per_block = torch.where(torch.arange(width, device=critical.device) < counts[:, None], per_block, 0)
    elif bool((per_block == block_k).all()):
        return None
    return (torch.arange(block_k, device=critical.device) < per_block[..., None]).flatten(1)[:, None]


class _Head:
    """One head's blocks, and the chunks its rows are worked off in."""

    def __init__(self, b, h, inputs, lists, block_q, block_k, scale):
        query, key, value = (x[b, h] for x in inputs)
        (critical, counts), sizes = (x[b, h] for x in lists[:2]), lists[2]
        dtype = work_dtype(query)
        self.query = blocked(query, block_q).to(dtype)
        self.key = blocked(key, block_k).to(dtype)
        self.value = blocked(value, block_k).to(dtype)
        if sizes is None:
            sizes = torch.full((self.key.shape[0],), block_k, dtype=torch.int32, device=key.device)
            sizes[-1] = key.shape[0] - (self.key.shape[0] - 1) * block_k
        else:
            sizes = sizes[b % sizes.shape[0]]
            # Padding may hold anything, NaN included, and 0 * NaN would spread it.
            valid = (torch.arange(block_k, device=key.device) < sizes[:, None])[..., None]
            self.key, self.value = torch.where(valid, self.key, 0), torch.where(valid, self.value, 0)
        self.critical, self.counts, self.sizes = critical, counts, sizes
        self.block_q, self.block_k, self.scale = block_q, block_k, scale

    def chunks(self) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
        """(rows, key blocks [R * n], Q, K and V [R, n * bk, D], scores [R, bq, n * bk]) of each chunk."""
        for rows, n in _chunks(self.counts, self.block_q * self.block_k, self.query.device.type):
            critical, counts = self.critical[rows, :n], self.counts[rows]
            index = critical.flatten()
            key, value = (
                x.index_select(0, index).view(len(rows), n * self.block_k, -1) for x in (self.key, self.value)
            )
            query = self.query.index_select(0, rows)
            scores = torch.bmm(query * self.scale, key.transpose(1, 2))
            scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
            mask = _masked(critical, counts, self.sizes, self.block_k, n, uniform=bool(counts[-1] == n))
            if mask is not None:
                scores.masked_fill_(~mask, -math.inf)
            yield rows, index, query, key, value, scores


@torch.library.custom_op("foveal::block_sparse_torch_fwd", mutates_args=())
def _forward_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    critical: Tensor,
    counts: Tensor,
    sizes: Tensor | None,
    block_q: int,
    block_k: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    batch, heads, length, _ = query.shape
    output = query.new_zeros(query.shape)
    lse = query.new_full(query.shape[:3], -math.inf, dtype=torch.promote_types(query.dtype, torch.float32))
    for b in range(batch):
        for h in range(heads):
            head = _Head(b, h, (query, key, value), (critical, counts, sizes), block_q, block_k, scale)
            out = torch.zeros_like(head.query)
            out_lse = lse.new_full(head.query.shape[:2], -math.inf)
            for rows, _, _, _, v, scores in head.chunks():
                top = scores.amax(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).min)
                weights = scores.sub_(top).exp_()
                total = weights.sum(-1, keepdim=True)
                part = torch.bmm(weights.to(v.dtype), v) / total.clamp(min=torch.finfo(total.dtype).tiny)
                out[rows] = part.to(out.dtype)
                out_lse[rows] = (top + total.log()).squeeze(-1)
            output[b, h] = out.flatten(0, 1)[:length]
            lse[b, h] = out_lse.flatten()[:length]
    return output, lse


@_forward_op.register_fake
def _(query, key, value, critical, counts, sizes, block_q, block_k, scale):
    lse_dtype = torch.promote_types(query.dtype, torch.float32)
    return query.new_empty(query.shape), query.new_empty(query.shape[:3], dtype=lse_dtype)


@torch.library.custom_op("foveal::block_sparse_torch_bwd", mutates_args=())
def _backward_op(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    delta: Tensor,
    lse: Tensor,
    critical: Tensor,
    counts: Tensor,
    sizes: Tensor | None,
    block_q: int,
    block_k: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_query, grad_key, grad_value = (x.new_zeros(x.shape) for x in (query, key, value))
    lse = lse.masked_fill(lse == -math.inf, math.inf)
    for b in range(query.shape[0]):
        for h in range(query.shape[1]):
            head = _Head(b, h, (query, key, value), (critical, counts, sizes), block_q, block_k, scale)
            dtype = head.query.dtype
            d_out = blocked(grad[b, h], block_q).to(dtype)
            head_delta = blocked(delta[b, h][:, None], block_q)
            head_lse = blocked(lse[b, h][:, None], block_q)
            d_query = torch.zeros_like(head.query)
            d_key, d_value = (torch.zeros_like(x, dtype=delta.dtype) for x in (head.key, head.value))
            for rows, index, q, k, v, scores in head.chunks():
                do = d_out.index_select(0, rows)
                probs = scores.sub_(head_lse.index_select(0, rows)).exp_()
                d_value.index_add_(0, index, _by_block(probs.to(dtype), do, block_k).to(delta.dtype))
                d_probs = torch.bmm(do, v.transpose(1, 2)).to(probs.dtype)
                d_scores = d_probs.sub_(head_delta.index_select(0, rows)).mul_(probs).to(dtype)
                d_query[rows] = torch.bmm(d_scores, k) * scale
                d_key.index_add_(0, index, _by_block(d_scores, q, block_k).to(delta.dtype))
            grad_query[b, h] = d_query.flatten(0, 1)[: query.shape[2]]
            grad_key[b, h] = d_key.flatten(0, 1)[: key.shape[2]] * scale
            grad_value[b, h] = d_value.flatten(0, 1)[: key.shape[2]]
    return grad_query, grad_key, grad_value


def _by_block(scores: Tensor, rows: Tensor, block_k: int) -> Tensor:
    """scores^T rows per (row, key block) pair: [R, bq, n * bk], [R, bq, D] to [R * n, bk, D]."""
    return torch.bmm(scores.transpose(1, 2), rows).view(-1, block_k, rows.shape[-1])


@_backward_op.register_fake
def _(grad, query, key, value, delta, lse, critical, counts, sizes, block_q, block_k, scale):
    return tuple(x.new_empty(x.shape) for x in (query, key, value))


@without_autocast
def _composed(
    inputs: Sequence[Tensor], lists: Sequence[Tensor | None], block_q: int, block_k: int, scale: float
) -> tuple[Tensor, Tensor]:
    """The same in operations that every transform of PyTorch knows: forward mode, `vmap`, derivatives of derivatives.

    All rows at once: memory is that of the keys and scores of all kept blocks.

    Args:
        inputs: query, key, and value.
        lists: the critical lists, their counts, and the sizes of key blocks or None.
    """
    (query, key, value), (critical, counts, sizes) = inputs, lists
    dtype, accumulate = work_dtype(query), torch.promote_types(query.dtype, torch.float32)
    length, key_length, width = query.shape[2], key.shape[2], critical.shape[-1]
    places = torch.arange(block_k, device=key.device)
    starts = torch.arange(-(-key_length // block_k), device=key.device) * block_k
    if sizes is None:
        sizes = (key_length - starts).clamp(max=block_k)[None]
    sizes = sizes[:, None].expand(*key.shape[:2], -1)
    index = critical.long().flatten(2)

    def kept(x: Tensor) -> Tensor:
        """[B, H, Lk, D] to the kept blocks of each row, [B, H, Tq, W * bk, D]; 0 where nothing counts."""
        blocks = F.pad(x.to(dtype), (0, 0, 0, -key_length % block_k)).unflatten(2, (-1, block_k))
        blocks = torch.where((places < sizes[..., None])[..., None], blocks, 0).flatten(3)
        rows = torch.take_along_dim(blocks, index[..., None], 2)
        return rows.unflatten(-1, (block_k, -1)).unflatten(2, (-1, width)).flatten(3, 4)

    listed = torch.arange(width, device=key.device) < counts[..., None]
    valid = torch.take_along_dim(sizes, index, 2).unflatten(2, (-1, width)) * listed
    counted = (places < valid[..., None]).flatten(3)[..., None, :]
    rows = F.pad(query.to(dtype), (0, 0, 0, -length % block_q)).unflatten(2, (-1, block_q))
    scores = ((rows * scale) @ kept(key).transpose(-1, -2)).to(accumulate)
    scores = torch.where(counted, scores, -math.inf)
    any_key = counted.any(-1, keepdim=True)
    top = torch.where(any_key, scores.detach().amax(-1, keepdim=True), 0)
    weights = torch.exp(scores - top)
    total = torch.where(any_key, weights.sum(-1, keepdim=True), 1)
    output = (weights / total).to(dtype) @ kept(value)
    lse = torch.where(any_key, top + total.log(), -math.inf)
    return output.flatten(2, 3)[:, :, :length].to(query.dtype), lse.flatten(2, 4)[:, :, :length]


def _setup_context(ctx, inputs, output) -> None:
    query, key, value, critical, counts, sizes, ctx.block_q, ctx.block_k, ctx.scale = inputs
    ctx.save_for_backward(query, key, value, critical, counts, sizes, *output)


@without_autocast
def _gradients(grad: Tensor, grad_lse: Tensor | None, inputs, output: Tensor, lse: Tensor, options):
    query, key, value, critical, counts, sizes = inputs
    delta = (grad.to(lse.dtype) * output.to(lse.dtype)).sum(-1)
    if grad_lse is not None:
        delta = delta - grad_lse
    return _backward_op(grad, query, key, value, delta, lse, critical, counts, sizes, *options)


def _backward(ctx, grad: Tensor, grad_lse: Tensor | None):
    *inputs, output, lse = ctx.saved_tensors
    options = ctx.block_q, ctx.block_k, ctx.scale
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph: it will be derived again
        wanted = [x for x in inputs[:3] if x.requires_grad]
        pairs = [
            (x, g)
            for x, g in zip(_composed(inputs[:3], inputs[3:], *options), (grad, grad_lse), strict=True)
            if g is not None
        ]
        outputs, given = zip(*pairs, strict=True)
        found = iter(torch.autograd.grad(outputs, wanted, given, create_graph=True, allow_unused=True))
        grads = tuple(next(found) if x.requires_grad else None for x in inputs[:3])
    else:
        grads = _gradients(grad, grad_lse, inputs, output, lse, options)
    return *grads, *[None] * 6


_forward_op.register_autograd(_backward, setup_context=_setup_context)
