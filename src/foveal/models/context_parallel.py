"""Context parallelism: the tokens of one video over several devices, by Ulysses' all-to-all (arXiv 2309.14509).

Every rank holds a contiguous shard of the tokens, in raster order, for all heads. Before attention an all-to-all turns
it into all tokens for a share of the heads. There the method runs on the whole grid, and tiles, pools, and selects as
on one device. A second all-to-all brings the outputs back. VSA's gates, which come from the hidden states token by
token, are computed on the shard and travel like values.

A packed sequence travels whole: its protected segments are tokens like those of the video.

Both exchanges are differentiable. Every rank's backward gives its own part of a parameter's gradient: from its tokens
for what acts on tokens, and from its heads for what the heads share (SLA's projection). The sum over ranks is the
gradient.

Shape legend: B batch, N ranks, H heads, h = H / N, D head dimension, L tokens of the video and T of the text in the
sequence, l and t of these on this rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from foveal.layout import TokenLayout, VideoGrid
from foveal.methods.base import METHODS, LayerCall, method_of

# Families whose transformers diffusers can shard, and whose sharded attention the tests cover.
FAMILIES_WITH_PLAN = ("wan", "ltx_video", "flux", "minimax_h3")


def _start(group: Any, received: list[int], sent: list[int], x: Tensor) -> Tensor:
    """Start sending row blocks of x to their ranks. The result is not valid before `_wait`."""
    return torch.ops._c10d_functional.all_to_all_single(x.contiguous(), received, sent, group.group_name)


def _wait(x: Tensor) -> Tensor:
    # Explicit, because kernels that read a tensor by its address would not wait themselves.
    return torch.ops._c10d_functional.wait_tensor(x)


def _returns_early(received: list[int], sent: list[int]) -> bool:
    """Whether `_Finish` can start sending the gradient back.

    Autograd wants the gradient to have the shape of the input. Its anomaly mode reads the gradient, which must not
    happen while it travels.
    """
    observed = not torch.compiler.is_compiling() and torch.is_anomaly_enabled()
    return sum(received) == sum(sent) and not observed


class _Start(torch.autograd.Function):
    """`_start`. Its backward waits for the gradient that `_Finish` has started to send."""

    @staticmethod
    def forward(ctx, group, received: list[int], sent: list[int], x: Tensor) -> Tensor:
        ctx.group, ctx.received, ctx.sent = group, received, sent
        return _start(group, received, sent, x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Any, ...]:
        if not _returns_early(ctx.received, ctx.sent):
            gradient = _start(ctx.group, ctx.sent, ctx.received, gradient)
        return None, None, None, _wait(gradient)


class _Finish(torch.autograd.Function):
    """`_wait`, only for what `_Start` returned. Its backward starts to send the gradient back."""

    @staticmethod
    def forward(ctx, group, received: list[int], sent: list[int], x: Tensor) -> Tensor:
        ctx.group, ctx.received, ctx.sent = group, received, sent
        return _wait(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Any, ...]:
        if _returns_early(ctx.received, ctx.sent):
            gradient = _start(ctx.group, ctx.sent, ctx.received, gradient)
        return None, None, None, gradient


@dataclass(frozen=True)
class Shards:
    """How a sequence is spread over the ranks of a group: contiguously, in the order of the ranks.

    Args:
        group: the `torch.distributed` group.
        uneven: the first ranks may hold one token more than the others (`torch.tensor_split`); otherwise all must hold
            the same number.
    """

    group: Any
    uneven: bool = False

    @property
    def ranks(self) -> int:
        return dist.get_world_size(self.group)

    @property
    def rank(self) -> int:
        return dist.get_rank(self.group)

    def sizes(self, length: int) -> list[int]:
        """How many tokens each rank holds.

        Raises:
            ValueError: the length does not divide among the ranks, and shards may not be uneven.
        """
        ranks = self.ranks
        if length % ranks and not self.uneven:
            raise ValueError(f"the video's {length} tokens do not divide among {ranks} ranks")
        return [(length + ranks - 1 - rank) // ranks for rank in range(ranks)]

    def send(self, x: Tensor, length: int, text: int = 0) -> Tensor:
        """Start sending this rank's tokens of all heads. Only `receive` may read what this returns.

        Other work can run between the two. The gradient travels in the same way, from `receive` to `send`.

        Args:
            x: [B, H, l + t, D], the video's tokens first.
            length: L.
            text: t, the same on every rank.

        Raises:
            ValueError: heads do not divide among the ranks, a shard has another size, or uneven shards hold text.
        """
        sizes = self.sizes(length)
        ranks, video = len(sizes), sizes[self.rank]
        heads, tokens = x.shape[1:3]
        if heads % ranks:
            raise ValueError(
                f"context parallelism gives each rank a share of the heads: {heads} heads do not divide among "
                f"{ranks} ranks"
            )
        if tokens - text != video:
            raise ValueError(
                f"this rank must hold {video} of the video's {length} tokens, its part of {ranks}, got {tokens - text}"
            )
        if text and self.uneven:
            raise ValueError("text in one sequence with the video needs even shards: expected ulysses_anything=False")
        # The rank is outermost on both sides, so what arrives is already in order.
        packed = x.unflatten(1, (ranks, -1)).permute(1, 3, 0, 2, 4).flatten(0, 1)
        return _Start.apply(self.group, [size + text for size in sizes], [tokens] * ranks, packed)

    def receive(self, sent: Tensor, length: int, text: int = 0) -> Tensor:
        """All tokens of this rank's heads, [B, h, L + T, D], from what `send` returned for this length and text.

        Rank r has the heads from r * h on. The video's tokens come first, in raster order.
        """
        sizes = self.sizes(length)
        counts, tokens = [size + text for size in sizes], sizes[self.rank] + text
        arrived = _Finish.apply(self.group, counts, [tokens] * len(sizes), sent)
        if text:
            arrived = _video_first(arrived.split(counts), sizes)
        return arrived.permute(1, 2, 0, 3)

    def heads(self, count: int) -> range:
        """Which heads `receive` gives this rank, so many."""
        return range(self.rank * count, (self.rank + 1) * count)

    def to_tokens(self, x: Tensor, sizes: list[int]) -> Tensor:
        """This rank's tokens of all heads, [B, H, l, D], from all tokens of its heads, [B, h, L, D].

        Args:
            sizes: the number of tokens of each rank.
        """
        ranks, tokens = len(sizes), sizes[self.rank]
        route = self.group, [tokens] * ranks, sizes
        arrived = _Finish.apply(*route, _Start.apply(*route, x.permute(2, 0, 1, 3)))
        # [B, l, H, D] in memory, as the output projection reads it.
        return arrived.unflatten(0, (ranks, tokens)).permute(2, 1, 0, 3, 4).flatten(2, 3).transpose(1, 2)


def _video_first(parts: Sequence[Tensor], sizes: list[int]) -> Tensor:
    """Reorder rows of [video, text] per rank to the video of all ranks and then the text of all ranks."""
    pairs = list(zip(parts, sizes, strict=True))
    return torch.cat([part[:size] for part, size in pairs] + [part[size:] for part, size in pairs])


def context_parallel_attention(
    attention: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    hidden_states: Tensor | None = None,
    *,
    grid: VideoGrid,
    group: Any = None,
) -> Tensor:
    """Run a sparse attention module on a video whose tokens are spread over ranks, in a model of your own.

    Rank r of N holds the r-th of N contiguous parts of the tokens, in raster order, as `tensor_split` cuts them. All
    ranks call this together, with modules of the same parameters and configuration.

    Args:
        attention: a `SparseLinearAttention` or `VideoSparseAttention`.
        query, key, value: [B, H, l, D], this rank's tokens. H divides by the number of ranks.
        hidden_states: [B, l, hidden_dim], only for `VideoSparseAttention`.
        grid: the shape of the whole video in tokens.
        group: the `torch.distributed` group; None for all ranks.

    Returns:
        [B, H, l, D], differentiable. A parameter's gradient is the sum of what the ranks get.

    Raises:
        TypeError: `attention` is neither of the two.
        ValueError: shards or heads do not fit; the message has the numbers.
    """
    types = tuple(method.module_type for method in METHODS.values())
    if not isinstance(attention, types):
        valid = " or ".join(cls.__name__ for cls in types)
        raise TypeError(f"attention must be a {valid}, got {type(attention).__name__}")
    if not query.shape == key.shape == value.shape:
        raise ValueError(
            "query, key and value must have one shape, this rank's tokens of all heads, "
            f"got {tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}"
        )
    shards = Shards(dist.group.WORLD if group is None else group, uneven=True)
    under_way = [shards.send(x, grid.num_tokens) for x in (query, key, value)]
    gates = send_gates(attention, hidden_states, grid, shards)
    query, key, value = (shards.receive(x, grid.num_tokens) for x in under_way)
    gates = receive_gates(gates, grid, shards)
    heads = shards.heads(query.shape[1])
    config = attention.config.of_heads(heads.start, heads.stop)
    call = LayerCall(query, key, value, None, grid, config=config, gates=gates, heads=heads)
    output = method_of(config).run(attention, call)
    return shards.to_tokens(output, shards.sizes(grid.num_tokens))


def send_gates(
    attention: nn.Module, hidden_states: Tensor | None, grid: VideoGrid | TokenLayout, shards: Shards
) -> tuple[Tensor | None, ...] | None:
    """Start sending the gates that a method computes from this rank's hidden states [B, l, C]; see `Method.gates`."""
    gates = method_of(attention.config).gates(attention, hidden_states)
    if gates is None:
        return None
    return tuple(None if gate is None else shards.send(gate, grid.num_tokens) for gate in gates)


