"""VSA on GPUs: one pass pools and reorders, the fine stage is the block-sparse kernels', one pass gates and returns.
On Hopper the kernels of the fine stage gate and return what they compute themselves.

The coarse stage attends over pooled cubes in float32. Copies in tile order live only inside a pass: the backward makes
its own. There is one forward and one backward. Plain eager calls reach them through one autograd function; under
`torch.compile`, modes and transforms they are a pair of custom ops. Source: VSA (arXiv 2505.13389), section 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from foveal.blocks import BlockSelection
from foveal.kernels import api
from foveal.kernels.backend import Cubes, Gates, RasterGradients, backend_named
from foveal.kernels.choice import append_blocks, choose_in_pieces, with_squares
from foveal.kernels.host import is_plain, on_device_of, refuse_forward_mode
from foveal.kernels.replay import replayed
from foveal.kernels.triton.cube_gradients import return_gradients, split_gradient
from foveal.kernels.triton.cubes import pool_cubes
from foveal.kernels.triton.lists import column_lists
from foveal.kernels.triton.pooled import pooled_attention, pooled_attention_backward
from foveal.kernels.triton.scores import NO_SIZES, Sizes
from foveal.kernels.triton.select import select
from foveal.kernels.values import flatten, packable, unflatten
from foveal.methods.vsa.layout import CubeLayout
from foveal.rules import SelectionRule


@packable
class Choice(NamedTuple):
    """Which blocks to attend to.

    rule: how cubes are chosen, by the coarse scores; None where lists are given.
    text_counts: int32 [B or 1], blocks of text that hold a valid key; None without text.
    critical, counts: given lists, int32 [B, H, C, W] and [B, H, C], or None.
    """

    rule: SelectionRule | None
    text_counts: Tensor | None = None
    critical: Tensor | None = None
    counts: Tensor | None = None


class Saved(NamedTuple):
    """What the backward reads beside the inputs.

    attended: Of in tile order with a fine gate, else the output.
    lse: the fine stage's log-sum-exp, in tile order.
    query, key, value, coarse: pooled, and what the coarse stage makes of them, float32 [B, H, C, D].
    coarse_lse: float32 [B, H, C].
    critical, counts: the lists.
    """

    attended: Tensor
    lse: Tensor
    query: Tensor
    key: Tensor
    value: Tensor
    coarse: Tensor
    coarse_lse: Tensor
    critical: Tensor
    counts: Tensor


def vsa_attention_gpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: CubeLayout,
    selection: BlockSelection | None,
    scale: float,
    gate_coarse: Tensor | None,
    gate_fine: Tensor | None,
    backend: str,
) -> Tensor:
    """O = Gc * Oc + Gf * Of, [B, H, L, D] in raster order, differentiable; the backend's kernels do the fine stage."""
    inputs = query, key, value, gate_coarse, gate_fine
    refuse_forward_mode(*inputs)
    train = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    cubes, choice = layout.cubes(), choice_of(layout, selection)
    if is_plain(*inputs):
        (cube_tensors, cube_numbers), (choice_tensors, choice_numbers) = flatten(cubes), flatten(choice)
        given = tuple(cube_numbers), tuple(choice_numbers), len(cube_tensors), scale, backend, train
        if train:
            return _Attention.apply(given, *inputs, *cube_tensors, *choice_tensors)
        return replayed(_flat_forward, (*inputs, *cube_tensors, *choice_tensors), given)[0][0]
    return _forward_op(*inputs, *flatten(cubes), *flatten(choice), scale, backend, train)[0]


def select_cubes_gpu(query: Tensor, key: Tensor, layout: CubeLayout, scale: float) -> BlockSelection:
    """The selection that `vsa_attention_gpu` makes, from [B, H, L, D] and [B, H, L + text, D] in raster order."""
    rule = layout.rule()
    return layout.selection(*_select_op(query, key, *flatten(layout.cubes()), *flatten(rule), scale), rule.ragged())


@torch.library.custom_op("foveal::vsa_select_gpu", mutates_args=())
def _select_op(
    query: Tensor,
    key: Tensor,
    cube_tensors: list[Tensor],
    cube_numbers: list[int],
    rule_tensors: list[Tensor],
    rule_numbers: list[int],
    scale: float,
) -> tuple[Tensor, Tensor]:
    cubes = unflatten(cube_tensors, cube_numbers)
    with on_device_of(query):  # Triton launches on the current device
        rule = unflatten(rule_tensors, rule_numbers)
        *_, ranked = pool_cubes(query, key, None, cubes, score=rule.score)
        return _picked(ranked, cubes, rule, scale)


@_select_op.register_fake
def _(query, key, cube_tensors, cube_numbers, rule_tensors, rule_numbers, scale):
    rows = (*query.shape[:2], unflatten(cube_tensors, cube_numbers).num_cubes)
    width = unflatten(rule_tensors, rule_numbers).width
    return query.new_empty((*rows, width), dtype=torch.int32), query.new_empty(rows, dtype=torch.int32)


