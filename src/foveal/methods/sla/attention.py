"""SLA for use: the function `sla_attention` and the module `SparseLinearAttention` that owns its parameters."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from foveal.blocks import BlockSelection
from foveal.checks import (
    check_choice,
    check_positive_int,
    check_scale,
    validate_qkv,
    without_autocast,
)
from foveal.kernels.api import (
    IMPLS,
    SLOW_SELECTION,
    Ran,
    block_sparse_attention,
    choose,
    choose_impl,
    fits_kernel,
    may_note,
    validate_selection,
)
from foveal.kernels.backend import name_of
from foveal.kernels.operator import KnownCalls
from foveal.kernels.order import unsort_tokens
from foveal.kernels.tail import attend_with_tail
from foveal.layout import NOWHERE, TokenLayout, VideoGrid, Where, resolve_layout
from foveal.methods.choosing import choosing_of, rows_alike
from foveal.methods.sla.config import SLAConfig
from foveal.methods.sla.feature_maps import linear_layer
from foveal.methods.sla.linear import linear_output
from foveal.methods.sla.order import fixed_of, token_order, token_places, validate_tile_order, video_sorted
from foveal.methods.sla.packed import packed_keys
from foveal.methods.sla.projection import Projection
from foveal.rules import SelectionRule, num_critical, selection_rule

# Parts that run in PyTorch although the rest of a call runs on a GPU's kernels.
SLOW_LINEAR = 'the linear branch runs in PyTorch: it has no kernel for feature_map="hedgehog"'


_KNOWN = KnownCalls()


def sla_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    config: SLAConfig,
    selection: BlockSelection | None = None,
    proj_weight: Tensor | None = None,
    proj_bias: Tensor | None = None,
    feature_weight: Tensor | None = None,
    grid: VideoGrid | None = None,
    layout: TokenLayout | VideoGrid | None = None,
    protected_keys: tuple[int, int] | None = None,
    kv_lengths: Tensor | None = None,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """Sparse-linear attention: O = O^s + O^l W^T + b (SLA, arXiv 2509.24006, eq. 4-6).

    Args:
        query: [B, H, Lq, D], bfloat16, float16, float32 or float64.
        key, value: [B, H, Lk, D].
        config: ratios, block sizes, feature map and scope.
        selection: a fixed selection instead of the one `config` makes; its blocks are cut from the tokens in
            `config.token_order`, and it knows its protected and its valid keys.
        proj_weight, proj_bias: [D, D] and [D], float32 or the dtype of `query`. No weight adds O^l as it is.
        feature_weight: [D, D], only for feature_map "hedgehog".
        grid: the video's shape in tokens, needed for token_order "tile". Lq is its number of tokens; in tile order so
            is Lk, but for keys after the video's (text), which stay where they are.
        layout: the layout of a packed sequence, instead of `grid`. With protected segments query, key, value, and the
            output are the whole sequence in order, [B, H, layout.num_tokens, D]. Protected queries get exact dense
            attention. The video's queries read all protected keys exactly, beside the video's blocks that `config`
            picks: its ratios count blocks of the video, and no block holds keys of the video and of a protected
            segment. The linear branch sums over the video's keys, with linear_scope "all" over the protected ones too.
            A `selection` is then one of `SparseLinearAttention.select` with this layout.
        protected_keys: token range [start, stop) whose key blocks every query attends to, text say. In tile order it
            must be all keys after the video's, and there have to be none without it.
        kv_lengths: int [B], valid keys at the front of each sample; the rest is padding. In tile order at least the
            grid's number of tokens, and with a layout's protected segments all up to the end of the video.
        scale: softmax scale; None for 1 / sqrt(D).
        impl: "auto", "reference", "torch", "triton" or "gluon"; see `block_sparse_attention`.

    Returns:
        [B, H, Lq, D] in the dtype and token order of `query`. Gradients are exact for a fixed selection.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    weights = proj_weight, proj_bias, feature_weight
    where = Where(grid, layout, protected_keys, kv_lengths)
    return _attend((query, key, value), config, selection, weights, where, scale, impl)[0]


