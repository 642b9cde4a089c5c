"""VSA on GPUs: one pass pools and reorders, the fine stage is the block-sparse kernels', one pass gates and returns.
On Hopper the kernels of the fine stage gate and return what they compute themselves.

The coarse stage attends over pooled cubes in float32. Copies in tile order live only inside a pass: the backward makes
its own. Source: VSA (arXiv 2505.13389), section 2.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from foveal.blocks import BlockSelection
from foveal.kernels import api
from foveal.kernels.backend import BackwardCall, Cubes, CubesCall, Gates, RasterGradients, backend_named
from foveal.kernels.choice import append_blocks, choose_in_pieces, with_squares
from foveal.kernels.host import on_device_of
from foveal.kernels.operator import KernelOperator
from foveal.kernels.spans import PARTS
from foveal.kernels.triton.cube_gradients import return_gradients, split_gradient
from foveal.kernels.triton.cubes import pool_cubes
from foveal.kernels.triton.lists import column_lists
from foveal.kernels.triton.pooled import pooled_attention, pooled_attention_backward
from foveal.kernels.triton.scores import NO_SIZES, Sizes
from foveal.kernels.triton.select import select
from foveal.kernels.values import Problem, flatten, packable, unflatten
from foveal.methods.gpu_routing import Scored, projection_gradients, without_history
from foveal.methods.routing import Router
from foveal.methods.vsa.layout import CubeLayout
from foveal.methods.vsa.router import CubeRouter
from foveal.rules import Choosing, SelectionRule, rule_of
from foveal.symbols import ceil_div

# Without gradients, keys and values in tile order take at most so much at a time (1.5 GiB): heads go in groups.
COPIES_BYTES = 3 * 2**29


@packable
class Choice(NamedTuple):
    """Which blocks to attend to.

    rule: how cubes are chosen, by the coarse scores; None where lists are given.
    text_counts: int32 [B or 1], blocks of text that hold a valid key; None without text.
    critical, counts: given lists, int32 [B, H, C, W] and [B, H, C], or None.
    proj_query, proj_key: the projections of a router that a rule chooses by and that does not learn, float32 [D, D] or
        [H, D, D]; None without one.
    """

    rule: SelectionRule | None
    text_counts: Tensor | None = None
    critical: Tensor | None = None
    counts: Tensor | None = None
    proj_query: Tensor | None = None
    proj_key: Tensor | None = None


@packable
class VSACall(NamedTuple):
    """What a call reads.

    query, key, value: [B, H, L, D] and [B, H, L + text, D] twice, in raster order.
    gate_coarse, gate_fine: [B, H, L, D], any strides; None for 1.
    proj_query, proj_key: the projections of a router that learns, as in `Choice`.
    ranked_cubes: how many cubes, the first ones, the router ranks.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    gate_coarse: Tensor | None
    gate_fine: Tensor | None
    proj_query: Tensor | None
    proj_key: Tensor | None
    cubes: Cubes
    choice: Choice
    ranked_cubes: int = 0

    @property
    def router(self) -> Router | None:
        """By which a rule ranks cubes; None for the coarse scores."""
        choice = self.choice
        weights = (choice.proj_query, choice.proj_key) if self.proj_query is None else (self.proj_query, self.proj_key)
        return None if weights[0] is None else Router(*weights)


class VSAOptions(NamedTuple):
    """`temperature` is that of a router's soft top-k, `backend` a backend's name."""

    scale: float
    temperature: float
    backend: str


class Coarse(NamedTuple):
    """The coarse stage: pooled tensors and what it makes of them, float32 [B, H, C, D], and its LSE [B, H, C]."""

    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor
    lse: Tensor


def select_cubes_gpu(
    query: Tensor, key: Tensor, layout: CubeLayout, scale: float, router: CubeRouter | None = None
) -> BlockSelection:
    """The selection that `vsa_attention_gpu` makes, from [B, H, L, D] and [B, H, L + text, D] in raster order."""
    rule = layout.rule()
    weights = (None, None) if router is None else without_history(Router(router.query, router.key))
    flat = *flatten(layout.cubes()), *flatten(rule)
    return layout.selection(*_select_op(query, key, *weights, *flat, scale), rule.ragged())


