"""The parameters that `sparsify` added, by name: to train, to count, to leave out of quantization."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import Tensor, nn

from foveal.models.families.table import components_of
from foveal.models.processor import sparse_processors

Model = TypeVar("Model")


def sparse_parameters(model: Any) -> dict[str, nn.Parameter]:
    """The parameters that `sparsify` added, without what an adapter put into them.

    Args:
        model: what `sparsify` takes.

    Returns:
        Parameters by name, that of `named_parameters()`; in a pipeline after the component's name. Empty for a dense
        model, and for one whose configurations need none.

    Raises:
        TypeError: an unsupported model.
    """
    found = {}
    for component, transformer in components_of(model).items():
        prefix = "" if isinstance(model, nn.Module) else f"{component}."
        processors = sparse_processors(transformer).values()
        ours = {id(p) for processor in processors for p in own_tensors(processor.attention).values()}
        found.update({prefix + name: p for name, p in transformer.named_parameters() if id(p) in ours})
    return found


def own_tensors(attention: nn.Module) -> dict[str, Tensor]:
    """The parameters of a sparse layer by the names that they have in it, whatever PEFT wrapped around them.

    Args:
        attention: a method's module; or PEFT's wrapper around one (`modules_to_save`), whose copy in use counts.
    """
    copies = getattr(attention, "modules_to_save", None)
    if isinstance(copies, nn.ModuleDict):
        active = [name for name in attention.active_adapters if name in copies]
        attention = copies[active[0]] if active else attention.original_module
    tensors = attention.state_dict(keep_vars=True)
    # Beside the layer that it adapts, an adapter keeps parameters of its own.
    adapted = {name.partition(".base_layer.")[0] + "." for name in tensors if ".base_layer." in name}
    return {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in tensors.items()
        if ".base_layer." in name or not any(name.startswith(prefix) for prefix in adapted)
    }


def unfreeze(model: Model) -> Model:
    """Makes the parameters that `sparsify` added trainable, and leaves the others as they are.

    `add_adapter` freezes whatever is not the adapter's; call this after it, and before the optimizer is made.

    Args:
        model: a model with sparse parameters.

    Returns:
        The same model, changed in place.

    Raises:
        TypeError: an unsupported model.
        ValueError: a model without sparse parameters.
    """
    parameters = sparse_parameters(model)
    if not parameters:
        raise ValueError("model has no sparse parameters to unfreeze; call sparsify first")
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    return model


def quantizable(module: nn.Module, name: str) -> bool:
    """Whether a module is a linear layer of the model's own, and not of a sparse layer: a `filter_fn` for torchao.

    The gates of VSA start at zero and stay small; their weights are few. Eight bits would gain nothing there.

    Args:
        module: any part of a model.
        name: its qualified name, as in `named_modules()`.
    """
    return isinstance(module, nn.Linear) and "processor" not in name.split(".")
