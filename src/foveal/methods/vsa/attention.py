"""VSA for use: the function `vsa_attention` and the module `VideoSparseAttention` that owns its gates."""

from __future__ import annotations

import functools
from collections.abc import Callable

from torch import Tensor, nn

from foveal.blocks import BlockSelection, pool_blocks
from foveal.checks import (
    check_choice,
    check_kv_lengths,
    check_positive_int,
    check_scale,
    validate_qkv,
    without_autocast,
)
from foveal.kernels.api import IMPLS, KERNEL_MAX_BLOCKS, SLOW_SELECTION, Ran, choose_impl, may_note
from foveal.kernels.backend import name_of
from foveal.kernels.choice import block_scores
from foveal.kernels.operator import KnownCalls
from foveal.layout import TokenLayout, VideoGrid, Where, resolve_layout
from foveal.methods.parameters import PreciseParameters
from foveal.methods.routing import Router, of_heads, start_projections
from foveal.methods.vsa.config import VSAConfig
from foveal.methods.vsa.cpu import vsa_attention_torch
from foveal.methods.vsa.gates import check_gates, closed_gate, constant_linear, gates_of
from foveal.methods.vsa.layout import CubeLayout, kernel_slot, resolve_tile, slot_size, token_places
from foveal.methods.vsa.packed import PackedTiles
from foveal.methods.vsa.router import CubeRouter


@without_autocast
def select_cubes(
    query: Tensor,
    key: Tensor,
    *,
    config: VSAConfig,
    grid: VideoGrid | None = None,
    layout: TokenLayout | VideoGrid | None = None,
    scale: float | None = None,
    kv_lengths: Tensor | None = None,
    router: CubeRouter | None = None,
) -> BlockSelection:
    """The cubes that each cube attends to, as `vsa_attention` picks them: for reuse, or to look at.

    Args:
        query: [B, H, L, D], raster order, or a packed sequence.
        key: [B, H, L + text, D], or a packed sequence.
        layout, kv_lengths: as in `vsa_attention`.
        router: what ranks the cubes; None for the coarse stage's scores.

    Returns:
        A selection over the slotted tile order: one row per cube, one column per cube and per block of text or chunk of
        a protected segment. Every row lists all of these.
    """
    grid, packed = validate_call((query, key, key), config, Where(grid, layout, kv_lengths=kv_lengths))
    scale = check_scale(scale, query.shape[-1])
    if packed is not None:
        tiles = PackedTiles(config, packed, key.device)
        video_config = config if config.topk is not None else config.replace(rounding="up")
        video = query[:, :, packed.video], key[:, :, packed.video]
        return tiles.with_protected(select_cubes(*video, config=video_config, grid=grid, scale=scale, router=router))
    layout = CubeLayout(config, grid, key, kv_lengths)
    query, key = query.detach(), key.detach()
    on_gpu = choose_impl("auto", query, key, key, layout.kernel_slot, layout.kernel_slot).impl in ("triton", "gluon")
    if on_gpu and (config.ranks_means or layout.num_cubes <= KERNEL_MAX_BLOCKS):
        from foveal.methods.vsa.gpu import select_cubes_gpu

        return select_cubes_gpu(query, key, layout, scale, router)
    cubes = (layout.to_cubes(x) for x in (query, key[:, :, : grid.num_tokens]))
    sizes = layout.cube_sizes, layout.cube_sizes
    if router is not None:
        means = (pool_blocks(x, layout.slot, layout.cube_sizes) for x in cubes)
        return layout.pick(router.scores(*means, scale).detach())
    return layout.pick(block_scores(*cubes, layout.slot, layout.slot, scale, config.score, *sizes))


_KNOWN = KnownCalls()


