"""The vocabulary that everything else speaks: block selections, method configurations, implementation names.

Shape legend: B batch, H heads, Lq / Lk query / key tokens, bq / bk block sizes, Tq = ceil(Lq / bq), Tk = ceil(Lk / bk),
W the width of the longest list of critical blocks.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

IMPLS = ("auto", "reference", "torch", "triton", "gluon")
FEATURE_MAPS = ("softmax", "elu", "relu", "hedgehog")
LINEAR_SCOPES = ("marginal", "noncritical", "all", "none")
TOKEN_ORDERS = ("raster", "tile")


def count(ratio: float, total: int) -> int:
    """How many of `total` blocks `ratio` stands for: floor(ratio * total), safe against 0.29 * 100 = 28.999..."""
    return math.floor(ratio * total + 1e-6)


def cached_constant(function):
    """Compute once per arguments; `torch.compile` takes the result as it is, where it would trace through a cache.

    Never in inference mode: whoever trains after a first call there would meet tensors that autograd refuses.
    """
    cached = functools.lru_cache(maxsize=64)(torch.inference_mode(False)(function))

    @functools.wraps(function)
    def call(*arguments):
        return cached(*arguments)

    # All that torch.compiler.assume_constant_result does, which would import torch._dynamo, and Triton with it.
    call._dynamo_marked_constant = True
    return call


def check_choice(name: str, value: Any, valid: tuple[str, ...]) -> None:
    if value not in valid:
        raise ValueError(f"unknown {name} {value!r}; expected one of {valid}")


def check_positive_int(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r} ({type(value).__name__})")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def check_ratio(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number in [0, 1], got {value!r} ({type(value).__name__})")
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} must be in [0, 1], got {value}")


def check_triple(name: str, value: Any) -> None:
    if not isinstance(value, tuple) or len(value) != 3:
        raise TypeError(f"{name} must be a tuple of three ints (frames, height, width), got {value!r}")
    for axis, side in zip(("frames", "height", "width"), value, strict=True):
        check_positive_int(f"{name} {axis}", side)


def check_scale(scale: float | None, head_dim: int) -> float:
    """`scale`, or 1 / sqrt(head_dim) for None."""
    if scale is None:
        return head_dim**-0.5
    if isinstance(scale, bool) or not isinstance(scale, int | float):
        raise TypeError(f"scale must be a number or None, got {scale!r}")
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"scale must be finite and above 0, got {scale}")
    return float(scale)


class _Config:
    """What the frozen configurations share: a plain-dict form that round-trips and refuses unknown keys."""

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-ready values."""
        fields = dataclasses.asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]):
        """The inverse of `to_dict`.

        Raises:
            ValueError: for a key that is no field of this configuration.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(fields) - known)
        if unknown:
            raise ValueError(f"unknown {cls.__name__} fields {unknown}; expected some of {sorted(known)}")
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()})

    def replace(self, **changes: Any):
        """A copy with some fields changed, validated again."""
        return dataclasses.replace(self, **changes)


@dataclass(frozen=True)
class SLAConfig(_Config):
    """Sparse-linear attention (SLA, arXiv 2509.24006).

    Args:
        keep_ratio: fraction of key blocks that each query block attends to exactly (critical; the paper's k_h).
            `sparsity` is 1 - keep_ratio. 0 leaves the linear branch alone.
        drop_ratio: fraction that is skipped altogether (negligible; k_l).
        block_q, block_k: block sizes in tokens. The GPU kernels take 64 and 128; `impl="torch"` takes any.
        feature_map: phi of the linear branch: "softmax" (over the head dimension), "elu" (elu + 1), "relu",
            "hedgehog" (learnable: softmax of [Wx, -Wx], 2 * head_dim features).
        linear_scope: the key blocks that the linear branch sums over: "marginal" (the paper), "noncritical"
            (marginal and negligible), "all" (every key; the released TurboDiffusion checkpoints), "none" (sparse only).
        projection: pass the linear branch through a learned `head_dim x head_dim` projection, zero at the start;
            False adds it as it is.
        token_order: "raster" (t, h, w) or "tile": tokens sorted by 4x4x4 cubes (8x8 for images) before they are cut
            into blocks, which needs a `grid`.

    Raises:
        TypeError, ValueError: naming the field, what was expected and what came.
    """

    keep_ratio: float = 0.05
    drop_ratio: float = 0.10
    block_q: int = 64
    block_k: int = 64
    feature_map: str = "softmax"
    linear_scope: str = "marginal"
    projection: bool = True
    token_order: str = "raster"

    def __post_init__(self) -> None:
        check_ratio("keep_ratio", self.keep_ratio)
        check_ratio("drop_ratio", self.drop_ratio)
        if self.keep_ratio + self.drop_ratio > 1.0 + 1e-9:
            raise ValueError(
                f"keep_ratio + drop_ratio must be at most 1, got {self.keep_ratio} + {self.drop_ratio}; "
                "they are fractions of the same key blocks"
            )
        check_positive_int("block_q", self.block_q)
        check_positive_int("block_k", self.block_k)
        check_choice("feature_map", self.feature_map, FEATURE_MAPS)
        check_choice("linear_scope", self.linear_scope, LINEAR_SCOPES)
        check_choice("token_order", self.token_order, TOKEN_ORDERS)
        if not isinstance(self.projection, bool):
            raise TypeError(f"projection must be a bool, got {self.projection!r}")
        if self.keep_ratio == 0.0 and self.linear_scope == "none":
            raise ValueError('keep_ratio=0 with linear_scope="none" leaves neither branch: nothing would be computed')

    @property
    def sparsity(self) -> float:
        """1 - keep_ratio."""
        return 1.0 - self.keep_ratio

    def tile_for(self, grid: Any) -> tuple[int, int, int] | None:
        """The cube that tokens are sorted by on a `VideoGrid`, or None for raster order."""
        if self.token_order == "raster":
            return None
        return (1, 8, 8) if grid.frames == 1 else (4, 4, 4)


@dataclass(frozen=True)
class VSAConfig(_Config):
    """Video sparse attention (VSA, arXiv 2505.13389).

    Args:
        topk: cubes that each cube attends to, capped at the number of cubes; None takes `keep_ratio` instead.
        keep_ratio: fraction of cubes kept, when `topk` is None. Left at its default beside a `topk`, it becomes None.
        tile: cube of tokens (frames, height, width); "auto" takes the compact cube of at most 64 tokens that wastes
            least at the grid it meets, "wide" the one of at most 128: a coarser choice, at half the memory traffic.
        fine_gate: learn the fine branch's gate too (pretraining from scratch). False fixes it to 1 (retrofit).

    Raises:
        TypeError, ValueError: naming the field, what was expected and what came.
    """

    topk: int | None = None
    keep_ratio: float | None = 0.125
    tile: tuple[int, int, int] | str = (4, 4, 4)
    fine_gate: bool = False

    def __post_init__(self) -> None:
        if self.topk is None:
            check_ratio("keep_ratio", self.keep_ratio)
            if self.keep_ratio == 0.0:
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
        if not isinstance(self.fine_gate, bool):
            raise TypeError(f"fine_gate must be a bool, got {self.fine_gate!r}")

    @property
    def sparsity(self) -> float | None:
        """1 - keep_ratio, or None where `topk` decides."""
        return None if self.keep_ratio is None else 1.0 - self.keep_ratio


@dataclass(frozen=True, eq=False)
class BlockSelection:
    """The key blocks each query block attends to exactly (critical), linearly (marginal), or not at all (negligible).

    Args:
        critical: int32 [B, H, Tq, W], each row's critical key blocks, ascending; entries past the row's count are 0.
        critical_count: int32 [B, H, Tq], how many entries of each row count.
        marginal: [B, H, Tq, Tk], nonzero where marginal (bool, or the float operand of a mask product); None when
            nothing was dropped, so that every block that is not critical is marginal.
        block_q, block_k: block sizes in tokens.
        query_length, key_length: tokens; the last block may be partial.
        key_block_sizes: int32 [B, Tk] or [1, Tk], valid tokens at the front of each key block; None when all blocks
            are full, but for a partial last one.
    """

    critical: Tensor
    critical_count: Tensor
    marginal: Tensor | None
    block_q: int
    block_k: int
    query_length: int
    key_length: int
    key_block_sizes: Tensor | None = None

    @classmethod
    def from_labels(
        cls,
        labels: Tensor,
        *,
        block_q: int,
        block_k: int,
        query_length: int,
        key_length: int,
        key_block_sizes: Tensor | None = None,
    ) -> BlockSelection:
        """A selection from explicit labels, for tests and for patterns of one's own.

        Args:
            labels: [B, H, Tq, Tk] of +1 (critical), 0 (marginal) or -1 (negligible), any signed dtype.
            block_q, block_k, query_length, key_length, key_block_sizes: as in the class.

        Raises:
            TypeError, ValueError: labels of another shape or with other values.
        """
        if not isinstance(labels, Tensor):
            raise TypeError(f"labels must be a tensor, got {type(labels).__name__}")
        for name, value in (
            ("block_q", block_q),
            ("block_k", block_k),
            ("query_length", query_length),
            ("key_length", key_length),
        ):
            check_positive_int(name, value)
        expected = (-(-query_length // block_q), -(-key_length // block_k))
        if labels.dim() != 4 or tuple(labels.shape[2:]) != expected:
            raise ValueError(
                f"labels must have shape [B, H, {expected[0]}, {expected[1]}] for lengths ({query_length}, "
                f"{key_length}) in blocks of ({block_q}, {block_k}), got {tuple(labels.shape)}"
            )
        wrong = (labels < -1) | (labels > 1)
        if wrong.any():
            raise ValueError(f"labels must be -1, 0 or 1, got {labels[wrong].unique().tolist()[:5]}")
        critical, counts = lists_from_mask(labels == 1)
        width = max(1, int(counts.max())) if counts.numel() else 1
        return cls(
            critical=critical[..., :width].contiguous(),
            critical_count=counts,
            marginal=labels == 0,
            block_q=block_q,
            block_k=block_k,
            query_length=query_length,
            key_length=key_length,
            key_block_sizes=key_block_sizes,
        )

    @property
    def num_query_blocks(self) -> int:
        return -(-self.query_length // self.block_q)

    @property
    def num_key_blocks(self) -> int:
        return -(-self.key_length // self.block_k)

    def critical_mask(self) -> Tensor:
        """bool [B, H, Tq, Tk], True where critical."""
        width = self.critical.shape[-1]
        listed = torch.arange(width, device=self.critical.device) < self.critical_count[..., None]
        slots = torch.where(listed, self.critical, self.num_key_blocks).long()
        mask = slots.new_zeros((*slots.shape[:-1], self.num_key_blocks + 1), dtype=torch.bool)
        return mask.scatter_(-1, slots, True)[..., :-1]

    def labels(self) -> Tensor:
        """int8 [B, H, Tq, Tk]: +1 critical, 0 marginal, -1 negligible."""
        critical = self.critical_mask()
        if self.marginal is None:
            return critical.to(torch.int8)
        return critical.to(torch.int8) * 2 + (self.marginal != 0).to(torch.int8) - 1

    def linear_mask(self, scope: str) -> Tensor | None:
        """The blocks that a `linear_scope` sums over, nonzero where summed: [B, H, Tq, Tk]; None for "all"."""
        if scope == "all":
            return None
        if scope == "marginal" and self.marginal is not None:
            return self.marginal
        return ~self.critical_mask()

    def key_valid(self) -> Tensor:
        """bool [B or 1, Lk], False for padding keys."""
        position = torch.arange(self.key_length, device=self.critical.device)
        if self.key_block_sizes is None:
            return torch.ones_like(position, dtype=torch.bool)[None]
        block = position // self.block_k
        return position % self.block_k < self.key_block_sizes[:, block]

    def expand(self, block_mask: Tensor) -> Tensor:
        """A [B, H, Tq, Tk] block mask as a bool token mask [B, H, Lq, Lk], without the padding keys."""
        tokens = (block_mask != 0).repeat_interleave(self.block_q, 2)[:, :, : self.query_length]
        tokens = tokens.repeat_interleave(self.block_k, 3)[..., : self.key_length]
        return tokens & self.key_valid()[:, None, None, :]


def lists_from_mask(mask: Tensor) -> tuple[Tensor, Tensor]:
    """bool [..., T] to (int32 [..., T] indices of the True entries, ascending, then zeros; int32 [...] counts)."""
    total = mask.shape[-1]
    index = torch.arange(total, device=mask.device, dtype=torch.int32)
    ordered = torch.where(mask, index, total).sort(-1).values
    counts = mask.sum(-1, dtype=torch.int32)
    return torch.where(ordered < total, ordered, 0), counts
