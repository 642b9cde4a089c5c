"""From measured errors to a choice: the least work with every error within a target."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from foveal.layout import VideoGrid


@dataclass(frozen=True)
class Choice:
    """What to run.

    Args:
        dense_first_steps, dense_last_steps: the denoising steps that stay dense.
        budgets: for each layer, in order, which budget it gets; None for a layer that stays dense.
        work: FLOPs of attention over those of dense attention, over all steps and layers.
        error: the largest error of a layer in a step where it is sparse.
    """

    dense_first_steps: int
    dense_last_steps: int
    budgets: tuple[int | None, ...]
    work: float
    error: float


def choose(
    errors: Sequence[dict[int, list[float]]], work: Sequence[Sequence[float]], steps: int, target: float
) -> Choice:
    """The choice with the least work among those where no sparse layer's error exceeds the target in any step.

    Steps are dense from the start, to the end, or both, for all layers alike: every such pair is tried. For each, a
    layer takes its cheapest budget that is good enough in all steps that are left, or stays dense.

    Args:
        errors: for each layer, by step, the error of each budget. A layer without a step does not run in it.
        work: for each layer, of each budget, over that of dense attention.
        steps: how many denoising steps.
        target: the largest error that is allowed.

    Raises:
        ValueError: no layer can be sparse in any step.
    """
    best = None
    for first in range(steps):
        for last in range(steps - first):
            found = _with_dense_ends(errors, work, first, steps - last, target)
            choice = Choice(first, last, *found)
            if any(budget is not None for budget in choice.budgets) and (
                best is None
                or (choice.work, first + last) < (best.work, best.dense_first_steps + best.dense_last_steps)
            ):
                best = choice
    if best is None or best.work >= 1:
        least = min(min(layer) for by_step in errors for layer in by_step.values())
        raise ValueError(
            f"no budget saves work within an error of {target:g}; the smallest that was measured is {least:.3g}"
        )
    return best


def _with_dense_ends(errors, work, start: int, stop: int, target: float) -> tuple[tuple[int | None, ...], float, float]:
    """(budgets, work, error) where steps before `start` and from `stop` on are dense."""
    budgets, total, calls, largest = [], 0.0, 0, 0.0
    for by_step, costs in zip(errors, work, strict=True):
        sparse = [found for step, found in by_step.items() if start <= step < stop]
        worst = [max(column) for column in zip(*sparse, strict=True)]
        enough = [index for index, error in enumerate(worst) if error <= target and costs[index] < 1]
        budget = min(enough, key=lambda index: (costs[index], worst[index]), default=None)
        budgets.append(budget)
        calls += len(by_step)
        total += len(by_step) - len(sparse)
        total += len(sparse) * (1 if budget is None else costs[budget])
        if budget is not None:
            largest = max(largest, worst[budget])
    return tuple(budgets), total / calls, largest


def least_tokens(grid: VideoGrid, work: Callable[[VideoGrid], float]) -> int:
    """The tokens of the smallest video, scaled down from a grid, that sparse attention is less work for than dense.

    Args:
        grid: where it is less work.
        work: a grid to the work of all sparse layers over that of dense attention.
    """
    least = grid.num_tokens
    for percent in range(95, 0, -5):
        smaller = VideoGrid(*(max(1, round(side * percent / 100)) for side in grid.shape))
        if work(smaller) >= 1:
            break
        least = smaller.num_tokens
    return least