@without_autocast
def _attend(
    inputs: tuple[Tensor, Tensor, Tensor],
    config: SLAConfig,
    selection: BlockSelection | None,
    weights: tuple[Tensor | None, Tensor | None, Tensor | None],
    where: Where,
    scale: float | None,
    impl: str,
) -> tuple[Tensor, Ran]:
    """`sla_attention`, and what ran.

    Args:
        inputs: its query, key, and value.
        weights: its proj_weight, proj_bias, and feature_weight.
    """
    (query, key, value), (proj_weight, proj_bias, feature_weight) = inputs, weights
    grid, layout, protected_keys, kv_lengths = where
    key_of_call = None
    if selection is feature_weight is layout is protected_keys is kv_lengths is None:
        tensors = *inputs, proj_weight, proj_bias
        key_of_call, known = _KNOWN.find(tensors, (config, grid, type(scale), scale, impl))
        if known is not None:
            calls, rest, ran = known
            return calls((*[x for x in tensors if x is not None], *rest))[0], ran
    if not isinstance(config, SLAConfig):
        raise TypeError(f"config must be an SLAConfig, got {type(config).__name__}")
    validate_qkv(query, key, value)
    check_weights(query, config, proj_weight, proj_bias, feature_weight)
    ran = choose_impl(impl, query, key, value, config.block_q, config.block_k, config.precision)
    impl = ran.impl
    on_kernels = impl in ("triton", "gluon")
    scale = check_scale(scale, query.shape[-1])

    grid, packed = resolve_layout(grid, layout)
    if packed is not None:
        keys = packed_keys(query, key, packed, config, protected_keys, kv_lengths, on_kernels)
        output, inner = _packed_attention(inputs, keys, config, selection, weights, kv_lengths, scale, impl)
        return output, ran if inner.why is None else ran.but(inner.why)
    order = None
    if config.token_order == "tile":
        if grid is None:
            raise ValueError('grid is required for token_order="tile": VideoGrid(frames, height, width) in tokens')
        grid.check_length(query.shape[2])
        if selection is None:
            validate_tile_order(grid, key, protected_keys, kv_lengths)
        order = token_order(config, grid, query.device)
        query, key, value = (video_sorted(x, order, on_kernels) for x in (query, key, value))
    elif grid is not None:
        grid.check_length(query.shape[2])

    on_gpu = on_kernels and config.linear_scope != "none" and config.feature_map != "hedgehog"
    fused = on_gpu and config.tail == "none"
    if on_kernels and not on_gpu and config.linear_scope != "none":
        ran = ran.but(SLOW_LINEAR)
    if selection is None:
        fits = on_kernels and fits_kernel(query, key, config.block_k)
        if on_kernels and not fits:
            ran = ran.but(SLOW_SELECTION)
        # Without "marginal", what is negligible makes no difference.
        drop_ratio = 0.0 if fused and fits and config.linear_scope != "marginal" else config.drop_ratio
        selection = _rule(query, key, config, grid, drop_ratio, protected_keys, kv_lengths)
        if not (fused and fits):
            selection = choose(query, key, selection, scale, drop_ratio > 0)
    else:
        for name, given in (("protected_keys", protected_keys), ("kv_lengths", kv_lengths)):
            if given is not None:
                raise ValueError(f"{name} goes into a selection when that is made; give {name} or selection, not both")
        validate_selection(selection, query, key)
        if (selection.block_q, selection.block_k) != (config.block_q, config.block_k):
            raise ValueError(
                f"selection has blocks of {selection.block_q}x{selection.block_k}, "
                f"but config asks for {config.block_q}x{config.block_k}"
            )

    if impl == "reference":
        from foveal.methods.sla.reference import sla_attention_reference

        output = sla_attention_reference(
            query,
            key,
            value,
            config=config,
            selection=selection,
            scale=scale,
            proj_weight_DD=proj_weight,
            proj_bias_D=proj_bias,
            feature_weight_DD=feature_weight,
        )
    elif fused:
        from foveal.methods.sla.gpu import SLACall, SLAOptions, sla_attention_gpu

        options = SLAOptions(scale, config.feature_map, config.linear_scope, name_of(impl, config.precision))
        call = SLACall(query, key, value, proj_weight, proj_bias, selection)
        (output,) = sla_attention_gpu(call, options)
        if key_of_call is not None and order is None and isinstance(selection, SelectionRule):
            _KNOWN.remember(key_of_call, ran, sla_attention_gpu.worked_out(call, options))
    else:
        if config.tail == "pooled":
            output = attend_with_tail(query, key, value, selection, scale, impl, config.precision)
        else:
            options = {"scale": scale, "impl": impl, "precision": config.precision}
            output = block_sparse_attention(query, key, value, selection, **options)
        if on_gpu:
            from foveal.methods.sla.gpu import SLACall, SLAOptions, linear_branch_gpu

            options = SLAOptions(scale, config.feature_map, config.linear_scope, impl)
            call = SLACall(query, key, value, proj_weight, proj_bias, selection)
            output = output + linear_branch_gpu(call, options)
        elif config.linear_scope != "none":
            linear = linear_output(query, key, value, config, selection, feature_weight)
            if proj_weight is not None:
                linear = linear_layer(linear, proj_weight, proj_bias)
            output = (output + linear).to(query.dtype)
    return output if order is None else unsort_tokens(output, order, on_kernels), ran


