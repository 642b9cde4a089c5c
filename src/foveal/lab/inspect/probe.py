"""Observe the attention of a model while it runs: which blocks matter, and what leaving out the others costs.

The model's own forward runs, dense or as it was converted. A hook on each layer's attention sees query, key, and value
as the method would get them, after norms and rotary embedding, and keeps only statistics. See `statistics` for what it
computes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from foveal.checks import check_choice, check_positive_int, check_ratio
from foveal.lab.inspect.statistics import (
    ORDERS,
    SelectionQuality,
    WeightDistribution,
    int8_squares,
    reorder,
    selection_quality,
    weight_distribution,
)
from foveal.layout import TokenLayout, VideoGrid
from foveal.methods.sla.config import SLAConfig
from foveal.models.convert import densify, sparsify
from foveal.models.families.table import components_of
from foveal.models.processor import sparse_processors

# Keeps every block, so the model computes what it did, and layers of all families can be observed in the same way.
_TRANSPARENT = SLAConfig(keep_ratio=1.0, drop_ratio=0.0, linear_scope="none")


@dataclass(frozen=True)
class InspectSettings:
    """What to observe.

    Args:
        keep_ratios: shares of the key blocks to keep, ascending.
        blocks: (block_q, block_k) pairs to compare.
        orders: "raster", "tile", or both.
        query_blocks: query blocks to sample in each head; None for all.
        rows: query rows to sample for the distribution and the stable rank; None for all.
        top: share of each row's weights that the stable rank of the rest leaves out.
        memory_bytes: device memory for attention weights in flight.

    Raises:
        TypeError, ValueError: a field is wrong; the message names it, what was expected, and what came.
    """

    keep_ratios: tuple[float, ...] = (0.025, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5)
    blocks: tuple[tuple[int, int], ...] = ((64, 64), (128, 64))
    orders: tuple[str, ...] = ORDERS
    query_blocks: int | None = 16
    rows: int | None = 512
    top: float = 0.08
    memory_bytes: int = 2**30

    def __post_init__(self) -> None:
        for name in ("keep_ratios", "blocks", "orders"):
            if not getattr(self, name):
                raise ValueError(f"{name} must not be empty")
        for ratio in self.keep_ratios:
            check_ratio("keep_ratios", ratio)
        if list(self.keep_ratios) != sorted(set(self.keep_ratios)) or self.keep_ratios[0] <= 0:
            raise ValueError(f"keep_ratios must ascend from above 0, got {self.keep_ratios}")
        for pair in self.blocks:
            for side in pair:
                check_positive_int("blocks", side)
        for order in self.orders:
            check_choice("order", order, ORDERS)
        for name in ("query_blocks", "rows"):
            if getattr(self, name) is not None:
                check_positive_int(name, getattr(self, name))
        check_ratio("top", self.top)
        check_positive_int("memory_bytes", self.memory_bytes)


@dataclass(frozen=True)
class LayerObservation:
    """One layer in one call of its transformer.

    Attributes:
        component: the pipeline's component; "transformer" for a bare transformer.
        layer: the attention module's name.
        call, step: which call of the model's transformers and which denoising step, from 0.
        timestep: the timestep that the transformer was given; None if it takes none.
        grid: the video's grid, in tokens.
        distribution: the distribution of the attention weights.
        quality: what the kept blocks retain, by (order, block_q, block_k).
        int8_error: float32 [H] on the CPU, what `precision="int8"` changes by itself: |O_int8 - O| / |O| over sampled
            query blocks, both over all keys.
    """

    component: str
    layer: str
    call: int
    step: int
    timestep: float | None
    grid: VideoGrid
    distribution: WeightDistribution
    quality: dict[tuple[str, int, int], SelectionQuality]
    int8_error: Tensor


class Progress:
    """The progress of a run: calls of the model's transformers, and denoising steps, which begin when timesteps change.

    Args:
        calls, steps: see `watch`.

    Attributes:
        call, step, timestep: the current ones; -1, -1, and None before the first call.
        looking: whether the current call is a wanted one.
        seen: the wanted calls or steps that have been made.
    """

    def __init__(self, calls: Sequence[int] | None, steps: Sequence[int] | None) -> None:
        self.wanted = set(calls) if calls is not None else set(steps or ())
        self.by_step = calls is None
        self.call = self.step = -1
        self.timestep: float | None = None
        self.looking = False
        self.seen: set[int] = set()

    def begin_call(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Forward pre-hook on a transformer."""
        timestep = kwargs.get("timestep")
        timestep = float(timestep.flatten()[-1]) if isinstance(timestep, Tensor) else timestep
        self.call += 1
        new_step = self.call == 0 or timestep != self.timestep
        self.step += new_step
        self.timestep = timestep
        self.looking = (new_step and self.step in self.wanted) if self.by_step else self.call in self.wanted
        if self.looking:
            self.seen.add(self.step if self.by_step else self.call)


# What a watched layer passes on: (component, layer, progress, query, key, value, grid).
Look = Callable[[str, str, Progress, Tensor, Tensor, Tensor, VideoGrid | TokenLayout], None]


