"""Context parallelism: two processes on the CPU agree with one, forward and backward; what is refused."""

import os
import shutil

import pytest
import torch
from tiny_wan import SPARSE_SLA, diffusers, run, tiny_transformer
from two_rank_cases import CONTEXT_PARALLEL, INDUCTOR, check_case, marked

from foveal import (
    SparseLinearAttention,
    VideoGrid,
    VideoSparseAttention,
    VSAConfig,
    context_parallel_attention,
    densify,
    sparsify,
)
from foveal.models.context_parallel import check_parallel_config
from foveal.models.processor import sparse_processors

needs_compiler = pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="needs a C++ compiler")


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(*case.values, marks=(*case.marks, *([needs_compiler] if case.values[0] in INDUCTOR else [])))
        for case in marked(CONTEXT_PARALLEL, "context parallelism (Ulysses)")
    ],
)
def test_two_ranks(case, request):
    check_case(case, request)


def parallel_config(**degrees):
    return diffusers.ParallelConfig(context_parallel_config=diffusers.ContextParallelConfig(**degrees))


@pytest.mark.parametrize(
    ("degrees", "got"),
    [
        ({"ring_degree": 2}, "ring_degree=2, ulysses_degree=1"),
        ({"ring_degree": 2, "ulysses_degree": 2}, "ring_degree=2, ulysses_degree=2"),
    ],
)
def test_ring_attention_is_refused(degrees, got):
    model, config = sparsify(tiny_transformer(), SPARSE_SLA), parallel_config(**degrees)
    processor = model.blocks[0].attn1.processor
    with pytest.raises(ValueError, match=rf"takes only Ulysses: expected ring_degree=1 .*, got {got}"):
        processor._parallel_config = config
    assert processor._parallel_config is None
    densify(model)._parallel_config = config
    with pytest.raises(ValueError, match="takes only Ulysses"):
        sparsify(model, SPARSE_SLA)
    assert not sparse_processors(model)


@pytest.mark.parametrize("family", ["hunyuan_video", "cogvideox", "wan_vace", "ltx2"])
def test_families_that_diffusers_does_not_shard(family):
    with pytest.raises(ValueError, match=rf"supported for wan, ltx_video, flux, minimax_h3, not for {family}"):
        check_parallel_config(family, parallel_config(ulysses_degree=2))
    check_parallel_config(family, None)


def test_the_dense_processor_shares_the_configuration():
    model, config = sparsify(tiny_transformer(), SPARSE_SLA), parallel_config(ulysses_degree=2)
    processor = model.blocks[0].attn1.processor
    processor._parallel_config = config
    assert processor.original._parallel_config is config
    processor._parallel_config = None
    assert processor.original._parallel_config is None
    with torch.no_grad():
        run(model)


def test_own_modules_mistakes():
    query = torch.zeros(1, 2, 8, 16)
    grid, module = VideoGrid(1, 4, 4), SparseLinearAttention(16, SPARSE_SLA)
    with pytest.raises(
        TypeError, match=r"attention must be a SparseLinearAttention or .* or SparseLinearVideoAttention, got Linear"
    ):
        context_parallel_attention(torch.nn.Linear(2, 2), query, query, query, grid=grid)
    with pytest.raises(ValueError, match=r"must have one shape, .* got \(1, 2, 8, 16\), \(1, 2, 7, 16\) and"):
        context_parallel_attention(module, query, query[:, :, :7], query, grid=grid)


def test_gates_stand_in_for_hidden_states():
    grid, config = VideoGrid(1, 4, 4), VSAConfig(keep_ratio=0.5, tile=(1, 2, 2), fine_gate=True)
    torch.manual_seed(0)
    module = VideoSparseAttention(6, 2, 8, config)
    for parameter in module.parameters():
        parameter.data.normal_()
    query, key, value = torch.randn(3, 1, 2, 16, 8)
    hidden = torch.randn(1, 16, 6)
    expected, gates = module(query, key, value, hidden, grid=grid), module.gates(hidden)
    assert torch.equal(module(query, key, value, None, gates, grid=grid), expected)
    one_head = [x[:, 1:] for x in (query, key, value)]
    output = module(*one_head, None, tuple(gate[:, 1:] for gate in gates), grid=grid)
    torch.testing.assert_close(output, expected[:, 1:])
    with pytest.raises(ValueError, match="gates stand in for hidden_states"):
        module(query, key, value, hidden, gates, grid=grid)
    with pytest.raises(ValueError, match=r"hidden_states must have shape \[B, L, 6\], got NoneType"):
        module.gates(None)
