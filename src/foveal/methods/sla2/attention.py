"""SLA2 for use: the function `sla2_attention` and the module `RoutedSparseLinearAttention` that owns its parameters."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from foveal.blocks import BlockSelection
from foveal.checks import check_choice, check_positive_int, check_scale, validate_qkv, without_autocast
from foveal.kernels.api import IMPLS, SLOW_SELECTION, Ran, choose_impl, may_note
from foveal.kernels.backend import name_of
from foveal.layout import NOWHERE, TokenLayout, VideoGrid, Where
from foveal.methods.parameters import PreciseParameters
from foveal.methods.routing import Ranked, Router, check_projections, of_heads, start_projections
from foveal.methods.sla.order import token_places
from foveal.methods.sla2.blocks import CallBlocks
from foveal.methods.sla2.config import SLA2Config
from foveal.methods.sla2.cpu import sla2_attention_torch
from foveal.methods.sla2.exact import sla2_attention_exact
from foveal.methods.sla2.mixing import block_logits, start_logits
from foveal.methods.sla2.routing import ranked_scores
from foveal.methods.sla2.soft import sla2_attention_soft
from foveal.rules import SelectionRule
from foveal.symbols import ceil_div

if TYPE_CHECKING:
    from foveal.methods.sla2.gpu_choice import CallRouter

# Why a call on a GPU's kernels is slower than others, in `Ran`.
SLOW_ROUTING = 'routing="soft" reads every block, in PyTorch'
SLAS_ROUTER = Router(None, None)  # which ranks blocks by the products of their means


class Weights(NamedTuple):
    """The parameters of a call.

    alpha_logits: [H, R]; None for the configuration's alpha.
    router: proj_q and proj_k.
    """

    alpha_logits: Tensor | None
    router: Router


def sla2_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    config: SLA2Config,
    selection: BlockSelection | None = None,
    alpha_logits: Tensor | None = None,
    proj_query: Tensor | None = None,
    proj_key: Tensor | None = None,
    grid: VideoGrid | None = None,
    layout: TokenLayout | VideoGrid | None = None,
    protected_keys: tuple[int, int] | None = None,
    kv_lengths: Tensor | None = None,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """Sparse-linear attention, routed: O = alpha O^s + (1 - alpha) O^l (SLA2, arXiv 2602.12675, eq. 13-16).

    Args:
        query: [B, H, Lq, D], bfloat16, float16, float32 or float64.
        key, value: [B, H, Lk, D].
        config: see `SLA2Config`.
        selection: a fixed selection instead of the router's. The projections get the gradient of this choice then.
        alpha_logits: [H, R], log-odds of alpha, R values for each head along the query blocks of the video; None for
            `config.alpha` everywhere, and without a linear branch.
        proj_query, proj_key: [D, D] each, or [H, D, D], the router's projections of pooled queries and keys; None for
            the identity.
        grid, layout, protected_keys, kv_lengths: as in `sla_attention`. With a layout's protected segments the linear
            branch sums over the video's keys.
        scale: softmax scale; None for 1 / sqrt(D).
        impl: "auto", "reference", "torch", "triton" or "gluon"; see `block_sparse_attention`.

    Returns:
        [B, H, Lq, D] in the dtype and token order of `query`. Gradients of query, key, value and alpha_logits are exact
        for the selection; those of the projections are straight-through, or exact where `config.routing` is "soft".

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    weights = Weights(alpha_logits, Router(proj_query, proj_key))
    where = Where(grid, layout, protected_keys, kv_lengths)
    return _attend((query, key, value), config, selection, weights, where, scale, impl)[0]