@torch.library.custom_op("foveal::vsa_select_gpu", mutates_args=())
def _select_op(
    query: Tensor,
    key: Tensor,
    proj_query: Tensor | None,
    proj_key: Tensor | None,
    cube_tensors: list[Tensor],
    cube_numbers: list[int],
    rule_tensors: list[Tensor],
    rule_numbers: list[int],
    scale: float,
) -> tuple[Tensor, Tensor]:
    cubes = unflatten(cube_tensors, cube_numbers)
    with on_device_of(query):  # Triton launches on the current device
        rule = unflatten(rule_tensors, rule_numbers)
        _, ranked = pooled_cubes(*pool_cubes(query, key, None, cubes, score=rule.score)[1:], cubes)
        if proj_query is not None:
            ranked = Router(proj_query, proj_key).project(*ranked)
        return _picked(ranked, cubes, rule, scale)


@_select_op.register_fake
def _(query, key, proj_query, proj_key, cube_tensors, cube_numbers, rule_tensors, rule_numbers, scale):
    rows = (*query.shape[:2], unflatten(cube_tensors, cube_numbers).num_ranked)
    width = unflatten(rule_tensors, rule_numbers).width
    return query.new_empty((*rows, width), dtype=torch.int32), query.new_empty(rows, dtype=torch.int32)


def choice_of(layout: CubeLayout, selection: BlockSelection | None) -> Choice:
    """What a call attends to: a given selection, or what the layout's rule picks."""
    if selection is None:
        return Choice(layout.rule(), layout.text_counts)
    return Choice(None, layout.text_counts, selection.critical, selection.critical_count)


def tiled_call(
    inputs: tuple[Tensor, Tensor, Tensor], gate_coarse: Tensor | None, sizes: Tensor, slot: int, topk: int
) -> VSACall:
    """The call over tokens that come in tile order, padding included, where each cube attends to `topk` cubes.

    Args:
        inputs: query, key, and value [B, H, C * slot, D].
        gate_coarse: [B, H, C * slot, D], or None for 1.
        sizes: int32 [1, C], valid tokens at the front of each slot, at least 1.
        topk: capped at C.
    """
    cubes, device = sizes.shape[1], sizes.device
    place = torch.arange(cubes * slot, device=device).view(-1, slot)
    places = torch.where(torch.arange(slot, device=device) < sizes[0, :, None], place, -1).flatten()
    rule = rule_of(cubes, device, (slot, slot), Choosing(topk=topk))
    return VSACall(
        *inputs, gate_coarse, None, None, None, Cubes(places, sizes, sizes, slot, 0, cubes * slot), Choice(rule)
    )


def _picked(ranked: tuple[Tensor, Tensor], cubes: Cubes, rule: SelectionRule, scale: float) -> tuple[Tensor, Tensor]:
    """The cubes that a rule picks for each cube, int32 [B, H, C, width], ascending, and their counts.

    ranked: of query and key, what `pool_cubes` makes for the rule's score.
    """
    if cubes.num_ranked > api.KERNEL_MAX_BLOCKS:
        return choose_in_pieces(*ranked, scale, rule)
    query, key = ranked
    if rule.spread:
        query = with_squares(query, scale)
    sizes = Sizes(cubes.cube_sizes, cubes.cube_sizes) if rule.quarters else NO_SIZES
    return select(query, key, scale, rule, with_marginal=False, sizes=sizes)[:2]


def lists_of(choice: Choice, ranked: tuple[Tensor, Tensor], cubes: Cubes, scale: float) -> tuple[Tensor, Tensor]:
    """The lists of a choice, contiguous, with the blocks of text behind the cubes that it picks, and their counts."""
    if choice.rule is None:
        return given_lists(choice, cubes)
    lists = _picked(ranked, cubes, choice.rule, scale)
    if choice.text_counts is not None:
        ends = cubes.num_ranked, cubes.num_listed
        lists = append_blocks(*lists, *ends, choice.text_counts, ragged=choice.rule.ragged())
    return cubes.lists_of_slots(*lists)


