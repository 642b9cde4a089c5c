"""HunyuanVideo 1.0 and FramePack: joint attention over video and then text.

The transformers of diffusers are `HunyuanVideoTransformer3DModel` and `HunyuanVideoFramepackTransformer3DModel`. They
have two kinds of blocks. In the first ("dual stream") text has its own projections. In the second ("single stream") it
shares the video's. A mask marks each sample's text, whose valid tokens come first.

FramePack's video comes after a history: past frames in fewer and fewer tokens. They are treated like text: every query
sees them, and their queries see everything.

Shape legend: B batch, N tokens in total, Lv of the video with the history before it, Lt of the text, C hidden width,
D head dimension.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from foveal.layout import VideoGrid
from foveal.models.readers import grid_of_latent, layers_of_blocks
from foveal.models.self_attention import LayerAttention, dimensions, joint_attention
from foveal.models.training import Streams, Training

__all__ = ["TRAINING", "dimensions", "read_grid", "self_attention", "self_attention_layers"]

# What its pipeline gives a guidance-distilled model by default, times 1000.
GUIDANCE = 6000.0


def self_attention_layers(transformer: nn.Module) -> dict[str, nn.Module]:
    """The joint attention modules by qualified name, in the order in which they run, dual stream first."""
    return layers_of_blocks(transformer, ("transformer_blocks", "single_transformer_blocks"), "attn")


def read_grid(transformer: nn.Module, arguments: dict[str, Any]) -> VideoGrid:
    """The token grid of the latent [B, channels, frames, height, width]."""
    return grid_of_latent(transformer, arguments["hidden_states"].shape[2:])


def self_attention(
    attn: nn.Module,
    sparse_attention: LayerAttention,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """What diffusers' `HunyuanVideoAttnProcessor2_0` does, with `sparse_attention` in the middle.

    Args:
        attn: the layer's `Attention`.
        sparse_attention: the method's attention.
        hidden_states: [B, Lv, C], the video's.
        encoder_hidden_states: [B, Lt, C], the text's.
        attention_mask: bool [B, 1, 1, N], True for the valid keys, which come first.
        image_rotary_emb: cosines and sines, [Lv, D] each, only for the video.

    Returns:
        The video's [B, Lv, C] and the text's [B, Lt, C].

    Raises:
        ValueError: the mask has another shape.
    """
    kv_lengths = None
    if attention_mask is not None:
        expected = (hidden_states.shape[0], 1, 1, hidden_states.shape[1] + encoder_hidden_states.shape[1])
        if attention_mask.shape != expected:
            raise ValueError(f"attention_mask must have shape {expected}, got {tuple(attention_mask.shape)}")
        kv_lengths = attention_mask.flatten(1).sum(1)
    return video_and_text_attention(
        attn, sparse_attention, hidden_states, encoder_hidden_states, kv_lengths, image_rotary_emb
    )


def video_and_text_attention(
    attn: nn.Module,
    sparse_attention: LayerAttention,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    kv_lengths: Tensor | None,
    image_rotary_emb: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor]:
    """Projections, norms, rotary embedding, attention, and output projections of a dual or single stream layer.

    Args:
        kv_lengths: int [B], valid tokens of each sample, video and text; None when all are.
        attn, sparse_attention, hidden_states, encoder_hidden_states, image_rotary_emb: as in `self_attention`.

    Returns:
        The video's [B, Lv, C] and the text's [B, Lt, C].
    """
    from diffusers.models.embeddings import apply_rotary_emb

    def rotate(x: Tensor) -> Tensor:
        return x if image_rotary_emb is None else apply_rotary_emb(x, image_rotary_emb, sequence_dim=1)

    def project(x: Tensor, names: tuple[str, str, str], norms: tuple[str, str]) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = (getattr(attn, name)(x).unflatten(2, (attn.heads, -1)) for name in names)
        norm_query, norm_key = (getattr(attn, name) for name in norms)
        query = query if norm_query is None else norm_query(query)
        return query, key if norm_key is None else norm_key(key), value

    names, norms = ("to_q", "to_k", "to_v"), ("norm_q", "norm_k")
    if attn.add_q_proj is None:
        query, key, value = project(torch.cat((hidden_states, encoder_hidden_states), 1), names, norms)
        video = hidden_states.shape[1]
        query, key = (torch.cat((rotate(x[:, :video]), x[:, video:]), 1) for x in (query, key))
    else:
        query, key, value = project(hidden_states, names, norms)
        names, norms = ("add_q_proj", "add_k_proj", "add_v_proj"), ("norm_added_q", "norm_added_k")
        text = project(encoder_hidden_states, names, norms)
        query, key, value = (torch.cat(x, 1) for x in zip((rotate(query), rotate(key), value), text, strict=True))

    history = hidden_states.shape[1] - sparse_attention.grid.num_tokens
    output, text_output = joint_attention(
        sparse_attention, query, key, value, hidden_states[:, history:], kv_lengths, before=history
    )
    if history:
        output, text_output = torch.cat((text_output[:, :history], output), 1), text_output[:, history:]
    for layer in getattr(attn, "to_out", None) or ():
        output = layer(output)
    if getattr(attn, "to_add_out", None) is not None:
        text_output = attn.to_add_out(text_output)
    return output, text_output


def _arguments(transformer: nn.Module, noisy: Streams, sigmas: Streams, text: Mapping[str, Tensor]) -> dict[str, Any]:
    (video,), (levels,) = noisy, sigmas
    arguments = {
        "hidden_states": video,
        "timestep": levels * 1000,
        "encoder_hidden_states": text["prompt_embeds"].to(video.dtype),
        "encoder_attention_mask": text["prompt_attention_mask"],
        "pooled_projections": text["pooled_prompt_embeds"].to(video.dtype),
    }
    if transformer.config.guidance_embeds:
        arguments["guidance"] = torch.full_like(levels, GUIDANCE)
    return arguments


TRAINING = Training(
    arguments=_arguments,
    velocities=lambda transformer, outputs, noisy: (outputs[0],),
    text_width=lambda config: config["text_embed_dim"],
    lora_loader="HunyuanVideoPipeline",
    conditioned=lambda config: config.get("image_condition_type") is not None,
    # The text's own weights, and modulation, which is computed once a sample.
    not_per_token=("_context.", "attn.add_", "attn.to_add_out.", "norm.linear.", "norm1.linear."),
)