def watch(
    model: Any,
    run: Callable[[], object],
    look: Look,
    *,
    calls: Sequence[int] | None = None,
    steps: Sequence[int] | None = None,
    layers: Sequence[str] | None = None,
    packed: bool = False,
) -> None:
    """Run a model, and pass query, key, and value of its self-attention layers to `look` as they come.

    Args:
        model: what `sparsify` takes, dense or converted. It is left as it was.
        run: runs the model, for example `lambda: pipe("a cat", num_inference_steps=20)`.
        look: called with (component, layer, progress, query [1, H, L, D], key and value [1, H, N, D], grid), after
            norms and rotary embedding, with the video in raster order and then the valid text, or what else the queries
            all read. It gets the last sample
            of a batch, which is the one with the prompt if guidance runs in one batch.
        calls: which calls of the model's transformers to observe, from 0.
        steps: which denoising steps to observe instead, from 0. Each step stands for its first call, which is the one
            with the prompt if guidance takes two calls. Without calls or steps, the first call is observed.
        layers: names ("blocks.0.attn1") of the layers to observe; None for all.
        packed: where a method runs over a whole packed sequence, pass that, with its `TokenLayout` for the grid,
            instead of the video's queries and the keys in another order.

    Raises:
        TypeError: the model is not supported.
        ValueError: a layer is unknown, calls and steps are both given, or some of them were never made.
    """
    if calls is not None and steps is not None:
        raise ValueError(f"give calls or steps, not both, got {list(calls)} and {list(steps)}")
    progress = Progress((0,) if calls is None and steps is None else calls, steps)
    with contextlib.ExitStack() as stack:
        for component, transformer in components_of(model).items():
            stack.enter_context(_watch(component, transformer, progress, layers, look, packed))
        run()
    missing = sorted(progress.wanted - progress.seen)
    if missing:
        kind, last = ("steps", progress.step) if progress.by_step else ("calls", progress.call)
        raise ValueError(f"{kind} {missing} were never made: the run ended after number {last}, counted from 0")


def observe(
    model: Any,
    run: Callable[[], object],
    *,
    calls: Sequence[int] | None = None,
    steps: Sequence[int] | None = None,
    layers: Sequence[str] | None = None,
    settings: InspectSettings | None = None,
    on_observation: Callable[[LayerObservation], None] = lambda observation: None,
) -> list[LayerObservation]:
    """Run a model, and keep statistics of its self-attention layers.

    Args:
        model, run, calls, steps, layers: see `watch`.
        settings: what to compute; None for the defaults.
        on_observation: called with each observation as it is made.

    Returns:
        One observation per layer and call, in the order in which they were made.

    Raises:
        TypeError, ValueError: see `watch`.
    """
    settings = settings or InspectSettings()
    found: list[LayerObservation] = []

    def look(component, layer, progress, query, key, value, grid) -> None:
        place = (progress.call, progress.step, progress.timestep)
        figures = look_at(query, key, value, grid, settings)
        found.append(LayerObservation(component, layer, *place, grid, *figures))
        on_observation(found[-1])

    watch(model, run, look, calls=calls, steps=steps, layers=layers)
    return found


@contextlib.contextmanager
def _watch(
    component: str, transformer: nn.Module, progress: Progress, layers: Sequence[str] | None, look: Look, packed: bool
) -> Iterator[None]:
    was_sparse = bool(sparse_processors(transformer))
    if not was_sparse:
        sparsify(transformer, _TRANSPARENT)
    handles = []

    def hook_of(name: str):
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            if not progress.looking:
                return
            query, key, value = (x[-1:].detach() for x in args[:3])
            lengths = kwargs.get("kv_lengths")
            if lengths is not None:
                key, value = (x[:, :, : int(lengths[-1])] for x in (key, value))
            grid = kwargs.get("layout") or kwargs["grid"]
            if isinstance(grid, TokenLayout) and not packed:
                query, _ = grid.split(query)
                key, value = (torch.cat(grid.split(x), 2) for x in (key, value))
                grid = grid.grid
            look(component, name, progress, query, key, value, grid)

        return hook

    try:
        processors = sparse_processors(transformer)
        unknown = sorted(set(layers or ()) - set(processors))
        if unknown:
            raise ValueError(f"unknown layers {unknown}; expected some of {list(processors)}")
        handles.append(transformer.register_forward_pre_hook(progress.begin_call, with_kwargs=True))
        for name, processor in processors.items():
            if layers is None or name in layers:
                handles.append(processor.attention.register_forward_pre_hook(hook_of(name), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
        if not was_sparse:
            densify(transformer)


@torch.no_grad()
def look_at(
    query: Tensor, key: Tensor, value: Tensor, grid: VideoGrid, settings: InspectSettings
) -> tuple[WeightDistribution, dict[tuple[str, int, int], SelectionQuality], Tensor]:
    """Observe one call: query [1, H, L, D] in raster order, key and value [1, H, N, D] with text after the video."""
    distribution = weight_distribution(
        query, key, rows=settings.rows, top=settings.top, memory_bytes=settings.memory_bytes
    )
    quality = {}
    for order in settings.orders:
        ordered = (query, key, value)
        if order == "tile":
            tile = SLAConfig(token_order="tile").tile_for(grid)
            ordered = tuple(reorder(x, grid, tile) for x in ordered)
        for block_q, block_k in settings.blocks:
            quality[order, block_q, block_k] = selection_quality(
                *ordered,
                block_q=block_q,
                block_k=block_k,
                keep_ratios=settings.keep_ratios,
                query_blocks=settings.query_blocks,
                memory_bytes=settings.memory_bytes,
            )
    limits = {"query_blocks": settings.query_blocks, "memory_bytes": settings.memory_bytes}
    missed, exact = int8_squares(query, key, value, **limits)
    return distribution, quality, (missed / exact.clamp_min(1e-300)).sqrt().float()