def given_lists(choice: Choice, cubes: Cubes) -> tuple[Tensor, Tensor]:
    """The lists of slots, contiguous, of a choice that was given."""
    return cubes.lists_of_slots(choice.critical.contiguous(), choice.counts.contiguous())


def pooled_cubes(
    pooled: tuple[Tensor, ...], ranked: tuple[Tensor, ...], cubes: Cubes
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """What `pool_cubes` made of slots, of cubes."""
    if cubes.spans is None:
        return pooled, ranked
    pooled = tuple(map(cubes.spans.means, pooled))
    return pooled, pooled[:2]


def coarse_stage(
    call: VSACall, scale: float, gather: str, router: Router | None = None
) -> tuple[tuple[Tensor, ...], Coarse, BlockSelection]:
    """Copies in tile order of what `gather` names, the coarse stage over cubes, and the selection over slots.

    router: by which a rule ranks cubes; None for the coarse scores.
    """
    score = "mean" if call.choice.rule is None else call.choice.rule.score
    copies, pooled, ranked = pool_cubes(*call[:3], call.cubes, gather=gather, score=score)
    pooled, ranked = pooled_cubes(pooled, ranked, call.cubes)
    if router is not None and call.choice.rule is not None:
        ranked = router.project(*ranked)
    lists = lists_of(call.choice, ranked, call.cubes, scale)
    return copies, Coarse(*pooled, *pooled_attention(*pooled, scale)), call.cubes.selection(*lists)


def used_selection(call: VSACall, made: tuple[Tensor, ...]) -> BlockSelection:
    """The selection that a forward used: that of a given choice, or what `made_lists` returned."""
    return call.cubes.selection(*(made or given_lists(call.choice, call.cubes)))


def made_lists(call: VSACall, selection: BlockSelection) -> tuple[Tensor, ...]:
    """The lists that a rule made; none if they were given."""
    return () if call.choice.rule is None else (selection.critical, selection.critical_count)


def head_groups(call: VSACall, copies: int) -> list[slice]:
    """The heads in groups whose copies in tile order, so many tensors, stay within `COPIES_BYTES`.

    One group of all heads where a rule picks cubes: it may have a ratio for each head.
    """
    batch, heads, _, head_dim = call.query.shape
    rows = call.cubes.key_sizes.shape[1] * call.cubes.slot
    size = copies * batch * heads * rows * head_dim * call.query.itemsize
    groups = 1 if call.choice.rule is not None else min(heads, ceil_div(size, COPIES_BYTES))
    step = ceil_div(heads, groups)
    return [slice(first, min(first + step, heads)) for first in range(0, heads, step)]


def _of_heads(call: VSACall, heads: slice) -> VSACall:
    """The call of some heads."""
    tensors = (None if x is None else x[:, heads] for x in call[:5])
    choice = call.choice._replace(critical=call.choice.critical[:, heads], counts=call.choice.counts[:, heads])
    return call._replace(**dict(zip(call._fields, tensors, strict=False)), choice=choice)


def _attend(call: VSACall, options: VSAOptions, save: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The output, and what a backward reads if there will be one."""
    backend, scale, gates = backend_named(options.backend), options.scale, Gates(call.gate_coarse, call.gate_fine)
    copies, coarse, selection = coarse_stage(call, scale, backend.cube_copies, call.router)
    save_fine = save and gates.fine is not None
    output_of_slots = call.cubes.of_slots(coarse.output)
    given = CubesCall(call.query, copies, call.cubes, selection, output_of_slots, gates, scale, save_fine)
    coarse = coarse if save else ()  # nobody else holds what was pooled while the fine stage takes memory
    output, fine, lse = backend.attend_cubes(given)
    of_fine = (fine,) if save_fine else ()
    return output, (lse, *coarse, *of_fine, *made_lists(call, selection))


def _forward(call: VSACall, options: VSAOptions, save: bool) -> tuple[tuple[Tensor], tuple[Tensor, ...]]:
    groups = [] if save else head_groups(call, len(backend_named(options.backend).cube_copies))
    if len(groups) < 2:
        output, saved = _attend(call, options, save)
        return (output,), saved
    output = call.cubes.new_like(call.query)
    for heads in groups:
        output[:, heads] = _attend(_of_heads(call, heads), options, save)[0]
    return (output,), ()


def _backward(call: VSACall, options: VSAOptions, outputs, saved, grads) -> tuple[Tensor | None, ...]:
    inputs, backend, scale = call[:3], backend_named(options.backend), options.scale
    lse, *saved = saved
    coarse, saved = Coarse(*saved[:5]), saved[5:]
    # Of in tile order with a fine gate, else the output.
    (attended,), made = (outputs, saved) if call.gate_fine is None else (saved[:1], saved[1:])
    (grad,), selection = grads, used_selection(call, made)
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    columns = column_lists(selection)
    gates, spans = Gates(call.gate_coarse, call.gate_fine), call.cubes.spans
    split = split_gradient(grad, attended, call.cubes.of_slots(coarse.output), gates, call.cubes)
    grad_fine, delta, grad_coarse, grad_gates = split
    del split
    pooled = pooled_attention_backward(grad_coarse if spans is None else spans.sums(grad_coarse), *coarse, scale)
    if spans is not None:
        pooled = tuple(map(spans.gradients, pooled))
    copies, *_ = pool_cubes(*inputs, call.cubes, gather="qkv", pool=False)
    fine = BackwardCall(Problem(*copies, selection, scale, call.cubes.uniform), grad_fine, delta, lse, columns)
    of_router = weights = call.proj_query, call.proj_key
    if call.proj_query is not None:  # before the copies may be overwritten
        scored = Scored.of((coarse.query, coarse.key[:, :, : call.ranked_cubes]), weights, None, scale)
        given = scored, weights, options.temperature
        of_router = projection_gradients(fine, *given, centers_keys=backend.centers_keys)
    if backend.writes_raster:
        grads = tuple(call.cubes.new_like(x) for x in inputs)
        backend.backward(fine._replace(raster=RasterGradients(grads, pooled, call.cubes)))
    else:
        copies = backend.backward(fine)
        # Before the results: what they take, the gradients in raster order can have.
        del fine, grad_fine
        grads = tuple(call.cubes.new_like(x) for x in inputs)
        return_gradients(copies, RasterGradients(grads, pooled, call.cubes))
    return *grads, *grad_gates, *of_router


def fake_coarse(call: VSACall) -> Coarse:
    """Tensors like what the coarse stage leaves."""
    rows = (*call.query.shape[:2], call.cubes.num_ranked)
    shapes = *((*rows, call.query.shape[3]) for _ in range(4)), rows
    return Coarse(*(call.query.new_empty(shape, dtype=torch.float32) for shape in shapes))


def fake_lists(call: VSACall) -> tuple[Tensor, ...]:
    """Tensors like those of `made_lists`."""
    query, cubes, rule = call.query, call.cubes, call.choice.rule
    if rule is None:
        return ()
    rows, width = (*query.shape[:2], cubes.num_cubes), rule.width + cubes.num_listed - cubes.num_ranked
    shapes = (*rows, width if cubes.spans is None else PARTS * width), rows
    return tuple(query.new_empty(shape, dtype=torch.int32) for shape in shapes)


def in_tile_order(call: VSACall) -> Tensor:
    """A tensor like the queries in tile order, of which only the shape and the dtype count."""
    batch, heads, _, head_dim = call.query.shape
    return call.query.new_empty((batch, heads, call.cubes.num_cubes * call.cubes.slot, head_dim))


def _fake(call: VSACall, options: VSAOptions) -> tuple[tuple[Tensor], tuple[Tensor, ...]]:
    fine = in_tile_order(call)
    lse, of_fine = fine.new_empty(fine.shape[:3], dtype=torch.float32), () if call.gate_fine is None else (fine,)
    return (torch.empty_like(call.query),), (lse, *fake_coarse(call), *of_fine, *fake_lists(call))


# O = Gc * Oc + Gf * Of, [B, H, L, D] in raster order; the backend's kernels do the fine stage.
vsa_attention_gpu = KernelOperator(
    "foveal::vsa_gpu",
    inputs=7,
    options=VSAOptions,
    forward=_forward,
    backward=_backward,
    fake=_fake,
    keeps=lambda call: call.gate_fine is None,
)