def vsa_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    config: VSAConfig,
    grid: VideoGrid | None = None,
    layout: TokenLayout | VideoGrid | None = None,
    gate_coarse: Tensor | None = None,
    gate_fine: Tensor | None = None,
    selection: BlockSelection | None = None,
    kv_lengths: Tensor | None = None,
    proj_query: Tensor | None = None,
    proj_key: Tensor | None = None,
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
        layout: the layout of a packed sequence, instead of `grid`. With protected segments query, key, value, gates,
            and output are the whole sequence in order, [B, H, layout.num_tokens, D]. The segments are cut into chunks
            of at most as many tokens as a cube. The coarse stage pools and attends over cubes and chunks alike, and its
            output goes to all tokens. In the fine stage cubes read the cubes that they pick and all chunks, and
            protected queries read everything. `keep_ratio` then counts cubes of the video.
        gate_coarse, gate_fine: [B, H, L, D], like `query`; a missing gate is 1. With `config.coarse` False there is no
            gate_coarse.
        selection: a fixed selection (see `select_cubes`) instead of the top of the coarse stage.
        kv_lengths: int [B], valid keys of each sample, video and text, between L and L + text; the rest is padding. Not
            with a layout's protected segments.
        proj_query, proj_key: [D, D] each, or [H, D, D], the projections by which a router ranks cubes, see `VSAConfig`;
            None for the coarse stage's scores.
        scale: softmax scale of both stages; None for 1 / sqrt(D).
        impl: "auto", "reference", "torch", "triton" or "gluon"; see `block_sparse_attention`.

    Returns:
        [B, H, L, D] in the dtype and order of `query`. Gradients flow through the pooling and the gates, and not
        through the choice of cubes, but for a router's projections: they get that of a soft top-k. With
        `impl="reference"` these may not require a gradient.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    gates, where = (gate_coarse, gate_fine), Where(grid, layout, kv_lengths=kv_lengths)
    return _attend((query, key, value), config, gates, (proj_query, proj_key), selection, where, scale, impl)[0]


@without_autocast
def _attend(
    inputs: tuple[Tensor, Tensor, Tensor],
    config: VSAConfig,
    gates: tuple[Tensor | None, Tensor | None],
    projections: tuple[Tensor | None, Tensor | None],
    selection: BlockSelection | None,
    where: Where,
    scale: float | None,
    impl: str,
) -> tuple[Tensor, Ran]:
    """`vsa_attention`, and what ran.

    Args:
        inputs: its query, key, and value.
        gates: its gate_coarse and gate_fine.
        projections: its proj_query and proj_key.
    """
    (query, key, value), kv_lengths = inputs, where.kv_lengths
    if not isinstance(config, VSAConfig):
        raise TypeError(f"config must be a VSAConfig, got {type(config).__name__}")
    if not config.coarse:
        gates = (closed_gate(query, gates[0]), gates[1])
    key_of_call = None
    if selection is where.layout is kv_lengths is projections[0] is projections[1] is None:
        tensors = *inputs, *gates
        key_of_call, known = _KNOWN.find(tensors, (config, where.grid, type(scale), scale, impl))
        if known is not None:
            calls, rest, ran = known
            return calls((*[x for x in tensors if x is not None], *rest))[0], ran
    grid, packed = validate_call(inputs, config, where)
    gate_coarse, gate_fine = gates
    check_gates(query, gate_coarse, gate_fine)
    router = _router_of(config, *projections, query)
    scale = check_scale(scale, query.shape[-1])
    tiles = CubeLayout(config, grid, key, kv_lengths) if packed is None else PackedTiles(config, packed, key.device)
    ran = choose_impl(impl, query, key, value, tiles.kernel_slot, tiles.kernel_slot, config.precision)
    impl = ran.impl
    on_kernels, slow = impl in ("triton", "gluon"), tiles.ranked_cubes > KERNEL_MAX_BLOCKS
    if selection is None and on_kernels and slow:
        ran = ran.but(SLOW_SELECTION)
    if selection is not None:
        selection = tiles.checked(selection, query)
    elif impl == "reference" or packed is not None or not (config.ranks_means or (on_kernels and not slow)):
        whole = {"layout": grid if packed is None else packed, "kv_lengths": kv_lengths}
        selection = select_cubes(query, key, config=config, scale=scale, router=router, **whole)
    if impl == "reference":
        if router is not None and router.learns():
            raise ValueError('impl="reference" has no gradient for proj_query and proj_key: expected "auto" or another')
        from foveal.methods.vsa.reference import vsa_attention_reference

        output = vsa_attention_reference(
            query,
            key,
            value,
            layout=TokenLayout(grid) if packed is None else packed,
            tile=tiles.tile,
            selection=selection,
            scale=scale,
            gate_coarse_BHLD=gate_coarse,
            gate_fine_BHLD=gate_fine,
            kv_lengths_B=kv_lengths,
            precision=config.precision,
        )
        return output, ran
    remember = None
    if key_of_call is not None and selection is None:
        remember = functools.partial(_KNOWN.remember, key_of_call, ran)
    run = _run_with(impl, config.precision, remember)
    if packed is None:
        return run(inputs, tiles, selection, scale, gates, router=router), ran
    output = run(inputs, tiles, tiles.with_all_rows(selection), scale, gates, router=router)
    return tiles.with_protected_queries(output, inputs, gate_fine, scale), ran


