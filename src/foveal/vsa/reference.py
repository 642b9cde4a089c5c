"""Video sparse attention as written on paper (VSA, arXiv 2505.13389, section 2): the oracle for the fast code.

    coarse  Qc, Kc, Vc = mean over each cube;  A = softmax(Qc Kc^T * scale);  Oc = A Vc, repeated over the cube's tokens
    fine    softmax over the tokens of the cubes that A's top-k names
    O = Gc * Oc + Gf * Of

Works in raster order throughout: cubes are sets of tokens here, not places in memory. Suffixes give shapes: B, H, L
tokens, D, C cubes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from foveal.types import BlockSelection
from foveal.video_grid import VideoGrid


def vsa_attention_reference(
    query_BHLD: Tensor,
    key_BHLD: Tensor,
    value_BHLD: Tensor,
    *,
    grid: VideoGrid,
    tile: tuple[int, int, int],
    selection: BlockSelection,
    scale: float,
    gate_coarse_BHLD: Tensor | None = None,
    gate_fine_BHLD: Tensor | None = None,
) -> Tensor:
    """The output [B, H, L, D] in raster order; `selection` holds one row and one column per cube."""
    t, h, w = torch.meshgrid(*(torch.arange(side) for side in grid.shape), indexing="ij")
    cubes = [-(-side // edge) for side, edge in zip(grid.shape, tile, strict=True)]
    cube_L = ((t // tile[0]) * cubes[1] + h // tile[1]) * cubes[2] + w // tile[2]
    cube_L = cube_L.flatten().to(query_BHLD.device)

    dtype = torch.promote_types(query_BHLD.dtype, torch.float32)
    member_CL = (torch.arange(math.prod(cubes), device=cube_L.device)[:, None] == cube_L).to(dtype)
    mean_CL = member_CL / member_CL.sum(1, keepdim=True)
    query_BHCD, key_BHCD, value_BHCD = (mean_CL @ x.to(dtype) for x in (query_BHLD, key_BHLD, value_BHLD))
    attention_BHCC = torch.softmax(query_BHCD @ key_BHCD.transpose(-1, -2) * scale, -1)
    coarse_BHLD = (attention_BHCC @ value_BHCD)[:, :, cube_L]

    kept_BHLL = selection.critical_mask()[:, :, cube_L][..., cube_L]
    scores_BHLL = (query_BHLD @ key_BHLD.transpose(-1, -2) * scale).to(dtype).masked_fill(~kept_BHLL, -math.inf)
    fine_BHLD = torch.softmax(scores_BHLL, -1).to(value_BHLD.dtype) @ value_BHLD

    if gate_coarse_BHLD is not None:
        coarse_BHLD = coarse_BHLD * gate_coarse_BHLD
    if gate_fine_BHLD is not None:
        fine_BHLD = fine_BHLD * gate_fine_BHLD
    return (coarse_BHLD + fine_BHLD).to(query_BHLD.dtype)
