"""Videos from a model in training: Euler steps of the flow, and latents made visible."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from foveal.lab.data.windows import to_frames, upscale, write_video
from foveal.lab.encoding import decode_video
from foveal.lab.hub import hub_options
from foveal.lab.pipelines import PIPELINES
from foveal.models import dense
from foveal.models.processor import sparse_processors
from foveal.models.shipped import local_path
from foveal.models.training import Streams

# Pixels that a sample is at least high: small ones are enlarged to be seen.
MIN_HEIGHT = 192


def euler_steps(
    velocity: Callable[[Tensor, Tensor], Tensor],
    noise: Tensor,
    *,
    shift: float,
    steps: int,
    on_step: Callable[[], None] | None = None,
) -> Tensor:
    """What the flow carries the noise of a video without sound to: [B, C, F, H, W] like `noise`.

    Args:
        velocity: (video [B, C, F, H, W], noise levels [B]) to the flow's velocity.
        noise: standard normal.
        shift: the shift of the noise schedule.
        steps: Euler steps.
        on_step: called after each.
    """
    (video,) = euler_steps_together(
        lambda noisy, sigmas: (velocity(*noisy, *sigmas),), (noise,), shifts=(shift,), steps=steps, on_step=on_step
    )
    return video


@torch.no_grad()
def euler_steps_together(
    velocities: Callable[[Streams, Streams], Streams],
    noise: Streams,
    *,
    shifts: tuple[float, ...],
    steps: int,
    on_step: Callable[[], None] | None = None,
) -> Streams:
    """What the flow carries the noise of a video and of its sound to, each shaped like its noise.

    Args:
        velocities: (noisy tensors, noise levels [B] of each) to the flow's velocity of each.
        noise: standard normal.
        shifts: the shift of the noise schedule of each.
        steps: Euler steps.
        on_step: called after each.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    schedulers = [FlowMatchEulerDiscreteScheduler(shift=shift) for shift in shifts]
    for scheduler in schedulers:
        scheduler.set_timesteps(steps)
    made = noise
    for step in range(steps):
        sigmas = tuple(x.sigmas[step].to(part).expand(len(part)) for x, part in zip(schedulers, made, strict=True))
        predicted = velocities(made, sigmas)
        made = tuple(
            scheduler.step(velocity, scheduler.timesteps[step], part, return_dict=False)[0]
            for scheduler, velocity, part in zip(schedulers, predicted, made, strict=True)
        )
        if on_step is not None:
            on_step()
    return made


@torch.no_grad()
def visible(latents: Tensor, space: str, *, family: str, pipeline: str | None, device: torch.device) -> Tensor:
    """uint8 [frames, 3, height, width] of one sample's latents [C, F, H, W].

    Args:
        latents: the latents, as the transformer sees them.
        space: "pixel", where they are a video in [-1, 1], or "latent".
        family: that of the transformer.
        pipeline: the folder or hub name of the pipeline whose `vae` decodes latents.
        device: where to decode; the VAE is loaded for it and let go.
    """
    if space == "pixel":
        return to_frames(latents.cpu())
    from diffusers import AutoModel

    place = local_path(pipeline)
    options = hub_options(place)
    vae: nn.Module = AutoModel.from_pretrained(place, subfolder="vae", torch_dtype=torch.float32, **options)
    kind = next(kind for kind in PIPELINES.values() if kind.family == family)
    return to_frames(decode_video(vae.to(device), latents[None].to(device), kind)[0].cpu())


@torch.no_grad()
def dense_and_sparse(
    model: nn.Module,
    velocities: Callable[[Streams, Streams], Streams],
    noise: Streams,
    *,
    shifts: tuple[float, ...],
    steps: int,
) -> list[Tensor]:
    """What a model makes of the same noise with dense and with sparse attention; only with dense if it has no other.

    Args:
        model: the transformer that `velocities` calls.
        velocities, noise, shifts, steps: see `euler_steps_together`.

    Returns:
        The video's latents [C, F, H, W] of the first sample.
    """

    def made() -> Tensor:
        return euler_steps_together(velocities, noise, shifts=shifts, steps=steps)[0][0]

    training = model.training
    model.eval()
    with dense(model):
        latents = [made()]
    if sparse_processors(model):
        latents.append(made())
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
