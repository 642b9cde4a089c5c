"""Queries and keys in eight bits, in plain PyTorch: what `precision="int8"` computes, wherever it runs.

    m   = mean of a head's valid keys                     K' = K - m shifts each row of scores, and changes no softmax
    s   = max |x| / 127 over a block's valid tokens       x8 = round(x / s), for each block of Q and of K'
    S   = Q8 K8'^T * s_q s_k * scale                      the product is exact, as it is in int32
    O   = softmax(S) V,    LSE = log sum exp S + scale * q m^T

V and the softmax keep the precision of the inputs. Gradients are exact for the dequantized Q and K', s x8, and pass
straight through the rounding to Q and K; m is a constant, for the output does not depend on it.
Source: SageAttention (arXiv 2410.02367), sections 4.2 and 4.3. Suffixes give shapes: B, H, L tokens, D, T blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from foveal.blocks import BlockSelection

PRECISIONS = ("input", "int8")  # what products of queries and keys may be in; "input" is the dtype of the tensors
LARGEST = 127  # the integers are symmetric around 0


def dequantized(query: Tensor, key: Tensor, selection: BlockSelection) -> tuple[Tensor, Tensor]:
    """Q and K' after a round trip through int8, in the blocks of a selection, in float32 or better. Differentiable."""
    blocks_of_query = _blocks(selection.query_length, selection.block_q, query.device)
    blocks_of_key = _blocks(selection.key_length, selection.block_k, key.device)
    valid = selection.key_valid()
    centered = centered_keys(key, valid)
    return (
        through_int8(query, blocks_of_query, selection.num_query_blocks),
        through_int8(centered, blocks_of_key, selection.num_key_blocks),
    )


def key_mean(key: Tensor, valid_BL: Tensor) -> Tensor:
    """The mean of each head's valid keys, [B, H, 1, D] in float32 or better, 0 without any; a constant to autograd."""
    dtype = torch.promote_types(key.dtype, torch.float32)
    total = torch.where(valid_BL[:, None, :, None], key.detach(), 0).sum(2, keepdim=True, dtype=dtype)
    return total / valid_BL.sum(1).clamp(min=1).to(dtype)[:, None, None, None]


def centered_keys(key: Tensor, valid_BL: Tensor) -> Tensor:
    """K', [B, H, L, D] in float32 or better, 0 where keys are padding. Differentiable."""
    mean = key_mean(key, valid_BL)
    return torch.where(valid_BL[:, None, :, None], key.to(mean.dtype) - mean, 0)


def through_int8(x: Tensor, block_L: Tensor, num_blocks: int) -> Tensor:
    """x [B, H, L, D] after a round trip through int8, in float32 or better; its gradient passes straight through.

    Args:
        block_L: int64 [L], the block of each token. Tokens that do not count are 0.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    fixed = x.detach()
    top_BHL = fixed.abs().amax(-1)
    top_BHT = top_BHL.new_zeros((*top_BHL.shape[:2], num_blocks))
    top_BHT = top_BHT.scatter_reduce(2, block_L.expand(top_BHL.shape), top_BHL, "amax")
    steps_per_unit = torch.where(top_BHT > 0, LARGEST / top_BHT, 0)[:, :, block_L, None]
    rounded = (fixed * steps_per_unit).round() * (top_BHT / LARGEST)[:, :, block_L, None]
    return x + (rounded - fixed)


def lse_shift(query: Tensor, key: Tensor, selection: BlockSelection, scale: float) -> Tensor:
    """scale * q m^T, [B, H, Lq] in float32 or better: the LSE over K less that over K'. Differentiable."""
    mean = key_mean(key, selection.key_valid())
    return (query.to(mean.dtype) @ mean.transpose(-1, -2)).squeeze(-1) * scale


def _blocks(length: int, block: int, device: torch.device) -> Tensor:
    return torch.arange(length, device=device) // block
