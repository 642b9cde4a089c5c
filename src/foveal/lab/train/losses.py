"""The losses of a run's batches: noisy samples, the model's velocities, and those of a dense teacher."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from foveal.lab.data.shards import text_tensors
from foveal.lab.train.config import TrainingConfig
from foveal.lab.train.inputs import NoiseAhead, micro_batches
from foveal.lab.train.model import streams_of, teaching, velocities
from foveal.lab.train.objective import levels_of, noised, sample_sound_noise, velocity_loss
from foveal.lab.train.parallel import DataPart, accumulating
from foveal.models import dense
from foveal.models.training import Streams


class Losses:
    """The losses of one batch after the other.

    Args:
        config: the run's configuration.
        accelerator: the run's accelerator.
        model: what a forward in training calls: the transformer, or DDP around it.
        transformer: the transformer itself.
        teacher: a frozen dense copy; None where the transformer is its own teacher, or there is none.
        noise: gives the noise of the videos and the noise levels.
        shifts: of the noise levels of each tensor of a sample.
        no_text: the text tensors of the empty caption, without a batch dimension; empty where guidance needs none.
        part: this process's part of every batch.
    """

    def __init__(
        self,
        config: TrainingConfig,
        accelerator: Any,
        *,
        model: nn.Module,
        transformer: nn.Module,
        teacher: nn.Module | None,
        noise: NoiseAhead,
        shifts: tuple[float, ...],
        no_text: dict[str, Tensor],
        part: DataPart,
    ) -> None:
        self.config, self.accelerator = config, accelerator
        self.model, self.transformer, self.teacher = model, transformer, teacher
        self.noise, self.shifts, self.part = noise, shifts, part
        self.no_text = {name: tensor.to(accelerator.device) for name, tensor in no_text.items()}

    def of_batch(self, batch: dict[str, Any], position: int, *, dense_now: bool) -> Iterator[Tensor]:
        """The losses of the micro-batches, whose sum is the batch's mean; each has its backward before the next.

        Args:
            batch: this process's part of a batch.
            position: the number of the batch since training began.
            dense_now: run the model with dense attention.
        """
        local, size = len(batch["latents"]), self.config.micro_batch_size
        # The numbers of this process's first samples, of this batch and the next.
        first, next_first = (
            number * self.config.batch_size + self.part.rank * local for number in (position, position + 1)
        )
        for start, part in micro_batches(batch, size):
            last = start + size >= local
            noise, sigmas = self.noise.take(
                tuple(part["latents"].shape), first + start, next_first if last else first + start + size
            )
            noises = (noise,)
            if len(self.shifts) > 1:
                shape = tuple(part["audio_latents"].shape)
                noises = noise, sample_sound_noise(shape, first=first + start, seed=self.config.seed)
            with accumulating(self.model, self.accelerator, last=last):
                with dense(self.transformer) if dense_now else contextlib.nullcontext():
                    loss = self._of_samples(part, noises, sigmas).sum() / local
                yield loss

    def _of_samples(self, part: dict[str, Any], noises: Streams, sigmas: Tensor) -> Tensor:
        """The objective of some samples, one figure each."""
        objective, device = self.config.objective, self.accelerator.device
        # No copy waits: the host is to be ahead of a GPU.
        tensors = {key: value for key, value in part.items() if isinstance(value, Tensor)}
        part = {key: value.to(device, non_blocking=True) for key, value in tensors.items()}
        noises = tuple(noise.to(device, non_blocking=True) for noise in noises)
        levels = levels_of(sigmas.to(device, non_blocking=True), self.shifts)
        text = text_tensors(part)
        noisy, target = noised(streams_of(part), noises, levels)
        # The teacher first: later, the student's activations would be in memory beside its own.
        taught = self._taught(noisy, levels, text) if objective.distillation else None
        with self.accelerator.autocast():
            predicted = velocities(self.model, noisy, levels, text)
        loss = objective.flow_matching * velocity_loss(predicted, target, levels)
        if taught is not None:
            loss = loss + objective.distillation * velocity_loss(predicted, taught, levels)
        return loss

    @torch.no_grad()
    def _taught(self, noisy: Streams, levels: Streams, text: dict[str, Tensor]) -> Streams:
        """The teacher's velocities, with guidance where the objective has a scale for it."""
        scale = self.config.objective.guidance_scale
        model = self.transformer if self.teacher is None else self.teacher
        with self.accelerator.autocast(), teaching(model) if self.teacher is None else contextlib.nullcontext():
            found = velocities(model, noisy, levels, text)
            if scale is None:
                return found
            count = len(noisy[0])
            nothing = {name: tensor.expand(count, *tensor.shape) for name, tensor in self.no_text.items()}
            without = velocities(model, noisy, levels, nothing)
        return tuple(x + scale * (y - x) for x, y in zip(without, found, strict=True))
