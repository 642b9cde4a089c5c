"""The gradient of a router's scores on the device, see `foveal.methods.routing`: what reading a block changes.

    gain_ij = sum over rows r of i: share_rj alpha_i (dO_r . mean V_j - rowsum(dO * O^s))      the exact branch
    loss_ij = <dH_i, h_j> + dZ_i . z_j                                                         the linear branch

share_rj is what a read block has of the row's softmax, by its mean key, and what another one would have. dH_i and h_j
are those of the linear branch's backward and forward, of V - m both: any m gives the same loss. The gradient of the
soft top-k then goes from gain - loss to the scores. It takes one kernel each. Products take queries and gradients as
they are, and float32 means as sums of two numbers in their dtype, which are split before.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from foveal.kernels.chips import Plan, chip_of, fitting
from foveal.kernels.host import launch
from foveal.kernels.triton.await_previous import await_previous
from foveal.kernels.triton.pooling import pool
from foveal.kernels.triton.tiles import load_rows, row_strides
from foveal.kernels.values import LOG2_E, Problem, size_stride

_LOG2_E = tl.constexpr(LOG2_E)
HALVINGS = 40  # of the interval that holds lambda, as in `soft_top_k`
# By head_dim. At 128 features more columns spill where tensor cores read registers.
GAIN_PLANS = {
    64: [Plan(40960, {"ROWS": 128, "COLUMNS": 32, "num_warps": 8, "num_stages": 1})],
    128: [Plan(40968, {"ROWS": 64, "COLUMNS": 32, "num_warps": 4, "num_stages": 1})],
}
WIDE_GAIN_PLANS = {128: [Plan(49160, {"ROWS": 64, "COLUMNS": 64, "num_warps": 4, "num_stages": 1})]}
# STEP is how much of a state's D * D numbers comes at a time.
LOSS_PLANS = [
    Plan(98304, {"ROWS": 128, "COLUMNS": 128, "STEP": 64, "num_warps": 8, "num_stages": 3}),
    Plan(49152, {"ROWS": 64, "COLUMNS": 64, "STEP": 64, "num_warps": 4, "num_stages": 3}),
]


@triton.jit
def _sigmoid(x):
    """1 / (1 + exp(-x)), also for infinite x."""
    small = tl.math.exp2(-tl.abs(x) * _LOG2_E)
    return tl.where(x >= 0, 1.0, small) / (1.0 + small)


@triton.jit
def _load_mean(mean_ptr, column, columns, D: tl.constexpr):
    """Means [COLUMNS, D] of one head, or what they lost by rounding; zero past `columns`."""
    places = column[:, None] * D + tl.arange(0, D)[None, :]
    return tl.load(mean_ptr + places, mask=(column < columns)[:, None], other=0.0)


@triton.jit(do_not_specialize=["heads", "length", "columns", "ranked", "size_stride", "key_length", "blocks", "scale"])
def _exact_gain_kernel(
    query_ptr,
    grad_ptr,
    key_ptr,
    value_ptr,
    unread_ptr,
    lse_ptr,
    dot_ptr,
    mix_ptr,
    size_ptr,
    gain_ptr,
    query_strides,
    grad_strides,
    unread_strides,
    heads,
    length,
    key_length,
    columns,
    ranked,
    blocks,
    size_stride,
    mix_stride,
    scale,
    D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    HAS_SIZES: tl.constexpr,
):
    """gain of the first `ranked` of `columns` key blocks: over ROWS rows, apart for each query block among them.

    Means come as two tensors [B * H, columns, D], one behind the other: rounded to the queries' dtype, and the rest.
    """
    await_previous()
    PARTS: tl.constexpr = (ROWS + BLOCK_Q - 1) // BLOCK_Q  # query blocks in the rows
    TILES: tl.constexpr = (BLOCK_Q + ROWS - 1) // ROWS  # programs of a query block
    tile, pair = tl.program_id(0), tl.program_id(1)
    batch, head = pair // heads, pair % heads
    pair = pair.to(tl.int64)
    start = tile * ROWS
    first_block = start // BLOCK_Q
    rest = tl.num_programs(1).to(tl.int64) * columns * D  # from what is rounded to what is left
    key_ptr += pair * columns * D
    value_ptr += pair * columns * D
    unread_ptr += pair * unread_strides[0]
    mix_ptr += pair * mix_stride
    gain_ptr += pair * blocks * TILES * ranked
    q = load_rows(query_ptr, query_strides, batch, head, start, length, ROWS, D, False)
    g = load_rows(grad_ptr, grad_strides, batch, head, start, length, ROWS, D, False)
    row = start + tl.arange(0, ROWS)
    block = row // BLOCK_Q
    inside = row < length
    lse = tl.load(lse_ptr + pair * length + row, mask=inside, other=0.0)
    dot = tl.load(dot_ptr + pair * length + row, mask=inside, other=0.0)
    for first in tl.range(0, ranked, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        size = tl.minimum(key_length - column * BLOCK_K, BLOCK_K)
        if HAS_SIZES:
            listed = size_ptr + batch.to(tl.int64) * size_stride + column
            size = tl.minimum(size, tl.load(listed, mask=column < ranked, other=0))
        scores = tl.dot(q, _load_mean(key_ptr + rest, column, columns, D).T)
        scores = tl.dot(q, _load_mean(key_ptr, column, columns, D).T, scores) * scale
        logs = scores + (tl.log(tl.maximum(size, 1).to(tl.float32))[None, :] - lse[:, None])
        if PARTS == 1:
            unread = tl.load(unread_ptr + first_block * unread_strides[1] + column, mask=column < ranked, other=1.0)
            unread = unread[None, :]
        else:
            places = block[:, None] * unread_strides[1] + column[None, :]
            unread = tl.load(unread_ptr + places, mask=inside[:, None] & (column < ranked)[None, :], other=1.0)
        read = unread.to(tl.float32) == 0.0
        share = tl.where(read, tl.math.exp2(tl.minimum(logs, 0.0) * _LOG2_E), _sigmoid(logs))
        of_values = tl.dot(g, _load_mean(value_ptr + rest, column, columns, D).T)
        of_values = tl.dot(g, _load_mean(value_ptr, column, columns, D).T, of_values)
        change = tl.where(inside[:, None], share * (of_values - dot[:, None]), 0.0)
        for part in tl.static_range(PARTS):
            mine = first_block + part
            gain = tl.sum(tl.where((block == mine)[:, None], change, 0.0), 0) if PARTS > 1 else tl.sum(change, 0)
            gain *= tl.load(mix_ptr + tl.minimum(mine, blocks - 1) * 2)
            places = gain_ptr + (tile * PARTS + part) * ranked + column
            tl.store(places, tl.where(size > 0, gain, 0.0), mask=column < tl.where(mine < blocks, ranked, 0))


@triton.jit(do_not_specialize=["rows", "columns", "blocks", "ranked", "first_pair"])
def _linear_loss_kernel(
    grad_state_ptr,
    grad_norm_ptr,
    state_ptr,
    norm_ptr,
    loss_ptr,
    rows,
    columns,
    blocks,
    ranked,
    first_pair,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
):
    """loss of `blocks` query blocks and `ranked` key blocks; the operands have more, `rows` and `columns`."""
    await_previous()
    across = tl.cdiv(ranked, COLUMNS)
    row = tl.program_id(0) // across * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) % across * COLUMNS + tl.arange(0, COLUMNS)
    pair = tl.program_id(1).to(tl.int64)
    all_pairs = first_pair + pair
    step = tl.arange(0, STEP)
    in_rows, in_columns = (row < rows)[:, None], (column < columns)[:, None]
    grad_state = grad_state_ptr + pair * rows * (D * D) + row[:, None] * (D * D) + step[None, :]
    state = state_ptr + pair * columns * (D * D) + column[:, None] * (D * D) + step[None, :]
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in tl.range(0, D * D, STEP):
        left = tl.load(grad_state + first, mask=in_rows, other=0.0)
        right = tl.load(state + first, mask=in_columns, other=0.0)
        acc = tl.dot(left, right.T, acc)
    of_norms = grad_norm_ptr + all_pairs * rows * D + row[:, None] * D
    norms = norm_ptr + pair * columns * D + column[:, None] * D
    for first in tl.range(0, D, 32, num_stages=1):
        part = (first + tl.arange(0, 32))[None, :]
        left = tl.load(of_norms + part, mask=in_rows, other=0.0)
        right = tl.load(norms + part, mask=in_columns, other=0.0)
        left_high, right_high = left.to(tl.bfloat16), right.to(tl.bfloat16)
        acc = tl.dot((left - left_high.to(tl.float32)).to(tl.bfloat16), right_high.T, acc)
        acc = tl.dot(left_high, (right - right_high.to(tl.float32)).to(tl.bfloat16).T, acc)
        acc = tl.dot(left_high, right_high.T, acc)
    places = loss_ptr + all_pairs * blocks * ranked + row[:, None] * ranked + column[None, :]
    tl.store(places, acc, mask=(row < blocks)[:, None] & (column < ranked)[None, :])


@triton.jit(do_not_specialize=["blocks", "ranked", "inverse_temperature"])
def _soft_top_k_gradient_kernel(
    score_ptr,
    unread_ptr,
    gain_ptr,
    loss_ptr,
    grad_ptr,
    unread_strides,
    blocks,
    ranked,
    inverse_temperature,
    TILES: tl.constexpr,
    WIDTH: tl.constexpr,
    HALVINGS: tl.constexpr,
    HAS_LOSS: tl.constexpr,
):
    """The gradient of one row's scores: that of sigmoid(score / temperature + lambda), whose sum stays."""
    await_previous()
    block, pair = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row = pair * blocks + block
    unread_ptr += pair * unread_strides[0] + block * unread_strides[1]
    column = tl.arange(0, WIDTH)
    inside = column < ranked
    scores = tl.load(score_ptr + row * ranked + column, mask=inside, other=-float("inf"))
    known = scores != -float("inf")
    read = tl.load(unread_ptr + column, mask=inside, other=1.0).to(tl.float32) == 0.0
    kept, choices = tl.sum((read & known).to(tl.float32)), tl.sum(known.to(tl.float32))
    scaled = scores * inverse_temperature
    high = tl.max(tl.where(known, tl.abs(scaled), 0.0)) + 40.0
    low = -high
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        less = tl.sum(_sigmoid(scaled + middle)) < kept
        low, high = tl.where(less, middle, low), tl.where(less, high, middle)
    soft = _sigmoid(scaled + (low + high) / 2)
    slope = soft * (1.0 - soft)
    change = tl.zeros([WIDTH], tl.float32)
    if HAS_LOSS:
        change -= tl.load(loss_ptr + row * ranked + column, mask=inside, other=0.0)
    for tile in tl.static_range(TILES):
        change += tl.load(gain_ptr + (row * TILES + tile) * ranked + column, mask=inside, other=0.0)
    mean = tl.sum(slope * change) / tl.maximum(tl.sum(slope), 1.1754943508222875e-38)
    grad = slope * (change - mean) * inverse_temperature
    # A row that keeps all or nothing has no choice.
    grad = tl.where((kept > 0) & (kept < choices), grad, 0.0)
    tl.store(grad_ptr + row * ranked + column, grad, mask=inside)


