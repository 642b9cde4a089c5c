"""Calls of the launch code that between them compile every kernel: what tests note launches of. Nothing is computed."""

import itertools
from collections.abc import Callable, Iterator
from functools import partial

import torch
from on_kernels import (
    block_sparse_attention_gpu,
    selection_rule,
    sla2_attention_gpu,
    sla_attention_gpu,
    vsa_attention_gpu,
)

from foveal import SLAConfig, VideoGrid, VSAConfig
from foveal.kernels.tail import pooled_tail
from foveal.kernels.triton import pooling, select
from foveal.kernels.triton.linear import Keys, key_state_sums
from foveal.kernels.triton.rows import permuted_rows
from foveal.methods.sla2.gpu_exact import ExactCall, ExactOptions, sla2_exact_gpu
from foveal.methods.vsa.gpu import select_cubes_gpu
from foveal.methods.vsa.layout import CubeLayout
from foveal.rules import SelectionRule
from foveal.testing import make_inputs, random_selection

INT8 = "triton_int8"  # the backend of `precision="int8"`
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SIZES = {"batch": 1, "heads": 2, "query_length": 400, "key_length": 400}
CUBES = {
    "full slots": ((4, 8, 8), (4, 4, 4), 0),
    "whole cubes in slots": ((3, 10, 8), (3, 5, 4), 0),
    "partial cubes": ((4, 5, 9), (4, 4, 4), 0),
    "text": ((4, 8, 8), (4, 4, 4), 70),
    "wide slots": ((4, 8, 8), (4, 4, 8), 0),
    "partial wide cubes": ((4, 5, 9), (4, 4, 8), 0),
    "whole wide cubes in slots": ((3, 10, 8), (3, 10, 4), 0),
}  # grid, tile and tokens of text


def _lengths(padded: bool):
    return torch.tensor([300]) if padded else None


def _inputs(head_dim, dtype, **sizes):
    inputs = make_inputs(head_dim=head_dim, dtype=dtype, layout="BLHD", **(sizes or SIZES))
    return [x.requires_grad_() for x in inputs]


def sparse(head_dim, block_q, block_k, dtype, padded, with_lse=True, backend="triton"):
    """Block-sparse attention and its backward, with a gradient of the LSE or without."""
    selection = random_selection(**SIZES, block_q=block_q, block_k=block_k, kv_lengths=_lengths(padded))
    inputs = _inputs(head_dim, dtype)
    output, lse = block_sparse_attention_gpu(*inputs, selection, 0.125, backend=backend)
    torch.autograd.grad(output.sum() + (lse.sum() if with_lse else 0), inputs)


def sla(
    head_dim,
    block_q,
    block_k,
    dtype,
    padded,
    feature_map,
    scope,
    projected=True,
    rule=True,
    train=True,
    backend="triton",
    score="mean",
):
    """SLA, by a rule or with a selection that is given, and its backward when it is trained."""
    inputs, blocks = _inputs(head_dim, dtype), {"block_q": block_q, "block_k": block_k}
    ratios = {"keep_ratio": 0.1, "drop_ratio": 0.1}
    config = SLAConfig(feature_map=feature_map, linear_scope=scope, projection=projected, **ratios, **blocks)
    if rule:
        selection = selection_rule(*inputs[:2], **ratios, **blocks, kv_lengths=_lengths(padded), score=score)
    else:
        selection = random_selection(**SIZES, **blocks, kv_lengths=_lengths(padded))
    weights = (torch.zeros(head_dim, head_dim), torch.zeros(head_dim)) if projected else (None, None)
    with torch.set_grad_enabled(train):
        output = sla_attention_gpu(*inputs, config, selection, 0.125, *weights, backend=backend)
    if train:
        torch.autograd.grad(output.sum(), inputs)


def sla2(head_dim, block_q, block_k, dtype, padded, feature_map="softmax", train=True, backend="triton"):
    """SLA2 by a rule, and its backward when it is trained."""
    inputs, blocks = _inputs(head_dim, dtype), {"block_q": block_q, "block_k": block_k}
    rule = selection_rule(*inputs[:2], keep_ratio=0.1, **blocks, kv_lengths=_lengths(padded))
    with torch.set_grad_enabled(train):
        output = sla2_attention_gpu(*inputs, rule, 0.125, feature_map, backend)
    if train:
        torch.autograd.grad(output.sum(), inputs)


