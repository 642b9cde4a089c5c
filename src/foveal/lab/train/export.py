"""From a checkpoint to what others load: the model's weights, the sparse attention, the adapter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import nn

from foveal.lab.train.checkpoint import Checkpoint, restore
from foveal.lab.train.config import TrainingConfig
from foveal.lab.train.model import anneal, build_model, policy_component, trained_parameters
from foveal.models import densify, save
from foveal.models.families.table import family_of
from foveal.models.files.checkpoints import export_checkpoint
from foveal.models.files.persist import MANIFEST_FILE, WEIGHTS_FILE
from foveal.models.policy import attach_policy
from foveal.models.processor import sparse_processors

FOLDER = "export"


def export(config: TrainingConfig, checkpoint: Checkpoint, *, report: Callable[[str], None] = print) -> Path:
    """Write the model of a checkpoint, or its average if there is one. It replaces an earlier export.

    The folder `export` in the output gets `sparse`, for `foveal.load`; `lora`, for a pipeline's `load_lora_weights`,
    where adapters were trained; `transformer`, for `from_pretrained`, unless the model's own weights are those that it
    started from; and a file for each of `export_formats`.

    Args:
        config: the run's configuration.
        checkpoint: a checkpoint of the run.
        report: called with a line for each format that cannot express this model.

    Returns:
        The folder.

    Raises:
        FileExistsError: a name that is needed is taken by a file that foveal did not write, or that was changed since.
    """
    model = build_model(config)
    average = checkpoint.state["average"] is not None
    restore(trained_parameters(model), checkpoint.tensors("ema" if average else "model"), str(checkpoint.folder))
    if config.sparsity.annealing is not None:
        anneal(model, config.sparsity.attention, config.sparsity.annealing, max(1, checkpoint.step))
    if config.sparsity.policy is not None:
        attach_policy(model, policy_component(config).policy)
    with config.output_folder().renewing(below=FOLDER, last=_names(config)[0]) as new:
        _write(config, model, new, report)
    return config.output / FOLDER


def export_files(config: TrainingConfig) -> list[str]:
    """The files that `export` writes into the output. A large model has several weight files instead of one."""
    return [f"{FOLDER}/{name}" for name in _names(config)]


def _names(config: TrainingConfig) -> list[str]:
    """The files of an export, starting with the one that readers look for."""
    trained = _has_own_weights(config)
    sparse = [f"sparse/{name}" for name in (WEIGHTS_FILE, MANIFEST_FILE)] if config.sparsity.is_sparse else []
    model = ["transformer/config.json", "transformer/diffusion_pytorch_model.safetensors"] if trained else []
    lora = ["lora/pytorch_lora_weights.safetensors"] if config.optimizer.trainable == "lora" else []
    return [*sparse, *model, *lora, *(f"{name}.safetensors" for name in config.export_formats)]


def _has_own_weights(config: TrainingConfig) -> bool:
    return config.optimizer.trainable in ("all", "attention") or config.model.path is None


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
    if _has_own_weights(config):
        # The sparse parameters have a file of their own; beside the model's they would be unknown weights.
        densify(model).save_pretrained(folder / "transformer")


def _save_lora(model: nn.Module, folder: Path) -> None:
    import diffusers
    from peft import get_peft_model_state_dict

    getattr(diffusers, family_of(model).training.lora_loader).save_lora_weights(
        folder,
        transformer_lora_layers=get_peft_model_state_dict(model),
        # Without it, alpha would be taken for the rank.
        transformer_lora_adapter_metadata=model.peft_config["default"].to_dict(),
    )
