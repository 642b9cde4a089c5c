"""How the tensors of a checkpoint get into a model: the loaders of `load_checkpoint`, one for each kind of format.

Each takes the dense transformer, the open file, its names without a prefix, the format, the configuration, and the
implementation. It makes the model sparse, fills it, and returns how many tensors of the sparse attention and how many
others were loaded, and notes. If anything is wrong with the file, it raises a ValueError and leaves the model dense.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from foveal.methods.base import Config
from foveal.models.convert import densify, sparsify
from foveal.models.families.table import family_of
from foveal.models.files.formats import CheckpointFormat, to_diffusers
from foveal.models.files.lora import load_adapter, read_adapter
from foveal.models.files.tensor_files import TensorFile, enumerated
from foveal.models.files.updates import FORMAT, is_update, read_updates
from foveal.models.processor import sparse_processors

PATCH_EMBEDDING = "patch_embedding.weight"
Loader = Callable[
    [nn.Module, TensorFile, dict[str, str], CheckpointFormat, Config, str], tuple[int, int, tuple[str, ...]]
]


def loader(found: CheckpointFormat) -> Loader:
    """The loader of a format."""
    if found.lora:
        return _load_lora
    if found.updates:
        return _load_updates
    return _load_shared if found.shared else _load_weights


def _load_weights(
    transformer: nn.Module,
    file: TensorFile,
    names: dict[str, str],
    found: CheckpointFormat,
    config: Config,
    impl: str,
) -> tuple[int, int, tuple[str, ...]]:
    layers = list(family_of(transformer).self_attention_layers(transformer))
    _check_depth(file, names, len(layers))
    wanted = {
        (layer, parameter): key.format(index=index)
        for index, layer in enumerate(layers)
        for parameter, key in found.sparse_keys.items()
    }
    sparse_names = set(wanted.values())
    base = to_diffusers([name for name in names if name not in sparse_names], found.layout)
    former = transformer.state_dict()
    missing = [key for key in sparse_names if key not in names]
    # A file with only the sparse parameters is whole too.
    missing += [name for name in former if name not in base] if base else []
    extra = [file_name for name, file_name in base.items() if name not in former]
    _check_names(file, sorted(missing), extra)

    with _converted(transformer, config, impl):
        # From the name in the file, which the messages give, to what it fills.
        targets = {names[name]: former[model_name] for model_name, name in base.items()}
        fresh = {layer: one.attention.state_dict() for layer, one in sparse_processors(transformer).items()}
        targets |= {names[key]: fresh[layer][parameter] for (layer, parameter), key in wanted.items()}
        patches = names[base[PATCH_EMBEDDING]] if PATCH_EMBEDDING in base else None
        _check_tensors(file, targets, patches)
        dtypes = set()
        with torch.no_grad():
            for name, target in targets.items():
                tensor = file.read(name)
                dtypes.add((_short(tensor.dtype), _short(target.dtype)))
                target.copy_(tensor.reshape(target.shape))
    notes = [f"{given} cast to {taken}" for given, taken in sorted(dtypes) if given != taken]
    if not base:
        notes.append("the file has no base weights: the model's own were kept")
    return len(wanted), len(base), tuple(notes)


@contextlib.contextmanager
def _converted(transformer: nn.Module, config: Config, impl: str) -> Iterator[None]:
    """Makes the transformer sparse, and dense again if what is done with it fails."""
    sparsify(transformer, config, impl=impl)
    try:
        yield
    except BaseException:
        densify(transformer)
        raise


def _fill(targets: dict[str, Tensor], file: TensorFile) -> None:
    """Copies tensors of a file, by name, into tensors of their shapes."""
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(file.read(name))


def _check_depth(file: TensorFile, names: dict[str, str], num_layers: int) -> None:
    found = (re.match(r"(?:transformer_)?blocks\.(\d+)\.", name) for name in names)
    indices = [int(match.group(1)) for match in found if match]
    if indices and max(indices) + 1 != num_layers:
        raise ValueError(
            f"{file.path} is for a model of {max(indices) + 1} layers, got one of {num_layers}: another model size"
        )


def _check_names(file: TensorFile, missing: list[str], extra: list[str]) -> None:
    problems = [f"lacks {enumerated(missing)}"] * bool(missing) + [f"has unexpected {enumerated(extra)}"] * bool(extra)
    if problems:
        raise ValueError(f"{file.path} {' and '.join(problems)}")


def _check_tensors(file: TensorFile, targets: dict[str, Tensor], patches: str | None) -> None:
    wrong = []
    for name, target in targets.items():
        shape, expected = file.shapes[name], tuple(target.shape)
        flat = (expected[0], math.prod(expected[1:])) if name == patches else expected
        if shape not in (expected, flat):
            wrong.append(f"{name} has shape {shape}, the model's is {expected}")
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise ValueError(f"{file.path} does not fit the model, of another size maybe: {wrong[0]}{more}")
    integers = [name for name in targets if name in file.not_floating]
    if integers:
        raise ValueError(f"{file.path} is quantized, or damaged: {enumerated(integers)} are integers")
    offloaded = [name for name, target in targets.items() if target.device.type == "meta"]
    if offloaded:
        raise ValueError(f"the model's {enumerated(offloaded)} are on the meta device; load before offloading it")


def _load_lora(
    transformer: nn.Module,
    file: TensorFile,
    names: dict[str, str],
    found: CheckpointFormat,
    config: Config,
    impl: str,
) -> tuple[int, int, tuple[str, ...]]:
    tensors = {name: file.read(given) for name, given in names.items()}
    adapter = read_adapter(
        transformer, tensors, str(file.path), family_of(transformer).name, file.metadata.get("alpha")
    )
    with _converted(transformer, config, impl):
        load_adapter(transformer, adapter, found.name)
    return 0, len(adapter), (f"a LoRA, loaded as adapter {found.name!r}: fuse_lora() merges it",)


def _load_updates(
    transformer: nn.Module,
    file: TensorFile,
    names: dict[str, str],
    found: CheckpointFormat,
    config: Config,
    impl: str,
) -> tuple[int, int, tuple[str, ...]]:
    if not is_update(file):
        raise ValueError(f"{file.path} must say format {FORMAT!r} in its header, got {file.metadata.get('format')!r}")
    layers = list(family_of(transformer).self_attention_layers(transformer))
    _check_depth(file, names, len(layers))
    ((parameter, key),) = found.sparse_keys.items()
    wanted = {key.format(index=index): layer for index, layer in enumerate(layers)}
    base, gates = transformer.state_dict(), [name for name in names if name.endswith(".set_weight")]
    _check_names(file, sorted(set(wanted) - set(gates)), sorted(set(gates) - set(wanted)))
    updates = read_updates(file, {name: given for name, given in names.items() if name not in wanted}, base)
    with _converted(transformer, config, impl):
        sparse = sparse_processors(transformer)
        targets = {names[name]: sparse[layer].attention.state_dict()[parameter] for name, layer in wanted.items()}
        _check_tensors(file, targets, None)
        _fill(targets, file)
        merged = updates.apply(base, file)
    return len(wanted), merged, ("the updates were merged into the base weights",)


def _load_shared(
    transformer: nn.Module,
    file: TensorFile,
    names: dict[str, str],
    found: CheckpointFormat,
    config: Config,
    impl: str,
) -> tuple[int, int, tuple[str, ...]]:
    family = family_of(transformer)
    head_dims = {family.dimensions(attn)[2] for attn in family.self_attention_layers(transformer).values()}
    wanted = {
        (head_dim, parameter): key.format(index=head_dim)
        for head_dim in head_dims
        for parameter, key in found.sparse_keys.items()
    }
    owners = {f"{head_dim}." for head_dim in head_dims}
    ours = [name for name in names if name.startswith(tuple(owners))]
    _check_names(file, sorted(set(wanted.values()) - set(ours)), sorted(set(ours) - set(wanted.values())))
    with _converted(transformer, config, impl):
        for layer, processor in sparse_processors(transformer).items():
            head_dim = family.dimensions(transformer.get_submodule(layer))[2]
            parameters = processor.attention.state_dict()
            targets = {names[wanted[head_dim, parameter]]: parameters[parameter] for parameter in found.sparse_keys}
            _check_tensors(file, targets, None)
            _fill(targets, file)
    notes = ["one projection for all layers: each has a copy of it, which training changes by itself"]
    others = sorted({name.partition(".")[0] for name in names if name not in ours}, key=int)
    if others:
        notes.append(f"projections of heads of {', '.join(others)} are of other attention, and were left out")
    notes.append("the file has no base weights: the model's own were kept")
    return len(ours), 0, tuple(notes)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
