"""LoRA files of a Wan transformer: read and check them, load them through diffusers, write Wan-repository names."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from foveal.models.files.formats import from_diffusers
from foveal.models.files.tensor_files import enumerated

if TYPE_CHECKING:
    from foveal.models.files.formats import CheckpointFormat

PREFIX = "transformer"


def read_adapter(transformer: nn.Module, tensors: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    """Read the low-rank updates in a LoRA file, name them as diffusers does, and check them against the model.

    Args:
        tensors: names without a prefix: Wan-repository or diffusers modules, `lora_A` and `lora_B` or `lora_down` and
            `lora_up`, `.alpha`, `.diff_b` (a bias's update).
        source: the file, for messages.

    Returns:
        "transformer.module.lora_A.weight" and so on, scaled by alpha / rank.

    Raises:
        ValueError: an update lacks its other half, belongs to no linear layer of the model, or has another shape, or
            diffusers has no place for a key.
    """
    tensors = {name.replace(".default.", "."): tensor for name, tensor in tensors.items()}
    # diffusers silently skips updates of norms. Those in use are zeros; others would be lost.
    norms = [name for name in tensors if "norm" in name and name.endswith((".diff", ".diff_b"))]
    nonzero = [name for name in norms if tensors[name].count_nonzero()]
    if nonzero:
        raise ValueError(f"{source} updates norms, which diffusers cannot load: {enumerated(nonzero)}")
    tensors = {name: tensor for name, tensor in tensors.items() if name not in norms}
    adapter = _to_diffusers(tensors, source)
    kept = sum(not name.endswith(".alpha") for name in tensors)
    if len(adapter) != kept:
        raise ValueError(f"{source}: of {kept} updates, diffusers has names for only {len(adapter)}")
    _check_adapter(transformer, adapter, source)
    return adapter


def _to_diffusers(tensors: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    from diffusers.loaders import WanLoraLoaderMixin

    names = {name.removeprefix(f"{PREFIX}."): name for name in tensors}
    theirs = any(".attn1." in name or ".attn2." in name or "condition_embedder." in name for name in names)
    prefix = PREFIX if theirs else "diffusion_model"
    try:
        return WanLoraLoaderMixin.lora_state_dict({f"{prefix}.{name}": tensors[given] for name, given in names.items()})
    except (KeyError, ValueError, IndexError, AttributeError) as error:
        raise ValueError(f"{source} is no LoRA of a Wan transformer that diffusers can read: {error!r}") from None


def _check_adapter(transformer: nn.Module, adapter: dict[str, Tensor], source: str) -> None:
    modules = dict(transformer.named_modules())
    updates: dict[str, dict[str, Tensor]] = {}
    for name, tensor in adapter.items():
        module, found, part = name.removeprefix(f"{PREFIX}.").rpartition(".lora_")
        if not found or part not in ("A.weight", "B.weight", "B.bias"):
            raise ValueError(f"{source} has unexpected {name}; expected pairs of lora_A and lora_B")
        updates.setdefault(module, {})[part] = tensor
    for module, parts in updates.items():
        layer = modules.get(module)
        if not isinstance(layer, nn.Linear):
            raise ValueError(f"{source} updates {module}, which is no linear layer of the model: another model size?")
        down, up = parts.get("A.weight"), parts.get("B.weight")
        if down is None or up is None:
            raise ValueError(f"{source} has only one of lora_A and lora_B for {module}")
        rank = down.shape[0]
        if tuple(down.shape) != (rank, layer.in_features) or tuple(up.shape) != (layer.out_features, rank):
            raise ValueError(
                f"{source} does not fit the model: {module} has lora_A {tuple(down.shape)} and lora_B "
                f"{tuple(up.shape)}, expected {(rank, layer.in_features)} and {(layer.out_features, rank)}"
            )


def load_adapter(transformer: nn.Module, adapter: dict[str, Tensor], name: str) -> None:
    """Add what `read_adapter` returned to a model through diffusers and peft, under this name, and enable it.

    Raises:
        ImportError: peft is not installed.
        ValueError: the model has an adapter with this name.
    """
    transformer.load_lora_adapter(dict(adapter), prefix=PREFIX, adapter_name=name)


def export_adapter(transformer: nn.Module, target: CheckpointFormat, num_layers: int) -> dict[str, Tensor]:
    """The only adapter of a model as `diffusion_model.blocks.0.self_attn.q.lora_down.weight` and so on.

    A scale other than 1 goes into `lora_up`, because diffusers reads an alpha only for some layers.

    Raises:
        ValueError: the model has no adapter, or several.
    """
    names = list(getattr(transformer, "peft_config", {}))
    if len(names) != 1:
        raise ValueError(f"format {target.name!r} holds one LoRA adapter, got a model with {names or 'none'}")
    tensors = {}
    layers = {name: layer for name, layer in transformer.named_modules() if names[0] in getattr(layer, "lora_A", {})}
    files = from_diffusers([f"{name}.weight" for name in layers], target.layout, num_layers)
    for name, layer in layers.items():
        key = f"diffusion_model.{files[f'{name}.weight'].removesuffix('.weight')}"
        scale = layer.scaling[names[0]]
        up = layer.lora_B[names[0]]
        with torch.no_grad():
            tensors[f"{key}.lora_down.weight"] = layer.lora_A[names[0]].weight
            tensors[f"{key}.lora_up.weight"] = up.weight * scale
            if up.bias is not None:
                tensors[f"{key}.diff_b"] = up.bias * scale
    return tensors
