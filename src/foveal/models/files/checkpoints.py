"""`load_checkpoint` and `export_checkpoint`: sparse weights of other projects, in their own files.

    print(load_checkpoint(pipeline, "TurboWan2.1-T2V-1.3B-480P.pth"))

The formats are those of `foveal.models.files.formats.FORMATS`. What a file does not say, ratios and block
sizes above all, is what the released weights were trained with, and the report lists it. A safetensors file that
`export_checkpoint` wrote says it in its header.
"""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from foveal.methods.base import Config, config_from_dict, method_of
from foveal.models.families.table import components_of, family_of
from foveal.models.files.contracts import Contract, read_contract
from foveal.models.files.formats import (
    CheckpointFormat,
    format_named,
    from_diffusers,
    recognized,
    without_prefix,
)
from foveal.models.files.h3_names import is_native, native, renamed
from foveal.models.files.loading import PATCH_EMBEDDING, loader
from foveal.models.files.lora import export_adapter
from foveal.models.files.manifest import check_model, model_entry
from foveal.models.files.quantized import dequantized
from foveal.models.files.simpletuner import read_settings
from foveal.models.files.tensor_files import TensorFile, enumerated, open_tensors, write_tensors
from foveal.models.processor import sparse_processors

HEADER_KEY = "foveal_checkpoint"


@dataclass(frozen=True)
class CheckpointReport:
    """What `load_checkpoint` did; `print` it.

    Args:
        path: the file or folder.
        format: name of its format.
        source: who writes that format.
        config: the configuration of every self-attention layer now.
        layers: how many there are.
        sparse_tensors: how many tensors of the sparse attention were loaded.
        base_tensors: how many of the rest of the model, or of a LoRA; 0 for a file without.
        from_file: whether the file said its configuration; otherwise it is the released weights'.
        changes: what the caller changed in it.
        notes: what else is good to know.
    """

    path: str
    format: str
    source: str
    config: Config
    layers: int
    sparse_tensors: int
    base_tensors: int
    from_file: bool
    changes: dict[str, Any]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        origin = (
            "said by the file" if self.from_file else f"not in the file: what {self.source}'s weights were made with"
        )
        if self.changes:
            origin += "; changed: " + ", ".join(f"{name}={value!r}" for name, value in self.changes.items())
        lines = [
            f"{self.path}: {self.format}",
            f"  {method_of(self.config).name} in {self.layers} layers: {self.config}",
            f"  {origin}",
            f"  loaded {self.sparse_tensors} sparse and {self.base_tensors} other tensors",
        ]
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])


def load_checkpoint(
    model: Any, path: str | os.PathLike[str], *, format: str | None = None, impl: str = "auto", **changes: Any
) -> CheckpointReport:
    """Loads a released sparse checkpoint into a dense model: makes it sparse as trained, and loads every weight.

    A file with the whole model replaces the base weights too; one with only the sparse parameters leaves them. A LoRA
    is loaded by diffusers as an adapter (`fuse_lora` merges it). Values take the model's dtype, but for SLA's
    projection, which stays float32; TurboDiffusion's int8 weights are dequantized.

    Args:
        model: a dense transformer of the size that the file is for, or a pipeline with one transformer.
        path: a safetensors file, a `.pth` state dict, or a folder of safetensors, with an index if in shards; of a
            pipeline's folder, its transformer's.
        format: a name in `FORMATS`; None recognizes it. Needed for a LoRA and for plain weights, which do not
            say what they were trained for.
        impl: see `block_sparse_attention`.
        changes: fields of the configuration to change, as in `keep_ratio=0.15`, or in `topk=125` instead of a ratio;
            those that the format stands for (its `fixed`) are not among them.

    Returns:
        What was done. The model is unchanged if anything below is raised. A load that is interrupted while it copies
        leaves some base weights of the file behind.

    Raises:
        FileNotFoundError: no such file, or missing shards.
        TypeError: an unsupported model, or a change of the wrong type.
        ValueError: a file that is corrupt, of no known format, or for a model of another size; missing, extra or
            misshapen tensors, by name; a model that is sparse already or offloaded; a change of a field that is
            unknown or fixed.
    """
    transformer = _only_transformer(model)
    if sparse_processors(transformer):
        raise ValueError("model is sparse already; load_checkpoint takes a dense one, call densify first")
    with open_tensors(path) as stored:
        file, about_file = translated(stored)
        names = without_prefix(file.shapes)
        header = file_header(file)
        found = choose_format(file, names, header, format)
        if family_of(transformer).name not in found.families:
            families = " or ".join(map(repr, found.families))
            raise ValueError(f"{path} is for models of family {families}, got one of {family_of(transformer).name!r}")
        if header is not None and header["model"] is not None:
            check_model(str(path), transformer, header["model"])
        contract = None
        if header is None:
            contract = read_contract(Path(path)) if found.contract else read_settings(file.metadata, str(path))
        config = configuration(found, header, contract, _hidden_dim(transformer), changes)
        sparse_tensors, base_tensors, notes = loader(found)(transformer, file, names, found, config, impl)
    notes = (*notes, *about_file)
    if contract is not None:
        notes = (*notes, *contract.notes)
    if header is None and not (found.contract and contract is not None):
        notes = (*notes, *found.notes)
    return CheckpointReport(
        path=str(path),
        format=found.name,
        source=found.source,
        config=config,
        layers=len(sparse_processors(transformer)),
        sparse_tensors=sparse_tensors,
        base_tensors=base_tensors,
        from_file=header is not None or contract is not None,
        changes=changes,
        notes=notes,
    )


