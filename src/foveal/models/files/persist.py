"""`save` and `load`: the parameters and configurations that `sparsify` added, apart from the model's own weights.

A folder holds `foveal.safetensors`, the parameters, and `foveal.json`, the configurations for people to read:

    {"format": 1, "components": {"transformer": {"family": "wan", "policy": {"dense_first_steps": 2}, "layers": {
        "blocks.0.attn1": {"method": "sla", "config": {"keep_ratio": 0.05, ...}}, ...}, "model": {
            "class": "WanTransformer3DModel", "self_attention": {
                "blocks.0.attn1": {"width": 1536, "heads": 12, "head_dim": 128}, ...}}}}}

A component without a policy has no such entry, and files of older versions have no "model". What `save_pretrained` of
diffusers writes is in `pretrained.py`. The header of `foveal.safetensors` carries the same text, so that one rename
commits a save. The parameters are named component.layer.parameter, "transformer.blocks.0.attn1.proj.weight"; a bare
transformer is the component "transformer".
"""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from foveal.methods.base import Config
from foveal.models.families.table import components_of, family_of
from foveal.models.files.manifest import (
    FORMAT,
    check_component,
    check_model,
    entry_of,
    model_entry,
    parse_component,
)
from foveal.models.files.tensor_files import check_replaceable, enumerated, header_entry, save_tensors
from foveal.models.installation import build_attention, build_processors, install
from foveal.models.parameters import of_router, own_tensors
from foveal.models.policy import attach_policy, get_policy
from foveal.models.pretrained import become_sparse, register_components
from foveal.models.processor import SparseAttentionProcessor, sparse_processors
from foveal.models.sharding import REMEDY, copy_into, gathered, is_dtensor, whole_parameters
from foveal.output_folder import flush, scratch_folder

WEIGHTS_FILE = "foveal.safetensors"
MANIFEST_FILE = "foveal.json"
HEADER_KEY = "foveal"

Model = TypeVar("Model")


def save(model: Any, folder: str | os.PathLike[str]) -> None:
    """Writes what `sparsify` added to a model: parameters bit for bit, each layer's configuration, and the policy.

    A model sharded by FSDP2, FSDP1, or ZeRO-3 is gathered: all ranks call this together, the first one writes, and all
    return after that. Where only FSDP1's outermost wrapper has the parameters, call this inside of
    `summon_full_params`.

    Both files are written aside and renamed. Interrupted at any point, the folder holds the former save or the new
    one, complete. Only files that `save` wrote are replaced.

    Args:
        model: a sparse transformer or pipeline.
        folder: created if need be.

    Raises:
        TypeError: an unsupported model.
        ValueError: a model without a sparse layer, or with parameters that are offloaded ("meta"), not those that
            its configuration has, or out of reach in a wrapper of FSDP1.
        FileExistsError: the folder has a `foveal.safetensors` or `foveal.json` that `save` did not write.
    """
    components, tensors, sharded = {}, {}, False
    for component, transformer in components_of(model).items():
        processors = sparse_processors(transformer)
        if not processors:
            continue
        configs = {name: processor.config for name, processor in processors.items()}
        expected, state = _expected(component, transformer, configs), {}
        for layer, processor in processors.items():
            with whole_parameters(transformer, processor) as flat:
                part = _state(component, {layer: processor})
                if flat:
                    _check_whole(part, expected, f"{component}.{layer}")
                    part = {name: tensor.detach().clone() for name, tensor in part.items()}
                state |= part
            sharded = sharded or flat
        _check_tensors(state, expected, "the model")
        _check_not_offloaded(state)
        sharded = sharded or any(is_dtensor(tensor) for tensor in state.values())
        tensors.update({name: gathered(tensor.detach()).cpu().contiguous() for name, tensor in state.items()})
        components[component] = {**entry_of(transformer), "model": model_entry(transformer)}
    if not components:
        raise ValueError("model has no sparse layer, there is nothing to save; call sparsify first")

    manifest = json.dumps({"format": FORMAT, "components": components}, indent=2) + "\n"
    try:
        if not sharded or dist.get_rank() == 0:
            _write(Path(folder), manifest, tensors)
    finally:
        if sharded:
            dist.barrier()


