"""CogVideoX 1.0 and 1.5 (`CogVideoXTransformer3DModel` of diffusers): joint attention over text and video.

Text and video share projections. diffusers puts the text first; here it goes after the video, which does not affect
attention. No text token is masked, because this model was trained to see its padding.

Shape legend: B batch, Lv and Lt tokens of video and text, C hidden width, D head dimension.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from foveal.layout import VideoGrid
from foveal.models.readers import grid_of_latent, layers_of_blocks
from foveal.models.self_attention import LayerAttention, check_absent, dimensions, joint_attention

__all__ = ["dimensions", "read_grid", "self_attention", "self_attention_layers"]


def self_attention_layers(transformer: nn.Module) -> dict[str, nn.Module]:
    """The joint attention modules by qualified name."""
    return layers_of_blocks(transformer, ("transformer_blocks",), "attn1")


def read_grid(transformer: nn.Module, arguments: dict[str, Any]) -> VideoGrid:
    """The token grid of the latent [B, frames, channels, height, width]."""
    frames, _, height, width = arguments["hidden_states"].shape[1:]
    return grid_of_latent(transformer, (frames, height, width))


def self_attention(
    attn: nn.Module,
    sparse_attention: LayerAttention,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """What diffusers' `CogVideoXAttnProcessor2_0` and its fused version do, with `sparse_attention` in the middle.

    Args:
        attn: the layer's `Attention`.
        sparse_attention: the method's attention.
        hidden_states: [B, Lv, C], the video's.
        encoder_hidden_states: [B, Lt, C], the text's.
        attention_mask: must be None.
        image_rotary_emb: cosines and sines, [Lv, D] each, only for the video.

    Returns:
        The video's [B, Lv, C] and the text's [B, Lt, C].

    Raises:
        ValueError: a mask came.
    """
    from diffusers.models.embeddings import apply_rotary_emb

    check_absent(attention_mask=attention_mask)
    video = hidden_states.shape[1]
    joint = torch.cat((hidden_states, encoder_hidden_states), 1)
    # Unfusing restores the processor, but leaves the fused projection and its flag where they are.
    if type(attn.processor.original).__name__.startswith("Fused"):
        projected = attn.to_qkv(joint).chunk(3, dim=-1)
    else:
        projected = attn.to_q(joint), attn.to_k(joint), attn.to_v(joint)
    query, key, value = (x.unflatten(2, (attn.heads, -1)) for x in projected)
    query = query if attn.norm_q is None else attn.norm_q(query)
    key = key if attn.norm_k is None else attn.norm_k(key)
    if image_rotary_emb is not None:
        query, key = (
            torch.cat((apply_rotary_emb(x[:, :video], image_rotary_emb, sequence_dim=1), x[:, video:]), 1)
            for x in (query, key)
        )
    outputs = joint_attention(sparse_attention, query, key, value, hidden_states)
    return tuple(attn.to_out[1](attn.to_out[0](output)) for output in outputs)
