"""Dense attention over pooled tokens, VSA's coarse stage: float32 in and out, forward and backward.

Pooled sequences are short (hundreds to thousands), so this is a small part of the work. Operands are split into two
bfloat16 numbers each, which keeps 16 bits: more than the output's, at the speed of three bfloat16 products.
Source: FlashAttention-2's recurrences for VSA (arXiv 2505.13389, section 2).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from foveal.kernels import chips
from foveal.kernels.chips import Plan, fitting
from foveal.kernels.host import launch
from foveal.kernels.triton.await_previous import await_previous
from foveal.kernels.values import LOG2_E

# ROWS: queries of a program; keys in the kernel for dK and dV. COLUMNS: how many of the others come at a time.
SMALL = Plan(73728, {"ROWS": 32, "COLUMNS": 32, "num_warps": 8, "num_stages": 1})
FORWARD = {"ROWS": 64, "COLUMNS": 64, "num_warps": 8, "num_stages": 2}
BACKWARD = {"ROWS": 64, "COLUMNS": 32, "num_warps": 8, "num_stages": 2}
# By head_dim. Where products read registers (without TMA), the larger tiles of head_dim 64 spill in their loops.
FORWARD_PLANS = {64: [Plan(57344, FORWARD)], 128: [Plan(131072, FORWARD), SMALL]}
BACKWARD_PLANS = {64: [Plan(57600, BACKWARD)], 128: [Plan(123136, BACKWARD), SMALL]}


@triton.jit
def load_pooled(x_ptr, row, length, D: tl.constexpr):
    """float32 [ROWS, D] of one head, zero past `length`."""
    return tl.load(x_ptr + row[:, None] * D + tl.arange(0, D)[None, :], mask=(row < length)[:, None], other=0.0)


@triton.jit
def split(x):
    """A float32 tile as a sum of two bfloat16 ones."""
    high = x.to(tl.bfloat16)
    return high, (x - high.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def split_dot(a_high, a_low, b_high, b_low, acc):
    """acc + a b of two tiles that were `split`; the product of both low parts is lost."""
    acc = tl.dot(a_low, b_high, acc)
    acc = tl.dot(a_high, b_low, acc)
    return tl.dot(a_high, b_high, acc)


@triton.jit(do_not_specialize=["length", "scale_log2"])
def _pooled_fwd_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    output_ptr,
    lse_ptr,
    length,
    scale_log2,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    await_previous()
    pair = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    key_ptr += pair * length * D
    value_ptr += pair * length * D
    q_high, q_low = split(load_pooled(query_ptr + pair * length * D, row, length, D) * scale_log2)
    top = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, D], tl.float32)
    zeros = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, length, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        k_high, k_low = split(load_pooled(key_ptr, column, length, D))
        scores = split_dot(q_high, q_low, k_high.T, k_low.T, zeros)
        scores = tl.where((column < length)[None, :], scores, -float("inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        weights = tl.math.exp2(scores - new_top[:, None])
        decay = tl.math.exp2(top - new_top)
        total = total * decay + tl.sum(weights, 1)
        v_high, v_low = split(load_pooled(value_ptr, column, length, D))
        w_high, w_low = split(weights)
        acc = split_dot(w_high, w_low, v_high, v_low, acc * decay[:, None])
        top = new_top
    output = output_ptr + pair * length * D + row[:, None] * D + tl.arange(0, D)[None, :]
    tl.store(output, acc / total[:, None], mask=(row < length)[:, None])
    tl.store(lse_ptr + pair * length + row, top + tl.math.log2(total), mask=row < length)


@triton.jit(do_not_specialize=["length", "scale", "scale_log2"])
def _pooled_dq_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    output_ptr,
    lse_ptr,
    grad_ptr,
    grad_query_ptr,
    delta_ptr,
    length,
    scale,
    scale_log2,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Also writes delta = rowsum(dO * O)."""
    await_previous()
    pair = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    key_ptr += pair * length * D
    value_ptr += pair * length * D
    q_high, q_low = split(load_pooled(query_ptr + pair * length * D, row, length, D) * scale_log2)
    g = load_pooled(grad_ptr + pair * length * D, row, length, D)
    delta = tl.sum(g * load_pooled(output_ptr + pair * length * D, row, length, D), 1)
    g_high, g_low = split(g)
    lse = tl.load(lse_ptr + pair * length + row, mask=row < length, other=0.0)
    tl.store(delta_ptr + pair * length + row, delta, mask=row < length)
    acc = tl.zeros([ROWS, D], tl.float32)
    zeros = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, length, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        k_high, k_low = split(load_pooled(key_ptr, column, length, D))
        v_high, v_low = split(load_pooled(value_ptr, column, length, D))
        p = tl.math.exp2(split_dot(q_high, q_low, k_high.T, k_low.T, zeros) - lse[:, None])
        products = split_dot(g_high, g_low, v_high.T, v_low.T, zeros)
        # A column past the end has a score of 0 here, and a weight that may overflow.
        ds_high, ds_low = split(tl.where((column < length)[None, :], p * (products - delta[:, None]), 0.0))
        acc = split_dot(ds_high, ds_low, k_high, k_low, acc)
    grad_query = grad_query_ptr + pair * length * D + row[:, None] * D + tl.arange(0, D)[None, :]
    tl.store(grad_query, acc * scale, mask=(row < length)[:, None])