def _rule(
    query: Tensor,
    key: Tensor,
    config: SLAConfig,
    grid: VideoGrid | None,
    drop_ratio: float,
    protected_keys: tuple[int, int] | None = None,
    kv_lengths: Tensor | None = None,
) -> SelectionRule:
    """How to choose among the blocks of query and key, which are in the order that these are cut from."""
    choosing = choosing_of(config, fixed_of(config, grid, query.device), drop_ratio=drop_ratio)
    limits = {"protected_keys": protected_keys, "kv_lengths": kv_lengths}
    return selection_rule(query, key, (config.block_q, config.block_k), choosing, **limits)


def _packed_attention(inputs, keys, config, selection, weights, kv_lengths, scale, impl) -> tuple[Tensor, Ran]:
    """SLA for the video's queries and dense attention for the protected ones, in sequence order."""
    query, key, value = inputs
    video = keys.video(keys.layout.split(query)[0])
    slow_selection = selection is None and impl in ("triton", "gluon") and not fits_kernel(video, key, config.block_k)
    if selection is None:
        # Without "marginal", what is negligible makes no difference.
        drop_ratio = config.drop_ratio if config.linear_scope == "marginal" else 0.0
        selection = _packed_selection(video, key, keys, config, drop_ratio, scale)
    else:
        validate_selection(selection, video, key[:, :, :1].expand(-1, -1, keys.length, -1))
        selection = dataclasses.replace(selection, key_block_sizes=keys.sizes)
    # They are in the order that blocks are cut from, and the selection has what is fixed.
    config = config if config.token_order == "raster" else config.replace(token_order="raster", window=None)
    blocks = video, keys.in_blocks(key), keys.in_blocks(value)
    video, ran = _attend(blocks, config, selection, weights, NOWHERE, scale, impl)
    output = keys.with_protected_queries(video, query, key, value, kv_lengths, scale)
    return output, ran.but(SLOW_SELECTION) if slow_selection else ran


def _packed_selection(video, key, keys, config, drop_ratio, scale=None) -> BlockSelection:
    """The blocks that each block of the video's queries reads; `video` is in the order that blocks are cut from."""
    grid = keys.layout.grid
    video_key = keys.video(key[:, :, keys.layout.video])
    rule = _rule(video, video_key, config, grid, drop_ratio)
    selection = choose(video, video_key, rule, check_scale(scale, key.shape[-1]), drop_ratio > 0)
    kept = num_critical(keys.video_blocks, config.keep_ratio, None) if rows_alike(config) else None
    return keys.with_protected(selection, kept)


def check_weights(
    query: Tensor,
    config: SLAConfig,
    proj_weight: Tensor | None,
    proj_bias: Tensor | None,
    feature_weight: Tensor | None,
) -> None:
    """Raise a ValueError unless these weights fit the queries and the configuration."""
    head_dim = query.shape[-1]
    square = (head_dim, head_dim)
    given = ("proj_weight", proj_weight, square), ("proj_bias", proj_bias, square[:1])
    for name, weight, shape in (*given, ("feature_weight", feature_weight, square)):
        if weight is None:
            continue
        if not isinstance(weight, Tensor) or weight.shape != shape:
            got = tuple(weight.shape) if isinstance(weight, Tensor) else type(weight).__name__
            raise ValueError(f"{name} must have shape {shape} for head_dim {head_dim}, got {got}")
        if weight.device != query.device:
            raise ValueError(f"{name} is on {weight.device}, but query is on {query.device}")
    if proj_weight is not None and (not config.projection or config.linear_scope == "none"):
        raise ValueError(
            "proj_weight was given, but config has "
            + ("projection=False" if not config.projection else 'linear_scope="none"')
        )
    if proj_bias is not None and proj_weight is None:
        raise ValueError("proj_bias was given without proj_weight")
    hedgehog = config.feature_map == "hedgehog" and config.linear_scope != "none"
    if hedgehog != (feature_weight is not None):
        raise ValueError(
            'feature_weight is required for feature_map="hedgehog"'
            if hedgehog
            else f'feature_weight is only for feature_map="hedgehog", got feature_map={config.feature_map!r}, '
            f"linear_scope={config.linear_scope!r}"
        )


