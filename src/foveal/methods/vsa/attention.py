"""VSA for use: the function `vsa_attention` and the module `VideoSparseAttention` that owns its gates."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from foveal.blocks import BlockSelection, pool_blocks, pooled_scores
from foveal.checks import (
    check_choice,
    check_kv_lengths,
    check_positive_int,
    check_scale,
    validate_qkv,
    without_autocast,
)
from foveal.kernels.api import IMPLS, resolve_impl
from foveal.layout import VideoGrid, tile_indices
from foveal.methods.vsa.config import VSAConfig
from foveal.methods.vsa.cpu import vsa_attention_torch
from foveal.methods.vsa.layout import CubeLayout, resolve_tile, slot_size


@without_autocast
def select_cubes(
    query: Tensor,
    key: Tensor,
    *,
    config: VSAConfig,
    grid: VideoGrid,
    scale: float | None = None,
    kv_lengths: Tensor | None = None,
) -> BlockSelection:
    """The cubes that each cube attends to, as `vsa_attention` picks them: for reuse, or to look at.

    Args:
        query: [B, H, L, D], raster order.
        key: [B, H, L + text, D].
        kv_lengths: as in `vsa_attention`.

    Returns:
        A selection over the slotted tile order: one row per cube, one column per cube and per block of text. Every
        row lists all of the text.
    """
    _validate(query, key, key, config, grid)
    if kv_lengths is not None:
        _validate_lengths(kv_lengths, key, grid)
    scale = check_scale(scale, query.shape[-1])
    layout = CubeLayout(config, grid, key, kv_lengths)
    query, key = query.detach(), key.detach()
    if resolve_impl("auto", query, key, key, layout.slot, layout.slot) in ("triton", "gluon"):
        from foveal.methods.vsa.gpu import select_cubes_gpu

        return select_cubes_gpu(query, key, layout, scale)
    cubes = (layout.to_cubes(x) for x in (query, key[:, :, : grid.num_tokens]))
    return layout.pick(pooled_scores(*(pool_blocks(x, layout.slot, layout.cube_sizes) for x in cubes), scale))


@without_autocast
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
    kv_lengths: Tensor | None = None,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """Video sparse attention: O = Gc * Oc + Gf * Of (VSA, arXiv 2505.13389, eq. 1-4).

    Args:
        query: [B, H, L, D], raster order, L = grid.num_tokens; bfloat16, float16, float32 or float64.
        key, value: [B, H, L + text, D]. Keys past the video's are text: every cube's fine stage attends to them, in one
            softmax with the chosen cubes; the coarse stage neither pools nor ranks them.
        config: how many cubes, and which.
        grid: the video's shape in tokens.
        gate_coarse, gate_fine: [B, H, L, D], raster order; a missing gate is 1.
        selection: a fixed selection (see `select_cubes`) instead of the top of the coarse stage.
        kv_lengths: int [B], valid keys of each sample, video and text, between L and L + text; the rest is padding.
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
    if kv_lengths is not None:
        _validate_lengths(kv_lengths, key, grid)
    scale = check_scale(scale, query.shape[-1])
    layout = CubeLayout(config, grid, key, kv_lengths)
    impl = resolve_impl(impl, query, key, value, layout.slot, layout.slot)
    if selection is not None:
        selection = layout.checked(selection, query)
    match impl:
        case "reference":
            from foveal.methods.vsa.reference import vsa_attention_reference

            if selection is None:
                selection = select_cubes(query, key, config=config, grid=grid, scale=scale, kv_lengths=kv_lengths)
            return vsa_attention_reference(
                query,
                key,
                value,
                grid=grid,
                tile=layout.tile,
                selection=selection,
                scale=scale,
                gate_coarse_BHLD=gate_coarse,
                gate_fine_BHLD=gate_fine,
                kv_lengths_B=kv_lengths,
            )
        case "torch":
            return vsa_attention_torch(query, key, value, layout, selection, scale, gate_coarse, gate_fine)
        case "triton" | "gluon":
            from foveal.methods.vsa.gpu import vsa_attention_gpu

            return vsa_attention_gpu(query, key, value, layout, selection, scale, gate_coarse, gate_fine, impl)


def _validate(query, key, value, config, grid) -> None:
    if not isinstance(config, VSAConfig):
        raise TypeError(f"config must be a VSAConfig, got {type(config).__name__}")
    if not isinstance(grid, VideoGrid):
        raise TypeError(f"grid must be a VideoGrid, got {grid!r}")
    validate_qkv(query, key, value)
    grid.check_length(query.shape[2])
    if key.shape[2] < grid.num_tokens:
        raise ValueError(
            f"key must hold the {grid.num_tokens} tokens of the video, and text after them, got {key.shape[2]} tokens"
        )


def _validate_lengths(kv_lengths, key: Tensor, grid: VideoGrid) -> None:
    limits = "between the video's {} tokens and all {} keys"
    check_kv_lengths(kv_lengths, key.shape[0], grid.num_tokens, key.shape[2], limits)


