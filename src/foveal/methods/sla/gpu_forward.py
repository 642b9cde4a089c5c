"""The forward of SLA on GPUs, a few heads at a time: key states, selection, their masked sum, attention.

Each group of heads goes through all of it before the next one starts, so that the extra memory is a group's key states
h and sums H (all sums where a backward will want them), and one pass over K and V makes the states and the pooled keys
that the selection needs.
Source: SLA (arXiv 2509.24006), Algorithm 1.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from foveal.kernels import hopper as gluon
from foveal.kernels.triton.forward import Forward
from foveal.kernels.triton.linear import key_state_sums, key_states, masked_sum
from foveal.kernels.triton.select import Wanted, pick, pool

# What h and H of the heads in flight may take; or as much as the output, if that is more. Larger groups mean fewer
# launches, and fewer times that the last programs of a kernel leave the device half idle.
GROUP_BYTES = 240 * 2**20


def groups(pairs: int, most: int) -> Iterator[range]:
    """Cuts `pairs` into ranges of like lengths with at most `most` each (one at least)."""
    step = -(-pairs // -(-pairs // max(1, most)))
    for start in range(0, pairs, step):
        yield range(start, min(start + step, pairs))


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """Where the next group is prepared while one attends: kernels for 64 queries leave room beside them."""
    return torch.cuda.Stream(device, priority=-1)


def forward_in_groups(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    critical: Tensor,
    counts: Tensor,
    mask: Tensor | None,
    sizes: Tensor | None,
    projection: tuple[Tensor | None, Tensor],
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

    Over all keys the blocks of Z and H are one; else both are empty unless `keep_states`, and come from one product.

    Args:
        query, key, value, critical, counts, sizes, block_q, block_k, scale: as in `block_sparse.triton.forward`.
        mask: bfloat16 [B, H, padded Tq, padded Tk], what to sum over; None for every key.
        projection: W in bfloat16, on Hopper None for the identity, and b in float32.
        wanted: the rule of the selection, which is then made here, into `critical`, `counts` and `mask`; None if they
            hold it already.
    """
    pairs, head_dim, key_blocks = query.shape[0] * query.shape[1], query.shape[-1], -(-key.shape[2] // block_k)
    lists = critical, counts, sizes, block_q, block_k
    weight, bias = projection
    # One H for all is cheap to project, and spares the Hopper kernels' epilogue W.
    early = hopper and mask is None and weight is not None
    remaining = (None if early else weight, bias)
    call = (gluon.Forward if hopper else Forward)(query, key, value, *lists, scale, remaining, feature_map)
    output, lse = call.results
    pooled_query = None if wanted is None else pool(query, block_q).flatten(0, 1)
    if mask is None:
        pooled = None if wanted is None else lse.new_empty((pairs, key_blocks, head_dim))
        state, norm = key_state_sums(key, value, sizes, block_k, feature_map, pooled)
        if wanted is not None:
            pick(pooled_query, pooled, scale, wanted, 0, critical, counts, None)
        rows = critical.shape[2]
        projected = state @ weight.t() if early else state
        call.run(range(pairs), projected.expand(-1, rows, -1, -1), norm.expand(-1, rows, -1))
        return output, lse, norm, state

    rows, columns = mask.shape[2:]
    most = max(GROUP_BYTES, output.nbytes) // ((rows + columns) * head_dim * (head_dim + 1) * 2)
    parts = list(groups(pairs, most))
    largest, area = len(parts[0]), head_dim**2
    norm = lse.new_empty((pairs if keep_states else 0, rows, head_dim))
    kept = norm.new_empty((pairs if keep_states else 0, rows, head_dim, head_dim), dtype=torch.bfloat16)
    if keep_states:
        h, z = mask.new_empty((largest, columns, area)), lse.new_empty((largest, columns, head_dim))
    else:
        # Side by side, for one product. Rounding Z costs next to nothing: phi(Q) Z sums products of positive numbers,
        # each rounded on its own.
        h = mask.new_empty((largest, columns, area + head_dim))
        z, states = h[..., area:], h.new_empty((largest, rows, h.shape[2]))
    squares = h[..., :area].unflatten(2, (head_dim, head_dim))
    mask_of_pairs = mask.flatten(0, 1)

    def prepare(group: range) -> None:
        """The key states of a group in h and z, and its lists and mask."""
        count = len(group)
        pooled = None if wanted is None else lse.new_empty((count, key_blocks, head_dim))
        key_states(key, value, sizes, block_k, feature_map, group, pooled, squares[:count], z[:count])
        if wanted is not None:
            queries = pooled_query[group.start : group.stop]
            pick(queries, pooled, scale, wanted, group.start, critical, counts, mask)

    side = _side_stream(query.device) if hopper and block_q == 64 and len(parts) > 1 else None
    prepare(parts[0])
    for group, following in itertools.zip_longest(parts, parts[1:]):
        part, count = slice(group.start, group.stop), len(group)
        sums = kept[part].flatten(2) if keep_states else states[:count]
        torch.bmm(mask_of_pairs[part], h[:count], out=sums)
        group_norm = masked_sum(mask_of_pairs[part], z[:count], norm[part]) if keep_states else sums[..., area:]
        if side is not None:
            side.wait_stream(torch.cuda.current_stream())  # h and z are free again
        call.run(group, sums[..., :area].unflatten(2, (head_dim, head_dim)), group_norm)
        if following is not None:
            with contextlib.nullcontext() if side is None else torch.cuda.stream(side):
                prepare(following)
            if side is not None:
                torch.cuda.current_stream().wait_stream(side)
    return output, lse, norm, kept
