"""The self-attention layers of ComfyUI's models, what each of them runs, and where their tokens stand."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from foveal.checks import check_ratio
from foveal.layout import TokenLayout, VideoGrid
from foveal.methods.base import Config, method_of
from foveal.methods.parameters import PreciseParameters
from foveal.models.files.formats import FORMATS
from foveal.models.files.parts import SparseParameters
from foveal.models.layers import choose_layers
from foveal.symbols import ceil_div

Budgets = Mapping[int | str | range, float]


@dataclass(frozen=True)
class HostFamily:
    """Models of ComfyUI whose self-attention reads a video's tokens in raster order, and what the host adds to them.

    Args:
        name: to display.
        family: of foveal's models, those whose parameters fit; None for none.
        groups: attributes of the model that hold its blocks, in order of depth.
        attention: the attribute of a block that is its self-attention.
        dimensions: (hidden width, heads, head dimension) of that, an AttributeError for another model's.
        patch: latent frames, rows, and columns of a token.
        noise: the timestep that the model is called with for pure noise; policies have 1000.
        gate: the attribute of an attention that makes VSA's gate, if the model was loaded with gates; None if models of
            this family never have one.
        packing: from the transformer options and the other arguments of a forward to how the model packed its sequence,
            as MiniMax-H3 has it; None for models whose tokens are those of the latent.
    """

    name: str
    family: str | None
    groups: tuple[str, ...]
    attention: str
    dimensions: Callable[[Any], tuple[int, int, int]]
    patch: Callable[[Any], tuple[int, int, int]]
    noise: float = 1000.0
    gate: str | None = None
    packing: Callable[[Mapping[str, Any], Mapping[str, Any]], Any] | None = None

    def blocks(self, model: nn.Module) -> dict[str, nn.Module]:
        """The blocks by name; empty for a model of another family."""
        groups = {group: getattr(model, group, None) or () for group in self.groups}
        return {f"{group}.{index}": block for group, blocks in groups.items() for index, block in enumerate(blocks)}

    def layers(self, model: nn.Module) -> dict[str, nn.Module]:
        """The self-attention modules by name.

        Raises:
            AttributeError: the model is of another family.
        """
        found = {f"{name}.{self.attention}": getattr(at, self.attention) for name, at in self.blocks(model).items()}
        for layer in found.values():
            self.dimensions(layer)
        return found


def _minimax_h3_packing(options: Mapping[str, Any], arguments: Mapping[str, Any]) -> Any:
    """The model's own layout, whose `segments` are (start, stop, kind): later versions tell it to every node."""
    return options.get("minimax_h3_layout") or (arguments.get("minimax_payload") or {}).get("layout")


WAN = HostFamily(
    name="Wan",
    family="wan",
    groups=("blocks", "vace_blocks"),
    attention="self_attn",
    dimensions=lambda layer: (layer.dim, layer.num_heads, layer.head_dim),
    patch=lambda model: tuple(model.patch_size),
)
LTX_VIDEO = HostFamily(
    name="LTX-Video",
    family=None,
    groups=("transformer_blocks",),
    attention="attn1",
    dimensions=lambda layer: (layer.to_q.in_features, layer.heads, layer.dim_head),
    patch=lambda model: tuple(model.patchifier.patch_size),
    noise=1.0,
)
MINIMAX_H3 = HostFamily(
    name="MiniMax-H3",
    family="minimax_h3",
    groups=("blocks",),
    attention="attn",
    dimensions=lambda layer: (layer.qkv_proj.in_features, layer.heads, layer.head_dim),
    patch=lambda model: tuple(model.patch_size) if model.audio_latents_dim else (),
    gate="to_gate_compress",
    packing=_minimax_h3_packing,
)
FAMILIES = (WAN, LTX_VIDEO, MINIMAX_H3)


def host_family(model: nn.Module) -> HostFamily:
    """The family of a diffusion model of ComfyUI.

    Raises:
        TypeError: the model is of none.
    """
    for family in FAMILIES:
        try:
            if family.layers(model) and len(family.patch(model)) == 3:
                return family
        except AttributeError:
            continue
    known = " or ".join(family.name for family in FAMILIES)
    raise TypeError(f"model must be {known} as ComfyUI has it, got {type(model).__name__}")