def choice_of(layout: CubeLayout, selection: BlockSelection | None) -> Choice:
    """What a call attends to: a given selection, or what the layout's rule picks."""
    if selection is None:
        return Choice(layout.rule(), layout.text_counts)
    return Choice(None, layout.text_counts, selection.critical, selection.critical_count)


def _picked(ranked: tuple[Tensor, Tensor], cubes: Cubes, rule: SelectionRule, scale: float) -> tuple[Tensor, Tensor]:
    """The cubes that a rule picks for each cube, int32 [B, H, C, width], ascending, and their counts.

    ranked: of query and key, what `pool_cubes` makes for the rule's score.
    """
    if cubes.num_cubes > api.KERNEL_MAX_BLOCKS:
        return choose_in_pieces(*ranked, scale, rule)
    query, key = ranked
    if rule.spread:
        query = with_squares(query, scale)
    sizes = Sizes(cubes.cube_sizes, cubes.cube_sizes) if rule.quarters else NO_SIZES
    return select(query, key, scale, rule, with_marginal=False, sizes=sizes)[:2]


def lists_of(choice: Choice, ranked: tuple[Tensor, Tensor], cubes: Cubes, scale: float) -> tuple[Tensor, Tensor]:
    """The lists of a choice, contiguous, with the blocks of text behind the cubes that it picks, and their counts."""
    if choice.rule is None:
        return choice.critical.contiguous(), choice.counts.contiguous()
    critical, counts = _picked(ranked, cubes, choice.rule, scale)
    if choice.text_counts is None:
        return critical, counts
    ends = cubes.num_cubes, cubes.key_sizes.shape[1]
    return append_blocks(critical, counts, *ends, choice.text_counts, ragged=choice.rule.ragged())


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate_coarse: Tensor | None,
    gate_fine: Tensor | None,
    cubes: Cubes,
    choice: Choice,
    scale: float,
    backend: str,
    save: bool,
) -> tuple[Tensor, Saved]:
    """The output, and what the backward reads beside it; of that Of and the lists are right only if there is one."""
    backend, gates = backend_named(backend), Gates(gate_coarse, gate_fine)
    with on_device_of(query):  # Triton launches on the current device
        score = "mean" if choice.rule is None else choice.rule.score
        copies, pooled, ranked = pool_cubes(query, key, value, cubes, gather=backend.cube_copies, score=score)
        critical, counts = lists_of(choice, ranked, cubes, scale)
        coarse, coarse_lse = pooled_attention(*pooled, scale)
        selection, save_fine = cubes.selection(critical, counts), save and gate_fine is not None
        output, fine, lse = backend.attend_cubes(query, copies, cubes, selection, coarse, gates, scale, save_fine)
    attended = output if fine is None else fine
    return output, Saved(attended, lse, *pooled, coarse, coarse_lse, critical, counts)


def _backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate_coarse: Tensor | None,
    gate_fine: Tensor | None,
    saved: Saved,
    cubes: Cubes,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    backend, selection = backend_named(backend), cubes.selection(saved.critical, saved.counts)
    with on_device_of(query):  # Triton launches on the current device
        grad = grad if grad.stride(-1) == 1 else grad.contiguous()
        columns = column_lists(selection)
        split = split_gradient(grad, saved.attended, saved.coarse, Gates(gate_coarse, gate_fine), cubes)
        grad_fine, delta, grad_coarse, grad_gates = split
        del split
        pooled = saved.query, saved.key, saved.value
        pooled = pooled_attention_backward(grad_coarse, *pooled, saved.coarse, saved.coarse_lse, scale)
        copies, *_ = pool_cubes(query, key, value, cubes, gather="qkv", pool=False)
        fine = grad_fine, *copies, delta, saved.lse, selection, columns, scale
        if backend.writes_raster:
            grads = tuple(torch.empty_like(x) for x in (query, key, value))
            backend.backward(*fine, raster=RasterGradients(grads, pooled, cubes))
        else:
            copies = backend.backward(*fine)
            # Before the results: what they take, the gradients in raster order can have.
            del fine, grad_fine
            grads = tuple(torch.empty_like(x) for x in (query, key, value))
            return_gradients(copies, RasterGradients(grads, pooled, cubes))
    return *grads, *grad_gates


def _flat_forward(tensors: Sequence[Tensor | None], given: tuple) -> tuple[tuple[Tensor, ...], None]:
    """`_forward` for `replayed`: the output, and `Saved` if it is to be saved."""
    cube_numbers, choice_numbers, num_cube_tensors, scale, backend, save = given
    cubes = unflatten(tensors[5 : 5 + num_cube_tensors], cube_numbers)
    choice = unflatten(tensors[5 + num_cube_tensors :], choice_numbers)
    output, saved = _forward(*tensors[:5], cubes, choice, scale, backend, save)
    return (output, *saved) if save else (output,), None


