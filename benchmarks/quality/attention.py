"""Attention that `run.py` tries beside the library's, and what a dense model's own queries and keys tell of it.

Shape legend: B batch, H heads, L tokens, D head dimension, T blocks of tokens.
"""

from __future__ import annotations

import copy
import math

import torch
import torch.nn.functional as F
from pixel_wan import predict
from torch import Tensor, nn

from foveal import SLAConfig, VideoGrid, block_sparse_attention, select_blocks, sparsify
from foveal.blocks import pool_blocks, pooled_scores
from foveal.methods.sla.attention import Projection
from foveal.methods.sla.feature_maps import apply_feature_map
from foveal.methods.sla.linear import linear_branch
from foveal.models.processor import sparse_processors

Heads = tuple[Tensor, Tensor, Tensor]  # query, key and value [B, H, L, D]


def sparse_only(keep_ratio: float, block: int) -> SLAConfig:
    """The configuration of a layer without new parameters."""
    return SLAConfig(keep_ratio=keep_ratio, drop_ratio=0.0, linear_scope="none", block_q=block, block_k=block)


def replace_attention(model: nn.Module, config: SLAConfig, build, layers=None) -> list[nn.Module]:
    """Makes a dense model, or some layers of it, sparse with other modules, `build(attention layer)` for each."""
    sparsify(model, config, layers=layers)
    device, built = next(model.parameters()).device, []
    for name, processor in sparse_processors(model).items():
        attention = build(model.get_submodule(name)).to(device)
        attention.config = config
        processor.attention = attention
        built.append(attention)
    return built


def token_mask(blocks: Tensor, block: int, length: int) -> Tensor:
    """[B, H, Tq, ...] to [B, H, L, ...], the row of each token's block."""
    return blocks.repeat_interleave(block, 2)[:, :, :length]


def block_sizes(length: int, block: int, like: Tensor) -> Tensor:
    """Tokens in each block, [T]."""
    starts = torch.arange(0, length, block, device=like.device, dtype=like.dtype)
    return (length - starts).clamp(max=block)


def pooled_tail_scores(query: Tensor, key: Tensor, block: int, *, variance: bool = False) -> Tensor:
    """[B, H, L, T]: the logarithm of each query's mass on each key block, from the block's mean key alone.

    A block of n keys k has sum exp(s q.k) >= n exp(s q.mean(k)). With `variance` the second cumulant is added,
    from each feature's variance by itself.
    """
    dtype, scale = torch.promote_types(query.dtype, torch.float32), query.shape[-1] ** -0.5
    query, mean = query.to(dtype), pool_blocks(key, block)
    scores = (query * scale) @ mean.transpose(-1, -2) + block_sizes(key.shape[2], block, mean).log()
    if variance:
        spread = (pool_blocks(key.to(dtype).square(), block) - mean.square()).clamp(min=0)
        scores = scores + (query * scale).square() @ spread.transpose(-1, -2) / 2
    return scores


class _InBlockOrder(nn.Module):
    """Attention whose `attend` gets tokens in the order that its `config` cuts blocks from."""

    config: SLAConfig

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *, grid: VideoGrid | None = None, **unused: object
    ) -> Tensor:
        tile = self.config.tile_for(grid)
        with torch.autocast(query.device.type, enabled=False):
            if tile is None:
                return self.attend(query, key, value)
            output = self.attend(*(grid.to_tile_order(x, tile) for x in (query, key, value)))
            return grid.to_raster_order(output, tile)


class MergedAttention(_InBlockOrder):
    """Sparse attention, and attention to the mean key and value of every block that was not read, in one softmax.

    Args:
        variance: see `pooled_tail_scores`.
        bias: learn one scalar a head, zero at the start, that is added to the tail's log-mass.
    """

    def __init__(self, heads: int, *, variance: bool = False, bias: bool = False) -> None:
        super().__init__()
        self.variance = variance
        self.bias = nn.Parameter(torch.zeros(heads, 1)) if bias else None

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        block, length = self.config.block_k, query.shape[2]
        selection = _select(query, key, self.config)
        sparse, sparse_mass = block_sparse_attention(query, key, value, selection, return_lse=True)
        scores = pooled_tail_scores(query, key, block, variance=self.variance)
        scores = scores.masked_fill(token_mask(selection.critical_mask(), block, length), -math.inf)
        mass = scores.logsumexp(-1)
        tail = (scores - mass[..., None]).exp() @ pool_blocks(value, block)
        if self.bias is not None:
            mass = mass + self.bias
        share = (sparse_mass - mass).sigmoid()[..., None]
        return (share * sparse + (1 - share) * tail).to(query.dtype)


