"""SGLang's diffusion models: foveal behind its VSA, its VSA for MiniMax-H3, and its SLA.

SGLang calls `register`, through an entry point, in each of its processes. Nothing else here loads it.

Shape legend: B batch, L tokens, H heads, D head dim, T rows of a packed sequence.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from foveal.blocks import pool_blocks, pooled_scores
from foveal.checks import product
from foveal.hosts.fastvideo import vsa_over_tiles
from foveal.hosts.patching import Patch, import_host
from foveal.hosts.sglang.trained import SETTING, TrainedLayer, trained_layers
from foveal.hosts.turbodiffusion import attention_of
from foveal.kernels.dense import dense_attention
from foveal.layout import TokenLayout, VideoGrid
from foveal.methods.vsa.attention import vsa_attention
from foveal.methods.vsa.config import VSAConfig
from foveal.methods.vsa.layout import resolve_tile
from foveal.methods.vsa.packed import PackedTiles

HOW_TO_INSTALL = 'pip install "sglang[diffusion]"'
BACKENDS = "sglang.multimodal_gen.runtime.layers.attention.backends"
TILE = (4, 4, 4)
RELEASED = VSAConfig(tile=TILE)
# Attributes of the host's metadata.
LAYOUT = "foveal_layout"
TRAINED = "foveal_layers"


def register() -> None:
    """Hook foveal into SGLang: the entry point in `sglang.multimodal_gen.plugins`. SGLang applies the hooks itself."""
    plugins = importlib.import_module("sglang.multimodal_gen.runtime.platforms.plugins")
    for target, hook in _hooks("auto").items():
        plugins.plugin_hook(f"{BACKENDS}.{target}", plugins.HookType.AROUND)(hook)


def patch(impl: str) -> Patch:
    """The same methods run by `impl`; existing layers too."""
    replacements = []
    for target, hook in _hooks(impl).items():
        module, class_name, method = target.split(".")
        host_class = getattr(import_host(f"{BACKENDS}.{module}", "SGLang", HOW_TO_INSTALL), class_name, None)
        if not hasattr(host_class, method):
            raise ImportError(f"SGLang has no {target} in {BACKENDS}; foveal knows that of 0.5.23")
        original = getattr(host_class, method)
        if getattr(original, "__module__", "") == __name__:
            raise ValueError("host 'sglang' is patched already: undo that patch first")
        replacements.append((host_class, method, _method(hook, original)))
    return Patch(replacements)


def _method(hook: Callable, original: Callable) -> Callable:
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return hook(original, self, *args, **kwargs)

    return method


def _hooks(impl: str) -> dict[str, Callable]:
    """What runs around the host's methods, each called with the method, its object, and its arguments."""

    def build(original: Callable, self: Any, *args: Any, **kwargs: Any) -> Any:
        """The host's metadata of one denoising step, with the layout of its sequence, and what foveal trained.

        Raises:
            ValueError: foveal trained routers, but the sequence is one that it leaves to the host, which has none.
        """
        metadata = original(self, *args, **kwargs)
        layout = layout_of(metadata, inspect.signature(original).bind(self, *args, **kwargs))
        layers = trained_layers()
        if layout is None and layers is not None:
            raise ValueError(
                f"{SETTING} needs vsa_mode=exempt, vsa_tile_size=64, and no reference videos: with others SGLang runs "
                "its own code, which has no routers"
            )
        setattr(metadata, LAYOUT, layout)
        setattr(metadata, TRAINED, layers)
        return metadata

    def forward_varlen(original, self, query, key, value, *, attn_metadata=None, **kwargs):
        """MiniMax-H3's attention of [T, H, D] rows (`packed_attention`), the host's own where foveal has no layout."""
        layout = getattr(attn_metadata, LAYOUT, None)
        if layout is None or self.layer_idx is None or _used(kwargs) != layout.num_tokens:
            return original(self, query, key, value, attn_metadata=attn_metadata, **kwargs)
        sparsity = 0.0 if self.layer_idx in attn_metadata.dense_layers else attn_metadata.VSA_sparsity
        gate, split = kwargs.get("gate_compress"), kwargs.get("return_compress", False)
        layers = getattr(attn_metadata, TRAINED)
        trained = None if layers is None else layers[self.layer_idx]
        return packed_attention(query, key, value, gate, layout, sparsity, impl, split=split, trained=trained)

    # The names of the parameters below are the host's: its layers pass them by name.
    def forward_vsa(original, self, query, key, value, gate_compress, attn_metadata):
        """Wan's VSA of [B, L, H, D] tensors in tile order."""
        sizes = attn_metadata.variable_block_sizes
        topk = kept(attn_metadata.VSA_sparsity, sizes.numel())
        tensors = (x.transpose(1, 2) for x in (query, key, value))
        output = vsa_over_tiles(*tensors, sizes, sizes, topk, TILE, gate_compress.transpose(1, 2), impl)
        return output.transpose(1, 2)

    def forward_sla(original, self, query, key, value, attn_metadata=None):
        """SLA of [B, L, H, D] tensors with the layer's projection."""
        return attention_of(self, query, key, value, impl, topk=self.topk_ratio)[0]

    return {
        "video_sparse_attn_h3.VideoSparseAttentionH3MetadataBuilder.build": build,
        "video_sparse_attn_h3.VideoSparseAttentionH3Impl.forward_varlen": forward_varlen,
        "video_sparse_attn.VideoSparseAttentionImpl.forward": forward_vsa,
        "sparse_linear_attn.SparseLinearAttentionImpl.forward": forward_sla,
    }


