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
from foveal.kernels.triton.lists import column_lists, padded_blocks
from foveal.kernels.triton.pooling import pool
from foveal.kernels.triton.select import select
from foveal.kernels.values import LinearTerm, Problem, flatten, linear_term, packable, unflatten
from foveal.methods.sla.gpu import fake_results, made_by_rule, mask_operand, new_selection, used_selection
from foveal.methods.sla.gpu_backward import own_states
from foveal.methods.sla.gpu_forward import Results, forward_in_groups
from foveal.methods.sla2.mixing import branch_weights, branches_with_keys, to_tokens
from foveal.methods.sla2.routing import Ranked, Router, RowFacts, score_gradient
from foveal.rules import SelectionRule
from foveal.symbols import ceil_div


@packable
class SLA2Call(NamedTuple):
    """What a call reads.

    query: [B, H, Lq, D]. key, value: [B, H, Lk, D].
    logits: float32 [1, H, Tq], log-odds of alpha.
    scores: those of `Ranked`, or None; only the backward reads them.
    proj_query, proj_key: the router's projections, float32 and without their history, for a rule; see `projections_of`.
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


def _forward(call: SLA2Call, options: SLA2Options, save: bool) -> tuple[tuple[Tensor], tuple[Tensor, ...]]:
    query, key, value, choice = *call[:3], call.choice
    odds, alpha = torch.exp(call.logits), torch.sigmoid(call.logits)
    if isinstance(choice, SelectionRule):
        rule, selection = choice, new_selection(query, key, choice, "marginal")
        mask = selection.marginal
    else:
        rule, selection = None, choice.with_contiguous_lists()
        mask = mask_operand(selection, "marginal")
        both = torch.logical_and(*branches_with_keys(selection))
        odds = torch.where(both, odds, 1)
    term, backend = linear_term(options.feature_map, None, None, query), backend_named(options.backend)
    problem = Problem(query, key, value, selection, options.scale)
    norm_scale = _in_pairs(odds, query, mask.shape[2])
    projections = None if call.proj_query is None else (call.proj_query, call.proj_key)
    output, *saved = forward_in_groups(problem, mask, rule, term, backend, save, projections, norm_scale)
    if rule is not None:
        # What the router leaves is all marginal: counts say so without a look at the mask.
        both = torch.logical_and(*branches_with_keys(dataclasses.replace(selection, marginal=None)))
    output.mul_(to_tokens(torch.where(both, alpha, 1), selection.block_q, query.shape[2]))
    return (output,), (*saved, *made_by_rule(choice, selection))


def _backward(call: SLA2Call, options: SLA2Options, outputs, saved, grads) -> tuple[Tensor | None, ...]:
    query, key, value, logits, scores = call[:5]
    results, (grad,) = Results(*outputs, *saved[:4]), grads
    selection = used_selection(call.choice, query, key, saved[4:])
    block_q, length = selection.block_q, query.shape[2]
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
    query_side = QuerySide(query, output, grad, term, block_q, grad_query, delta)
    side = own_states(query_side, mask, backend, norm_scale)
    total, alpha_tokens = output_delta(grad, output, None), to_tokens(alpha, block_q, length)
    of_exact = torch.empty_like(grad)
    torch.mul(grad, alpha_tokens, out=of_exact)
    key_side = LinearTerm(options.feature_map, state=side.state, norm=side.norm, means=results.means)
    problem, columns = Problem(query, key, value, selection, options.scale), column_lists(selection)
    grads = backend.backward(BackwardCall(problem, of_exact, delta, results.lse, columns, grad_query, key_side))
    of_rows = F.pad(delta - alpha_tokens[..., 0] * total, (0, -length % block_q)).unflatten(2, (-1, block_q))
    grad_logits = torch.where(both, of_rows.sum(-1), 0).sum(0, keepdim=True)
    if scores is None:
        return *grads, grad_logits, None
    lse = results.lse
    if backend.centers_keys:
        lse = lse + lse_shift(query, key, selection, options.scale)
    facts = RowFacts(alpha, rest, lse, delta, total - delta)
    ranked = Ranked(scores, options.temperature)
    of_scores = score_gradient(problem, grad, ranked, facts, options.feature_map)
    return *grads, grad_logits, of_scores


def _fake(call: SLA2Call, options: SLA2Options) -> tuple[tuple[Tensor], tuple[Tensor, ...]]:
    query, choice = call.query, call.choice
    output, *saved = fake_results(query, padded_blocks(ceil_div(query.shape[2], choice.block_q)))
    made = ()
    if isinstance(choice, SelectionRule):
        made = made_by_rule(choice, new_selection(query, call.key, choice, "marginal"))
    return (output,), (*saved, *made)


# alpha O_s + (1 - alpha) O_l, [B, H, Lq, D].
sla2_attention_gpu = KernelOperator(
    "foveal::sla2_gpu", inputs=5, options=SLA2Options, forward=_forward, backward=_backward, fake=_fake
)