def load(model: Model, folder: str | os.PathLike[str], *, impl: str = "auto") -> Model:
    """Puts what `save` wrote into a model: sparsifies a dense one as saved, and checks that a sparse one agrees.

    A saved policy takes the place of the model's, a pipeline's scheduler telling the step.

    Parameters take the dtype that `sparsify` gives them; where that is the saved one, they come back bit for bit.

    Args:
        model: a transformer or pipeline like the saved one, dense, or sparse with the same configurations.
        folder: what `save` wrote.
        impl: the implementation for layers that are dense so far; see `block_sparse_attention`.

    Returns:
        The same model, changed in place; unchanged if anything below is raised.

    Raises:
        FileNotFoundError: no such folder, or no `foveal.safetensors` in it.
        TypeError: an unsupported model.
        ValueError: a file that is corrupt or of another format version, a `foveal.json` that was edited, a model of
            another class or size than the saved one, components or layers that the model lacks, configurations other
            than the model's, and missing, extra or misshapen parameters, each by name.
    """
    components = components_of(model)
    manifest, tensors = read_saved(Path(folder))
    saved = {name: parse_component(name, entry) for name, entry in manifest["components"].items()}
    missing = sorted(set(saved) - set(components))
    if missing:
        raise ValueError(f"{folder} has parameters for {missing}, but the model has only {sorted(components)}")

    expected = {}
    for component, transformer in components.items():
        if component in saved:
            _check_model(folder, component, transformer, manifest["components"][component])
        family, configs, policy = saved.get(component, (family_of(transformer).name, {}, None))
        check_component(component, transformer, family, configs, policy)
        expected.update(_expected(component, transformer, configs))
    _check_tensors(tensors, expected, str(folder))

    plans = []
    for component, (_, configs, policy) in saved.items():
        transformer = components[component]
        processors = sparse_processors(transformer)
        fresh = {} if processors else build_processors(transformer, configs, impl=impl)
        _check_not_offloaded(_state(component, processors or fresh))
        for layer, processor in processors.items():
            with whole_parameters(transformer, processor) as flat:
                if flat:
                    _check_whole(_state(component, {layer: processor}), expected, f"{component}.{layer}")
        plans.append((component, transformer, processors or fresh, fresh, policy))
    pipeline = None if isinstance(model, nn.Module) else model
    for component, transformer, processors, fresh, policy in plans:
        for layer, processor in processors.items():
            with whole_parameters(transformer, processor, write=True), torch.no_grad():
                for name, parameter in _state(component, {layer: processor}).items():
                    copy_into(parameter, tensors[name])
        install(transformer, fresh)
        become_sparse(transformer)
        if policy is not None or get_policy(transformer) is not None:
            attach_policy(transformer, policy, pipeline=pipeline)
    register_components(model)
    return model


def load_parameters(model: Any, folder: str | os.PathLike[str]) -> None:
    """Puts the parameters that `save` wrote into sparse layers, whose configurations may be others than the saved ones.

    Where the saved layers had no router, the model's stays as it is: of a freshly converted one the identity, by which
    a layer chooses as the saved one did.

    Args:
        model: a sparse transformer or pipeline like the saved one, whole and not offloaded. It keeps its policy.
        folder: what `save` wrote.

    Raises:
        FileNotFoundError, TypeError: as in `load`.
        ValueError: a file that is corrupt or of another format version, a model of another class or size than the saved
            one, and missing, extra or misshapen parameters, each by name; the model is unchanged then.
    """
    manifest, tensors = read_saved(Path(folder))
    state = {}
    for component, transformer in components_of(model).items():
        if component in manifest["components"]:
            _check_model(folder, component, transformer, manifest["components"][component])
        state |= _state(component, sparse_processors(transformer))
    if not any(of_router(name) for name in tensors):
        state = {name: parameter for name, parameter in state.items() if not of_router(name)}
    _check_tensors(tensors, state, str(folder))
    _check_not_offloaded(state)
    with torch.no_grad():
        for name, parameter in state.items():
            parameter.copy_(tensors[name])


def check_saved(folder: str | os.PathLike[str]) -> None:
    """Check what `save` wrote as far as that goes without a model.

    Raises:
        FileNotFoundError, ValueError: as in `load`.
    """
    read_saved(Path(folder))


def _check_model(folder: str | os.PathLike[str], component: str, transformer: nn.Module, entry: dict[str, Any]) -> None:
    """Raise a ValueError unless a model is the one that was saved; of files that do not say, warn of what is odd."""
    if entry["family"] != family_of(transformer).name:
        return  # `check_component` says that.
    if "model" in entry:
        check_model(f"{component} in {folder}", transformer, entry["model"])
        return
    layers, saved = list(family_of(transformer).self_attention_layers(transformer)), list(entry["layers"])
    if saved == layers[: len(saved)] and len(saved) < len(layers):
        warnings.warn(
            f"{component} in {folder} has {len(saved)} sparse layers, up to {saved[-1]}, and the model has "
            f"{len(layers)} layers, up to {layers[-1]}. An older version wrote the file, which does not say its model. "
            "Check that this is the right one; its other layers stay dense",
            stacklevel=3,
        )


def _state(component: str, processors: dict[str, SparseAttentionProcessor]) -> dict[str, Tensor]:
    return {
        f"{component}.{layer}.{name}": tensor
        for layer, processor in processors.items()
        for name, tensor in own_tensors(processor.attention).items()
    }


def _expected(component: str, transformer: nn.Module, configs: dict[str, Config]) -> dict[str, Tensor]:
    """The parameters that these configurations have, on the meta device."""
    family = family_of(transformer)
    layers = family.self_attention_layers(transformer)
    return {
        f"{component}.{layer}.{name}": tensor
        for layer, config in configs.items()
        for name, tensor in build_attention(family, layers[layer], config, "meta").state_dict().items()
    }