class SparseLinearAttention(nn.Module):
    """Sparse-linear attention with its parameters: drop it in where a DiT calls scaled_dot_product_attention.

    Args:
        head_dim: D.
        config: see `SLAConfig`.
        impl: see `block_sparse_attention`.

    Attributes:
        proj: weight [D, D] and bias [D], shared by the heads, float32, zero at the start, so that the module first
            equals block-sparse attention; None without a projection or linear branch. That its weight starts at zero
            is no bug: its gradient does not, and the linear branch grows in.
        ran: what the last call ran (`Ran`: `impl`, and `why` if that is slower than asked); None before. Compiled
            calls with gradients leave it.
        feature_weight: [D, D], the identity at the start, for feature_map "hedgehog"; else None.
    """

    head_dim: int
    config: SLAConfig
    impl: str
    ran: Ran | None
    proj: Projection | None
    feature_weight: nn.Parameter | None

    def __init__(self, head_dim: int, config: SLAConfig, *, impl: str = "auto") -> None:
        super().__init__()
        check_positive_int("head_dim", head_dim)
        if not isinstance(config, SLAConfig):
            raise TypeError(f"config must be an SLAConfig, got {type(config).__name__}")
        check_choice("impl", impl, IMPLS)
        self.head_dim, self.config, self.impl = head_dim, config, impl
        self.ran = None
        linear = config.linear_scope != "none"
        self.proj = Projection(head_dim) if linear and config.projection else None
        hedgehog = linear and config.feature_map == "hedgehog"
        self.feature_weight = nn.Parameter(torch.eye(head_dim)) if hedgehog else None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        grid: VideoGrid | None = None,
        layout: TokenLayout | VideoGrid | None = None,
        protected_keys: tuple[int, int] | None = None,
        kv_lengths: Tensor | None = None,
        selection: BlockSelection | None = None,
        config: SLAConfig | None = None,
    ) -> Tensor:
        """[B, H, Lq, D], [B, H, Lk, D] twice to [B, H, Lq, D]; see `sla_attention`.

        A `config` stands in for the module's own; it must need the same parameters.
        """
        if query.shape[-1] != self.head_dim:
            raise ValueError(f"query must have head_dim {self.head_dim}, got {query.shape[-1]}")
        weight, bias = (None, None) if self.proj is None else self.proj()
        weights, where = (weight, bias, self.feature_weight), Where(grid, layout, protected_keys, kv_lengths)
        config = self.config if config is None else config
        output, ran = _attend((query, key, value), config, selection, weights, where, None, self.impl)
        if may_note():
            self.ran = ran
        return output

    @staticmethod
    def kernel_blocks(config: SLAConfig, grid: VideoGrid | None) -> tuple[int, int]:
        """Tokens of the query and key blocks that kernels get."""
        return config.block_q, config.block_k

    def select(
        self,
        query: Tensor,
        key: Tensor,
        *,
        grid: VideoGrid | None = None,
        layout: TokenLayout | VideoGrid | None = None,
        protected_keys: tuple[int, int] | None = None,
        kv_lengths: Tensor | None = None,
        config: SLAConfig | None = None,
    ) -> BlockSelection:
        """The selection that `forward` makes for the same arguments, to look at.

        With a layout's protected segments it has rows for blocks of the video, and columns for those of the video, then
        for the protected keys.
        """
        config = self.config if config is None else config
        grid, packed = resolve_layout(grid, layout)
        if packed is not None:
            keys = packed_keys(query, key, packed, config, protected_keys, kv_lengths)
            return _packed_selection(keys.video(packed.split(query)[0]), key, keys, config, config.drop_ratio)
        order = token_order(config, grid, query.device)
        if order is not None:
            query, key = (video_sorted(x, order) for x in (query, key))
        rule = _rule(query, key, config, grid, config.drop_ratio, protected_keys, kv_lengths)
        return choose(query, key, rule, check_scale(None, query.shape[-1]), config.drop_ratio > 0)

    def token_places(self, grid: VideoGrid) -> Tensor:
        """int64 [L]: where each token, in raster order, stands in the order that blocks are cut from."""
        return token_places(self.config, grid)

    def extra_repr(self) -> str:
        return f"head_dim={self.head_dim}, config={self.config}, impl={self.impl!r}"
