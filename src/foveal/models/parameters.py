"""The parameters that `sparsify` added, by name: to train, count, or leave out of quantization."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import Tensor, nn

from foveal.models.families.table import components_of
from foveal.models.processor import sparse_processors
from foveal.models.sharding import FSDP1_PREFIX

Model = TypeVar("Model")


def sparse_parameters(model: Any) -> dict[str, nn.Parameter]:
    """The parameters that `sparsify` added, without those that an adapter put into them.

    Args:
        model: what `sparsify` takes.

    Returns:
        Parameters by their names in `named_parameters()`, in a pipeline after the component's name. Empty for a dense
        model, and for one whose configurations need no parameters.

    Raises:
        TypeError: the model is not supported.
    """
    found = {}
    for component, transformer in components_of(model).items():
        prefix = "" if isinstance(model, nn.Module) else f"{component}."
        processors = sparse_processors(transformer).values()
        ours = {id(p) for processor in processors for p in own_tensors(processor.attention).values()}
        found.update({prefix + name: p for name, p in transformer.named_parameters() if id(p) in ours})
    return found


def of_router(name: str) -> bool:
    """Whether a parameter that `sparsify` added is a router's, by its name."""
    return "router" in name.split(".")


def own_tensors(attention: nn.Module) -> dict[str, Tensor]:
    """The parameters of a sparse layer by their names in it, whatever PEFT wrapped around them.

    Args:
        attention: a method's module, or PEFT's wrapper around one (`modules_to_save`), whose active copy counts.
    """
    copies = getattr(attention, "modules_to_save", None)
    if isinstance(copies, nn.ModuleDict):
        active = [name for name in attention.active_adapters if name in copies]
        attention = copies[active[0]] if active else attention.original_module
    tensors = _tensors(attention)
    # An adapter keeps its own parameters next to the layer that it adapts.
    adapted = {name.partition(".base_layer.")[0] + "." for name in tensors if ".base_layer." in name}
    return {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in tensors.items()
        if ".base_layer." in name or not any(name.startswith(prefix) for prefix in adapted)
    }


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """What `state_dict(keep_vars=True)` returns, but without the hooks by which FSDP1 gathers parameters there."""
    found = {}
    for prefix, part in module.named_modules(remove_duplicate=False):
        kept = [(name, x) for name, x in part._buffers.items() if name not in part._non_persistent_buffers_set]
        for name, tensor in (*part._parameters.items(), *kept):
            if tensor is not None:
                found[f"{prefix}.{name}".lstrip(".").replace(FSDP1_PREFIX, "")] = tensor
    return found


def unfreeze(model: Model) -> Model:
    """Make the parameters that `sparsify` added trainable, and leave the others as they are.

    `add_adapter` freezes everything that is not the adapter's. Call this after it and before you make the optimizer.

    Args:
        model: a model with sparse parameters.

    Returns:
        The same model, changed in place.

    Raises:
        TypeError: the model is not supported.
        ValueError: the model has no sparse parameters.
    """
    parameters = sparse_parameters(model)
    if not parameters:
        raise ValueError("model has no sparse parameters to unfreeze; call sparsify first")
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    return model


def quantizable(module: nn.Module, name: str) -> bool:
    """Whether a module is a linear layer of the model and not of a sparse layer: a `filter_fn` for torchao.

    The gates of VSA start at zero, stay small, and have few weights, so eight bits would gain nothing there.

    Args:
        module: any part of a model.
        name: its qualified name, as in `named_modules()`.
    """
    return isinstance(module, nn.Linear) and "processor" not in name.split(".")
