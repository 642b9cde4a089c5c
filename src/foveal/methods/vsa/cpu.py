"""VSA in plain PyTorch around `block_sparse_attention`, on any device and with any implementation of the fine stage."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from foveal.blocks import BlockSelection, pool_blocks, pooled_scores
from foveal.checks import product
from foveal.kernels.api import block_sparse_attention
from foveal.kernels.values import Problem
from foveal.methods.routing import Ranked, with_choice
from foveal.methods.vsa.layout import CubeLayout
from foveal.methods.vsa.router import CubeRouter


def vsa_attention_torch(
    inputs: tuple[Tensor, Tensor, Tensor],
    layout: CubeLayout,
    selection: BlockSelection | None,
    scale: float,
    gates: tuple[Tensor | None, Tensor | None],
    beside: Callable[[Tensor, Tensor, Tensor, BlockSelection], Tensor] | None = None,
    precision: str = "input",
    router: CubeRouter | None = None,
) -> Tensor:
    """O = Gc * Oc + Gf * Of, [B, H, L, D] in raster order, differentiated by autograd.

    inputs: query, key, and value in raster order. gates: Gc and Gf.
    beside: what is added to Of, from the fine stage's query, key, value, and selection, all in tile order.
    precision: of the products of queries and keys in the fine stage.
    router: what ranks the cubes; None for the coarse stage's scores.
    """
    (query, key, value), (gate_coarse, gate_fine) = inputs, gates
    length = query.shape[2]
    cubes = [layout.to_cubes(x) for x in (query, key[:, :, :length], value[:, :, :length])]
    query_c, key_c, value_c = (pool_blocks(x, layout.slot, layout.cube_sizes) for x in cubes)
    scores = by_router = pooled_scores(query_c, key_c, scale)
    if router is not None:
        by_router = router.scores(query_c, key_c[:, :, : layout.ranked_cubes], scale)
    if selection is None:
        selection = layout.pick(by_router)
    coarse = product(scores.softmax(-1), value_c)
    coarse = coarse.unsqueeze(3).expand(-1, -1, -1, layout.slot, -1).flatten(2, 3)
    fine_key, fine_value = layout.add_text(cubes[1], key), layout.add_text(cubes[2], value)
    options = {"scale": scale, "impl": "torch", "precision": precision}
    fine = cubes[0], fine_key, fine_value, selection
    if router is not None and router.learns():
        output, lse = block_sparse_attention(*fine, return_lse=True, **options)
        fine = with_choice(output, lse, Ranked(by_router, router.temperature), Problem(*fine, scale))
    else:
        fine = block_sparse_attention(*fine, **options)
    if beside is not None:
        fine = fine + beside(cubes[0], fine_key, fine_value, selection)
    coarse, fine = layout.to_raster(coarse), layout.to_raster(fine)
    if gate_coarse is not None:
        coarse = coarse * gate_coarse
    if gate_fine is not None:
        fine = fine * gate_fine
    return (coarse + fine).to(query.dtype)
