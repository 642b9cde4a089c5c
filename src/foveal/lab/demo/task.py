"""The demo's task: the tiny model continues a frame of a clip that it has never seen."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from foveal.lab.data.windows import read_video
from foveal.lab.demo.settings import DemoSettings
from foveal.lab.encoding import encode_text
from foveal.lab.pipelines import LoadedPipeline, load_pipeline, step_callback
from foveal.lab.train.loop import TrainingRecord, train
from foveal.lab.train.model import choose_trained, velocity
from foveal.lab.train.objective import (
    add_noise,
    flow_matching_loss,
    sample_noise,
    scheduler_shift,
    with_first_frame,
)
from foveal.layout import VideoGrid
from foveal.models import sparse_parameters
from foveal.models.shipped import TINY, Clip, shipped_clips

# Training counts its samples up from 0, so the held-out clips have numbers below 0.
HELD_OUT = -1000


class Task:
    """The tiny model, the clips that come with it, and what is done with them.

    Weights are float32; a GPU computes in bfloat16 by autocast.

    Args:
        settings: of the demo.
        device: where to run.
    """

    def __init__(self, settings: DemoSettings, device: torch.device) -> None:
        with _without_warnings():
            from diffusers import WanImageToVideoPipeline

        self.settings, self.device = settings, device
        self.loaded: LoadedPipeline = load_pipeline(TINY, device=device, dtype=torch.float32)
        self.size = {"num_frames": settings.frames, "height": settings.height, "width": settings.width}
        self.loaded.sizes.check(*self.size.values())
        held_out = shipped_clips("held-out")[: settings.held_out_clips]
        self.clip = held_out[0]
        self.real = read_video(self.clip.file, height=settings.height, width=settings.width)[: settings.frames]
        self.held_out = self._samples(held_out)
        self.training = self._samples(shipped_clips("train")[: settings.training_clips])
        self.dense: nn.Module = self.loaded.pipe.transformer
        parts = {**self.loaded.pipe.components, "image_encoder": None, "image_processor": None}
        self.pipe: Any = WanImageToVideoPipeline(**parts, expand_timesteps=True)
        self.pipe.set_progress_bar_config(disable=True)
        self.shift = scheduler_shift(dict(self.loaded.pipe.scheduler.config))

    @property
    def grid(self) -> VideoGrid:
        return self.loaded.sizes.grid(*self.size.values())

    def copy(self) -> nn.Module:
        """The dense model, to be converted."""
        return copy.deepcopy(self.dense)

    def generate(self, model: nn.Module, on_step: Callable[[], None]) -> Tensor:
        """uint8 [F, 3, H, W]: the first held-out clip's first frame and caption, continued."""
        from PIL import Image

        self.pipe.transformer = model.eval()

        with torch.no_grad(), self.autocast():
            video = self.pipe(
                image=Image.fromarray(self.real[0].permute(1, 2, 0).numpy()),
                prompt=self.clip.caption,
                num_inference_steps=self.settings.sampling_steps,
                guidance_scale=1.0,
                generator=torch.Generator().manual_seed(self.settings.seed),
                output_type="pt",
                callback_on_step_end=step_callback(on_step),
                **self.size,
            ).frames[0]
        return (255 * video.float().clamp(0, 1)).round().to(torch.uint8).cpu()

    @torch.no_grad()
    def held_out_loss(self, model: nn.Module) -> float:
        """Mean flow-matching loss over the held-out clips and the noise levels, with the first frame given."""
        model.eval()
        losses = []
        for number, (latents, text) in enumerate(self.held_out):
            for sigma in self.settings.sigmas:
                sigmas = torch.full((1,), sigma, device=self.device)
                losses.append(self._loss(model, latents, text, HELD_OUT - number, sigmas))
        return torch.cat(losses).mean().item()

    def noisy(self, sigma: float) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """(latents, noise levels [1, F], text) of the first held-out clip at a noise level."""
        latents, text = self.held_out[0]
        noise, _ = sample_noise(tuple(latents.shape), first=HELD_OUT, seed=self.settings.seed, shift=self.shift)
        sigmas = self._levels(torch.full((1,), sigma, device=self.device), latents)
        return add_noise(latents, noise.to(self.device), sigmas)[0], sigmas, text

    def fine_tune(self, model: nn.Module, on_step: Callable[[int, float], None]) -> TrainingRecord:
        """Train a converted model's self-attention and its new parameters on the training clips."""
        settings = self.settings
        choose_trained(model, "attention")
        return train(
            model,
            iter(range(settings.fine_tune_steps)),
            self._batch_loss,
            steps=settings.fine_tune_steps,
            learning_rate=settings.learning_rate,
            warmup=max(1, settings.fine_tune_steps // 8),
            fast_parameters=list(sparse_parameters(model).values()),
            fast_learning_rate=settings.new_learning_rate,
            evaluate=self.held_out_loss,
            evaluate_every=max(1, settings.fine_tune_steps // settings.evaluations),
            on_step=on_step,
        )

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

    def _batch_loss(self, model: nn.Module, step: int) -> Tensor:
        losses = []
        for number in range(step * self.settings.batch, (step + 1) * self.settings.batch):
            latents, text = self.training[number % len(self.training)]
            losses.append(self._loss(model, latents, text, number))
        return torch.cat(losses).mean()

    def _loss(
        self, model: nn.Module, latents: Tensor, text: dict[str, Tensor], number: int, sigmas: Tensor | None = None
    ) -> Tensor:
        noise, drawn = sample_noise(tuple(latents.shape), first=number, seed=self.settings.seed, shift=self.shift)
        levels = self._levels(drawn.to(self.device) if sigmas is None else sigmas, latents)
        noisy, target = add_noise(latents, noise.to(self.device), levels)
        with self.autocast():
            predicted = velocity(model, noisy, levels, text)
        return flow_matching_loss(predicted, target, levels)

    def _levels(self, sigmas: Tensor, latents: Tensor) -> Tensor:
        return with_first_frame(sigmas, torch.ones_like(sigmas, dtype=torch.bool), latents.shape[2])

    def _samples(self, clips: list[Clip]) -> list[tuple[Tensor, dict[str, Tensor]]]:
        """Latents [1, C, F, H, W], cropped to the size of the videos, and text, of each clip."""
        sizes = self.loaded.sizes
        frames = (self.settings.frames - 1) // sizes.temporal + 1
        height, width = self.settings.height // sizes.spatial, self.settings.width // sizes.spatial
        samples = []
        for clip in clips:
            latents = clip.latents[None, :, :frames, :height, :width].to(self.device)
            samples.append((latents, encode_text(self.loaded, [clip.caption])))
        return samples


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Without what transformers says as diffusers imports its image encoder, which the tiny model has not."""
    from transformers.utils import logging

    former = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(former)


def psnr(video: Tensor, reference: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of uint8 videos [F, 3, H, W], without the given first frame."""
    error = (video[1:].float() - reference[1:].float()).square().mean() / 255**2
    return (-10 * error.log10()).item()
