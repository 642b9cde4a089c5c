"""How a pipeline encodes videos, sound, and captions, and what tells one latent space from another.

Shape legend: B batch, F frames, H x W pixels, C latent channels, L text tokens.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from foveal.lab.pipelines import LoadedPipeline, PipelineKind

# Fields of a VAE's configuration that tell one latent space from another.
VAE_FIELDS = ("z_dim", "latent_channels", "latents_mean", "latents_std", "scaling_factor", "shift_factor")


@torch.no_grad()
def encode_text(loaded: LoadedPipeline, captions: list[str]) -> dict[str, Tensor]:
    """Encode captions with the pipeline's text encoders, by argument name: "prompt_embeds" [B, L, C] and so on.

    Text is padded as for generation, because the default length of `encode_prompt` can differ from the call's.
    """
    pipe = loaded.pipe
    accepted = inspect.signature(pipe.encode_prompt).parameters
    length = inspect.signature(pipe.__call__).parameters.get("max_sequence_length")
    options = {
        "do_classifier_free_guidance": False,
        "device": loaded.device,
        "max_sequence_length": None if length is None else length.default,
    }
    options = {name: value for name, value in options.items() if name in accepted and value is not None}
    encoded = pipe.encode_prompt(captions, **options)
    if loaded.kind.connect is not None:
        encoded = loaded.kind.connect(pipe, encoded)
    named = dict(zip(loaded.kind.text, encoded, strict=True))
    return {name: tensor for name, tensor in named.items() if name is not None}


@torch.no_grad()
def encode_video(loaded: LoadedPipeline, videos: Tensor) -> Tensor:
    """Encode videos [B, 3, F, H, W] in [-1, 1] into the latents [B, C, F', H', W'] that the transformer trains on.

    The latents are the mode of the VAE's posterior, normalized with the VAE's statistics. An image has F = F' = 1.
    """
    vae = loaded.pipe.vae
    if loaded.kind.pixels is not None:
        mean, std = (torch.tensor(values).view(1, -1, 1, 1, 1) for values in loaded.kind.pixels)
        videos = ((videos.cpu() + 1) / 2 - mean) / std
    videos = videos.to(loaded.device, vae.dtype)
    if loaded.kind.is_image:
        latents = vae.encode(videos.squeeze(2)).latent_dist.mode().unsqueeze(2)
    else:
        latents = vae.encode(videos).latent_dist.mode()
    return normalize_latents(vae, latents)


@torch.no_grad()
def decode_video(vae: nn.Module, latents: Tensor, kind: PipelineKind) -> Tensor:
    """The inverse of `encode_video`: videos [B, 3, F, H, W], about in [-1, 1], of latents of a `kind` of pipeline."""
    latents = denormalize_latents(vae, latents)
    more = {}
    if getattr(vae.config, "timestep_conditioning", False):
        more["temb"] = torch.zeros(len(latents), device=latents.device, dtype=latents.dtype)
    videos = vae.decode(latents, **more, return_dict=False)[0]
    if kind.pixels is not None:
        mean, std = (torch.tensor(values).to(videos).view(1, -1, 1, 1, 1) for values in kind.pixels)
        videos = (videos * std + mean) * 2 - 1
    return videos


@torch.no_grad()
def encode_sound(loaded: LoadedPipeline, sound: Tensor) -> Tensor:
    """Encode sound [2, samples] at the pipeline's rate into the latents that the transformer trains on."""
    return loaded.kind.sound.encode(loaded.pipe, sound)


def normalize_latents(vae: nn.Module, latents: Tensor) -> Tensor:
    """(z - mean) / std * scaling_factor, or (z - shift_factor) * scaling_factor, by what the VAE has.

    The inverse of what the pipelines of the table do before they decode.

    Raises:
        ValueError: for a VAE with neither.
    """
    shift, factor = _normalization(vae, latents)
    return (latents - shift) * factor


def denormalize_latents(vae: nn.Module, latents: Tensor) -> Tensor:
    """The inverse of `normalize_latents`, which raises the same."""
    shift, factor = _normalization(vae, latents)
    return latents / factor + shift


def _normalization(vae: nn.Module, latents: Tensor) -> tuple[Tensor | float, Tensor | float]:
    """What is subtracted from latents, and what they are multiplied by afterwards."""
    mean, std = (_statistic(vae, name, latents) for name in ("latents_mean", "latents_std"))
    scale = getattr(vae.config, "scaling_factor", None)
    if mean is None and scale is None:
        raise ValueError(f"{type(vae).__name__} has neither latents_mean and latents_std nor a scaling_factor")
    factor = 1.0 if scale is None else scale
    if mean is None:
        return getattr(vae.config, "shift_factor", None) or 0.0, factor
    return mean, factor / std


def vae_facts(class_name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """What the class and the configuration of a VAE say about its latent space, JSON-ready."""
    known = {name: config[name] for name in VAE_FIELDS if config.get(name) is not None}
    return {"class": class_name, **json.loads(json.dumps(known))}


def different_vae(facts: dict[str, Any], others: dict[str, Any]) -> str | None:
    """The first fact in which two VAEs differ; None if they agree in all facts that both have."""
    return next((name for name in facts if name in others and facts[name] != others[name]), None)


def _statistic(vae: nn.Module, name: str, latents: Tensor) -> Tensor | None:
    """A per-channel statistic, shaped [1, C, 1, 1, 1] like the latents, from LTX's buffer or the configuration."""
    values = dict(vae.named_buffers(recurse=False)).get(name)
    if values is None:
        values = getattr(vae.config, name, None)
    if values is None:
        return None
    return torch.as_tensor(values).to(latents).view(1, -1, 1, 1, 1)
