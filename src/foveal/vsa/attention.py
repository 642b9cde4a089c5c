"""VSA for use: the function `vsa_attention` and the module `VideoSparseAttention` that owns its gates."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from foveal.block_sparse.api import block_sparse_attention, resolve_impl, validate_qkv, validate_selection
from foveal.selection import pick_blocks, pool_blocks, pooled_scores
from foveal.types import IMPLS, BlockSelection, VSAConfig, check_choice, check_positive_int, check_scale
from foveal.video_grid import VideoGrid, tile_indices


def resolve_tile(config: VSAConfig, grid: VideoGrid) -> tuple[int, int, int]:
    """The cube that `config` means on this grid."""
    return grid.auto_tile() if config.tile == "auto" else config.tile


def slot_size(tile: tuple[int, int, int]) -> int:
    """Tokens per slot in the slotted tile order: the power of two that holds a cube, at least 16 (a matrix tile)."""
    return max(16, 1 << (math.prod(tile) - 1).bit_length())


def select_cubes(
    query: Tensor, key: Tensor, *, config: VSAConfig, grid: VideoGrid, scale: float | None = None
) -> BlockSelection:
    """The cubes that each cube attends to, as `vsa_attention` picks them: for reuse, or to look at.

    Args:
        query, key: [B, H, L, D], raster order.

    Returns:
        A selection over the slotted tile order: one row and one column per cube.
    """
    _validate(query, key, key, config, grid)
    tile = resolve_tile(config, grid)
    slot = slot_size(tile)
    sizes = grid.cube_sizes(tile, query.device)[None]
    query, key = (pool_blocks(grid.to_tile_order(x.detach(), tile, slot=slot), slot, sizes) for x in (query, key))
    return _pick(pooled_scores(query, key, check_scale(scale, query.shape[-1])), config, slot, sizes)


def vsa_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    config: VSAConfig,
    grid: VideoGrid,
    gate_coarse: Tensor | None = None,
    gate_fine: Tensor | None = None,
    selection: BlockSelection | None = None,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """Video sparse attention: O = Gc * Oc + Gf * Of (VSA, arXiv 2505.13389, eq. 1-4).

    Args:
        query, key, value: [B, H, L, D], raster order, L = grid.num_tokens; bfloat16, float16, float32 or float64.
        config: how many cubes, and which.
        grid: the video's shape in tokens.
        gate_coarse, gate_fine: [B, H, L, D], raster order; a missing gate is 1.
        selection: a fixed selection (see `select_cubes`) instead of the top of the coarse stage.
        scale: softmax scale of both stages; None for 1 / sqrt(D).
        impl: "auto", "reference", "torch", "triton" or "gluon"; see `block_sparse_attention`.

    Returns:
        [B, H, L, D] in the dtype of `query`, raster order. Gradients flow through the pooling and the gates, not
        through the choice of cubes.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    _validate(query, key, value, config, grid)
    for name, gate in (("gate_coarse", gate_coarse), ("gate_fine", gate_fine)):
        if gate is not None and (not isinstance(gate, Tensor) or gate.shape != query.shape):
            got = tuple(gate.shape) if isinstance(gate, Tensor) else type(gate).__name__
            raise ValueError(f"{name} must have the shape of query, {tuple(query.shape)}, got {got}")
        if gate is not None and gate.device != query.device:
            raise ValueError(f"{name} is on {gate.device}, but query is on {query.device}")
    scale = check_scale(scale, query.shape[-1])
    tile = resolve_tile(config, grid)
    slot = slot_size(tile)
    impl = resolve_impl(impl, query, key, value, slot, slot)
    sizes = grid.cube_sizes(tile, query.device)[None]

    raster = query, key, value
    query, key, value = (grid.to_tile_order(x, tile, slot=slot) for x in raster)
    query_c, key_c, value_c = (pool_blocks(x, slot, sizes) for x in (query, key, value))
    scores = pooled_scores(query_c, key_c, scale)
    if selection is None:
        selection = _pick(scores, config, slot, sizes)
    else:
        validate_selection(selection, query, key)
        if (selection.block_q, selection.block_k) != (slot, slot):
            raise ValueError(
                f"selection must have blocks of {slot}x{slot} for tile {tile}, "
                f"got {selection.block_q}x{selection.block_k}"
            )
    if impl == "reference":
        from foveal.vsa.reference import vsa_attention_reference

        return vsa_attention_reference(
            *raster,
            grid=grid,
            tile=tile,
            selection=selection,
            scale=scale,
            gate_coarse_BHLD=gate_coarse,
            gate_fine_BHLD=gate_fine,
        )
    coarse = scores.softmax(-1) @ value_c
    coarse = coarse.unsqueeze(3).expand(-1, -1, -1, slot, -1).flatten(2, 3)
    fine = block_sparse_attention(query, key, value, selection, scale=scale, impl=impl)
    coarse, fine = (grid.to_raster_order(x, tile, slot=slot) for x in (coarse, fine))
    if gate_coarse is not None:
        coarse = coarse * gate_coarse
    if gate_fine is not None:
        fine = fine * gate_fine
    return (coarse + fine).to(fine.dtype)


