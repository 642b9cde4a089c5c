"""SLA2 on GPUs: SLA's kernels, whose output gives alpha O_s + (1 - alpha) O_l without a kernel of its own.

The forward kernel adds O_l to O_s in its epilogue. O_l divides by phi(Q) Z, so Z alpha / (1 - alpha) in place of Z
makes it O_s + (1 - alpha) / alpha O_l, and one pass over the output multiplies that by alpha. The router's choice is
made on the way, as SLA's is: only pooled queries and keys are projected first.

In the backward Z / (1 - alpha) makes the linear term the whole (1 - alpha) O_l. The kernel of the query side then gives
delta = alpha dO . O_s, which the sparse branch needs with its gradient alpha dO, and with t = dO . O the gradient of
alpha's log-odds is the sum of delta - alpha t over the rows. Source: SLA2 (arXiv 2602.12675), Algorithms 2 and 3.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from foveal.blocks import BlockSelection
from foveal.kernels.backend import backend_named
from foveal.kernels.host import is_plain, on_device_of, refuse_forward_mode
from foveal.kernels.int8 import lse_shift
from foveal.kernels.replay import replayed
from foveal.kernels.triton.backward import output_delta
from foveal.kernels.triton.lists import column_lists, padded_blocks
from foveal.kernels.triton.pooling import pool
from foveal.kernels.triton.select import select
from foveal.kernels.values import LinearTerm, flatten, linear_term, unflatten
from foveal.methods.sla.gpu import made_by_rule, made_selection, mask_operand, new_selection
from foveal.methods.sla.gpu_backward import own_states
from foveal.methods.sla.gpu_forward import Results, forward_in_groups
from foveal.methods.sla2.mixing import branch_weights, branches_with_keys, to_tokens
from foveal.methods.sla2.routing import Ranked, Router, RowFacts, score_gradient
from foveal.rules import SelectionRule
from foveal.symbols import ceil_div


class Options(NamedTuple):
    """What a call does not read from its tensors: `backend` is a backend's name, `temperature` the soft top-k's."""

    scale: float
    feature_map: str
    temperature: float
    backend: str


def sla2_attention_gpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    choice: BlockSelection | SelectionRule,
    router: Router,
    logits: Tensor,
    ranked: Ranked | None,
    options: Options,
) -> Tensor:
    """alpha O_s + (1 - alpha) O_l, [B, H, Lq, D], differentiable, in the scores of `ranked` too.

    Args:
        choice: what was chosen, or a rule for what the router's scores choose on the way.
        logits: float32 [1, H, Tq], log-odds of alpha.
    """
    scores = None if ranked is None else ranked.scores
    inputs = query, key, value, logits, scores
    refuse_forward_mode(*inputs)
    train = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    projections = (None, None) if isinstance(choice, BlockSelection) else _float32(router)
    if is_plain(*inputs, *projections):
        tensors, numbers = flatten(choice)
        given = tuple(numbers), options, train
        if train:
            return _Attention.apply(given, *inputs, *projections, *tensors)
        return replayed(_flat_forward, (*inputs[:4], *projections, *tensors), given)[0][0]
    return _forward_op(*inputs, *projections, *flatten(choice), *options, train)[0]


def _float32(router: Router) -> tuple[Tensor | None, Tensor | None]:
    """The projections without their history: the scores have that."""
    if router.query is None and router.key is None:
        return None, None
    known = next(x for x in router if x is not None)
    eye = torch.eye(known.shape[0], device=known.device)
    return tuple(eye if x is None else x.detach().float() for x in router)


def choose_gpu(query: Tensor, key: Tensor, rule: SelectionRule, router: Router, scale: float) -> tuple[Tensor, Tensor]:
    """The lists and counts of a rule over the router's scores; `BlockSelection` has their shapes."""
    return _choose_op(query.detach(), key.detach(), *_float32(router), *flatten(rule), scale)


@torch.library.custom_op("foveal::sla2_choose_gpu", mutates_args=())
def _choose_op(
    query: Tensor,
    key: Tensor,
    proj_query: Tensor | None,
    proj_key: Tensor | None,
    rule_tensors: list[Tensor],
    rule_numbers: list[int],
    scale: float,
) -> tuple[Tensor, Tensor]:
    rule, router = unflatten(rule_tensors, rule_numbers), Router(proj_query, proj_key)
    with on_device_of(query):  # Triton launches on the current device
        pooled = router.project(pool(query, rule.block_q), pool(key, rule.block_k, rule.key_block_sizes))
        return select(*pooled, scale, rule, with_marginal=False)[:2]


