"""Launches that cost the host little.

`kernel[grid](...)` looks at each argument in detail to find the compiled variant that fits: 40 to 80 us a launch, more
than many of these kernels run. A `Launcher` looks at what a variant depends on, and no further.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction


def _int_fact(x: int) -> int:
    """What a variant knows of an integer it is specialized on: that it is 1, or a multiple of 16; and its width."""
    return (2 if x == 1 else 1 if x % 16 == 0 else 0) + (0 if -(2**31) <= x < 2**31 else 4)


def _facts(arguments: tuple, specialized: tuple[bool, ...]) -> list:
    facts = []
    for x, matters in zip(arguments, specialized, strict=True):
        kind = type(x)
        if kind is int:
            if matters:
                facts.append(_int_fact(x))
            else:
                facts.append(-(2**31) <= x < 2**31)
        elif kind is tuple:
            facts += map(_int_fact, x)
        elif isinstance(x, Tensor):
            facts += x.dtype, x.data_ptr() % 16 == 0
        elif x is None:
            facts.append(None)
        elif kind is not float:
            facts += x.base.dtype, *x.block_shape
    return facts


class Launcher:
    """Launches one Triton or Gluon kernel whose constants follow its other parameters.

    Args:
        kernel: what `triton.jit` or `gluon.jit` made.
    """

    def __init__(self, kernel) -> None:
        self.kernel = kernel
        self._variants: dict[tuple, Any] = {}
        if isinstance(kernel, JITFunction):
            self._specialized = tuple(not p.do_not_specialize for p in kernel.params if not p.is_constexpr)
            self._constants = tuple(p.name for p in kernel.params if p.is_constexpr)

    def __call__(self, grid: tuple[int, ...], arguments: tuple, constants: dict[str, Any], **options) -> None:
        """Runs the kernel on the current device and stream.

        Args:
            grid: numbers of programs.
            arguments: tensors, descriptors, ints, floats, tuples of ints, or None, in the kernel's order.
            constants: the kernel's compile-time constants by name.
            options: num_warps and the like.
        """
        # Interpreted; or on AMD, where variants also depend on the size of each tensor's memory.
        if not isinstance(self.kernel, JITFunction) or torch.version.hip:
            self.kernel[grid](*arguments, **constants, **options)
            return
        values = [constants[name] for name in self._constants]
        device = torch.cuda.current_device()
        variant = (device, *values, *options.values(), *_facts(arguments, self._specialized))
        compiled = self._variants.get(variant)
        if compiled is None:
            self._variants[variant] = self.kernel[grid](*arguments, **constants, **options)
        else:
            compiled[(*grid, 1, 1)[:3]](*arguments, *values)
