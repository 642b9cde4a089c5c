"""The exact result of one head at full length: the reference, a few query blocks at a time, in any precision.

A dense float64 reference of a whole video would need hundreds of gigabytes. The references take a selection, so rows of
query blocks can be cut out of a call and computed by themselves; their key and value gradients add up. Sums over chunks
are in float64 whatever the precision inside, so that cutting adds no error.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from foveal.blocks import BlockSelection

# Scores of one chunk: 128 MiB in float64, and about ten tensors of that size at a time.
CHUNK_SCORES = 2**24


def head_of(selection: BlockSelection, batch: int, head: int) -> BlockSelection:
    """The selection of one head of one sample."""
    chosen = (slice(batch, batch + 1), slice(head, head + 1))
    sizes = selection.key_block_sizes
    return dataclasses.replace(
        selection,
        critical=selection.critical[chosen],
        critical_count=selection.critical_count[chosen],
        marginal=None if selection.marginal is None else selection.marginal[chosen],
        key_block_sizes=sizes if sizes is None or sizes.shape[0] == 1 else sizes[chosen[0]],
    )


def rows_of(selection: BlockSelection, start: int, stop: int) -> BlockSelection:
    """The selection of query blocks [start, stop)."""
    return dataclasses.replace(
        selection,
        critical=selection.critical[:, :, start:stop],
        critical_count=selection.critical_count[:, :, start:stop],
        marginal=None if selection.marginal is None else selection.marginal[:, :, start:stop],
        query_length=min(stop * selection.block_q, selection.query_length) - start * selection.block_q,
    )


def in_chunks(
    attention: Callable[[Tensor, Tensor, Tensor, BlockSelection], Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selection: BlockSelection,
    dtype: torch.dtype,
) -> Tensor:
    """`attention` over all query blocks, computed in `dtype`, with memory for a chunk at a time, backward too.

    Args:
        attention: (query, key, value, selection) to the output; each of its rows depends only on its own query row.
        query, key, value: float64 [B, H, L, D].

    Returns:
        float64 [B, H, Lq, D], differentiable.
    """
    step = max(1, CHUNK_SCORES // (key.shape[0] * key.shape[1] * key.shape[2] * selection.block_q))
    parts = []
    for start in range(0, selection.num_query_blocks, step):
        stop = min(start + step, selection.num_query_blocks)
        rows = slice(start * selection.block_q, stop * selection.block_q)

        def chunk(query: Tensor, key: Tensor, value: Tensor, chosen: BlockSelection) -> Tensor:
            return attention(query.to(dtype), key.to(dtype), value.to(dtype), chosen).double()

        part = rows_of(selection, start, stop)
        parts.append(
            checkpoint(chunk, query[:, :, rows], key, value, part, use_reentrant=False, preserve_rng_state=False)
        )
    return torch.cat(parts, 2)
