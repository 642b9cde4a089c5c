"""What SLA2 costs, part by part: SLA's parts without its projection, and the router and the ratio."""

from __future__ import annotations

from foveal.methods.cost import FLOAT32_BYTES, AttentionShape, CostPart
from foveal.methods.sla.cost import cost_parts as branch_parts
from foveal.methods.sla2.config import SLA2Config


def cost_parts(config: SLA2Config, shape: AttentionShape) -> tuple[CostPart, ...]:
    """The parts of a forward pass: those of SLA (see `foveal.methods.sla.cost.cost_parts`), among them

    - `router`: the projections of pooled queries and keys. With "straight_through" its backward also has the products
      of queries with mean keys, of gradients with mean values, and of the states' gradients with the states.
      With "soft" the other parts are those of every block, read and summed.
    - `combine`: alpha O^s + (1 - alpha) O^l, with a linear branch. Here the bytes are those of a pass over the output.
    """
    pairs, head_dim, dtype_bytes = shape.pairs, shape.head_dim, shape.dtype_bytes
    protected = 0 if shape.layout is None else shape.layout.num_protected
    rows, ranked = -(-shape.query_length // config.block_q), -(-(shape.key_length - protected) // config.block_k)
    router = 2 * pairs * (rows + ranked) * head_dim**2
    backward = 0.0
    if config.routing == "straight_through":
        by_means = 4 * pairs * shape.query_length * ranked * head_dim
        by_states = 2 * pairs * rows * ranked * head_dim * (head_dim + 1) * (config.linear_scope != "none")
        backward = 2 + (by_means + by_states) / router
    branches = config.branches
    if config.routing == "soft":
        scope = "none" if config.linear_scope == "none" else "all"
        branches = branches.replace(keep_ratio=1.0, linear_scope=scope)
    pooled_bytes = 2 * pairs * (rows + ranked) * head_dim * FLOAT32_BYTES
    parts = [
        CostPart("router", router, pooled_bytes + 2 * head_dim**2 * FLOAT32_BYTES, backward),
        *branch_parts(branches, shape),
    ]
    if config.linear_scope == "none":
        return tuple(parts)
    elements = pairs * shape.query_length * head_dim
    parts.append(CostPart("combine", 2 * elements, 2 * elements * dtype_bytes))
    return tuple(parts)