@without_autocast
def _attend(
    inputs: tuple[Tensor, Tensor, Tensor],
    config: SLA2Config,
    selection: BlockSelection | None,
    weights: Weights,
    where: Where,
    scale: float | None,
    impl: str,
) -> tuple[Tensor, Ran]:
    """`sla2_attention`, and what ran; `inputs` are its query, key, and value."""
    query, key, value = inputs
    if not isinstance(config, SLA2Config):
        raise TypeError(f"config must be an SLA2Config, got {type(config).__name__}")
    validate_qkv(query, key, value)
    _validate_weights(query, weights, config)
    ran = choose_impl(impl, query, key, value, config.block_q, config.block_k, config.precision)
    scale = check_scale(scale, query.shape[-1])
    soft, on_kernels = config.routing == "soft", ran.impl in ("triton", "gluon")
    blocks = CallBlocks(query, key, config, where, selection, on_kernels)
    if soft and on_kernels:
        ran = ran.but(SLOW_ROUTING)
    exact = config.linear_scope == "none"
    if selection is not None:
        choice = blocks.checked(selection)
    elif on_kernels and blocks.packed is None and not (blocks.slow or soft):
        choice = blocks.rule()
    else:
        choice = blocks.choose(weights.router, scale)
        if on_kernels and blocks.slow:
            ran = ran.but(SLOW_SELECTION)
    inputs = blocks.query, blocks.in_blocks(key), blocks.in_blocks(value)
    if exact and on_kernels and not soft:
        from foveal.methods.sla2.gpu_exact import ExactCall, ExactOptions, sla2_exact_gpu

        learning, fixed, ranked = _router_of(blocks, choice, weights.router)
        options = ExactOptions(scale, config.temperature, name_of(ran.impl, config.precision))
        (output,) = sla2_exact_gpu(ExactCall(*inputs, *learning, *fixed, ranked, choice), options)
        return blocks.output(output, query, key, value, scale), ran
    logits = weights.alpha_logits
    if logits is None:  # without a linear branch nothing is weighed by them
        logits = start_logits(query.shape[1], 1, config.alpha, query.device)
    if on_kernels and not soft:
        from foveal.methods.sla2.gpu import SLA2Call, SLA2Options, sla2_attention_gpu

        learning, fixed, ranked = _router_of(blocks, choice, weights.router)
        options = SLA2Options(scale, config.temperature, config.feature_map, name_of(ran.impl, config.precision))
        logits = block_logits(logits.float(), ceil_div(blocks.query.shape[2], config.block_q))
        (output,) = sla2_attention_gpu(SLA2Call(*inputs, logits, *learning, *fixed, ranked, choice), options)
        return blocks.output(output, query, key, value, scale), ran
    ranked = _ranked(inputs, blocks, choice, weights.router, scale)
    if ran.impl == "reference":
        from foveal.methods.sla2.reference import sla2_attention_reference

        output = sla2_attention_reference(
            *inputs,
            config=config,
            selection=choice,
            scale=scale,
            alpha_logits_HR=logits,
            ranked_BC=None if ranked is None else blocks.ranked(choice.key_block_sizes),
            proj_query_DD=weights.router.query,
            proj_key_DD=weights.router.key,
        )
    elif exact and not soft:
        output = sla2_attention_exact(*inputs, config, choice, scale, ranked)
    elif soft:
        output = sla2_attention_soft(*inputs, config, choice, scale, logits, ranked)
    else:
        output = sla2_attention_torch(*inputs, config, choice, scale, logits, ranked)
    return blocks.output(output, query, key, value, scale), ran


def _learns(config: SLA2Config, router: Router) -> bool:
    """Whether a call's choice gives the router's projections a gradient."""
    differentiable = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in router)
    return config.routing != "fixed" and differentiable


def _router_of(blocks: CallBlocks, choice: BlockSelection | SelectionRule, router: Router) -> CallRouter:
    """The router of a call on kernels, which chooses by its weights, learns, or does both."""
    from foveal.methods.gpu_routing import in_float32, without_history
    from foveal.methods.sla2.gpu_choice import CallRouter

    if _learns(blocks.config, router):
        sizes = choice.key_block_sizes
        return CallRouter(in_float32(router), ranked=None if blocks.ranks_all(sizes) else blocks.ranked(sizes))
    return CallRouter(fixed=without_history(router)) if isinstance(choice, SelectionRule) else CallRouter()


def _ranked(
    inputs: tuple[Tensor, Tensor, Tensor],
    blocks: CallBlocks,
    choice: BlockSelection | SelectionRule,
    router: Router,
    scale: float,
) -> Ranked | None:
    """The scores by which the router's projections get a gradient or blocks weights; None where neither is so."""
    config = blocks.config
    if config.routing != "soft" and not _learns(config, router):
        return None
    ranked = blocks.ranked(choice.key_block_sizes)
    return Ranked(ranked_scores(*inputs[:2], router, choice, ranked, scale), config.temperature)


def _validate_weights(query: Tensor, weights: Weights, config: SLA2Config) -> None:
    check_projections(weights.router, query)
    heads = query.shape[1]
    logits = weights.alpha_logits
    if logits is not None and (not isinstance(logits, Tensor) or logits.dim() != 2 or logits.shape[0] != heads):
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"alpha_logits must have shape [{heads}, rows] for {heads} heads, got {got}")
    if logits is not None and config.linear_scope == "none":
        raise ValueError('alpha_logits weigh the linear branch, which linear_scope="none" does not have')
    if logits is not None and logits.device != query.device:
        raise ValueError(f"alpha_logits is on {logits.device}, but query is on {query.device}")


