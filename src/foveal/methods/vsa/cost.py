"""What VSA costs, part by part. A cube, and a chunk of a protected segment, counts as its whole slot."""

from __future__ import annotations

import math

import torch

from foveal.methods.choosing import mean_kept
from foveal.methods.cost import FLOAT32_BYTES, INDEX_BYTES, AttentionShape, CostPart
from foveal.methods.vsa.config import VSAConfig
from foveal.methods.vsa.layout import fixed_of, picked_by_head, resolve_tile, slot_size


def cost_parts(config: VSAConfig, shape: AttentionShape) -> tuple[CostPart, ...]:
    """The parts of a forward pass.

    - `reorder`: to the slotted tile order and back.
    - `coarse`: pooling and pooled attention.
    - `selection`: only the ranking, so no FLOPs.
    - `fine`: softmax attention on the chosen cubes, on average if some are kept beside the picked ones, and on the
      protected chunks of a packed sequence.
    - `router`: the projections of pooled queries and keys, and their products, with a router. Its backward also has the
      products of queries with mean keys and of gradients with mean values, as it learns.
    - `gates`: their linear projections, from hidden states of width heads * head_dim, if there are any.
    - `combine`: Gc * Oc + Gf * Of.

    The backward takes 2.5 times the forward's FLOPs for `fine` (five products for two, the scores recomputed), and 2
    for the others.
    """
    pairs, head_dim, dtype_bytes = shape.pairs, shape.head_dim, shape.dtype_bytes
    tile = resolve_tile(config, shape.grid)
    cubes, slot = shape.grid.num_cubes(tile), slot_size(tile)
    tokens, chunks, picked = shape.key_length, 0, picked_by_head(config, cubes, packed=shape.layout is not None)
    if shape.layout is not None:
        chunks = shape.layout.num_chunks(math.prod(tile))
    tiles = cubes + chunks
    critical = mean_kept(picked, cubes, fixed_of(config, shape.grid, torch.device("cpu"))) + chunks
    query_slots, slots = cubes * slot, tiles * slot

    token_bytes = pairs * tokens * head_dim * dtype_bytes
    slot_bytes = pairs * slots * head_dim * dtype_bytes
    pooled_bytes = pairs * tiles * head_dim * FLOAT32_BYTES
    score_bytes = pairs * tiles * tiles * FLOAT32_BYTES
    list_bytes = pairs * cubes * (critical + 1) * INDEX_BYTES
    lse_bytes = pairs * slots * FLOAT32_BYTES

    hidden_dim = shape.heads * head_dim
    gates = config.coarse + config.fine_gate
    hidden_bytes = shape.batch * tokens * hidden_dim * dtype_bytes
    weight_bytes = hidden_dim * (hidden_dim + 1) * FLOAT32_BYTES
    elements = pairs * tokens * head_dim
    parts = [
        CostPart("reorder", 0, 4 * (token_bytes + slot_bytes)),
        CostPart(
            "coarse",
            3 * pairs * slots * head_dim + 4 * pairs * tiles * tiles * head_dim,
            3 * slot_bytes + score_bytes + pooled_bytes,
        ),
        CostPart("selection", 0, score_bytes + list_bytes),
        CostPart(
            "fine",
            4 * pairs * query_slots * critical * slot * head_dim,
            4 * slot_bytes + list_bytes + lse_bytes,
            backward=2.5,
        ),
    ]
    if config.router != "none":
        flops = 4 * pairs * tiles * head_dim**2 + 2 * pairs * tiles * cubes * head_dim
        backward = 2 + 4 * pairs * slots * cubes * head_dim / flops
        parts.append(CostPart("router", flops, 2 * pooled_bytes + score_bytes, backward))
    if gates:
        flops = gates * 2 * shape.batch * tokens * hidden_dim * hidden_dim
        parts.append(CostPart("gates", flops, hidden_bytes + gates * (weight_bytes + token_bytes)))
    return *parts, CostPart("combine", (gates + 1) * elements, (gates + 2) * token_bytes + pooled_bytes)
