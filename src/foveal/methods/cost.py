"""What an attention configuration costs: FLOPs and bytes of the forward pass, each part by name.

Each method lists its own parts, in the `cost.py` of its folder. FLOPs are those of matrix products (2 per multiply-add)
and sums (1 per addition or product); exponentials, feature maps without weights, divisions and comparisons are not
counted, on either side. Blocks count as they run, a partial one as a full one. Block counts follow the rule of
`select_blocks`.

Bytes are those of device memory if each part ran by itself: it reads each input once and writes each output once. Key
and value blocks that many query blocks read come from the cache after the first time and count once; a kernel that
fuses parts keeps what passes between them on the chip and moves less.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from foveal.checks import check_positive_int
from foveal.layout import TokenLayout, VideoGrid, resolve_layout
from foveal.methods.base import Config, method_of

INDEX_BYTES = 4
FLOAT32_BYTES = 4
# Five products for two, since the scores are recomputed.
DENSE_BACKWARD = 2.5


@dataclass(frozen=True)
class CostPart:
    """One named part: its FLOPs and its bytes, over the whole batch and all heads.

    Args:
        backward: FLOPs of its backward over those of its forward: 2 for a product, whose gradients are two products.
    """

    name: str
    flops: int
    bytes: int
    backward: float = 2.0


@dataclass(frozen=True)
class AttentionShape:
    """The call whose cost is counted.

    Args:
        batch, heads, head_dim: B, H and D.
        query_length, key_length: the lengths in tokens; with a grid both are its number of tokens, and protected tokens
            are keys.
        grid: the video's shape in tokens; None where only lengths are known, never for a method with `needs_grid`.
        dtype_bytes: bytes per element of query, key, value, output and block states.
        layout: the layout of a packed sequence; None without protected segments. What their queries cost is no part of
            a method.
    """

    batch: int
    heads: int
    head_dim: int
    query_length: int
    key_length: int
    grid: VideoGrid | None
    dtype_bytes: int
    layout: TokenLayout | None = None

    @property
    def pairs(self) -> int:
        """Heads of the whole batch: B * H."""
        return self.batch * self.heads


@dataclass(frozen=True)
class AttentionCost:
    """The cost of one attention layer's forward pass; `print` it for a table.

    Args:
        parts: the parts, in the order in which they run.
        dense: exact attention at the same shape: 4 B H Lq Lk D FLOPs; query, key, value and output moved once.
    """

    parts: tuple[CostPart, ...]
    dense: CostPart

    @property
    def flops(self) -> int:
        """FLOPs of all parts."""
        return sum(part.flops for part in self.parts)

    @property
    def bytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.bytes for part in self.parts)

    @property
    def flops_ratio(self) -> float:
        """Our FLOPs over the dense ones: 0.07 is 7 % of the work."""
        return self.flops / self.dense.flops

    @property
    def reduction(self) -> float:
        """The dense FLOPs over ours: how many times less arithmetic, which is not how many times faster."""
        return self.dense.flops / self.flops

    @property
    def backward_flops(self) -> float:
        """FLOPs of the backward of all parts."""
        return sum(part.backward * part.flops for part in self.parts)

    def part(self, name: str) -> CostPart:
        """The part of that name.

        Raises:
            ValueError: if this configuration has no such part.
        """
        for part in self.parts:
            if part.name == name:
                return part
        raise ValueError(f"unknown part {name!r}; expected one of {tuple(part.name for part in self.parts)}")

    def __str__(self) -> str:
        rows = [("part", "GFLOP", "of dense", "MB")]
        total = CostPart("total", self.flops, self.bytes)
        for part in (*self.parts, total, self.dense):
            share = 100 * part.flops / self.dense.flops
            rows.append((part.name, f"{part.flops / 1e9:,.1f}", f"{share:.2f} %", f"{part.bytes / 1e6:,.1f}"))
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
        rule = "-" * len(lines[0])
        table = [lines[0], rule, *lines[1:-2], rule, *lines[-2:]]
        return "\n".join([*table, f"{self.reduction:.1f}x fewer FLOPs than dense (forward)"])


def attention_cost(
    config: Config | None,
    *,
    grid: VideoGrid | None = None,
    layout: TokenLayout | VideoGrid | None = None,
    query_length: int | None = None,
    key_length: int | None = None,
    heads: int,
    head_dim: int,
    batch: int = 1,
    dtype_bytes: int = 2,
) -> AttentionCost:
    """FLOPs and bytes of one attention layer's forward pass, each part by name.

    What the parts of a method are, see `foveal.methods.sla.cost.cost_parts` and `foveal.methods.vsa.cost.cost_parts`;
    those that a configuration lacks are absent. Each has the FLOPs of its backward, as a multiple of its forward's; for
    dense attention these are 2.5 (five products for two, since the scores are recomputed). With protected segments
    there is a part `protected`: dense attention of their queries.

    Args:
        config: the configuration of any method, such as `SLAConfig` or `VSAConfig`; None for dense attention.
        grid: the video's shape in tokens; VSA needs it; SLA and dense attention also take lengths instead.
        layout: the layout of a packed sequence, instead of a grid.
        query_length, key_length: tokens, instead of a grid; key_length defaults to query_length.
        heads, head_dim, batch: H, D and B.
        dtype_bytes: bytes per element of query, key, value, output and block states; indices, pooled tensors,
            normalizers and the projections' weights are 4 bytes.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    method = None if config is None else method_of(config)
    grid, packed = resolve_layout(grid, layout)
    query_length, key_length = _lengths(config, grid, packed, query_length, key_length)
    sizes = {"batch": batch, "heads": heads, "head_dim": head_dim, "dtype_bytes": dtype_bytes}
    for name, value in sizes.items():
        check_positive_int(name, value)

    dense = _dense("dense", query_length, key_length, **sizes)
    if method is None:
        return AttentionCost((dataclasses.replace(dense, name="attention"),), dense)
    if packed is None:
        shape = AttentionShape(query_length=query_length, key_length=key_length, grid=grid, **sizes)
        return AttentionCost(method.cost(config, shape), dense)
    shape = AttentionShape(query_length=grid.num_tokens, key_length=key_length, grid=grid, layout=packed, **sizes)
    protected = _dense("protected", packed.num_protected, key_length, **sizes)
    return AttentionCost((*method.cost(config, shape), protected), dense)


def _dense(name, query_length, key_length, *, batch, heads, head_dim, dtype_bytes) -> CostPart:
    return CostPart(
        name,
        4 * batch * heads * query_length * key_length * head_dim,
        2 * batch * heads * (query_length + key_length) * head_dim * dtype_bytes,
        backward=DENSE_BACKWARD,
    )


def _lengths(config, grid, packed, query_length, key_length) -> tuple[int, int]:
    if grid is not None:
        if query_length is not None or key_length is not None:
            raise ValueError(f"give grid or lengths, not both, got {grid}, {query_length=}, {key_length=}")
        length = grid.num_tokens if packed is None else packed.num_tokens
        return length, length
    if config is not None and method_of(config).needs_grid:
        raise ValueError(f"grid is required for a {type(config).__name__}: VideoGrid(frames, height, width) in tokens")
    if query_length is None:
        raise ValueError("give grid, or query_length (and key_length, if it differs)")
    check_positive_int("query_length", query_length)
    if key_length is None:
        return query_length, query_length
    check_positive_int("key_length", key_length)
    return query_length, key_length
