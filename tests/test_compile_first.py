"""A method's first call may be a compiled one, whose trace imports the kernels and registers their values."""

import sys

import torch
from interpreted import mend_interpreter, run_interpreted


def calls(query, key, value):
    """In an order in which no method has imported the next one's kernels."""
    import foveal

    grid, common = foveal.VideoGrid(2, 8, 8), {"keep_ratio": 0.5}
    hidden = query.transpose(1, 2).flatten(2)
    vsa = foveal.VideoSparseAttention(128, 2, 64, foveal.VSAConfig(**common), impl="triton").bfloat16()
    sla = foveal.SparseLinearAttention(64, foveal.SLAConfig(**common), impl="triton")
    sla2 = foveal.RoutedSparseLinearAttention(2, 64, foveal.SLA2Config(**common), impl="triton")
    both = foveal.SparseLinearVideoAttention(128, 2, 64, foveal.SLAVSAConfig(**common), impl="triton").bfloat16()
    return {
        "VSA": lambda: vsa(query, key, value, hidden, grid=grid),
        "SLA": lambda: sla(query, key, value),
        "SLA2": lambda: sla2(query, key, value),
        "SLA + VSA": lambda: both(query, key, value, hidden, grid=grid),
    }


def test_first_calls_compile_without_a_graph_break():
    run_interpreted(__file__, ["first"])


if __name__ == "__main__" and sys.argv[1:] == ["first"]:
    from foveal.kernels import api

    mend_interpreter()
    api._why_no_triton = lambda query, block_q, block_k: None
    qkv = torch.randn(3, 1, 2, 128, 64).bfloat16().unbind()
    for name, call in calls(*qkv).items():
        assert torch.compile(call, fullgraph=True, backend="eager")().isfinite().all(), name