def _constant_linear(inputs: int, outputs: int, value: float) -> nn.Linear:
    """A linear layer that gives `value` at the start. nn.Linear's own start would draw from the global generator."""
    device = torch.get_default_device()
    with torch.device("meta"):
        layer = nn.Linear(inputs, outputs)
    layer = layer.to_empty(device=device)
    nn.init.zeros_(layer.weight)
    nn.init.constant_(layer.bias, value)
    return layer


def _gate(to_gate: nn.Module, hidden_states: Tensor) -> Tensor:
    """The gate in the dtype of the hidden states, whatever that of its parameters (float32, if only they train)."""
    if torch.is_autocast_enabled(hidden_states.device.type):
        return to_gate(hidden_states)
    return to_gate(hidden_states.to(to_gate.weight.dtype)).to(hidden_states.dtype)


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
        last_impl: the implementation that the last eager call ran; None before.
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
        self.last_impl: str | None = None
        self.to_gate_coarse = _constant_linear(hidden_dim, num_heads * head_dim, 0.0)
        self.to_gate_fine = _constant_linear(hidden_dim, num_heads * head_dim, 1.0) if config.fine_gate else None

    def gates(self, hidden_states: Tensor) -> tuple[Tensor, Tensor | None]:
        """Gc and Gf, [B, H, L, D] each, from hidden_states [B, L, hidden_dim]; None for a fine gate fixed at 1."""
        if not isinstance(hidden_states, Tensor) or hidden_states.shape[2:] != (self.hidden_dim,):
            got = tuple(hidden_states.shape) if isinstance(hidden_states, Tensor) else type(hidden_states).__name__
            raise ValueError(f"hidden_states must have shape [B, L, {self.hidden_dim}], got {got}")
        shape = (self.num_heads, self.head_dim)
        return tuple(
            None if to_gate is None else _gate(to_gate, hidden_states).unflatten(-1, shape).transpose(1, 2)
            for to_gate in (self.to_gate_coarse, self.to_gate_fine)
        )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        hidden_states: Tensor | None,
        gates: tuple[Tensor, Tensor | None] | None = None,
        *,
        grid: VideoGrid,
        selection: BlockSelection | None = None,
        kv_lengths: Tensor | None = None,
        config: VSAConfig | None = None,
    ) -> Tensor:
        """[B, H, L, D], [B, H, L + text, D] twice and hidden_states [B, L, hidden_dim], the video's, to [B, H, L, D].

        See `vsa_attention`. A `config` stands in for the module's own; it must need the same parameters. `gates`, as
        `self.gates` returns them, stand in for `hidden_states`, which must then be None; all tensors may then hold
        some of the layer's heads alone.
        """
        expected = (self.num_heads, self.head_dim)
        if gates is None:
            if (query.shape[1], query.shape[-1]) != expected:
                got = (query.shape[1], query.shape[-1])
                raise ValueError(f"query must have (heads, head_dim) {expected}, got {got}")
            if hidden_states.shape != (query.shape[0], query.shape[2], self.hidden_dim):
                raise ValueError(
                    f"hidden_states must have shape {(query.shape[0], query.shape[2], self.hidden_dim)}, "
                    f"got {tuple(hidden_states.shape)}"
                )
            gates = self.gates(hidden_states)
        elif hidden_states is not None:
            raise ValueError("gates stand in for hidden_states; give one of them")
        config = self.config if config is None else config
        output = vsa_attention(
            query,
            key,
            value,
            config=config,
            grid=grid,
            gate_coarse=gates[0],
            gate_fine=gates[1],
            selection=selection,
            kv_lengths=kv_lengths,
            impl=self.impl,
        )
        if not torch.compiler.is_compiling():
            self.last_impl = resolve_impl(self.impl, query, key, value, *self.kernel_blocks(config, grid))
        return output

    @staticmethod
    def kernel_blocks(config: VSAConfig, grid: VideoGrid | None) -> tuple[int, int]:
        """Tokens of the query and key blocks that kernels get: a cube's slot."""
        if grid is None:
            raise ValueError("layout is required for a VSAConfig: its cubes are the blocks, got None")
        slot = slot_size(resolve_tile(config, grid))
        return slot, slot

    def select(
        self,
        query: Tensor,
        key: Tensor,
        *,
        grid: VideoGrid,
        kv_lengths: Tensor | None = None,
        config: VSAConfig | None = None,
    ) -> BlockSelection:
        """The selection that `forward` makes for the same arguments, to look at; see `select_cubes`."""
        return select_cubes(
            query, key, config=self.config if config is None else config, grid=grid, kv_lengths=kv_lengths
        )

    def token_places(self, grid: VideoGrid) -> Tensor:
        """int64 [L]: where each token, in raster order, stands in the slotted tile order."""
        tile = resolve_tile(self.config, grid)
        return tile_indices(grid.shape, tile, slot_size(tile), torch.device("cpu"))[1]

    def extra_repr(self) -> str:
        return f"hidden_dim={self.hidden_dim}, num_heads={self.num_heads}, head_dim={self.head_dim}, {self.config}"
