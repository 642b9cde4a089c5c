"""VSA on GPUs: one pass pools and reorders, the fine stage is the block-sparse kernels', one pass gates and returns.
On Hopper the kernels of the fine stage gate and return what they compute themselves.

The coarse stage attends over pooled cubes in float32. Copies in tile order live only inside an op: the backward makes
its own. Both passes are custom ops. Source: VSA (arXiv 2505.13389), section 2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from foveal.blocks import BlockSelection
from foveal.kernels import hopper as gluon
from foveal.kernels.triton.backward import backward
from foveal.kernels.triton.cubes import combine, pool_cubes, return_gradients, split_gradient
from foveal.kernels.triton.forward import forward
from foveal.kernels.triton.lists import column_lists
from foveal.kernels.triton.pooled import pooled_attention, pooled_attention_backward
from foveal.kernels.triton.select import select
from foveal.methods.vsa.layout import CubeLayout


def vsa_attention_gpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: CubeLayout,
    selection: BlockSelection | None,
    scale: float,
    gate_coarse: Tensor | None,
    gate_fine: Tensor | None,
    *,
    hopper: bool,
) -> Tensor:
    """O = Gc * Oc + Gf * Of, [B, H, L, D] in raster order, differentiable; `hopper` takes the Gluon fine stage."""
    given = [x for x in (query, key, value, gate_coarse, gate_fine) if x is not None]
    return _forward_op(
        query,
        key,
        value,
        gate_coarse,
        gate_fine,
        layout.places(query.device),
        layout.cube_sizes,
        layout.key_sizes,
        layout.text_counts,
        None if selection is None else selection.critical,
        None if selection is None else selection.critical_count,
        [layout.slot, layout.uniform_size or 0, layout.kept],
        scale,
        hopper,
        torch.is_grad_enabled() and any(x.requires_grad for x in given),
    )[0]


def select_cubes_gpu(query: Tensor, key: Tensor, layout: CubeLayout, scale: float) -> BlockSelection:
    """The selection that `vsa_attention_gpu` makes, from [B, H, L, D] and [B, H, L + text, D] in raster order."""
    places = layout.places(query.device)
    return layout.selection(*_select_op(query, key, places, layout.cube_sizes, layout.slot, layout.kept, scale))


@torch.library.custom_op("foveal::vsa_select", mutates_args=())
def _select_op(
    query: Tensor, key: Tensor, places: Tensor, cube_sizes: Tensor, slot: int, kept: int, scale: float
) -> tuple[Tensor, Tensor]:
    with torch.cuda.device_of(query):  # Triton launches on the current device
        _, pooled = pool_cubes(query, key, None, places, cube_sizes, slot)
        return _pick(*pooled, kept, scale)


@_select_op.register_fake
def _(query, key, places, cube_sizes, slot, kept, scale):
    rows = (*query.shape[:2], places.numel() // slot)
    return query.new_empty((*rows, kept), dtype=torch.int32), query.new_empty(rows, dtype=torch.int32)


def _pick(query_c: Tensor, key_c: Tensor, kept: int, scale: float) -> tuple[Tensor, Tensor]:
    """The `kept` highest-scoring cubes of each cube, int32 [B, H, C, kept], ascending, and their counts."""
    nothing = (0, 0)
    return select(query_c, key_c.transpose(-1, -2), scale, kept, kept, 0, None, None, nothing, nothing, False)[:2]


def _with_text(critical: Tensor, counts: Tensor, text_counts: Tensor | None, num_blocks: int) -> tuple[Tensor, Tensor]:
    """The lists with the blocks of text behind the cubes, as `CubeLayout.selection` has them."""
    if text_counts is None:
        return critical, counts
    text = torch.arange(critical.shape[2], num_blocks, dtype=torch.int32, device=critical.device)
    critical = torch.cat([critical, text.expand(*critical.shape[:3], -1)], -1)
    return critical, counts + text_counts[:, None, None]


def _fine_sizes(key_sizes: Tensor, slot: int, uniform: int) -> Tensor | None:
    """Valid keys of each block for the fine kernels; None where all blocks are full."""
    return None if uniform == slot else key_sizes


@torch.library.custom_op("foveal::vsa_fwd", mutates_args=())
def _forward_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate_coarse: Tensor | None,
    gate_fine: Tensor | None,
    places: Tensor,
    cube_sizes: Tensor,
    key_sizes: Tensor,
    text_counts: Tensor | None,
    given_critical: Tensor | None,
    given_counts: Tensor | None,
    shape: list[int],
    scale: float,
    hopper: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The output, and what the backward reads beside it (empty unless `save`) and the lists.

    Of is among that with a fine gate alone: without one the backward has it from O.

    Args:
        shape: tokens that a cube takes up, tokens of every block (0 where they differ), and cubes kept.
    """
    slot, uniform, kept = shape
    with torch.cuda.device_of(query):  # Triton launches on the current device
        cubes, pooled = pool_cubes(query, key, value, places, key_sizes, slot, gather="kv" if hopper else "qkv")
        if given_critical is None:
            critical, counts = _pick(*pooled[:2], kept, scale)
            critical, counts = _with_text(critical, counts, text_counts, key_sizes.shape[1])
        else:
            # An op may not return what it was given.
            critical, counts = (x.clone(memory_format=torch.contiguous_format) for x in (given_critical, given_counts))
        coarse, coarse_lse = pooled_attention(*pooled, scale)
        gates = gate_coarse, gate_fine
        if hopper:
            output, fine, lse = gluon.attend_cubes(
                query, *cubes, critical, counts, key_sizes, uniform, places, coarse, *gates, scale,
                slot=slot, save_fine=save and gate_fine is not None,
            )  # fmt: skip
        else:
            lse = torch.empty(cubes[0].shape[:3], dtype=torch.float32, device=query.device)
            # Every program is done with its queries when it writes its output: into their memory.
            sizes, results = _fine_sizes(key_sizes, slot, uniform), (cubes[0], lse)
            fine, lse = forward(*cubes, critical, counts, sizes, slot, slot, scale, results=results)
            output = torch.empty_like(query)
            combine(fine, coarse, *gates, places, slot, output)
        if not save or gate_fine is None:
            fine = query.new_empty(0)
        if not save:
            lse, coarse, coarse_lse, *pooled = (lse.new_empty(0) for _ in range(6))
        return output, fine, lse, *pooled, coarse, coarse_lse, critical, counts