class RoutedSparseLinearAttention(nn.Module):
    """Sparse-linear attention with a learned router and a learned ratio of its branches (SLA2).

    Args:
        num_heads, head_dim: H and D.
        config: see `SLA2Config`.
        impl: see `block_sparse_attention`.

    Attributes:
        router: proj_query and proj_key, [D, D] each, shared by the heads, or [H, D, D], float32, the identity at the
            start, which ranks blocks as SLA does.
        mixing: alpha_logits, float32 [H, `config.alpha_rows`], log-odds of alpha, `config.alpha` everywhere at the
            start; None without a linear branch.
        ran: what the last call ran (`Ran`: `impl`, and `why` if that is slower than asked); None before. Compiled
            calls with gradients leave it.
    """

    num_heads: int
    head_dim: int
    config: SLA2Config
    impl: str
    ran: Ran | None
    router: PreciseParameters
    mixing: PreciseParameters | None

    def __init__(self, num_heads: int, head_dim: int, config: SLA2Config, *, impl: str = "auto") -> None:
        super().__init__()
        check_positive_int("num_heads", num_heads)
        check_positive_int("head_dim", head_dim)
        if not isinstance(config, SLA2Config):
            raise TypeError(f"config must be an SLA2Config, got {type(config).__name__}")
        check_choice("impl", impl, IMPLS)
        self.num_heads, self.head_dim, self.config, self.impl = num_heads, head_dim, config, impl
        self.ran = None
        self.router = start_projections(config.router, num_heads, head_dim)
        self.mixing = None
        if config.linear_scope != "none":
            self.mixing = PreciseParameters(alpha_logits=start_logits(num_heads, config.alpha_rows, config.alpha))

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        heads: range | None = None,
        grid: VideoGrid | None = None,
        layout: TokenLayout | VideoGrid | None = None,
        protected_keys: tuple[int, int] | None = None,
        kv_lengths: Tensor | None = None,
        selection: BlockSelection | None = None,
        config: SLA2Config | None = None,
    ) -> Tensor:
        """[B, H, Lq, D], [B, H, Lk, D] twice to [B, H, Lq, D]; see `sla2_attention`.

        A `config` stands in for the module's own; it must need the same parameters. `heads` says which of the module's
        heads the tensors hold, as under context parallelism; None for all.
        """
        if query.shape[-1] != self.head_dim:
            raise ValueError(f"query must have head_dim {self.head_dim}, got {query.shape[-1]}")
        weights = self._weights(query, heads)
        config, where = self.config if config is None else config, Where(grid, layout, protected_keys, kv_lengths)
        output, ran = _attend((query, key, value), config, selection, weights, where, None, self.impl)
        if may_note():
            self.ran = ran
        return output

    def _weights(self, query: Tensor, heads: range | None) -> Weights:
        """The parameters of these heads."""
        router = Router(*of_heads(self.router(), self.num_heads, query, heads))
        own = slice(None) if heads is None else slice(heads.start, heads.stop)
        return Weights(None if self.mixing is None else self.mixing()[0][own], router)

    @staticmethod
    def kernel_blocks(config: SLA2Config, grid: VideoGrid | None) -> tuple[int, int]:
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
        config: SLA2Config | None = None,
        heads: range | None = None,
    ) -> BlockSelection:
        """The selection that `forward` makes for the same arguments, to look at."""
        config = self.config if config is None else config
        router = self._weights(query, heads).router
        return select_routed(query, key, config, router, Where(grid, layout, protected_keys, kv_lengths))

    def token_places(self, grid: VideoGrid) -> Tensor:
        """int64 [L]: where each token, in raster order, stands in the order that blocks are cut from."""
        return token_places(self.config.branches, grid)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, head_dim={self.head_dim}, config={self.config}, impl={self.impl!r}"


@torch.no_grad()
@without_autocast
def select_routed(
    query: Tensor, key: Tensor, config: SLA2Config, router: Router = SLAS_ROUTER, where: Where = NOWHERE
) -> BlockSelection:
    """The blocks that a router keeps."""
    return CallBlocks(query, key, config, where, None).choose(router, check_scale(None, query.shape[-1]))
