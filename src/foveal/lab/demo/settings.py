"""What the demo runs: sizes, steps and seeds, for two CPU cores and for a GPU."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from foveal.checks import check_positive_int
from foveal.layout import VideoGrid
from foveal.methods.base import Config
from foveal.methods.sla.config import SLAConfig
from foveal.methods.vsa.config import VSAConfig

# Arms whose choice of blocks the report draws.
PICTURED = ("SLA", "VSA")


@dataclass(frozen=True)
class DemoSettings:
    """One demo run.

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
    def for_device(cls, device_type: str) -> DemoSettings:
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
