"""Flux.1 (`FluxTransformer2DModel` of diffusers): joint attention over text and one image.

There are two kinds of blocks. In the first ("dual stream") text has its own projections. In the second ("single
stream") text and image come as one sequence. The text is first. No text token is masked, because this model was trained
to see its padding.

Shape legend: B batch, Li and Lt tokens of image and text, C hidden width, D head dimension.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from foveal.layout import VideoGrid
from foveal.models.families.hunyuan_video import self_attention_layers
from foveal.models.self_attention import LayerAttention, check_absent, dimensions, grid_of_coordinates, joint_attention

__all__ = ["dimensions", "read_grid", "self_attention", "self_attention_layers"]


def read_grid(transformer: nn.Module, arguments: dict[str, Any]) -> VideoGrid:
    """The grid of the image's tokens from their `img_ids`, [Li, 3] or [B, Li, 3]: one frame of one image.

    Raises:
        ValueError: the tokens do not form one grid, for example those of two images of different sizes.
    """
    ids = arguments["img_ids"]
    return grid_of_coordinates("img_ids", (ids if ids.dim() == 2 else ids[0]).T)


def self_attention(
    attn: nn.Module,
    sparse_attention: LayerAttention,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    attention_mask: Tensor | None = None,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """What diffusers' `FluxAttnProcessor` does, with `sparse_attention` in the middle.

    Args:
        attn: the layer's `FluxAttention`.
        sparse_attention: the method's attention.
        hidden_states: the image's [B, Li, C] in a dual stream block; [B, Lt + Li, C] in a single stream block.
        encoder_hidden_states: the text's [B, Lt, C] in a dual stream block; None in a single stream block.
        attention_mask: must be None.
        image_rotary_emb: cosines and sines, [Lt + Li, D] each.

    Returns:
        Dual stream: the image's [B, Li, C] and the text's [B, Lt, C]. Single stream: [B, Lt + Li, C].

    Raises:
        ValueError: a mask came.
    """
    from diffusers.models.embeddings import apply_rotary_emb
    from diffusers.models.transformers.transformer_flux import _get_qkv_projections

    check_absent(attention_mask=attention_mask)
    single = encoder_hidden_states is None
    if single:
        text = hidden_states.shape[1] - sparse_attention.video_tokens
        image_states = hidden_states[:, text:]
    else:
        text, image_states = encoder_hidden_states.shape[1], hidden_states

    projected = _get_qkv_projections(attn, hidden_states, encoder_hidden_states)
    query, key, value = (x.unflatten(-1, (-1, attn.head_dim)) for x in projected[:3])
    query, key = attn.norm_q(query), attn.norm_k(key)
    if not single:
        text_query, text_key, text_value = (x.unflatten(-1, (-1, attn.head_dim)) for x in projected[3:])
        query = torch.cat((attn.norm_added_q(text_query), query), 1)
        key = torch.cat((attn.norm_added_k(text_key), key), 1)
        value = torch.cat((text_value, value), 1)
    if image_rotary_emb is not None:
        query, key = (apply_rotary_emb(x, image_rotary_emb, sequence_dim=1) for x in (query, key))

    output, text_output = joint_attention(sparse_attention, query, key, value, image_states, before=text)
    if single:
        return torch.cat((text_output, output), 1)
    return attn.to_out[1](attn.to_out[0](output)), attn.to_add_out(text_output)
