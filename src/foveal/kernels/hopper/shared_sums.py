"""The sums that end the linear branch's query side where all query blocks of a head share one H: a Triton kernel.

Only Hopper's query side gives dH in parts, so only its launch code asks for it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from foveal.kernels.backend import SharedGradients
from foveal.kernels.host import launch
from foveal.kernels.triton.await_previous import await_previous
from foveal.kernels.triton.linear_backward import column_sums
from foveal.kernels.values import LinearTerm


@triton.jit(do_not_specialize=["parts", "blocks"])
def _shared_sum_kernel(
    part_ptr,
    norm_part_ptr,
    bias_part_ptr,
    state_ptr,
    norm_ptr,
    mean_ptr,
    narrow_ptr,
    sum_ptr,
    whole_ptr,
    grad_norm_ptr,
    grad_bias_ptr,
    parts,
    blocks,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Grid (strips of dH, of dZ, and of db, B * H): one pair's sums of dH over parts and of dZ over blocks.

    With a sum_ptr also dH in float32, H + Z m^T, and, by the first pair's programs, db of all pairs.
    """
    await_previous()
    projected: tl.constexpr = sum_ptr is not None
    strip, pair = tl.program_id(0), tl.program_id(1).to(tl.int64)
    strips: tl.constexpr = D * D // COLUMNS
    short: tl.constexpr = D // COLUMNS
    if strip < strips:
        column = strip * COLUMNS + tl.arange(0, COLUMNS)
        total = column_sums(part_ptr + pair * parts * D * D, column, D * D, parts, PARTS)
        place = pair * D * D + column
        tl.store(narrow_ptr + place, total.to(tl.bfloat16))
        if projected:
            tl.store(sum_ptr + place, total)
            product = tl.load(norm_ptr + pair * D + column // D) * tl.load(mean_ptr + pair * D + column % D)
            tl.store(whole_ptr + place, tl.load(state_ptr + place).to(tl.float32) + product)
    elif strip < strips + short:
        column = (strip - strips) * COLUMNS + tl.arange(0, COLUMNS)
        total = column_sums(norm_part_ptr + pair * blocks * D, column, D, blocks, PARTS)
        tl.store(grad_norm_ptr + pair * D + column, total)
    elif projected:  # noqa: SIM102, as it is known when this compiles
        if pair == 0:
            column = (strip - strips - short) * COLUMNS + tl.arange(0, COLUMNS)
            total = column_sums(bias_part_ptr, column, D, blocks * tl.num_programs(1), PARTS)
            tl.store(grad_bias_ptr + column, total)


def shared_sums(term: LinearTerm, grad_states: Tensor, grad_norms: Tensor, grad_biases: Tensor) -> SharedGradients:
    """What the query side gives where all query blocks of a head share one H, of its parts.

    Args:
        term: the linear branch of the forward, with one H of each head.
        grad_states: dH, with respect to H W^T where there is a W, float32 [B * H, parts, D, D].
        grad_norms, grad_biases: dZ and db of each block, float32 [B * H, blocks, D].
    """
    pairs, parts, head_dim, _ = grad_states.shape
    memory, columns, projected = {"dtype": torch.float32, "device": grad_states.device}, 64, term.weight is not None
    narrow = torch.empty((pairs, 1, head_dim, head_dim), dtype=torch.bfloat16, device=grad_states.device)
    norm = torch.empty((pairs, 1, head_dim), **memory)
    total = whole = bias = None
    if projected:
        total, whole = (torch.empty((pairs * head_dim, head_dim), **memory) for _ in range(2))
        bias = torch.empty(head_dim, **memory)
    launch(
        _shared_sum_kernel,
        (head_dim * (head_dim + 1 + projected) // columns, pairs),
        part_ptr=grad_states,
        norm_part_ptr=grad_norms,
        bias_part_ptr=grad_biases,
        state_ptr=term.state,
        norm_ptr=term.norm,
        mean_ptr=term.means[0],
        narrow_ptr=narrow,
        sum_ptr=total,
        whole_ptr=whole,
        grad_norm_ptr=norm,
        grad_bias_ptr=bias,
        parts=parts,
        blocks=grad_norms.shape[1],
        D=head_dim,
        COLUMNS=columns,
        PARTS=32,
        num_warps=4,
    )
    if not projected:
        return SharedGradients(narrow, norm, None, None)
    # dO^T O^l of a head is (dH W^-T)^T times the state of V, H + Z m^T: the sum over its rows is in dH already.
    return SharedGradients(narrow @ term.weight, norm, total.t() @ whole, bias)