@_choose_op.register_fake
def _(query, key, proj_query, proj_key, rule_tensors, rule_numbers, scale):
    rule = unflatten(rule_tensors, rule_numbers)
    rows = (*query.shape[:2], ceil_div(query.shape[2], rule.block_q))
    return query.new_empty((*rows, rule.width), dtype=torch.int32), query.new_empty(rows, dtype=torch.int32)


def _in_pairs(rows: Tensor, query: Tensor, padded: int) -> Tensor:
    """[B or 1, H, Tq] to float32 [B * H, padded Tq], 1 in the padding."""
    rows = rows.float().expand(query.shape[0], -1, -1)
    return F.pad(rows, (0, padded - rows.shape[2]), value=1.0).flatten(0, 1)


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    logits: Tensor,
    projections: tuple[Tensor | None, Tensor | None],
    choice: BlockSelection | SelectionRule,
    options: Options,
    keep_states: bool,
) -> tuple[Results, BlockSelection]:
    """The results, and the selection that was given or made."""
    odds, alpha = torch.exp(logits), torch.sigmoid(logits)
    with on_device_of(query):  # Triton launches on the current device
        if isinstance(choice, SelectionRule):
            rule, selection = choice, new_selection(query, key, choice, "marginal")
            mask = selection.marginal
        else:
            rule, selection = None, choice.with_contiguous_lists()
            mask = mask_operand(selection, "marginal")
            both = torch.logical_and(*branches_with_keys(selection))
            odds = torch.where(both, odds, 1)
        term, backend = linear_term(options.feature_map, None, None, query), backend_named(options.backend)
        given = query, key, value, selection, mask, rule, term, options.scale, backend, keep_states
        norm_scale = _in_pairs(odds, query, mask.shape[2])
        results = forward_in_groups(*given, None if projections[0] is None else projections, norm_scale)
        if rule is not None:
            # What the router leaves is all marginal: counts say so without a look at the mask.
            both = torch.logical_and(*branches_with_keys(dataclasses.replace(selection, marginal=None)))
        results.output.mul_(to_tokens(torch.where(both, alpha, 1), selection.block_q, query.shape[2]))
    return results, selection


def _backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    logits: Tensor,
    scores: Tensor | None,
    results: Results,
    selection: BlockSelection,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """The gradients of query, key, value, logits, and scores."""
    assert results.state.shape[0] > 0, "the forward was told that no backward follows"
    block_q, length = selection.block_q, query.shape[2]
    with on_device_of(query):
        grad = grad if grad.stride(-1) == 1 else grad.contiguous()
        alpha, rest = branch_weights(logits, selection)
        both = torch.logical_and(*branches_with_keys(selection))
        mask = mask_operand(selection, "marginal").flatten(0, 1)
        norm_scale = _in_pairs(torch.where(rest > 0, 1 / rest, 1), query, mask.shape[1])
        term = linear_term(options.feature_map, None, None, query)
        # O^l of a Z that is larger by a factor is smaller by it, and so is its share of m.
        norm, means = results.norm * norm_scale[..., None], results.means / norm_scale[..., None]
        term = term._replace(state=results.state, norm=norm, means=means)
        backend, output = backend_named(options.backend), results.output
        grad_query, delta = torch.empty_like(query), torch.empty_like(results.lse)
        side = own_states(grad, query, output, term, mask, block_q, grad_query, delta, backend, norm_scale)
        total, alpha_tokens = output_delta(grad, output, None), to_tokens(alpha, block_q, length)
        of_exact = torch.empty_like(grad)
        torch.mul(grad, alpha_tokens, out=of_exact)
        key_side = LinearTerm(options.feature_map, state=side.state, norm=side.norm, means=results.means)
        lists = selection, column_lists(selection), options.scale
        grads = backend.backward(of_exact, query, key, value, delta, results.lse, *lists, grad_query, key_side)
        of_rows = F.pad(delta - alpha_tokens[..., 0] * total, (0, -length % block_q)).unflatten(2, (-1, block_q))
        grad_logits = torch.where(both, of_rows.sum(-1), 0).sum(0, keepdim=True)
        if scores is None:
            return *grads, grad_logits, None
        lse = results.lse
        if backend.centers_keys:
            lse = lse + lse_shift(query, key, selection, options.scale)
        facts = RowFacts(alpha, rest, lse, delta, total - delta)
        ranked = Ranked(scores, options.temperature)
        of_scores = score_gradient(
            grad, query, key, value, ranked, selection, facts, options.feature_map, options.scale
        )
    return *grads, grad_logits, of_scores


def _flat_forward(tensors: Sequence[Tensor | None], given: tuple) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """`_forward` for `replayed`: `Results` and a flat selection, and the selection's numbers; else only the output."""
    numbers, options, keep_states = given
    choice = unflatten(tensors[6:], numbers)
    results, selection = _forward(*tensors[:4], tuple(tensors[4:6]), choice, options, keep_states)
    if not keep_states:
        return (results.output,), ()
    tensors, numbers = flatten(selection)
    return (*results, *tensors), tuple(numbers)


