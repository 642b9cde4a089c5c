"""What each budget costs a model: the output error of each layer and head, in each denoising step.

The model runs dense. A hook on each self-attention layer gets query, key, and value as a method would, and computes
dense attention and the method at every budget. So the errors are those of a layer whose inputs are the dense model's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from foveal.kernels.dense import dense_attention
from foveal.lab.calibrate.choose import Budget
from foveal.lab.inspect.probe import Progress, watch
from foveal.lab.inspect.statistics import int8_squares
from foveal.layout import TokenLayout, VideoGrid
from foveal.methods.base import Config, LayerCall, method_of
from foveal.methods.cost import attention_cost


@dataclass
class StepErrors:
    """One layer in one denoising step, over all prompts.

    Attributes:
        missed: float64 [budgets, H], the sum of the squared differences between the method's output and the dense one.
        exact: float64 [H], the sum of the squares of the dense output.
        kept: float64 [budgets], the sum over prompts of the share of the key blocks that rows read.
        int8: float64 [2, H], what `int8_squares` says of the layer with all blocks read.
        prompts: how many.
    """

    missed: Tensor
    exact: Tensor
    kept: Tensor
    int8: Tensor
    prompts: int = 1

    def add(self, other: StepErrors) -> None:
        self.missed += other.missed
        self.exact += other.exact
        self.kept += other.kept
        self.int8 += other.int8
        self.prompts += other.prompts

    def heads(self) -> Tensor:
        """The relative error of each head, [budgets, H]."""
        return (self.missed / self.exact.clamp_min(1e-300)).sqrt()

    def shares(self) -> list[list[float]]:
        """What each head adds to the square of the layer's relative error, [budgets][H]."""
        return (self.missed / self.exact.sum().clamp_min(1e-300)).tolist()

    def at(self, budget: Budget) -> tuple[float, list[float]]:
        """The relative error of the layer and of each head, at one budget for all heads or at one for each."""
        heads = range(self.missed.shape[1])
        chosen = [budget] * len(heads) if isinstance(budget, int) else budget
        missed = torch.stack([self.missed[index, head] for index, head in zip(chosen, heads, strict=True)])
        layer = (missed.sum() / self.exact.sum().clamp_min(1e-300)).sqrt()
        return float(layer), (missed / self.exact.clamp_min(1e-300)).sqrt().tolist()

    def layer(self) -> list[float]:
        """The relative error of the whole layer's output, by budget."""
        return (self.missed.sum(1) / self.exact.sum().clamp_min(1e-300)).sqrt().tolist()

    def int8_error(self) -> float:
        """The relative error that `precision="int8"` makes in the layer's dense output."""
        missed, exact = self.int8.sum(1).tolist()
        return (missed / max(exact, 1e-300)) ** 0.5


@dataclass
class LayerErrors:
    """One layer.

    Attributes:
        component, layer: the pipeline's component, and the attention module's name in it.
        grid: the video's grid.
        heads, head_dim: of the layer.
        steps: what was measured, by denoising step.
        layout: of the packed sequence that the method runs over; None where it runs over the video.
    """

    component: str
    layer: str
    grid: VideoGrid
    heads: int
    head_dim: int
    steps: dict[int, StepErrors] = field(default_factory=dict)
    layout: TokenLayout | None = None

    def work(self, config: Config, budget: int, grid: VideoGrid | None = None) -> float:
        """The FLOPs of a budget's configuration over those of dense attention.

        Where the device decides how many blocks a row keeps, this counts what it kept, on average.

        Args:
            config, budget: one of the configurations that were measured, and its index.
            grid: another video than the measured one.
        """
        method = method_of(config)
        if method.kept_blocks(config, self.grid, self.layout is not None) is None:
            kept = [float(step.kept[budget]) / step.prompts for step in self.steps.values()]
            config = method.follow(config, keep_ratio=sum(kept) / len(kept))
        grid = grid or self.grid
        where = {"grid": grid} if self.layout is None else {"layout": dataclasses.replace(self.layout, grid=grid)}
        return attention_cost(config, **where, heads=self.heads, head_dim=self.head_dim).flops_ratio


def measure(
    model: Any,
    runs: Iterable[Callable[[], object]],
    configs: Sequence[Config],
    steps: int,
    on_layer: Callable[[Progress], None] = lambda progress: None,
) -> list[LayerErrors]:
    """Run a model a few times, and compare its attention with that of each configuration.

    Args:
        model: a dense transformer or pipeline.
        runs: each runs the model once, for `steps` denoising steps.
        configs: the budgets, as configurations of one method.
        on_layer: called after each layer's call.

    Returns:
        The layers, in the order of their first calls.
    """
    found: dict[tuple[str, str], LayerErrors] = {}

    def look(component, layer, progress, query, key, value, grid) -> None:
        sizes = query.shape[1], query.shape[3]
        layout = grid if isinstance(grid, TokenLayout) else None
        known = LayerErrors(component, layer, grid if layout is None else layout.grid, *sizes, layout=layout)
        known = found.setdefault((component, layer), known)
        seen = compare(query, key, value, grid, configs)
        if progress.step in known.steps:
            known.steps[progress.step].add(seen)
        else:
            known.steps[progress.step] = seen
        on_layer(progress)

    for run in runs:
        watch(model, run, look, steps=range(steps), packed=True)
    return list(found.values())


@torch.no_grad()
def compare(
    query: Tensor, key: Tensor, value: Tensor, grid: VideoGrid | TokenLayout, configs: Sequence[Config]
) -> StepErrors:
    """One call of a layer: query [1, H, L, D], key and value [1, H, N, D] with the text behind the video.

    With a `TokenLayout` for the grid they are the whole packed sequence. The output of its video counts, since that of
    the protected segments is exact.
    """
    _, heads, length, head_dim = query.shape
    packed = isinstance(grid, TokenLayout)

    def of_video(x: Tensor) -> Tensor:
        return grid.split(x)[0] if packed else x

    exact = dense_attention(of_video(query), key, value).float()
    method = method_of(configs[0])
    module = method.build(configs[0], heads * head_dim, heads, head_dim, "auto").to(query.device)
    # What a module makes of hidden states is constant before it is trained.
    hidden = query.new_zeros(1, length, heads * head_dim)
    missed, kept = [], []
    for config in configs:
        output = of_video(method.run(module, LayerCall(query, key, value, hidden, grid, config=config))).float()
        missed.append((output - exact).square().sum((0, 2, 3), dtype=torch.float64).cpu())
        video_key = of_video(key) if packed else key[:, :, : grid.num_tokens]
        video = grid.grid if packed else grid
        kept.append(_kept_share(module, of_video(query), video_key, video, config, packed=packed))
    total = exact.square().sum((0, 2, 3), dtype=torch.float64).cpu()
    int8 = int8_squares(of_video(query), key, value)
    return StepErrors(torch.stack(missed), total, torch.tensor(kept, dtype=torch.float64), int8)


def _kept_share(module: Any, query: Tensor, key: Tensor, grid: VideoGrid, config: Config, *, packed: bool) -> float:
    """The share of the video's key blocks that its rows read."""
    counted = method_of(config).kept_blocks(config, grid, packed)
    if counted is not None:
        return counted[0] / counted[1]
    selection = module.select(query, key, grid=grid, config=config)
    return float(selection.critical_count.double().mean()) / selection.num_key_blocks
