"""Wan 2.1 and 2.2, VACE, Animate, and other models of its blocks: where their self-attention is, and how it runs.

The transformers of diffusers are `WanTransformer3DModel` (text or image to video, also with a timestep per token),
`WanVACETransformer3DModel`, `WanAnimateTransformer3DModel`, `SkyReelsV2Transformer3DModel`, and
`ChronoEditTransformer3DModel`. Text goes through cross-attention.

Shape legend: B batch, L tokens, C hidden width, H heads, D head dimension.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from foveal.layout import VideoGrid
from foveal.models.readers import grid_of_latent, layers_of_blocks
from foveal.models.self_attention import LayerAttention, check_absent, dimensions
from foveal.models.training import Streams, Training

__all__ = ["TRAINING", "dimensions", "read_grid", "self_attention", "self_attention_layers"]


def self_attention_layers(transformer: nn.Module) -> dict[str, nn.Module]:
    """The self-attention modules by qualified name; `attn2` is cross-attention and stays as it is.

    VACE's control blocks come after the others, whose indices are then those of a Wan without control blocks.
    """
    return layers_of_blocks(transformer, ("blocks", "vace_blocks"), "attn1")


def read_grid(transformer: nn.Module, arguments: dict[str, Any]) -> VideoGrid:
    """The token grid of the latent [B, channels, frames, height, width]."""
    return grid_of_latent(transformer, arguments["hidden_states"].shape[2:])


def self_attention(
    attn: nn.Module,
    sparse_attention: LayerAttention,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    attention_mask: Tensor | None = None,
    rotary_emb: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """What diffusers' `WanAttnProcessor` does for self-attention, with `sparse_attention` in the middle.

    Args:
        attn: the layer's `WanAttention`.
        sparse_attention: the method's attention.
        hidden_states: [B, L, C].
        encoder_hidden_states, attention_mask: must be None.
        rotary_emb: cosines and sines, [1, L, 1, D] each.

    Raises:
        ValueError: encoder states came, which self-attention never gets, or a mask, as in SkyReels-V2 where its frames
            are causal by blocks.
    """
    check_absent(encoder_hidden_states=encoder_hidden_states, attention_mask=attention_mask)
    fused = {}
    if attn.fused_projections:
        fused = dict(zip(("to_q", "to_k", "to_v"), attn.to_qkv(hidden_states).chunk(3, dim=-1), strict=True))

    def send(layer: str, norm: nn.Module | None = None, rotary: tuple[Tensor, Tensor] | None = None) -> Tensor:
        x = fused[layer] if fused else getattr(attn, layer)(hidden_states)
        if norm is not None:
            x = norm(x)
        x = x.unflatten(-1, (attn.heads, -1))
        if rotary is not None:
            x = rotate(x, *rotary)
        return sparse_attention.send(x.transpose(1, 2))

    key_rotary = rotary_emb
    if sparse_attention.shards is not None and rotary_emb is not None:
        # Inductor would fuse query and key to read the tables once, and the query would have to wait for the key.
        key_rotary = tuple(map(_from_firsts, rotary_emb))
    # Under context parallelism each one travels while the next is computed.
    value, query = send("to_v"), send("to_q", attn.norm_q, rotary_emb)
    key = send("to_k", attn.norm_k, key_rotary)
    output = sparse_attention.sent(query, key, value, hidden_states).transpose(1, 2).flatten(2)
    for layer in attn.to_out:
        output = layer(output)
    return output


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of neighboring pairs of [B, L, H, D]; the tables hold each angle twice.

    It turns (a, b) into (a cos - b sin, b cos + a sin). It is written for all of x at once instead of for two halves
    that are then stacked, so that Inductor fuses it with the norm before it.
    """
    exchanged = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    sign = torch.arange(x.shape[-1], device=x.device) % 2 * 2 - 1
    rotated = x * cos
    if torch.compiler.is_compiling():  # selective checkpoints do not allow in-place operations
        return rotated.addcmul(exchanged, sin * sign).type_as(x)
    # In place to save memory: float32 is twice the size.
    return rotated.addcmul_(exchanged, sin * sign).type_as(x)


def _from_firsts(table: Tensor) -> Tensor:
    """A table that holds each angle twice, rebuilt from the first of each pair."""
    pairs = table.unflatten(-1, (-1, 2))
    return pairs[..., :1].expand_as(pairs).flatten(-2)


def _arguments(transformer: nn.Module, noisy: Streams, sigmas: Streams, text: Mapping[str, Tensor]) -> dict[str, Any]:
    (video,), (levels,) = noisy, sigmas
    embeds = text.get("prompt_embeds")
    if embeds is None:  # as in pixel space; the model takes one token at least
        embeds = video.new_zeros(len(video), 1, transformer.config.text_dim)
    timesteps = levels * 1000
    if levels.dim() == 2:
        grid = grid_of_latent(transformer, video.shape[2:])
        timesteps = timesteps.repeat_interleave(grid.height * grid.width, 1)
    return {"hidden_states": video, "timestep": timesteps, "encoder_hidden_states": embeds.to(video.dtype)}


TRAINING = Training(
    arguments=_arguments,
    velocities=lambda transformer, outputs, noisy: (outputs[0],),
    text_width=lambda config: config["text_dim"],
    lora_loader="WanPipeline",
    conditioned=lambda config: config.get("image_dim") is not None,
    frame_levels=True,
    # Keys and values of cross-attention come from the text.
    not_per_token=("attn2.to_k.", "attn2.to_v."),
)
