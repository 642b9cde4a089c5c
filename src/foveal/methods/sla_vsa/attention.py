"""Both methods in one, for use: `sla_vsa_attention`, and `SparseLinearVideoAttention`, which owns its parameters."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from foveal.blocks import BlockSelection
from foveal.checks import check_choice, check_positive_int, check_scale, without_autocast
from foveal.kernels.api import IMPLS, Ran, choose_impl, may_note
from foveal.kernels.backend import name_of
from foveal.layout import TokenLayout, VideoGrid, Where
from foveal.methods.sla.attention import check_weights
from foveal.methods.sla.feature_maps import linear_layer
from foveal.methods.sla.linear import linear_output
from foveal.methods.sla.projection import Projection
from foveal.methods.sla_vsa.config import SLAVSAConfig
from foveal.methods.vsa.attention import select_cubes, validate_call, vsa_attention
from foveal.methods.vsa.cpu import vsa_attention_torch
from foveal.methods.vsa.gates import check_gates, closed_gate, constant_linear, gates_of
from foveal.methods.vsa.layout import CubeLayout, resolve_tile, slot_size, token_places
from foveal.methods.vsa.packed import PackedTiles


class Weights(NamedTuple):
    """The gates, [B, H, L, D] or None, and the projection, [D, D] and [D] or None."""

    gate_coarse: Tensor | None
    gate_fine: Tensor | None
    proj_weight: Tensor | None
    proj_bias: Tensor | None


def sla_vsa_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    config: SLAVSAConfig,
    grid: VideoGrid | None = None,
    layout: TokenLayout | VideoGrid | None = None,
    gate_coarse: Tensor | None = None,
    gate_fine: Tensor | None = None,
    proj_weight: Tensor | None = None,
    proj_bias: Tensor | None = None,
    selection: BlockSelection | None = None,
    kv_lengths: Tensor | None = None,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """SLA and VSA in one: O = Gc * Oc + Gf * (Of + Ol W^T + b).

    Args:
        query: [B, H, L, D], raster order, L = grid.num_tokens; bfloat16, float16, float32 or float64.
        key, value: [B, H, L + text, D]. Keys past the video's are text, which every cube reads exactly.
        config: the cubes and the branches.
        grid, layout: as in `vsa_attention`. With a layout's protected segments their queries read everything exactly,
            and have the coarse branch but not the linear one, which sums over the video's keys ("noncritical").
        gate_coarse, gate_fine: [B, H, L, D], like `query`; a missing gate is 1.
        proj_weight, proj_bias: [D, D] and [D], float32 or the dtype of `query`. No weight adds Ol as it is.
        selection: a fixed selection, as `select_cubes` makes it with `config.cubes`.
        kv_lengths, scale, impl: as in `vsa_attention`.

    Returns:
        [B, H, L, D] in the dtype and order of `query`. Gradients flow through all branches and gates, not through the
        choice of cubes.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    weights = Weights(gate_coarse, gate_fine, proj_weight, proj_bias)
    where = Where(grid, layout, kv_lengths=kv_lengths)
    return _attend((query, key, value), config, weights, selection, where, scale, impl)[0]


