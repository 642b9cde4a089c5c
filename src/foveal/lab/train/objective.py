"""Flow matching, the objective of rectified-flow video transformers (Wan, HunyuanVideo, LTX, Flux).

    x_t = (1 - sigma) x_0 + sigma eps,    target v = eps - x_0        (Lipman et al., arXiv 2210.02747)

with the timestep 1000 sigma and the resolution shift sigma = s u / (1 + (s - 1) u) of SD3 (arXiv 2403.03206, eq. 23).

A noise level is one for a whole sample, or one for each frame. With levels for frames, a level of 0 gives the model a
clean frame, as the text-and-image-to-video model of Wan 2.2 has its first; such a frame is left out of the loss.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

NUM_TRAIN_TIMESTEPS = 1000


def sample_sigmas(
    batch: int, *, shift: float, generator: torch.Generator, sigma_range: tuple[float, float] = (0.0, 1.0)
) -> Tensor:
    """float32 [batch] noise levels in `sigma_range`, uniform before the shift, on the generator's device."""
    low, high = (sigma / (shift - (shift - 1) * sigma) for sigma in sigma_range)
    uniform = low + (high - low) * torch.rand(batch, generator=generator, device=generator.device)
    return shift * uniform / (1 + (shift - 1) * uniform)


def add_noise(clean: Tensor, noise: Tensor, sigmas: Tensor) -> tuple[Tensor, Tensor]:
    """(x_t, target) for clean and noise [B, C, F, H, W] and sigmas [B] or [B, F]."""
    level = _for_video(sigmas, clean).to(clean)
    return (1 - level) * clean + level * noise, noise - clean


def flow_matching_loss(prediction: Tensor, target: Tensor, sigmas: Tensor | None = None) -> Tensor:
    """Mean squared error, float32 [B]: one value per sample, so that held-out losses can be paired.

    Args:
        prediction, target: velocities [B, C, F, H, W].
        sigmas: noise levels; frames that [B, F] gives a level of 0 do not count. Otherwise all frames do.
    """
    squares = (prediction.float() - target.float()).square()
    if sigmas is None or sigmas.dim() == 1:
        return squares.flatten(1).mean(1)
    noised = _for_video(sigmas, squares).gt(0).expand_as(squares)
    return (squares * noised).flatten(1).sum(1) / noised.flatten(1).sum(1)


def levels_of(sigmas: Tensor, shifts: tuple[float, ...]) -> tuple[Tensor, ...]:
    """The noise level of each tensor of a sample, from that of the video.

    The others share the video's level before the shift, and have shifts of their own, as where they are generated
    together.

    Args:
        sigmas: levels of videos under the first shift.
        shifts: one for each tensor of a sample, the video's first.
    """
    unshifted = sigmas / (shifts[0] - (shifts[0] - 1) * sigmas)
    return sigmas, *(shift * unshifted / (1 + (shift - 1) * unshifted) for shift in shifts[1:])


def noised(
    clean: tuple[Tensor, ...], noise: tuple[Tensor, ...], levels: tuple[Tensor, ...]
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """`add_noise` for all tensors of a sample: (noisy ones, targets)."""
    noisy, targets = zip(*map(add_noise, clean, noise, levels), strict=True)
    return noisy, targets


def velocity_loss(predictions: tuple[Tensor, ...], targets: tuple[Tensor, ...], levels: tuple[Tensor, ...]) -> Tensor:
    """The sum of `flow_matching_loss` over the tensors of a sample, float32 [B]."""
    return sum(map(flow_matching_loss, predictions, targets, levels))


def with_first_frame(sigmas: Tensor, given: Tensor, frames: int) -> Tensor:
    """Noise levels [B, F] from levels [B]: 0 for the first frame of the samples that `given`, bool [B], names."""
    levels = sigmas[:, None].repeat(1, frames)
    levels[:, 0].masked_fill_(given, 0.0)
    return levels


def _for_video(sigmas: Tensor, video: Tensor) -> Tensor:
    """Levels [B] or [B, F] in a shape that broadcasts over [B, C, F, ...]."""
    shape = (len(sigmas), 1, -1) if sigmas.dim() == 2 else (len(sigmas),)
    return sigmas.view(*shape, *[1] * (video.dim() - len(shape)))


def sample_noise(
    shape: tuple[int, ...],
    *,
    first: int,
    seed: int | str,
    shift: float,
    sigma_range: tuple[float, float] = (0.0, 1.0),
    first_frame: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Noise [B, C, F, H, W] and noise levels, [B] or [B, F], that depend only on the seed and each sample's number.

    They do not depend on how a batch is cut into micro-batches or spread over devices, and a resumed run needs no state
    for them.

    Args:
        shape: the shape of the noise; its first dimension is B.
        first: the number of the first sample since training began; the others follow.
        seed: the run's seed.
        shift, sigma_range: see `sample_sigmas`.
        first_frame: the share of the samples whose first frame is given. Above 0, every frame has a level of its own.

    Returns:
        Both as float32 on the CPU.
    """
    noise, sigmas, given = [], [], []
    for number in range(first, first + shape[0]):
        # torch's CPU generator uses 32 bits of its seed, so these must not come only from the number.
        digest = hashlib.sha256(f"{seed} {number}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))
        sigmas.append(sample_sigmas(1, shift=shift, generator=generator, sigma_range=sigma_range))
        noise.append(torch.randn(shape[1:], generator=generator))
        given.append(torch.rand((), generator=generator) < first_frame)
    levels = torch.cat(sigmas)
    return torch.stack(noise), with_first_frame(levels, torch.stack(given), shape[2]) if first_frame else levels


def sample_sound_noise(shape: tuple[int, ...], *, first: int, seed: int) -> Tensor:
    """Noise for the sound of samples, of which the same holds as of `sample_noise`; it is not that of the video."""
    return sample_noise(shape, first=first, seed=f"{seed} sound", shift=1.0)[0]


def scheduler_shift(scheduler: dict) -> float:
    """The resolution shift in a diffusers scheduler's configuration, or 1 if there is none.

    Raises:
        ValueError: the scheduler is not a flow-matching one, or shifts by resolution as it samples.
    """
    name = scheduler.get("_class_name", "")
    flow = "FlowMatch" in name or name == "MiniMaxH3Scheduler" or scheduler.get("use_flow_sigmas", False)
    if not flow:
        raise ValueError(
            f"the model's scheduler, {scheduler.get('_class_name')}, is not for flow matching; give objective.shift"
        )
    if scheduler.get("use_dynamic_shifting", False):
        raise ValueError("the model's scheduler shifts noise levels by resolution; give objective.shift")
    key = "shift" if "shift" in scheduler else "flow_shift"
    return float(scheduler.get(key) or 1.0)
