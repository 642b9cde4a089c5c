"""VSA in plain PyTorch around `block_sparse_attention`, on any device and with any implementation of the fine stage."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from foveal.blocks import BlockSelection, pool_blocks, pooled_scores
from foveal.checks import product
from foveal.kernels.api import block_sparse_attention
from foveal.methods.vsa.layout import CubeLayout


def vsa_attention_torch(
    inputs: tuple[Tensor, Tensor, Tensor],
    layout: CubeLayout,
    selection: BlockSelection | None,
    scale: float,
    gates: tuple[Tensor | None, Tensor | None],
    beside: Callable[[Tensor, Tensor, Tensor, BlockSelection], Tensor] | None = None,
    precision: str = "input",
) -> Tensor:
    """O = Gc * Oc + Gf * Of, [B, H, L, D] in raster order, differentiated by autograd.

    inputs: query, key, and value in raster order. gates: Gc and Gf.
    beside: what is added to Of, from the fine stage's query, key, value, and selection, all in tile order.
    precision: of the products of queries and keys in the fine stage.
    """
    (query, key, value), (gate_coarse, gate_fine) = inputs, gates
    length = query.shape[2]
    cubes = [layout.to_cubes(x) for x in (query, key[:, :, :length], value[:, :, :length])]
    query_c, key_c, value_c = (pool_blocks(x, layout.slot, layout.cube_sizes) for x in cubes)
    scores = pooled_scores(query_c, key_c, scale)
    if selection is None:
        selection = layout.pick(scores)
    coarse = product(scores.softmax(-1), value_c)
    coarse = coarse.unsqueeze(3).expand(-1, -1, -1, layout.slot, -1).flatten(2, 3)
    fine_key, fine_value = layout.add_text(cubes[1], key), layout.add_text(cubes[2], value)
    options = {"scale": scale, "impl": "torch", "precision": precision}
    fine = block_sparse_attention(cubes[0], fine_key, fine_value, selection, **options)
    if beside is not None:
        fine = fine + beside(cubes[0], fine_key, fine_value, selection)
    coarse, fine = layout.to_raster(coarse), layout.to_raster(fine)
    if gate_coarse is not None:
        coarse = coarse * gate_coarse
    if gate_fine is not None:
        fine = fine * gate_fine
    return (coarse + fine).to(query.dtype)
