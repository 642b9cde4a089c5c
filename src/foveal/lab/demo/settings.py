"""What the demo runs: steps and clips, for two CPU cores and for a GPU."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from foveal.checks import check_positive_int
from foveal.methods.base import Config
from foveal.methods.sla.config import SLAConfig
from foveal.methods.vsa.config import VSAConfig

# What the demo compares, in this order.
DENSE, SLA_CONVERTED, SLA_ADAPTER, ROUTER_ADAPTER = "dense", "SLA, no training", "SLA adapter", "router adapter"
VSA_CONVERTED, VSA_ADAPTER, VSA_ROUTER_ADAPTER = "VSA, no training", "VSA adapter", "VSA router adapter"
VSA_TRAINED = "VSA, trained here"
ARMS = (
    DENSE,
    SLA_CONVERTED,
    SLA_ADAPTER,
    ROUTER_ADAPTER,
    VSA_CONVERTED,
    VSA_ADAPTER,
    VSA_ROUTER_ADAPTER,
    VSA_TRAINED,
)
# Arms whose choice of blocks the report draws.
PICTURED = (SLA_ADAPTER, VSA_TRAINED)


@dataclass(frozen=True)
class DemoSettings:
    """One demo run.

    Args:
        frames, height, width: of the videos, in pixels.
        sampling_steps: denoising steps of a video.
        fine_tune_steps, batch: optimizer steps after conversion, and clips in each.
        learning_rate: of the self-attention's own weights.
        new_learning_rate: of the parameters that conversion adds, which start at zero.
        evaluations: how often the held-out loss is taken while fine-tuning.
        held_out_clips, training_clips: how many of the clips that come with foveal are used.
        sigmas: noise levels of the held-out loss.
        seed: of the batches and the noise.
    """

    frames: int = 49
    height: int = 144
    width: int = 256
    sampling_steps: int = 12
    fine_tune_steps: int = 16
    batch: int = 2
    learning_rate: float = 3e-4
    new_learning_rate: float = 3e-3
    evaluations: int = 2
    held_out_clips: int = 3
    training_clips: int = 6
    sigmas: tuple[float, ...] = (0.45, 0.8)
    seed: int = 0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if field.type == "int" and field.name != "seed":
                check_positive_int(field.name, getattr(self, field.name))

    @classmethod
    def for_device(cls, device_type: str) -> DemoSettings:
        """The defaults for a device."""
        if device_type == "cpu":
            return cls()
        return cls(sampling_steps=30, fine_tune_steps=60, batch=4, evaluations=4, held_out_clips=4, training_clips=8)

    @property
    def configs(self) -> dict[str, Config]:
        """What the arms without an adapter are converted to, which is what the adapters were trained for."""
        sla = SLAConfig(keep_ratio=0.1, drop_ratio=0.1, token_order="tile")
        vsa = VSAConfig(keep_ratio=0.125)
        return {SLA_CONVERTED: sla, VSA_CONVERTED: vsa, VSA_TRAINED: vsa}

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)
