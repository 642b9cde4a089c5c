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
from foveal.block_sparse.triton.forward import Forward
from foveal.block_sparse.triton.linear import key_state_sums, key_states, masked_sum
from foveal.block_sparse.triton.select import Wanted, pick, pool

# What h and H of the heads in flight may take; or as much as the output, if that is more. Larger groups mean fewer
# launches, and fewer times that the last programs of a kernel leave the device half idle.
GROUP_BYTES = 240 * 2**20


def groups(pairs: int, most: int) -> Iterator[range]:
    """Cuts `pairs` into ranges of like lengths with at most `most` each (one at least)."""
    step = -(-pairs // -(-pairs // max(1, most)))
    for start in range(0, pairs, step):
        yield range(start, min(start + step, pairs))


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
    pairs, head_dim, key_blocks = query.shape[0] * query.shape[1], query.shape[-1], -(-key.shape[2] // block_k)
    lists = critical, counts, sizes, block_q, block_k
    call = (gluon.Forward if hopper else Forward)(query, key, value, *lists, scale, projection, feature_map)
    output, lse = call.results
    pooled_query = None if wanted is None else pool(query, block_q).flatten(0, 1)
    if mask is None:
        pooled = None if wanted is None else lse.new_empty((pairs, key_blocks, head_dim))
        state, norm = key_state_sums(key, value, sizes, block_k, feature_map, pooled)
        if wanted is not None:
            pick(pooled_query, pooled, scale, wanted, 0, critical, counts, None)
        rows = critical.shape[2]
        call.run(range(pairs), state.expand(-1, rows, -1, -1), norm.expand(-1, rows, -1))
        return output, lse, norm, state

    rows, columns = mask.shape[2:]
    norm = lse.new_empty((pairs, rows, head_dim))
    most = max(GROUP_BYTES, output.nbytes) // ((rows + columns) * head_dim**2 * 2)
    mask_of_pairs, states = mask.flatten(0, 1), None
    kept = norm.new_empty((pairs if keep_states else 0, rows, head_dim, head_dim), dtype=torch.bfloat16)
    for group in groups(pairs, most):
        part, count = slice(group.start, group.stop), len(group)
        pooled = None if wanted is None else lse.new_empty((count, key_blocks, head_dim))
        h, z = key_states(key, value, sizes, block_k, feature_map, group, columns, pooled)
        if wanted is not None:
            queries = pooled_query[part]
            pick(queries, pooled, scale, wanted, group.start, critical, counts, mask)
        group_mask, group_norm = mask_of_pairs[part], norm[part]
        if keep_states:
            states = kept[part]
        else:
            states = h.new_empty((count, rows, head_dim, head_dim)) if states is None else states[:count]
        torch.bmm(group_mask, h.flatten(2), out=states.flatten(2))
        # Before the next group's: its memory becomes theirs.
        del h
        masked_sum(group_mask, z, group_norm)
        call.run(group, states, group_norm)
    return output, lse, norm, kept
