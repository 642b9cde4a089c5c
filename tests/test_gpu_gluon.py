"""The Hopper kernels on a Hopper GPU, against the reference in float64."""

import functools
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from on_kernels import sla_attention_gpu

from foveal import sla_attention
from foveal.blocks import BlockSelection
from foveal.kernels.backend import BackwardCall, ColumnLists
from foveal.kernels.hopper.launch import Forward, backward
from foveal.kernels.hopper.support import why_not
from foveal.kernels.reference import block_sparse_attention_reference
from foveal.kernels.values import LinearTerm, Problem
from foveal.methods.sla import gpu_forward
from foveal.methods.sla.config import SLAConfig
from foveal.methods.sla.reference import sla_attention_reference

pytestmark = pytest.mark.gpu

BLOCKS = [(64, 64), (128, 64), (64, 128), (128, 128)]
LENGTHS = [(1, 1), (63, 65), (64, 128), (65, 64), (200, 321), (513, 130), (130, 1027)]


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch):
    """What a kernel forgets to write shows as NaN."""
    for name in ("empty", "empty_like"):
        make = getattr(torch, name)

        @functools.wraps(make)
        def poisoned(*args, make=make, **kwargs):
            made = make(*args, **kwargs)
            return made.fill_(math.nan) if made.is_floating_point() else made.fill_(2**30)

        monkeypatch.setattr(torch, name, poisoned)


def skip_unless_supported(query, key, value, block_q, block_k):
    reason = why_not(query, key, value, block_q, block_k)
    if reason is not None:
        pytest.skip(f"gluon: {reason}")


def columns_of(selection):
    """The lists of query blocks by key block: offsets, counts, rows."""
    mask = selection.critical_mask().transpose(-1, -2)
    counts = mask.sum(-1, dtype=torch.int32).flatten()
    rows = mask.nonzero()[:, -1].to(torch.int32)
    return ColumnLists(counts.cumsum(0) - counts, counts, torch.cat([rows, rows.new_zeros(1)]))


