"""vLLM-Omni's SPARSE_ATTN: VSA as a function of what its models pass, and what its slot for VSA shares with that."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from foveal.layout import VideoGrid
from foveal.methods.vsa.attention import vsa_attention
from foveal.methods.vsa.config import VSAConfig


def sparse_attention(
    query: Tensor, key: Tensor, value: Tensor, params: Mapping[str, Any], is_causal: bool, softmax_scale: float
) -> Tensor:
    """VSA as a kernel of vLLM-Omni's SPARSE_ATTN: the entry point `foveal` in `vllm_omni.sparse_attn`.

    Args:
        query, key, value: [B, L, H, D], the tokens of a video in raster order.
        params: what the host merges of its configuration and of the forward. foveal reads `topk` or `keep_ratio`,
            `tile`, `score`, `keep_mass`, and `max_keep_ratio` (see `VSAConfig`), `impl` (see `block_sparse_attention`),
            the video's shape in tokens from `vsa_dit_seq_shape`, or from `latent_shape` and `patch_size`, and
            `gate_compress` [B, L, H, D]. Without a gate there is no coarse branch.
        is_causal: must be False.
        softmax_scale: the scale of both stages.

    Returns:
        [B, L, H, D] in the dtype of `query`.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    if is_causal:
        raise ValueError("is_causal must be False: foveal's attention is not causal")
    names = ("topk", "keep_ratio", "tile", "score", "keep_mass", "max_keep_ratio")
    fields = {name: params[name] for name in names if name in params}
    if isinstance(fields.get("tile"), list):
        fields["tile"] = tuple(fields["tile"])
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    gate = coarse_gate(params.get("gate_compress"), query)
    output = vsa_attention(
        query,
        key,
        value,
        config=config_of(**fields, coarse=gate is not None),
        grid=grid_of(params),
        gate_coarse=gate,
        scale=softmax_scale,
        impl=params.get("impl", "auto"),
    )
    return output.transpose(1, 2)


@functools.lru_cache(maxsize=64)
def config_of(**fields: Any) -> VSAConfig:
    """`VSAConfig(**fields)`, validated once."""
    return VSAConfig(**fields)


def coarse_gate(gate: Tensor | None, query: Tensor) -> Tensor | None:
    """The host's gate [B, L, H, D] as foveal's [B, H, L, D]; None, for no coarse branch, where the host has none."""
    return None if gate is None else gate.transpose(1, 2)[:, :, : query.shape[2]]


def grid_of(params: Mapping[str, Any]) -> VideoGrid:
    """The video's shape in tokens; a ValueError if the host says none."""
    shape = params.get("vsa_dit_seq_shape")
    if shape is None and "latent_shape" in params and "patch_size" in params:
        shapes = torch.as_tensor(params["latent_shape"]) // torch.as_tensor(params["patch_size"])
        distinct = shapes.reshape(-1, 3).unique(dim=0).tolist()
        if len(distinct) > 1:
            raise ValueError(f"latent_shape must be the same for all samples of a batch, got the grids {distinct}")
        shape = distinct[0]
    if shape is None:
        raise ValueError(
            "params must hold the video's shape in tokens, as vsa_dit_seq_shape, or latent_shape and patch_size, "
            f"got {sorted(params)}"
        )
    return VideoGrid(*map(int, shape))
