"""Video sparse attention as in the paper (VSA, arXiv 2505.13389, section 2): the oracle for the fast code.

    coarse  Qc, Kc, Vc = mean over each cube;  A = softmax(Qc Kc^T * scale);  Oc = A Vc, repeated over the cube's tokens
    fine    softmax over the tokens of the cubes that A's top-k names, and over the text keys
    O = Gc * Oc + Gf * Of

With precision="int8" the fine stage of cubes has queries and keys after a round trip through eight bits, tile by tile
(`foveal.kernels.int8`).

In a packed sequence chunks of protected segments are tiles beside the cubes: the coarse stage has all of them, the fine
stage of each cube reads all chunks, and that of a chunk reads everything.

It works in the order that tokens come in: tiles are sets of tokens, not places in memory. Suffixes give shapes: B, H, L
tokens of tiles (the video's, or the packed sequence's), N keys (these, then text), D, C tiles, T blocks of keys (tiles,
then blocks of text).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from foveal.blocks import BlockSelection
from foveal.kernels.int8 import centered_keys, through_int8
from foveal.layout import TokenLayout


def vsa_attention_reference(
    query_BHLD: Tensor,
    key_BHND: Tensor,
    value_BHND: Tensor,
    *,
    layout: TokenLayout,
    tile: tuple[int, int, int],
    selection: BlockSelection,
    scale: float,
    gate_coarse_BHLD: Tensor | None = None,
    gate_fine_BHLD: Tensor | None = None,
    kv_lengths_B: Tensor | None = None,
    precision: str = "input",
) -> Tensor:
    """The output [B, H, L, D]; `selection` has a row per cube, and a column per tile and block of text."""
    tile_L, num_tiles = _tiles(layout, tile)
    tile_L, length = tile_L.to(query_BHLD.device), tile_L.numel()
    text_block = num_tiles + torch.arange(key_BHND.shape[2] - length, device=tile_L.device) // selection.block_k
    block_N = torch.cat([tile_L, text_block])

    dtype = torch.promote_types(query_BHLD.dtype, torch.float32)
    member_CL = (torch.arange(num_tiles, device=tile_L.device)[:, None] == tile_L).to(dtype)
    mean_CL = member_CL / member_CL.sum(1, keepdim=True)
    tokens_BHLD = query_BHLD, key_BHND[:, :, :length], value_BHND[:, :, :length]
    query_BHCD, key_BHCD, value_BHCD = (mean_CL @ x.to(dtype) for x in tokens_BHLD)
    attention_BHCC = torch.softmax(query_BHCD @ key_BHCD.transpose(-1, -2) * scale, -1)
    coarse_BHLD = (attention_BHCC @ value_BHCD)[:, :, tile_L]

    kept_BHCT = selection.critical_mask()
    kept_BHCT = F.pad(kept_BHCT, (0, 0, 0, num_tiles - kept_BHCT.shape[2]), value=True)
    kept_BHLN = kept_BHCT[:, :, tile_L][..., block_N]
    valid_BN = torch.ones_like(block_N, dtype=torch.bool)[None]
    if kv_lengths_B is not None:
        valid_BN = torch.arange(block_N.numel(), device=tile_L.device) < kv_lengths_B[:, None].to(tile_L.device)
        kept_BHLN = kept_BHLN & valid_BN[:, None, None]
        # Padding may hold anything, including NaN, and 0 * NaN would spread it, also in the backward.
        key_BHND, value_BHND = (torch.where(valid_BN[:, None, :, None], x, 0) for x in (key_BHND, value_BHND))
    scores_BHLN = (query_BHLD @ key_BHND.transpose(-1, -2) * scale).to(dtype)
    if precision == "int8":
        rounded_BHLD = through_int8(query_BHLD, tile_L, num_tiles)
        rounded_BHND = through_int8(centered_keys(key_BHND, valid_BN), block_N, kept_BHCT.shape[3])
        of_video_L1 = (tile_L < selection.num_query_blocks)[:, None]
        scores_BHLN = torch.where(of_video_L1, rounded_BHLD @ rounded_BHND.transpose(-1, -2) * scale, scores_BHLN)
    scores_BHLN = scores_BHLN.masked_fill(~kept_BHLN, -math.inf)
    fine_BHLD = torch.softmax(scores_BHLN, -1).to(value_BHND.dtype) @ value_BHND

    if gate_coarse_BHLD is not None:
        coarse_BHLD = coarse_BHLD * gate_coarse_BHLD
    if gate_fine_BHLD is not None:
        fine_BHLD = fine_BHLD * gate_fine_BHLD
    return (coarse_BHLD + fine_BHLD).to(query_BHLD.dtype)


def _tiles(layout: TokenLayout, tile: tuple[int, int, int]) -> tuple[Tensor, int]:
    """The tile of each token, int64 [L], and how many tiles there are: first the video's cubes, then the chunks."""
    t, h, w = torch.meshgrid(*(torch.arange(side) for side in layout.grid.shape), indexing="ij")
    cubes = [-(-side // edge) for side, edge in zip(layout.grid.shape, tile, strict=True)]
    cube = ((t // tile[0]) * cubes[1] + h // tile[1]) * cubes[2] + w // tile[2]
    first, segments = math.prod(cubes), []
    for length in (*layout.before, *layout.after):
        segments.append(first + torch.arange(length) // math.prod(tile))
        first += -(-length // math.prod(tile))
    before = len(layout.before)
    return torch.cat([*segments[:before], cube.flatten(), *segments[before:]]), first
