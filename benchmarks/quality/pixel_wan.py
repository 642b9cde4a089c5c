"""The task of the experiments: a small Wan transformer that continues a frame into a video, in pixel space.

As in Wan's image-to-video models, the transformer sees the noisy video, a mask of the given frames, and the given
frames themselves (zeros elsewhere), so the content of the first frame has to travel through attention. There is no
text: the caption is one zero token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from foveal.checks import check_positive_int
from foveal.lab.train.model import build_wan
from foveal.lab.train.objective import NUM_TRAIN_TIMESTEPS, add_noise, flow_matching_loss, sample_sigmas
from foveal.lab.train.sampling import euler_steps
from foveal.lab.train.settings import WanArchitecture
from foveal.layout import VideoGrid
from foveal.methods.base import Config
from foveal.methods.sla.config import SLAConfig
from foveal.methods.vsa.config import VSAConfig

TEXT_DIM = 32
HELD_OUT_SIGMAS = (0.2, 0.45, 0.7, 0.9)


@dataclass(frozen=True)
class PixelSettings:
    """One experiment.

    Args:
        height, width: pixels of the training video; multiples of `patch`.
        frames, stride: frames in a window, and clip frames from one to the next.
        patch: pixels a token is wide and high.
        num_heads, head_dim, num_layers: the transformer.
        batch: windows in a step.
        pretrain_steps, fine_tune_steps: optimizer steps, dense and after conversion.
        learning_rate, fine_tune_learning_rate: peaks; pretraining decays to half the latter.
        new_learning_rate: peak of the parameters that conversion adds, which start at zero.
        shift: of the flow-matching noise schedule.
        sampling_steps: Euler steps of a generation.
        held_out_windows: windows that the held-out loss averages over, each at every one of its noise levels.
        evaluations: how often the held-out loss is taken while fine-tuning.
        keep_ratio, drop_ratio: the share of blocks kept and dropped; only SLA drops.
        seed: of the weights, the batches and the noise.
    """

    height: int = 48
    width: int = 88
    frames: int = 8
    stride: int = 2
    patch: int = 4
    num_heads: int = 2
    head_dim: int = 64
    num_layers: int = 4
    batch: int = 1
    pretrain_steps: int = 280
    fine_tune_steps: int = 50
    learning_rate: float = 4e-3
    fine_tune_learning_rate: float = 1e-3
    new_learning_rate: float = 2e-2
    shift: float = 2.0
    sampling_steps: int = 16
    held_out_windows: int = 4
    evaluations: int = 5
    keep_ratio: float = 0.1
    drop_ratio: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("height", "width", "frames", "stride", "patch", "pretrain_steps", "fine_tune_steps"):
            check_positive_int(name, getattr(self, name))
        if self.height % self.patch or self.width % self.patch:
            raise ValueError(f"height and width must be multiples of {self.patch}, got {self.height}x{self.width}")

    @classmethod
    def for_device(cls, device_type: str) -> PixelSettings:
        """The defaults for a device: 2,112 tokens on a CPU, 21,504 on a GPU."""
        if device_type == "cpu":
            return cls()
        return cls(
            height=128,
            width=224,
            frames=12,
            num_heads=8,
            num_layers=8,
            batch=2,
            pretrain_steps=1500,
            fine_tune_steps=300,
            learning_rate=1e-3,
            fine_tune_learning_rate=5e-4,
            new_learning_rate=5e-4,  # at 6e-3 SLA ended 1.1 % worse: docs/evidence.md
            sampling_steps=32,
            evaluations=10,
        )

    @property
    def grid(self) -> VideoGrid:
        return VideoGrid(self.frames, self.height // self.patch, self.width // self.patch)

    def arms(self) -> dict[str, Config | None]:
        """What is compared: the name of each arm and its configuration, None for dense."""
        sla = SLAConfig(keep_ratio=self.keep_ratio, drop_ratio=self.drop_ratio)
        return {
            "dense": None,
            "sparse only": sla.replace(drop_ratio=0.0, linear_scope="none"),
            "SLA": sla,
            "SLA hedgehog": sla.replace(feature_map="hedgehog"),
            "VSA": VSAConfig(keep_ratio=self.keep_ratio),
        }

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)


def build_model(settings: PixelSettings) -> nn.Module:
    """A randomly initialized `WanTransformer3DModel`, seeded."""
    torch.manual_seed(settings.seed)
    dim = settings.num_heads * settings.head_dim
    sizes = WanArchitecture(
        num_layers=settings.num_layers,
        num_heads=settings.num_heads,
        head_dim=settings.head_dim,
        ffn_dim=4 * dim,
        patch=settings.patch,
        channels=3,
        text_dim=TEXT_DIM,
        freq_dim=64,
        rope_max_seq_len=max(64, *settings.grid.shape),
    )
    return build_wan(sizes, given_channels=4)


def predict(model: nn.Module, noisy: Tensor, sigmas: Tensor, first_frame: Tensor) -> Tensor:
    """Velocity [B, 3, F, H, W] from noisy [B, 3, F, H, W], sigmas [B] and the first frame [B, 3, 1, H, W]."""
    caption = noisy.new_zeros(noisy.shape[0], 1, TEXT_DIM)
    half = noisy.device.type == "cuda"
    with torch.autocast(noisy.device.type, dtype=torch.bfloat16, enabled=half):
        given = torch.cat((torch.ones_like(first_frame[:, :1]), first_frame), 1)
        given = torch.nn.functional.pad(given, (0, 0, 0, 0, 0, noisy.shape[2] - 1))
        inputs = torch.cat((noisy, given), 1)
        return model(inputs, sigmas * NUM_TRAIN_TIMESTEPS, caption, return_dict=False)[0].float()


class Batches:
    """Training batches (video, noise, sigmas), the same sequence for the same seed, whichever model trains on it."""

    def __init__(self, windows, settings: PixelSettings, device: torch.device, seed: int) -> None:
        self.windows, self.settings, self.device = windows, settings, device
        self.generator = torch.Generator().manual_seed(seed)

    def __iter__(self):
        return self

    def __next__(self) -> tuple[Tensor, Tensor, Tensor]:
        video = self.windows.train_batch(self.settings.batch, self.generator)
        noise = torch.randn(video.shape, generator=self.generator)
        sigmas = sample_sigmas(video.shape[0], shift=self.settings.shift, generator=self.generator)
        return video.to(self.device), noise.to(self.device), sigmas.to(self.device)


def training_loss(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Flow-matching loss of one batch, a scalar."""
    video, noise, sigmas = batch
    noisy, target = add_noise(video, noise, sigmas)
    return flow_matching_loss(predict(model, noisy, sigmas, video[:, :, :1]), target).mean()


