"""LTX-Video (`LTXVideoTransformer3DModel` of diffusers): self-attention over the video, text by cross-attention.

Shape legend: B batch, L tokens, C hidden width, H heads, D head dimension.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from foveal.layout import VideoGrid
from foveal.models.readers import layers_of_blocks
from foveal.models.self_attention import LayerAttention, check_absent, dimensions, grid_of_coordinates

__all__ = ["dimensions", "read_grid", "self_attention", "self_attention_layers"]


def self_attention_layers(transformer: nn.Module) -> dict[str, nn.Module]:
    """The video's self-attention modules by qualified name; `attn2` is cross-attention and stays as it is."""
    return layers_of_blocks(transformer, ("transformer_blocks",), "attn1")


def read_grid(transformer: nn.Module, arguments: dict[str, Any]) -> VideoGrid:
    """The grid of the tokens [B, L, channels], from the sides given with them or else from their coordinates.

    Raises:
        ValueError: the tokens do not form one grid, for example with conditioning frames before the video.
    """
    length = arguments["hidden_states"].shape[1]
    sides = tuple(arguments.get(name) for name in ("num_frames", "height", "width"))
    if None not in sides and math.prod(sides) == length:
        return VideoGrid(*sides)
    if arguments.get("video_coords") is not None:
        return grid_of_coordinates("video_coords", arguments["video_coords"][0])
    raise ValueError(f"num_frames, height and width must be the sides of the {length} tokens, got {sides}")


def self_attention(
    attn: nn.Module,
    sparse_attention: LayerAttention,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    attention_mask: Tensor | None = None,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """What diffusers' `LTXVideoAttnProcessor` does for self-attention, with `sparse_attention` in the middle.

    Args:
        attn: the layer's `LTXAttention`.
        sparse_attention: the method's attention.
        hidden_states: [B, L, C].
        encoder_hidden_states, attention_mask: must be None.
        image_rotary_emb: cosines and sines, [B, L, H * D] each.

    Returns:
        [B, L, C].

    Raises:
        ValueError: encoder states or a mask came.
    """
    from diffusers.models.transformers.transformer_ltx import apply_rotary_emb

    check_absent(encoder_hidden_states=encoder_hidden_states, attention_mask=attention_mask)

    def send(layer: nn.Module, norm: nn.Module | None = None) -> Tensor:
        x = layer(hidden_states)
        if norm is not None:
            x = norm(x)
            x = x if image_rotary_emb is None else apply_rotary_emb(x, image_rotary_emb)
        return sparse_attention.send(x.unflatten(2, (attn.heads, -1)).transpose(1, 2))

    # Under context parallelism each one travels while the next is computed.
    value, query, key = send(attn.to_v), send(attn.to_q, attn.norm_q), send(attn.to_k, attn.norm_k)
    output = sparse_attention.sent(query, key, value, hidden_states).transpose(1, 2).flatten(2)
    return attn.to_out[1](attn.to_out[0](output))
