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

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from foveal.blocks import BlockSelection
from foveal.kernels.backend import Cubes, Gates, RasterGradients, backend_named
from foveal.kernels.host import is_plain, on_device_of, refuse_forward_mode
from foveal.kernels.replay import replayed
from foveal.kernels.triton.backward import output_delta
from foveal.kernels.triton.cube_gradients import return_gradients, split_gradient
from foveal.kernels.triton.cubes import combine, pool_cubes
from foveal.kernels.triton.lists import column_lists, padded_blocks
from foveal.kernels.triton.pooled import pooled_attention, pooled_attention_backward
from foveal.kernels.values import flatten, linear_term, unflatten
from foveal.methods.sla.gpu import mask_operand
from foveal.methods.sla.gpu_backward import gradients
from foveal.methods.sla.gpu_forward import Results, forward_in_groups
from foveal.methods.vsa.gpu import Choice, choice_of, lists_of
from foveal.methods.vsa.layout import CubeLayout

NUM_INPUTS = 7


class Options(NamedTuple):
    """What a call does not read from its tensors: `scope` is the config's linear_scope, `backend` a backend's name."""

    scale: float
    feature_map: str
    scope: str
    backend: str


class Saved(NamedTuple):
    """What the backward reads beside the inputs.

    attended: Of + Ol W^T + b in tile order. lse: of the exact branch, in tile order.
    norm, state, means: as in `Results`.
    query, key, value, coarse: pooled, and what the coarse stage makes of them, float32 [B, H, C, D].
    coarse_lse: float32 [B, H, C].
    critical, counts: the lists.
    """

    attended: Tensor
    lse: Tensor
    norm: Tensor
    state: Tensor
    means: Tensor
    query: Tensor
    key: Tensor
    value: Tensor
    coarse: Tensor
    coarse_lse: Tensor
    critical: Tensor
    counts: Tensor


def sla_vsa_attention_gpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: CubeLayout,
    selection: BlockSelection | None,
    gate_coarse: Tensor | None,
    gate_fine: Tensor | None,
    proj_weight: Tensor | None,
    proj_bias: Tensor | None,
    options: Options,
) -> Tensor:
    """O = Gc * Oc + Gf * (Of + Ol W^T + b), [B, H, L, D] in raster order, differentiable."""
    inputs = query, key, value, gate_coarse, gate_fine, proj_weight, proj_bias
    refuse_forward_mode(*inputs)
    train = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    choice = choice_of(layout, selection)
    cube_tensors, cube_numbers = flatten(layout.cubes())
    choice_tensors, choice_numbers = flatten(choice)
    if is_plain(*inputs):
        given = tuple(cube_numbers), tuple(choice_numbers), len(cube_tensors), options, train
        if train:
            return _Attention.apply(given, *inputs, *cube_tensors, *choice_tensors)
        return replayed(_flat_forward, (*inputs, *cube_tensors, *choice_tensors), given)[0][0]
    return _forward_op(*inputs, cube_tensors, cube_numbers, choice_tensors, choice_numbers, *options, train)[0]


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate_coarse: Tensor | None,
    gate_fine: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    cubes: Cubes,
    choice: Choice,
    options: Options,
    save: bool,
) -> tuple[Tensor, Saved]:
    """The output, and what the backward reads beside it."""
    scale, backend = options.scale, backend_named(options.backend)
    with on_device_of(query):  # Triton launches on the current device
        copies, pooled, ranked = pool_cubes(query, key, value, cubes, gather="qkv")
        critical, counts = lists_of(choice, ranked, cubes, scale)
        coarse, coarse_lse = pooled_attention(*pooled, scale)
        selection = cubes.selection(critical, counts)
        if options.scope == "none":
            attended, lse = backend.forward(*copies, selection, scale).run_all()
            states = lse.new_empty(0), query.new_empty(0, dtype=torch.bfloat16), lse.new_empty(0)
            results = Results(attended, lse, *states)
        else:
            mask = mask_operand(selection, options.scope)
            term = linear_term(options.feature_map, weight, bias, query)
            results = forward_in_groups(*copies, selection, mask, None, term, scale, backend, save)
        output = torch.empty_like(query)
        combine(results.output, coarse, Gates(gate_coarse, gate_fine), cubes, output)
    return output, Saved(*results, *pooled, coarse, coarse_lse, critical, counts)