class GainFacts(NamedTuple):
    """What the gain of reading a block needs to know of each query, of its block and of itself.

    mix: float32 [B * H, Tq or more, 2], the weights of the branches; see `LinearTerm`.
    lse, exact_dot: float32 [B, H, Lq], contiguous: the exact branch's LSE and rowsum(dO * O^s).
    """

    mix: Tensor
    lse: Tensor
    exact_dot: Tensor


def linear_loss(grad_state: Tensor, grad_norm: Tensor, state: Tensor, norm: Tensor, pairs: range, loss: Tensor) -> None:
    """Writes what some pairs of batch and head lose of the linear branch by a block that is read.

    Args:
        grad_state: dH, bfloat16 [pairs, rows, D, D], contiguous.
        grad_norm: dZ of all pairs, float32 [B * H, rows, D], contiguous.
        state, norm: h and z of the key blocks, bfloat16 [pairs, columns, D, D] and float32 [pairs, columns, D].
        loss: float32 [B, H, Tq, C], contiguous; C key blocks are ranked.
    """
    (rows, head_dim), columns = grad_norm.shape[1:], norm.shape[1]
    blocks, ranked = loss.shape[2:]
    plan = fitting(loss.device, LOSS_PLANS)
    tiles = -(-blocks // plan["ROWS"]) * -(-ranked // plan["COLUMNS"])
    launch(
        _linear_loss_kernel,
        (tiles, len(pairs)),
        grad_state_ptr=grad_state,
        grad_norm_ptr=grad_norm,
        state_ptr=state,
        norm_ptr=norm,
        loss_ptr=loss,
        rows=rows,
        columns=columns,
        blocks=blocks,
        ranked=ranked,
        first_pair=pairs.start,
        D=head_dim,
        **plan,
    )


def exact_gain(problem: Problem, grad: Tensor, unread: Tensor, facts: GainFacts, ranked: int) -> Tensor:
    """What rows gain by a block that is read, float32 [B, H, parts, ranked], a query block's parts one after another.

    Args:
        grad: [B, H, Lq, D], the gradient of the output, contiguous last dimension.
        unread: bfloat16 [B, H, padded Tq, padded Tk], contiguous, 0 for what is read exactly.
        ranked: how many key blocks, the first ones, are ranked.
    """
    query, key, value, selection, scale, _ = problem
    batch, heads, length, head_dim = query.shape
    sizes, columns, blocks = selection.key_block_sizes, selection.num_key_blocks, selection.num_query_blocks
    wide = WIDE_GAIN_PLANS.get(head_dim) if chip_of(query.device).uses_tma else None
    plan = fitting(query.device, wide or GAIN_PLANS[head_dim])
    tiles = -(-blocks * selection.block_q // plan["ROWS"])
    parts = blocks * -(-selection.block_q // plan["ROWS"])
    key_mean, value_mean = (_split(pool(x, selection.block_k, sizes), query.dtype) for x in (key, value))
    gain = torch.empty((batch, heads, parts, ranked), dtype=torch.float32, device=query.device)
    launch(
        _exact_gain_kernel,
        (tiles, batch * heads),
        query_ptr=query,
        grad_ptr=grad,
        key_ptr=key_mean,
        value_ptr=value_mean,
        unread_ptr=unread,
        lse_ptr=facts.lse,
        dot_ptr=facts.exact_dot,
        mix_ptr=facts.mix,
        size_ptr=gain if sizes is None else sizes,
        gain_ptr=gain,
        query_strides=row_strides(query),
        grad_strides=row_strides(grad),
        unread_strides=unread.stride()[1:3],
        heads=heads,
        length=length,
        key_length=key.shape[2],
        columns=columns,
        ranked=ranked,
        blocks=blocks,
        size_stride=size_stride(sizes),
        mix_stride=facts.mix.stride(0),
        scale=scale,
        D=head_dim,
        BLOCK_Q=selection.block_q,
        BLOCK_K=selection.block_k,
        HAS_SIZES=sizes is not None,
        **plan,
    )
    return gain


def _split(mean: Tensor, dtype: torch.dtype) -> Tensor:
    """[2, ...]: float32 means rounded to another dtype, and what is left of them."""
    high = mean.to(dtype)
    return torch.stack((high, (mean - high).to(dtype)))


def scores_gradient(scores: Tensor, temperature: float, unread: Tensor, gain: Tensor, loss: Tensor | None) -> Tensor:
    """The gradient of the scores, float32 [B, H, Tq, C], from what `exact_gain` and `linear_loss` made.

    scores: float32 [B, H, Tq, C]; -inf for blocks that are not the router's choice.
    loss: None without a linear branch.
    """
    scores = scores.contiguous()
    grad, (batch, heads, blocks, ranked) = torch.empty_like(scores), scores.shape
    width = triton.next_power_of_2(ranked)
    launch(
        _soft_top_k_gradient_kernel,
        (blocks, batch * heads),
        score_ptr=scores,
        unread_ptr=unread,
        gain_ptr=gain,
        loss_ptr=gain if loss is None else loss,
        grad_ptr=grad,
        unread_strides=unread.stride()[1:3],
        blocks=blocks,
        ranked=ranked,
        inverse_temperature=1 / temperature,
        TILES=gain.shape[2] // blocks,
        WIDTH=width,
        HALVINGS=HALVINGS,
        HAS_LOSS=loss is not None,
        num_warps=min(16, max(1, width // 512)),
    )
    return grad
