"""Where the keys of SLA stand in a packed sequence: the video's in blocks of their own, then the protected ones.

The video's last block may be partial. The places behind it stay empty, so that no block holds keys of both. The
protected keys follow without gaps: all of their blocks are critical, so it does not matter where one of them ends.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from foveal.blocks import BlockSelection
from foveal.checks import cached_constant, check_kv_lengths
from foveal.kernels.choice import append_blocks, block_sizes
from foveal.kernels.dense import dense_attention
from foveal.kernels.order import sort_tokens, unsort_tokens
from foveal.layout import TokenLayout
from foveal.methods.sla.config import SLAConfig
from foveal.symbols import ceil_div


class PackedKeys:
    """The key blocks of one call.

    Args:
        layout: the layout of the sequence.
        tile: the cube that the video's keys are sorted by; None for raster order.
        block_k: tokens per block.
        kv_lengths: int [B], valid keys at the front of each sample, in sequence order; None for all.
        on_kernels: whether the call runs on a GPU's kernels.

    Attributes:
        sizes: int32 [B or 1, T], valid keys of each block; None where all are full but the last.
    """

    def __init__(
        self,
        layout: TokenLayout,
        tile: tuple[int, int, int] | None,
        block_k: int,
        kv_lengths: Tensor | None,
        device: torch.device,
        on_kernels: bool,
    ) -> None:
        self.layout, self.block_k, self._on_kernels = layout, block_k, on_kernels
        self._order = None if tile is None else layout.grid.tile_order(tile, None, device)
        video, protected = layout.grid.num_tokens, layout.num_protected
        self.video_blocks, self.protected_blocks = ceil_div(video, block_k), ceil_div(protected, block_k)
        self.padding = self.video_blocks * block_k - video
        self.sizes, self._protected_counts = None, self.protected_blocks
        if self.padding or kv_lengths is not None:
            make_sizes = _block_sizes if torch.compiler.is_compiling() else _kept_block_sizes
            self.sizes = make_sizes(video, protected, block_k, device)
        if kv_lengths is not None:
            # Padding is at the end of the sequence, and so at the end of the protected keys.
            starts = video + torch.arange(self.protected_blocks, device=device) * block_k
            sizes = (kv_lengths.to(device)[:, None] - starts).clamp(min=0).minimum(self.sizes[:, self.video_blocks :])
            self.sizes = torch.cat((self.sizes[:, : self.video_blocks].expand(sizes.shape[0], -1), sizes.int()), 1)
            self._protected_counts = (sizes > 0).sum(1, dtype=torch.int32)

    @property
    def length(self) -> int:
        """Places for keys, the empty ones included."""
        return self.video_blocks * self.block_k + self.layout.num_protected

    def video(self, x: Tensor) -> Tensor:
        """The video's [B, H, Lv, D] in raster order, in the order that blocks are cut from."""
        return x if self._order is None else sort_tokens(x, self._order, self._on_kernels)

    def in_blocks(self, x: Tensor) -> Tensor:
        """Keys or values [B, H, L, D] in sequence order to [B, H, length, D], zeros in the empty places."""
        if self._order is None and not self.layout.before and not self.padding:
            return x
        video, protected = self.layout.split(x)
        return torch.cat((self.video(video), x.new_zeros((*x.shape[:2], self.padding, x.shape[3])), protected), 2)

    def with_protected(self, selection: BlockSelection, kept: int | None) -> BlockSelection:
        """A selection over the video's keys with the protected ones beside.

        kept: how many blocks each row has; None where that differs.
        """
        ends = self.video_blocks, self.video_blocks + self.protected_blocks
        lists = selection.critical[..., :kept], selection.critical_count
        critical, counts = append_blocks(*lists, *ends, self._protected_counts, ragged=kept is None)
        marginal = selection.marginal
        return dataclasses.replace(
            selection,
            critical=critical,
            critical_count=counts,
            marginal=None if marginal is None else F.pad(marginal, (0, self.protected_blocks)),
            key_length=self.length,
            key_block_sizes=self.sizes,
        )

    def with_protected_queries(
        self, video: Tensor, query: Tensor, key: Tensor, value: Tensor, kv_lengths: Tensor | None, scale: float
    ) -> Tensor:
        """The output in sequence order: the video's, in the order of its blocks, and dense attention of the others."""
        protected = dense_attention(self.layout.split(query)[1], key, value, kv_lengths, scale)
        video = video if self._order is None else unsort_tokens(video, self._order, self._on_kernels)
        return self.layout.join(video, protected)


def packed_keys(
    query: Tensor,
    key: Tensor,
    layout: TokenLayout,
    config: SLAConfig,
    protected_keys: tuple[int, int] | None,
    kv_lengths: Tensor | None,
    on_kernels: bool = False,
) -> PackedKeys:
    """The key blocks of a call with a layout's protected segments; a ValueError unless its arguments fit together."""
    layout.check_length(query.shape[2])
    layout.check_length(key.shape[2])
    if protected_keys is not None:
        raise ValueError("a layout names the protected keys; give protected_keys or a layout with segments, not both")
    if kv_lengths is not None:
        check_kv_lengths(kv_lengths, key.shape[0], layout.video.stop, layout.num_tokens)
    return PackedKeys(layout, config.tile_for(layout.grid), config.block_k, kv_lengths, key.device, on_kernels)


def _block_sizes(video: int, protected: int, block: int, device: torch.device) -> Tensor:
    """int32 [1, T]: the keys of each block, if all of them are valid."""
    return torch.cat([block_sizes(length, block, device) for length in (video, protected)])[None]


_kept_block_sizes = cached_constant(_block_sizes)