def _backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate_coarse: Tensor | None,
    gate_fine: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    saved: Saved,
    cubes: Cubes,
    options: Options,
) -> tuple[Tensor | None, ...]:
    scale, backend = options.scale, backend_named(options.backend)
    selection = cubes.selection(saved.critical, saved.counts)
    with on_device_of(query):  # Triton launches on the current device
        grad = grad if grad.stride(-1) == 1 else grad.contiguous()
        # Without a fine gate it reads O in raster order, and only for delta, which SLA's backward makes itself here.
        attended = grad if gate_fine is None else saved.attended
        split = split_gradient(grad, attended, saved.coarse, Gates(gate_coarse, gate_fine), cubes)
        grad_fine, grad_coarse, grad_gates = split.fine, split.coarse, split.gates
        pooled = saved.query, saved.key, saved.value
        pooled = pooled_attention_backward(grad_coarse, *pooled, saved.coarse, saved.coarse_lse, scale)
        copies, *_ = pool_cubes(query, key, value, cubes, gather="qkv", pool=False)
        grad_weight = grad_bias = None
        if options.scope == "none":
            delta = output_delta(grad_fine, saved.attended, None)
            lists = selection, column_lists(selection), scale
            fine = backend.backward(grad_fine, *copies, delta, saved.lse, *lists)
        else:
            mask = mask_operand(selection, options.scope)
            mask = None if mask is None else mask.flatten(0, 1)
            term = linear_term(options.feature_map, weight, bias, query)
            results = Results(*saved[: len(Results._fields)])
            *fine, grad_weight, grad_bias = gradients(
                grad_fine, *copies, results, selection, mask, term, scale, backend
            )
        grads = tuple(torch.empty_like(x) for x in (query, key, value))
        return_gradients(tuple(fine), RasterGradients(grads, pooled, cubes))
    grad_weight = None if weight is None else grad_weight.to(weight.dtype)
    grad_bias = None if bias is None else grad_bias.to(bias.dtype)
    return *grads, *grad_gates, grad_weight, grad_bias


def _flat_forward(tensors: Sequence[Tensor | None], given: tuple) -> tuple[tuple[Tensor, ...], None]:
    """`_forward` for `replayed`: the output, and `Saved` if it is to be saved."""
    cube_numbers, choice_numbers, num_cube_tensors, options, save = given
    cubes = unflatten(tensors[NUM_INPUTS : NUM_INPUTS + num_cube_tensors], cube_numbers)
    choice = unflatten(tensors[NUM_INPUTS + num_cube_tensors :], choice_numbers)
    output, saved = _forward(*tensors[:NUM_INPUTS], cubes, choice, options, save)
    return (output, *saved) if save else (output,), None


def _flat_backward(tensors: Sequence[Tensor | None], given: tuple) -> tuple[tuple[Tensor | None, ...], None]:
    """`_backward` for `replayed`, of the gradient, the inputs, `Saved`, and flat cubes."""
    cube_numbers, options = given
    end = 1 + NUM_INPUTS + len(Saved._fields)
    saved, cubes = Saved(*tensors[1 + NUM_INPUTS : end]), unflatten(tensors[end:], cube_numbers)
    return _backward(*tensors[: 1 + NUM_INPUTS], saved, cubes, options), None


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, given, *tensors):
        (output, *saved), _ = replayed(_flat_forward, tensors, given)
        cube_numbers, _, num_cube_tensors, options, _ = given
        ctx.num_inputs, ctx.given = len(tensors), (cube_numbers, options)
        cube_tensors = tensors[NUM_INPUTS : NUM_INPUTS + num_cube_tensors]
        ctx.save_for_backward(*tensors[:NUM_INPUTS], *saved, *cube_tensors)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        saved = ctx.saved_tensors  # once: checkpointing recomputes them for one look
        grads, _ = replayed(_flat_backward, (grad, *saved), ctx.given)
        return None, *grads, *[None] * (ctx.num_inputs - NUM_INPUTS)


