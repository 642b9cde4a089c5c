"""The parts of a checkpoint of Wan or MiniMax-H3, or of what `foveal train` exports, for a host that builds the model
itself."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from foveal.methods.base import Config, method_of
from foveal.models.files.checkpoints import choose_format, configuration, file_header, translated
from foveal.models.files.exports import LORA_FILE, WEIGHTS
from foveal.models.files.formats import CheckpointFormat, from_diffusers, without_prefix
from foveal.models.files.h3_names import native_lora
from foveal.models.files.manifest import parse_component
from foveal.models.files.persist import read_saved
from foveal.models.files.tensor_files import TensorFile, enumerated, open_tensors
from foveal.models.policy import Policy

PATCH_EMBEDDING = "patch_embedding.weight"
PATCH = (1, 2, 2)
FAMILIES = ("wan", "minimax_h3")


@dataclass(frozen=True)
class SparseParameters:
    """The sparse parameters of a checkpoint, on the CPU, in the file's dtypes.

    Args:
        path: the path of the file or folder.
        format: the name of its format, one of `FORMATS`, or "foveal" for what `save` wrote.
        source: who writes that format.
        configs: what the layers run with, in order of depth; None for a dense one.
        from_file: whether the file said so; otherwise it is what the released weights were made with.
        layers: for each layer the parameters of the method's module by name.
        family: of the model, one of `FAMILIES`.
        in_model: the host's model has the gates itself, as ComfyUI's MiniMax-H3 has FastH3's; `layers` are then empty.
    """

    path: str
    format: str
    source: str
    configs: tuple[Config | None, ...]
    from_file: bool
    layers: tuple[dict[str, Tensor], ...]
    family: str = "wan"
    in_model: bool = False

    def following(self, *, keep_ratio: float) -> SparseParameters:
        """The same with another share of the blocks or cubes in every sparse layer."""
        configs = (config and method_of(config).follow(config, keep_ratio=keep_ratio) for config in self.configs)
        return replace(self, configs=tuple(configs))

    def __str__(self) -> str:
        origin = "said by the file" if self.from_file else f"as {self.source}'s weights were made"
        counts = Counter(config for config in self.configs if config is not None)
        kinds = (f"{method_of(config).name} in {count} layers: {config}" for config, count in counts.items())
        return f"parameters of {len(self.layers)} layers; {'; '.join(kinds)}, {origin}"


def read_sparse_parameters(
    path: str | os.PathLike[str], *, format: str | None = None, **changes: Any
) -> SparseParameters:
    """The sparse parameters of a file or folder that `load_checkpoint` reads, for a model of one of `FAMILIES`.

    Args:
        path, format, changes: as `load_checkpoint` takes them.

    Raises:
        FileNotFoundError: no such file, or missing shards.
        ValueError: a file that is corrupt, of no known format, or for another family; a LoRA, which has no sparse
            parameters; layers that lack some; a change of a field that is unknown or fixed.
    """
    with _opened(path, format) as (file, names, header, found):
        indices = _layer_indices(names, found)
        lacking = [
            key.format(index=index)
            for index in range(max(indices) + 1)
            for key in found.sparse_keys.values()
            if key.format(index=index) not in names
        ]
        if lacking:
            raise ValueError(f"{path} lacks {enumerated(lacking)}")
        layers = tuple(
            {name: file.read(names[key.format(index=index)]) for name, key in found.sparse_keys.items()}
            for index in sorted(indices)
        )
    width = next(iter(layers[0].values())).shape[-1]
    config = configuration(found, header, None, width, changes)
    configs, (family,) = (config,) * len(layers), set(FAMILIES) & set(found.families)
    return SparseParameters(str(path), found.name, found.source, configs, header is not None, layers, family)


def read_saved_parameters(
    folder: str | os.PathLike[str], component: str = "transformer"
) -> tuple[SparseParameters, Policy | None]:
    """What `save` wrote for a model, and the policy that was saved with it, for its layers by their indices.

    Args:
        folder: what `save` wrote.
        component: of a pipeline, "transformer" or "transformer_2".

    Raises:
        FileNotFoundError: the folder, or what `save` writes, is not there.
        ValueError: the files are corrupt or do not agree, have no such component, or are for another family.
    """
    manifest, tensors = read_saved(Path(folder))
    components = manifest["components"]
    if component not in components:
        raise ValueError(f"component must be {' or '.join(components)}, which {folder} has, got {component!r}")
    family, configs, policy = parse_component(component, components[component])
    if family not in FAMILIES:
        raise ValueError(f"{folder} is for models of family {family}, expected {' or '.join(FAMILIES)}")
    names = list(components[component].get("model", {}).get("self_attention", configs))
    layers = []
    for name in names:
        prefix = f"{component}.{name}."
        layers.append({key.removeprefix(prefix): x for key, x in tensors.items() if key.startswith(prefix)})
    if policy is not None:
        dense = tuple(names.index(layer) if layer in names else layer for layer in policy.dense_layers)
        policy = replace(policy, dense_layers=dense)
    in_order = tuple(configs.get(name) for name in names)
    return SparseParameters(str(folder), "foveal", "foveal", in_order, True, tuple(layers), family), policy


def read_exported_lora(
    folder: str | os.PathLike[str], num_layers: int, family: str = "wan"
) -> dict[str, Tensor] | None:
    """The LoRA that `foveal train` exported, by the names of the model's own repository; None without one.

    Args:
        folder: the export.
        num_layers: of the model.
        family: of the model, one of `FAMILIES`.

    Returns:
        "diffusion_model.blocks.0.self_attn.q.lora_down.weight" and so on, as ComfyUI and others read it. A scale other
        than 1 is in the second factor.

    Raises:
        ValueError: the file has updates of what the repository has no names for, or is of another kind of LoRA.
        ImportError: diffusers, which knows what its names mean, is not installed.
    """
    path = Path(folder) / "lora" / LORA_FILE
    if not path.is_file():
        return None
    updates = _scaled_updates(path)
    if family == "minimax_h3":
        updates = native_lora(updates, num_layers)
    else:
        known = from_diffusers([f"{name}.weight" for name in sorted(updates)], family, num_layers)
        updates = {known[f"{name}.weight"].removesuffix(".weight"): pair for name, pair in updates.items()}
    return {
        f"diffusion_model.{name}.{part}.weight": x
        for name, pair in updates.items()
        for part, x in zip(("lora_down", "lora_up"), pair, strict=True)
    }


def _scaled_updates(path: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """By layer, the factors A and B of a LoRA's B A, its scale in the second."""
    with open_tensors(path) as file:
        names = {name.removeprefix("transformer."): name for name in file.shapes}
        described = json.loads(file.metadata.get("lora_adapter_metadata", "{}"))
        values = {short: file.read(name) for short, name in names.items()}
    settings = {name.removeprefix("transformer."): value for name, value in described.items()}
    special = [name for name in ("use_rslora", "use_dora", "alpha_pattern", "rank_pattern") if settings.get(name)]
    if special:
        raise ValueError(f"{path} has {enumerated(special)}, which ComfyUI's names have no place for; merge it instead")
    owners = {name.rpartition(".lora_")[0] for name in values}
    pairs = {name: (f"{name}.lora_A.weight", f"{name}.lora_B.weight") for name in sorted(owners)}
    odd = values.keys() ^ {name for pair in pairs.values() for name in pair}
    if odd:
        raise ValueError(f"{path} has {enumerated(sorted(odd))}, expected pairs of lora_A.weight and lora_B.weight")
    updates = {}
    for name, (first, second) in pairs.items():
        rank = values[first].shape[0]
        updates[name] = values[first], values[second] * (settings.get("lora_alpha", rank) / settings.get("r", rank))
    return updates


