"""How dense attention weights are spread, and what leaving out blocks loses, for the heads of one call.

Nothing of size N x N is ever allocated: query blocks are sampled evenly (or all taken), and processed a few rows at a
time. Shape legend: H heads, L query tokens, N key tokens, D head dimension, r rows in flight, Tq / Tk query and key
blocks, R ratios.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from foveal.blocks import pool_blocks, pooled_scores
from foveal.kernels.int8 import centered_keys, through_int8
from foveal.layout import VideoGrid
from foveal.rules import count

ORDERS = ("raster", "tile")
RANKINGS = ("oracle", "pooled")
# The thresholds 1/N and 1/(100 N), whose shares SLA's figure 1 shows.
FLOOR = 100
# Copies of a chunk of weights that are alive at once, temporaries included.
LIVE_COPIES = 6
POWER_ITERATIONS = 24


@dataclass(frozen=True)
class SelectionQuality:
    """What a share of the key blocks keeps, per head. Every tensor is float32 [H, R] on the CPU.

    Attributes:
        recall: attention mass inside the kept blocks, by ranking: "oracle" knows each block's true mass, "pooled" ranks
            pooled scores, as SLA and VSA do.
        error: |O_kept - O| / |O| over the sampled rows, by ranking, where O_kept attends only to the kept blocks.
        overlap: share of a query block's pooled selection that the next query block selects too, over all query blocks.
    """

    recall: dict[str, Tensor]
    error: dict[str, Tensor]
    overlap: Tensor


@dataclass(frozen=True)
class WeightDistribution:
    """How attention weights are spread, per head. Every tensor is float32 [H] on the CPU.

    Attributes:
        share_above, mass_above: share of the weights above 1/N, and the attention mass that they hold.
        share_below, mass_below: the same for weights below 1/(100 N).
        stable_rank: |P|_F^2 / |P|_2^2 of the sampled rows.
        stable_rank_rest: the same once each row's largest weights are taken out (SLA, arXiv 2509.24006, section 3).
    """

    share_above: Tensor
    mass_above: Tensor
    share_below: Tensor
    mass_below: Tensor
    stable_rank: Tensor
    stable_rank_rest: Tensor


def reorder(x: Tensor, grid: VideoGrid, tile: tuple[int, int, int]) -> Tensor:
    """[1, H, N, D] with the grid's tokens, which come first, in tile order. The text after them stays."""
    video = grid.to_tile_order(x[:, :, : grid.num_tokens], tile)
    return torch.cat((video, x[:, :, grid.num_tokens :]), 2)


