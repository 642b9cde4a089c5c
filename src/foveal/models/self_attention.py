"""What the self-attention of several families shares.

Shape legend: B batch, H heads, D head dimension, C hidden width, L tokens, Lv of the video, Lt after them (text).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from foveal.kernels.dense import dense_attention
from foveal.layout import TokenLayout, VideoGrid
from foveal.models.context_parallel import Shards


@dataclass(eq=False)  # compared by identity: Dynamo hashes objects before they have their attributes
class LayerAttention:
    """The method's attention in one layer, for one forward.

    Args:
        method: (query [B, H, Lv, D], key, value [B, H, Lv + Lt, D], hidden_states [B, Lv, C], kv_lengths [B] or None,
            and `receive` where those three are still on their way) to [B, H, Lv, D]. Every query sees the last Lt
            keys, which are text, as far as they are valid. Under context parallelism the hidden states are this rank's
            tokens, and the rest is all tokens of this rank's heads. In a family that reads a `TokenLayout`, all of them
            are the whole sequence.
        grid: the grid of the video's Lv tokens, which are in raster order. In a family that reads a `TokenLayout`, that
            layout: there the whole sequence is what the rest of this class calls the video.
        shards: how the tokens are spread over ranks; None outside of context parallelism.
        kept_mass: (query, key [B, H, L, D] each) to the log-sum-exp over the keys that the method reads exactly,
            [B, H, L] in float32, differentiable; for a family whose tokens read something else beside the video. It
            reads them once more.
    """

    method: Callable[..., Tensor]
    grid: VideoGrid | TokenLayout
    shards: Shards | None = None
    kept_mass: Callable[[Tensor, Tensor], Tensor] | None = None

    @property
    def video_tokens(self) -> int:
        """This rank's tokens of the video in the sequence."""
        length = self.grid.num_tokens
        return length if self.shards is None else self.shards.sizes(length)[self.shards.rank]

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, hidden_states: Tensor, kv_lengths: Tensor | None = None
    ) -> Tensor:
        text = key.shape[2] - hidden_states.shape[1]
        query, key, value = self.to_heads((query, key, value), text)
        return self.to_tokens(self.method(query, key, value, hidden_states, kv_lengths))

    def send(self, x: Tensor, text: int = 0) -> Tensor:
        """Query, key, or value for `sent`. Under context parallelism it travels while the next one is computed.

        Args:
            x: [B, H, tokens, D].
            text: how many of this rank's tokens come after the video's.
        """
        # Autocast leaves norms in float32 and would cast all three at scaled_dot_product_attention.
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return x if self.shards is None else self.shards.send(x, self.grid.num_tokens, text)

    def receive(self, sent: Tensor, text: int = 0) -> Tensor:
        """What `send` returned, as `method` takes it."""
        return sent if self.shards is None else self.shards.receive(sent, self.grid.num_tokens, text)

    def sent(self, query: Tensor, key: Tensor, value: Tensor, hidden_states: Tensor) -> Tensor:
        """The same as a call, of what `send` returned, without text."""
        return self.to_tokens(self.method(query, key, value, hidden_states, None, self.receive))

    def to_heads(self, tensors: tuple[Tensor, ...], text: int) -> tuple[Tensor, ...]:
        """Query, key, and value as `method` takes them; `text` counts this rank's tokens after the video's."""
        under_way = [self.send(x, text) for x in tensors]
        return tuple(self.receive(x, text) for x in under_way)

    def to_tokens(self, output: Tensor, text: int | None = None) -> Tensor:
        """What `method` returns, as this rank's tokens of all heads, including `text` tokens after the video's."""
        if self.shards is None:
            return output
        sizes = self.shards.sizes(self.grid.num_tokens)
        return self.shards.to_tokens(output, sizes if text is None else [text] * len(sizes))


def dimensions(attn: nn.Module) -> tuple[int, int, int]:
    """(hidden_dim, num_heads, head_dim) of an attention module."""
    return attn.to_q.in_features, attn.heads, attn.inner_dim // attn.heads


def check_absent(**arguments: Any) -> None:
    """Raise a ValueError for an argument that is not None."""
    for name, value in arguments.items():
        if value is not None:
            raise ValueError(f"{name} must be None: sparse attention replaces only unmasked self-attention")


def joint_attention(
    sparse_attention: LayerAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    hidden_states: Tensor,
    kv_lengths: Tensor | None = None,
    before: int = 0,
) -> tuple[Tensor, Tensor]:
    """Attention over video and text in one sequence: sparse for the video's queries, dense for those of the text.

    Args:
        sparse_attention: the method's attention.
        query, key, value: [B, Lv + Lt, H, D], in sequence order. Under context parallelism, this rank's part of both.
        hidden_states: [B, Lv, C], the video's.
        kv_lengths: int [B], valid keys at the front of each sample, up to the end of the video at least; None when all
            are.
        before: how many of the Lt tokens stand before the video, with the others after it.

    Returns:
        [B, Lv, H * D] and [B, Lt, H * D], the text from before the video first.
    """
    video = hidden_states.shape[1]
    text = query.shape[1] - video
    query, key, value = (_video_first(x, before, video) for x in (query, key, value))
    query, key, value = sparse_attention.to_heads(tuple(x.transpose(1, 2) for x in (query, key, value)), text)
    video = query.shape[2] - (text if sparse_attention.shards is None else sparse_attention.shards.ranks * text)
    video_output = sparse_attention.method(query[:, :, :video], key, value, hidden_states, kv_lengths)
    text_output = dense_attention(query[:, :, video:], key, value, kv_lengths)
    outputs = sparse_attention.to_tokens(video_output), sparse_attention.to_tokens(text_output, text)
    return tuple(x.transpose(1, 2).flatten(2) for x in outputs)


def _video_first(x: Tensor, before: int, video: int) -> Tensor:
    """[B, L, H, D] with the tokens before the video moved behind it, where the method expects keys of text."""
    if not before:
        return x
    first, middle, last = x.split((before, video, x.shape[1] - before - video), 1)
    return torch.cat((middle, first, last), 1)


def grid_of_coordinates(name: str, coordinates: Tensor) -> VideoGrid:
    """The grid that tokens with these coordinates form. Reading them makes the host wait for the device.

    Args:
        name: the argument that they came with, for the error.
        coordinates: [3, L], each token's frame, row and column in any units.

    Raises:
        ValueError: the tokens do not form one grid in raster order.
    """
    coordinates = coordinates.detach().cpu()
    length = coordinates.shape[1]
    in_frame = coordinates[0] == coordinates[0, 0]
    in_row = in_frame & (coordinates[1] == coordinates[1, 0])
    per_frame, width = (int(x.long().cumprod(0).sum()) for x in (in_frame, in_row))
    if per_frame % width == 0 and length % per_frame == 0:
        grid = VideoGrid(length // per_frame, per_frame // width, width)
        frames, rows, columns = coordinates.view(3, *grid.shape)
        along = (frames == frames[:, :1, :1], rows == rows[:1, :, :1], columns == columns[:1, :1])
        if all(equal.all() for equal in along):
            return grid
    raise ValueError(
        f"{name} must be those of one grid of tokens in raster order, frame by frame and row by row, which its "
        f"{length} tokens are not; run the model dense for this input"
    )
