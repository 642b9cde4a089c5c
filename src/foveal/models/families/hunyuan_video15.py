"""HunyuanVideo 1.5 (`HunyuanVideo15Transformer3DModel` of diffusers): joint attention over video and then text.

All blocks are "dual stream": text has its own projections. "Text" here means the tokens of the image condition and of
both text encoders, which the model sorts so that each sample's valid tokens come first.

Shape legend: B batch, Lv and Lt tokens of video and text, C hidden width, D head dimension.
"""

from __future__ import annotations

from torch import Tensor, nn

from foveal.models.families.hunyuan_video import read_grid, video_and_text_attention
from foveal.models.readers import layers_of_blocks
from foveal.models.self_attention import LayerAttention, dimensions

__all__ = ["dimensions", "read_grid", "self_attention", "self_attention_layers"]


def self_attention_layers(transformer: nn.Module) -> dict[str, nn.Module]:
    """The joint attention modules by qualified name."""
    return layers_of_blocks(transformer, ("transformer_blocks",), "attn")


def self_attention(
    attn: nn.Module,
    sparse_attention: LayerAttention,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    attention_mask: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """What diffusers' `HunyuanVideo15AttnProcessor2_0` does, with `sparse_attention` in the middle.

    There is one difference, which no video token sees: a padding text token attends to the valid ones here, but to
    nothing in diffusers.

    Args:
        attn: the layer's `Attention`.
        sparse_attention: the method's attention.
        hidden_states: [B, Lv, C], the video's.
        encoder_hidden_states: [B, Lt, C], the text's.
        attention_mask: [B, Lt], nonzero for the valid text tokens, which come first.
        image_rotary_emb: cosines and sines, [Lv, D] each, only for the video.

    Returns:
        The video's [B, Lv, C] and the text's [B, Lt, C].

    Raises:
        ValueError: the mask has another shape.
    """
    expected = tuple(encoder_hidden_states.shape[:2])
    if attention_mask.shape != expected:
        raise ValueError(f"attention_mask must have shape {expected}, got {tuple(attention_mask.shape)}")
    kv_lengths = hidden_states.shape[1] + attention_mask.bool().sum(1)
    return video_and_text_attention(
        attn, sparse_attention, hidden_states, encoder_hidden_states, kv_lengths, image_rotary_emb
    )
