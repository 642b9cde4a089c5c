"""FastVideo: foveal behind `video_sparse_attn` and `block_sparse_attn_from_indices` of fastvideo-kernel.

Shape legend: B batch, H heads, S tokens in tile order, padded to whole blocks of b tokens, T = S / b, D head dim. The
valid tokens of a block are at its front.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from foveal.blocks import BlockSelection, pick_blocks, pool_blocks, pooled_scores
from foveal.checks import product, validate_qkv, without_autocast
from foveal.hosts.patching import Patch, check_host_function, import_host
from foveal.kernels.api import BACKENDS, block_sparse_attention, choose_impl
from foveal.methods.vsa.gates import check_gates

BLOCKS = (64, 128)  # tokens of a block in the kernels
WIDE = 256  # tokens of a block that runs as two of the kernels'


def patch(impl: str) -> Patch:
    """The host's two public functions replaced by ones that run `impl`."""
    package = import_host("fastvideo_kernel", "fastvideo-kernel", "pip install fastvideo-kernel einops")

    # Their names and parameters are the host's: callers pass them by name.
    def video_sparse_attn(
        q,
        k,
        v,
        variable_block_sizes,
        q_variable_block_sizes,
        topk,
        block_size=64,
        compress_attn_weight=None,
    ):
        """VSA over tokens in tile order, by foveal; see `foveal.hosts.fastvideo.vsa_over_tiles`."""
        sizes = (variable_block_sizes, q_variable_block_sizes)
        return vsa_over_tiles(q, k, v, *sizes, topk, block_size, compress_attn_weight, impl)

    def block_sparse_attn_from_indices(q, k, v, q2k_idx, q2k_num, variable_block_sizes):
        """Block-sparse attention over given lists, by foveal; see `foveal.hosts.fastvideo.attention_from_lists`."""
        return attention_from_lists(q, k, v, q2k_idx, q2k_num, variable_block_sizes, impl)

    replacements = []
    for function in (video_sparse_attn, block_sparse_attn_from_indices):
        check_host_function("fastvideo", "fastvideo-kernel", package, function.__name__, function)
        replacements.append((package, function.__name__, function))
    return Patch(replacements)


