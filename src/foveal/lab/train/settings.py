"""The parts of a training run's configuration: one frozen dataclass for each theme, which checks its own values."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from foveal.checks import check_choice, check_positive_int, check_ratio
from foveal.methods.base import Config, method_of
from foveal.models.files.persist import check_saved
from foveal.models.files.policy_file import read_policy
from foveal.models.record import ON_FALLBACK
from foveal.models.shipped import local_path

TRAINABLE = ("all", "attention", "new", "lora")
TEACHERS = ("same", "copy")
OPTIMIZERS = ("adamw", "adamw8bit")


@dataclass(frozen=True)
class WanArchitecture:
    """The sizes of a `WanTransformer3DModel` with random weights; the defaults are Wan2.1-1.3B's.

    Args:
        num_layers, num_heads, head_dim, ffn_dim: the transformer.
        patch: pixels (or latent pixels) a token is wide and high; it is one frame deep.
        channels: the channels of the video that goes in and comes out.
        text_dim: width of the text embeddings.
        freq_dim: the number of the timestep's sinusoids.
        rope_max_seq_len: the longest side of a grid.
    """

    num_layers: int = 30
    num_heads: int = 12
    head_dim: int = 128
    ffn_dim: int = 8960
    patch: int = 2
    channels: int = 16
    text_dim: int = 4096
    freq_dim: int = 256
    rope_max_seq_len: int = 1024

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            check_positive_int(name, value)


@dataclass(frozen=True)
class ModelSettings:
    """The transformer.

    Args:
        path: a folder or hub name of a diffusers pipeline, or "foveal/tiny", whose weights training starts from.
        subfolder: the transformer's part of it.
        architecture: random weights of these sizes instead of a `path`.
        gradient_checkpointing: keep only the blocks' inputs and run the blocks again in the backward.
        compile: torch.compile of the repeated blocks.
        keep_exchanged: under `context_parallel` compiled blocks keep the queries, keys, values and outputs that were
            exchanged, beside their inputs: 8 bytes times tokens times width a layer in bfloat16, divided by the degree.
            Without, they are exchanged again in the backward, by `gradient_checkpointing`.
        frozen_dtype: the dtype of the weights that are not trained. Trained weights stay in float32.
    """

    path: str | None = None
    subfolder: str = "transformer"
    architecture: WanArchitecture | None = None
    gradient_checkpointing: bool = True
    compile: bool = False
    keep_exchanged: bool = True
    frozen_dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        if (self.path is None) == (self.architecture is None):
            raise ValueError(
                f"give model.path or model.architecture, one of them, got {self.path!r}, {self.architecture!r}"
            )
        if not (self.keep_exchanged or self.gradient_checkpointing):
            raise ValueError(
                "model.keep_exchanged must be True without model.gradient_checkpointing: only it drops anything"
            )
        check_choice("model.frozen_dtype", self.frozen_dtype, ("float32", "bfloat16"))

    @property
    def place(self) -> str | None:
        """Where `path` is: the folder of a model that foveal ships, otherwise `path` itself."""
        return None if self.path is None else local_path(self.path)


@dataclass(frozen=True)
class Annealing:
    """Dense for a while, then less and less kept, down to what the configuration says (VSA, arXiv 2505.13389).

    Args:
        dense_steps: optimizer steps with dense attention.
        start: what the first sparse step keeps, in the unit of the method: cubes where the configuration has a `topk`,
            else usually a keep_ratio.
        decrement: how much less each time.
        every: optimizer steps between two decrements.
    """

    start: float
    decrement: float
    dense_steps: int = 50
    every: int = 50

    def __post_init__(self) -> None:
        check_positive_int("annealing.every", self.every)
        if self.dense_steps < 0:
            raise ValueError(f"annealing.dense_steps must be at least 0, got {self.dense_steps}")
        if self.start <= 0 or self.decrement <= 0:
            raise ValueError(
                f"annealing.start and annealing.decrement must be above 0, got {self.start} and {self.decrement}"
            )

    def kept(self, step: int, final: float) -> float | None:
        """What optimizer step `step` (from 1) keeps on the way to `final`; None while dense."""
        sparse_steps = step - 1 - self.dense_steps
        if sparse_steps < 0:
            return None
        return max(final, self.start - self.decrement * (sparse_steps // self.every))


@dataclass(frozen=True)
class SparsitySettings:
    """The sparse attention.

    Args:
        attention: a method's configuration, such as an `SLAConfig`; None trains the dense model.
        policy: a file that `foveal calibrate` wrote, in the place of `attention`: each layer's configuration, and when
            it runs dense. The denoising steps that it counts matter only to what is exported.
        parameters: what `foveal.save` or an earlier run wrote, such as RUN/export/sparse: the parameters of the sparse
            layers begin as these and not as conversion makes them. Settings may differ where the parameters do not,
            and a router may be new. What else that run trained, weights or LoRA, is not taken over.
        dense_layers: layers that stay dense, by index.
        layer_keep_ratio: keep_ratio of single layers, by index.
        annealing: how the model gets there; None is sparse from the first step.
        impl: see `block_sparse_attention`.
        on_fallback: what happens where a layer falls back, see `sparsify`.
    """

    attention: Config | None = None
    policy: Path | None = None
    parameters: Path | None = None
    dense_layers: tuple[int, ...] = ()
    layer_keep_ratio: dict[int, float] = field(default_factory=dict)
    annealing: Annealing | None = None
    impl: str = "auto"
    on_fallback: str = "allow"

    def __post_init__(self) -> None:
        check_choice("on_fallback", self.on_fallback, ON_FALLBACK)
        if self.parameters is not None:
            if not self.is_sparse:
                raise ValueError("sparsity.parameters needs sparsity.attention or sparsity.policy")
            check_saved(self.parameters)
        if self.policy is not None:
            if self.dense_layers or self.layer_keep_ratio or self.annealing:
                raise ValueError(
                    "a policy file has every layer's ratio: no dense_layers, layer_keep_ratio, or annealing"
                )
            read_policy(self.policy)
            object.__setattr__(self, "attention", None)
            return
        if self.attention is None:
            if self.dense_layers or self.layer_keep_ratio or self.annealing:
                raise ValueError("dense_layers, layer_keep_ratio and annealing need sparsity.attention")
            return
        method = method_of(self.attention)
        kept = None if method.schedule.kept is None else method.schedule.kept(self.attention)
        if self.layer_keep_ratio and kept != "keep_ratio":
            got = "one that keeps all the same" if kept is None else f"one with {kept}"
            raise ValueError(f"layer_keep_ratio needs a sparsity.attention with a keep_ratio, got {got}")
        if self.annealing is not None and kept is None:
            raise ValueError(f"annealing needs a sparsity.attention that can keep more or less, got {self.attention}")
        for ratio in self.layer_keep_ratio.values():
            check_ratio("layer_keep_ratio", ratio)
        if self.annealing is not None and self.layer_keep_ratio:
            raise ValueError("annealing and layer_keep_ratio exclude each other: all layers anneal in the same way")

    @property
    def is_sparse(self) -> bool:
        """Whether any layer is."""
        return self.attention is not None or self.policy is not None

    def layer_configs(self, num_layers: int) -> dict[int, Config]:
        """The configuration of every sparse layer, by index.

        Raises:
            ValueError: for a layer that the model does not have, or one named twice.
        """
        if self.attention is None:
            return {}
        named = (*self.dense_layers, *self.layer_keep_ratio)
        unknown = sorted({layer for layer in named if not 0 <= layer < num_layers})
        if unknown:
            raise ValueError(f"dense_layers and layer_keep_ratio must be in 0..{num_layers - 1}, got {unknown}")
        both = sorted(set(self.dense_layers) & set(self.layer_keep_ratio))
        if both:
            raise ValueError(f"layers {both} are in dense_layers and in layer_keep_ratio")
        configs = {}
        for layer in range(num_layers):
            if layer in self.dense_layers:
                continue
            ratio = self.layer_keep_ratio.get(layer)
            configs[layer] = self.attention if ratio is None else self.attention.replace(keep_ratio=ratio)
        return configs


@dataclass(frozen=True)
class DataSettings:
    """The training data.

    Args:
        folder: what `foveal precompute` wrote.
        clip: a video file, or the name of a sample clip, instead of a `folder`: trained on in pixel space, its
            last quarter held out.
        height, width, frames, stride: of the windows of `clip`: pixels, frames, and clip frames from one to the next.
        windows: how many windows of `clip` are trained on.
        held_out: clips to evaluate on and never train on.
        caption_dropout: share of the samples that get the empty caption.
        workers: threads that read ahead; 0 reads as batches are needed.
    """

    folder: Path | None = None
    clip: str | None = None
    height: int = 48
    width: int = 80
    frames: int = 8
    stride: int = 2
    windows: int = 32
    held_out: int = 8
    caption_dropout: float = 0.1
    workers: int = 2

    def __post_init__(self) -> None:
        for name in ("height", "width", "frames", "stride", "windows", "held_out"):
            check_positive_int(f"data.{name}", getattr(self, name))
        check_ratio("data.caption_dropout", self.caption_dropout)


@dataclass(frozen=True)
class LoraSettings:
    """Low-rank adapters, by peft.

    Args:
        rank: the rank of the adapters.
        alpha: their scale is alpha / rank.
        dropout: the dropout of their input.
        targets: the linear layers that get one, as peft matches names.
    """

    rank: int = 32
    alpha: int = 32
    dropout: float = 0.0
    targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")


@dataclass(frozen=True)
class ObjectiveSettings:
    """The training objective, a weighted sum.

    Args:
        flow_matching: weight of the flow-matching loss.
        distillation: weight of the mean squared difference to a dense teacher's velocity.
        teacher: "same" is the model itself with dense attention and without LoRA, where its own weights are
            frozen; "copy" is a frozen dense copy of what training started from.
        guidance_scale: the teacher's velocity is v_uncond + guidance_scale * (v_cond - v_uncond), v_uncond that of the
            empty caption; None takes v_cond. 3 to 4 is usual, and for models that are not distilled for guidance.
        shift: of the noise schedule; None takes the model's own scheduler's.
        sound_shift: the same for the sound of models that make video and sound.
        sigma_range: noise levels to train at: (0.875, 1) and (0, 0.875) are the experts of Wan2.2-T2V.
        first_frame: share of the samples whose first frame is given without noise and left out of the loss, for models
            that have a timestep for each token, as Wan2.2-TI2V-5B does. 0 trains text to video only.
    """

    flow_matching: float = 1.0
    distillation: float = 0.0
    teacher: Literal["same", "copy"] = "copy"
    guidance_scale: float | None = None
    shift: float | None = None
    sound_shift: float | None = None
    sigma_range: tuple[float, float] = (0.0, 1.0)
    first_frame: float = 0.0

    def __post_init__(self) -> None:
        check_ratio("objective.first_frame", self.first_frame)
        low, high = self.sigma_range
        if not 0 <= low < high <= 1:
            raise ValueError(f"objective.sigma_range must be two levels in [0, 1], ascending, got {self.sigma_range}")
        check_choice("objective.teacher", self.teacher, TEACHERS)
        for name in ("shift", "sound_shift"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"objective.{name} must be above 0, got {getattr(self, name)}")
        if self.guidance_scale is not None and not (self.distillation and math.isfinite(self.guidance_scale)):
            raise ValueError(
                "objective.guidance_scale must be finite, and is the teacher's: it needs objective.distillation above "
                f"0, got {self.guidance_scale} and {self.distillation}"
            )
        if min(self.flow_matching, self.distillation) < 0 or self.flow_matching + self.distillation == 0:
            raise ValueError(
                "objective.flow_matching and objective.distillation must be at least 0 and not both 0, "
                f"got {self.flow_matching} and {self.distillation}"
            )


@dataclass(frozen=True)
class OptimizerSettings:
    """The optimizer.

    Args:
        name: "adamw" (fused) or "adamw8bit" (bitsandbytes: moments in eight bits).
        trainable: "all" weights, only the self-"attention", only the "new" parameters, or "lora"
            and the new ones.
        learning_rate: the peak.
        new_learning_rate: the peak of the new parameters, which start at zero and have a longer way to go; None is
            `learning_rate`.
        router_learning_rate: the peak of routers' projections, which start at the identity; None is that of the new
            parameters.
        warmup: steps up to the peak.
        decay: fall linearly to `final_learning_rate` at the last step; False keeps the peak rate.
        final_learning_rate: where the decay ends.
        betas, weight_decay: the settings of AdamW.
        max_gradient_norm: gradients are scaled down to it.
        ema_decay: of the exponential moving average of the trained weights, which is what is exported; None has none.
    """

    name: Literal["adamw", "adamw8bit"] = "adamw"
    trainable: Literal["all", "attention", "new", "lora"] = "all"
    learning_rate: float = 1e-5
    new_learning_rate: float | None = None
    router_learning_rate: float | None = None
    warmup: int = 100
    decay: bool = False
    final_learning_rate: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.01
    max_gradient_norm: float = 1.0
    ema_decay: float | None = None

    def __post_init__(self) -> None:
        check_choice("optimizer.name", self.name, OPTIMIZERS)
        check_choice("optimizer.trainable", self.trainable, TRAINABLE)
        for name in ("learning_rate", "new_learning_rate", "router_learning_rate"):
            rate = getattr(self, name)
            if rate is not None and not rate > 0:
                raise ValueError(f"optimizer.{name} must be above 0, got {rate}")
        if self.warmup < 0:
            raise ValueError(f"optimizer.warmup must be at least 0, got {self.warmup}")
        if self.ema_decay is not None:
            check_ratio("optimizer.ema_decay", self.ema_decay)


@dataclass(frozen=True)
class EvaluationSettings:
    """Evaluation during training.

    Args:
        every: optimizer steps between two evaluations on the held-out clips; 0 evaluates only at the end.
        sigmas: the noise levels of every held-out clip.
        sample_every: optimizer steps between two pairs of sample videos, dense and sparse; 0 makes none.
        sampling_steps: Euler steps of a sample.
        warn_gap: warn when the sparse held-out loss is this share above the dense one, and further than last time.
    """

    every: int = 100
    sigmas: tuple[float, ...] = (0.2, 0.45, 0.7, 0.9)
    sample_every: int = 0
    sampling_steps: int = 30
    warn_gap: float = 0.1

    def __post_init__(self) -> None:
        for name in ("every", "sample_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"evaluation.{name} must be at least 0, got {getattr(self, name)}")
        if not self.sigmas or not all(0 < sigma < 1 for sigma in self.sigmas):
            raise ValueError(f"evaluation.sigmas must be some levels between 0 and 1, got {self.sigmas}")
        check_positive_int("evaluation.sampling_steps", self.sampling_steps)


@dataclass(frozen=True)
class CheckpointSettings:
    """Checkpoints.

    Args:
        every: optimizer steps between two checkpoints; one is written at the end in any case.
        keep: how many of the latest to keep, in addition to the one with the lowest held-out loss.
    """

    every: int = 250
    keep: int = 3

    def __post_init__(self) -> None:
        check_positive_int("checkpoint.every", self.every)
        check_positive_int("checkpoint.keep", self.keep)


@dataclass(frozen=True)
class FaultSettings:
    """How to handle bad losses and unreadable data.

    Args:
        spike_factor: a loss of this many times the median of the last 50 counts as a spike.
        max_skipped: stop after this many steps in a row without a good loss or a readable batch.
    """

    spike_factor: float = 10.0
    max_skipped: int = 5

    def __post_init__(self) -> None:
        if self.spike_factor <= 1:
            raise ValueError(f"faults.spike_factor must be above 1, got {self.spike_factor}")
        check_positive_int("faults.max_skipped", self.max_skipped)
