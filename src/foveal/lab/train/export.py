"""From a checkpoint to what others load: the model's weights, the sparse attention, the adapter."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from torch import nn

from foveal.lab.train.checkpoint import Checkpoint, restore
from foveal.lab.train.config import TrainingConfig
from foveal.lab.train.model import anneal, build_model, trained_parameters
from foveal.models import densify, save
from foveal.models.files.checkpoints import export_checkpoint
from foveal.models.processor import sparse_processors


def export(
    config: TrainingConfig, checkpoint: Checkpoint, folder: Path, *, report: Callable[[str], None] = print
) -> Path:
    """Writes the model of a checkpoint, its average where there is one, replacing a former export as a whole.

    Args:
        config: of the run.
        checkpoint: of the run.
        folder: gets `sparse`, for `foveal.load`; `lora`, for a pipeline's `load_lora_weights`, where adapters were
            trained; `transformer`, for `from_pretrained`, unless the model's own weights are those it started from;
            and a file for each of `export_formats`.
        report: called with a line for each of those that cannot express this model.

    Returns:
        The folder.
    """
    model = build_model(config)
    average = checkpoint.state["average"] is not None
    restore(trained_parameters(model), checkpoint.tensors("ema" if average else "model"), str(checkpoint.folder))
    if config.sparsity.annealing is not None:
        anneal(model, config.sparsity.attention, config.sparsity.annealing, max(1, checkpoint.step))
    folder = Path(folder)
    aside = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        _write(config, model, aside, report)
        if folder.exists():
            shutil.rmtree(folder)
        os.rename(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder


def _write(config: TrainingConfig, model: nn.Module, folder: Path, report: Callable[[str], None]) -> None:
    if sparse_processors(model):
        save(model, folder / "sparse")
    if config.optimizer.trainable == "lora":
        _save_lora(model, folder / "lora")
    for name in config.export_formats:
        try:
            export_checkpoint(model, folder / f"{name}.safetensors", format=name)
        except ValueError as error:
            report(f"no export as {name}: {error}")
    if config.optimizer.trainable in ("all", "attention") or config.model.path is None:
        # The sparse parameters have a file of their own; beside the model's they would be unknown weights.
        densify(model).save_pretrained(folder / "transformer")


def _save_lora(model: nn.Module, folder: Path) -> None:
    from diffusers import WanPipeline
    from peft import get_peft_model_state_dict

    WanPipeline.save_lora_weights(
        folder,
        transformer_lora_layers=get_peft_model_state_dict(model),
        # Without it, alpha would be taken for the rank.
        transformer_lora_adapter_metadata=model.peft_config["default"].to_dict(),
    )
