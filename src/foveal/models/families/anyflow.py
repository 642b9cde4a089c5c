"""AnyFlow (`AnyFlowTransformer3DModel` of diffusers), Wan's blocks for flow maps. Text goes through cross-attention.

The causal variant, `AnyFlowFARTransformer3DModel`, has attention of another kind and is not of this family.

Shape legend: B batch, L tokens, C hidden width, H heads, D head dimension.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from foveal.layout import VideoGrid
from foveal.models.families.wan import self_attention_layers
from foveal.models.readers import grid_of_latent
from foveal.models.self_attention import LayerAttention, check_absent, dimensions

__all__ = ["dimensions", "read_grid", "self_attention", "self_attention_layers"]


def read_grid(transformer: nn.Module, arguments: dict[str, Any]) -> VideoGrid:
    """The token grid of the latent [B, frames, channels, height, width]."""
    frames, _, height, width = arguments["hidden_states"].shape[1:]
    return grid_of_latent(transformer, (frames, height, width))


def self_attention(
    attn: nn.Module,
    sparse_attention: LayerAttention,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    attention_mask: Tensor | None = None,
    rotary_emb: dict[str, Tensor] | None = None,
) -> Tensor:
    """What diffusers' `AnyFlowAttnProcessor` does for self-attention, with `sparse_attention` in the middle.

    Args:
        attn: the layer's `AnyFlowAttention`.
        sparse_attention: the method's attention.
        hidden_states: [B, L, C].
        encoder_hidden_states, attention_mask: must be None.
        rotary_emb: complex numbers for "query" and "key".

    Raises:
        ValueError: encoder states or a mask came, which self-attention in AnyFlow never gets.
    """
    from diffusers.models.transformers.transformer_anyflow import apply_rotary_emb

    check_absent(encoder_hidden_states=encoder_hidden_states, attention_mask=attention_mask)
    query, key = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(hidden_states))
    heads = (x.unflatten(2, (attn.heads, -1)).transpose(1, 2) for x in (query, key, attn.to_v(hidden_states)))
    query, key, value = heads
    if rotary_emb is not None:
        query, key = apply_rotary_emb(query, rotary_emb["query"]), apply_rotary_emb(key, rotary_emb["key"])
    output = sparse_attention(query, key, value, hidden_states).transpose(1, 2).flatten(2)
    for layer in attn.to_out:
        output = layer(output)
    return output