def read_base_weights(path: str | os.PathLike[str], *, format: str | None = None) -> dict[str, Tensor]:
    """The other weights of such a file by their names in the Wan repository, on the CPU, in the file's dtypes.

    int8 weights are dequantized, and a patch embedding stored as a matrix becomes a convolution's.

    Raises:
        FileNotFoundError, ValueError: as `read_sparse_parameters`; also for a file without them, and for names that the
            Wan repository does not have.
        ImportError: the file has diffusers' names, and diffusers, which knows what they mean, is not installed.
    """
    with _opened(path, format, ("wan",)) as (file, names, _, found):
        sparse = {key.format(index=i) for key in found.sparse_keys.values() for i in _layer_indices(names, found)}
        base = [name for name in names if name not in sparse]
        if not base:
            raise ValueError(f"{path} has only sparse parameters; load the model from its own file")
        renamed = {name: name for name in base}
        if found.layout == "diffusers":
            renamed = from_diffusers(base, "wan", max(_layer_indices(names, found)) + 1)
        weights = {renamed[name]: file.read(names[name]) for name in base}
    patches = weights.get(PATCH_EMBEDDING)
    if patches is not None and patches.dim() == 2:
        weights[PATCH_EMBEDDING] = patches.unflatten(1, (-1, *PATCH))
    return weights


def read_exported_weights(folder: str | os.PathLike[str], num_layers: int, family: str = "wan") -> dict[str, Tensor]:
    """The weights that `foveal train` exported for a Wan model, named as by `read_base_weights`.

    Args:
        folder: the export, which has them.
        num_layers: of the model.
        family: of the model.

    Raises:
        ValueError: as `read_base_weights`; for another family than "wan", which `export_checkpoint` writes.
        ImportError: as `read_base_weights`.
    """
    if family != "wan":
        raise ValueError(
            f"{folder} has weights of its own of family {family}: write them with foveal.export_checkpoint, load that "
            "file with ComfyUI's own node, and remove the folder transformer from the export"
        )
    with open_tensors(Path(folder) / WEIGHTS) as file:
        renamed = from_diffusers(file.shapes, "wan", num_layers)
        return {target: file.read(name) for name, target in renamed.items()}


@contextmanager
def _opened(
    path: str | os.PathLike[str], format: str | None, families: tuple[str, ...] = FAMILIES
) -> Iterator[tuple[TensorFile, dict[str, str], dict[str, Any] | None, CheckpointFormat]]:
    with open_tensors(path) as stored:
        file, _ = translated(stored)
        names, header = without_prefix(file.shapes), file_header(file)
        found = choose_format(file, names, header, format)
        if not set(families) & set(found.families):
            known = " or ".join(families)
            raise ValueError(f"{path} is for models of family {' or '.join(found.families)}, expected {known}")
        if not found.sparse_keys or found.shared:
            raise ValueError(f"{path} is of format {found.name!r}, which has no sparse parameters of each layer")
        yield file, names, header, found


def _layer_indices(names: dict[str, str], found: CheckpointFormat) -> set[int]:
    patterns = [re.compile(re.escape(key).replace(r"\{index\}", r"(\d+)")) for key in found.sparse_keys.values()]
    matches = (pattern.fullmatch(name) for name in names for pattern in patterns)
    return {int(match[1]) for match in matches if match}
