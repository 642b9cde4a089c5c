"""`SLAVSAConfig`: which cubes are read exactly, and which branches stand for the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from foveal.checks import check_choice, check_ratio
from foveal.methods.config import MethodConfig
from foveal.methods.sla.config import SLAConfig
from foveal.methods.vsa.config import VSAConfig

FEATURE_MAPS = ("softmax", "elu", "relu")
LINEAR_SCOPES = ("noncritical", "all", "none")
PRECISIONS = ("input", "int8")  # those that have a backward


@dataclass(frozen=True)
class SLAVSAConfig(MethodConfig):
    """SLA (arXiv 2509.24006) and VSA (arXiv 2505.13389) in one, over the same cubes.

    Args:
        topk, keep_ratio, tile, fine_gate: which cubes are read exactly, as in `VSAConfig`. The fine gate is that of
            the exact and the linear branch together.
        coarse: whether there is a coarse branch, attention over the means of cubes, with a zero-initialized gate.
        linear_scope: the cubes that the linear branch sums over: "noncritical" (those that are not read exactly), "all"
            (every key, with one state for all queries), "none" (no linear branch).
        feature_map: phi of the linear branch: "softmax" (over the head dimension), "elu" (elu + 1), "relu". Its
            projection is zero-initialized.
        precision: of the products of queries and keys in the exact branch, "input" or "int8"; see
            `block_sparse_attention`.

    Raises:
        TypeError, ValueError: naming the field, what was expected and what came.
    """

    topk: int | None = None
    keep_ratio: float | None = 0.125
    tile: tuple[int, int, int] | str = (4, 4, 4)
    fine_gate: bool = False
    coarse: bool = True
    linear_scope: str = "noncritical"
    feature_map: str = "softmax"
    precision: str = "input"

    def __post_init__(self) -> None:
        if self.topk is None:
            check_ratio("keep_ratio", self.keep_ratio)
        object.__setattr__(self, "keep_ratio", self.cubes.keep_ratio)
        check_choice("linear_scope", self.linear_scope, LINEAR_SCOPES)
        check_choice("feature_map", self.feature_map, FEATURE_MAPS)
        check_choice("precision", self.precision, PRECISIONS)
        if not isinstance(self.coarse, bool):
            raise TypeError(f"coarse must be a bool, got {self.coarse!r}")

    def replace(self, **changes: Any) -> SLAVSAConfig:
        """A copy with some fields changed, validated again. A `topk` replaces a ratio, and a ratio a `topk`."""
        if changes.get("topk") is not None:
            changes = {"keep_ratio": None} | changes
        elif changes.get("keep_ratio") is not None:
            changes = {"topk": None} | changes
        return super().replace(**changes)

    @property
    def cubes(self) -> VSAConfig:
        """The configuration of VSA with the same cubes."""
        return VSAConfig(
            topk=self.topk,
            keep_ratio=self.keep_ratio,
            tile=self.tile,
            fine_gate=self.fine_gate,
            precision=self.precision,
        )

    def branch(self, slot: int) -> SLAConfig:
        """The configuration of SLA with the same linear branch, over slots of so many tokens."""
        return SLAConfig(
            drop_ratio=0.0,
            block_q=slot,
            block_k=slot,
            feature_map=self.feature_map,
            linear_scope=self.linear_scope,
        )

    @property
    def sparsity(self) -> float | None:
        """1 - keep_ratio, or None where `topk` decides."""
        return self.cubes.sparsity