def check_checkpoint(path: str | os.PathLike[str]) -> None:
    """Whether `load_checkpoint` recognizes a file or folder, only from its names, without a model.

    Raises:
        FileNotFoundError: no such file, or missing shards.
        ValueError: a file that is corrupt or of no known format.
    """
    with open_tensors(path) as stored:
        file, _ = translated(stored)
        choose_format(file, without_prefix(file.shapes), file_header(file), None)


def export_checkpoint(model: Any, path: str | os.PathLike[str], *, format: str) -> None:
    """Writes a sparse model as another project reads it: the whole transformer, or for a LoRA format its one adapter.

    The file is written aside and renamed. A safetensors file carries the configuration in its header, for
    `load_checkpoint`; a `.pth` file has no place for it. A policy (`set_policy`) is in neither. An existing
    file is replaced only if its header says that this function wrote it.

    Args:
        model: a transformer, or a pipeline with one, all of whose layers are sparse with one configuration.
        path: ends in `.safetensors`, `.pth` or `.pt`.
        format: a name in `FORMATS`.

    Raises:
        TypeError: an unsupported model.
        ValueError: an unknown format; a model that it cannot express: layers that are dense or differ, a field that the
            format fixes otherwise, weights that are offloaded, adapters that are not merged.
        FileExistsError: the file exists and does not say that this function wrote it.
    """
    transformer = _only_transformer(model)
    target = format_named(format)
    config = _exportable_config(transformer, target)
    layers = family_of(transformer).self_attention_layers(transformer)
    if target.updates:
        raise ValueError(f'format {target.name!r} needs the base weights that it updates; export "fasth3-vsa"')
    if target.plain:
        raise ValueError(f"format {target.name!r} is only read: nothing in it tells sparse attention; use save")
    if target.shared:
        raise ValueError(
            f"format {target.name!r} has one projection for all layers, and here each has its own; use save"
        )
    if target.lora:
        tensors = export_adapter(transformer, target, len(layers))
    else:
        tensors = _whole_model(transformer, target)
    offloaded = [name for name, tensor in tensors.items() if tensor.device.type == "meta"]
    if offloaded:
        raise ValueError(f"{enumerated(offloaded)} are on the meta device; export before offloading the model")
    header = {
        "format": target.name,
        "method": method_of(config).name,
        "config": config.to_dict(),
        "model": model_entry(transformer),
    }
    write_tensors(path, tensors, HEADER_KEY, json.dumps(header))


def translated(stored: TensorFile) -> tuple[TensorFile, tuple[str, ...]]:
    """A file as the formats have it, with plain weights and names that they know, and notes on what that took."""
    file, int8_layers = dequantized(stored)
    notes = (f"the int8 weights of {int8_layers} linear layers were dequantized",) if int8_layers else ()
    names = without_prefix(file.shapes)
    if is_native(names):
        return renamed(file, names), (*notes, "the names are those of MiniMax-H3's repository, as ComfyUI has them")
    return file, notes


def _only_transformer(model: Any) -> nn.Module:
    components = components_of(model)
    if len(components) > 1:
        raise ValueError(f"model has {' and '.join(components)}, a checkpoint is for one of them; pass that one")
    return next(iter(components.values()))


def file_header(file: TensorFile) -> dict[str, Any] | None:
    """What `export_checkpoint` wrote about a file, in its header; None without."""
    text = file.metadata.get(HEADER_KEY)
    if text is None:
        return None
    try:
        header = json.loads(text)
        config = config_from_dict(header["method"], header["config"])
        # Older files do not say which model they are for.
        return {"format": header["format"], "config": config, "model": header.get("model")}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"the header of {file.path} is malformed: {error!r}") from None


