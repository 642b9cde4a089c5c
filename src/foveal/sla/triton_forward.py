"""The forward of SLA on GPUs, a few heads at a time: key states, selection, their masked sum, attention.

Each group of heads goes through all of it before the next one starts, so that the extra memory is a group's key states
h and sums H (all sums where a backward will want them), and one pass over K and V makes the states and the pooled keys
that the selection needs.
Source: SLA (arXiv 2509.24006), Algorithm 1.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from foveal.block_sparse import gluon
from foveal.block_sparse.triton.forward import LinearTerm, forward
from foveal.block_sparse.triton.linear import key_state_sums, key_states, masked_sum
from foveal.block_sparse.triton.select import Wanted, pick, pool

# What h and H of the heads in flight may take; or as much as the output, if that is more. Larger groups mean fewer
# launches, and fewer times that the last programs of a kernel leave the device half idle.
GROUP_BYTES = 240 * 2**20


def head_groups(batch: int, heads: int, most: int) -> Iterator[tuple[slice, slice]]:
    """Slices of the batch and of the heads with at most `most` pairs each (one at least), contiguous in [B, H, ...]."""
    if most >= heads:
        samples = most // heads
        for start in range(0, batch, samples):
            yield slice(start, min(start + samples, batch)), slice(0, heads)
        return
    groups = -(-heads // max(1, most))
    step = -(-heads // groups)
    for sample in range(batch):
        for start in range(0, heads, step):
            yield slice(sample, sample + 1), slice(start, min(start + step, heads))


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    critical: Tensor,
    counts: Tensor,
    mask: Tensor | None,
    sizes: Tensor | None,
    projection: tuple[Tensor, Tensor],
    block_q: int,
    block_k: int,
    scale: float,
    feature_map: str,
    wanted: Wanted | None,
    *,
    hopper: bool,
    keep_states: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The output, the LSE, and Z and H: float32 [B * H, padded Tq, D] and bfloat16 [B * H, padded Tq, D, D].

    Over all keys the blocks of Z and H are one. H is empty unless `keep_states`.

    Args:
        query, key, value, critical, counts, sizes, block_q, block_k, scale: as in `block_sparse.triton.forward`.
        mask: bfloat16 [B, H, padded Tq, padded Tk], what to sum over; None for every key.
        projection: W in bfloat16 and b in float32.
        wanted: the rule of the selection, which is then made here, into `critical`, `counts` and `mask`; None if they
            hold it already.
    """
    batch, heads, length, head_dim = query.shape
    key_blocks = -(-key.shape[2] // block_k)
    output = torch.empty_like(query)
    lse = torch.empty((batch, heads, length), dtype=torch.float32, device=query.device)
    pooled_query = None if wanted is None else pool(query, block_q).flatten(0, 1)
    run = gluon.forward if hopper else forward
    if mask is None:
        pooled = None if wanted is None else lse.new_empty((batch * heads, key_blocks, head_dim))
        state, norm = key_state_sums(key, value, sizes, block_k, feature_map, pooled)
        if wanted is not None:
            pick(pooled_query, pooled.transpose(1, 2), scale, wanted, 0, critical, counts, None)
        rows = critical.shape[2]
        term = LinearTerm(state.expand(-1, rows, -1, -1), norm.expand(-1, rows, -1), feature_map, *projection)
        run(query, key, value, critical, counts, sizes, block_q, block_k, scale, term, (output, lse))
        return output, lse, norm, state

    rows, columns = mask.shape[2:]
    norm = lse.new_empty((batch * heads, rows, head_dim))
    most = max(GROUP_BYTES, output.nbytes) // ((rows + columns) * head_dim**2 * 2)
    kept = query.new_empty((batch * heads if keep_states else 0, rows, head_dim, head_dim), dtype=torch.bfloat16)
    states = None
    for samples, some_heads in head_groups(batch, heads, most):
        start = samples.start * heads + some_heads.start
        count = (samples.stop - samples.start) * (some_heads.stop - some_heads.start)
        pairs = slice(start, start + count)
        pooled = None if wanted is None else lse.new_empty((count, key_blocks, head_dim))
        h, z = key_states(key, value, sizes, block_k, feature_map, range(start, start + count), columns, pooled)
        if wanted is not None:
            pick(pooled_query[pairs], pooled.transpose(1, 2), scale, wanted, start, critical, counts, mask)
        group_mask = mask.flatten(0, 1)[pairs]
        if keep_states:
            states = kept[pairs]
        else:
            states = h.new_empty((count, rows, head_dim, head_dim)) if states is None else states[:count]
        torch.bmm(group_mask, h.flatten(2), out=states.flatten(2))
        # Before the next group's: its memory becomes theirs.
        del h
        masked_sum(group_mask, z, norm[pairs])
        group = (samples, some_heads)
        group_sizes = sizes if sizes is None or sizes.shape[0] == 1 else sizes[samples]
        term = LinearTerm(states, norm[pairs], feature_map, *projection)
        tensors = (x[group] for x in (query, key, value, critical, counts))
        run(*tensors, group_sizes, block_q, block_k, scale, term, (output[group], lse[group]))
    return output, lse, norm, kept