class HeldOut:
    """Fixed held-out windows, noise, and noise levels, so that losses compare to the last digit."""

    def __init__(self, windows, settings: PixelSettings, device: torch.device) -> None:
        count = settings.held_out_windows
        self.video = windows.held_out_batch(count).to(device)
        generator = torch.Generator().manual_seed(settings.seed + 1000)
        self.noise = torch.randn(self.video.shape, generator=generator).to(device)
        levels = torch.tensor(HELD_OUT_SIGMAS)
        # Each window gets two noise levels, half the range apart, and together the windows cover all levels.
        self.rounds = [
            levels[(torch.arange(count) + shift) % len(levels)].to(device) for shift in (0, len(levels) // 2)
        ]

    @torch.no_grad()
    def velocities(self, model: nn.Module) -> Tensor:
        """Predicted velocities [2, windows, 3, F, H, W], one window at a time."""
        model.eval()
        rounds = []
        for sigmas in self.rounds:
            noisy, _ = add_noise(self.video, self.noise, sigmas)
            rounds.append(
                torch.cat(
                    [
                        predict(model, noisy[i : i + 1], sigmas[i : i + 1], self.video[i : i + 1, :, :1])
                        for i in range(len(sigmas))
                    ]
                )
            )
        return torch.stack(rounds)

    def loss(self, model: nn.Module) -> float:
        """Mean flow-matching loss over windows and noise levels."""
        return (self.velocities(model) - (self.noise - self.video)).square().mean().item()


def generate(
    model: nn.Module,
    first_frame: Tensor,
    noise: Tensor,
    settings: PixelSettings,
    on_step: Callable[[], None] | None = None,
) -> Tensor:
    """A video [B, 3, F, H, W] in [-1, 1] from its first frame [B, 3, 1, H, W] and noise, by Euler steps."""
    model.eval()

    def velocity(video: Tensor, sigmas: Tensor) -> Tensor:
        return predict(model, video, sigmas, first_frame)

    return euler_steps(velocity, noise, shift=settings.shift, steps=settings.sampling_steps, on_step=on_step)


def psnr(video: Tensor, target: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of videos in [-1, 1], without the given first frame."""
    error = (video.clamp(-1, 1) - target)[:, :, 1:].square().mean() / 4
    return (-10 * error.log10()).item()
