"""What a training run is, in full: one frozen `TrainingConfig`, which recipes return and the command line overrides.

Its parts are in `foveal.lab.train.settings`; here is what holds between them.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from foveal.checks import check_choice, check_positive_int
from foveal.lab.train.settings import (
    CheckpointSettings,
    DataSettings,
    EvaluationSettings,
    FaultSettings,
    LoraSettings,
    ModelSettings,
    ObjectiveSettings,
    OptimizerSettings,
    SparsitySettings,
)
from foveal.models.files.formats import FORMATS
from foveal.output_folder import OutputFolder

PRECISIONS = ("bf16", "no")
PARALLEL = ("ddp", "fsdp")
TRACKERS = ("tensorboard", "wandb", "trackio", "none")


@dataclass(frozen=True)
class TrainingConfig:
    """One training run.

    Args:
        output: the folder of checkpoints, logs, samples and the export.
        resume: continue from the latest checkpoint in `output`, or start if there is none.
        steps: optimizer steps.
        batch_size: samples per step, over all devices.
        micro_batch_size: samples per forward on one device. Gradients accumulate to `batch_size`.
        precision: "bf16" computes in bfloat16 by autocast; weights and moments are float32 either way.
        parallel: what several processes do: "ddp" copies the model, "fsdp" shards it (FSDP2).
        context_parallel: how many neighboring processes share the tokens of each sample (Ulysses). The samples are
            divided among such groups. It must divide the number of processes, the model's heads, and the tokens.
        device: "auto", which takes a GPU if there is one, or "cpu".
        seed: the seed of new weights, batches, noise, and noise levels.
        deterministic: make torch take deterministic kernels, so that a resumed run repeats to the last bit on a GPU
            too. That needs CUBLAS_WORKSPACE_CONFIG=:4096:8 in the environment.
        tracker: where the curves go besides `metrics.jsonl`.
        export_formats: other projects' formats that `export_checkpoint` also writes.
    """

    model: ModelSettings
    sparsity: SparsitySettings
    data: DataSettings
    output: Path = Path("foveal-run")
    resume: bool = False
    steps: int = 2000
    batch_size: int = 64
    micro_batch_size: int = 1
    objective: ObjectiveSettings = field(default_factory=ObjectiveSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    lora: LoraSettings = field(default_factory=LoraSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    faults: FaultSettings = field(default_factory=FaultSettings)
    precision: Literal["bf16", "no"] = "bf16"
    parallel: Literal["ddp", "fsdp"] = "ddp"
    context_parallel: int = 1
    device: Literal["auto", "cpu"] = "auto"
    seed: int = 0
    deterministic: bool = False
    tracker: Literal["tensorboard", "wandb", "trackio", "none"] = "tensorboard"
    export_formats: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "micro_batch_size", "context_parallel"):
            check_positive_int(name, getattr(self, name))
        check_choice("precision", self.precision, PRECISIONS)
        check_choice("parallel", self.parallel, PARALLEL)
        check_choice("device", self.device, ("auto", "cpu"))
        check_choice("tracker", self.tracker, TRACKERS)
        for name in self.export_formats:
            check_choice("export_formats", name, tuple(FORMATS))
        if self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"batch_size must be a multiple of micro_batch_size, got {self.batch_size} and {self.micro_batch_size}"
            )
        trainable = self.optimizer.trainable
        if trainable in ("new", "lora") and not self.sparsity.is_sparse:
            raise ValueError(f"optimizer.trainable={trainable!r} needs sparsity.attention")
        if trainable == "lora" and self.model.path is None:
            raise ValueError('optimizer.trainable="lora" needs model.path: adapters of random weights are of no use')
        if self.objective.distillation and not self.sparsity.is_sparse:
            raise ValueError("objective.distillation needs sparsity.attention: a dense student is its own teacher")
        if self.objective.distillation and self.objective.teacher == "same" and trainable not in ("new", "lora"):
            raise ValueError(
                'objective.teacher="same" needs frozen weights, optimizer.trainable "new" or "lora", '
                f'got {trainable!r}; teacher="copy" keeps a copy of the weights'
            )
        if self.model.compile and self.sparsity.annealing is not None:
            raise ValueError("model.compile and sparsity.annealing exclude each other: each change would compile anew")
        if self.objective.first_frame and self.context_parallel > 1:
            raise ValueError(
                "objective.first_frame and context_parallel exclude each other, because timesteps of tokens are not "
                f"divided among processes; got {self.objective.first_frame} and {self.context_parallel}"
            )
        if self.parallel == "fsdp" and self.model.frozen_dtype != "float32" and not shards_mixed_dtypes():
            raise ValueError(
                f'parallel="fsdp" shards weights of one dtype with PyTorch {torch.__version__}: '
                'set model.frozen_dtype to "float32", or take PyTorch 2.9'
            )
        if self.parallel == "fsdp" and self.optimizer.name == "adamw8bit":
            raise ValueError('optimizer.name="adamw8bit" works only with parallel="ddp"')

    def replace(self, **changes: Any) -> TrainingConfig:
        """A copy with some fields changed, validated again."""
        return dataclasses.replace(self, **changes)

    def output_folder(self) -> OutputFolder:
        """The output folder, for files of `foveal train`."""
        return OutputFolder(self.output, "train")

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON-ready values, for people to read and to compare."""
        return _plain(dataclasses.asdict(self))


def shards_mixed_dtypes() -> bool:
    """Whether FSDP2 shards frozen weights of another dtype beside those that are trained."""
    major, minor = torch.__version__.split(".")[:2]
    return (int(major), int(minor)) >= (2, 9)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def differences(former: dict[str, Any], current: dict[str, Any], prefix: str = "") -> list[str]:
    """One line for each setting that two `to_dict`s do not share: "optimizer.learning_rate: 1e-05 -> 2e-05"."""
    lines = []
    for name in dict.fromkeys([*former, *current]):
        old, new = former.get(name), current.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            lines += differences(old, new, f"{prefix}{name}.")
        elif old != new:
            lines.append(f"{prefix}{name}: {old} -> {new}")
    return lines
