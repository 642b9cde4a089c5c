"""What an attention configuration costs: FLOPs and bytes of the forward pass, each part by name.

FLOPs are those of matrix products (2 per multiply-add) and sums (1 per addition or product); exponentials, feature maps
without weights, divisions and comparisons are not counted, on either side. Blocks count as they run: a partial block of
SLA as a full one, a cube of VSA as its whole slot. Block counts follow the rule of `select_blocks`.

Bytes are those of device memory if each part ran by itself: it reads each input once and writes each output once. Key
and value blocks that many query blocks read come from the cache after the first time and count once; a kernel that
fuses parts keeps what passes between them on the chip and moves less.
"""

from __future__ import annotations

from dataclasses import dataclass

from foveal.blocks import count
from foveal.checks import check_positive_int
from foveal.layout import VideoGrid
from foveal.methods.sla.config import SLAConfig
from foveal.methods.sla.feature_maps import feature_dim
from foveal.methods.vsa.attention import resolve_tile, slot_size
from foveal.methods.vsa.config import VSAConfig

INDEX_BYTES = 4
FLOAT32_BYTES = 4


@dataclass(frozen=True)
class CostPart:
    """One named part: its FLOPs and its bytes, over the whole batch and all heads."""

    name: str
    flops: int
    bytes: int


@dataclass(frozen=True)
class AttentionCost:
    """The cost of one attention layer's forward pass; `print` it for a table.

    Args:
        parts: in the order in which they run.
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
    config: SLAConfig | VSAConfig | None,
    *,
    grid: VideoGrid | None = None,
    query_length: int | None = None,
    key_length: int | None = None,
    heads: int,
    head_dim: int,
    batch: int = 1,
    dtype_bytes: int = 2,
) -> AttentionCost:
    """FLOPs and bytes of one attention layer's forward pass, each part by name.

    The parts of SLA (arXiv 2509.24006); those that a configuration lacks are absent:

    - `reorder`: to tile order and back (token_order "tile").
    - `selection`: pooling and pooled scores.
    - `sparse`: softmax attention on the critical blocks.
    - `feature map`: the products of "hedgehog" alone.
    - `state build`: phi(K)^T V of every key block, or of the whole sequence for linear_scope "all".
    - `mask GEMM`: the states summed over each row's blocks; linear_scope "all" has none.
    - `apply`: phi(Q) times its state.
    - `projection`: the learned one, and the sum of both branches.

    The parts of VSA (arXiv 2505.13389):

    - `reorder`: to the slotted tile order and back.
    - `coarse`: pooling and pooled attention.
    - `selection`: ranking alone, so no FLOPs.
    - `fine`: softmax attention on the chosen cubes.
    - `gates`: their linear projections, from hidden states of width heads * head_dim.
    - `combine`: Gc * Oc + Gf * Of.

    The backward costs, as multiples of the forward: dense, `sparse` and `fine` 2.5 (five products for two, the scores
    recomputed), `state build` 3 and `mask GEMM` 2 (recomputed rather than saved, then their gradients), `apply` 3,
    `feature map`, `coarse`, `gates` and `projection` 2, SLA's `selection` 0.

    Args:
        config: `SLAConfig`, `VSAConfig`, or None for dense attention.
        grid: the video's shape in tokens; VSA needs it, SLA and dense take lengths instead if you like.
        query_length, key_length: tokens, instead of a grid; key_length defaults to query_length.
        heads, head_dim, batch: H, D and B.
        dtype_bytes: bytes per element of query, key, value, output and block states; indices, pooled tensors,
            normalisers and the projections' weights are 4 bytes.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    if config is not None and not isinstance(config, SLAConfig | VSAConfig):
        raise TypeError(f"config must be an SLAConfig, a VSAConfig or None, got {type(config).__name__}")
    query_length, key_length = _lengths(config, grid, query_length, key_length)
    sizes = {"heads": heads, "head_dim": head_dim, "batch": batch, "dtype_bytes": dtype_bytes}
    for name, value in sizes.items():
        check_positive_int(name, value)

    dense = CostPart(
        "dense",
        4 * batch * heads * query_length * key_length * head_dim,
        2 * batch * heads * (query_length + key_length) * head_dim * dtype_bytes,
    )
    match config:
        case SLAConfig():
            parts = _sla_parts(config, query_length, key_length, **sizes)
        case VSAConfig():
            parts = _vsa_parts(config, grid, **sizes)
        case None:
            parts = (CostPart("attention", dense.flops, dense.bytes),)
    return AttentionCost(parts, dense)


def _lengths(config, grid, query_length, key_length) -> tuple[int, int]:
    if grid is not None:
        if not isinstance(grid, VideoGrid):
            raise TypeError(f"grid must be a VideoGrid, got {grid!r}")
        if query_length is not None or key_length is not None:
            raise ValueError(f"give grid or lengths, not both, got {grid}, {query_length=}, {key_length=}")
        return grid.num_tokens, grid.num_tokens
    if isinstance(config, VSAConfig):
        raise ValueError("grid is required for a VSAConfig: VideoGrid(frames, height, width) in tokens")
    if query_length is None:
        raise ValueError("give grid, or query_length (and key_length, if it differs)")
    check_positive_int("query_length", query_length)
    if key_length is None:
        return query_length, query_length
    check_positive_int("key_length", key_length)
    return query_length, key_length


