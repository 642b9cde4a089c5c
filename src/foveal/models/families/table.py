"""The only table of model families: what a transformer is called and where its self-attention sits.

To add a family, add a file like `wan.py` and a line here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from torch import nn

from foveal.layout import TokenLayout, VideoGrid
from foveal.models.families import (
    anyflow,
    cogvideox,
    flux,
    hunyuan_video,
    hunyuan_video15,
    ltx2,
    ltx_video,
    minimax_h3,
    wan,
    wan_animate_2,
)
from foveal.models.training import Training


@dataclass(frozen=True)
class Family:
    """How to find and to run the self-attention of one family of transformers.

    Args:
        name: the name in saved files.
        transformer: class name of the transformer, matched by name so that diffusers need not be imported.
        processors: class names of the attention processors that foveal's replaces.
        self_attention_layers: transformer to its self-attention modules by qualified name, in order of depth.
        dimensions: attention module to (hidden_dim, num_heads, head_dim).
        read_grid: (transformer, the arguments of its forward by name) to the token grid; to the layout of a family that
            runs the method over a packed sequence, protected segments included.
        self_attention: (attention module, the method's attention as a `LayerAttention`, *the processor's arguments) to
            the layer's output.
        training: how its transformers are trained; None for those that `foveal train` does not know.
    """

    name: str
    transformer: str
    processors: tuple[str, ...]
    self_attention_layers: Callable[[nn.Module], dict[str, nn.Module]]
    dimensions: Callable[[nn.Module], tuple[int, int, int]]
    read_grid: Callable[[nn.Module, dict[str, Any]], VideoGrid | TokenLayout]
    self_attention: Callable[..., Any]
    training: Training | None = None


def _family(
    name: str, transformer: str, processors: tuple[str, ...], module: ModuleType, *, training: Training | None = None
) -> Family:
    functions = (module.self_attention_layers, module.dimensions, module.read_grid, module.self_attention)
    return Family(name, transformer, processors, *functions, training)


FAMILIES = {
    family.name: family
    for family in (
        _family("wan", "WanTransformer3DModel", ("WanAttnProcessor",), wan, training=wan.TRAINING),
        _family("wan_vace", "WanVACETransformer3DModel", ("WanAttnProcessor",), wan),
        _family("wan_animate", "WanAnimateTransformer3DModel", ("WanAttnProcessor",), wan),
        _family("wan_animate_2", "WanAnimate2Transformer3DModel", ("WanAnimate2AttnProcessor",), wan_animate_2),
        _family("skyreels_v2", "SkyReelsV2Transformer3DModel", ("SkyReelsV2AttnProcessor",), wan),
        _family("chronoedit", "ChronoEditTransformer3DModel", ("WanAttnProcessor",), wan),
        _family("anyflow", "AnyFlowTransformer3DModel", ("AnyFlowAttnProcessor",), anyflow),
        _family(
            "hunyuan_video",
            "HunyuanVideoTransformer3DModel",
            ("HunyuanVideoAttnProcessor2_0",),
            hunyuan_video,
            training=hunyuan_video.TRAINING,
        ),
        _family(
            "hunyuan_video_framepack",
            "HunyuanVideoFramepackTransformer3DModel",
            ("HunyuanVideoAttnProcessor2_0",),
            hunyuan_video,
        ),
        _family(
            "hunyuan_video15", "HunyuanVideo15Transformer3DModel", ("HunyuanVideo15AttnProcessor2_0",), hunyuan_video15
        ),
        _family(
            "cogvideox",
            "CogVideoXTransformer3DModel",
            ("CogVideoXAttnProcessor2_0", "FusedCogVideoXAttnProcessor2_0"),
            cogvideox,
        ),
        _family("ltx_video", "LTXVideoTransformer3DModel", ("LTXVideoAttnProcessor",), ltx_video),
        _family(
            "ltx2",
            "LTX2VideoTransformer3DModel",
            ("LTX2AudioVideoAttnProcessor", "LTX2PerturbedAttnProcessor"),
            ltx2,
            training=ltx2.TRAINING,
        ),
        _family(
            "minimax_h3",
            "MiniMaxH3Transformer3DModel",
            ("MiniMaxH3AttnProcessor",),
            minimax_h3,
            training=minimax_h3.TRAINING,
        ),
        _family("flux", "FluxTransformer2DModel", ("FluxAttnProcessor",), flux),
    )
}

# Wan 2.2 has one transformer for high and one for low noise; MiniMax-H3 one for references.
PIPELINE_COMPONENTS = ("transformer", "transformer_2", "transformer_ref")


def family_of(transformer: nn.Module) -> Family:
    """The family that a transformer belongs to, by the names of its class and of that class's bases.

    Raises:
        TypeError: the model belongs to no family in the table.
    """
    names = {base.__name__ for base in type(transformer).__mro__}
    for family in FAMILIES.values():
        if family.transformer in names:
            return family
    valid = ", ".join(family.transformer for family in FAMILIES.values())
    raise TypeError(
        f"model must be one of {valid}, or a pipeline with one, got {type(transformer).__name__}; "
        "for a wrapper (DistributedDataParallel, torch.compile), pass the model inside it"
    )


def components_of(model: Any) -> dict[str, nn.Module]:
    """The transformers of a pipeline by component name. A bare transformer is also called "transformer".

    Raises:
        TypeError: model is neither a supported transformer nor a pipeline that has one.
    """
    if isinstance(model, nn.Module):
        components = {PIPELINE_COMPONENTS[0]: model}
    else:
        components = {name: getattr(model, name, None) for name in PIPELINE_COMPONENTS}
        components = {name: part for name, part in components.items() if isinstance(part, nn.Module)}
        if not components:
            names = f"{', '.join(PIPELINE_COMPONENTS[:-1])} or {PIPELINE_COMPONENTS[-1]}"
            raise TypeError(f"model must be a transformer or a pipeline with a {names}, got {type(model).__name__}")
    for part in components.values():
        family_of(part)
    return components
