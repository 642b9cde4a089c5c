"""Launches that cost the host and the device little.

`kernel[grid](...)` looks at each argument in detail to find the compiled variant that fits: 40 to 80 us a launch, more
than many of these kernels run. `launch` looks at what a variant depends on, and no further.

Between one kernel's end and the next one's start a device stands idle for microseconds. NVIDIA's, from Hopper on, are
handed each kernel ahead of that end (programmatic dependent launch), for which it waits there.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.jit import JITFunction


def _launched_early(_semantic: Any = None) -> tl.constexpr:
    """In a kernel: whether it is compiled for a device that `starts_early`; not where it is interpreted."""
    options = None if _semantic is None else _semantic.builder.options
    return tl.constexpr(getattr(options, "launch_pdl", False))


_launched_early.__triton_builtin__ = True  # called while a kernel is compiled, as the functions of `tl` are


@triton.jit
def await_previous():
    """Waits until all kernels before this one in its stream have ended, and sees what they wrote.

    The first statement of every kernel for `launch`; nothing where kernels start one after another.
    """
    if _launched_early():
        tl.inline_asm_elementwise("griddepcontrol.wait; // $0", "=r", [], dtype=tl.int32, is_pure=False, pack=1)


@functools.cache
def starts_early(device: int) -> bool:
    """Whether kernels on this CUDA device start before the one before them has ended, and so must await it."""
    return torch.cuda.get_device_capability(device)[0] >= 9


def _int_fact(x: int) -> int:
    """What a variant knows of an integer it is specialized on: that it is 1, or a multiple of 16; and its width."""
    return (2 if x == 1 else 1 if x % 16 == 0 else 0) + (0 if -(2**31) <= x < 2**31 else 4)


def _facts(arguments: tuple, specialized: tuple[bool, ...] | None = None) -> list:
    """What variants are told apart by, of each argument; all integers count as specialized by default."""
    facts = []
    for x, matters in zip(arguments, specialized or (True,) * len(arguments), strict=True):
        kind = type(x)
        if kind is int:
            if matters:
                facts.append(_int_fact(x))
            else:
                facts.append(-(2**31) <= x < 2**31)
        elif isinstance(x, Tensor):
            facts += x.dtype, x.data_ptr() % 16 == 0
        elif kind is tuple:
            facts.append(len(x))
            for y in x:
                if type(y) is int:
                    facts.append(_int_fact(y))
                else:
                    facts += _facts((y,))
        elif x is None:
            facts.append(None)
        elif kind is not float:
            facts += x.base.dtype, *x.block_shape
    return facts


class Launcher:
    """Launches one Triton or Gluon kernel whose constants follow its other parameters.

    Args:
        kernel: what `triton.jit` or `gluon.jit` made; it begins with `await_previous`.
    """

    def __init__(self, kernel: JITFunction) -> None:
        self.kernel = kernel
        self._variants: dict[tuple, Any] = {}
        self._specialized = tuple(not p.do_not_specialize for p in kernel.params if not p.is_constexpr)
        self._constants = tuple(p.name for p in kernel.params if p.is_constexpr)

    def __call__(self, grid: tuple[int, ...], arguments: tuple, named: dict[str, Any]) -> None:
        """As `launch` has it."""
        device = torch.cuda.current_device()
        variant = (device, *named, *named.values(), *_facts(arguments, self._specialized))
        compiled = self._variants.get(variant)
        if compiled is None:
            early = {"launch_pdl": True} if starts_early(device) else {}
            self._variants[variant] = self.kernel[grid](*arguments, **named, **early)
        else:
            constants = [named[name] for name in self._constants]
            compiled[(*grid, 1, 1)[:3]](*arguments, *constants)


# By the kernel's identity: to hash a kernel, Triton reads and hashes its source.
_launchers: dict[int, Launcher] = {}


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **named: Any) -> None:
    """`kernel[grid](*arguments, **named)`, on the current device and stream.

    Args:
        kernel: what `triton.jit` or `gluon.jit` made, for good; it begins with `await_previous`, and its constants
            follow its other parameters.
        grid: numbers of programs.
        arguments: tensors, descriptors, ints, floats, tuples of such, or None, in the kernel's order.
        named: all constants of the kernel, and options: num_warps and the like.
    """
    # Interpreted; or on AMD, where variants also depend on the size of each tensor's memory.
    if not isinstance(kernel, JITFunction) or torch.version.hip:
        kernel[grid](*arguments, **named)
        return
    launcher = _launchers.get(id(kernel))
    if launcher is None:
        launcher = _launchers[id(kernel)] = Launcher(kernel)
    launcher(grid, arguments, named)
