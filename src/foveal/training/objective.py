"""Flow matching: what a rectified-flow video transformer (Wan, HunyuanVideo, LTX, Flux) is trained to predict.

    x_t = (1 - sigma) x_0 + sigma eps,    target v = eps - x_0        (Lipman et al., arXiv 2210.02747)

with the timestep 1000 sigma and the resolution shift sigma = s u / (1 + (s - 1) u) of SD3 (arXiv 2403.03206, eq. 23).
"""

from __future__ import annotations

import torch
from torch import Tensor

NUM_TRAIN_TIMESTEPS = 1000


def sample_sigmas(batch: int, *, shift: float, generator: torch.Generator) -> Tensor:
    """float32 [batch] noise levels in (0, 1), uniform before the shift, on the generator's device."""
    uniform = torch.rand(batch, generator=generator, device=generator.device)
    return shift * uniform / (1 + (shift - 1) * uniform)


def add_noise(clean: Tensor, noise: Tensor, sigmas: Tensor) -> tuple[Tensor, Tensor]:
    """(x_t, target) for clean and noise [B, C, F, H, W] and sigmas [B]."""
    level = sigmas.view(-1, *[1] * (clean.dim() - 1)).to(clean)
    return (1 - level) * clean + level * noise, noise - clean


def flow_matching_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error, float32 [B]: one figure a sample, so that held-out losses can be paired."""
    return (prediction.float() - target.float()).square().flatten(1).mean(1)
