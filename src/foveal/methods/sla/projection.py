"""The projection of SLA's linear branch."""

from __future__ import annotations

import torch
from torch import nn

from foveal.methods.parameters import PreciseParameters


class Projection(PreciseParameters):
    """W and b of the linear branch, zero at the start; call it for both."""

    weight: nn.Parameter
    bias: nn.Parameter

    def __init__(self, head_dim: int) -> None:
        super().__init__(weight=torch.zeros(head_dim, head_dim), bias=torch.zeros(head_dim))

    def extra_repr(self) -> str:
        return f"head_dim={self.bias.numel()}"