def receive_gates(
    gates: tuple[Tensor | None, ...] | None, grid: VideoGrid | TokenLayout, shards: Shards
) -> tuple[Tensor | None, ...] | None:
    """The gates that `send_gates` sent, for all tokens of this rank's heads."""
    if gates is None:
        return None
    return tuple(None if gate is None else shards.receive(gate, grid.num_tokens) for gate in gates)


def shards_of(config: Any) -> Shards | None:
    """The shards that diffusers' `ParallelConfig` describes; None without context parallelism."""
    context = getattr(config, "context_parallel_config", None)
    if context is None:
        return None
    return Shards(context._ulysses_mesh.get_group(), uneven=context.ulysses_anything)


def check_parallel_config(family: str, config: Any) -> None:
    """Raise a ValueError for a diffusers `ParallelConfig` that a family's sparse layers do not support.

    Args:
        family: its name in the table.
        config: the configuration; None without context parallelism.
    """
    context = getattr(config, "context_parallel_config", None)
    if context is None:
        return
    if family not in FAMILIES_WITH_PLAN:
        raise ValueError(
            f"context parallelism of sparse attention is supported for {', '.join(FAMILIES_WITH_PLAN)}, "
            f"not for {family}: diffusers does not shard it, or not in a way that works; densify the model, or run it "
            "without"
        )
    if context.ring_degree > 1:
        raise ValueError(
            "sparse attention selects from all keys, so it takes only Ulysses: expected ring_degree=1 and "
            f"ulysses_degree for all ranks, got ring_degree={context.ring_degree}, "
            f"ulysses_degree={context.ulysses_degree}"
        )