def _sla_parts(
    config: SLAConfig, query_length: int, key_length: int, *, heads: int, head_dim: int, batch: int, dtype_bytes: int
) -> tuple[CostPart, ...]:
    pairs = batch * heads
    features = feature_dim(config.feature_map, head_dim)
    rows, columns = -(-query_length // config.block_q), -(-key_length // config.block_k)
    padded_queries, padded_keys = rows * config.block_q, columns * config.block_k
    critical = max(1, count(config.keep_ratio, columns)) if config.keep_ratio else 0
    masked = config.linear_scope in ("marginal", "noncritical")

    query_bytes = pairs * query_length * head_dim * dtype_bytes
    key_bytes = pairs * key_length * head_dim * dtype_bytes
    list_bytes = pairs * rows * (critical + 1) * INDEX_BYTES
    mask_bytes = pairs * rows * columns * dtype_bytes if masked else 0

    parts = []
    if config.token_order == "tile":
        parts.append(CostPart("reorder", 0, 2 * (query_bytes + 2 * key_bytes + query_bytes)))
    pooling = pairs * (query_length + key_length) * head_dim
    scores = 2 * pairs * rows * columns * head_dim
    parts.append(CostPart("selection", pooling + scores, query_bytes + key_bytes + list_bytes + mask_bytes))
    if critical:
        lse_bytes = pairs * query_length * FLOAT32_BYTES
        parts.append(
            CostPart(
                "sparse",
                4 * pairs * padded_queries * critical * config.block_k * head_dim,
                2 * query_bytes + 2 * key_bytes + list_bytes + lse_bytes,
            )
        )
    if config.linear_scope == "none":
        return tuple(parts)

    if config.feature_map == "hedgehog":
        tokens = pairs * (query_length + key_length)
        parts.append(
            CostPart(
                "feature map",
                2 * tokens * head_dim * head_dim,
                query_bytes + key_bytes + head_dim * head_dim * FLOAT32_BYTES + tokens * features * dtype_bytes,
            )
        )
    # A state is phi(K)^T V, [F, D], beside the column sums of phi(K), [F], which stay in float32.
    state_bytes = features * (head_dim * dtype_bytes + FLOAT32_BYTES)
    phi_query_bytes, phi_key_bytes = (x * features // head_dim for x in (query_bytes, key_bytes))
    states, sums = pairs * columns, pairs * rows
    if not masked:
        states = sums = pairs
    parts.append(
        CostPart(
            "state build",
            pairs * padded_keys * features * (2 * head_dim + 1),
            phi_key_bytes + key_bytes + states * state_bytes,
        )
    )
    if masked:
        parts.append(
            CostPart(
                "mask GEMM",
                2 * pairs * rows * columns * features * (head_dim + 1),
                mask_bytes + (states + sums) * state_bytes,
            )
        )
    sparse_bytes = query_bytes if critical else 0
    apply_bytes = phi_query_bytes + sums * state_bytes + query_bytes
    apply_flops = 2 * pairs * padded_queries * features * (head_dim + 1)
    additions = pairs * query_length * head_dim if critical else 0
    if not config.projection:
        parts.append(CostPart("apply", apply_flops + additions, apply_bytes + sparse_bytes))
        return tuple(parts)
    parts.append(CostPart("apply", apply_flops, apply_bytes))
    weight_bytes = head_dim * (head_dim + 1) * FLOAT32_BYTES
    parts.append(
        CostPart(
            "projection",
            2 * pairs * query_length * head_dim * head_dim + additions,
            2 * query_bytes + sparse_bytes + weight_bytes,
        )
    )
    return tuple(parts)


def _vsa_parts(
    config: VSAConfig, grid: VideoGrid, *, heads: int, head_dim: int, batch: int, dtype_bytes: int
) -> tuple[CostPart, ...]:
    pairs = batch * heads
    tile = resolve_tile(config, grid)
    cubes, slot = grid.num_cubes(tile), slot_size(tile)
    slots = cubes * slot
    critical = min(config.topk, cubes) if config.topk is not None else max(1, count(config.keep_ratio, cubes))

    token_bytes = pairs * grid.num_tokens * head_dim * dtype_bytes
    slot_bytes = pairs * slots * head_dim * dtype_bytes
    pooled_bytes = pairs * cubes * head_dim * FLOAT32_BYTES
    score_bytes = pairs * cubes * cubes * FLOAT32_BYTES
    list_bytes = pairs * cubes * (critical + 1) * INDEX_BYTES
    lse_bytes = pairs * slots * FLOAT32_BYTES

    hidden_dim = heads * head_dim
    gates = 2 if config.fine_gate else 1
    hidden_bytes = batch * grid.num_tokens * hidden_dim * dtype_bytes
    weight_bytes = hidden_dim * (hidden_dim + 1) * FLOAT32_BYTES
    elements = pairs * grid.num_tokens * head_dim
    return (
        CostPart("reorder", 0, 4 * (token_bytes + slot_bytes)),
        CostPart(
            "coarse",
            3 * pairs * slots * head_dim + 4 * pairs * cubes * cubes * head_dim,
            3 * slot_bytes + score_bytes + pooled_bytes,
        ),
        CostPart("selection", 0, score_bytes + list_bytes),
        CostPart("fine", 4 * pairs * slots * critical * slot * head_dim, 4 * slot_bytes + list_bytes + lse_bytes),
        CostPart(
            "gates",
            gates * 2 * batch * grid.num_tokens * hidden_dim * hidden_dim,
            hidden_bytes + gates * (weight_bytes + token_bytes),
        ),
        CostPart("combine", (gates + 1) * elements, (gates + 2) * token_bytes + pooled_bytes),
    )