def _run_with(impl: str, precision: str, remember: Callable | None) -> Callable[..., Tensor]:
    """The method over the tiles of a `CubeLayout`, by an implementation other than the reference.

    remember: called with what kernels have run; None if it is not to be remembered.
    """
    if impl == "torch":
        return functools.partial(vsa_attention_torch, precision=precision)
    from foveal.methods.gpu_routing import in_float32, without_history
    from foveal.methods.vsa.gpu import VSACall, VSAOptions, choice_of, vsa_attention_gpu

    def run(inputs, tiles, selection, scale, gates, router) -> Tensor:
        choice, learning, temperature = choice_of(tiles, selection), (None, None), 1.0
        if router is not None:
            weights, temperature = Router(router.query, router.key), router.temperature
            if router.learns():
                learning = in_float32(weights)
            elif choice.rule is not None:
                choice = choice._replace(**dict(zip(("proj_query", "proj_key"), without_history(weights), strict=True)))
        call = VSACall(*inputs, *gates, *learning, tiles.cubes(), choice, tiles.ranked_cubes)
        options = VSAOptions(scale, temperature, name_of(impl, precision))
        (output,) = vsa_attention_gpu(call, options)
        if remember is not None:
            remember(vsa_attention_gpu.worked_out(call, options))
        return output

    return run


def _router_of(
    config: VSAConfig, proj_query: Tensor | None, proj_key: Tensor | None, query: Tensor
) -> CubeRouter | None:
    """The router of a call, or None; a ValueError for one that the configuration has not, or that does not fit."""
    given = proj_query is not None or proj_key is not None
    if given and config.router == "none":
        raise ValueError('proj_query and proj_key are of a router, and config has router="none"')
    return CubeRouter.of(proj_query, proj_key, query, config.temperature)


def validate_call(
    inputs: tuple[Tensor, Tensor, Tensor], config: VSAConfig, where: Where
) -> tuple[VideoGrid, TokenLayout | None]:
    """The grid, and the layout if it has protected segments; a TypeError or ValueError unless all fit together."""
    if not isinstance(config, VSAConfig):
        raise TypeError(f"config must be a VSAConfig, got {type(config).__name__}")
    (query, key, value), kv_lengths = inputs, where.kv_lengths
    grid, packed = resolve_layout(where.grid, where.layout)
    if grid is None:
        raise ValueError("grid is required for VSA: VideoGrid(frames, height, width) in tokens, or a layout")
    validate_qkv(query, key, value)
    if packed is not None:
        packed.check_length(query.shape[2])
        packed.check_length(key.shape[2])
        if kv_lengths is not None:
            raise ValueError(
                "kv_lengths must be None with a layout's protected segments: VSA's coarse stage pools all their tokens"
            )
        return grid, packed
    grid.check_length(query.shape[2])
    if key.shape[2] < grid.num_tokens:
        raise ValueError(
            f"key must hold the {grid.num_tokens} tokens of the video, and text after them, got {key.shape[2]} tokens"
        )
    if kv_lengths is not None:
        limits = "between the video's {} tokens and all {} keys"
        check_kv_lengths(kv_lengths, key.shape[0], grid.num_tokens, key.shape[2], limits)
    return grid, None