@torch.no_grad()
def selection_quality(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    block_q: int,
    block_k: int,
    keep_ratios: Sequence[float],
    scale: float | None = None,
    query_blocks: int | None = None,
    memory_bytes: int = 2**30,
) -> SelectionQuality:
    """Recall, output error and overlap of block selections at several ratios.

    Args:
        query: [1, H, L, D], in the order in which to cut it into blocks.
        key, value: [1, H, N, D]. Keys past L are text: their blocks are always kept, and do not count in the ratio.
        block_q, block_k: block sizes in tokens.
        keep_ratios: shares of the key blocks to keep.
        scale: softmax scale; None for 1 / sqrt(D).
        query_blocks: how many query blocks to sample, evenly; None for all.
        memory_bytes: memory for the weights in flight, with all copies.

    Raises:
        ValueError: the batch has more than one sample.
    """
    _check_single(query)
    heads, length, head_dim = query.shape[1:]
    scale = head_dim**-0.5 if scale is None else scale
    columns, rows_of_blocks = -(-key.shape[2] // block_k), -(-length // block_q)
    free = columns if key.shape[2] == length else length // block_k
    kept = torch.tensor([max(1, count(ratio, free)) for ratio in keep_ratios], device=query.device)
    protected = torch.arange(columns, device=query.device) >= free
    scores = pooled_scores(pool_blocks(query, block_q), pool_blocks(key, block_k), scale)[0]
    places = _places(scores.masked_fill(protected, torch.inf))
    chosen = places[None] < (kept + protected.sum())[:, None, None, None]
    both = (chosen[:, :, 1:] & chosen[:, :, :-1] & ~protected).sum(-1).float()
    overlap = (both / kept[:, None, None]).mean(-1).T if rows_of_blocks > 1 else both.new_ones(heads, len(kept))

    # One row per ranking and ratio, in that order: [H, M], M = 2 R.
    recall = query.new_zeros((heads, len(RANKINGS) * len(kept)), dtype=torch.float64)
    lost, total = recall.clone(), recall.new_zeros(heads)
    sampled = sample(rows_of_blocks, query_blocks).to(query.device)
    # Weights; what each key block adds to the outputs, D for every block_k weights; and the outputs, with temporaries.
    bytes_each = block_q * 4 * (columns * (block_k * LIVE_COPIES + head_dim) + 3 * recall.shape[1] * head_dim)
    for block_range, some in _chunks(len(sampled), heads, bytes_each, memory_bytes):
        blocks = sampled[block_range]
        row, valid = _rows(blocks, block_q, length)
        weights = _weights(query[0, some], key[0, some], row, scale) * valid[:, None]
        # Head, query block, row, key block, key: the letters of the products below are h, b, q, t, k; d is a feature.
        weights = _cut(_cut(weights, 2, block_k), 1, block_q)
        sums = weights.sum(-1)
        parts = torch.einsum("hbqtk,htkd->htbqd", weights, _cut(value[0, some].float(), 1, block_k))
        del weights
        mass = sums.sum(2)
        ranks = {"oracle": _places(mass.masked_fill(protected, torch.inf)), "pooled": places[some][:, blocks]}
        wanted = (kept + protected.sum())[:, None]
        inside = torch.cat([(ranks[name][:, :, None] < wanted) for name in RANKINGS], 2).float()
        recall[some] += torch.einsum("hbmt,hbt->hm", inside, mass).double()
        exact = parts.sum(1)
        total[some] += exact.double().square().sum((1, 2, 3))
        # The kept sets are block masks, so all of them together are one product with the blocks' parts.
        outputs = torch.einsum("hbmt,htbqd->hbmqd", inside, parts)
        outputs /= torch.einsum("hbmt,hbqt->hbmq", inside, sums).clamp_min(1e-30)[..., None]
        difference = (outputs - exact[:, :, None]) * valid.view(1, len(blocks), 1, block_q, 1)
        lost[some] += difference.square().sum((3, 4)).double().sum(1)
    rows = _rows(sampled, block_q, length)[1].sum()
    by_ranking = {"recall": recall / rows, "error": (lost / total[:, None]).sqrt()}
    by_ranking = {
        figure: dict(zip(RANKINGS, found.float().cpu().chunk(len(RANKINGS), 1), strict=True))
        for figure, found in by_ranking.items()
    }
    return SelectionQuality(**by_ranking, overlap=overlap.float().cpu())


@torch.no_grad()
def weight_distribution(
    query: Tensor,
    key: Tensor,
    *,
    scale: float | None = None,
    rows: int | None = 1024,
    top: float = 0.08,
    memory_bytes: int = 2**30,
) -> WeightDistribution:
    """How the weights of evenly sampled query rows are spread, and the stable rank with and without the largest.

    Args:
        query, key: [1, H, L, D], [1, H, N, D].
        rows: how many query rows to sample; None for all.
        top: share of each row's weights that count as its largest ones.
        memory_bytes: memory for the weights in flight; at least one head's sampled rows are held at once.
    """
    _check_single(query)
    heads, length, head_dim = query.shape[1:]
    scale = head_dim**-0.5 if scale is None else scale
    row = sample(length, rows).to(query.device)
    keys = key.shape[2]
    found = {name: [] for name in WeightDistribution.__dataclass_fields__}
    for _, some in _chunks(1, heads, len(row) * keys * 4 * LIVE_COPIES, memory_bytes):
        weights = _weights(query[0, some], key[0, some], row, scale)
        above, below = weights > 1 / keys, weights < 1 / (FLOOR * keys)
        found["share_above"].append(above.float().mean((1, 2)))
        found["mass_above"].append((weights * above).sum((1, 2)) / len(row))
        found["share_below"].append(below.float().mean((1, 2)))
        found["mass_below"].append((weights * below).sum((1, 2)) / len(row))
        found["stable_rank"].append(_stable_rank(weights))
        del above, below
        largest = weights.topk(max(1, count(top, keys)), -1, sorted=False).indices
        found["stable_rank_rest"].append(_stable_rank(weights.scatter_(-1, largest, 0.0)))
    return WeightDistribution(**{name: torch.cat(parts).float().cpu() for name, parts in found.items()})


@torch.no_grad()
def int8_squares(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    block: int = 64,
    scale: float | None = None,
    query_blocks: int | None = 16,
    memory_bytes: int = 2**30,
) -> Tensor:
    """What `precision="int8"` changes in dense attention over evenly sampled query blocks, by head.

    Args:
        query, key, value: [1, H, L, D], [1, H, N, D] twice.
        block: tokens a block of queries and of keys, each with a scale of its own.
        scale: softmax scale; None for 1 / sqrt(D).
        query_blocks, memory_bytes: as in `selection_quality`.

    Returns:
        float64 [2, H] on the CPU: the sums of (O_int8 - O)^2 and of O^2. The error is the root of their quotient.

    Raises:
        ValueError: the batch has more than one sample.
    """
    _check_single(query)
    heads, length, head_dim = query.shape[1:]
    keys, scale = key.shape[2], head_dim**-0.5 if scale is None else scale
    sampled = sample(-(-length // block), query_blocks).to(query.device)
    squares = torch.zeros(2, heads, dtype=torch.float64, device=query.device)
    of_query, of_key = (torch.arange(tokens, device=query.device) // block for tokens in (length, keys))
    every = torch.ones(1, keys, dtype=torch.bool, device=query.device)
    bytes_each = block * keys * 4 * LIVE_COPIES
    for block_range, some in _chunks(len(sampled), heads, bytes_each, memory_bytes):
        row, valid = _rows(sampled[block_range], block, length)
        rounded_query = through_int8(query[:, some], of_query, -(-length // block))
        rounded_key = through_int8(centered_keys(key[:, some], every), of_key, -(-keys // block))
        exact, rounded = (
            _weights(q[0], k[0], row, scale) @ value[0, some].float() * valid[:, None]
            for q, k in ((query[:, some], key[:, some]), (rounded_query, rounded_key))
        )
        squares[0, some] += (rounded - exact).double().square().sum((1, 2))
        squares[1, some] += exact.double().square().sum((1, 2))
    return squares.cpu()


def sample(total: int, wanted: int | None) -> Tensor:
    """int64, at most `wanted` of `total` places, evenly spread; all of them for None."""
    if wanted is None or wanted >= total:
        return torch.arange(total)
    return torch.linspace(0, total - 1, wanted).round().long().unique()


def _check_single(query: Tensor) -> None:
    if query.dim() != 4 or query.shape[0] != 1:
        raise ValueError(f"query must be one sample, [1, H, L, D], got {tuple(query.shape)}")


def _chunks(blocks: int, heads: int, bytes_each: int, memory_bytes: int) -> Iterator[tuple[slice, slice]]:
    """(blocks, heads) to work on at a time: many heads of few blocks, so that key blocks are read once for several."""
    pairs = max(1, memory_bytes // bytes_each)
    step_heads = min(heads, pairs)
    step_blocks = max(1, pairs // step_heads)
    for head in range(0, heads, step_heads):
        for block in range(0, blocks, step_blocks):
            yield slice(block, block + step_blocks), slice(head, head + step_heads)


def _rows(blocks: Tensor, block_q: int, length: int) -> tuple[Tensor, Tensor]:
    """Token rows of query blocks, block after block, and 1.0 for those that exist; the others repeat the last token."""
    row = (blocks[:, None] * block_q + torch.arange(block_q, device=blocks.device)).flatten()
    return row.clamp(max=length - 1), (row < length).float()


def _weights(query: Tensor, key: Tensor, row: Tensor, scale: float) -> Tensor:
    """float32 [h, r, N] attention weights of some rows."""
    return ((query[:, row].float() * scale) @ key.float().transpose(-1, -2)).softmax(-1)


def _cut(x: Tensor, dim: int, block: int) -> Tensor:
    """Cuts a dimension into blocks; the last one is filled with zeros."""
    short = -x.shape[dim] % block
    if short:
        x = torch.nn.functional.pad(x, (0, 0) * (x.dim() - 1 - dim) + (0, short))
    return x.unflatten(dim, (-1, block))


def _places(scores: Tensor) -> Tensor:
    """Each entry's place among its row's in descending order; ties go to the lower index."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    place = torch.arange(scores.shape[-1], device=scores.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, place)


def _stable_rank(matrix: Tensor) -> Tensor:
    """|A|_F^2 / |A|_2^2 of non-negative [h, r, N], the spectral norm by power iteration; 0 for a zero matrix."""
    vector = matrix.new_ones(matrix.shape[0], matrix.shape[2], 1)
    largest = matrix.new_zeros(matrix.shape[0])
    for _ in range(POWER_ITERATIONS):
        vector = vector / vector.norm(dim=1, keepdim=True).clamp_min(1e-30)
        image = matrix @ vector
        largest = image.square().sum((1, 2))
        vector = matrix.transpose(1, 2) @ image
    return matrix.square().sum((1, 2)) / largest.clamp_min(1e-30)
