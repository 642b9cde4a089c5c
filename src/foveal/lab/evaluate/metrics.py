"""How close two videos of one prompt and seed are, and their sounds. Videos are uint8 [frames, 3, H, W]."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from foveal.lab.evaluate.lpips import LPIPS, alexnet_file, linear_file
from foveal.lab.extras import how_to_install

# Means "identical to the bit": the PSNR of 8-bit videos that differ ends near 48 dB + 10 log10(pixels).
IDENTICAL_DB = 100.0
# Frames per chunk, so that a long video does not take its size in float32 several times.
CHUNK = 8
# SSIM's window is 11 pixels wide.
SMALLEST_SIDE = 11
# Samples of a window of sound.
SPECTRUM = 1024


def psnr(video: Tensor, reference: Tensor) -> float:
    """Peak signal-to-noise ratio in dB over the whole video; `IDENTICAL_DB` if there is no error."""
    _check_pair(video, reference)
    error = sum((a.double() - b.double()).square().sum().item() for a, b in _chunks(video, reference))
    if error == 0:
        return IDENTICAL_DB
    return min(IDENTICAL_DB, 10 * math.log10(255**2 * video.numel() / error))


def log_spectral_distance(sound: Tensor, reference: Tensor) -> float:
    """How far two sounds are apart in dB: the root mean square of the difference of their log power spectra.

    Both are [channels, samples]. Spectra are those of windows of 1,024 samples. The mean over windows and channels
    counts; power below -80 dB counts as -80 dB, as silence would be infinitely far from anything.

    Raises:
        ValueError: for sounds of different shapes.
    """
    if sound.shape != reference.shape:
        raise ValueError(f"two sounds must have one shape, got {tuple(sound.shape)} and {tuple(reference.shape)}")
    window = torch.hann_window(SPECTRUM)
    levels = []
    for x in (sound, reference):
        spectrum = torch.stft(x.float(), SPECTRUM, SPECTRUM // 2, window=window, return_complex=True)
        power = (spectrum.abs() / window.sum()).square()
        levels.append(10 * power.clamp(min=1e-8).log10())
    return (levels[0] - levels[1]).square().mean(1).sqrt().mean().item()


def ssim(video: Tensor, reference: Tensor) -> float:
    """Structural similarity (Wang et al., 2004: Gaussian window of 11 pixels, borders reflected), the mean over frames.

    Raises:
        ValueError: for frames smaller than the window.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    _check_pair(video, reference)
    if min(video.shape[2:]) < SMALLEST_SIDE:
        raise ValueError(f"SSIM needs at least {SMALLEST_SIDE} pixels a side, got {tuple(video.shape[2:])}")
    total = sum(
        structural_similarity_index_measure(a / 255, b / 255, data_range=1.0, reduction="none").sum().item()
        for a, b in ((a.float(), b.float()) for a, b in _chunks(video, reference))
    )
    return total / len(video)


def flicker(video: Tensor) -> float:
    """Mean absolute difference of neighboring frames in levels of 0 to 255; 0 for an image.

    VBench's temporal flickering is (255 - this) / 255, on videos of a still scene. Motion counts as well, so compare it
    only with the dense video of the same prompt and seed.
    """
    if len(video) < 2:
        return 0.0
    differences = [(a.float() - b.float()).abs().sum().item() for a, b in _chunks(video[1:], video[:-1])]
    return sum(differences) / video[1:].numel()


def load_lpips(device: torch.device) -> tuple[Callable[[Tensor, Tensor], float] | None, str | None]:
    """LPIPS of two videos (mean over frames), or None and the reason why it cannot be measured.

    Nothing is downloaded. Without AlexNet's weights on this machine, LPIPS is skipped.
    """
    try:
        files = [alexnet_file(), linear_file()]
    except ImportError as error:
        return None, f"{error.name} is not installed: {how_to_install('eval')}"
    for file in files:
        if not file.is_file():
            return None, f"AlexNet's weights are not at {file}"
    network = LPIPS(*(torch.load(file, map_location="cpu", weights_only=True) for file in files)).to(device)

    @torch.no_grad()
    def lpips(video: Tensor, reference: Tensor) -> float:
        _check_pair(video, reference)
        total = sum(
            network(a.to(device).float() / 127.5 - 1, b.to(device).float() / 127.5 - 1).sum().item()
            for a, b in _chunks(video, reference)
        )
        return total / len(video)

    return lpips, None


def _chunks(video: Tensor, reference: Tensor):
    return zip(video.split(CHUNK), reference.split(CHUNK), strict=True)


def _check_pair(video: Tensor, reference: Tensor) -> None:
    if video.shape != reference.shape:
        raise ValueError(
            f"videos must have the same shape, got {tuple(video.shape)} and {tuple(reference.shape)} "
            "[frames, 3, height, width]"
        )
