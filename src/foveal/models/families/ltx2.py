"""LTX-2, 2.3, and 2.5 (`LTX2VideoTransformer3DModel` of diffusers): the video's self-attention.

The audio's self-attention and all cross-attention between video, audio, and text stay as they are. Some pipelines
append the tokens of conditioning frames, keyframes, or references to those of the video: every token sees them, and
they see every token.

Shape legend: B batch, L tokens, C hidden width, H heads, D head dimension.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from foveal.layout import VideoGrid
from foveal.models.families.ltx_video import self_attention_layers
from foveal.models.readers import patch_size
from foveal.models.self_attention import LayerAttention, check_absent, dimensions, grid_of_coordinates, joint_attention
from foveal.models.training import Streams, Training, to_tokens, to_video

__all__ = ["TRAINING", "dimensions", "read_grid", "self_attention", "self_attention_layers"]


def read_grid(transformer: nn.Module, arguments: dict[str, Any]) -> VideoGrid:
    """The grid of the video's tokens, the first of [B, L, channels], from the sides or coordinates given with them.

    Each frame of the video begins where the one before it ends. What is appended to the video does not.

    Raises:
        ValueError: the tokens do not begin with one grid.
    """
    length = arguments["hidden_states"].shape[1]
    sides = tuple(arguments.get(name) for name in ("num_frames", "height", "width"))
    if None not in sides:
        patches = patch_size(transformer.config)
        grid = VideoGrid(*(-(-side // patch) for side, patch in zip(sides, patches, strict=True)))
        if grid.num_tokens <= length:
            return grid
    if arguments.get("video_coords") is not None:
        # [B, 3, L, 2]: where each token begins and ends.
        coordinates = arguments["video_coords"][0].cpu()
        times = coordinates[0]
        same = (times[1:] == times[:-1]).all(-1)
        goes_on = same | (times[1:, 0] >= times[:-1, 1])
        video = 1 + int(goes_on.long().cumprod(0).sum())
        return grid_of_coordinates("video_coords", coordinates[:, :video, 0])
    raise ValueError(f"num_frames, height and width must be the sides of the {length} tokens, got {sides}")


def self_attention(
    attn: nn.Module,
    sparse_attention: LayerAttention,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    attention_mask: Tensor | None = None,
    query_rotary_emb: tuple[Tensor, Tensor] | None = None,
    key_rotary_emb: tuple[Tensor, Tensor] | None = None,
    perturbation_mask: Tensor | None = None,
    all_perturbed: bool | None = None,
) -> Tensor:
    """What diffusers' `LTX2AudioVideoAttnProcessor` and `LTX2PerturbedAttnProcessor` do for self-attention.

    Args:
        attn: the layer's `LTX2Attention`.
        sparse_attention: the method's attention.
        hidden_states: [B, L, C].
        encoder_hidden_states, attention_mask: must be None.
        query_rotary_emb, key_rotary_emb: cosines and sines; without key_rotary_emb the query's serve both.
        perturbation_mask: [B, 1, 1], 0 for samples that skip attention and keep their values, 1 for others.
        all_perturbed: whether all samples skip attention; None finds out.

    Returns:
        [B, L, C].

    Raises:
        ValueError: encoder states or a mask came.
    """
    from diffusers.models.transformers.transformer_ltx2 import apply_interleaved_rotary_emb, apply_split_rotary_emb

    check_absent(encoder_hidden_states=encoder_hidden_states, attention_mask=attention_mask)
    value = attn.to_v(hidden_states)
    if all_perturbed is None:
        all_perturbed = perturbation_mask is not None and bool(torch.all(perturbation_mask == 0))
    if all_perturbed:
        output = value
    else:
        query, key = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(hidden_states))
        if query_rotary_emb is not None:
            rotate = {"interleaved": apply_interleaved_rotary_emb, "split": apply_split_rotary_emb}[attn.rope_type]
            query = rotate(query, query_rotary_emb)
            key = rotate(key, query_rotary_emb if key_rotary_emb is None else key_rotary_emb)
        heads = (x.unflatten(2, (attn.heads, -1)) for x in (query, key, value))
        video = sparse_attention.grid.num_tokens
        if hidden_states.shape[1] == video:
            output = sparse_attention(*(x.transpose(1, 2) for x in heads), hidden_states).transpose(1, 2).flatten(2)
        else:
            output = torch.cat(joint_attention(sparse_attention, *heads, hidden_states[:, :video]), 1)
        if perturbation_mask is not None:
            output = torch.lerp(value, output, perturbation_mask)
    if attn.to_gate_logits is not None:
        gates = 2.0 * torch.sigmoid(attn.to_gate_logits(hidden_states))
        output = (output.unflatten(2, (attn.heads, -1)) * gates.unsqueeze(-1)).flatten(2)
    return attn.to_out[1](attn.to_out[0](output))


def _arguments(transformer: nn.Module, noisy: Streams, sigmas: Streams, text: Mapping[str, Tensor]) -> dict[str, Any]:
    """The sound is [B, channels, length, mel bins]. The text is what the pipeline's connectors make of it."""
    video, sound = noisy
    frames, height, width = video.shape[2:]
    timesteps, sound_timesteps = (levels * transformer.config.timestep_scale_multiplier for levels in sigmas)
    return {
        "hidden_states": to_tokens(video, patch_size(transformer.config)),
        "audio_hidden_states": sound.transpose(1, 2).flatten(2),
        "encoder_hidden_states": text["prompt_embeds"].to(video.dtype),
        "audio_encoder_hidden_states": text["audio_prompt_embeds"].to(video.dtype),
        "encoder_attention_mask": text["prompt_attention_mask"],
        "audio_encoder_attention_mask": text["prompt_attention_mask"],
        "timestep": timesteps,
        "audio_timestep": sound_timesteps,
        "sigma": timesteps,
        "audio_sigma": sound_timesteps,
        "num_frames": frames,
        "height": height,
        "width": width,
        "audio_num_frames": sound.shape[2],
        "use_cross_timestep": True,
    }


def _velocities(transformer: nn.Module, outputs: Any, noisy: Streams) -> Streams:
    video, sound = noisy
    sound_velocity = outputs[1].unflatten(2, (sound.shape[1], sound.shape[3])).transpose(1, 2)
    return to_video(outputs[0], patch_size(transformer.config), video.shape), sound_velocity


def _text_width(config: Mapping[str, Any]) -> int:
    return config["caption_channels"] if config.get("use_prompt_embeddings", True) else config["cross_attention_dim"]


TRAINING = Training(
    arguments=_arguments,
    velocities=_velocities,
    text_width=_text_width,
    lora_loader="LTX2Pipeline",
    has_sound=True,
    # The weights of the sound, and those that project what comes from the text or from the sound.
    not_per_token=(
        "audio_attn",
        "audio_ff.",
        "attn2.to_k.",
        "attn2.to_v.",
        "audio_to_video_attn.to_k.",
        "audio_to_video_attn.to_v.",
        "video_to_audio_attn.to_q.",
        "video_to_audio_attn.to_out.",
        "scale_shift_table",
    ),
)