def _flat_backward(tensors: Sequence[Tensor | None], given: tuple) -> tuple[tuple[Tensor | None, ...], None]:
    """`_backward` for `replayed`, of the gradient, the inputs, `Saved`, and flat cubes."""
    cube_numbers, scale, backend = given
    cubes = unflatten(tensors[15:], cube_numbers)
    return _backward(*tensors[:6], Saved(*tensors[6:15]), cubes, scale, backend), None


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, given, *tensors):
        (output, *saved), _ = replayed(_flat_forward, tensors, given)
        cube_numbers, _, num_cube_tensors, scale, backend, _ = given
        ctx.num_inputs, ctx.given = len(tensors), (cube_numbers, scale, backend)
        ctx.save_for_backward(*tensors[:5], *saved, *tensors[5 : 5 + num_cube_tensors])
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        saved = ctx.saved_tensors  # once: checkpointing recomputes them for one look
        grads, _ = replayed(_flat_backward, (grad, *saved), ctx.given)
        return None, *grads, *[None] * (ctx.num_inputs - 5)


@torch.library.custom_op("foveal::vsa_gpu_fwd", mutates_args=())
def _forward_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate_coarse: Tensor | None,
    gate_fine: Tensor | None,
    cube_tensors: list[Tensor],
    cube_numbers: list[int],
    choice_tensors: list[Tensor],
    choice_numbers: list[int],
    scale: float,
    backend: str,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The output, and `Saved`: empty but for the lists unless `save`.

    Of is among that only with a fine gate: without one the backward has it from O.
    """
    inputs = query, key, value, gate_coarse, gate_fine
    cubes, choice = unflatten(cube_tensors, cube_numbers), unflatten(choice_tensors, choice_numbers)
    output, saved = _forward(*inputs, cubes, choice, scale, backend, save)
    if choice.critical is not None:
        # An op may not return what it was given.
        saved = saved._replace(critical=saved.critical.clone(), counts=saved.counts.clone())
    if not save or gate_fine is None:
        saved = saved._replace(attended=query.new_empty(0))
    if not save:
        floats = ("lse", "query", "key", "value", "coarse", "coarse_lse")
        saved = saved._replace(**{name: saved.lse.new_empty(0) for name in floats})
    return output, *saved


@_forward_op.register_fake
def _(query, key, value, gate_coarse, gate_fine, cube_tensors, cube_numbers, choice_tensors, choice_numbers, *rest):
    *_, save = rest
    cubes, choice = unflatten(cube_tensors, cube_numbers), unflatten(choice_tensors, choice_numbers)
    batch, heads, _, head_dim = query.shape
    num_cubes = cubes.num_cubes
    text_blocks = cubes.key_sizes.shape[1] - num_cubes
    width = choice.critical.shape[-1] if choice.rule is None else choice.rule.width + text_blocks
    rows = (batch, heads, num_cubes)
    fine = (batch, heads, num_cubes * cubes.slot, head_dim)
    shapes = fine[:3], *((*rows, head_dim) for _ in range(4)), rows
    return (
        torch.empty_like(query),
        query.new_empty(fine if save and gate_fine is not None else 0),
        *(query.new_empty(shape if save else 0, dtype=torch.float32) for shape in shapes),
        query.new_empty((*rows, width), dtype=torch.int32),
        query.new_empty(rows, dtype=torch.int32),
    )


@torch.library.custom_op("foveal::vsa_gpu_bwd", mutates_args=())
def _backward_op(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate_coarse: Tensor | None,
    gate_fine: Tensor | None,
    saved: list[Tensor],
    cube_tensors: list[Tensor],
    cube_numbers: list[int],
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients, those of the gates empty where these are None."""
    inputs, cubes = (query, key, value, gate_coarse, gate_fine), unflatten(cube_tensors, cube_numbers)
    grads = _backward(grad, *inputs, Saved(*saved), cubes, scale, backend)
    return tuple(grad.new_empty(0) if x is None else x for x in grads)


@_backward_op.register_fake
def _(grad, query, key, value, gate_coarse, gate_fine, *rest):
    gates = (grad.new_empty(0) if x is None else torch.empty_like(x) for x in (gate_coarse, gate_fine))
    return *(torch.empty_like(x) for x in (query, key, value)), *gates


def _setup_context(ctx, inputs, output) -> None:
    *inputs, cube_tensors, ctx.numbers, choice_tensors, _, ctx.scale, ctx.backend, _ = inputs
    result, fine, *others = output
    ctx.save_for_backward(*inputs, result if inputs[4] is None else fine, *others, *cube_tensors)
    ctx.num_tensors = len(cube_tensors), len(choice_tensors)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward_of_op(ctx, grad: Tensor, *_):
    saved = ctx.saved_tensors  # once: checkpointing recomputes them for one look
    inputs, cube_tensors = saved[:5], list(saved[14:])
    grads = _backward_op(grad, *inputs, list(saved[5:14]), cube_tensors, ctx.numbers, ctx.scale, ctx.backend)
    grads = (None if x is None else dx for x, dx in zip(inputs, grads, strict=True))
    of_cubes, of_choice = ([None] * n for n in ctx.num_tensors)
    return *grads, of_cubes, None, of_choice, None, None, None, None


_forward_op.register_autograd(_backward_of_op, setup_context=_setup_context)
