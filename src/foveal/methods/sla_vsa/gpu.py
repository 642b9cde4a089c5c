"""SLA and VSA in one on GPUs: VSA's passes between raster and tile order, and SLA's kernels between them.

    1. One pass over query, key, and value pools cubes and copies tokens to tile order (VSA's).
    2. The kernels that choose rank the cubes by these means, and the coarse stage attends over them, once for all.
    3. SLA's states, their sum by one product with the block mask, and one sparse pass that reads the chosen cubes
       and adds the projected linear branch in its epilogue.
    4. One pass gates, adds the coarse branch, and returns to raster order (VSA's).

The backward goes the same way: one pass splits the gradient, SLA's backward gives dQ, dK, and dV of the exact and the
linear branch together, and one pass returns them with each token's share of the pooled gradients.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from foveal.kernels.backend import BackwardCall, Cubes, Gates, RasterGradients, backend_named
from foveal.kernels.operator import KernelOperator
from foveal.kernels.triton.backward import output_delta
from foveal.kernels.triton.cube_gradients import return_gradients, split_gradient
from foveal.kernels.triton.cubes import combine, pool_cubes
from foveal.kernels.triton.lists import column_lists, padded_blocks
from foveal.kernels.triton.pooled import pooled_attention_backward
from foveal.kernels.values import Problem, copied_weight, linear_term, needs_copy, packable
from foveal.methods.sla.gpu import SLAOptions, fake_copy, fake_results, mask_operand
from foveal.methods.sla.gpu_backward import gradients
from foveal.methods.sla.gpu_forward import Results, forward_in_groups
from foveal.methods.vsa.gpu import (
    Choice,
    Coarse,
    coarse_stage,
    fake_coarse,
    fake_lists,
    in_tile_order,
    made_lists,
    used_selection,
)


@packable
class SLAVSACall(NamedTuple):
    """What a call reads: that of a `VSACall`, with W and b, [D, D] and [D], or None.

    video_cubes: so many cubes have the exact and the linear branch, the others only the coarse one.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    gate_coarse: Tensor | None
    gate_fine: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    cubes: Cubes
    choice: Choice
    video_cubes: int


def _clear_protected(x: Tensor, call: SLAVSACall) -> None:
    """Zeros in the rows of x, [B, H, C * slot, D], that have only the coarse branch: the kernels add a bias to all."""
    if call.video_cubes < call.cubes.num_cubes:
        x[:, :, call.video_cubes * call.cubes.slot :] = 0


def _forward(call: SLAVSACall, options: SLAOptions, save: bool) -> tuple[tuple[Tensor], tuple[Tensor, ...]]:
    query, scale, backend = call.query, options.scale, backend_named(options.backend)
    copies, coarse, selection = coarse_stage(call, scale, "qkv")
    problem, copied = Problem(*copies, selection, scale, call.cubes.uniform), ()
    if options.scope == "none":
        results = backend.forward(problem).run_all()
    else:
        mask = mask_operand(selection, options.scope)
        term = linear_term(options.feature_map, call.weight, call.bias, query)
        results, copied = forward_in_groups(problem, mask, None, term, backend, save), copied_weight(call.weight, term)
    _clear_protected(results[0], call)
    output = torch.empty_like(query)
    combine(results[0], coarse.output, Gates(call.gate_coarse, call.gate_fine), call.cubes, output)
    return (output,), (*coarse, *results, *made_lists(call, selection), *copied)


def _backward(call: SLAVSACall, options: SLAOptions, outputs, saved, grads) -> tuple[Tensor | None, ...]:
    inputs, scale, backend = call[:3], options.scale, backend_named(options.backend)
    num_results = 2 if options.scope == "none" else len(Results._fields)
    coarse, results, made = Coarse(*saved[:5]), saved[5 : 5 + num_results], saved[5 + num_results :]
    weight = call.weight
    if needs_copy(weight):
        *made, weight = made
    (grad,), selection = grads, used_selection(call, made)
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    # Without a fine gate it reads O in raster order, and only for delta, which SLA's backward makes itself here.
    attended = grad if call.gate_fine is None else results[0]
    split = split_gradient(grad, attended, coarse.output, Gates(call.gate_coarse, call.gate_fine), call.cubes)
    grad_fine, grad_coarse, grad_gates = split.fine, split.coarse, split.gates
    _clear_protected(grad_fine, call)
    pooled = pooled_attention_backward(grad_coarse, *coarse, scale)
    copies, *_ = pool_cubes(*inputs, call.cubes, gather="qkv", pool=False)
    problem, grad_weight, grad_bias = Problem(*copies, selection, scale, call.cubes.uniform), None, None
    if options.scope == "none":
        output, lse = results
        delta = output_delta(grad_fine, output, None)
        fine = backend.backward(BackwardCall(problem, grad_fine, delta, lse, column_lists(selection)))
    else:
        mask = mask_operand(selection, options.scope)
        mask = None if mask is None else mask.flatten(0, 1)
        term = linear_term(options.feature_map, weight, call.bias, call.query)
        *fine, grad_weight, grad_bias = gradients(problem, grad_fine, Results(*results), mask, term, backend)
    grads = tuple(torch.empty_like(x) for x in inputs)
    return_gradients(tuple(fine), RasterGradients(grads, pooled, call.cubes))
    grad_weight = None if call.weight is None else grad_weight.to(call.weight.dtype)
    grad_bias = None if call.bias is None else grad_bias.to(call.bias.dtype)
    return *grads, *grad_gates, grad_weight, grad_bias


def _fake(call: SLAVSACall, options: SLAOptions) -> tuple[tuple[Tensor], tuple[Tensor, ...]]:
    attended = in_tile_order(call)
    if options.scope == "none":
        results = attended, attended.new_empty(attended.shape[:3], dtype=torch.float32)
    else:
        results = fake_results(attended, 1 if options.scope == "all" else padded_blocks(call.cubes.num_cubes))
    made = *fake_lists(call), *fake_copy(call.weight)
    return (torch.empty_like(call.query),), (*fake_coarse(call), *results, *made)


# O = Gc * Oc + Gf * (Of + Ol W^T + b), [B, H, L, D] in raster order.
sla_vsa_attention_gpu = KernelOperator(
    "foveal::sla_vsa_gpu",
    inputs=7,
    options=SLAOptions,
    forward=_forward,
    backward=_backward,
    fake=_fake,
    keeps=lambda call: False,
)
