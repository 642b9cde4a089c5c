"""What LTX-2's pipeline does between its parts: text through connectors, and sound through spectrograms.

Shape legend: B batch, L text tokens, C width of the text embeddings, N latents of sound, M mel bins of a latent.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Samples of a window of the spectrogram, as the model's authors have it; the pipeline has no encoder of sound.
WINDOW = 1024
# The least magnitude, of which the logarithm is taken.
FLOOR = 1e-5


def connect(pipe: Any, encoded: tuple[Tensor | None, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """What the connectors make of the text encoder's states.

    Args:
        pipe: an `LTX2Pipeline`.
        encoded: what its `encode_prompt` returns.

    Returns:
        (text for the video [B, L, C], text for the sound, which tokens are text [B, L]).
    """
    states, mask = encoded[:2]
    return pipe.connectors(states, mask, padding_side=getattr(pipe.tokenizer, "padding_side", "left"))


def samples_of_a_latent(pipe: Any) -> int:
    """How many samples of sound, at `pipe.audio_sampling_rate`, a latent stands for."""
    return pipe.audio_hop_length * pipe.audio_vae_temporal_compression_ratio


def encode_sound(pipe: Any, sound: Tensor) -> Tensor:
    """The latents [channels, N, M] of sound, float32 [2, samples] of N whole latents.

    The VAE is causal, and its first latent stands for one column of the spectrogram only; what it would make of the
    columns after the last latent's is left out.
    """
    vae = pipe.audio_vae
    count = sound.shape[1] // samples_of_a_latent(pipe)
    columns = (count - 1) * pipe.audio_vae_temporal_compression_ratio + 1
    mel = log_mel(sound.to(vae.device), pipe.audio_sampling_rate, pipe.audio_hop_length, vae.config.mel_bins)
    latents = vae.encode(mel[None, :, :columns].to(vae.dtype)).latent_dist.mode()
    # The statistics are those of a latent with all its channels and bins.
    rows = (latents.transpose(1, 2).flatten(2) - vae.latents_mean.to(latents)) / vae.latents_std.to(latents)
    return rows.unflatten(2, latents.shape[1::2]).transpose(1, 2)[0]


def log_mel(sound: Tensor, rate: int, hop: int, bins: int) -> Tensor:
    """The logarithm of the mel spectrogram of each channel: float32 [channels, columns, bins], a column every `hop`."""
    from transformers.audio_utils import mel_filter_bank

    filters = mel_filter_bank(WINDOW // 2 + 1, bins, 0.0, rate / 2, rate, norm="slaney", mel_scale="slaney")
    window = torch.hann_window(WINDOW, device=sound.device)
    spectrum = torch.stft(sound.float(), WINDOW, hop, window=window, return_complex=True)
    return (spectrum.abs().mT @ torch.from_numpy(filters).to(spectrum.abs())).clamp(min=FLOOR).log()
