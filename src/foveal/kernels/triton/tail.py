"""The pooled tail on GPUs, see `foveal.kernels.tail`: attention of all tokens over the means of their unread blocks.

Each program has rows of one query block, so one row of biases says what is unread and how much each mean counts.
Products take queries as they are, and float32 means as sums of two numbers in the queries' dtype.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from foveal.kernels.chips import Plan, fitting
from foveal.kernels.host import launch, on_device_of
from foveal.kernels.triton.await_previous import await_previous
from foveal.kernels.triton.pooled import load_pooled
from foveal.kernels.triton.tiles import LN_2, TILE, load_rows, row_strides, store_rows
from foveal.kernels.values import LOG2_E

COLUMNS = 32  # means at a time
OPTIONS = {"num_warps": 8, "num_stages": 1}
# How many rows at a time where the gradients of means are summed.
MEANS_PLANS = [Plan(81920, {"ROWS": TILE, **OPTIONS}), Plan(49152, {"ROWS": TILE // 2, **OPTIONS})]
_LOG2_E = tl.constexpr(LOG2_E)


@triton.jit
def load_split(x_ptr, column, columns, D: tl.constexpr, dtype: tl.constexpr):
    """Float32 means of one head as a sum of two tiles [COLUMNS, D] of another dtype; zero past `columns`."""
    x = load_pooled(x_ptr, column, columns, D)
    high = x.to(dtype)
    return high, (x - high.to(tl.float32)).to(dtype)


@triton.jit
def load_biases(bias_ptr, column, columns):
    """One row of biases in log2 units; -inf past `columns`."""
    return tl.load(bias_ptr + column, mask=column < columns, other=-float("inf")) * _LOG2_E


@triton.jit(do_not_specialize=["heads", "length", "columns", "scale_log2"])
def _tail_fwd_kernel(
    query,
    key_ptr,
    value_ptr,
    bias_ptr,
    output_ptr,
    lse_ptr,
    query_strides,
    output_strides,
    heads,
    length,
    columns,
    scale_log2,
    D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    await_previous()
    start, pair = tl.program_id(0) * ROWS, tl.program_id(1)
    batch, head = pair // heads, pair % heads
    pair = pair.to(tl.int64)
    key_ptr += pair * columns * D
    value_ptr += pair * columns * D
    bias_ptr += (pair * tl.cdiv(length, BLOCK_Q) + start // BLOCK_Q) * columns
    q = load_rows(query, query_strides, batch, head, start, length, ROWS, D, False)
    top = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, D], tl.float32)
    for first in range(0, columns, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        k_high, k_low = load_split(key_ptr, column, columns, D, q.dtype)
        scores = tl.dot(q, k_high.T, tl.dot(q, k_low.T)) * scale_log2
        scores += load_biases(bias_ptr, column, columns)[None, :]
        new_top = tl.maximum(top, tl.max(scores, 1))
        base = tl.where(new_top == -float("inf"), 0.0, new_top)
        weights = tl.math.exp2(scores - base[:, None])
        decay = tl.math.exp2(top - base)
        total = total * decay + tl.sum(weights, 1)
        v_high, v_low = load_split(value_ptr, column, columns, D, q.dtype)
        weights = weights.to(q.dtype)
        acc = tl.dot(weights, v_high, tl.dot(weights, v_low, acc * decay[:, None]))
        top = new_top
    some = total > 0.0
    acc /= tl.where(some, total, 1.0)[:, None]
    store_rows(output_ptr, output_strides, batch, head, start, length, acc, ROWS, D)
    row = start + tl.arange(0, ROWS)
    lse = tl.where(some, (top + tl.math.log2(tl.where(some, total, 1.0))) * LN_2, -float("inf"))
    tl.store(lse_ptr + pair * length + row, lse, mask=row < length)


@triton.jit(do_not_specialize=["heads", "length", "columns", "scale", "scale_log2"])
def _tail_dq_kernel(
    query,
    grad,
    key_ptr,
    value_ptr,
    bias_ptr,
    lse_ptr,
    delta_ptr,
    grad_query_ptr,
    query_strides,
    grad_strides,
    grad_query_strides,
    heads,
    length,
    columns,
    scale,
    scale_log2,
    D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    await_previous()
    start, pair = tl.program_id(0) * ROWS, tl.program_id(1)
    batch, head = pair // heads, pair % heads
    pair = pair.to(tl.int64)
    key_ptr += pair * columns * D
    value_ptr += pair * columns * D
    bias_ptr += (pair * tl.cdiv(length, BLOCK_Q) + start // BLOCK_Q) * columns
    q = load_rows(query, query_strides, batch, head, start, length, ROWS, D, False)
    g = load_rows(grad, grad_strides, batch, head, start, length, ROWS, D, False)
    row = start + tl.arange(0, ROWS)
    lse = tl.load(lse_ptr + pair * length + row, mask=row < length, other=0.0) * _LOG2_E
    # A row that reads everything has no tail: its biases are all -inf, and so would be the difference.
    lse = tl.where(lse == -float("inf"), float("inf"), lse)
    delta = tl.load(delta_ptr + pair * length + row, mask=row < length, other=0.0)
    acc = tl.zeros([ROWS, D], tl.float32)
    for first in range(0, columns, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        k_high, k_low = load_split(key_ptr, column, columns, D, q.dtype)
        scores = tl.dot(q, k_high.T, tl.dot(q, k_low.T)) * scale_log2
        p = tl.math.exp2(scores + load_biases(bias_ptr, column, columns)[None, :] - lse[:, None])
        v_high, v_low = load_split(value_ptr, column, columns, D, q.dtype)
        ds = (p * (tl.dot(g, v_high.T, tl.dot(g, v_low.T)) - delta[:, None])).to(q.dtype)
        acc = tl.dot(ds, k_high, tl.dot(ds, k_low, acc))
    store_rows(grad_query_ptr, grad_query_strides, batch, head, start, length, acc * scale, ROWS, D)


@triton.jit(do_not_specialize=["heads", "length", "columns", "scale", "scale_log2"])
def _tail_means_kernel(
    query,
    grad,
    key_ptr,
    value_ptr,
    bias_ptr,
    lse_ptr,
    delta_ptr,
    grad_key_ptr,
    grad_value_ptr,
    query_strides,
    grad_strides,
    heads,
    length,
    columns,
    scale,
    scale_log2,
    D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The gradients of the means, float32: each program has COLUMNS of them and goes through all rows."""
    await_previous()
    column, pair = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS), tl.program_id(1)
    batch, head = pair // heads, pair % heads
    pair = pair.to(tl.int64)
    k_high, k_low = load_split(key_ptr + pair * columns * D, column, columns, D, query.dtype.element_ty)
    v_high, v_low = load_split(value_ptr + pair * columns * D, column, columns, D, query.dtype.element_ty)
    bias_ptr += pair * tl.cdiv(length, BLOCK_Q) * columns
    acc_k = tl.zeros([COLUMNS, D], tl.float32)
    acc_v = tl.zeros([COLUMNS, D], tl.float32)
    for start in range(0, length, ROWS):
        row = start + tl.arange(0, ROWS)
        q = load_rows(query, query_strides, batch, head, start, length, ROWS, D, False)
        g = load_rows(grad, grad_strides, batch, head, start, length, ROWS, D, False)
        lse = tl.load(lse_ptr + pair * length + row, mask=row < length, other=float("inf")) * _LOG2_E
        lse = tl.where(lse == -float("inf"), float("inf"), lse)
        delta = tl.load(delta_ptr + pair * length + row, mask=row < length, other=0.0)
        bias = load_biases(bias_ptr + start // BLOCK_Q * columns, column, columns)
        scores = tl.dot(k_high, q.T, tl.dot(k_low, q.T)) * scale_log2
        p = tl.math.exp2(scores + bias[:, None] - lse[None, :])
        acc_v = tl.dot(p.to(q.dtype), g, acc_v)
        ds = p * (tl.dot(v_high, g.T, tl.dot(v_low, g.T)) - delta[None, :])
        acc_k = tl.dot(ds.to(q.dtype), q, acc_k)
    offsets = pair * columns * D + column[:, None] * D + tl.arange(0, D)[None, :]
    inside = (column < columns)[:, None]
    tl.store(grad_key_ptr + offsets, acc_k * scale, mask=inside)
    tl.store(grad_value_ptr + offsets, acc_v, mask=inside)


def tail_forward(
    query: Tensor, mean_key: Tensor, mean_value: Tensor, bias: Tensor, block_q: int, scale: float
) -> tuple[Tensor, Tensor]:
    """O^t, strided like `query`, and LSE^t, float32 [B, H, Lq].

    Args:
        query: bfloat16 or float16 [B, H, Lq, D], D 64 or 128, contiguous last dimension.
        mean_key, mean_value, bias: float32, contiguous, as in `pooled_tail`.
        block_q: 64 or 128.
    """
    output = torch.empty_like(query)
    lse = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
    with on_device_of(query):  # Triton launches on the current device
        launch(
            _tail_fwd_kernel,
            _grid(query),
            output_ptr=output,
            lse_ptr=lse,
            output_strides=row_strides(output),
            scale_log2=scale * LOG2_E,
            ROWS=TILE,
            **_shared(query, mean_key, mean_value, bias, block_q),
            **OPTIONS,
        )
    return output, lse


def tail_backward(
    inputs: tuple[Tensor, Tensor, Tensor, Tensor],
    grad: Tensor,
    delta: Tensor,
    lse: Tensor,
    block_q: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dQ, strided like `query`, and the gradients of the means, float32.

    Args:
        inputs: query, mean_key, mean_value, and bias, as in `tail_forward`.
        grad: [B, H, Lq, D], contiguous last dimension.
        delta, lse: float32 [B, H, Lq], contiguous.
    """
    query, mean_key, mean_value, _ = inputs
    grads = torch.empty_like(query), torch.empty_like(mean_key), torch.empty_like(mean_value)
    both = {
        "grad": grad,
        "lse_ptr": lse,
        "delta_ptr": delta,
        "grad_strides": row_strides(grad),
        "scale": scale,
        "scale_log2": scale * LOG2_E,
        **_shared(*inputs, block_q),
    }
    with on_device_of(query):  # Triton launches on the current device
        strides = {"grad_query_strides": row_strides(grads[0])}
        launch(_tail_dq_kernel, _grid(query), grad_query_ptr=grads[0], ROWS=TILE, **strides, **both, **OPTIONS)
        columns = (-(-mean_key.shape[2] // COLUMNS), query.shape[0] * query.shape[1])
        plan = fitting(query.device, MEANS_PLANS)
        launch(_tail_means_kernel, columns, grad_key_ptr=grads[1], grad_value_ptr=grads[2], **both, **plan)
    return grads


def _grid(query: Tensor) -> tuple[int, int]:
    return -(-query.shape[2] // TILE), query.shape[0] * query.shape[1]


def _shared(query: Tensor, mean_key: Tensor, mean_value: Tensor, bias: Tensor, block_q: int) -> dict:
    """The arguments that all kernels take."""
    return {
        "query": query,
        "key_ptr": mean_key,
        "value_ptr": mean_value,
        "bias_ptr": bias,
        "query_strides": row_strides(query),
        "heads": query.shape[1],
        "length": query.shape[2],
        "columns": mean_key.shape[2],
        "D": query.shape[3],
        "BLOCK_Q": block_q,
        "COLUMNS": COLUMNS,
    }