def random_case(
    dtype, head_dim, block_q, block_k, lengths, *, with_sizes=False, keep=0.4, batch=2, heads=2, spread=1.0, seed=0
):
    """(query, key, value, grad, selection): strided tensors, rows of different counts, some of them empty."""
    torch.manual_seed(seed)
    query_length, key_length = lengths
    query, grad = (
        torch.randn(batch, query_length, heads, head_dim, device="cuda").to(dtype).transpose(1, 2) for _ in range(2)
    )
    key, value = torch.randn(2, batch, key_length, heads, head_dim, device="cuda").to(dtype).transpose(2, 3)
    blocks = -(-query_length // block_q), -(-key_length // block_k)
    labels = (torch.rand(batch, heads, *blocks, device="cuda") < keep).to(torch.int8)
    labels[:, :, -1, -1] = 1
    sizes = None
    if with_sizes:
        full = torch.full((blocks[1],), block_k, device="cuda")
        full[-1] = key_length - (blocks[1] - 1) * block_k
        sizes = (torch.rand(batch, blocks[1], device="cuda") * (full + 1)).floor().to(torch.int32)
        sizes[:, ::2] = full[::2].to(torch.int32)
    selection = BlockSelection.from_labels(
        labels, block_q=block_q, block_k=block_k, query_length=query_length, key_length=key_length,
        key_block_sizes=sizes,
    )  # fmt: skip
    skip_unless_supported(query, key, value, block_q, block_k)
    return query * spread, key, value, grad, selection


def run(query, key, value, grad, selection):
    """(output, lse, dq, dk, dv) of the kernels."""
    scale = query.shape[-1] ** -0.5
    problem = Problem(query, key, value, selection, scale)
    output, lse = Forward(problem).run_all()
    delta = (grad.float() * output.float()).sum(-1)
    grads = backward(BackwardCall(problem, grad, delta, lse, columns_of(selection)))
    return output, lse, *grads


def expected(query, key, value, grad, selection, dtype):
    """(output, lse, dq, dk, dv) of the reference in `dtype`."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in (query, key, value)]
    output, lse = block_sparse_attention_reference(*leaves, selection, query.shape[-1] ** -0.5)
    return output.detach(), lse.detach(), *torch.autograd.grad(output, leaves, grad.to(dtype))


def assert_close(case):
    """Every result within twice the error of plain PyTorch in the same dtype, both against float64."""
    dtype = case[0].dtype
    query, key, value, grad, selection = case
    padding = ~selection.key_valid()[:, None, :, None]
    clean = query, key.masked_fill(padding, 0), value.masked_fill(padding, 0), grad, selection
    got = run(query, key.masked_fill(padding, math.nan), value.masked_fill(padding, math.nan), grad, selection)
    plain, exact = expected(*clean, dtype), expected(*clean, torch.float64)
    empty = exact[1] == -math.inf
    assert torch.equal(got[1] == -math.inf, empty)
    assert torch.all(got[0][empty] == 0)
    assert torch.allclose(got[1][~empty].double(), exact[1][~empty], atol=2e-3, rtol=1e-3)
    for name, ours, theirs, truth in zip(("output", "lse", "dq", "dk", "dv"), got, plain, exact, strict=True):
        if name == "lse":
            continue
        assert ours.shape == truth.shape
        assert torch.isfinite(ours).all(), name
        norm = truth.norm().clamp(min=1e-2 * math.sqrt(truth.numel()))
        error, allowed = (ours.double() - truth).norm() / norm, (theirs.double() - truth).norm() / norm
        assert error <= 2 * allowed + 1e-4, f"{name}: {error:.2e}, plain PyTorch {allowed:.2e}"


@pytest.mark.parametrize("with_sizes", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(("block_q", "block_k"), BLOCKS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_matches_the_reference(dtype, head_dim, block_q, block_k, with_sizes):
    for seed, lengths in enumerate(LENGTHS):
        assert_close(random_case(dtype, head_dim, block_q, block_k, lengths, with_sizes=with_sizes, seed=seed))


@pytest.mark.parametrize(("block_q", "block_k"), BLOCKS)
def test_large_logits_and_every_block_kept(block_q, block_k):
    assert_close(random_case(torch.bfloat16, 128, block_q, block_k, (300, 450), spread=30.0))
    assert_close(random_case(torch.bfloat16, 128, block_q, block_k, (300, 450), keep=1.0))
    assert_close(random_case(torch.bfloat16, 128, block_q, block_k, (2000, 1500), keep=0.1, batch=1))


def random_linear_term(query, selection, feature_map, shared, centered):
    torch.manual_seed(1)
    batch, heads, _, head_dim = query.shape
    rows = 1 if shared else selection.num_query_blocks + 3
    state = torch.randn(batch * heads, rows, head_dim, head_dim, device="cuda").to(torch.bfloat16)
    norm = torch.rand(batch * heads, rows, head_dim, device="cuda") * 10
    if shared:
        state, norm = (x.expand(-1, selection.num_query_blocks, *x.shape[2:]) for x in (state, norm))
    weight = (torch.randn(head_dim, head_dim, device="cuda") * head_dim**-0.5).to(torch.bfloat16)
    means = None
    if centered:
        mean = torch.randn(batch * heads, 1, head_dim, device="cuda")
        means = torch.stack((mean, mean @ weight.float().t()))
    return LinearTerm(feature_map, weight, torch.randn(head_dim, device="cuda"), state, norm, means)


def expected_linear_branch(query, selection, term, dtype):
    """The linear branch in float64, or as plain PyTorch has it in bfloat16."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    narrow = torch.float64 if dtype == torch.float64 else torch.bfloat16
    x = query.to(wide)
    phi = {"softmax": lambda: x.softmax(-1), "elu": lambda: F.elu(x) + 1, "relu": lambda: F.relu(x)}[term.feature_map]()
    block = torch.arange(query.shape[2], device=query.device) // selection.block_q
    norm = (phi * term.norm.unflatten(0, query.shape[:2])[:, :, block].to(wide)).sum(-1, keepdim=True) + 1e-5
    state = term.state.unflatten(0, query.shape[:2]).to(narrow)
    linear = torch.stack(
        [((phi / norm).to(narrow)[:, :, i, None] @ state[:, :, b]).squeeze(2) for i, b in enumerate(block.tolist())], 2
    )
    if term.means is not None:
        mean = term.means[0].unflatten(0, query.shape[:2])
        linear = (linear.to(wide) + mean.to(wide) * (1 - 1e-5 / norm)).to(narrow)
    return (linear @ term.weight.to(narrow).T).to(wide) + term.bias.to(wide)


@pytest.mark.parametrize("with_sizes", [False, True])
@pytest.mark.parametrize(("feature_map", "head_dim"), [("softmax", 128), ("elu", 128), ("relu", 128), ("softmax", 64)])
@pytest.mark.parametrize(("block_q", "block_k"), BLOCKS)
def test_linear_branch(block_q, block_k, feature_map, head_dim, with_sizes):
    both = False, True
    cases = itertools.product((torch.bfloat16, torch.float16), both, both, ((200, 321), (513, 130)))
    for dtype, shared, centered, lengths in cases:
        query, key, value, _, selection = random_case(dtype, head_dim, block_q, block_k, lengths, with_sizes=with_sizes)
        term = random_linear_term(query, selection, feature_map, shared, centered)
        scale = head_dim**-0.5
        got, lse = Forward(Problem(query, key, value, selection, scale), term).run_all()
        sparse_alone, lse_alone = Forward(Problem(query, key, value, selection, scale)).run_all()
        assert torch.equal(lse, lse_alone)
        sparse = block_sparse_attention_reference(*(x.double() for x in (query, key, value)), selection, scale)[0]
        exact = sparse + expected_linear_branch(query, selection, term, torch.float64)
        plain = (sparse_alone.float() + expected_linear_branch(query, selection, term, dtype)).to(dtype)
        error, allowed = ((x.double() - exact).norm() / exact.norm() for x in (got, plain))
        assert error <= 2 * allowed, f"{error:.2e}, plain PyTorch {allowed:.2e}"


def with_marginal_blocks(selection, query, key):
    """The selection with some blocks marginal and some negligible, rows and columns without a critical block."""
    labels = selection.labels()
    labels[:, :, ::2, -1] = 0
    negligible = (torch.rand(labels.shape, device=labels.device) < 0.2) & (labels == 0)
    return BlockSelection.from_labels(
        labels.masked_fill(negligible, -1), block_q=selection.block_q, block_k=selection.block_k,
        query_length=query.shape[2], key_length=key.shape[2], key_block_sizes=selection.key_block_sizes,
    )  # fmt: skip


def gradients(run, tensors, grad):
    leaves = [x.detach().requires_grad_() for x in tensors]
    return torch.autograd.grad(run(*leaves), leaves, grad)


@pytest.mark.parametrize(
    ("feature_map", "scope", "head_dim", "projection", "dtype"),
    [
        ("softmax", "marginal", 128, True, torch.bfloat16),
        ("elu", "marginal", 128, False, torch.float16),
        ("relu", "noncritical", 64, True, torch.float16),
        ("softmax", "all", 128, True, torch.bfloat16),
        ("elu", "all", 64, False, torch.bfloat16),
        ("softmax", "all", 128, True, torch.float16),
    ],
)
@pytest.mark.parametrize(("block_q", "block_k"), BLOCKS)
def test_gradients_of_both_branches(block_q, block_k, feature_map, scope, head_dim, projection, dtype):
    blocks = {"block_q": block_q, "block_k": block_k}
    config = SLAConfig(**blocks, feature_map=feature_map, linear_scope=scope, projection=projection)
    scale, weights = head_dim**-0.5, ()
    if projection:
        torch.manual_seed(2)
        weights = (torch.randn(head_dim, head_dim, device="cuda") * scale, torch.randn(head_dim, device="cuda"))
    for lengths, with_sizes in (((513, 130), False), ((200, 321), True), ((700, 400), False)):
        case = random_case(dtype, head_dim, block_q, block_k, lengths, with_sizes=with_sizes)
        query, key, value, grad, selection = case
        selection = with_marginal_blocks(selection, query, key)
        padding = ~selection.key_valid()[:, None, :, None]

        def hopper(query, key, value, weight=None, bias=None, selection=selection):
            return sla_attention_gpu(query, key, value, config, selection, scale, weight, bias, "gluon")

        def reference(query, key, value, weight=None, bias=None, selection=selection):
            weights = {"proj_weight_DD": weight, "proj_bias_D": bias}
            return sla_attention_reference(
                query, key, value, config=config, selection=selection, scale=scale, **weights
            )

        poisoned = query, key.masked_fill(padding, math.nan), value.masked_fill(padding, math.nan), *weights
        clean = query, key.masked_fill(padding, 0), value.masked_fill(padding, 0), *weights
        ours = gradients(hopper, poisoned, grad)
        exact = gradients(reference, [x.double() for x in clean], grad.double())
        for name, x, y in zip(("dq", "dk", "dv", "dw", "db"), ours, exact, strict=False):
            norm = y.norm().clamp(min=1e-2 * math.sqrt(y.numel()))
            error = (x.double() - y).norm() / norm
            # States and products of the linear branch are bfloat16 whatever the dtype.
            assert error <= 6e-3, f"{name}, {lengths}: {error:.2e}"
        for x, y in zip(ours, gradients(hopper, poisoned, grad), strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize("train", [False, True])
def test_a_group_prepared_beside_another(train, monkeypatch):
    """Groups of heads that are prepared while others attend give the bits of groups one after another."""
    torch.manual_seed(0)
    tensors = [torch.randn(1, 3000, 8, 128, device="cuda").bfloat16().transpose(1, 2) for _ in range(3)]
    tensors = [x.requires_grad_(train) for x in tensors]
    skip_unless_supported(*tensors, 64, 64)
    weight = torch.randn(128, 128, device="cuda") / 128**0.5
    run = functools.partial(sla_attention, *tensors, config=SLAConfig(keep_ratio=0.1), proj_weight=weight)
    monkeypatch.setattr(gpu_forward, "GROUP_BYTES", 0)
    with monkeypatch.context() as patch:
        patch.setattr(gpu_forward, "side_stream", lambda device: None)
        expected = run()
    for _ in range(100):
        assert torch.equal(run(), expected)
    if not train:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run()
        captured.zero_()
        graph.replay()
        assert torch.equal(captured, expected)


@pytest.mark.parametrize(("block_q", "block_k"), BLOCKS)
def test_same_bits_each_time(block_q, block_k):
    case = random_case(torch.bfloat16, 128, block_q, block_k, (1500, 2100), keep=0.3, batch=1, heads=3)
    first = run(*case)
    for _ in range(20):
        for one, other in zip(first, run(*case), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("block_q", [64, 128])
def test_lengths_and_counts_do_not_recompile(block_q):
    from foveal.kernels.hopper import dkdv_kernel, dq_kernel, forward_kernel, forward_wide_kernel

    kernels = (
        forward_kernel.block_sparse_fwd_kernel,
        forward_wide_kernel.block_sparse_fwd_wide_kernel,
        dq_kernel.block_sparse_dq_kernel,
        dkdv_kernel.block_sparse_dkdv_kernel,
        dkdv_kernel.row_statistics_kernel,
    )

    def compiled():
        return [sum(len(cache[0]) for cache in kernel.device_caches.values()) for kernel in kernels]

    lengths = [(64, 64), (1, 16), (100, 1000), (1024, 1024), (513, 640), (640, 77)]
    run(*random_case(torch.bfloat16, 128, block_q, 64, lengths[0]))
    before = compiled()
    for (query_length, key_length), batch in itertools.product(lengths, (1, 3)):
        run(*random_case(torch.bfloat16, 128, block_q, 64, (query_length, key_length), batch=batch))
    assert compiled() == before


def test_no_wait_for_the_device():
    case = random_case(torch.bfloat16, 128, 64, 64, (200, 300))
    run(*case)
    query, key, value, grad, selection = case
    columns = columns_of(selection)
    delta = torch.zeros(query.shape[:3], device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        output, lse = Forward(Problem(query, key, value, selection, 0.1)).run_all()
        backward(BackwardCall(Problem(query, key, value, selection, 0.1), grad, delta, lse, columns))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert output.stride() == query.stride()
