"""MiniMax-H3 (`MiniMaxH3Transformer3DModel` of diffusers): joint attention over one packed sequence.

A request is one sequence of rows: text, the frames of conditions or references, audio, and at the end the video that
is made. The rows before that video are protected segments of a `TokenLayout`: every query sees them, and their queries
see everything. VSA's coarse stage and its gates take them in, as the public sparse checkpoints were trained. The token
refiner's blocks attend to text only and stay dense, though their attention is of the same class.

The batch repeats one layout. The heads together are wider (7,168) than the hidden states (5,376).

Shape legend: B batch, N rows of the sequence, C hidden width, H heads, D head dimension.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from foveal.checks import cached_constant
from foveal.layout import TokenLayout
from foveal.models.readers import layers_of_blocks, patch_size
from foveal.models.self_attention import LayerAttention, check_absent, dimensions, grid_of_coordinates
from foveal.models.training import Streams, Training, to_tokens, to_video

__all__ = ["TRAINING", "dimensions", "read_grid", "self_attention", "self_attention_layers"]


class _Read(NamedTuple):
    """What was read of a request: its layout, from these versions of its positions and of the indices of its video."""

    version: tuple[int, int]
    video_indices: weakref.ref
    layout: TokenLayout


# By the request's `position_ids`, which every step of it passes again.
_REQUESTS: WeakIdKeyDictionary = WeakIdKeyDictionary()


def self_attention_layers(transformer: nn.Module) -> dict[str, nn.Module]:
    """The attention modules of the blocks by qualified name, without those of `token_refiner`."""
    return layers_of_blocks(transformer, ("transformer_blocks",), "attn")


def read_grid(transformer: nn.Module, arguments: dict[str, Any]) -> TokenLayout:
    """The layout: the video that is made, which is the rows at the end with one timestep, and what stands before it.

    Its segments are the runs of text, of condition or reference frames, and of audio. The grid comes from the video's
    `position_ids` [N, 3]. Reading all that makes the host wait for the device, once per request.

    Raises:
        ValueError: the sequence does not end with the rows of one video in raster order.
    """
    positions, video_indices = arguments["position_ids"], arguments["video_indices"]
    # Tensors made in inference mode have no version, and nothing but inference changes them.
    version = tuple(0 if x.is_inference() else x._version for x in (positions, video_indices))
    known = _REQUESTS.get(positions)
    if known is not None and known.version == version and known.video_indices() is video_indices:
        return known.layout
    length = positions.shape[0]
    # Condition frames stand directly before the video if there is no audio; they have a timestep of their own.
    rows, timesteps = video_indices.cpu(), arguments["timestep_indices"].cpu()
    made = torch.zeros(length, dtype=torch.bool)
    made[rows] = timesteps[rows] == timesteps[-1]
    first = length - int(made.flip(0).long().cumprod(0).sum())
    if first == length:
        raise ValueError(
            "video_indices must hold the last row of the sequence: the video that is made comes last, after text, "
            f"conditions, and audio; got {length} rows"
        )
    kinds = torch.zeros(length, dtype=torch.int8)
    kinds[rows], kinds[arguments["audio_indices"].cpu()] = 1, 2
    _, segments = torch.unique_consecutive(kinds[:first], return_counts=True)
    grid = grid_of_coordinates("position_ids", positions[first:].T)
    layout = TokenLayout(grid, before=tuple(segments.tolist()))
    _REQUESTS[positions] = _Read(version, weakref.ref(video_indices), layout)
    return layout


def self_attention(
    attn: nn.Module,
    sparse_attention: LayerAttention,
    hidden_states: Tensor,
    rotary_emb: tuple[Tensor, Tensor] | None = None,
    attention_mask: Tensor | None = None,
) -> Tensor:
    """What diffusers' `MiniMaxH3AttnProcessor` does, with `sparse_attention` in the middle.

    Args:
        attn: the layer's `MiniMaxH3Attention`.
        sparse_attention: the method's attention.
        hidden_states: [B, N, C], the video last.
        rotary_emb: cosines and sines, [N, rotated dimensions] each.
        attention_mask: must be None.

    Raises:
        ValueError: a mask came, which the model never passes.
    """
    from diffusers.models.transformers.transformer_minimax_h3 import _apply_rotary_emb

    check_absent(attention_mask=attention_mask)
    if attn.fused_projections:
        query, key, value = attn.to_qkv(hidden_states).chunk(3, dim=-1)
    else:
        query, key, value = (layer(hidden_states) for layer in (attn.to_q, attn.to_k, attn.to_v))
    query, key, value = (x.unflatten(-1, (attn.heads, -1)) for x in (query, key, value))
    query, key = attn.norm_q(query), attn.norm_k(key)
    if rotary_emb is not None:
        query, key = (_apply_rotary_emb(x, *rotary_emb) for x in (query, key))
    output = sparse_attention(*(x.transpose(1, 2) for x in (query, key, value)), hidden_states)
    output = output.transpose(1, 2).flatten(2)
    for layer in attn.to_out:
        output = layer(output)
    return output


@cached_constant
def _structure(
    words: int, latent: tuple[int, ...], sound: int, patch: tuple[int, int, int], device: torch.device
) -> dict[str, Tensor]:
    """What the forward is told of a sequence of so many rows of text, of sound, and of a latent with these sides.

    The same tensors each time, so that the layout is read once (`read_grid`).
    """
    from diffusers.modular_pipelines.minimax_h3 import modular_pipeline as facts
    from diffusers.modular_pipelines.minimax_h3.before_denoise import MiniMaxH3PrepareLayoutStep

    tags = torch.full((words,), facts.MINIMAX_H3_TEXT_TAG)
    kinds = facts.MINIMAX_H3_AUDIO_CHANNELS, facts.MINIMAX_H3_AUDIO_TAG, facts.MINIMAX_H3_VIDEO_TAG
    packed = MiniMaxH3PrepareLayoutStep.build_packed_sequence(tags, *latent, sound, patch, *kinds)
    names = ("position_ids", "token_tags", "video_indices", "audio_indices", "text_indices")
    structure = dict(zip(names, packed, strict=False))
    # The text has the timestep of the video.
    structure["timestep_indices"] = (structure["token_tags"] == facts.MINIMAX_H3_AUDIO_TAG).long()
    return {name: tensor.to(device) for name, tensor in structure.items()}


def _arguments(transformer: nn.Module, noisy: Streams, sigmas: Streams, text: Mapping[str, Tensor]) -> dict[str, Any]:
    """The sound is [1, 2, channels, length], one entry for each ear."""
    video, sound = noisy
    patch = patch_size(transformer.config)
    # The sequence has no padding. The count makes the host wait for the device, once a forward.
    words = int(text["prompt_attention_mask"].sum())
    return {
        "hidden_states": to_tokens(video, patch),
        "audio_hidden_states": sound.transpose(2, 3).flatten(1, 2),
        "encoder_hidden_states": text["prompt_embeds"][:, :words].to(video.dtype),
        # Its time runs from 0, noise, to 1.
        "timestep": 1 - torch.cat(sigmas),
        **_structure(words, tuple(video.shape[2:]), sound.shape[3], patch, video.device),
    }


def _velocities(transformer: nn.Module, outputs: Any, noisy: Streams) -> Streams:
    """The transformer's point from noise to data."""
    video, sound = noisy
    sound_velocity = outputs[1].unflatten(1, (sound.shape[1], sound.shape[3])).transpose(2, 3)
    return -to_video(outputs[0], patch_size(transformer.config), video.shape), -sound_velocity


TRAINING = Training(
    arguments=_arguments,
    velocities=_velocities,
    text_width=lambda config: config["text_dim"],
    lora_loader="MiniMaxH3ModularPipeline",
    has_sound=True,
    one_sample=True,
    not_per_token=("adaln_proj.",),
)
