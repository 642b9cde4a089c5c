"""Parameters that sparse layers read by a call and keep in float32, such as the projection of a linear branch."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class PreciseParameters(nn.Module):
    """Named parameters in float32; call it for all of them, in order.

    They stay in float32 when the model around them is cast to lower precision: they take small steps, which
    bfloat16 would round away. They are read by a call, so that offloading, which fetches a module's parameters when the
    module is called, fetches these. Where hooks wrap the call, it gives copies: group offloading takes the data out of
    the parameters again right after it, and with a stream of its own fills their memory while kernels may still read.
    """

    def __init__(self, **starts: Tensor) -> None:
        super().__init__()
        self._names = tuple(starts)
        for name, start in starts.items():
            self.register_parameter(name, nn.Parameter(start.to(torch.float32)))

    def forward(self) -> tuple[Tensor, ...]:
        tensors = tuple(getattr(self, name) for name in self._names)  # FSDP makes plain attributes of parameters
        return tuple(x.clone() for x in tensors) if self._may_lose_its_memory(tensors) else tensors

    def _may_lose_its_memory(self, tensors: tuple[Tensor, ...]) -> bool:
        """Whether someone wraps this module's calls, or the parameters are parts of a larger one (FSDP)."""
        wrapped = "forward" in self.__dict__ or self._forward_hooks or self._forward_pre_hooks
        if wrapped or torch.compiler.is_compiling():
            return True
        return any(type(x) is not nn.Parameter or x.untyped_storage().nbytes() != x.nbytes for x in tensors)

    def _apply(self, fn, recurse=True):
        def keep_float32(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if moved.is_floating_point() and moved.itemsize < 4 and tensor.dtype == torch.float32:
                return tensor.to(moved.device)
            return moved

        return super()._apply(keep_float32, recurse)
