"""What SLA costs, part by part."""

from __future__ import annotations

import torch

from foveal.methods.choosing import mean_kept
from foveal.methods.cost import FLOAT32_BYTES, INDEX_BYTES, AttentionShape, CostPart
from foveal.methods.sla.config import SLAConfig
from foveal.methods.sla.feature_maps import feature_dim
from foveal.methods.sla.order import fixed_of, picked_by_head


def cost_parts(config: SLAConfig, shape: AttentionShape) -> tuple[CostPart, ...]:
    """The parts of a forward pass; those that a configuration lacks are absent.

    - `reorder`: to tile order and back (token_order "tile"), and protected keys to behind the video's.
    - `selection`: pooling and pooled scores. It has no backward.
    - `sparse`: softmax attention on the critical blocks; of those that are kept beside the picked ones all, on average.
    - `tail`: the means of blocks, and softmax attention on them (tail "pooled").
    - `feature map`: the products of "hedgehog".
    - `state build`: phi(K)^T V of every key block, or of the whole sequence for linear_scope "all".
    - `mask GEMM`: the states summed over each row's blocks; linear_scope "all" has none.
    - `apply`: phi(Q) times its state.
    - `projection`: the learned one, and the sum of both branches.

    The backward takes 2.5 times the forward's FLOPs for `sparse` and `tail` (five products for two, the scores
    recomputed), 3 for `state build` and 2 for `mask GEMM` (recomputed rather than saved, then their gradients), 3 for
    `apply`, and 2 for the others.
    """
    pairs, head_dim, dtype_bytes = shape.pairs, shape.head_dim, shape.dtype_bytes
    query_length, key_length = shape.query_length, shape.key_length
    features = feature_dim(config.feature_map, head_dim)
    protected_length = 0 if shape.layout is None else shape.layout.num_protected
    protected = -(-protected_length // config.block_k)
    rows, ranked = -(-query_length // config.block_q), -(-(key_length - protected_length) // config.block_k)
    columns = ranked + protected
    padded_queries, padded_keys = rows * config.block_q, columns * config.block_k
    fixed = fixed_of(config, shape.grid, torch.device("cpu"))
    critical = mean_kept(picked_by_head(config, ranked), ranked, fixed) + protected
    masked = config.linear_scope in ("marginal", "noncritical")

    query_bytes = pairs * query_length * head_dim * dtype_bytes
    key_bytes = pairs * key_length * head_dim * dtype_bytes
    list_bytes = pairs * rows * (critical + 1) * INDEX_BYTES
    mask_bytes = pairs * rows * columns * dtype_bytes if masked else 0

    parts = []
    if config.token_order == "tile":
        parts.append(CostPart("reorder", 0, 2 * (query_bytes + 2 * key_bytes + query_bytes)))
    elif shape.layout is not None:
        parts.append(CostPart("reorder", 0, 2 * 2 * key_bytes))
    pooling = pairs * (query_length + key_length - protected_length) * head_dim
    scores = 2 * pairs * rows * ranked * head_dim
    parts.append(CostPart("selection", pooling + scores, query_bytes + key_bytes + list_bytes + mask_bytes, backward=0))
    if critical:
        lse_bytes = pairs * query_length * FLOAT32_BYTES
        parts.append(
            CostPart(
                "sparse",
                4 * pairs * padded_queries * critical * config.block_k * head_dim,
                2 * query_bytes + 2 * key_bytes + list_bytes + lse_bytes,
                backward=2.5,
            )
        )
    if config.tail == "pooled":
        mean_bytes = pairs * columns * head_dim * FLOAT32_BYTES
        bias_bytes = pairs * rows * columns * FLOAT32_BYTES
        parts.append(
            CostPart(
                "tail",
                2 * pairs * key_length * head_dim + 4 * pairs * padded_queries * columns * head_dim,
                2 * key_bytes + 4 * mean_bytes + 2 * bias_bytes + 5 * query_bytes,
                backward=2.5,
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
            backward=3,
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
        parts.append(CostPart("apply", apply_flops + additions, apply_bytes + sparse_bytes, backward=3))
        return tuple(parts)
    parts.append(CostPart("apply", apply_flops, apply_bytes, backward=3))
    weight_bytes = head_dim * (head_dim + 1) * FLOAT32_BYTES
    parts.append(
        CostPart(
            "projection",
            2 * pairs * query_length * head_dim * head_dim + additions,
            2 * query_bytes + sparse_bytes + weight_bytes,
        )
    )
    return tuple(parts)
