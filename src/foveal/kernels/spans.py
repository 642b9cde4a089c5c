"""Cubes of more tokens than a slot of the kernels: each takes two slots, or one if its tokens fit.

The kernels then see slots, while scores, the coarse stage, and the choice see cubes.
Shape legend: B batch, H heads, C cubes, T blocks of text as large as a cube's two slots, S slots, W width of lists.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from foveal.kernels.values import packable

PARTS = 2


@packable
class Spans(NamedTuple):
    """Which slots each cube takes.

    owner: int64 [S], the cube of each slot.
    slots: int64 [C + T, 2], the slots of each cube, and of each block of text.
    counts: int32 [B or 1, C + T], how many of them hold a token.
    shares: float32 [S, 1], tokens of a slot over those of its cube.
    cubes: how many cubes there are.
    """

    owner: Tensor
    slots: Tensor
    counts: Tensor
    shares: Tensor
    cubes: int

    def sums(self, x: Tensor) -> Tensor:
        """[B, H, S, D] to [B, H, C, D], the sums over each cube's slots, in an order that does not vary."""
        first, second = self.slots[: self.cubes].unbind(1)
        second_counts = (self.counts[0, : self.cubes] > 1).to(x.dtype)[:, None]
        return torch.addcmul(x.index_select(2, first), x.index_select(2, second), second_counts)

    def means(self, x: Tensor) -> Tensor:
        """Means over slots [B, H, S, D] to those over cubes [B, H, C, D]."""
        return self.sums(x * self.shares)

    def of_slots(self, x: Tensor) -> Tensor:
        """[B, H, C, ...] to [B, H, S, ...]: what a cube has, each of its slots has."""
        return x.index_select(2, self.owner)

    def gradients(self, grad: Tensor) -> Tensor:
        """The gradients of means over cubes [B, H, C, D] to those of the means over slots [B, H, S, D]."""
        return self.of_slots(grad) * self.shares

    def lists(self, critical: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Lists of cubes and text, int32 [B, H, C, W] and [B, H, C], to lists of slots [B, H, S, 2 W] and [B, H, S]."""
        batch, width = critical.shape[0], critical.shape[-1]
        listed = torch.arange(width, device=critical.device) < counts[..., None]
        block = torch.where(listed, critical, 0).long()
        held = self.counts.expand(batch, -1)[torch.arange(batch, device=critical.device)[:, None, None, None], block]
        held = torch.where(listed, held, 0)
        ends = held.cumsum(-1)
        slots = critical.new_zeros((*critical.shape[:-1], PARTS * width + 1))  # the last takes what is no block
        for part in range(PARTS):
            place = torch.where(held > part, ends - held + part, PARTS * width)
            slots.scatter_(-1, place, self.slots[block, part].to(torch.int32))
        return self.of_slots(slots[..., :-1]), self.of_slots(ends[..., -1].to(torch.int32))