def _flat_backward(tensors: Sequence[Tensor | None], given: tuple) -> tuple[tuple[Tensor | None, ...], None]:
    """`_backward` for `replayed`, of the gradient, the inputs, and what `_flat_forward` returned."""
    numbers, options = given
    return _backward(*tensors[:6], Results(*tensors[6:11]), unflatten(tensors[11:], numbers), options), None


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, given, *tensors):
        inputs, scores = tensors[:4], tensors[4]
        results, numbers = replayed(_flat_forward, (*inputs, *tensors[5:]), given)
        ctx.num_inputs, ctx.given = len(tensors), (numbers, given[1])
        ctx.save_for_backward(*inputs, scores, *results)
        return results[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        saved = ctx.saved_tensors  # once: checkpointing recomputes them for one look
        grads, _ = replayed(_flat_backward, (grad, *saved), ctx.given)
        return None, *grads, *[None] * (ctx.num_inputs - 5)


@torch.library.custom_op("foveal::sla2_gpu_fwd", mutates_args=())
def _forward_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    logits: Tensor,
    scores: Tensor | None,
    proj_query: Tensor | None,
    proj_key: Tensor | None,
    choice_tensors: list[Tensor],
    choice_numbers: list[int],
    scale: float,
    feature_map: str,
    temperature: float,
    backend: str,
    keep_states: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`Results`, and the lists, counts and marginal mask that a rule made, which are empty for a selection."""
    choice = unflatten(choice_tensors, choice_numbers)
    options, projections = Options(scale, feature_map, temperature, backend), (proj_query, proj_key)
    results, selection = _forward(query, key, value, logits, projections, choice, options, keep_states)
    # An op may not return what it was given.
    return *results, *made_by_rule(query, selection if isinstance(choice, SelectionRule) else None)


@_forward_op.register_fake
def _(query, key, value, logits, scores, proj_query, proj_key, choice_tensors, choice_numbers, *rest):
    *_, keep_states = rest
    choice = unflatten(choice_tensors, choice_numbers)
    batch, heads, length, head_dim = query.shape
    rows, kept = padded_blocks(ceil_div(length, choice.block_q)), batch * heads if keep_states else 0
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    norm = lse.new_empty((kept, rows, head_dim))
    state = query.new_empty((kept, rows, head_dim, head_dim), dtype=torch.bfloat16)
    means = lse.new_empty((2, kept, 1, head_dim))
    made = new_selection(query, key, choice, "marginal") if isinstance(choice, SelectionRule) else None
    return torch.empty_like(query), lse, norm, state, means, *made_by_rule(query, made)


@torch.library.custom_op("foveal::sla2_gpu_bwd", mutates_args=())
def _backward_op(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    logits: Tensor,
    scores: Tensor | None,
    saved: list[Tensor],
    selection_numbers: list[int],
    scale: float,
    feature_map: str,
    temperature: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients, that of scores empty where these are None; `saved` is `Results` and a selection."""
    selection, options = unflatten(saved[5:], selection_numbers), Options(scale, feature_map, temperature, backend)
    grads = _backward(grad, query, key, value, logits, scores, Results(*saved[:5]), selection, options)
    return tuple(grad.new_empty(0) if x is None else x for x in grads)


@_backward_op.register_fake
def _(grad, query, key, value, logits, scores, *rest):
    of_scores = grad.new_empty(0) if scores is None else torch.empty_like(scores)
    return *(torch.empty_like(x) for x in (query, key, value, logits)), of_scores


def _setup_context(ctx, inputs, output) -> None:
    query, key, value, logits, scores, _, _, choice_tensors, choice_numbers, *ctx.options, _ = inputs
    *results, lists, counts, marginal = output
    choice = made_selection(unflatten(choice_tensors, choice_numbers), query, key, lists, counts, marginal)
    tensors, ctx.numbers = flatten(choice)
    ctx.num_choice_tensors = len(choice_tensors)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(query, key, value, logits, scores, *results, *tensors)


def _backward_of_op(ctx, grad: Tensor | None, *_):
    saved = ctx.saved_tensors  # once: checkpointing recomputes them for one look
    inputs = saved[:5]
    grads = _backward_op(grad, *inputs, list(saved[5:]), ctx.numbers, *ctx.options)
    grads = (None if x is None else dx for x, dx in zip(inputs, grads, strict=True))
    return *grads, None, None, [None] * ctx.num_choice_tensors, *[None] * 6


_forward_op.register_autograd(_backward_of_op, setup_context=_setup_context)
