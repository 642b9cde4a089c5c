"""Wan-Animate-2 (`WanAnimate2Transformer3DModel` of diffusers): Wan's blocks over a video and its reference.

A forward over the reference video stores its keys and values, once for a segment; its attention stays dense. Then, in
each denoising step, every token of the generated video reads all of that video and, of the reference, the tokens of its
own frame. The generated video has one frame more than the reference, which comes first and reads no reference. Text
goes through cross-attention.

The method stands in for what is read of the generated video, and the reference is exact. Their outputs are weighed by
how much softmax mass each of the two reads: O = (1 - w) O_video + w O_reference, with
w = sigmoid(LSE_reference - LSE_video). With everything kept that is one softmax over both.

Shape legend: B batch, F frames, S tokens of a frame, L tokens, C hidden width, H heads, D head dimension.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from foveal.blocks import BlockSelection
from foveal.kernels.api import block_sparse_attention
from foveal.kernels.dense import dense_attention
from foveal.layout import VideoGrid
from foveal.models.families.wan import rotate
from foveal.models.readers import grid_of_latent, layers_of_blocks
from foveal.models.self_attention import LayerAttention
from foveal.symbols import ceil_div

__all__ = ["dimensions", "read_grid", "self_attention", "self_attention_layers"]

BLOCK = 64  # of a frame's attention to its reference, all of whose blocks are read


def self_attention_layers(transformer: nn.Module) -> dict[str, nn.Module]:
    """The self-attention modules by qualified name; `cross_attn` stays as it is."""
    return layers_of_blocks(transformer, ("blocks",), "self_attn")


def dimensions(attn: nn.Module) -> tuple[int, int, int]:
    """(hidden_dim, num_heads, head_dim) of an attention module."""
    width = attn.to_q.out_features
    return attn.to_q.in_features, attn.heads, width // attn.heads


def read_grid(transformer: nn.Module, arguments: dict[str, Any]) -> VideoGrid:
    """The token grid of this pass: its latents are a list of [channels, frames, height, width]."""
    return grid_of_latent(transformer, arguments["hidden_states"][0].shape[1:])


def self_attention(
    attn: nn.Module,
    sparse_attention: LayerAttention,
    hidden_states: Tensor,
    rotary_emb: Tensor,
    grid_sizes: Tensor,
    kv_cache: Any,
    kv_cache_mode: str,
    rope_stride: int = 1,
    reference_rotary_emb: Tensor | None = None,
    reference_grid_sizes: Tensor | None = None,
    reference_rope_stride: int = 1,
    attention_mask: Any = None,
    origin_latent_frames: int | None = None,
    origin_latent_hw: int | None = None,
) -> Tensor:
    """What diffusers' `WanAnimate2AttnProcessor` does, with `sparse_attention` over the generated video.

    Args:
        attn: the layer's `WanAnimate2Attention`.
        sparse_attention: the method's attention. Its grid is that of `hidden_states`.
        hidden_states: [B, L, C].
        rotary_emb, reference_rotary_emb: complex [512, D / 2], from which time, height, and width take a part each.
        grid_sizes, reference_grid_sizes: of the tokens; the grid and the number of cached keys say the same.
        kv_cache: takes and gives the reference's keys and values, [B, L, H, D] each, before their rotary embedding.
        kv_cache_mode: "extract" for the reference's pass, "cached" for the generated video's.
        rope_stride, reference_rope_stride: between the frames in the table of the rotary embedding.
        attention_mask: the pattern above, as blocks for FlexAttention.
        origin_latent_frames, origin_latent_hw: frames of the reference and tokens of a frame that the mask is made for.

    Raises:
        ValueError: the video is not of the size that the mask is made for: diffusers then lets its tokens read padding.
    """
    if getattr(attn, "fused_projections", False):
        query, key, value = attn.to_qkv(hidden_states).chunk(3, dim=-1)
    else:
        query, key, value = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
    query, key = attn.norm_q(query), attn.norm_k(key)
    query, key, value = (x.unflatten(2, (attn.heads, -1)) for x in (query, key, value))
    grid = sparse_attention.grid
    if kv_cache_mode == "extract":
        kv_cache.store(key, value)
    table = _rotary_table(rotary_emb, grid, rope_stride)
    query, key = (rotate(x, *table).type_as(value).transpose(1, 2) for x in (query, key))
    value = value.transpose(1, 2)
    if kv_cache_mode == "extract":
        output = dense_attention(query, key, value)
    else:
        _check_size(grid, origin_latent_frames, origin_latent_hw)
        reference = VideoGrid(grid.frames - 1, grid.height, grid.width)
        reference_key, reference_value = kv_cache.get()
        if reference_key.shape[1] != reference.num_tokens:
            raise ValueError(
                f"the reference must have the {reference.num_tokens} tokens of the generated video without its first "
                f"frame, got {reference_key.shape[1]}"
            )
        table = _rotary_table(reference_rotary_emb, reference, reference_rope_stride)
        reference_key = rotate(reference_key, *table).type_as(value)
        output = sparse_attention(query, key, value, hidden_states)
        kept = sparse_attention.kept_mass(query, key)
        tensors = (x.transpose(1, 2) for x in (reference_key, reference_value))
        output = _with_reference(output, kept, query, *tensors, grid)
    output = output.transpose(1, 2).flatten(2).type_as(hidden_states)
    for layer in attn.to_out:
        output = layer(output)
    return output


def _with_reference(output: Tensor, kept: Tensor, query: Tensor, key: Tensor, value: Tensor, grid: VideoGrid) -> Tensor:
    """The output with each frame's share of its reference frame.

    Args:
        output, query: [B, H, F * S, D].
        kept: [B, H, F * S], the log-sum-exp of what `output` has read.
        key, value: [B, H, (F - 1) * S, D], of the reference.
    """
    size, frames = grid.height * grid.width, grid.frames - 1
    if not frames:
        return output

    def by_frame(x: Tensor) -> Tensor:
        """[B, H, (F - 1) * S, D] to [B * (F - 1), H, S, D]."""
        return x.unflatten(2, (frames, size)).transpose(1, 2).flatten(0, 1)

    query, key, value = (by_frame(x) for x in (query[:, :, size:], key, value))
    blocks = ceil_div(size, BLOCK)
    rows = (*query.shape[:2], blocks)
    everything = BlockSelection(
        critical=torch.arange(blocks, dtype=torch.int32, device=query.device).expand(*rows, blocks).contiguous(),
        critical_count=torch.full(rows, blocks, dtype=torch.int32, device=query.device),
        marginal=None,
        block_q=BLOCK,
        block_k=BLOCK,
        query_length=size,
        key_length=size,
    )
    read, mass = block_sparse_attention(query, key, value, everything, return_lse=True)
    read, mass = (x.unflatten(0, (-1, frames)).transpose(1, 2).flatten(2, 3) for x in (read, mass))
    first, others = output.split((size, frames * size), 2)
    share = torch.sigmoid(mass - kept[:, :, size:]).unsqueeze(-1)
    return torch.cat((first, torch.lerp(others.to(share.dtype), read.to(share.dtype), share).type_as(first)), 2)


def _rotary_table(frequencies: Tensor, grid: VideoGrid, stride: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the grid's tokens, [1, L, 1, D] each, every angle twice, from complex [512, D / 2]."""
    half = frequencies.shape[1]
    parts = frequencies.split((half - 2 * (half // 3), half // 3, half // 3), 1)
    sides = (parts[0][: grid.frames * stride : stride], parts[1][: grid.height], parts[2][: grid.width])
    shapes = ((grid.frames, 1, 1, -1), (1, grid.height, 1, -1), (1, 1, grid.width, -1))
    angles = [x.view(shape).expand(*grid.shape, -1) for x, shape in zip(sides, shapes, strict=True)]
    table = torch.cat(angles, -1).flatten(0, 2)[None, :, None]
    cosines, sines = (x.float().repeat_interleave(2, -1) for x in (table.real, table.imag))
    return cosines, sines


def _check_size(grid: VideoGrid, frames: int | None, size: int | None) -> None:
    expected = (None if frames is None else frames + 1, size)
    if (grid.frames, grid.height * grid.width) != expected:
        raise ValueError(
            f"origin_len and origin_area must be those of the generated video, {grid.frames} frames of "
            f"{grid.height * grid.width} tokens, got {expected[0]} and {expected[1]}; "
            "run the model dense for this input"
        )