@without_autocast
def vsa_over_tiles(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_block_sizes: Tensor,
    query_block_sizes: Tensor,
    topk: int,
    block_size: int | tuple[int, int, int],
    gate_coarse: Tensor | None,
    impl: str,
) -> Tensor:
    """O = Gc * Oc + Of over tokens that stand in tile order already (VSA, arXiv 2505.13389, eq. 1-4).

    Args:
        query: [B, H, Sq, D]; key, value: [B, H, Sk, D].
        key_block_sizes, query_block_sizes: int [T] each, valid tokens of each block, at least 1.
        topk: blocks that each block attends to, capped at their number.
        block_size: the cube of tokens. An int is the side of a cube, as in the host.
        gate_coarse: [B, H, Sq, D], or None for 1.
        impl: see `block_sparse_attention`.

    Returns:
        [B, H, Sq, D] in the dtype of `query`. What its padding rows hold means nothing.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    block = math.prod((block_size,) * 3 if isinstance(block_size, int) else block_size)
    if block not in (*BLOCKS, WIDE):
        raise ValueError(
            f"block_size must hold 64, 128, or 256 tokens with foveal's patch, got {block_size!r}, which holds {block} "
            "(an int is the side of a cube); undo the patch to run the host's own function"
        )
    query_sizes = _sizes("q_variable_block_sizes", query_block_sizes, query, block)
    key_sizes = _sizes("variable_block_sizes", key_block_sizes, key, block)
    scale = query.shape[-1] ** -0.5
    # Whether other tensors hold the same sizes could only be read on the host.
    if block != WIDE and query_block_sizes is key_block_sizes:
        validate_qkv(query, key, value)
        check_gates(query, gate_coarse, None)
        backend = choose_impl(impl, query, key, value, block, block).impl
        if backend in BACKENDS:
            from foveal.methods.vsa.gpu import VSAOptions, tiled_call, vsa_attention_gpu

            call = tiled_call((query, key, value), gate_coarse, key_sizes, block, topk)
            return vsa_attention_gpu(call, VSAOptions(scale, 1.0, backend))[0]
    pooled_query = pool_blocks(query, block, query_sizes)
    pooled_key, pooled_value = (pool_blocks(x, block, key_sizes) for x in (key, value))
    scores = pooled_scores(pooled_query, pooled_key, scale)
    critical, counts, _ = pick_blocks(scores, topk=topk)
    if block == WIDE:
        selection = _selection(*_halved(critical, counts, key_sizes), query, key, WIDE // 2)
    else:
        selection = _selection(critical, counts, key_sizes, query, key, block)
    fine = block_sparse_attention(query, key, value, selection, scale=scale, impl=impl)
    # One row for each block, which all its tokens share.
    coarse = product(scores.softmax(-1), pooled_value).to(fine.dtype).unsqueeze(3)
    fine = fine.unflatten(2, (-1, block))
    if gate_coarse is None:
        output = fine + coarse
    else:
        output = torch.addcmul(fine, coarse, gate_coarse.unflatten(2, (-1, block)))
    return output.flatten(2, 3).to(query.dtype)


def attention_from_lists(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lists: Tensor,
    counts: Tensor,
    key_block_sizes: Tensor,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """Softmax attention of each query block over its listed key blocks.

    Args:
        query: [B, H, Sq, D]; key, value: [B, H, Sk, D].
        lists: int [B, H, Tq, W], each row's key blocks in any order; entries past the row's count may hold anything.
        counts: int [B, H, Tq].
        key_block_sizes: int [Tk], valid tokens of each key block.

    Returns:
        [B, H, Sq, D], and the base-2 log-sum-exp [B, H, Sq] in float32, without a gradient, as the host's Triton
        backend gives it.
    """
    blocks = key_block_sizes.numel()
    block = key.shape[2] // max(1, blocks)
    if block not in BLOCKS:
        raise ValueError(
            f"variable_block_sizes must have one entry for every 64 or 128 of the {key.shape[2]} keys with foveal's "
            f"patch, got {blocks}; undo the patch to run the host's own function"
        )
    sizes = _sizes("variable_block_sizes", key_block_sizes, key, block)
    listed = torch.arange(lists.shape[-1], device=lists.device) < counts[..., None]
    ascending = torch.where(listed, lists, blocks).sort(-1).values
    critical = torch.where(listed, ascending, 0).to(torch.int32)
    selection = _selection(critical, counts.to(torch.int32), sizes, query, key, block)
    output, lse = block_sparse_attention(query, key, value, selection, impl=impl, return_lse=True)
    return output, (lse.detach() * math.log2(math.e)).float()


def _halved(critical: Tensor, counts: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Lists, counts, and valid tokens of blocks of 256 tokens as those of blocks of 128: the same tokens."""
    half = torch.arange(2, dtype=torch.int32, device=critical.device)
    lists = (critical[..., None] * 2 + half).flatten(-2).repeat_interleave(2, 2)
    return (
        lists,
        (counts * 2).repeat_interleave(2, 2),
        (sizes[..., None] - half * (WIDE // 2)).clamp(0, WIDE // 2).flatten(-2),
    )


def _selection(critical, counts, key_sizes, query, key, block) -> BlockSelection:
    return BlockSelection(
        critical=critical,
        critical_count=counts,
        marginal=None,
        block_q=block,
        block_k=block,
        query_length=query.shape[2],
        key_length=key.shape[2],
        key_block_sizes=key_sizes,
    )


def _sizes(name: str, sizes: Tensor, x: Tensor, block: int) -> Tensor:
    """The sizes as int32 [1, T] on x's device; a ValueError unless x is T whole blocks."""
    if sizes.numel() * block != x.shape[2]:
        raise ValueError(
            f"{name} must have one entry for each block of {block} of the {x.shape[2]} tokens, which must be whole "
            f"blocks, got {sizes.numel()} entries"
        )
    return sizes.to(x.device, torch.int32).view(1, -1)