def choose_format(
    file: TensorFile, names: dict[str, str], header: dict[str, Any] | None, asked: str | None
) -> CheckpointFormat:
    """The format of a file with these names, the one that was asked for or the one that it is recognized as."""
    if "foveal" in file.metadata:
        raise ValueError(f"{file.path} was written by foveal.save; foveal.load reads it, with its folder")
    if asked is None:
        return recognized(names, str(file.path)) if header is None else format_named(header["format"])
    found = format_named(asked)
    if not found.matches(names):
        keys = [key.format(index=0) for key in found.sparse_keys.values()]
        what = "low-rank updates" if found.lora else next(iter(keys), "attention of such a model")
        raise ValueError(f"{file.path} is not of format {asked!r}: it has no {what}")
    return found


def _hidden_dim(transformer: nn.Module) -> int:
    family = family_of(transformer)
    return family.dimensions(next(iter(family.self_attention_layers(transformer).values())))[0]


def configuration(
    found: CheckpointFormat,
    header: dict[str, Any] | None,
    contract: Contract | None,
    hidden_dim: int,
    changes: dict[str, Any],
) -> Config:
    """What a file's weights run with: what its header, its contract, or else its format says, with the changes."""
    expected = found.config_for(hidden_dim)
    config = expected if header is None else header["config"]
    if contract is not None:
        expected = config = config.replace(**contract.fields)
    known = [field.name for field in dataclasses.fields(config)]
    unknown = [name for name in changes if name not in known]
    if unknown:
        raise ValueError(f"unknown {type(config).__name__} fields {unknown}; expected some of {known}")
    config = config.replace(**changes)
    _check_fixed(found, config, expected)
    return config


def _check_fixed(found: CheckpointFormat, config: Config, expected: Config) -> None:
    """Raises a ValueError unless a configuration is one that weights of this format were made with."""
    if type(config) is not type(expected):
        raise ValueError(f"format {found.name!r} is for {type(expected).__name__}, got {config}")
    for name in found.fixed:
        if getattr(config, name) != getattr(expected, name):
            raise ValueError(
                f"format {found.name!r} stands for {name}={getattr(expected, name)!r}, got {getattr(config, name)!r}"
            )


def _exportable_config(transformer: nn.Module, target: CheckpointFormat) -> Config:
    family = family_of(transformer)
    if family.name not in target.families:
        families = " or ".join(map(repr, target.families))
        raise ValueError(f"format {target.name!r} is for family {families}, got a model of {family.name!r}")
    layers = family.self_attention_layers(transformer)
    configs = {name: processor.config for name, processor in sparse_processors(transformer).items()}
    dense = [name for name in layers if name not in configs]
    if dense:
        raise ValueError(f"format {target.name!r} has every layer sparse, but {enumerated(dense)} are dense")
    config = next(iter(configs.values()))
    others = [name for name, other in configs.items() if other != config]
    if others:
        raise ValueError(f"format {target.name!r} has one configuration, but {enumerated(others)} have others")
    _check_fixed(target, config, target.config_for(_hidden_dim(transformer)))
    return config


def _whole_model(transformer: nn.Module, target: CheckpointFormat) -> dict[str, Tensor]:
    state, processors = transformer.state_dict(), sparse_processors(transformer)
    if any(".lora_" in name for name in state):
        raise ValueError("model has LoRA adapters; merge them with fuse_lora and unload_lora, or export only them")
    ours = tuple(f"{layer}.processor." for layer in processors)
    names = from_diffusers([name for name in state if not name.startswith(ours)], target.layout, len(processors))
    tensors = {file_name: state[name] for name, file_name in names.items()}
    if target.flat_patches:
        tensors[PATCH_EMBEDDING] = tensors[PATCH_EMBEDDING].flatten(1)
    for index, (layer, processor) in enumerate(processors.items()):
        parameters = processor.attention.state_dict()
        lost = [name for name in parameters if name not in target.sparse_keys and parameters[name].count_nonzero()]
        if lost:
            raise ValueError(f"format {target.name!r} has no place for {', '.join(lost)} of {layer}, which is not zero")
        tensors |= {key.format(index=index): parameters[name] for name, key in target.sparse_keys.items()}
    return native(tensors, transformer.rope.inv_freq) if target.layout == "minimax_h3" else tensors
