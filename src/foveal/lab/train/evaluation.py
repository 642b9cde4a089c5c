"""Evaluate a model in training: held-out losses dense and sparse, each layer's error, and the recall of selections."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from foveal.lab.data.dataset import LatentDataset
from foveal.lab.data.shards import text_tensors
from foveal.lab.train.config import TrainingConfig
from foveal.lab.train.faults import TrainingError
from foveal.lab.train.model import streams_of, velocities
from foveal.lab.train.objective import (
    levels_of,
    noised,
    sample_noise,
    sample_sound_noise,
    velocity_loss,
    with_first_frame,
)
from foveal.lab.train.parallel import data_part, mean_of, sum_of
from foveal.layout import TokenLayout
from foveal.models import dense
from foveal.models.processor import sparse_processors
from foveal.models.training import Streams

# Queries per layer to compare with dense attention. All queries would take as long as dense attention does.
QUERIES = 128


@dataclass(frozen=True)
class LayerReport:
    """One sparse layer, on one held-out sample.

    Args:
        error: relative error of its output against dense attention of the same query, key, and value.
        recall: share of dense attention's mass on the blocks that it attends to exactly.
    """

    error: float
    recall: float


@dataclass(frozen=True)
class Evaluation:
    """The results of one evaluation.

    Args:
        sparse: held-out loss as the model is trained.
        dense: held-out loss of the same weights with dense attention; equal for a dense model.
        layers: each sparse layer's report by name; empty for a dense model.
    """

    sparse: float
    dense: float
    layers: dict[str, LayerReport] = field(default_factory=dict)

    def __str__(self) -> str:
        if not self.layers:
            return f"loss {self.sparse:.4f}"
        figures = self.figures()
        return (
            f"loss sparse {self.sparse:.4f}, dense {self.dense:.4f}; attention's error {figures['error/mean']:.3f}, "
            f"recall {figures['recall/mean']:.3f}"
        )

    def figures(self) -> dict[str, float]:
        """All results as flat names and numbers."""
        found = {"held_out/sparse": self.sparse, "held_out/dense": self.dense}
        for name, layer in self.layers.items():
            found |= {f"error/{name}": layer.error, f"recall/{name}": layer.recall}
        if self.layers:
            found["error/mean"] = sum(layer.error for layer in self.layers.values()) / len(self.layers)
            found["recall/mean"] = sum(layer.recall for layer in self.layers.values()) / len(self.layers)
        return found


class HeldOut:
    """Evaluates on fixed clips, noise, and noise levels, so that two evaluations compare to the last digit.

    Processes share the clips, and all of them call `evaluate`.

    Args:
        data: the held-out samples.
        config: the run's configuration.
        accelerator: the run's accelerator.
        shifts: of the noise levels of each tensor of a sample. The levels of `evaluation.sigmas` are the video's.
    """

    def __init__(
        self, data: LatentDataset, config: TrainingConfig, accelerator: Any, shifts: tuple[float, ...]
    ) -> None:
        self.data, self.settings, self.accelerator, self.shifts = data, config.evaluation, accelerator, shifts
        self.count, self.seed = min(config.data.held_out, len(data)), config.seed
        self.first_frame = config.objective.first_frame
        self.part = data_part(accelerator, config)

    def sample(self, index: int) -> tuple[Streams, Streams, dict[str, Tensor], bool]:
        """(clean, noise, text) of one sample as a batch of one, on the device; whether its first frame is given.

        First frames are given to the share of the samples that training gives them to, spread evenly over all.
        """
        from safetensors import SafetensorError

        device = self.accelerator.device
        try:
            item = self.data[index]
        except (OSError, SafetensorError) as error:
            raise TrainingError(f"held-out sample {index} cannot be read: {error}") from error
        batch = {key: value[None].to(device) for key, value in item.items() if isinstance(value, Tensor)}
        clean = streams_of(batch)
        # Training counts its samples up from 0, so evaluation uses numbers below 0.
        numbered = {"first": -1 - index, "seed": self.seed}
        noise = [sample_noise(tuple(clean[0].shape), **numbered, shift=1.0)[0]]
        noise += [sample_sound_noise(tuple(sound.shape), **numbered) for sound in clean[1:]]
        given = int((index + 1) * self.first_frame) > int(index * self.first_frame)
        return clean, tuple(x.to(device) for x in noise), text_tensors(batch), given

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> Evaluation:
        """Compute losses over all samples and noise levels, and observe each layer on the first sample.

        Args:
            model: the unwrapped transformer.
        """
        training = model.training
        model.eval()
        # Hooks observe the layers, and compiled blocks may not have hooks.
        with torch.compiler.set_stance("force_eager"):
            sparse = self._loss(model)
            layers = {}
            loss_dense = sparse
            if sparse_processors(model):
                with dense(model):
                    loss_dense = self._loss(model)
                layers = self._layers(model)
        model.train(training)
        return Evaluation(sparse, loss_dense, layers)

    def _loss(self, model: nn.Module) -> float:
        rank, parts = self.part
        total = torch.zeros((), device=self.accelerator.device, dtype=torch.float64)
        # Every process makes the same number of forwards, because a sharded model needs all processes for each one.
        for start in range(0, self.count, parts):
            counts = start + rank < self.count
            sample = self.sample(min(start + rank, self.count - 1))
            for sigma in self.settings.sigmas:
                losses = self._forward(model, *sample, sigma)
                total += losses.double().sum() * counts
        return (mean_of(self.accelerator, total) * parts / (self.count * len(self.settings.sigmas))).item()

    def _forward(self, model, clean, noise, text, given, sigma) -> Tensor:
        video = clean[0]
        sigmas = torch.full((len(video),), sigma, device=video.device)
        if self.first_frame:
            sigmas = with_first_frame(sigmas, torch.full_like(sigmas, given, dtype=torch.bool), video.shape[2])
        levels = levels_of(sigmas, self.shifts)
        noisy, target = noised(clean, noise, levels)
        with self.accelerator.autocast():
            return velocity_loss(velocities(model, noisy, levels, text), target, levels)

    def _layers(self, model: nn.Module) -> dict[str, LayerReport]:
        levels = sorted(self.settings.sigmas)
        with comparing_layers(model) as found:
            self._forward(model, *self.sample(0), levels[len(levels) // 2])
        # All processes have the same sample; under context parallelism each has its own heads.
        return {name: _report(sum_of(self.accelerator, sums)) for name, sums in found.items()}


@contextlib.contextmanager
def comparing_layers(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Compare every sparse layer with dense attention at its latest call in the context: `_sums` by layer name."""
    found: dict[str, Tensor] = {}

    def record(name: str):
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> None:
            found[name] = _sums(module, *args[:3], output, kwargs.get("layout") or kwargs["grid"])

        return hook

    handles = [
        processor.attention.register_forward_hook(record(name), with_kwargs=True)
        for name, processor in sparse_processors(model).items()
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _report(sums: Tensor) -> LayerReport:
    # Divided as tensors, so where dense attention is all zeros the error is NaN and training continues.
    difference, exact, mass, rows = sums
    return LayerReport((difference / exact).sqrt().item(), (mass / rows).item())


@torch.no_grad()
def _sums(attention: nn.Module, query: Tensor, key: Tensor, value: Tensor, output: Tensor, grid: Any) -> Tensor:
    """The sums behind a report at `QUERIES` evenly spread queries, float64 [4], which add up over heads.

    They are the squared norm of the difference from dense attention, the squared norm of dense attention, the mass on
    the blocks that are attended to exactly, and the number of rows, each with a mass of 1.
    """
    layout = grid if isinstance(grid, TokenLayout) else TokenLayout(grid)
    video, length = layout.video, layout.grid.num_tokens
    picks = torch.linspace(0, length - 1, min(QUERIES, length), device=query.device).round().long()
    rows = query[:, :, video][:, :, picks].float()
    weights = (rows @ key.float().transpose(-1, -2) * query.shape[-1] ** -0.5).softmax(-1)
    exact = weights @ value.float()
    difference = output[:, :, video][:, :, picks].float() - exact

    where = {"layout" if isinstance(grid, TokenLayout) else "grid": grid}
    selection = attention.select(query, key, **where)
    places = attention.token_places(layout.grid).to(query.device)
    kept = selection.critical_mask()[:, :, places[picks] // selection.block_q][..., places // selection.block_k]
    # All queries read the keys of protected segments, and of text behind the video.
    attended = torch.ones_like(weights, dtype=torch.bool)
    attended[..., video] = kept
    mass = (weights * attended).sum(-1).double()
    squares = (x.double().square().sum() for x in (difference, exact))
    return torch.stack([*squares, mass.sum(), torch.ones_like(mass).sum()])


class DivergenceAlarm:
    """Warns when the sparse held-out loss moves away from the dense one.

    The baseline is the dense loss of the current weights or of the initial ones, whichever is lower, because training
    with sparse attention may make the weights worse for dense attention.

    Args:
        gap: the share above the baseline that is acceptable.
    """

    def __init__(self, gap: float) -> None:
        self.gap = gap
        self.first_dense: float | None = None
        self.former_gap: float | None = None

    def warning(self, evaluation: Evaluation) -> str:
        """A warning, or "" if the gap is small or smaller than last time."""
        if self.first_dense is None:
            self.first_dense = evaluation.dense
        yardstick = min(self.first_dense, evaluation.dense)
        gap = evaluation.sparse / yardstick - 1
        former, self.former_gap = self.former_gap, gap
        if former is None or gap <= self.gap or gap <= former:
            return ""
        return (
            f"the sparse held-out loss, {evaluation.sparse:.4f}, is {gap:.0%} above the dense one, and was "
            f"{former:.0%} last time: it diverges; raise keep_ratio, lower the learning rate, or keep the first and "
            "last layers dense"
        )

    def state_dict(self) -> dict[str, float | None]:
        return {"first_dense": self.first_dense, "former_gap": self.former_gap}

    def load_state_dict(self, state: dict[str, float | None]) -> None:
        self.first_dense, self.former_gap = state["first_dense"], state["former_gap"]
