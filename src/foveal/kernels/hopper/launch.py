"""Launchers of the Hopper kernels: how each case is cut up, descriptors, grids.

Kernels are compiled once per dtype, head_dim, block sizes and presence of `sizes`; lengths, list widths, counts and
strides are read at run time. Nothing here waits for the device.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from foveal.kernels.hopper.support import copyable
from foveal.kernels.launch_arguments import LOG2_E, Descriptors, ForwardCall, copy_strides, size_stride

TILE = 64  # rows of most tiles
TAIL = 8  # masks of so many columns at a tile's end are cheap


def short_tail(size: int, tile: int) -> bool:
    """Whether so many valid rows leave a tile's last few, and no others, to mask."""
    return tile - TAIL <= size < tile


class VideoGradients(NamedTuple):
    """Where gradients go whose tensors stand in tile order, and what is added to them there.

    grads: of query, key and value in raster order, [B, H, L, D] and [B, H, L + text, D] twice, any dense strides.
    pooled: gradients of pooled query, key and value, float32 [B, H, C, D], contiguous: each token takes its share.
    places: int64 [C * slot], where the tokens stand in raster order; -1 for none.
    sizes: int32 [1, C], tokens of each cube.
    """

    grads: tuple[Tensor, Tensor, Tensor]
    pooled: tuple[Tensor, Tensor, Tensor]
    places: Tensor
    sizes: Tensor


class KeyGradients(NamedTuple):
    """The linear branch's part of dK and dV: dphi(K_j) = V_j G_j^T + z_j, dV_j = phi(K_j) G_j.

    state: G, bfloat16 [B * H, Tk or more, D, D], contiguous; with one block where all key blocks share it.
    norm: z, float32 [B * H, Tk or more, D], contiguous; with one block where all key blocks share it.
    feature_map: "softmax", "elu" or "relu".
    """

    state: Tensor
    norm: Tensor
    feature_map: str


def forward_plan(
    head_dim: int, block_q: int, block_k: int, has_sizes: bool, feature_map: str | None = None, projected: bool = False
) -> dict[str, Any]:
    """How the forward is cut: which kernel, rows and columns of a copy of H (of W too), constants and launch options.

    Args:
        projected: whether H is, and W stays away.
    """
    if block_q == 128 and not has_sizes:
        constants = {"BLOCK_K": block_k, "SLOTS": 2 if head_dim == 128 else 3, "FEATURE_MAP": feature_map}
        return {"wide": True, "state_box": (head_dim,) * 2, "constants": constants, "options": {"num_warps": 4}}
    constants = {"BLOCK_Q": block_q, "BLOCK_K": block_k, "HAS_SIZES": has_sizes, "FEATURE_MAP": feature_map}
    # Three programs a multiprocessor: what the linear branch needs in the epilogue must not cost one of them.
    box = (64, head_dim) if projected else (head_dim, 64)
    return {"wide": False, "state_box": box, "constants": constants, "options": {"num_warps": 4, "maxnreg": 168}}


def dkdv_plan(head_dim: int, block_q: int, block_k: int, has_sizes: bool) -> dict[str, Any]:
    """Constants and launch options of the dK, dV kernel."""
    return {
        "constants": {"BLOCK_Q": block_q, "BLOCK_K": block_k, "SLOTS": 2, "HAS_SIZES": has_sizes},
        "options": {"num_warps": 4},
    }


