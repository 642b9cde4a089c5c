"""Where the tokens of one SLA2 call stand, and which key blocks its router ranks and keeps.

Blocks are cut from the video in raster order, in tile order, or beside the protected segments of a packed sequence.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from foveal.blocks import BlockSelection, pool_blocks
from foveal.kernels.api import fits_kernel, validate_selection
from foveal.kernels.choice import choose_blocks
from foveal.kernels.order import unsort_tokens
from foveal.layout import Where, resolve_layout
from foveal.methods.routing import Router
from foveal.methods.sla.order import token_order, validate_tile_order, video_sorted
from foveal.methods.sla.packed import packed_keys
from foveal.methods.sla2.config import SLA2Config
from foveal.rules import Choosing, SelectionRule, num_critical, selection_rule


class CallBlocks:
    """The blocks of one call.

    Args:
        query, key: [B, H, L, D], as the caller has them.
        selection: the caller's, or None.
        on_kernels: whether the call runs on a GPU's kernels.

    Attributes:
        query: the queries that have blocks, in the order that these are cut from.
        slow: whether a GPU chooses in PyTorch.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        config: SLA2Config,
        where: Where,
        selection: BlockSelection | None,
        on_kernels: bool = False,
    ) -> None:
        grid, layout, protected_keys, kv_lengths = where
        grid, layout = resolve_layout(grid, layout)
        self.config, self.key, self._on_kernels = config, key, on_kernels
        self.protected_keys, self.kv_lengths = protected_keys, kv_lengths
        self.packed = self.order = None
        if layout is not None:
            self.packed = packed_keys(query, key, layout, config.branches, protected_keys, kv_lengths, on_kernels)
            self.query = self.packed.video(layout.split(query)[0])
            self.video_key = self.packed.video(key[:, :, layout.video])
            self.protected_keys, self.padding, self.kv_lengths = None, kv_lengths, None
        else:
            if selection is not None:
                self._refuse_beside_a_selection()
            if config.token_order == "tile":
                if grid is None:
                    raise ValueError(
                        'grid is required for token_order="tile": VideoGrid(frames, height, width) in tokens'
                    )
                grid.check_length(query.shape[2])
                if selection is None:
                    validate_tile_order(grid, key, protected_keys, kv_lengths)
                self.order = token_order(config.branches, grid, query.device)
            elif grid is not None:
                grid.check_length(query.shape[2])
            self.query = self._sorted(query)
            self.video_key = self._sorted(key)
        self.slow = not fits_kernel(self.query, self.video_key, config.block_k)

    def _refuse_beside_a_selection(self) -> None:
        for name in ("protected_keys", "kv_lengths"):
            if getattr(self, name) is not None:
                raise ValueError(f"{name} goes into a selection when that is made; give {name} or selection, not both")

    def _sorted(self, x: Tensor) -> Tensor:
        return x if self.order is None else video_sorted(x, self.order, self._on_kernels)

    def in_blocks(self, x: Tensor) -> Tensor:
        """Keys or values in the order that blocks are cut from."""
        return self._sorted(x) if self.packed is None else self.packed.in_blocks(x)

    def output(self, video: Tensor, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """The output of all queries in the caller's order, from that of the queries that have blocks."""
        if self.packed is not None:
            return self.packed.with_protected_queries(video, query, key, value, self.padding, scale)
        return video if self.order is None else unsort_tokens(video, self.order, self._on_kernels)

    def rule(self) -> SelectionRule:
        """How to choose among the blocks that the router ranks."""
        config = self.config
        limits = {"protected_keys": self.protected_keys, "kv_lengths": self.kv_lengths}
        blocks, choosing = (config.block_q, config.block_k), Choosing(keep_ratio=config.keep_ratio)
        return selection_rule(self.query, self.video_key, blocks, choosing, **limits)

    def choose(self, router: Router, scale: float) -> BlockSelection:
        """The blocks that the router keeps, and the protected ones."""
        config, query, key = self.config, self.query, self.video_key
        block_q, block_k, rule = config.block_q, config.block_k, self.rule()
        if self.slow:
            with torch.no_grad():
                pooled = router.project(pool_blocks(query, block_q), pool_blocks(key, block_k, rule.key_block_sizes))
            of_pooled = rule._replace(block_q=1, block_k=1, key_block_sizes=None)  # whose tokens are blocks
            critical, counts, _ = choose_blocks(*pooled, scale, of_pooled, False)
        else:
            from foveal.methods.sla2.gpu_choice import choose_gpu

            critical, counts = choose_gpu(query, key, rule, router, scale)
        selection = BlockSelection.by_rule(rule, query, key, critical, counts)
        if self.packed is None:
            return selection
        return self.packed.with_protected(selection, num_critical(self.packed.video_blocks, config.keep_ratio, None))

    def checked(self, selection: BlockSelection) -> BlockSelection:
        """A caller's selection; a TypeError or ValueError unless it was made for such a call."""
        length = self.video_key.shape[2] if self.packed is None else self.packed.length
        validate_selection(selection, self.query, self.key[:, :, :1].expand(-1, -1, length, -1))
        blocks = self.config.block_q, self.config.block_k
        if (selection.block_q, selection.block_k) != blocks:
            raise ValueError(
                f"selection has blocks of {selection.block_q}x{selection.block_k}, "
                f"but config asks for {blocks[0]}x{blocks[1]}"
            )
        return selection if self.packed is None else dataclasses.replace(selection, key_block_sizes=self.packed.sizes)

    def ranks_all(self, sizes: Tensor | None) -> bool:
        """Whether every key block is the router's choice."""
        protected = self.protected_keys is not None and self.protected_keys[0] < self.protected_keys[1]
        return self.packed is None and sizes is None and not protected

    def ranked(self, sizes: Tensor | None) -> Tensor:
        """bool [B or 1, C]: which of the first C key blocks are the router's choice, by the blocks' valid tokens."""
        if self.packed is not None:
            return torch.ones((1, self.packed.video_blocks), dtype=torch.bool, device=self.key.device)
        blocks = -(-self.video_key.shape[2] // self.config.block_k)
        ranked = torch.ones((1, blocks), dtype=torch.bool, device=self.key.device) if sizes is None else sizes > 0
        if self.protected_keys is not None and self.protected_keys[0] < self.protected_keys[1]:
            start, stop = self.protected_keys
            index = torch.arange(blocks, device=self.key.device) * self.config.block_k
            ranked = ranked & ((index >= stop) | (index + self.config.block_k <= start))
        return ranked
