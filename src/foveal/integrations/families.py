"""The only table of model families: what a transformer is called and where its self-attention sits.

A new family is a file like `wan.py` and a line here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from foveal.integrations import wan
from foveal.video_grid import VideoGrid


@dataclass(frozen=True)
class Family:
    """How to find and to run the self-attention of one family of transformers.

    Args:
        name: as in saved files.
        transformer: class name of the transformer; matched by name, so that diffusers need not be imported.
        processors: class names of the attention processors that ours stands in for.
        self_attention_layers: transformer to its self-attention modules by qualified name, in order of depth.
        dimensions: attention module to (hidden_dim, num_heads, head_dim).
        grid_source: transformer to the submodule that sees the latent once per forward and makes the position
            embedding that every layer is passed.
        read_grid: (that submodule, its positional arguments) to the grid of tokens.
        self_attention: (attention module, attend, *the processor's arguments) to the layer's output, where
            attend(query, key, value, hidden_states) is the method's attention on [B, H, L, D].
    """

    name: str
    transformer: str
    processors: tuple[str, ...]
    self_attention_layers: Callable[[nn.Module], dict[str, nn.Module]]
    dimensions: Callable[[nn.Module], tuple[int, int, int]]
    grid_source: Callable[[nn.Module], nn.Module]
    read_grid: Callable[[nn.Module, tuple[Any, ...]], VideoGrid]
    self_attention: Callable[..., Tensor]


FAMILIES = {
    "wan": Family(
        "wan",
        "WanTransformer3DModel",
        ("WanAttnProcessor",),
        wan.self_attention_layers,
        wan.dimensions,
        wan.grid_source,
        wan.read_grid,
        wan.self_attention,
    ),
}

PIPELINE_COMPONENTS = ("transformer", "transformer_2")


def family_of(transformer: nn.Module) -> Family:
    """The family that a transformer belongs to, by the names of its class and of that class's bases.

    Raises:
        TypeError: for a model of no family in the table.
    """
    names = {base.__name__ for base in type(transformer).__mro__}
    for family in FAMILIES.values():
        if family.transformer in names:
            return family
    valid = ", ".join(family.transformer for family in FAMILIES.values())
    raise TypeError(
        f"model must be one of {valid}, or a pipeline with one, got {type(transformer).__name__}; "
        "of a wrapper (DistributedDataParallel, torch.compile), pass the model inside"
    )


def components_of(model: Any) -> dict[str, nn.Module]:
    """The transformers of a pipeline by component name; a bare transformer goes by "transformer" too.

    Raises:
        TypeError: for anything but a supported transformer or a pipeline that has one.
    """
    if isinstance(model, nn.Module):
        components = {PIPELINE_COMPONENTS[0]: model}
    else:
        components = {name: getattr(model, name, None) for name in PIPELINE_COMPONENTS}
        components = {name: part for name, part in components.items() if isinstance(part, nn.Module)}
        if not components:
            raise TypeError(
                f"model must be a transformer or a pipeline with a {' or '.join(PIPELINE_COMPONENTS)}, "
                f"got {type(model).__name__}"
            )
    for part in components.values():
        family_of(part)
    return components