@torch.library.custom_op("foveal::sla_vsa_gpu_fwd", mutates_args=())
def _forward_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate_coarse: Tensor | None,
    gate_fine: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    cube_tensors: list[Tensor],
    cube_numbers: list[int],
    choice_tensors: list[Tensor],
    choice_numbers: list[int],
    scale: float,
    feature_map: str,
    scope: str,
    backend: str,
    save: bool,
) -> list[Tensor]:
    """The output, and `Saved`; only the output unless `save`."""
    inputs = query, key, value, gate_coarse, gate_fine, weight, bias
    cubes, choice = unflatten(cube_tensors, cube_numbers), unflatten(choice_tensors, choice_numbers)
    output, saved = _forward(*inputs, cubes, choice, Options(scale, feature_map, scope, backend), save)
    if choice.critical is not None:
        # An op may not return what it was given.
        saved = saved._replace(critical=saved.critical.clone(), counts=saved.counts.clone())
    return [output, *saved] if save else [output]


@_forward_op.register_fake
def _(query, key, value, gate_coarse, gate_fine, weight, bias, cube_tensors, cube_numbers, *rest):
    choice_tensors, choice_numbers, _, _, scope, _, save = rest
    output = torch.empty_like(query)
    if not save:
        return [output]
    cubes, choice = unflatten(cube_tensors, cube_numbers), unflatten(choice_tensors, choice_numbers)
    batch, heads, _, head_dim = query.shape
    cubes_shape = (batch, heads, cubes.num_cubes)
    text_blocks = cubes.key_sizes.shape[1] - cubes.num_cubes
    width = choice.critical.shape[-1] if choice.rule is None else choice.rule.width + text_blocks
    attended = query.new_empty((batch, heads, cubes.num_cubes * cubes.slot, head_dim))
    lse = attended.new_empty(attended.shape[:3], dtype=torch.float32)
    norm, state, means = lse.new_empty(0), query.new_empty(0, dtype=torch.bfloat16), lse.new_empty(0)
    if scope != "none":
        rows = 1 if scope == "all" else padded_blocks(cubes.num_cubes)
        norm = lse.new_empty((batch * heads, rows, head_dim))
        state = query.new_empty((batch * heads, rows, head_dim, head_dim), dtype=torch.bfloat16)
        means = lse.new_empty((2, batch * heads, 1, head_dim))
    pooled = [lse.new_empty((*cubes_shape, head_dim)) for _ in range(4)]
    lists = query.new_empty((*cubes_shape, width), dtype=torch.int32), query.new_empty(cubes_shape, dtype=torch.int32)
    return [output, attended, lse, norm, state, means, *pooled, lse.new_empty(cubes_shape), *lists]


@torch.library.custom_op("foveal::sla_vsa_gpu_bwd", mutates_args=())
def _backward_op(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate_coarse: Tensor | None,
    gate_fine: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    saved: list[Tensor],
    cube_tensors: list[Tensor],
    cube_numbers: list[int],
    scale: float,
    feature_map: str,
    scope: str,
    backend: str,
) -> list[Tensor]:
    """The gradients, empty where an input is None."""
    inputs, cubes = (query, key, value, gate_coarse, gate_fine, weight, bias), unflatten(cube_tensors, cube_numbers)
    grads = _backward(grad, *inputs, Saved(*saved), cubes, Options(scale, feature_map, scope, backend))
    return [grad.new_empty(0) if x is None else x for x in grads]


@_backward_op.register_fake
def _(grad, query, key, value, gate_coarse, gate_fine, weight, bias, *rest):
    inputs = query, key, value, gate_coarse, gate_fine, weight, bias
    return [grad.new_empty(0) if x is None else torch.empty_like(x) for x in inputs]


def _setup_context(ctx, inputs, output) -> None:
    cube_tensors, ctx.numbers, choice_tensors, _, *ctx.options, _ = inputs[NUM_INPUTS:]
    ctx.save_for_backward(*inputs[:NUM_INPUTS], *output[1:], *cube_tensors)
    ctx.num_tensors = len(cube_tensors), len(choice_tensors)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward_of_op(ctx, grads: list[Tensor | None]):
    saved = ctx.saved_tensors  # once: checkpointing recomputes them for one look
    end = NUM_INPUTS + len(Saved._fields)
    inputs = saved[:NUM_INPUTS]
    rest = list(saved[NUM_INPUTS:end]), list(saved[end:]), ctx.numbers, *ctx.options
    found = _backward_op(grads[0], *inputs, *rest)
    found = (None if x is None else dx for x, dx in zip(inputs, found, strict=True))
    of_cubes, of_choice = ([None] * n for n in ctx.num_tensors)
    return *found, of_cubes, None, of_choice, None, None, None, None, None, None


_forward_op.register_autograd(_backward_of_op, setup_context=_setup_context)
