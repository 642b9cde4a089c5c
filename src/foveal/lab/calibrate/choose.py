"""From measured errors to a choice: the least work with every error within a target."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from foveal.layout import VideoGrid

Budget = int | tuple[int, ...]  # its index, of all heads or of each


@dataclass(frozen=True)
class Choice:
    """What to run.

    Args:
        dense_first_steps, dense_last_steps: the denoising steps that stay dense.
        budgets: for each layer, in order, which budget it gets, or which each of its heads gets; None for a layer that
            stays dense.
        work: FLOPs of attention over those of dense attention, over all steps and layers.
        error: the largest error of a layer in a step where it is sparse.
    """

    dense_first_steps: int
    dense_last_steps: int
    budgets: tuple[Budget | None, ...]
    work: float
    error: float


def choose(
    errors: Sequence[dict[int, list[float]]],
    work: Sequence[Sequence[float]],
    steps: int,
    target: float,
    shares: Sequence[dict[int, list[list[float]]]] | None = None,
) -> Choice:
    """The choice with the least work among those where no sparse layer's error exceeds the target in any step.

    Steps are dense from the start, to the end, or both, for all layers alike: every such pair is tried. For each, a
    layer takes its cheapest budget that is good enough in all steps that are left, or stays dense. With `shares` each
    of its heads gets a budget, where that is less work: from the largest ones on, the head gives way that saves the
    most work for what it adds to the square of the layer's error in its worst step.

    Args:
        errors: for each layer, by step, the error of each budget. A layer without a step does not run in it.
        work: for each layer, of each budget, over that of dense attention.
        steps: how many denoising steps.
        target: the largest error that is allowed.
        shares: for each layer, by step, what each head adds to the square of the error, [budgets][H], with budgets
            ascending in work.

    Raises:
        ValueError: no layer can be sparse in any step.
    """
    best = None
    for first in range(steps):
        for last in range(steps - first):
            found = _with_dense_ends(errors, work, first, steps - last, target, shares)
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


def _with_dense_ends(
    errors, work, start: int, stop: int, target: float, shares
) -> tuple[tuple[Budget | None, ...], float, float]:
    """(budgets, work, error) where steps before `start` and from `stop` on are dense."""
    budgets, total, calls, largest = [], 0.0, 0, 0.0
    for layer, (by_step, costs) in enumerate(zip(errors, work, strict=True)):
        sparse = [step for step in by_step if start <= step < stop]
        worst = [max(column) for column in zip(*(by_step[step] for step in sparse), strict=True)]
        enough = [index for index, error in enumerate(worst) if error <= target and costs[index] < 1]
        budget = min(enough, key=lambda index: (costs[index], worst[index]), default=None)
        found = (budget, 1.0, 0.0) if budget is None else (budget, costs[budget], worst[budget])
        if shares is not None and sparse:
            by_head = _by_head([shares[layer][step] for step in sparse], costs, target)
            found = found if by_head is None or by_head[1] >= found[1] else by_head
        budgets.append(found[0])
        calls += len(by_step)
        total += len(by_step) - len(sparse) + len(sparse) * found[1]
        largest = max(largest, found[2])
    return tuple(budgets), total / calls, largest


def _by_head(
    shares: list[list[list[float]]], costs: Sequence[float], target: float
) -> tuple[tuple[int, ...], float, float] | None:
    """(budgets, work, error) of a layer whose heads have a budget each, from the shares of its steps; None for none."""
    heads = range(len(shares[0][0]))
    # Each budget that saves work and takes more than the one before; short videos have several of the same work.
    ladder = [index for index, cost in enumerate(costs) if cost < 1 and cost > max(costs[:index], default=0)]
    if not ladder:
        return None
    places = [len(ladder) - 1] * len(heads)
    squares = [sum(step[ladder[-1]]) for step in shares]
    if max(squares) > target**2:
        return None
    while True:
        best = None
        for head in heads:
            if places[head] == 0:
                continue
            lower, budget = ladder[places[head] - 1], ladder[places[head]]
            added = [step[lower][head] - step[budget][head] for step in shares]
            if max(square + more for square, more in zip(squares, added, strict=True)) > target**2:
                continue
            price = max(added) / (costs[budget] - costs[lower])
            if best is None or price < best[0]:
                best = price, head, added
        if best is None:
            chosen = tuple(ladder[place] for place in places)
            return chosen, sum(costs[budget] for budget in chosen) / len(chosen), max(squares) ** 0.5
        _, head, added = best
        places[head] -= 1
        squares = [square + more for square, more in zip(squares, added, strict=True)]


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
