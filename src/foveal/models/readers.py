"""What the adapters of several families read from a transformer: its attention layers and its token grid."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from foveal.layout import VideoGrid


def layers_of_blocks(transformer: nn.Module, stacks: tuple[str, ...], attention: str) -> dict[str, nn.Module]:
    """The attention modules of a transformer's blocks by qualified name ("blocks.3.attn1"), in order of depth.

    Args:
        stacks: names of the lists of blocks, in the order in which they run; a transformer may lack some of them.
        attention: the name of the attention in each block.
    """
    return {
        f"{stack}.{index}.{attention}": getattr(block, attention)
        for stack in stacks
        for index, block in enumerate(getattr(transformer, stack, ()))
    }


def patch_size(config: Any) -> tuple[int, int, int]:
    """The sides of a token (frames, height, width) in latent pixels, from a transformer's configuration."""
    patch = config.get("patch_size", 1)
    if isinstance(patch, int):
        return config.get("patch_size_t") or 1, patch, patch
    return tuple(patch)


def grid_of_latent(transformer: nn.Module, sides: Sequence[int]) -> VideoGrid:
    """The token grid of a latent with these sides (frames, height, width)."""
    return VideoGrid(*(side // patch for side, patch in zip(sides, patch_size(transformer.config), strict=True)))
