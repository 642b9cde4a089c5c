"""SLA2 on GPUs: SLA's kernels, with a weight for each branch: O = alpha O_s + (1 - alpha) O_l.

A small kernel makes both weights of each query block from the log-odds of alpha (`triton.mixing`), once the lists of
some heads are there. The forward kernel multiplies by them in its epilogue. The router's choice is made on the way, as
SLA's is: only pooled queries and keys are projected first.

In the backward the kernel of the query side has the weights too, and gives rowsum(dO * O_s) and rowsum(dO * (1 - alpha)
O_l), of which the gradient of alpha's log-odds is made. The exact branch has the gradient alpha dO. No tensor of its
size is made: with P alpha = exp(S - (LSE - log alpha)) it is that of dO with another LSE. Source: SLA2 (arXiv
2602.12675), Algorithms 2 and 3.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from foveal.blocks import BlockSelection
from foveal.kernels.backend import BackwardCall, QuerySide, backend_named
from foveal.kernels.host import on_device_of
from foveal.kernels.int8 import lse_shift
from foveal.kernels.operator import KernelOperator
from foveal.kernels.triton.backward import output_delta
from foveal.kernels.triton.choice_gradient import GainFacts, exact_gain, linear_loss, scores_gradient
from foveal.kernels.triton.linear import Keys, Means, key_states
from foveal.kernels.triton.lists import column_lists, noncritical_mask, padded_blocks
from foveal.kernels.triton.mixing import write_mix
from foveal.kernels.triton.pooling import pool
from foveal.kernels.triton.select import select
from foveal.kernels.values import LinearTerm, Problem, flatten, linear_term, packable, unflatten
from foveal.methods.sla.gpu import fake_results, made_by_rule, mask_operand, new_selection, used_selection
from foveal.methods.sla.gpu_backward import own_states
from foveal.methods.sla.gpu_forward import Results, forward_in_groups, keys_of
from foveal.methods.sla2.mixing import branches_with_keys, to_tokens
from foveal.methods.sla2.routing import Ranked, Router
from foveal.rules import SelectionRule
from foveal.symbols import ceil_div


@packable
class SLA2Call(NamedTuple):
    """What a call reads.

    query: [B, H, Lq, D]. key, value: [B, H, Lk, D].
    logits: float32 [1, H, Tq], log-odds of alpha.
    scores: those of `Ranked`, or None; only the backward reads them.
    proj_query, proj_key: the router's projections, float32 [D, D] and without their history, for a rule; see
        `projections_of`.
    choice: what was chosen, or a rule for what the router's scores choose on the way.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    logits: Tensor
    scores: Tensor | None
    proj_query: Tensor | None
    proj_key: Tensor | None
    choice: BlockSelection | SelectionRule


class SLA2Options(NamedTuple):
    """What a call does not read from its tensors: `backend` is a backend's name, `temperature` the soft top-k's."""

    scale: float
    temperature: float
    feature_map: str
    backend: str


def projections_of(choice: BlockSelection | SelectionRule, router: Router) -> tuple[Tensor | None, Tensor | None]:
    """What a call reads of the router: nothing where the choice is made."""
    return (None, None) if isinstance(choice, BlockSelection) else _float32(router)


def _float32(router: Router) -> tuple[Tensor | None, Tensor | None]:
    """The projections without their history: the scores have that."""
    if router.query is None and router.key is None:
        return None, None
    known = next(x for x in router if x is not None)
    eye = torch.eye(known.shape[-1], device=known.device)
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


@torch.library.custom_op("foveal::sla2_pool_gpu", mutates_args=())
def pool_gpu(x: Tensor, block: int, sizes: Tensor | None) -> Tensor:
    """`pool_blocks` of half-precision tensors on a GPU."""
    with on_device_of(x):  # Triton launches on the current device
        return pool(x, block, sizes)


@pool_gpu.register_fake
def _(x, block, sizes):
    return x.new_empty((*x.shape[:2], ceil_div(x.shape[2], block), x.shape[3]), dtype=torch.float32)


def _counts(selection: BlockSelection) -> Tensor:
    """int32 [B, H, Tq]: how many blocks each row reads exactly; all, where it sums over none of the others."""
    if selection.marginal is None:
        return selection.critical_count
    _, linear = branches_with_keys(selection)
    return torch.where(linear, selection.critical_count, selection.num_key_blocks)


def _forward(call: SLA2Call, options: SLA2Options, save: bool) -> tuple[tuple[Tensor], tuple[Tensor, ...]]:
    query, key, value, choice = *call[:3], call.choice
    if isinstance(choice, SelectionRule):
        rule, selection = choice, new_selection(query, key, choice, "marginal")
        # What the router leaves is all marginal.
        mask, counts = selection.marginal, selection.critical_count
    else:
        rule, selection = None, choice.with_contiguous_lists()
        mask, counts = mask_operand(selection, "marginal"), _counts(selection)
    mix = call.logits.new_empty((query.shape[0] * query.shape[1], mask.shape[2], 2))

    def weigh(pairs: range) -> None:
        write_mix(call.logits, counts, selection.key_block_sizes, selection.num_key_blocks, pairs, mix)

    term = linear_term(options.feature_map, None, None, query)._replace(mix=mix)
    problem, backend = Problem(query, key, value, selection, options.scale), backend_named(options.backend)
    projections = None if call.proj_query is None else (call.proj_query, call.proj_key)
    results = forward_in_groups(problem, mask, rule, term, backend, save, projections, weigh)
    return results[:1], (*results[1:], mix, *made_by_rule(choice, selection))


