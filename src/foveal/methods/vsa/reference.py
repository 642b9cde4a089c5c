"""Video sparse attention as in the paper (VSA, arXiv 2505.13389, section 2): the oracle for the fast code.

    coarse  Qc, Kc, Vc = mean over each cube;  A = softmax(Qc Kc^T * scale);  Oc = A Vc, repeated over the cube's tokens
    fine    softmax over the tokens of the cubes that A's top-k names, and over the text keys
    O = Gc * Oc + Gf * Of

It works in raster order throughout: cubes are sets of tokens, not places in memory. Suffixes give shapes: B, H, L
video tokens, N keys (video, then text), D, C cubes, T blocks of keys (cubes, then blocks of text).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from foveal.blocks import BlockSelection
from foveal.layout import VideoGrid


def vsa_attention_reference(
    query_BHLD: Tensor,
    key_BHND: Tensor,
    value_BHND: Tensor,
    *,
    grid: VideoGrid,
    tile: tuple[int, int, int],
    selection: BlockSelection,
    scale: float,
    gate_coarse_BHLD: Tensor | None = None,
    gate_fine_BHLD: Tensor | None = None,
    kv_lengths_B: Tensor | None = None,
) -> Tensor:
    """The output [B, H, L, D] in raster order; `selection` has a row per cube and a column per cube and text block."""
    t, h, w = torch.meshgrid(*(torch.arange(side) for side in grid.shape), indexing="ij")
    cubes = [-(-side // edge) for side, edge in zip(grid.shape, tile, strict=True)]
    cube_L = ((t // tile[0]) * cubes[1] + h // tile[1]) * cubes[2] + w // tile[2]
    cube_L = cube_L.flatten().to(query_BHLD.device)
    num_cubes, length = math.prod(cubes), cube_L.numel()
    text_block = num_cubes + torch.arange(key_BHND.shape[2] - length, device=cube_L.device) // selection.block_k
    block_N = torch.cat([cube_L, text_block])

    dtype = torch.promote_types(query_BHLD.dtype, torch.float32)
    member_CL = (torch.arange(num_cubes, device=cube_L.device)[:, None] == cube_L).to(dtype)
    mean_CL = member_CL / member_CL.sum(1, keepdim=True)
    video_BHLD = query_BHLD, key_BHND[:, :, :length], value_BHND[:, :, :length]
    query_BHCD, key_BHCD, value_BHCD = (mean_CL @ x.to(dtype) for x in video_BHLD)
    attention_BHCC = torch.softmax(query_BHCD @ key_BHCD.transpose(-1, -2) * scale, -1)
    coarse_BHLD = (attention_BHCC @ value_BHCD)[:, :, cube_L]

    kept_BHLN = selection.critical_mask()[:, :, cube_L][..., block_N]
    if kv_lengths_B is not None:
        valid_BN = torch.arange(block_N.numel(), device=cube_L.device) < kv_lengths_B[:, None].to(cube_L.device)
        kept_BHLN = kept_BHLN & valid_BN[:, None, None]
        # Padding may hold anything, including NaN, and 0 * NaN would spread it, also in the backward.
        key_BHND, value_BHND = (torch.where(valid_BN[:, None, :, None], x, 0) for x in (key_BHND, value_BHND))
    scores_BHLN = (query_BHLD @ key_BHND.transpose(-1, -2) * scale).to(dtype).masked_fill(~kept_BHLN, -math.inf)
    fine_BHLD = torch.softmax(scores_BHLN, -1).to(value_BHND.dtype) @ value_BHND

    if gate_coarse_BHLD is not None:
        coarse_BHLD = coarse_BHLD * gate_coarse_BHLD
    if gate_fine_BHLD is not None:
        fine_BHLD = fine_BHLD * gate_fine_BHLD
    return (coarse_BHLD + fine_BHLD).to(query_BHLD.dtype)
