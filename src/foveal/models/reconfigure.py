"""`reconfigure`: give sparse layers another configuration and keep their parameters."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

from foveal.methods.base import Config
from foveal.models.families.table import components_of, family_of
from foveal.models.installation import build_attention
from foveal.models.layers import Layers, choose_configs
from foveal.models.parameters import own_tensors
from foveal.models.policy import check_ratios, get_policy
from foveal.models.processor import note_configs, sparse_processors

Model = TypeVar("Model")


def reconfigure(model: Model, config: Config | None = None, *, layers: Layers = None) -> Model:
    """Change the configurations of sparse layers and keep their parameters, which must fit.

    Args:
        model: a sparse transformer or pipeline.
        config, layers: as in `sparsify`, but only for sparse layers.

    Returns:
        The same model, changed in place; unchanged if anything below is raised.

    Raises:
        TypeError: the model is not supported, or an argument has the wrong type.
        ValueError: a layer does not exist or is dense, a configuration needs other parameters, or the model's policy
            does not allow the ratios.
    """
    plans = []
    for transformer in components_of(model).values():
        family, processors = family_of(transformer), sparse_processors(transformer)
        modules = family.self_attention_layers(transformer)
        if layers is None:
            modules = {name: attn for name, attn in modules.items() if name in processors}
            if not modules:
                raise ValueError("model has no sparse layer to reconfigure; call sparsify first")
        for name, new in choose_configs(modules, config, layers).items():
            if name not in processors:
                raise ValueError(f"layer {name} is dense; sparsify converts it")
            given = _shapes(processors[name].attention)
            needed = _shapes(build_attention(family, modules[name], new, "meta"))
            if given != needed:
                raise ValueError(
                    f"layer {name} has parameters {sorted(given) or 'none'} and would need {sorted(needed) or 'none'} "
                    f"for {new}; densify the model and sparsify it again"
                )
            policy = get_policy(transformer)
            if policy is not None:
                check_ratios(name, new, policy)
            plans.append((processors[name].attention, new))
    for attention, new in plans:
        attention.config = new
    for transformer in components_of(model).values():
        note_configs(transformer)
    return model


def _shapes(attention: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in own_tensors(attention).items()}
