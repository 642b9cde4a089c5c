"""How many cubes each head of the tiny model gets, of as many as all heads would have alike.

Dense attention is compared with sparse attention at a few budgets on training clips, head by head (`foveal calibrate`'s
measurement). Then each head of each layer gets the budget at which the squared relative errors of the layers' outputs,
summed, are smallest for the same total.
"""

from __future__ import annotations

import torch
from torch import nn
from train_transformer import SIGMAS, Data, batches, loss_of

from foveal import VSAConfig
from foveal.lab.calibrate.measure import measure

SHARES = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0)  # of the ratio that all heads would have
CLIPS = 4


def budgets_by_head(dense: nn.Module, data: Data, config: VSAConfig, first: int) -> dict[str, tuple[float, ...]]:
    """A ratio for each head of each layer, whose mean over all is that of `config`.

    first: the training batch to begin with.
    """
    ratios = [min(1.0, share * config.keep_ratio) for share in SHARES]
    configs = [config.replace(keep_ratio=ratio) for ratio in ratios]

    def run_of(index: int, values: tuple) -> object:
        clean, noise, sigmas, given, text = values
        levels = torch.full_like(sigmas, SIGMAS[index % len(SIGMAS)])
        return lambda: loss_of(dense, clean, noise, levels, given, text)

    runs = [run_of(index, values) for index, values in enumerate(batches(data, 1, first, first + CLIPS))]
    with torch.no_grad():
        found = {layer.layer: layer.steps[0] for layer in measure(dense, runs, configs, steps=1)}
    errors = torch.cat(
        [torch.tensor(step.shares(), dtype=torch.float64) for step in found.values()], 1
    )  # [budgets, layers * heads]
    chosen = allocate(errors, torch.tensor(ratios, dtype=errors.dtype), config.keep_ratio)
    per_layer = chosen.split([step.missed.shape[1] for step in found.values()])
    return {name: tuple(mine.tolist()) for name, mine in zip(found, per_layer, strict=True)}


def allocate(errors: torch.Tensor, ratios: torch.Tensor, mean: float) -> torch.Tensor:
    """A ratio for each column, with this mean at most, such that the sum of their errors is smallest.

    Args:
        errors: [ratios, columns].
        ratios: ascending.
    """
    low, high = 0.0, float(errors.max() / ratios.diff().min()) + 1.0  # the price of a unit of ratio
    for _ in range(60):
        price = (low + high) / 2
        chosen = ratios[(errors + price * ratios[:, None]).argmin(0)]
        low, high = (price, high) if chosen.mean() > mean else (low, price)
    return ratios[(errors + high * ratios[:, None]).argmin(0)]