def _pick(scores: Tensor, config: VSAConfig, slot: int, sizes: Tensor) -> BlockSelection:
    critical, counts, _ = pick_blocks(scores, keep_ratio=config.keep_ratio, topk=config.topk)
    length = scores.shape[-1] * slot
    return BlockSelection(
        critical=critical,
        critical_count=counts,
        marginal=None,
        block_q=slot,
        block_k=slot,
        query_length=length,
        key_length=length,
        key_block_sizes=sizes,
    )


def _validate(query, key, value, config, grid) -> None:
    if not isinstance(config, VSAConfig):
        raise TypeError(f"config must be a VSAConfig, got {type(config).__name__}")
    if not isinstance(grid, VideoGrid):
        raise TypeError(f"grid must be a VideoGrid, got {grid!r}")
    validate_qkv(query, key, value)
    grid.check_length(query.shape[2])
    grid.check_length(key.shape[2])


class VideoSparseAttention(nn.Module):
    """Video sparse attention with its gates, which are linear in the layer's hidden states.

    Args:
        hidden_dim: width of the hidden states that the gates read.
        num_heads, head_dim: H and D; the gates have H * D outputs.
        config: see `VSAConfig`.
        impl: see `block_sparse_attention`.

    Attributes:
        to_gate_coarse: Linear(hidden_dim, H * D), zero at the start, so that a retrofitted layer first equals its
            fine branch.
        to_gate_fine: the same for the fine branch, the constant 1 at the start; None unless config.fine_gate, and
            the gate is then fixed at 1.
    """

    def __init__(
        self, hidden_dim: int, num_heads: int, head_dim: int, config: VSAConfig, *, impl: str = "auto"
    ) -> None:
        super().__init__()
        for name, value in (("hidden_dim", hidden_dim), ("num_heads", num_heads), ("head_dim", head_dim)):
            check_positive_int(name, value)
        if not isinstance(config, VSAConfig):
            raise TypeError(f"config must be a VSAConfig, got {type(config).__name__}")
        check_choice("impl", impl, IMPLS)
        self.hidden_dim, self.num_heads, self.head_dim = hidden_dim, num_heads, head_dim
        self.config, self.impl = config, impl
        self.to_gate_coarse = nn.Linear(hidden_dim, num_heads * head_dim)
        nn.init.zeros_(self.to_gate_coarse.weight)
        nn.init.zeros_(self.to_gate_coarse.bias)
        self.to_gate_fine = nn.Linear(hidden_dim, num_heads * head_dim) if config.fine_gate else None
        if self.to_gate_fine is not None:
            nn.init.zeros_(self.to_gate_fine.weight)
            nn.init.ones_(self.to_gate_fine.bias)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        hidden_states: Tensor,
        *,
        grid: VideoGrid,
        selection: BlockSelection | None = None,
    ) -> Tensor:
        """[B, H, L, D] three times and hidden_states [B, L, hidden_dim] to [B, H, L, D]; see `vsa_attention`."""
        expected = (self.num_heads, self.head_dim)
        if (query.shape[1], query.shape[-1]) != expected:
            raise ValueError(f"query must have (heads, head_dim) {expected}, got {(query.shape[1], query.shape[-1])}")
        if hidden_states.shape != (query.shape[0], query.shape[2], self.hidden_dim):
            raise ValueError(
                f"hidden_states must have shape {(query.shape[0], query.shape[2], self.hidden_dim)}, "
                f"got {tuple(hidden_states.shape)}"
            )
        gates = [
            None if to_gate is None else to_gate(hidden_states).unflatten(-1, expected).transpose(1, 2)
            for to_gate in (self.to_gate_coarse, self.to_gate_fine)
        ]
        return vsa_attention(
            query,
            key,
            value,
            config=self.config,
            grid=grid,
            gate_coarse=gates[0],
            gate_fine=gates[1],
            selection=selection,
            impl=self.impl,
        )

    def select(self, query: Tensor, key: Tensor, *, grid: VideoGrid) -> BlockSelection:
        """The selection that `forward` makes for the same arguments, to look at; see `select_cubes`."""
        return select_cubes(query, key, config=self.config, grid=grid)

    def token_places(self, grid: VideoGrid) -> Tensor:
        """int64 [L]: where each token, in raster order, stands in the slotted tile order."""
        tile = resolve_tile(self.config, grid)
        return tile_indices(grid.shape, tile, slot_size(tile), torch.device("cpu"))[1]

    def extra_repr(self) -> str:
        return f"hidden_dim={self.hidden_dim}, num_heads={self.num_heads}, head_dim={self.head_dim}, {self.config}"