@without_autocast
def _attend(
    inputs: tuple[Tensor, Tensor, Tensor],
    config: SLAVSAConfig,
    weights: Weights,
    selection: BlockSelection | None,
    where: Where,
    scale: float | None,
    impl: str,
) -> tuple[Tensor, Ran]:
    """`sla_vsa_attention`, and what ran; `inputs` are its query, key, and value."""
    if not isinstance(config, SLAVSAConfig):
        raise TypeError(f"config must be an SLAVSAConfig, got {type(config).__name__}")
    (query, key, value), kv_lengths = inputs, where.kv_lengths
    grid, packed = validate_call(inputs, config.cubes, where)
    check_gates(query, weights.gate_coarse, weights.gate_fine)
    check_weights(query, config.branch(64), weights.proj_weight, weights.proj_bias, None)
    if not config.coarse:
        weights = weights._replace(gate_coarse=closed_gate(query, weights.gate_coarse))
    scale = check_scale(scale, query.shape[-1])
    tiles = (
        CubeLayout(config.cubes, grid, key, kv_lengths)
        if packed is None
        else PackedTiles(config.cubes, packed, key.device)
    )
    ran = choose_impl(impl, query, key, value, tiles.slot, tiles.slot, config.precision)
    if selection is not None:
        selection = tiles.checked(selection, query)
    elif ran.impl == "reference" or packed is not None:
        tokens = grid if packed is None else packed
        selection = select_cubes(query, key, config=config.cubes, layout=tokens, scale=scale, kv_lengths=kv_lengths)
    if ran.impl == "reference":
        from foveal.methods.sla_vsa.reference import sla_vsa_attention_reference

        output = sla_vsa_attention_reference(
            query,
            key,
            value,
            config=config,
            layout=TokenLayout(grid) if packed is None else packed,
            tile=tiles.tile,
            selection=selection,
            scale=scale,
            gate_coarse_BHLD=weights.gate_coarse,
            gate_fine_BHLD=weights.gate_fine,
            proj_weight_DD=weights.proj_weight,
            proj_bias_D=weights.proj_bias,
            kv_lengths_B=kv_lengths,
        )
        return output, ran
    gates = {"gate_coarse": weights.gate_coarse, "gate_fine": weights.gate_fine}
    if packed is not None and (ran.impl == "torch" or config.linear_scope == "none"):
        rest = {"layout": packed, "selection": selection, "scale": scale, "impl": ran.impl}
        output = vsa_attention(query, key, value, config=config.cubes, **gates, **rest)
        return _with_linear_branch(output, inputs, tiles, config, weights, selection), ran
    if ran.impl != "torch":
        from foveal.methods.sla.gpu import SLAOptions
        from foveal.methods.sla_vsa.gpu import SLAVSACall, sla_vsa_attention_gpu
        from foveal.methods.vsa.gpu import choice_of

        backend = name_of(ran.impl, config.precision)
        options = SLAOptions(scale, config.feature_map, config.linear_scope, backend)
        choice = choice_of(tiles, selection if packed is None else tiles.with_all_rows(selection))
        call = SLAVSACall(query, key, value, *weights, tiles.cubes(), choice, tiles.ranked_cubes)
        (output,) = sla_vsa_attention_gpu(call, options)
        if packed is not None:
            output = tiles.with_protected_queries(output, inputs, weights.gate_fine, scale)
        return output, ran

    def beside(query: Tensor, key: Tensor, value: Tensor, selection: BlockSelection) -> Tensor:
        return _linear_part(query, key, value, selection, config, weights)

    added = None if config.linear_scope == "none" else beside
    return vsa_attention_torch(inputs, tiles, selection, scale, tuple(gates.values()), added, config.precision), ran


def _linear_part(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selection: BlockSelection,
    config: SLAVSAConfig,
    weights: Weights,
) -> Tensor:
    """Ol W^T + b in PyTorch, of tensors in tile order."""
    linear = linear_output(query, key, value, config.branch(selection.block_q), selection)
    return linear if weights.proj_weight is None else linear_layer(linear, weights.proj_weight, weights.proj_bias)


def _with_linear_branch(
    output: Tensor,
    inputs: tuple[Tensor, Tensor, Tensor],
    tiles: PackedTiles,
    config: SLAVSAConfig,
    weights: Weights,
    selection: BlockSelection,
) -> Tensor:
    """The output over a packed sequence in PyTorch, with the linear branch of the video's queries."""
    if config.linear_scope == "none":
        return output
    query, key, value = inputs
    layout, tile, slot = tiles.layout, tiles.tile, tiles.slot
    video = layout.grid.to_tile_order(layout.split(query)[0], tile, slot=slot)
    keys = tiles.to_cubes(key), tiles.to_cubes(value)
    linear = _linear_part(video, *keys, selection, config, weights)
    linear = layout.grid.to_raster_order(linear, tile, slot=slot)
    if weights.gate_fine is not None:
        linear = linear * layout.split(weights.gate_fine)[0]
    of_video, of_protected = layout.split(output)
    return layout.join((of_video + linear).to(output.dtype), of_protected)