def router(head_dim, block_q, block_k, dtype, padded):
    """SLA2 where there is no linear branch, and its backward while its router learns."""
    inputs = _inputs(head_dim, dtype)
    weights = [torch.zeros(2, head_dim, head_dim, requires_grad=True) for _ in range(2)]
    selection = random_selection(**SIZES, block_q=block_q, block_k=block_k, kv_lengths=_lengths(padded))
    call = ExactCall(*inputs, *weights, None, None, None, selection)
    (output,) = sla2_exact_gpu(call, ExactOptions(0.125, 0.1, "triton"))
    torch.autograd.grad(output.sum(), [*inputs, *weights])


def rows(head_dim, dtype):
    """Tokens in another order."""
    permuted_rows(_inputs(head_dim, dtype)[0], torch.zeros(100, dtype=torch.int64))


def tail(head_dim, block_q, dtype):
    """The pooled tail and its backward."""
    query, key, value = _inputs(head_dim, dtype)
    means = [x[:, :, :40].float().contiguous() for x in (key, value)]
    bias = torch.zeros(1, 2, -(-query.shape[2] // block_q), 40)
    output, lse = pooled_tail(query, *means, bias, block_q, 0.125, "triton")
    torch.autograd.grad(output.sum() + lse.sum(), [query, key, value])


def state_sums(head_dim, dtype):
    """The states over all keys, which scope "all" starts from."""
    key, value = _inputs(head_dim, dtype)[1:]
    key_state_sums(Keys(key, value, None, 64, "softmax"))


def vsa(head_dim, dtype, cubes, gated_coarse, gated_fine, train=True, backend="triton", score="mean"):
    """VSA, and its backward when it is trained; without it, the choice of cubes by itself too."""
    grid, tile, text = CUBES[cubes]
    grid, config = VideoGrid(*grid), VSAConfig(topk=2, tile=tile, score=score)
    sizes = {"batch": 1, "heads": 2, "query_length": grid.num_tokens}
    inputs = _inputs(head_dim, dtype, **sizes, key_length=grid.num_tokens + text)
    gates = [
        x if on else None for x, on in zip(_inputs(head_dim, dtype, **sizes), (gated_coarse, gated_fine), strict=False)
    ]
    layout = CubeLayout(config, grid, inputs[1], None)
    with torch.set_grad_enabled(train):
        output = vsa_attention_gpu(*inputs, layout, None, 0.125, *gates, backend=backend)
    if train:
        torch.autograd.grad(output.sum(), [*inputs, *(x for x in gates if x is not None)])
    else:
        select_cubes_gpu(*inputs[:2], layout, 0.125)


def select_blocks(head_dim, dtype, padded, score="mean"):
    """Lists and mask from queries and keys."""
    query, key = _inputs(head_dim, dtype)[:2]
    rule = selection_rule(
        query, key, block_q=64, block_k=64, keep_ratio=0.2, drop_ratio=0.2, kv_lengths=_lengths(padded), score=score
    )
    select.select_blocks_gpu(query, key, rule, 0.125, with_marginal=True)


def pool(head_dim, dtype, padded):
    sizes = torch.ones(1, 4, dtype=torch.int32) if padded else None
    pooling.pool(torch.zeros(1, 2, 256, head_dim, dtype=dtype), 64, sizes)


def pick(columns, with_marginal, per_sample, mass=0, per_head=False, fixed=False, protected=False):
    """Lists and mask of rows with so many key blocks, by sample, by head, with what is fixed or protected."""
    valid = torch.ones(1, dtype=torch.int32) if per_sample else None
    table = torch.ones(2 if per_head else 1, columns + 1 if per_sample else 1, 3, dtype=torch.int32)
    table = table if per_sample or per_head else None
    ranges = torch.zeros(64, 2, 2, dtype=torch.int32) if fixed else None
    counts = {"width": 9, "critical": 9, "negligible": 9, "mass": mass, "most": 9}
    rows = {"key_range": (2, 5), "query_range": (1, 2)} if protected else {}
    rule = SelectionRule(1, 1, valid_blocks=valid, table=table, ranges=ranges, **counts, **rows)
    query, key = torch.zeros(1, 2, 64, 64), torch.zeros(1, 2, columns, 64)
    select.select(query, key, 0.125, rule, with_marginal)


# Each constant of each kernel takes each of its values, each dtype occurs.
FEW = [
    partial(sla, 128, 64, 64, BF16, False, "softmax", "marginal"),
    partial(sla, 64, 64, 128, FP16, True, "elu", "all", projected=False),
    partial(sla, 64, 128, 64, BF16, False, "relu", "all", rule=False),
    partial(sla, 64, 64, 64, FP16, False, "softmax", "noncritical", rule=False),
    partial(sla, 128, 64, 64, BF16, False, "softmax", "marginal", train=False),
    partial(sla, 64, 128, 128, FP16, True, "elu", "noncritical", projected=False, train=False),
    partial(sla, 128, 64, 64, BF16, False, "softmax", "marginal", train=False, score="log_sum_exp"),
    partial(sla2, 128, 64, 64, BF16, False),
    partial(sla2, 64, 128, 64, FP16, True, train=False),
    partial(router, 128, 64, 64, BF16, False),
    partial(sparse, 128, 128, 128, BF16, True),
    partial(sparse, 64, 64, 64, FP16, False, with_lse=False),
    partial(sparse, 128, 64, 64, BF16, True, backend=INT8),
    partial(sparse, 64, 128, 128, FP16, False, with_lse=False, backend=INT8),
    partial(sla, 128, 64, 64, BF16, False, "softmax", "marginal", backend=INT8),
    partial(sla, 128, 128, 64, BF16, True, "softmax", "all", train=False, backend=INT8),
    partial(state_sums, 128, BF16),
    partial(rows, 128, BF16),
    partial(rows, 64, FP16),
    partial(tail, 128, 64, BF16),
    partial(tail, 64, 128, FP16),
    partial(select_blocks, 128, BF16, True),
    partial(select_blocks, 128, BF16, True, "log_sum_exp"),
    partial(select_blocks, 64, FP32, False, "log_sum_exp"),
    partial(select_blocks, 128, BF16, True, "mean_spread"),
    partial(select_blocks, 64, FP16, False, "mean_spread"),
    partial(vsa, 128, BF16, "text", True, True),
    partial(vsa, 64, FP16, "wide slots", False, False),
    partial(vsa, 64, FP16, "wide slots", True, False, train=False),
    partial(vsa, 128, BF16, "text", True, False, train=False, score="log_sum_exp"),
    partial(vsa, 64, FP16, "wide slots", True, False, train=False, score="mean_spread"),
    *(partial(pool, *case) for case in ((128, BF16, False), (64, FP16, True), (64, FP32, False))),
    *(partial(pick, *case) for case in ((500, True, False), (1000, False, True), (2000, True, True))),
    *(partial(pick, columns, True, True) for columns in (4000, 8000, 16000)),
    *(partial(pick, columns, True, True, 1) for columns in (1000, 16000)),
    partial(pick, 1000, True, False, per_head=True),
    *(partial(pick, columns, True, False, fixed=True) for columns in (1000, 16000)),
    *(partial(pick, columns, True, True, protected=True) for columns in (1000, 16000)),
]


def all_calls() -> Iterator[Callable]:
    """Every case that users can ask for."""
    dims, blocks, dtypes, both = (64, 128), (64, 128), (BF16, FP16), (False, True)
    for case in itertools.product(dims, blocks, blocks, dtypes, both):
        yield from (partial(sparse, *case, with_lse) for with_lse in both)
        yield partial(sparse, *case, backend=INT8)
        yield from (partial(sla, *case, "softmax", scope, backend=INT8) for scope in ("marginal", "all"))
        scopes = itertools.product(("softmax", "elu", "relu"), ("marginal", "noncritical", "all"), both, both, both)
        yield from (partial(sla, *case, *scope) for scope in scopes)
        yield from (partial(sla, *case, "softmax", scope, score="log_sum_exp") for scope in ("marginal", "all"))
        yield partial(router, *case)
        yield from (partial(sla2, *case, *rest) for rest in itertools.product(("softmax", "elu", "relu"), both))
    yield from (partial(vsa, *case) for case in itertools.product(dims, dtypes, CUBES, both, both, both))
    yield from (partial(pool, *case) for case in itertools.product(dims, (*dtypes, FP32), both))
    yield from (partial(rows, *case) for case in itertools.product(dims, dtypes))
    yield from (partial(tail, *case) for case in itertools.product(dims, blocks, dtypes))
    columns = (100, 500, 1000, 2000, 4000, 8000, 16000)
    yield from (partial(pick, *case) for case in itertools.product(columns, both, both, (0, 1), both, both, both))
    scores = ("log_sum_exp", "mean_spread")
    yield from (partial(select_blocks, *case) for case in itertools.product(dims, (*dtypes, FP32), both, scores))
    for case in itertools.product(dims, dtypes, CUBES):
        yield from (partial(vsa, *case, True, False, train=False, score=score) for score in scores)


def on_hopper(calls) -> list[Callable]:
    """Those of the calls that have Gluon kernels, through them."""
    calls = [call for call in calls if call.func in (sparse, sla, sla2, vsa) and "backend" not in call.keywords]
    return [partial(call, backend="gluon") for call in calls]
