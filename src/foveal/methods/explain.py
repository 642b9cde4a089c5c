"""`explain`: which implementation a call would run, and why not each faster one."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from foveal.checks import validate_qkv
from foveal.kernels import chips
from foveal.kernels.api import BACKENDS, choose_impl, why_not
from foveal.layout import TokenLayout, VideoGrid, resolve_layout
from foveal.methods.base import Config, method_of


@dataclass(frozen=True)
class Explanation:
    """What `explain` found; printed, one line per implementation.

    Args:
        impl: the implementation that `impl="auto"` runs.
        blocks: tokens of a query block and of a key block.
        refused: (name, reason) of each faster implementation, the fastest first.
        chip: how well the kernels are known on the GPU, where they run.
    """

    impl: str
    blocks: tuple[int, int]
    refused: tuple[tuple[str, str], ...]
    chip: str | None = None

    def __str__(self) -> str:
        lines = [f"{self.impl} runs, in blocks of {self.blocks[0]}x{self.blocks[1]} tokens"]
        lines += [f"not {name}: {reason}" for name, reason in self.refused]
        return "\n".join(lines if self.chip is None else [*lines, self.chip])


def explain(
    query: Tensor, key: Tensor, value: Tensor, config: Config, layout: TokenLayout | VideoGrid | None = None
) -> Explanation:
    """Says which implementation a method would run on these tensors, and why not each faster one; runs nothing.

    Args:
        query, key, value: [B, H, L, D], as the method takes them.
        config: an `SLAConfig` or a `VSAConfig`.
        layout: the layout of the sequence, or only the video's grid, where the method needs it (VSA: its cubes are the
            blocks).

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    method = method_of(config)
    validate_qkv(query, key, value)
    grid, _ = resolve_layout(None, layout)
    blocks = method.module_type.kernel_blocks(config, grid)
    precision = method.precision(config)
    impl = choose_impl("auto", query, key, value, *blocks, precision).impl
    faster = BACKENDS[: BACKENDS.index(impl)] if impl in BACKENDS else BACKENDS
    reasons = ((name, why_not(name, query, key, value, *blocks, precision)) for name in faster)
    refused = tuple((name, reason) for name, reason in reasons if reason is not None)
    on_gpu = query.device.type == "cuda" and impl in BACKENDS
    return Explanation(impl, blocks, refused, chips.chip_of(query.device).standing if on_gpu else None)
