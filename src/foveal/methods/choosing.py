"""What the configurations of SLA and VSA share: the fields that say which blocks a row keeps.

They are `keep_ratio`, `score`, `keep_mass`, `max_keep_ratio`, `sink_frames`, and `window`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from foveal.checks import check_triple
from foveal.kernels.choice import check_rule
from foveal.rules import Choosing, FixedBlocks, mean_ratio, ratios_of


def check_choosing(config: Any, *blocks: int) -> None:
    """Raises a TypeError or ValueError unless the fields choose blocks of these sizes."""
    check_rule(config.score, config.keep_mass, config.max_keep_ratio, config.keep_ratio, *blocks)
    frames = config.sink_frames
    if isinstance(frames, bool) or not isinstance(frames, int):
        raise TypeError(f"sink_frames must be an int, got {frames!r} ({type(frames).__name__})")
    if frames < 0:
        raise ValueError(f"sink_frames must be at least 0, got {frames}")
    if config.window is not None:
        check_triple("window", config.window)


def choosing_of(config: Any, fixed: FixedBlocks | None, **others: Any) -> Choosing:
    """What a configuration keeps, what is fixed on a grid, and other fields of `Choosing`."""
    return Choosing(
        keep_ratio=config.keep_ratio,
        score=config.score,
        keep_mass=config.keep_mass,
        max_keep_ratio=config.max_keep_ratio,
        fixed=fixed,
        **others,
    )


def fixes_blocks(config: Any) -> bool:
    """Whether rows keep blocks whatever their scores."""
    return bool(config.sink_frames) or config.window is not None


def mean_kept(picked: Sequence[int], total: int, fixed: FixedBlocks | None = None) -> int:
    """How many of `total` blocks rows keep on average, rounded, if what they pick is none of what is fixed.

    picked: how many blocks the rows of each head pick; one number if they are all alike.
    """
    if fixed is None:
        return picked[0] if len(picked) == 1 else round(sum(picked) / len(picked))
    beside = (fixed.ranges[..., 1] - fixed.ranges[..., 0]).sum(1)
    return round((beside + torch.tensor(picked)[:, None]).clamp(max=total).double().mean().item())


def known_on_host(config: Any) -> bool:
    """Whether the configuration says how many blocks are kept; if not, only the device knows."""
    return config.keep_mass is None and not fixes_blocks(config)


def rows_alike(config: Any) -> bool:
    """Whether each row keeps as many blocks as any other."""
    return known_on_host(config) and not isinstance(config.keep_ratio, tuple)


def scaled(keep_ratio: float | tuple[float, ...], amount: float) -> float | tuple[float, ...]:
    """A ratio of `amount`; of several, each in proportion, at most 1, so that their mean is the amount if none is."""
    if not isinstance(keep_ratio, tuple):
        return min(1.0, amount)
    factor = amount / mean_ratio(keep_ratio)
    return tuple(min(1.0, factor * ratio) for ratio in keep_ratio)


def ratio_cell(keep_ratio: float | tuple[float, ...]) -> str:
    """A ratio for people: "0.05", or "0.05 to 0.3 by head"."""
    least, most = min(ratios_of(keep_ratio)), max(ratios_of(keep_ratio))
    return f"{least:g} to {most:g} by head" if isinstance(keep_ratio, tuple) else f"{keep_ratio:g}"


def keep_cell(least: str, config: Any) -> str:
    """The cell `keep` of a summary: how much is kept at least, and what is kept beside."""
    cells = [least]
    if config.keep_mass is not None:
        cells.append(f"mass {config.keep_mass:g}")
    if config.sink_frames:
        cells.append(f"sinks {config.sink_frames}")
    if config.window is not None:
        cells.append(f"window {'x'.join(map(str, config.window))}")
    return ", ".join(cells)