@_forward_op.register_fake
def _(
    query, key, value, gate_coarse, gate_fine, places, cube_sizes, key_sizes, text_counts, given, given_counts, *rest
):
    (slot, _, kept), _, _, save = rest
    batch, heads, _, head_dim = query.shape
    num_cubes = places.numel() // slot
    width = kept + key_sizes.shape[1] - num_cubes if given is None else given.shape[-1]
    rows = (batch, heads, num_cubes)
    fine = (batch, heads, num_cubes * slot, head_dim)
    shapes = fine[:3], *((*rows, head_dim) for _ in range(4)), rows
    return (
        torch.empty_like(query),
        query.new_empty(fine if save and gate_fine is not None else 0),
        *(query.new_empty(shape if save else 0, dtype=torch.float32) for shape in shapes),
        query.new_empty((*rows, width), dtype=torch.int32),
        query.new_empty(rows, dtype=torch.int32),
    )


@torch.library.custom_op("foveal::vsa_bwd", mutates_args=())
def _backward_op(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate_coarse: Tensor | None,
    gate_fine: Tensor | None,
    places: Tensor,
    cube_sizes: Tensor,
    key_sizes: Tensor,
    attended: Tensor,
    lse: Tensor,
    query_c: Tensor,
    key_c: Tensor,
    value_c: Tensor,
    coarse: Tensor,
    coarse_lse: Tensor,
    critical: Tensor,
    counts: Tensor,
    slot: int,
    uniform: int,
    scale: float,
    hopper: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    with torch.cuda.device_of(query):  # Triton launches on the current device
        grad = grad if grad.stride(-1) == 1 else grad.contiguous()
        columns = column_lists(critical, counts, key_sizes.shape[1])
        grad_fine, delta, grad_coarse, *grad_gates = split_gradient(
            grad, attended, coarse, gate_coarse, gate_fine, places, slot
        )
        pooled = pooled_attention_backward(grad_coarse, query_c, key_c, value_c, coarse, coarse_lse, scale)
        cubes, _ = pool_cubes(query, key, value, places, key_sizes, slot, gather="qkv", pool=False)
        sizes = _fine_sizes(key_sizes, slot, uniform)
        arguments = (grad_fine, *cubes, delta, lse, critical, counts, columns, sizes, slot, slot, scale)
        if hopper:
            grads = tuple(torch.empty_like(x) for x in (query, key, value))
            video = gluon.VideoGradients(grads, pooled, places, cube_sizes)
            gluon.backward(*arguments, uniform=uniform, video=video)
        else:
            cubes = backward(*arguments)
            # Before the results: what they take, the gradients in raster order can have.
            del arguments, grad_fine
            grads = tuple(torch.empty_like(x) for x in (query, key, value))
            return_gradients(cubes, pooled, places, cube_sizes, slot, grads)
        return *grads, *(grad.new_empty(0) if x is None else x for x in grad_gates)


@_backward_op.register_fake
def _(grad, query, key, value, gate_coarse, gate_fine, *rest):
    gates = (grad.new_empty(0) if x is None else torch.empty_like(x) for x in (gate_coarse, gate_fine))
    return *(torch.empty_like(x) for x in (query, key, value)), *gates


def _setup_context(ctx, inputs, output) -> None:
    (slot, uniform, _), scale, hopper, _ = inputs[11:]
    gate_fine, (result, fine, *others) = inputs[4], output
    ctx.save_for_backward(*inputs[:8], result if gate_fine is None else fine, *others)
    ctx.options = slot, uniform, scale, hopper
    ctx.num_inputs = len(inputs)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad: Tensor, *_):
    *grads, grad_coarse, grad_fine = _backward_op(grad, *ctx.saved_tensors, *ctx.options)
    gates = (x if x.numel() else None for x in (grad_coarse, grad_fine))
    return *grads, *gates, *([None] * (ctx.num_inputs - 5))


_forward_op.register_autograd(_backward, setup_context=_setup_context)