def gates_in_model(model: nn.Module, keep_ratio: float) -> SparseParameters:
    """The gates that a diffusion model was loaded with, in whatever form the host keeps its weights.

    Args:
        model: MiniMax-H3 with FastH3's weights.
        keep_ratio: the share of the cubes that each cube reads. The model does not say at which it was trained.

    Raises:
        TypeError: the model is of no family of ComfyUI that is known here.
        ValueError: it has no gates, or keep_ratio is no ratio.
    """
    family = host_family(model)
    layers = family.layers(model)
    _check_gates(family, layers)
    released = FORMATS["fasth3-vsa-comfyui"]
    config = released.config_for(0).replace(keep_ratio=keep_ratio)
    return SparseParameters(
        path="the model",
        format=released.name,
        source=released.source,
        configs=(config,) * len(layers),
        from_file=False,
        layers=({},) * len(layers),
        family=family.family,
        in_model=True,
    )


def build_layers(
    model: nn.Module,
    config: Config | None = None,
    *,
    parameters: SparseParameters | None = None,
    budgets: Budgets | None = None,
    impl: str = "auto",
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The method's module for each layer that may be sparse, and for each other one why it stays dense.

    Args:
        model: the diffusion model. It is not changed.
        config: of every layer, one that needs no parameters.
        parameters: instead of it, each layer's configuration and what its module is filled with.
        budgets: the keep_ratio of layers that have one of their own, by index, range, or name. 1 keeps a layer dense.
        impl: see `block_sparse_attention`.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    if (config is None) == (parameters is None):
        raise ValueError("give either a config or parameters, which have one for each layer")
    family = host_family(model)
    layers = family.layers(model)
    if parameters is not None:
        if family.family != parameters.family:
            of = next(known.name for known in FAMILIES if known.family == parameters.family)
            raise ValueError(f"{parameters.path} is for {of}, got a model of {family.name}")
        depth = sum(name.startswith("blocks.") for name in layers)
        if len(parameters.layers) != depth:
            raise ValueError(
                f"{parameters.path} has sparse parameters of {len(parameters.layers)} layers, "
                f"but the model has {depth}: another model size"
            )
        if parameters.in_model:
            _check_gates(family, layers)
    given = [config] * len(layers) if parameters is None else parameters.configs
    configs = dict.fromkeys(layers) | dict(zip(layers, given, strict=False))
    for name, ratio in _budgets_of(layers, budgets or {}).items():
        if configs[name] is not None:
            configs[name] = method_of(configs[name]).follow(configs[name], keep_ratio=ratio)
    modules, reasons = {}, {}
    for index, (name, layer) in enumerate(layers.items()):
        own = configs[name]
        if parameters is not None and index >= len(parameters.layers):
            reasons[name] = "the file has no parameters for it"
        elif own is None:
            reasons[name] = "it was trained dense"
        elif budgets and own.keep_ratio == 1.0:
            reasons[name] = "its budget keeps everything"
        else:
            modules[name] = method_of(own).build(own, *family.dimensions(layer), impl)
            if parameters is not None and parameters.in_model:
                modules[name].to_gate_coarse = None
            modules[name].requires_grad_(False)
            _fill(name, modules[name], None if parameters is None else parameters.layers[index])
    return modules, reasons


def _check_gates(family: HostFamily, layers: Mapping[str, nn.Module]) -> None:
    """Raise a ValueError unless each layer has the gate that it was loaded with."""
    lacking = [name for name, layer in layers.items() if getattr(layer, family.gate or "", None) is None]
    if lacking:
        raise ValueError(
            f"model must have gates in each layer, as ComfyUI since 0.35 loads them from FastH3's files; "
            f"{lacking[0]} of this {family.name} has none"
        )


def _budgets_of(layers: dict[str, nn.Module], budgets: Budgets) -> dict[str, float]:
    """The share of each layer that has one of its own."""
    for ratio in budgets.values():
        check_ratio("budgets", ratio)
    found: dict[str, float] = {}
    for key, ratio in budgets.items():
        for name in choose_layers(layers, key if isinstance(key, range) else [key], argument="budgets"):
            if name in found:
                raise ValueError(f"budgets has {name} twice; expected each layer under one key")
            found[name] = float(ratio)
    return found


def _fill(name: str, module: nn.Module, values: dict | None) -> None:
    fresh = module.state_dict()
    if values is None:
        if fresh:
            raise ValueError(
                f"config must need no parameters without a file that has them, got {module.config}, "
                f"which needs {', '.join(fresh)}"
            )
        return
    wrong = [
        f"{part} {tuple(values[part].shape)}, expected {tuple(tensor.shape)}" if part in values else f"no {part}"
        for part, tensor in fresh.items()
        if part not in values or values[part].shape != tensor.shape
    ]
    if wrong:
        raise ValueError(f"layer {name}: the file has {', '.join(wrong)}: another model size")
    # In the file's dtypes, but for those that take small steps and stay in float32.
    for part, parameter in module.named_parameters():
        if not isinstance(module.get_submodule(part.rpartition(".")[0]), PreciseParameters):
            parameter.data = parameter.data.to(values[part].dtype)
    module.load_state_dict(values)


def parse_ratios(name: str, text: str) -> dict[int | str | range, float]:
    """Ratios as people write them, "0: 0.5, 1-28: 0.1, blocks.29.self_attn: 1", separated by commas or line ends.

    Args:
        name: what they are, for errors.

    Raises:
        ValueError: for an entry that is none.
    """
    ratios = {}
    for entry in filter(None, (part.strip() for part in re.split(r"[,\n]", text))):
        key, _, ratio = (part.strip() for part in entry.rpartition(":"))
        try:
            value = float(ratio)
        except ValueError:
            value = None
        if not key or value is None:
            raise ValueError(f"{name} must be entries like 3: 0.1 or 4-9: 0.2, got {entry!r}")
        span = re.fullmatch(r"(\d+)\s*-\s*(\d+)", key)
        at = range(int(span[1]), int(span[2]) + 1) if span else int(key) if key.isdigit() else key
        if at in ratios:
            raise ValueError(f"{name} has {key} twice")
        ratios[at] = value
    return ratios


def write_budgets(ratios: Mapping[str, float]) -> str:
    """Budgets by layer name as `parse_ratios` reads them."""
    return "\n".join(f"{name}: {ratio:g}" for name, ratio in ratios.items())


def layout_of(
    latent: tuple[int, ...], patch: tuple[int, int, int], tokens: int, *, reference_first: bool = False
) -> VideoGrid | TokenLayout | None:
    """Where the tokens of a layer stand; None if they do not fit the latent.

    Tokens that the model adds to the video's (reference frames, motion) are protected: every query reads them, and
    theirs read everything.

    Args:
        latent: the shape of the model's input, [B, C, frames, height, width].
        patch: latent frames, rows, and columns of a token.
        tokens: how many the layer has.
        reference_first: a reference frame stands before the video; others stand after it.
    """
    if len(latent) != 5:
        return None
    grid = VideoGrid(*(ceil_div(side, edge) for side, edge in zip(latent[2:], patch, strict=True)))
    extra = tokens - grid.num_tokens
    if extra == 0:
        return grid
    frame = grid.height * grid.width
    if extra < 0 or (reference_first and extra < frame):
        return None
    layout = TokenLayout(grid)
    if reference_first:
        layout, extra = replace(layout, before=(frame,)), extra - frame
    return replace(layout, after=(extra,)) if extra else layout


def packed_layout(
    latent: tuple[int, ...], patch: tuple[int, int, int], tokens: int, packing: Any
) -> TokenLayout | None:
    """Where the tokens of a packed sequence stand; None if they do not fit the latent or the packing.

    Text, conditions, references, and audio are protected, each a segment of its own, as the model was trained.

    Args:
        latent, patch, tokens: as in `layout_of`.
        packing: the model's own layout, or None if it is not known.
    """
    grid = layout_of(latent, patch, tokens)
    if grid is None or packing is None:
        return None
    *before, (start, stop, kind) = packing.segments
    grid = grid_of(grid)
    if kind != "video" or (stop, stop - start) != (tokens, grid.num_tokens):
        return None
    return TokenLayout(grid, before=tuple(end - begin for begin, end, _ in before if end > begin))


def grid_of(layout: VideoGrid | TokenLayout) -> VideoGrid:
    """The video's part."""
    return layout.grid if isinstance(layout, TokenLayout) else layout


def described(layout: Any) -> str:
    """ "21x30x52 = 32,760 tokens", and what is protected."""
    grid = grid_of(layout)
    text = f"{'x'.join(map(str, grid.shape))} = {grid.num_tokens:,} tokens"
    return text if layout is grid else f"{text} and {layout.num_protected:,} that are protected"