class MixedAttention(_InBlockOrder):
    """O = a O^s + (1 - a) O^l, the linear branch over all that is not critical.

    a is the sigmoid of one learned scalar a head, zero at the start, plus the log-ratio of the masses inside and
    outside of the critical blocks that the pooled scores of the query's block predict.

    Args:
        head_dim: D, for a projection of O^l, the identity at the start; None for none.
    """

    def __init__(self, heads: int, *, feature_map: str = "softmax", head_dim: int | None = None) -> None:
        super().__init__()
        self.feature_map = feature_map
        self.bias = nn.Parameter(torch.zeros(heads, 1))
        self.proj = None
        if head_dim is not None:
            self.proj = nn.Linear(head_dim, head_dim)
            nn.init.eye_(self.proj.weight)
            nn.init.zeros_(self.proj.bias)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        block, length = self.config.block_k, query.shape[2]
        selection = _select(query, key, self.config)
        sparse = block_sparse_attention(query, key, value, selection)
        critical = selection.critical_mask()
        phi_query, phi_key = (apply_feature_map(x, self.feature_map) for x in (query, key))
        linear = linear_branch(phi_query, phi_key, value.to(phi_key.dtype), ~critical, block, block)
        if self.proj is not None:
            linear = self.proj(linear.to(self.proj.weight.dtype))
        pooled = pool_blocks(query, block), pool_blocks(key, block)
        scores = pooled_scores(*pooled, query.shape[-1] ** -0.5)
        scores = scores + block_sizes(key.shape[2], block, scores).log()
        inside, outside = (scores.masked_fill(mask, -math.inf).logsumexp(-1) for mask in (~critical, critical))
        share = (token_mask(inside - outside, block, length) + self.bias).sigmoid()[..., None]
        return (share * sparse + (1 - share) * linear).to(query.dtype)


class CenteredAttention(nn.Module):
    """SLA with its linear branch in float32 and over values without their mean, which a nearly uniform O^l is made of.

    What its projection learns is then the part that differs from query to query, not a second bias.
    """

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.proj = Projection(head_dim)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, **unused: object) -> Tensor:
        config = self.config
        with torch.autocast(query.device.type, enabled=False):
            selection = _select(query, key, config)
            sparse = block_sparse_attention(query, key, value, selection)
            phi_query, phi_key = (apply_feature_map(x, config.feature_map) for x in (query, key))
            centered = value.to(phi_key.dtype)
            centered = centered - centered.mean(2, keepdim=True)
            mask = selection.linear_mask(config.linear_scope)
            linear = linear_branch(phi_query, phi_key, centered, mask, config.block_q, config.block_k)
            return (sparse + F.linear(linear, *self.proj())).to(query.dtype)


class Recorder(nn.Module):
    """Dense attention that keeps what it was called with."""

    seen: Heads

    def forward(self, query: Tensor, key: Tensor, value: Tensor, **unused: object) -> Tensor:
        self.seen = query.detach(), key.detach(), value.detach()
        return F.scaled_dot_product_attention(query, key, value)


def _select(query: Tensor, key: Tensor, config: SLAConfig):
    blocks = {"block_q": config.block_q, "block_k": config.block_k}
    ratios = {"keep_ratio": config.keep_ratio, "drop_ratio": config.drop_ratio}
    return select_blocks(query.detach(), key.detach(), **blocks, **ratios)


@torch.no_grad()
def record(model: nn.Module, noisy: Tensor, sigmas: Tensor, first_frame: Tensor, block: int) -> list[Heads]:
    """Query, key and value of every self-attention layer of a dense model in one forward, as processors see them."""
    model = copy.deepcopy(model)
    recorders = replace_attention(model, sparse_only(1.0, block), lambda layer: Recorder())
    predict(model, noisy, sigmas, first_frame)
    return [recorder.seen for recorder in recorders]


