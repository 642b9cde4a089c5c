"""`VSAConfig`: the cubes of video sparse attention, and how many of them are kept."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from foveal.checks import check_choice, check_head_ratios, check_positive, check_positive_int, check_triple
from foveal.kernels.int8 import PRECISIONS
from foveal.methods.choosing import check_choosing
from foveal.methods.config import MethodConfig
from foveal.rules import mean_ratio, ratios_of

ROUNDINGS = ("up", "down")
ROUTERS = ("none", "shared", "per_head")
MOST_ROUTED = 128  # tokens of a cube that a router ranks: those of the kernels' largest slot


@dataclass(frozen=True)
class VSAConfig(MethodConfig):
    """Video sparse attention (VSA, arXiv 2505.13389).

    Args:
        topk: cubes that each cube attends to, capped at the number of cubes; None takes `keep_ratio` instead.
        keep_ratio: fraction of cubes kept, when `topk` is None. Left at its default beside a `topk`, it becomes None. A
            tuple has one for each head.
        tile: cube of tokens (frames, height, width); "auto" takes the compact cube of at most 64 tokens that wastes
            least at the grid it meets, "wide" the one of at most 128: a coarser choice, at half the memory traffic.
        coarse: whether the output has the coarse branch, with a zero-initialized gate (the paper). Without it, the
            output is attention over the cubes that are read, and there is no gate to train.
        fine_gate: learn the fine branch's gate too (pretraining from scratch). False fixes it to 1 (retrofit).
        rounding: how `keep_ratio` becomes a number of cubes: "up" to ceil(keep_ratio * cubes), as FastVideo's VSA does,
            or "down", at least to 1, as versions of foveal without this field did; their saved files load as "down".
            Over a layout with protected segments both round up, as they always did. Not with `topk`.
        score, keep_mass, max_keep_ratio: what cubes are ranked by, and how many more than `topk` or `keep_ratio` are
            kept where that is not enough; see `select_blocks`. The coarse branch stays that of the cubes' means.
        precision: of the products of queries and keys in the fine branch; see `block_sparse_attention`.
        sink_frames: the cubes that hold a token of so many first frames are kept by every cube, beside those picked.
            Text and other protected segments are kept in any case.
        window: cubes (frames, height, width) around the query's own that it keeps, beside those picked. As in sliding
            tile attention (arXiv 2502.04507) the window is shifted inward at the borders of the video, so that every
            cube has as many neighbors.
        router: "none" ranks cubes by the coarse branch's scores (the paper). "shared" and "per_head" rank them by the
            products of projected means, with projections that the heads share or that each has of its own, as in
            `SLA2Config`. They are learned by the gradient of a soft top-k behind the choice; the coarse branch stays
            as it is. Cubes may have up to 128 tokens, and `score` must be "mean".
        temperature: of that soft top-k.

    Raises:
        TypeError, ValueError: naming the field, what was expected and what came.
    """

    topk: int | None = None
    keep_ratio: float | tuple[float, ...] | None = 0.125
    tile: tuple[int, int, int] | str = (4, 4, 4)
    coarse: bool = True
    fine_gate: bool = False
    score: str = "mean"
    keep_mass: float | None = None
    max_keep_ratio: float = 1.0
    rounding: str = "up"
    precision: str = "input"
    sink_frames: int = 0
    window: tuple[int, int, int] | None = None
    router: str = "none"
    temperature: float = 0.1

    def __post_init__(self) -> None:
        if self.topk is None:
            check_head_ratios("keep_ratio", self.keep_ratio)
            if min(ratios_of(self.keep_ratio)) == 0.0:
                raise ValueError("keep_ratio must be above 0 for VSA: its fine branch has to attend to something")
        else:
            check_positive_int("topk", self.topk)
            if self.keep_ratio not in (None, 0.125):
                raise ValueError(f"give topk or keep_ratio, not both, got topk={self.topk}, {self.keep_ratio=}")
            object.__setattr__(self, "keep_ratio", None)
        if isinstance(self.tile, str):
            check_choice("tile", self.tile, ("auto", "wide"))
        else:
            check_triple("tile", self.tile)
        for name in ("coarse", "fine_gate"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be a bool, got {getattr(self, name)!r}")
        check_choice("rounding", self.rounding, ROUNDINGS)
        check_choice("precision", self.precision, PRECISIONS)
        if self.topk is not None and self.rounding != "up":
            raise ValueError(f"rounding is how keep_ratio rounds, and topk replaces it, got {self.rounding=}")
        check_choosing(self)
        check_choice("router", self.router, ROUTERS)
        check_positive("temperature", self.temperature)
        if self.router != "none":
            self._check_routed()

    def _check_routed(self) -> None:
        if self.score != "mean":
            raise ValueError(f'a router ranks cubes by their means: score must be "mean" beside it, got {self.score!r}')
        if not isinstance(self.tile, str) and math.prod(self.tile) > MOST_ROUTED:
            raise ValueError(f"tile must have at most {MOST_ROUTED} tokens beside a router, got {self.tile}")

    def replace(self, **changes: Any) -> VSAConfig:
        """A copy with some fields changed, validated again. A `topk` replaces a ratio, and a ratio a `topk`."""
        if changes.get("topk") is not None:
            changes = {"keep_ratio": None, "rounding": "up"} | changes
        elif changes.get("keep_ratio") is not None:
            changes = {"topk": None} | changes
        return super().replace(**changes)

    @classmethod
    def from_saved(cls, fields: dict[str, Any]) -> VSAConfig:
        """As in the base class. A file without `rounding` was saved when ratios rounded down."""
        older = {} if fields.get("topk") is not None else {"rounding": "down"}
        return super().from_saved(older | fields)

    @property
    def ranks_means(self) -> bool:
        """Whether cubes are ranked by the products of their means, as in the paper."""
        return self.score == "mean"

    @property
    def sparsity(self) -> float | None:
        """1 - keep_ratio, on average over the heads, or None where `topk` decides."""
        return None if self.keep_ratio is None else 1.0 - mean_ratio(self.keep_ratio)
