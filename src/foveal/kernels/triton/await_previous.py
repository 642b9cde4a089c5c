"""What every kernel begins with.

Between one kernel's end and the next one's start a device stands idle for microseconds. NVIDIA's, from Hopper on, are
handed each kernel ahead of that end (programmatic dependent launch), for which it waits there.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl


def _launched_early(_semantic: Any = None) -> tl.constexpr:
    """In a kernel: whether it is compiled for a device that `Chip.starts_early`; not where it is interpreted."""
    options = None if _semantic is None else _semantic.builder.options
    return tl.constexpr(getattr(options, "launch_pdl", False))


_launched_early.__triton_builtin__ = True  # called while a kernel is compiled, as the functions of `tl` are


@triton.jit
def await_previous():
    """Waits until all kernels before this one in its stream have ended, and sees what they wrote.

    The first statement of every kernel for `host.launch`; nothing where kernels start one after another.
    """
    if _launched_early():
        tl.inline_asm_elementwise("griddepcontrol.wait; // $0", "=r", [], dtype=tl.int32, is_pure=False, pack=1)