def _used(kwargs: dict[str, Any]) -> int:
    """How many rows of a packed sequence are not padding; from the host's memory, if it has them there."""
    bounds = kwargs.get("cu_seqlens_host")
    return int(kwargs["cu_seqlens"][1] if bounds is None else bounds[1])


def kept(sparsity: float, cubes: int) -> int:
    """How many of a video's cubes the host keeps: it rounds up."""
    return max(1, min(math.ceil((1.0 - sparsity) * cubes), cubes))


def layout_of(metadata: Any, call: inspect.BoundArguments) -> TokenLayout | None:
    """The layout that a call of the host's metadata builder describes.

    None for what foveal leaves to the host: videos among the protected segments, cubes of 128 tokens, and protected
    keys that compete with the video's.
    """
    given = call.arguments
    if metadata.uses_regions or not metadata.exempt:
        return None
    latent, patch_size = given["raw_latent_shape"], given["patch_size"]
    grid = VideoGrid(*(int(side) // int(edge) for side, edge in zip(latent, patch_size, strict=True)))
    segments = given.get("packed_segments") or given["prefix_segments"]
    return TokenLayout(grid, before=tuple(int(s) for s in segments if not isinstance(s, tuple) and s > 0))


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor | None,
    layout: TokenLayout,
    sparsity: float,
    impl: str,
    *,
    split: bool = False,
    trained: TrainedLayer | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """VSA over a packed sequence of MiniMax-H3.

    Args:
        query, key, value: [T, H, D], the tokens of `layout`, then padding.
        gate: [T, H, D], or None for no coarse branch.
        sparsity: the share of the video's cubes that each of them leaves out; 0 for dense.
        split: return the coarse branch, which the host gates itself after it has exchanged heads for rows.
        trained: what foveal trained for this layer. One without a coarse branch has no use for the gate.

    Returns:
        [T, H, D]; rows of padding are 0. With `split` also the coarse branch of each tile, float32 [H, tiles, D], the
        protected segments' first.
    """
    used, config, router = layout.num_tokens, RELEASED, (None, None)
    tensors = tuple(x[:used].transpose(0, 1)[None] for x in (query, key, value))
    dense = sparsity <= 0
    if trained is not None:
        dense = dense or trained.config is None
        config, router = trained.config or RELEASED, trained.of(query)
        gate = gate if trained.config is not None and config.coarse else None
    cubes = layout.grid.num_cubes(resolve_tile(config, layout.grid))
    topk = cubes if dense else kept(sparsity, cubes)
    if gate is None and topk == cubes:
        output = dense_attention(*tensors)
    else:
        output = vsa_attention(
            *tensors,
            config=_keeping(config, topk, gate is not None),
            layout=layout,
            gate_coarse=None if gate is None else gate[:used].transpose(0, 1)[None],
            proj_query=router[0],
            proj_key=router[1],
            impl=impl,
        )
    rows = torch.nn.functional.pad(output[0].transpose(0, 1), (0, 0, 0, 0, 0, query.shape[0] - used))
    return (rows, _coarse(*tensors, config, layout)) if split else rows


@functools.lru_cache(maxsize=64)
def _keeping(config: VSAConfig, topk: int, coarse: bool) -> VSAConfig:
    """The configuration with so many cubes; without a gate there is no coarse branch."""
    return config.replace(topk=topk, coarse=coarse)


def _coarse(query: Tensor, key: Tensor, value: Tensor, config: VSAConfig, layout: TokenLayout) -> Tensor:
    """The coarse branch, one row for each tile, in the host's order: [H, tiles, D] in float32."""
    tiles = PackedTiles(config, layout, query.device)
    pooled = (pool_blocks(tiles.to_cubes(x), tiles.slot, tiles.cube_sizes) for x in (query, key, value))
    query_c, key_c, value_c = pooled
    coarse = product(pooled_scores(query_c, key_c, query.shape[-1] ** -0.5).softmax(-1), value_c)
    # foveal's tiles are the video's cubes, then the protected chunks.
    return coarse[0].roll(tiles.num_cubes - tiles.video_cubes, 1)
