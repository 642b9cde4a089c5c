"""Videos from a model in training: Euler steps of the flow, and latents made visible."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from foveal.lab.data.windows import to_frames, upscale, write_video
from foveal.lab.hub import hub_options
from foveal.models import dense
from foveal.models.processor import sparse_processors
from foveal.models.shipped import local_path

# Pixels that a sample is at least high: small ones are enlarged to be seen.
MIN_HEIGHT = 192


@torch.no_grad()
def euler_steps(
    velocity: Callable[[Tensor, Tensor], Tensor],
    noise: Tensor,
    *,
    shift: float,
    steps: int,
    on_step: Callable[[], None] | None = None,
) -> Tensor:
    """What the flow carries noise to: [B, C, F, H, W] like `noise`.

    Args:
        velocity: (video [B, C, F, H, W], noise levels [B]) to the flow's velocity.
        noise: standard normal.
        shift: the shift of the noise schedule.
        steps: Euler steps.
        on_step: called after each.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(steps)
    video = noise
    for timestep, sigma in zip(scheduler.timesteps, scheduler.sigmas, strict=False):
        predicted = velocity(video, sigma.to(video).expand(len(video)))
        video = scheduler.step(predicted, timestep, video, return_dict=False)[0]
        if on_step is not None:
            on_step()
    return video


@torch.no_grad()
def visible(latents: Tensor, space: str, *, pipeline: str | None, device: torch.device) -> Tensor:
    """uint8 [frames, 3, height, width] of one sample's latents [C, F, H, W].

    Args:
        latents: the latents, as the transformer sees them.
        space: "pixel", where they are a video in [-1, 1], or "latent".
        pipeline: the folder or hub name of the pipeline whose `vae` decodes latents.
        device: where to decode; the VAE is loaded for it and let go.
    """
    if space == "pixel":
        return to_frames(latents.cpu())
    from diffusers import AutoModel

    place = local_path(pipeline)
    options = hub_options(place)
    vae: nn.Module = AutoModel.from_pretrained(place, subfolder="vae", torch_dtype=torch.float32, **options)
    vae = vae.to(device)
    mean, std = (
        torch.tensor(values, device=device).view(-1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return to_frames(vae.decode((latents.to(device) * std + mean)[None]).sample[0].cpu())


@torch.no_grad()
def dense_and_sparse(
    model: nn.Module, velocity: Callable[[Tensor, Tensor], Tensor], noise: Tensor, *, shift: float, steps: int
) -> list[Tensor]:
    """What a model makes of the same noise with dense and with sparse attention; only with dense if it has no other.

    Args:
        model: the transformer that `velocity` calls.
        velocity, noise, shift, steps: see `euler_steps`.

    Returns:
        Latents [C, F, H, W] of the first sample.
    """
    training = model.training
    model.eval()
    with dense(model):
        latents = [euler_steps(velocity, noise, shift=shift, steps=steps)[0]]
    if sparse_processors(model):
        latents.append(euler_steps(velocity, noise, shift=shift, steps=steps)[0])
    model.train(training)
    return latents


def sample_file(step: int) -> str:
    """The file in a run's output that holds the videos of a step."""
    return f"samples/step-{step:08d}.mp4"


def write_samples(path: Path, videos: list[Tensor], *, fps: int) -> None:
    """Videos, uint8 [frames, 3, height, width], side by side as an MP4, enlarged if they are small."""
    frames = torch.cat(videos, dim=3)
    frames = upscale(frames, max(1, MIN_HEIGHT // frames.shape[2]))
    write_video(path, frames[..., : frames.shape[2] // 2 * 2, : frames.shape[3] // 2 * 2], fps=fps)
