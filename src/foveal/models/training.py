"""What training asks of a family: how a transformer predicts a velocity, and which of its parts are what.

A family's file fills a `Training`. A sample consists of one tensor, the latents of a video [B, C, F, H, W], or of two,
the second being its sound, in the shape that the family gives it. A velocity is noise minus data, as in `x_t = (1 -
sigma) x_0 + sigma eps`, whatever the transformer itself predicts.

Shape legend: B batch, C latent channels, F latent frames, H x W latent height and width, N tokens of the video.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

Streams = tuple[Tensor, ...]


@dataclass(frozen=True)
class Training:
    """How transformers of one family are trained.

    Args:
        arguments: (transformer, noisy latents, a noise level [B] for each of them, text tensors by name) to the
            arguments of its forward. Levels of a video may be [B, F], one for each frame, where `frame_levels` is set.
        velocities: (transformer, what its forward returns, noisy latents) to the velocities, in the shapes of these.
        text_width: a transformer's configuration to the width of the text embeddings that it takes.
        lora_loader: the class of diffusers whose `save_lora_weights` writes an adapter as its pipelines read it.
        conditioned: whether a configuration is that of a transformer which needs more than text.
        has_sound: whether a sample has sound beside its video.
        frame_levels: whether frames may have noise levels of their own.
        one_sample: whether a forward takes one sample, because text is not padded or all samples share a noise level.
        not_per_token: parts of the names of a block's weights that the video's tokens do not go through, for FLOPs.
    """

    arguments: Callable[[nn.Module, Streams, Streams, Mapping[str, Tensor]], dict[str, Any]]
    velocities: Callable[[nn.Module, Any, Streams], Streams]
    text_width: Callable[[Mapping[str, Any]], int]
    lora_loader: str
    conditioned: Callable[[Mapping[str, Any]], bool] = lambda config: False
    has_sound: bool = False
    frame_levels: bool = False
    one_sample: bool = False
    not_per_token: tuple[str, ...] = ()


def to_tokens(video: Tensor, patch: tuple[int, int, int]) -> Tensor:
    """A video [B, C, F, H, W] as tokens [B, N, C * prod(patch)], in raster order."""
    sides = [part for side, edge in zip(video.shape[2:], patch, strict=True) for part in (side // edge, edge)]
    tokens = video.reshape(*video.shape[:2], *sides).permute(0, 2, 4, 6, 1, 3, 5, 7)
    return tokens.flatten(4).flatten(1, 3)


def to_video(tokens: Tensor, patch: tuple[int, int, int], shape: tuple[int, ...]) -> Tensor:
    """The inverse of `to_tokens` for a video of this shape."""
    sides = [side // edge for side, edge in zip(shape[2:], patch, strict=True)]
    parts = tokens.reshape(shape[0], *sides, shape[1], *patch)
    return parts.permute(0, 4, 1, 5, 2, 6, 3, 7).reshape(shape)