@triton.jit(do_not_specialize=["length", "scale", "scale_log2"])
def _pooled_dkdv_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    lse_ptr,
    grad_ptr,
    delta_ptr,
    grad_key_ptr,
    grad_value_ptr,
    length,
    scale,
    scale_log2,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    await_previous()
    pair = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    query_ptr += pair * length * D
    grad_ptr += pair * length * D
    k_high, k_low = split(load_pooled(key_ptr + pair * length * D, column, length, D) * scale_log2)
    v_high, v_low = split(load_pooled(value_ptr + pair * length * D, column, length, D))
    acc_k = tl.zeros([ROWS, D], tl.float32)
    acc_v = tl.zeros([ROWS, D], tl.float32)
    zeros = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, length, COLUMNS):
        row = start + tl.arange(0, COLUMNS)
        q_high, q_low = split(load_pooled(query_ptr, row, length, D))
        g_high, g_low = split(load_pooled(grad_ptr, row, length, D))
        lse = tl.load(lse_ptr + pair * length + row, mask=row < length, other=float("inf"))
        delta = tl.load(delta_ptr + pair * length + row, mask=row < length, other=0.0)
        p = tl.math.exp2(split_dot(k_high, k_low, q_high.T, q_low.T, zeros) - lse[None, :])
        p_high, p_low = split(p)
        acc_v = split_dot(p_high, p_low, g_high, g_low, acc_v)
        ds_high, ds_low = split(p * (split_dot(v_high, v_low, g_high.T, g_low.T, zeros) - delta[None, :]))
        acc_k = split_dot(ds_high, ds_low, q_high, q_low, acc_k)
    offsets = pair * length * D + column[:, None] * D + tl.arange(0, D)[None, :]
    inside = (column < length)[:, None]
    tl.store(grad_key_ptr + offsets, acc_k * scale, mask=inside)
    tl.store(grad_value_ptr + offsets, acc_v, mask=inside)


def _plan(query: Tensor, plans: dict[int, list[Plan]]) -> dict[str, Any]:
    head_dim = query.shape[-1]
    if head_dim == 64 and not chips.chip_of(query.device).uses_tma:
        return SMALL.options
    return fitting(query.device, plans[head_dim])


def pooled_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """softmax(Q K^T * scale) V and the log2 of each row's sum of exponentials, float32 [B, H, C].

    Args:
        query, key, value: float32 [B, H, C, D], contiguous.
    """
    batch, heads, length, head_dim = query.shape
    output, lse = torch.empty_like(query), query.new_empty(query.shape[:3])
    plan = _plan(query, FORWARD_PLANS)
    launch(
        _pooled_fwd_kernel,
        (-(-length // plan["ROWS"]), batch * heads),
        query_ptr=query,
        key_ptr=key,
        value_ptr=value,
        output_ptr=output,
        lse_ptr=lse,
        length=length,
        scale_log2=scale * LOG2_E,
        D=head_dim,
        **plan,
    )
    return output, lse


def pooled_attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dQ, dK and dV, each float32 [B, H, C, D]; arguments as in and from `pooled_attention`."""
    batch, heads, length, head_dim = query.shape
    grad_query, grad_key, grad_value = (torch.empty_like(query) for _ in range(3))
    delta = torch.empty_like(lse)
    plan = _plan(query, BACKWARD_PLANS)
    grid = (-(-length // plan["ROWS"]), batch * heads)
    both = {
        "query_ptr": query,
        "key_ptr": key,
        "value_ptr": value,
        "lse_ptr": lse,
        "grad_ptr": grad,
        "delta_ptr": delta,
        "length": length,
        "scale": scale,
        "scale_log2": scale * LOG2_E,
        "D": head_dim,
        **plan,
    }
    launch(_pooled_dq_kernel, grid, output_ptr=output, grad_query_ptr=grad_query, **both)
    launch(_pooled_dkdv_kernel, grid, grad_key_ptr=grad_key, grad_value_ptr=grad_value, **both)
    return grad_query, grad_key, grad_value
