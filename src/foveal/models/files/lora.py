"""LoRA files of Wan and MiniMax-H3: read and check them, load them through diffusers, and write them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from foveal.models.files.formats import from_diffusers
from foveal.models.files.tensor_files import enumerated

if TYPE_CHECKING:
    from foveal.models.files.formats import CheckpointFormat

PREFIX = "transformer"
# What names of MiniMax-H3's modules in diffusers start with, and those of its own repository do not.
H3_NAMES = ("transformer_blocks.", "token_refiner.refiner_blocks.")


def read_adapter(
    transformer: nn.Module, tensors: dict[str, Tensor], source: str, family: str, alpha: str | None = None
) -> dict[str, Tensor]:
    """Read the low-rank updates in a LoRA file, name them as diffusers does, and check them against the model.

    Args:
        tensors: names without a prefix: modules as the family's own repository or diffusers names them, `lora_A` and
            `lora_B` or `lora_down` and `lora_up`, `.alpha`, `.diff_b` (a bias's update).
        source: the file, for messages.
        family: whose LoRA it is, a key of `CONVERSIONS`.
        alpha: the file's header entry of this name. Only MiniMax-H3's files have it, and diffusers heeds it only there.

    Returns:
        "transformer.module.lora_A.weight" and so on, scaled by alpha / rank.

    Raises:
        ValueError: an update lacks its other half, belongs to no linear layer of the model, or has another shape, or
            diffusers has no place for a key.
    """
    try:
        adapter = CONVERSIONS[family](tensors, source, alpha)
    except (KeyError, IndexError, AttributeError) as error:
        raise ValueError(f"{source} is no LoRA of family {family!r} that diffusers can read: {error!r}") from None
    _check_adapter(transformer, adapter, source)
    return adapter


def _of_wan(tensors: dict[str, Tensor], source: str, alpha: str | None) -> dict[str, Tensor]:
    from diffusers.loaders import WanLoraLoaderMixin

    tensors = {name.replace(".default.", ".").removeprefix(f"{PREFIX}."): x for name, x in tensors.items()}
    # diffusers silently skips updates of norms. Those in use are zeros; others would be lost.
    norms = [name for name in tensors if "norm" in name and name.endswith((".diff", ".diff_b"))]
    nonzero = [name for name in norms if tensors[name].count_nonzero()]
    if nonzero:
        raise ValueError(f"{source} updates norms, which diffusers cannot load: {enumerated(nonzero)}")
    tensors = {name: tensor for name, tensor in tensors.items() if name not in norms}
    theirs = any(".attn1." in name or ".attn2." in name or "condition_embedder." in name for name in tensors)
    prefix = PREFIX if theirs else "diffusion_model"
    try:
        adapter = WanLoraLoaderMixin.lora_state_dict({f"{prefix}.{name}": x for name, x in tensors.items()})
    except ValueError as error:
        raise ValueError(f"{source} is no LoRA of family 'wan' that diffusers can read: {error!r}") from None
    kept = sum(not name.endswith(".alpha") for name in tensors)
    if len(adapter) != kept:
        raise ValueError(f"{source}: of {kept} updates, diffusers has names for only {len(adapter)}")
    return adapter


def _of_minimax_h3(tensors: dict[str, Tensor], source: str, alpha: str | None) -> dict[str, Tensor]:
    """Names as in diffusers or in MiniMax's repository, whose `qkv_proj` becomes three updates."""
    from diffusers.loaders import MiniMaxH3LoraLoaderMixin

    tensors = {name.removeprefix(f"{PREFIX}."): x for name, x in tensors.items()}
    if any(name.startswith(H3_NAMES) for name in tensors):
        adapter = {f"{PREFIX}.{name.replace('.default.', '.')}": x for name, x in tensors.items()}
    else:
        # diffusers leaves no name out here: it raises.
        try:
            adapter = MiniMaxH3LoraLoaderMixin.lora_state_dict(dict(tensors))
        except ValueError as error:
            raise ValueError(f"{source} is no LoRA of family 'minimax_h3' that diffusers can read: {error}") from None
    if alpha is None or any(name.endswith(".alpha") for name in tensors):
        return adapter
    try:
        total = float(alpha)
    except ValueError:
        raise ValueError(f"{source} must have a number as alpha in its header, got {alpha!r}") from None
    ranks = {name: x.shape[1] for name, x in adapter.items() if name.endswith(".lora_B.weight")}
    return {name: x * (total / ranks[name]) if name in ranks else x for name, x in adapter.items()}


CONVERSIONS = {"wan": _of_wan, "minimax_h3": _of_minimax_h3}


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

    In diffusers' layout it is `transformer.transformer_blocks.0.attn.to_q.lora_A.weight` and so on. A scale other than
    1 goes into the second factor, because diffusers reads an alpha only for some layers.

    Raises:
        ValueError: the model has no adapter, or several.
    """
    names = list(getattr(transformer, "peft_config", {}))
    if len(names) != 1:
        raise ValueError(f"format {target.name!r} holds one LoRA adapter, got a model with {names or 'none'}")
    prefix, *parts = (
        (PREFIX, "lora_A.weight", "lora_B.weight", "lora_B.bias")
        if target.layout == "diffusers"
        else ("diffusion_model", "lora_down.weight", "lora_up.weight", "diff_b")
    )
    tensors = {}
    layers = {name: layer for name, layer in transformer.named_modules() if names[0] in getattr(layer, "lora_A", {})}
    files = from_diffusers([f"{name}.weight" for name in layers], target.layout, num_layers)
    for name, layer in layers.items():
        key = f"{prefix}.{files[f'{name}.weight'].removesuffix('.weight')}"
        scale = layer.scaling[names[0]]
        up = layer.lora_B[names[0]]
        with torch.no_grad():
            tensors[f"{key}.{parts[0]}"] = layer.lora_A[names[0]].weight
            tensors[f"{key}.{parts[1]}"] = up.weight * scale
            if up.bias is not None:
                tensors[f"{key}.{parts[2]}"] = up.bias * scale
    return tensors