class SparseLinearVideoAttention(nn.Module):
    """SLA and VSA in one, with the gates and the projection.

    Args:
        hidden_dim: width of the hidden states that the gates read.
        num_heads, head_dim: H and D; the gates have H * D outputs.
        config: see `SLAVSAConfig`.
        impl: see `block_sparse_attention`.

    Attributes:
        to_gate_coarse: Linear(hidden_dim, H * D), zero at the start; None without a coarse branch.
        to_gate_fine: the same for the exact and the linear branch, the constant 1 at the start; None unless
            config.fine_gate, and the gate is then fixed at 1.
        proj: weight [D, D] and bias [D] of the linear branch, shared by the heads, float32, zero at the start; None
            without a linear branch. With the gate at zero a converted layer first equals block-sparse attention.
        ran: what the last call ran (`Ran`: `impl`, and `why` if that is slower than asked); None before. Compiled
            calls with gradients leave it.
    """

    hidden_dim: int
    num_heads: int
    head_dim: int
    config: SLAVSAConfig
    impl: str
    ran: Ran | None
    to_gate_coarse: nn.Linear | None
    to_gate_fine: nn.Linear | None
    proj: Projection | None

    def __init__(
        self, hidden_dim: int, num_heads: int, head_dim: int, config: SLAVSAConfig, *, impl: str = "auto"
    ) -> None:
        super().__init__()
        for name, value in (("hidden_dim", hidden_dim), ("num_heads", num_heads), ("head_dim", head_dim)):
            check_positive_int(name, value)
        if not isinstance(config, SLAVSAConfig):
            raise TypeError(f"config must be an SLAVSAConfig, got {type(config).__name__}")
        check_choice("impl", impl, IMPLS)
        self.hidden_dim, self.num_heads, self.head_dim = hidden_dim, num_heads, head_dim
        self.config, self.impl = config, impl
        self.ran = None
        width = num_heads * head_dim
        self.to_gate_coarse = constant_linear(hidden_dim, width, 0.0) if config.coarse else None
        self.to_gate_fine = constant_linear(hidden_dim, width, 1.0) if config.fine_gate else None
        self.proj = Projection(head_dim) if config.linear_scope != "none" else None

    def gates(self, hidden_states: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Gc and Gf, [B, H, L, D] each, from hidden_states [B, L, hidden_dim]; None for what there is not."""
        to_gates = self.to_gate_coarse, self.to_gate_fine
        return gates_of(to_gates, hidden_states, self.hidden_dim, (self.num_heads, self.head_dim))

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        hidden_states: Tensor | None,
        gates: tuple[Tensor | None, Tensor | None] | None = None,
        *,
        grid: VideoGrid | None = None,
        layout: TokenLayout | VideoGrid | None = None,
        selection: BlockSelection | None = None,
        kv_lengths: Tensor | None = None,
        config: SLAVSAConfig | None = None,
    ) -> Tensor:
        """[B, H, L, D], [B, H, L + text, D] twice and hidden_states [B, L, hidden_dim], the video's, to [B, H, L, D].

        The arguments are those of `VideoSparseAttention`; see `sla_vsa_attention`.
        """
        if gates is None:
            if query.shape[-1] != self.head_dim or query.shape[1] != self.num_heads:
                expected, got = (self.num_heads, self.head_dim), (query.shape[1], query.shape[-1])
                raise ValueError(f"query must have (heads, head_dim) {expected}, got {got}")
            gates = self.gates(hidden_states)
        elif hidden_states is not None:
            raise ValueError("gates stand in for hidden_states; give one of them")
        projection = (None, None) if self.proj is None else self.proj()
        config, where = self.config if config is None else config, Where(grid, layout, kv_lengths=kv_lengths)
        weights = Weights(*gates, *projection)
        output, ran = _attend((query, key, value), config, weights, selection, where, None, self.impl)
        if may_note():
            self.ran = ran
        return output

    @staticmethod
    def kernel_blocks(config: SLAVSAConfig, grid: VideoGrid | None) -> tuple[int, int]:
        """Tokens of the query and key blocks that kernels get: a cube's slot."""
        if grid is None:
            raise ValueError("layout is required for an SLAVSAConfig: its cubes are the blocks, got None")
        slot = slot_size(resolve_tile(config.cubes, grid))
        return slot, slot

    def select(
        self,
        query: Tensor,
        key: Tensor,
        *,
        grid: VideoGrid | None = None,
        layout: TokenLayout | VideoGrid | None = None,
        kv_lengths: Tensor | None = None,
        config: SLAVSAConfig | None = None,
    ) -> BlockSelection:
        """The selection that `forward` makes for the same arguments, to look at; see `select_cubes`."""
        cubes = (self.config if config is None else config).cubes
        return select_cubes(query, key, config=cubes, grid=grid, layout=layout, kv_lengths=kv_lengths)

    def token_places(self, grid: VideoGrid) -> Tensor:
        """int64 [L]: where each token, in raster order, stands in the slotted tile order."""
        return token_places(self.config.cubes, grid)

    def extra_repr(self) -> str:
        return f"hidden_dim={self.hidden_dim}, num_heads={self.num_heads}, head_dim={self.head_dim}, {self.config}"