class Regression:
    """Least squares from features X [H, N, F] and a constant to targets Y [H, N, D], by their products, in float64."""

    def __init__(self) -> None:
        self.xx = self.xy = self.yy = 0.0

    def add(self, x: Tensor | None, y: Tensor) -> None:
        """More rows; no features leave the constant."""
        y = y.double()
        ones = torch.ones_like(y[..., :1])
        x = ones if x is None else torch.cat((x.double(), ones), -1)
        self.xx = self.xx + x.transpose(-1, -2) @ x
        self.xy = self.xy + x.transpose(-1, -2) @ y
        self.yy = self.yy + y.square().sum((-1, -2))

    def solve(self, *, shared: bool, ridge: float = 1e-4) -> Tensor:
        """[F + 1, D] for all heads together, or [H, F + 1, D]; the ridge is a share of the features' mean variance."""
        device, xx, xy = self.xx.device, self.xx.cpu(), self.xy.cpu()
        if shared:
            xx, xy = xx.sum(0), xy.sum(0)
        count = xx[..., -1:, -1:]
        mean_x, mean_y = xx[..., :-1, -1:] / count, xy[..., -1:, :] / count
        if not mean_x.numel():
            return mean_y.to(device)
        covariance = xx[..., :-1, :-1] / count - mean_x @ mean_x.transpose(-1, -2)
        size = covariance.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None].clamp(min=1e-30)
        eye = torch.eye(covariance.shape[-1], dtype=xx.dtype)
        slope = torch.linalg.solve(covariance + ridge * size * eye, xy[..., :-1, :] / count - mean_x @ mean_y)
        return torch.cat((slope, mean_y - mean_x.transpose(-1, -2) @ slope), -2).to(device)

    def squared_error(self, weights: Tensor) -> Tensor:
        """Sum of squares left in each head's rows by some weights, [H]."""
        explained = 2 * (weights * self.xy).sum((-1, -2)) - (weights * (self.xx @ weights)).sum((-1, -2))
        return self.yy - explained


@torch.no_grad()
def warm_start(model: nn.Module, dense: nn.Module, batches: list[tuple[Tensor, Tensor, Tensor]]) -> list[float]:
    """Sets a converted model's projections to the least-squares fit of what sparse attention leaves out, per layer.

    Args:
        model: converted by an `SLAConfig` with a projection.
        dense: what it was converted from.
        batches: (noisy, sigmas, first frame) to record.

    Returns:
        Share of the sparse branch's squared error that the fit removes, per layer, on the same batches.
    """
    processors = list(sparse_processors(model).values())
    config = processors[0].config
    fits = [Regression() for _ in processors]
    for noisy, sigmas, first_frame in batches:
        layers = record(dense, noisy, sigmas, first_frame, config.block_k)
        for regression, (query, key, value) in zip(fits, layers, strict=True):
            selection = _select(query, key, config)
            missing = F.scaled_dot_product_attention(query, key, value).float()
            missing = missing - block_sparse_attention(query, key, value, selection).float()
            phi_query, phi_key = (apply_feature_map(x, config.feature_map) for x in (query, key))
            mask = selection.linear_mask(config.linear_scope)
            linear = linear_branch(phi_query, phi_key, value.to(phi_key.dtype), mask, config.block_q, config.block_k)
            regression.add(*(x.transpose(0, 1).flatten(1, 2) for x in (linear, missing)))
    removed = []
    for regression, processor in zip(fits, processors, strict=True):
        weights = regression.solve(shared=True, ridge=1e-3)
        projection = processor.attention.proj
        projection.weight.copy_(weights[:-1].T)
        projection.bias.copy_(weights[-1])
        left = regression.squared_error(weights).sum() / regression.yy.sum()
        removed.append(1 - left.item())
    return removed


def check_merge() -> None:
    """Compares `MergedAttention` with a dense softmax in float64, outputs and gradients; raises where they differ.

    A block that is not read is as if all its keys and values were their means.
    """
    block, length, keep = 8, 60, 0.3
    generator = torch.Generator().manual_seed(0)
    heads = [torch.randn(2, 3, length, 16, generator=generator, dtype=torch.float64) for _ in range(3)]
    module = MergedAttention(3)
    module.config = sparse_only(keep, block)

    def by_mask(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        read = _select(query, key, module.config)
        read = read.expand(read.critical_mask())
        means = [token_mask(pool_blocks(x, block), block, length) for x in (key, value)]
        exact, mean = (query @ x.transpose(-1, -2) / 4 for x in (key, means[0]))
        weights = torch.where(read, exact, mean).softmax(-1)
        return (weights * read) @ value + (weights * ~read) @ means[1]

    found = []
    for function in (module, by_mask):
        inputs = [x.clone().requires_grad_() for x in heads]
        output = function(*inputs)
        output.square().sum().backward()
        found.append([output.detach(), *(x.grad for x in inputs)])
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-11)
