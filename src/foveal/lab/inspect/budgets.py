"""Budgets from measurements: for each layer the smallest share of blocks whose output error is small enough."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from foveal.checks import check_choice, check_positive_int, check_ratio
from foveal.lab.inspect.statistics import ORDERS, reorder, selection_quality
from foveal.layout import TokenLayout, VideoGrid
from foveal.methods.sla.config import SLAConfig

KEEP_RATIOS = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7)


class BudgetCalibration:
    """Measures layers while a model runs dense, and says which share of blocks each of them needs.

    The error of a layer is |O_kept - O| / |O|, where O_kept attends only to the kept blocks: that of sparse attention
    before any training. Of a few denoising steps, the one with the largest error counts.

    Args:
        error: what each layer's error may be, averaged over its heads.
        block_q, block_k, token_order: how blocks are cut, as in `SLAConfig`.
        steps: how many denoising steps to look at, spread evenly over those of the generation.
        keep_ratios: the shares to try, ascending.
        query_blocks: how many query blocks of each head to look at.

    Attributes:
        errors: for each layer, a float [ratios] for each call that was looked at.
    """

    def __init__(
        self,
        error: float = 0.05,
        *,
        block_q: int = 64,
        block_k: int = 64,
        token_order: str = "raster",
        steps: int = 3,
        keep_ratios: Sequence[float] = KEEP_RATIOS,
        query_blocks: int = 16,
    ) -> None:
        check_ratio("error", error)
        for name, value in {"block_q": block_q, "block_k": block_k, "steps": steps}.items():
            check_positive_int(name, value)
        check_choice("token_order", token_order, ORDERS)
        self.error, self.steps, self.query_blocks = error, steps, query_blocks
        self.config = SLAConfig(block_q=block_q, block_k=block_k, token_order=token_order)
        self.keep_ratios = tuple(keep_ratios)
        self.errors: dict[str, list[Tensor]] = {}

    def look(
        self,
        layer: str,
        step: int | None,
        num_steps: int | None,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        layout: VideoGrid | TokenLayout,
    ) -> None:
        """Measure one call of a layer: its last sample, if its denoising step is one to look at.

        Args:
            step, num_steps: the denoising step, and their number; None if unknown, and every call is then looked at.
            query, key, value: [B, H, L, D], the whole sequence in order.
        """
        if step is not None and step not in _spread(num_steps, self.steps):
            return
        query, key, value = (x[-1:].detach() for x in (query, key, value))
        grid = layout
        if isinstance(layout, TokenLayout):
            # Protected keys go last; the quality counts their blocks as always kept.
            grid = layout.grid
            query = layout.split(query)[0]
            key, value = (torch.cat(layout.split(x), 2) for x in (key, value))
        tile = self.config.tile_for(grid)
        if tile is not None:
            query, key, value = (reorder(x, grid, tile) for x in (query, key, value))
        quality = selection_quality(
            query,
            key,
            value,
            block_q=self.config.block_q,
            block_k=self.config.block_k,
            keep_ratios=self.keep_ratios,
            query_blocks=self.query_blocks,
        )
        self.errors.setdefault(layer, []).append(quality.error["pooled"].mean(0))

    def budgets(self) -> dict[str, float]:
        """The keep_ratio of each layer that was looked at; 1 where no ratio that was tried is enough.

        Raises:
            ValueError: nothing was looked at.
        """
        if not self.errors:
            raise ValueError("nothing was looked at: run the model that is calibrated first")
        found = {}
        for layer, errors in self.errors.items():
            worst = torch.stack(errors).amax(0).tolist()
            enough = [ratio for ratio, error in zip(self.keep_ratios, worst, strict=True) if error <= self.error]
            found[layer] = enough[0] if enough else 1.0
        return found


def _spread(total: int, number: int) -> set[int]:
    """Numbers from 0 to total - 1, both ends among them, spread evenly."""
    if number == 1:
        return {0}
    return {round(index * (total - 1) / (number - 1)) for index in range(number)}
