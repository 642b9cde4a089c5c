"""Flow matching, the objective of rectified-flow video transformers (Wan, HunyuanVideo, LTX, Flux).

    x_t = (1 - sigma) x_0 + sigma eps,    target v = eps - x_0        (Lipman et al., arXiv 2210.02747)

with the timestep 1000 sigma and the resolution shift sigma = s u / (1 + (s - 1) u) of SD3 (arXiv 2403.03206, eq. 23).
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
    """(x_t, target) for clean and noise [B, C, F, H, W] and sigmas [B]."""
    level = sigmas.view(-1, *[1] * (clean.dim() - 1)).to(clean)
    return (1 - level) * clean + level * noise, noise - clean


def flow_matching_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error, float32 [B]: one value per sample, so that held-out losses can be paired."""
    return (prediction.float() - target.float()).square().flatten(1).mean(1)


def sample_noise(
    shape: tuple[int, ...], *, first: int, seed: int, shift: float, sigma_range: tuple[float, float] = (0.0, 1.0)
) -> tuple[Tensor, Tensor]:
    """Noise [B, C, F, H, W] and noise levels [B] that depend only on the seed and each sample's number.

    They do not depend on how a batch is cut into micro-batches or spread over devices, and a resumed run needs no state
    for them.

    Args:
        shape: the shape of the noise; its first dimension is B.
        first: the number of the first sample since training began; the others follow.
        seed: the run's seed.
        shift, sigma_range: see `sample_sigmas`.

    Returns:
        Both as float32 on the CPU.
    """
    noise, sigmas = [], []
    for number in range(first, first + shape[0]):
        # torch's CPU generator uses 32 bits of its seed, so these must not come only from the number.
        digest = hashlib.sha256(f"{seed} {number}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))
        sigmas.append(sample_sigmas(1, shift=shift, generator=generator, sigma_range=sigma_range))
        noise.append(torch.randn(shape[1:], generator=generator))
    return torch.stack(noise), torch.cat(sigmas)


def scheduler_shift(scheduler: dict) -> float:
    """The resolution shift in a diffusers scheduler's configuration, or 1 if there is none.

    Raises:
        ValueError: the scheduler is not a flow-matching one, or shifts by resolution as it samples.
    """
    flow = "FlowMatch" in scheduler.get("_class_name", "") or scheduler.get("use_flow_sigmas", False)
    if not flow:
        raise ValueError(
            f"the model's scheduler, {scheduler.get('_class_name')}, is not for flow matching; give objective.shift"
        )
    if scheduler.get("use_dynamic_shifting", False):
        raise ValueError("the model's scheduler shifts noise levels by resolution; give objective.shift")
    key = "shift" if "shift" in scheduler else "flow_shift"
    return float(scheduler.get(key) or 1.0)