def _backward(call: SLA2Call, options: SLA2Options, outputs, saved, grads) -> tuple[Tensor | None, ...]:
    query, key, value, _, scores = call[:5]
    results, mix, (grad,) = Results(*outputs, *saved[:4]), saved[4], grads
    selection = used_selection(call.choice, query, key, saved[5:])
    block_q, (batch, heads, length, _) = selection.block_q, query.shape
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    mask = mask_operand(selection, "marginal").flatten(0, 1)
    term = linear_term(options.feature_map, None, None, query)
    term = term._replace(state=results.state, norm=results.norm, means=results.means, mix=mix)
    backend = backend_named(options.backend)
    grad_query, lse = torch.empty_like(query), results.lse
    dots = lse.new_empty((2, *lse.shape))
    problem = Problem(query, key, value, selection, options.scale)
    exact_dot, linear_dot = dots
    query_side = QuerySide(query, results.output, grad, term, block_q, grad_query, exact_dot, linear_dot=linear_dot)
    loss = None if scores is None else torch.empty_like(scores, memory_format=torch.contiguous_format)
    look = None if loss is None else partial(_write_loss, keys_of(problem, term), mask.shape[2], loss)
    side = own_states(query_side, mask, backend, look)
    key_side = LinearTerm(options.feature_map, state=side.state, norm=side.norm, means=results.means)
    columns = column_lists(selection)
    alpha, rest = mix[:, : selection.num_query_blocks].unflatten(0, (batch, heads)).unbind(-1)
    of_weighted = lse - to_tokens(alpha.log(), block_q, length)[..., 0]
    grads = backend.backward(BackwardCall(problem, grad, exact_dot, of_weighted, columns, grad_query, key_side))
    exact_sum, linear_sum = F.pad(dots, (0, -length % block_q)).unflatten(3, (-1, block_q)).sum(-1)
    # alpha (1 - alpha) (dO . O^s - dO . O^l). Where a branch has no keys, both weights are 1 whatever alpha is.
    of_rows = torch.where(alpha + rest < 2, alpha * (rest * exact_sum - linear_sum), 0)
    grad_logits = of_rows.sum(0, keepdim=True)
    if scores is None:
        return *grads, grad_logits, None
    if backend.centers_keys:
        lse = lse + lse_shift(query, key, selection, options.scale)
    unread = noncritical_mask(selection)
    gain = exact_gain(problem, grad, unread, GainFacts(mix, lse, exact_dot), scores.shape[3])
    of_scores = scores_gradient(scores, options.temperature, unread, gain, loss)
    return *grads, grad_logits, of_scores


def exact_score_gradient(problem: Problem, grad: Tensor, output: Tensor, lse: Tensor, ranked: Ranked) -> Tensor:
    """The gradient of the scores, [B, H, Tq, C], where there is only the exact branch; of half-precision tensors."""
    selection = problem.selection.with_contiguous_lists()
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    unread = noncritical_mask(selection)
    mix = lse.new_ones((lse.shape[0] * lse.shape[1], selection.num_query_blocks, 2))
    facts = GainFacts(mix, lse.contiguous(), output_delta(grad, output, None))
    gain = exact_gain(problem._replace(selection=selection), grad, unread, facts, ranked.scores.shape[3])
    return scores_gradient(ranked.scores, ranked.temperature, unread, gain, None)


def _write_loss(keys: Keys, columns: int, loss: Tensor, pairs: range, grad_state: Tensor, grad_norm: Tensor) -> None:
    """What these pairs lose of the linear branch by a block that is read; the states of their keys are made anew."""
    head_dim = grad_norm.shape[-1]
    state = grad_state.new_empty((len(pairs), columns, head_dim, head_dim))
    norm = grad_norm.new_empty((len(pairs), columns, head_dim))
    means = grad_norm.new_empty((2, len(pairs), head_dim))
    key_states(keys, pairs, None, state, norm, Means(means[0], means[1], None))
    linear_loss(grad_state, grad_norm, state, norm, pairs, loss)


def _fake(call: SLA2Call, options: SLA2Options) -> tuple[tuple[Tensor], tuple[Tensor, ...]]:
    query, choice = call.query, call.choice
    output, *saved = fake_results(query, padded_blocks(ceil_div(query.shape[2], choice.block_q)))
    norm, made = saved[1], ()
    if isinstance(choice, SelectionRule):
        made = made_by_rule(choice, new_selection(query, call.key, choice, "marginal"))
    return (output,), (*saved, norm.new_empty((*norm.shape[:2], 2)), *made)


# alpha O_s + (1 - alpha) O_l, [B, H, Lq, D].
sla2_attention_gpu = KernelOperator(
    "foveal::sla2_gpu", inputs=5, options=SLA2Options, forward=_forward, backward=_backward, fake=_fake
)
