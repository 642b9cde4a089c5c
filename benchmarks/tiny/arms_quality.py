"""How far an arm of `arms.py` is from the dense checkpoint that it began with: velocities and videos."""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

import model as parts
import torch
from common import DEVICE
from features import frechet_distance, load_features
from safetensors.torch import load_file
from torch import Tensor, nn
from train_transformer import SIGMAS, Data, loss_and_velocity, velocity_of

from foveal.lab.evaluate.metrics import flicker, psnr, ssim


def held_out_batches(data: Data, batch: int) -> Iterator[tuple[int, Tensor, tuple[Tensor, ...]]]:
    """(index of the noise level, mask of what counts, what `loss_of` takes), with one noise a clip.

    Every second clip has its first frame given.
    """
    noise = torch.randn(data.held_out.shape, generator=torch.Generator().manual_seed(11))
    for index, sigma in enumerate(SIGMAS):
        for start in range(0, len(noise), batch):
            clean = data.held_out[start : start + batch].float()
            given = torch.arange(start, start + len(clean), device=DEVICE) % 2 == 1
            sigmas = torch.full((len(clean),), sigma, device=DEVICE)
            text = data.text(data.held_out_caption[start : start + batch])
            counts = torch.ones(len(clean), 1, clean.shape[2], 1, 1, device=DEVICE)
            counts[given, :, 0] = 0
            yield index, counts, (clean, noise[start : start + batch].to(DEVICE), sigmas, given, text)


class DenseCheckpoint:
    """The dense model before its arms are trained.

    Args:
        model: the model, in eval mode or not; it stays as it is.
        data: with its held-out clips.
        work: the folder with the VAE.
        batch: clips in a forward.
        videos, steps: how many held-out clips to continue from their first frame, and in how many steps.
        distance: how many of them are compared as a set, by the network of `features.py` in WORK.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Data,
        work: Path,
        batch: int,
        videos: int,
        steps: int = 16,
        distance: int = 0,
    ) -> None:
        self.model, self.data, self.batch, self.steps = model, data, batch, steps
        facts = json.loads((work / "latents.json").read_text())
        self.mean, self.std = (torch.tensor(facts[name]).view(1, -1, 1, 1, 1).to(DEVICE) for name in ("mean", "std"))
        self.vae = parts.build_vae().to(DEVICE).eval()
        self.vae.load_state_dict(load_file(work / "vae.safetensors"))
        stride = max(1, len(data.held_out) // max(1, videos))
        self.picked = list(range(0, len(data.held_out), stride))[:videos]
        with torch.no_grad():
            held_out = held_out_batches(data, batch)
            self.velocities = [loss_and_velocity(model, *values)[1].bfloat16().cpu() for *_, values in held_out]
        self.videos = [self._video(model, clip) for clip in self.picked]
        self.features, self.compared = None, range(min(distance, len(data.held_out)))
        if distance:
            self.features = load_features(work)
            self.continued = self._set(model)

    @torch.no_grad()
    def losses_and_errors(self, model: nn.Module) -> tuple[Tensor, list[float]]:
        """Held-out losses, float64 [clips, levels], and at each level the error of velocities over their norm."""
        losses = [[] for _ in SIGMAS]
        squares = torch.zeros(len(SIGMAS), 2, dtype=torch.float64)
        for (index, counts, values), dense in zip(
            held_out_batches(self.data, self.batch), self.velocities, strict=True
        ):
            loss, velocity = loss_and_velocity(model, *values)
            losses[index].append(loss.double().cpu())
            dense = dense.to(DEVICE).float()
            for place, x in enumerate((velocity - dense, dense)):
                squares[index, place] += (x.square() * counts).sum(dtype=torch.float64).cpu()
        errors = (squares[:, 0] / squares[:, 1]).sqrt().tolist()
        return torch.stack([torch.cat(found) for found in losses], 1), errors

    def compare_videos(self, model: nn.Module) -> dict[str, float]:
        """Means over the videos, without their given frame: PSNR and SSIM to those of the dense model, and flicker.

        Empty without videos.
        """
        found = []
        for clip, dense in zip(self.picked, self.videos, strict=True):
            video = self._video(model, clip)
            found.append((psnr(video, dense), ssim(video, dense), flicker(video), flicker(dense)))
        names = ("psnr_db", "ssim", "flicker", "flicker_dense")
        return {name: statistics.mean(x[i] for x in found) for i, name in enumerate(names) if found}

    def compare_sets(self, model: nn.Module) -> dict[str, float]:
        """Fréchet distances of continued clips: to the real clips, to the dense model's, and between these two.

        Empty where no sets are compared.
        """
        if self.features is None:
            return {}
        real = self.data.held_out[: len(self.compared)].split(self.batch)
        mine = self._set(model)
        pairs = {"real": (real, mine), "dense": (self.continued, mine), "dense_to_real": (real, self.continued)}
        return {name: frechet_distance(self.features, *pair) for name, pair in pairs.items()}

    def _set(self, model: nn.Module) -> list[Tensor]:
        """The compared clips as a model continues them, in batches of latents."""
        return [self._continued(model, self.compared[i : i + self.batch]) for i in self.compared[:: self.batch]]

    def _video(self, model: nn.Module, clip: int) -> Tensor:
        """uint8 [frames, 3, H, W] without the first frame, which a model continues."""
        with torch.no_grad():
            latents = self._continued(model, [clip]) * self.std + self.mean
            video = parts.decode(self.vae, latents)[0, :, 1:]
        return (127.5 * (video.clamp(-1, 1) + 1)).round().byte().movedim(1, 0).cpu()

    @torch.no_grad()
    def _continued(self, model: nn.Module, clips: Sequence[int]) -> Tensor:
        """Latents of held-out clips [clips, C, F, H, W] whose first frame is given, by Euler steps."""
        clean = self.data.held_out[list(clips)].float()
        noise = [torch.randn(clean.shape[1:], generator=torch.Generator().manual_seed(clip)) for clip in clips]
        x = torch.stack(noise).to(DEVICE)
        x[:, :, 0] = clean[:, :, 0]
        text = self.data.text(self.data.held_out_caption[list(clips)])
        given = torch.ones(len(x), dtype=torch.bool, device=DEVICE)
        even = torch.linspace(1, 0, self.steps + 1, device=DEVICE)
        levels = parts.FLOW_SHIFT * even / (1 + (parts.FLOW_SHIFT - 1) * even)
        for level, following in itertools.pairwise(levels):
            velocity = velocity_of(model, x, level.expand(len(x)), given, text)
            x[:, :, 1:] += (following - level) * velocity[:, :, 1:]
        return x
