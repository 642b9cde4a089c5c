"""alpha of SLA2, which weighs the exact and the linear branch (arXiv 2602.12675, eq. 13)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from foveal.blocks import BlockSelection

# Beyond it a weight is 1 to float32's precision, and the other one's inverse leaves its range.
LARGEST_LOGIT = 30.0


def start_logits(num_heads: int, rows: int, alpha: float, device: torch.device | None = None) -> Tensor:
    """float32 [H, R]: log-odds of one alpha everywhere."""
    return torch.full((num_heads, rows), math.log(alpha / (1 - alpha)), dtype=torch.float32, device=device)


def block_logits(logits: Tensor, blocks: int) -> Tensor:
    """[H, R] to [1, H, Tq], each of the R values for as many of the query blocks."""
    logits = logits.clamp(-LARGEST_LOGIT, LARGEST_LOGIT)
    if logits.shape[1] == 1:  # no index to make, which takes a GPU four launches
        return logits.expand(-1, blocks)[None]
    row = torch.arange(blocks, device=logits.device) * logits.shape[1] // blocks
    return logits[:, row][None]


def branches_with_keys(selection: BlockSelection) -> tuple[Tensor, Tensor]:
    """bool [B, H, Tq] twice: whether a row reads any key exactly, and whether it sums over any."""
    counts, sizes = selection.critical_count, selection.key_block_sizes
    if selection.marginal is not None:
        rows, columns = selection.num_query_blocks, selection.num_key_blocks
        marginal = selection.marginal[:, :, :rows, :columns] != 0  # kernels have theirs padded
        if sizes is not None:
            marginal = marginal & (sizes > 0)[:, None, None]
        return counts > 0, marginal.any(-1)
    valid = selection.num_key_blocks if sizes is None else (sizes > 0).sum(-1)[:, None, None]
    return counts > 0, counts < valid


def branch_weights(logits: Tensor, selection: BlockSelection) -> tuple[Tensor, Tensor]:
    """alpha and 1 - alpha, [B, H, Tq] each, from `block_logits`; a branch without keys leaves its weight to the other.

    alpha stands for the share of a row's attention that falls on its critical blocks, so without others it is 1.
    """
    exact, linear = branches_with_keys(selection)
    alpha, rest = torch.sigmoid(logits), torch.sigmoid(-logits)
    alpha = torch.where(linear, torch.where(exact, alpha, 0), 1)
    return alpha, torch.where(linear, torch.where(exact, rest, 1), 0)


def to_tokens(rows: Tensor, block: int, length: int) -> Tensor:
    """[B, H, Tq] to [B, H, Lq, 1]."""
    return rows.repeat_interleave(block, 2)[:, :, :length, None]
