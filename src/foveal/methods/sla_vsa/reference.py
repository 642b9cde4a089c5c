"""SLA and VSA in one, dense and in any floating dtype: the oracle for the fast code.

    coarse  Qc, Kc, Vc = mean over each cube;  Oc = softmax(Qc Kc^T * scale) Vc, repeated over the cube's tokens
    fine    softmax over the tokens of the chosen cubes, and over the text keys
    linear  Ol = norm(phi(Q) phi(K)^T) V over the tokens of all other cubes, or over all keys
    O = Gc * Oc + Gf * (Of + Ol W^T + b)

In a packed sequence chunks of protected segments are tiles beside the cubes, which every cube reads; their own queries
read everything exactly, and have no linear branch.

It works in the order that tokens come in. Suffixes give shapes: B, H, L tokens of tiles (the video's, or the packed
sequence's), N keys (these, then text), D, C tiles, T blocks of keys (tiles, then blocks of text).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from foveal.blocks import BlockSelection
from foveal.kernels.int8 import centered_keys, through_int8
from foveal.layout import TokenLayout
from foveal.methods.sla.feature_maps import apply_feature_map
from foveal.methods.sla_vsa.config import SLAVSAConfig

EPSILON = 1e-5


def sla_vsa_attention_reference(
    query_BHLD: Tensor,
    key_BHND: Tensor,
    value_BHND: Tensor,
    *,
    config: SLAVSAConfig,
    layout: TokenLayout,
    tile: tuple[int, int, int],
    selection: BlockSelection,
    scale: float,
    gate_coarse_BHLD: Tensor | None = None,
    gate_fine_BHLD: Tensor | None = None,
    proj_weight_DD: Tensor | None = None,
    proj_bias_D: Tensor | None = None,
    kv_lengths_B: Tensor | None = None,
) -> Tensor:
    """The output [B, H, L, D]; `selection` has a row per cube, and a column per tile and block of text."""
    dtype = torch.promote_types(query_BHLD.dtype, torch.float32)
    tile_L, num_tiles = _tiles(layout, tile)
    tile_L, length = tile_L.to(query_BHLD.device), tile_L.numel()
    text_block = num_tiles + torch.arange(key_BHND.shape[2] - length, device=tile_L.device) // selection.block_k
    block_N = torch.cat([tile_L, text_block])

    rows = selection.num_query_blocks
    kept_BHCT = F.pad(selection.critical_mask(), (0, 0, 0, num_tiles - rows), value=True)
    kept_BHLN = kept_BHCT[:, :, tile_L][..., block_N]
    valid_BN = torch.ones_like(block_N, dtype=torch.bool)[None]
    if kv_lengths_B is not None:
        valid_BN = torch.arange(block_N.numel(), device=tile_L.device) < kv_lengths_B[:, None].to(tile_L.device)
        # Padding may hold anything, including NaN, and 0 * NaN would spread it, also in the backward.
        key_BHND, value_BHND = (torch.where(valid_BN[:, None, :, None], x, 0) for x in (key_BHND, value_BHND))
    valid_B11N = valid_BN[:, None, None]
    scores_BHLN = (query_BHLD @ key_BHND.transpose(-1, -2) * scale).to(dtype)
    if config.precision == "int8":
        rounded_BHLD = through_int8(query_BHLD, tile_L, num_tiles)
        rounded_BHND = through_int8(centered_keys(key_BHND, valid_BN), block_N, kept_BHCT.shape[3])
        of_video_L1 = (tile_L < rows)[:, None]
        scores_BHLN = torch.where(of_video_L1, rounded_BHLD @ rounded_BHND.transpose(-1, -2) * scale, scores_BHLN)
    fine_BHLD = (
        torch.softmax(scores_BHLN.masked_fill(~(kept_BHLN & valid_B11N), -math.inf), -1).to(value_BHND.dtype)
        @ value_BHND
    )

    if config.linear_scope != "none":
        summed_BHLN = (~kept_BHLN if config.linear_scope == "noncritical" else torch.ones_like(kept_BHLN)) & valid_B11N
        phi_query_BHLD, phi_key_BHND = (apply_feature_map(x, config.feature_map) for x in (query_BHLD, key_BHND))
        weights_BHLN = torch.where(summed_BHLN, phi_query_BHLD @ phi_key_BHND.transpose(-1, -2), 0)
        linear_BHLD = weights_BHLN @ value_BHND.to(dtype) / (weights_BHLN.sum(-1, keepdim=True) + EPSILON)
        if proj_weight_DD is not None:
            bias_D = None if proj_bias_D is None else proj_bias_D.to(dtype)
            linear_BHLD = F.linear(linear_BHLD, proj_weight_DD.to(dtype), bias_D)
        fine_BHLD = fine_BHLD + torch.where((tile_L < rows)[:, None], linear_BHLD, 0)
    output_BHLD = fine_BHLD if gate_fine_BHLD is None else fine_BHLD * gate_fine_BHLD

    if config.coarse:
        member_CL = (torch.arange(num_tiles, device=tile_L.device)[:, None] == tile_L).to(dtype)
        mean_CL = member_CL / member_CL.sum(1, keepdim=True)
        tokens_BHLD = query_BHLD, key_BHND[:, :, :length], value_BHND[:, :, :length]
        query_BHCD, key_BHCD, value_BHCD = (mean_CL @ x.to(dtype) for x in tokens_BHLD)
        attention_BHCC = torch.softmax(query_BHCD @ key_BHCD.transpose(-1, -2) * scale, -1)
        coarse_BHLD = (attention_BHCC @ value_BHCD)[:, :, tile_L]
        output_BHLD = output_BHLD + (coarse_BHLD if gate_coarse_BHLD is None else coarse_BHLD * gate_coarse_BHLD)
    return output_BHLD.to(query_BHLD.dtype)


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
