"""Catch the block selections that a converted model makes while it runs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import Tensor, nn

from foveal.blocks import BlockSelection
from foveal.layout import VideoGrid
from foveal.methods.base import METHODS


@contextlib.contextmanager
def capture_selections(model: nn.Module) -> Iterator[dict[str, BlockSelection]]:
    """Capture the selection of every sparse layer at its latest call in the context, by the attention module's name.

    The layers run unchanged. The selection is made a second time from the same query and key.
    """
    found: dict[str, BlockSelection] = {}

    def record(name: str):
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            found[name] = module.select(args[0].detach(), args[1].detach(), **kwargs)

        return hook

    types = tuple(method.module_type for method in METHODS.values())
    handles = [
        module.register_forward_pre_hook(record(name), with_kwargs=True)
        for name, module in model.named_modules()
        if isinstance(module, types)
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def token_labels(
    selection: BlockSelection, attention: nn.Module, grid: VideoGrid, *, token: tuple[int, int, int], head: int
) -> Tensor:
    """What one query token of the first sample sees.

    Args:
        selection: the selection of the layer `attention`, from `capture_selections`.
        attention: the layer's module, `SparseLinearAttention` or `VideoSparseAttention`.
        grid: the video in tokens.
        token: the query token's (frame, row, column).
        head: the index of the head.

    Returns:
        int8 [frames, height, width]: +1 critical, 0 marginal, -1 negligible.
    """
    places = attention.token_places(grid)
    index = (token[0] * grid.height + token[1]) * grid.width + token[2]
    row = selection.labels()[0, head, places[index] // selection.block_q].cpu()
    return row[places // selection.block_k].view(grid.shape)