def _write(folder: Path, manifest: str, tensors: dict[str, Tensor]) -> None:
    _check_replaceable(folder)
    with scratch_folder(folder) as scratch:
        save_tensors(tensors, scratch / WEIGHTS_FILE, {HEADER_KEY: manifest})
        (scratch / MANIFEST_FILE).write_text(manifest, encoding="utf-8")
        flush(scratch / WEIGHTS_FILE)
        flush(scratch / MANIFEST_FILE)
        # The readable copy goes first: at no moment does one lie beside parameters that it does not describe.
        (folder / MANIFEST_FILE).unlink(missing_ok=True)
        os.replace(scratch / WEIGHTS_FILE, folder / WEIGHTS_FILE)
        os.replace(scratch / MANIFEST_FILE, folder / MANIFEST_FILE)


def _check_replaceable(folder: Path) -> None:
    """Raise a FileExistsError for files with our names that `save` did not write or that were edited since."""
    weights, readable = folder / WEIGHTS_FILE, folder / MANIFEST_FILE
    check_replaceable(weights, HEADER_KEY)
    if not os.path.lexists(readable):
        return
    try:
        agrees = json.loads(readable.read_bytes()) == json.loads(header_entry(weights, HEADER_KEY) or "null")
    except (OSError, ValueError):
        agrees = False
    if not agrees:
        raise FileExistsError(
            f"{readable} is not what foveal.save wrote, and is left as it is; move it away or choose another folder"
        )


def read_saved(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The manifest and the tensors of a folder, each checked as far as that goes without a model."""
    from safetensors import SafetensorError, safe_open

    if not folder.is_dir():
        raise FileNotFoundError(f"no such folder: {folder}")
    weights = folder / WEIGHTS_FILE
    if not weights.is_file():
        raise FileNotFoundError(f"{folder} has no {WEIGHTS_FILE}; expected a folder that foveal.save wrote")
    try:
        with safe_open(weights, framework="pt", device="cpu") as file:
            text = (file.metadata() or {}).get(HEADER_KEY)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, a file is no dict
    except SafetensorError as error:
        raise ValueError(f"{weights} is corrupt: {error}") from None
    if text is None:
        raise ValueError(f"{weights} has no {HEADER_KEY!r} entry in its header; expected a file that foveal.save wrote")
    manifest = _parse_json(text, f"the header of {weights}")

    readable = folder / MANIFEST_FILE
    if readable.exists() and _parse_json(readable.read_bytes(), str(readable)) != manifest:
        raise ValueError(
            f"{readable} does not agree with the configurations that {WEIGHTS_FILE} was saved with; "
            "to load what was saved, delete or restore it"
        )
    if manifest.get("format") != FORMAT:
        raise ValueError(f"{folder} has format version {manifest.get('format')!r}; this version reads {FORMAT}")
    if not isinstance(manifest.get("components"), dict) or not manifest["components"]:
        raise ValueError(f"{folder} lists no components; expected what foveal.save wrote")
    return manifest, tensors


def _parse_json(text: str | bytes, source: str) -> dict[str, Any]:
    try:
        parsed = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{source} is not valid JSON: {error}") from None
    if not isinstance(parsed, dict):
        raise ValueError(f"{source} must hold a JSON object, got {type(parsed).__name__}")
    return parsed


def _check_tensors(given: dict[str, Tensor], expected: dict[str, Tensor], source: str) -> None:
    """Raises a ValueError unless the names and shapes are those expected."""
    missing, extra = sorted(set(expected) - set(given)), sorted(set(given) - set(expected))
    if missing or extra:
        problems = [f"lacks {enumerated(missing)}"] * bool(missing) + [f"has unexpected {enumerated(extra)}"] * bool(
            extra
        )
        raise ValueError(f"{source} {' and '.join(problems)}; expected the parameters of its configurations")
    for name, tensor in expected.items():
        if given[name].shape != tensor.shape:
            raise ValueError(f"{source}: {name} has shape {tuple(given[name].shape)}, expected {tuple(tensor.shape)}")


def _check_whole(state: dict[str, Tensor], expected: dict[str, Tensor], layer: str) -> None:
    """Raises a ValueError unless a layer that FSDP1 has cut has all of its parameters, whole."""
    shapes = {name: tensor.shape for name, tensor in expected.items() if name.startswith(f"{layer}.")}
    if {name: tensor.shape for name, tensor in state.items()} != shapes:
        raise ValueError(
            f"FSDP has the parameters of {layer} in pieces, and only its outermost wrapper can join them; {REMEDY}"
        )


def _check_not_offloaded(state: dict[str, Tensor]) -> None:
    offloaded = [name for name, tensor in state.items() if tensor.device.type == "meta"]
    if offloaded:
        raise ValueError(f"{enumerated(offloaded)} are on the meta device; save and load before offloading the model")
