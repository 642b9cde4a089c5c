"""`SLA2Config`: how many blocks the router keeps, how it learns, and how the two branches are mixed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from foveal.checks import check_choice, check_positive, check_positive_int, check_ratio
from foveal.methods.config import MethodConfig
from foveal.methods.sla.config import TOKEN_ORDERS, SLAConfig

FEATURE_MAPS = ("softmax", "elu", "relu")
LINEAR_SCOPES = ("noncritical", "none")
ROUTERS = ("shared", "per_head")
ROUTINGS = ("straight_through", "soft", "fixed")
PRECISIONS = ("input", "int8")  # those that have a backward


@dataclass(frozen=True)
class SLA2Config(MethodConfig):
    """Sparse-linear attention with a learned router and a learned ratio (SLA2, arXiv 2602.12675).

    Args:
        keep_ratio: fraction of key blocks that each query block attends to exactly; the others are summed by the linear
            branch. `sparsity` is 1 - keep_ratio.
        block_q, block_k: block sizes in tokens. The GPU kernels take 64 and 128; `impl="torch"` takes any.
        linear_scope: the key blocks that the linear branch sums over: "noncritical" (the paper), or "none": there is
            no linear branch then and no ratio, only the exact branch of what the router chooses.
        feature_map: phi of the linear branch: "softmax" (over the head dimension; the paper), "elu" (elu + 1), "relu".
        router: whether the heads share the router's projections, "shared" (the paper), or each has its own, "per_head".
        routing: how the router's projections are trained. "straight_through" gives them the gradient of a soft top-k
            behind the hard choice; "fixed" gives them none, as in the paper's second stage. The output is the same.
            "soft" has the soft top-k in the forward, as in the paper's first stage: every block is read and summed by
            its weight, which takes the work of dense attention and runs in PyTorch. Change it before sampling.
        temperature: of that soft top-k (the paper's tau).
        alpha: the exact branch's share of the output at the start, in (0, 1); it is learned.
        alpha_rows: how many values of alpha each head has along the queries, each for as many of the query blocks. The
            paper has one for each query block, which holds a model to one length.
        token_order: "raster" (t, h, w) or "tile", as in `SLAConfig`.
        precision: of the products of queries and keys in the exact branch, "input" or "int8"; see
            `block_sparse_attention`. The router ranks blocks by the inputs.

    Raises:
        TypeError, ValueError: naming the field, what was expected and what came.
    """

    keep_ratio: float = 0.05
    block_q: int = 128
    block_k: int = 64
    linear_scope: str = "noncritical"
    feature_map: str = "softmax"
    router: str = "shared"
    routing: str = "straight_through"
    temperature: float = 0.1
    alpha: float = 0.9
    alpha_rows: int = 1
    token_order: str = "raster"
    precision: str = "input"

    def __post_init__(self) -> None:
        check_ratio("keep_ratio", self.keep_ratio)
        if self.keep_ratio == 0.0:
            raise ValueError("keep_ratio must be above 0 for SLA2: its router chooses what is attended to exactly")
        check_positive_int("block_q", self.block_q)
        check_positive_int("block_k", self.block_k)
        check_choice("feature_map", self.feature_map, FEATURE_MAPS)
        check_choice("linear_scope", self.linear_scope, LINEAR_SCOPES)
        check_choice("router", self.router, ROUTERS)
        check_choice("routing", self.routing, ROUTINGS)
        check_positive("temperature", self.temperature)
        if isinstance(self.alpha, bool) or not isinstance(self.alpha, int | float):
            raise TypeError(f"alpha must be a number, got {self.alpha!r} ({type(self.alpha).__name__})")
        if not 0.0 < self.alpha < 1.0:
            raise ValueError(f"alpha must be between 0 and 1, got {self.alpha}")
        check_positive_int("alpha_rows", self.alpha_rows)
        check_choice("token_order", self.token_order, TOKEN_ORDERS)
        check_choice("precision", self.precision, PRECISIONS)
        if self.routing == "soft" and self.precision != "input":
            raise ValueError(f'routing="soft" needs precision="input", got precision={self.precision!r}')

    @property
    def sparsity(self) -> float:
        """1 - keep_ratio."""
        return 1.0 - self.keep_ratio

    @property
    def branches(self) -> SLAConfig:
        """The configuration of SLA with the same blocks and branches, whose projection the ratio replaces."""
        return SLAConfig(
            keep_ratio=self.keep_ratio,
            drop_ratio=0.0,
            block_q=self.block_q,
            block_k=self.block_k,
            feature_map=self.feature_map,
            # A selection that is given may leave blocks to neither branch.
            linear_scope="none" if self.linear_scope == "none" else "marginal",
            projection=False,
            token_order=self.token_order,
        )

    def tile_for(self, grid: Any) -> tuple[int, int, int] | None:
        """The cube that tokens are sorted by on a `VideoGrid`, or None for raster order."""
        return self.branches.tile_for(grid)