def dq_plan(head_dim: int, block_q: int, block_k: int, has_sizes: bool, tail: bool = False) -> dict[str, Any]:
    """How dQ is cut: keys a tile, constants and launch options; `tail` for key blocks that all lack a few keys.

    64 queries: two programs a multiprocessor, for which the compiler is held to 128 registers a thread on average.
    """
    single = block_q == 64
    tile_k = 128 if block_q == block_k == 128 and (tail or not has_sizes) else 64  # masks take registers
    slots = (3, 2) if single else (256 // tile_k, 256 // tile_k)
    return {
        "tile_k": tile_k,
        "constants": {
            "BLOCK_Q": block_q,
            "BLOCK_K": block_k,
            "CONSUMERS": 1 if single else 2,
            "K_SLOTS": slots[0],
            "V_SLOTS": slots[1],
            "HAS_SIZES": has_sizes and not tail,
            "TAIL": tail,
        },
        "options": {"num_warps": 4, "maxnreg": 128} if single else {"num_warps": 4},
    }


@Descriptors
def _tiles(x: Tensor, rows: int, columns: int | None = None):
    """The descriptor of a tensor in tiles of `rows` by `columns` (all of them) of its last two dimensions."""
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    box = [1] * (x.dim() - 2) + [rows, columns or x.shape[-1]]
    return TensorDescriptor(x, list(x.shape), copy_strides(x), box, gl.NVMMASharedLayout(128, 16, x.dim()))


@Descriptors
def _statistics_tiles(x: Tensor):
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    return TensorDescriptor(x, [x.numel()], [1], [2 * TILE], gl.NVMMASharedLayout(0, 32, 1))


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _walkable(x: Tensor) -> Tensor:
    """x, or a copy if the copy engine cannot walk it as it lies."""
    return x if copyable(x) else x.clone(memory_format=torch.contiguous_format)


class Forward(ForwardCall):
    """`ForwardCall` for the Hopper kernels, of inputs that `supports` accepts."""

    def _prepare(self, query, key, value, block_q, block_k, projection, feature_map) -> None:
        (critical, counts, sizes), (output, lse) = self.lists, self.results
        head_dim, self.device, self.blocks = query.shape[-1], query.device, critical.shape[2]
        projected = projection is not None and projection[0] is None
        self.plan = forward_plan(head_dim, block_q, block_k, sizes is not None, feature_map, projected)
        query, key, value = (_walkable(x) for x in (query, key, value))
        tensors = (*(_tiles(x, TILE) for x in (query, key, value, output)), lse, critical, counts)
        self.tensors = tensors if self.plan["wide"] else (*tensors, sizes)
        self.weight, self.bias = None, None
        if projection is not None:
            self.bias = projection[1]
            if not projected:
                self.weight = _tiles(projection[0], *self.plan["state_box"])

    def run(self, pairs: range, state: Tensor | None = None, norm: Tensor | None = None) -> None:
        from foveal.kernels.hopper.forward_kernel import block_sparse_fwd_kernel
        from foveal.kernels.hopper.forward_wide_kernel import block_sparse_fwd_wide_kernel
        from foveal.kernels.triton.launch import launch

        strides = (0, 0, 0)
        if state is not None:
            shared = state.stride(1) == 0 or state.shape[1] == 1
            strides = (0 if shared else 1, *norm.stride()[:2])
            state = _tiles(state[:, :1] if shared else state, *self.plan["state_box"])
        tensors = (*self.tensors, state, self.weight, norm, self.bias, self.scale_log2, self.heads, pairs.start)
        named = self.plan["constants"] | self.plan["options"]
        with torch.cuda.device(self.device):
            if self.plan["wide"]:
                total = len(pairs) * self.blocks
                grid = (min(total, _multiprocessors(self.device)),)
                arguments = *tensors, self.blocks, total, *self.lengths, *strides
                launch(block_sparse_fwd_wide_kernel, grid, *arguments, **named)
            else:
                grid = -(-self.lengths[0] // TILE), len(pairs)
                arguments = *tensors, *self.lengths, self.size_stride, *strides
                launch(block_sparse_fwd_kernel, grid, *arguments, **named)


forward = Forward.at_once


def _video_arguments(video: VideoGradients | None) -> tuple[tuple, tuple]:
    """What the kernels for dQ, and for dK and dV, take to write in raster order, or not to."""
    if video is None:
        return (None, None, 0), (None, None, None, 0, 0)
    query, key, value = video.grads
    pooled_query, *pooled = video.pooled
    places, length = (video.places, video.sizes), query.shape[2]
    return (
        ((pooled_query, *places), query.stride(), length),
        ((*pooled, *places), key.stride(), value.stride(), length, key.shape[2]),
    )


def backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    delta: Tensor,
    lse: Tensor,
    critical: Tensor,
    counts: Tensor,
    columns: tuple[Tensor, Tensor, Tensor],
    sizes: Tensor | None,
    block_q: int,
    block_k: int,
    scale: float,
    grad_query: Tensor | None = None,
    linear: KeyGradients | None = None,
    uniform: int = 0,
    video: VideoGradients | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dQ, dK, dV, strided like query, key and value.

    Args:
        grad: [B, H, Lq, D], the gradient of the output; copied only if the copy engine cannot walk it.
        delta: float32 [B, H, Lq], rowsum(grad * output) less the gradient of the LSE.
        lse: float32 [B, H, Lq], natural log.
        columns: for each key block (flattened [B * H * Tk]) where its list starts in the third tensor, how long it
            is, and the lists of query blocks, ascending; all int32.
        query, key, value, critical, counts, sizes, block_q, block_k, scale: as in `forward`.
        grad_query: a gradient to add dQ to, in place; None for a new tensor.
        linear: what the linear branch adds to dK and dV.
        uniform: for square blocks, the size of every key block, if zeros stand behind its keys; 0 if not.
        video: tensors to write the gradients to instead, in raster order; it has no room for `linear`.
    """
    from foveal.kernels.hopper.dkdv_kernel import block_sparse_dkdv_kernel, row_statistics_kernel
    from foveal.kernels.hopper.dq_kernel import block_sparse_dq_kernel
    from foveal.kernels.triton.launch import launch

    batch, heads, query_length, head_dim = query.shape
    key_length, has_sizes, tile = key.shape[2], sizes is not None, TILE
    add = grad_query is not None
    if video is not None:
        grad_query, grad_key, grad_value = video.grads
    else:
        grad_query = grad_query if add else torch.empty_like(query)
        grad_key, grad_value = torch.empty_like(key), torch.empty_like(value)
    grad, query, key, value = (_walkable(x) for x in (grad, query, key, value))
    targets = [x if video is not None else _tiles(x, tile) for x in (grad_query, grad_key, grad_value)]
    query_video, key_video = _video_arguments(video)
    num_tiles = -(-query_length // block_q) * (block_q // tile)
    statistics = torch.empty(batch * heads * num_tiles * 2 * tile, dtype=torch.float32, device=query.device)
    offsets, column_counts, column_rows = columns
    scales = (scale, scale * LOG2_E)
    terms, term_strides, feature_map = (None, None), (0, 0, 0), None
    if linear is not None:
        terms = _tiles(linear.state, min(tile, head_dim)), linear.norm
        step = int(linear.state.shape[1] > 1)
        term_strides = step, linear.norm.stride(0), step * linear.norm.stride(1)
        feature_map = linear.feature_map
    with torch.cuda.device(query.device):
        launch(
            row_statistics_kernel, (-(-num_tiles // 4), batch * heads),
            lse, delta, statistics, query_length, num_tiles, num_warps=4,
        )  # fmt: skip
        plan = dq_plan(head_dim, block_q, block_k, has_sizes, tail=short_tail(uniform, block_k))
        tile_k = plan["tile_k"]
        per_program = tile * plan["constants"]["CONSUMERS"]
        launch(
            block_sparse_dq_kernel, (-(-query_length // per_program), heads, batch),
            _tiles(query, tile), _tiles(key, tile_k), _tiles(value, tile_k), _tiles(grad, tile),
            targets[0], statistics, critical, counts, sizes, *query_video, *scales, query_length, key_length,
            critical.shape[3], size_stride(sizes), uniform, ADD=add, **plan["constants"], **plan["options"],
        )  # fmt: skip
        plan = dkdv_plan(head_dim, block_q, block_k, has_sizes)
        launch(
            block_sparse_dkdv_kernel, (-(-key_length // tile), heads, batch),
            _tiles(query, tile), _tiles(key, tile), _tiles(value, tile), _tiles(grad, tile),
            _statistics_tiles(statistics), *targets[1:],
            offsets, column_counts, column_rows, sizes, *terms, *key_video, *scales, query_length, key_length,
            size_stride(sizes), *term_strides, FEATURE_MAP=feature_map, **plan["constants"], **plan["options"],
        )  # fmt: skip
    return grad_query, grad_key, grad_value
