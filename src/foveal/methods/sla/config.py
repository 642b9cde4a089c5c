"""`SLAConfig`: what sparse-linear attention keeps, drops, and does with the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from foveal.checks import check_choice, check_head_ratios, check_positive_int, check_ratio
from foveal.kernels.int8 import PRECISIONS
from foveal.methods.choosing import check_choosing
from foveal.methods.config import MethodConfig
from foveal.rules import mean_ratio, ratios_of

FEATURE_MAPS = ("softmax", "elu", "relu", "hedgehog")
LINEAR_SCOPES = ("marginal", "noncritical", "all", "none")
TOKEN_ORDERS = ("raster", "tile")
TAILS = ("none", "pooled")


@dataclass(frozen=True)
class SLAConfig(MethodConfig):
    """Sparse-linear attention (SLA, arXiv 2509.24006).

    Args:
        keep_ratio: fraction of key blocks that each query block attends to exactly (critical; the paper's k_h).
            `sparsity` is 1 - keep_ratio. With 0 only the linear branch is left. A tuple has one for each head.
        drop_ratio: fraction that is skipped altogether (negligible; k_l).
        block_q, block_k: block sizes in tokens. The GPU kernels take 64 and 128; `impl="torch"` takes any.
        feature_map: phi of the linear branch: "softmax" (over the head dimension), "elu" (elu + 1), "relu",
            "hedgehog" (learnable: softmax of [Wx, -Wx], 2 * head_dim features).
        linear_scope: the key blocks that the linear branch sums over: "marginal" (the paper), "noncritical"
            (marginal and negligible), "all" (every key; the released TurboDiffusion checkpoints), "none" (sparse only).
        projection: pass the linear branch through a learned, zero-initialized `head_dim x head_dim` projection;
            False adds it as it is.
        token_order: "raster" (t, h, w) or "tile": tokens sorted by 4x4x4 cubes (8x8 for images) before they are cut
            into blocks, which needs a `grid`.
        score, keep_mass, max_keep_ratio: what blocks are ranked by, and how many more than `keep_ratio` are kept where
            that is not enough; see `select_blocks`.
        sink_frames: the key blocks of so many first frames are kept by every query, beside those picked, which needs a
            `grid`; in tile order, of all cubes that hold a token of these frames. Text is kept in any case.
        window: cubes (frames, height, width) around the query's own whose key blocks it keeps, beside those picked. It
            needs token_order "tile", whose cubes it counts. As in sliding tile attention (arXiv 2502.04507) it is
            shifted inward at the borders of the video, so that every cube has as many neighbors. A query block that
            holds tokens of several cubes keeps the windows of all of them.
        tail: what the softmax makes of the blocks that are not critical: "none", they do not count; or "pooled", each
            counts as copies of its mean key and mean value, negligible blocks too (docs/sla.md). It has no parameters,
            and makes a model usable that was not trained for sparse attention.
        precision: of the products of queries and keys in the critical blocks; see `block_sparse_attention`.

    Raises:
        TypeError, ValueError: naming the field, what was expected and what came.
    """

    keep_ratio: float | tuple[float, ...] = 0.05
    drop_ratio: float = 0.10
    block_q: int = 64
    block_k: int = 64
    feature_map: str = "softmax"
    linear_scope: str = "marginal"
    projection: bool = True
    token_order: str = "raster"
    score: str = "mean"
    keep_mass: float | None = None
    max_keep_ratio: float = 1.0
    tail: str = "none"
    precision: str = "input"
    sink_frames: int = 0
    window: tuple[int, int, int] | None = None

    def __post_init__(self) -> None:
        check_head_ratios("keep_ratio", self.keep_ratio)
        check_ratio("drop_ratio", self.drop_ratio)
        if max(ratios_of(self.keep_ratio)) + self.drop_ratio > 1.0 + 1e-9:
            raise ValueError(
                f"keep_ratio + drop_ratio must be at most 1, got {self.keep_ratio} + {self.drop_ratio}; "
                "they are fractions of the same key blocks"
            )
        check_positive_int("block_q", self.block_q)
        check_positive_int("block_k", self.block_k)
        check_choice("feature_map", self.feature_map, FEATURE_MAPS)
        check_choice("linear_scope", self.linear_scope, LINEAR_SCOPES)
        check_choice("token_order", self.token_order, TOKEN_ORDERS)
        check_choice("tail", self.tail, TAILS)
        check_choice("precision", self.precision, PRECISIONS)
        check_choosing(self, self.block_q, self.block_k)
        if self.window is not None and self.token_order == "raster":
            raise ValueError(
                f'window counts cubes, which token_order="raster" does not have; expected token_order="tile" with '
                f"window={self.window}"
            )
        if not isinstance(self.projection, bool):
            raise TypeError(f"projection must be a bool, got {self.projection!r}")
        if min(ratios_of(self.keep_ratio)) == 0.0 and self.linear_scope == self.tail == "none":
            raise ValueError('keep_ratio=0 with linear_scope="none" leaves neither branch: nothing would be computed')

    @property
    def sparsity(self) -> float:
        """1 - keep_ratio, on average over the heads."""
        return 1.0 - mean_ratio(self.keep_ratio)

    def tile_for(self, grid: Any) -> tuple[int, int, int] | None:
        """The cube that tokens are sorted by on a `VideoGrid`, or None for raster order."""
        if self.token_order == "raster":
            return None
        return (1, 8, 8) if grid.frames == 1 else (4, 4, 4)


def check_bare(config: SLAConfig) -> None:
    """Raises a TypeError or ValueError unless a configuration does without parameters and without a grid."""
    if not isinstance(config, SLAConfig):
        raise TypeError(f"config must be an SLAConfig, got {type(config).__name__}")
    if config.linear_scope != "none" or config.projection or config.token_order != "raster":
        raise ValueError(
            'config must have linear_scope="none", projection=False, and token_order="raster", for there are neither '
            f"parameters nor a grid here, got {config}"
        )