class VideoSparseAttention(nn.Module):
    """Video sparse attention with its gates, which are linear in the layer's hidden states.

    Args:
        hidden_dim: width of the hidden states that the gates read.
        num_heads, head_dim: H and D; the gates have H * D outputs.
        config: see `VSAConfig`.
        impl: see `block_sparse_attention`.

    Attributes:
        to_gate_coarse: Linear(hidden_dim, H * D), zero at the start, so that a retrofitted layer first equals its
            fine branch; None without a coarse branch.
        ran: what the last call ran (`Ran`: `impl`, and `why` if that is slower than asked); None before. Compiled
            calls with gradients leave it.
        to_gate_fine: the same for the fine branch, the constant 1 at the start; None unless config.fine_gate, and
            the gate is then fixed at 1.
        router: proj_query and proj_key, [D, D] each or [H, D, D], float32, the identity at the start, which ranks cubes
            as the coarse branch does; None without `config.router`.
    """

    hidden_dim: int
    num_heads: int
    head_dim: int
    config: VSAConfig
    impl: str
    ran: Ran | None
    to_gate_coarse: nn.Linear | None
    to_gate_fine: nn.Linear | None
    router: PreciseParameters | None

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
        self.ran = None
        self.to_gate_coarse = constant_linear(hidden_dim, num_heads * head_dim, 0.0) if config.coarse else None
        self.to_gate_fine = constant_linear(hidden_dim, num_heads * head_dim, 1.0) if config.fine_gate else None
        self.router = None
        if config.router != "none":
            self.router = start_projections(config.router, num_heads, head_dim)

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
        config: VSAConfig | None = None,
        heads: range | None = None,
    ) -> Tensor:
        """[B, H, L, D], [B, H, L + text, D] twice and hidden_states [B, L, hidden_dim], the video's, to [B, H, L, D].

        With a layout's protected segments all of them are the whole sequence, hidden_states [B, L, hidden_dim] too.
        See `vsa_attention`. A `config` stands in for the module's own; it must need the same parameters. `gates`, as
        `self.gates` returns them, stand in for `hidden_states`, which must then be None; all tensors may then hold
        only some of the layer's heads, and a router for each head needs to know which: `heads`.
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
        where = Where(grid, layout, kv_lengths=kv_lengths)
        projections = self._projections(query, heads)
        output, ran = _attend((query, key, value), config, gates, projections, selection, where, None, self.impl)
        if may_note():
            self.ran = ran
        return output

    def _projections(self, query: Tensor, heads: range | None) -> tuple[Tensor | None, Tensor | None]:
        """Those of the router, of these heads; None without one."""
        if self.router is None:
            return None, None
        return of_heads(self.router(), self.num_heads, query, heads)

    @staticmethod
    def kernel_blocks(config: VSAConfig, grid: VideoGrid | None) -> tuple[int, int]:
        """Tokens of the query and key blocks that kernels get: a cube's slot, or half of it."""
        if grid is None:
            raise ValueError("layout is required for a VSAConfig: its cubes are the blocks, got None")
        slot = kernel_slot(config, slot_size(resolve_tile(config, grid)))
        return slot, slot

    def select(
        self,
        query: Tensor,
        key: Tensor,
        *,
        grid: VideoGrid | None = None,
        layout: TokenLayout | VideoGrid | None = None,
        kv_lengths: Tensor | None = None,
        config: VSAConfig | None = None,
        heads: range | None = None,
    ) -> BlockSelection:
        """The selection that `forward` makes for the same arguments, to look at; see `select_cubes`."""
        config = self.config if config is None else config
        router = _router_of(config, *self._projections(query, heads), query)
        return select_cubes(query, key, config=config, grid=grid, layout=layout, kv_lengths=kv_lengths, router=router)

    def token_places(self, grid: VideoGrid) -> Tensor:
        """int64 [L]: where each token, in raster order, stands in the slotted tile order."""
        return token_places(self.config, grid)

    def extra_repr(self) -> str:
        return f"hidden_dim={self.hidden_dim}, num_heads={self.num_heads}, head_dim={self.head_dim}, {self.config}"
