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
from foveal.kernels.int8 import lse_shift
from foveal.kernels.operator import KernelOperator
from foveal.kernels.triton.choice_gradient import GainFacts, exact_gain, linear_loss, scores_gradient
from foveal.kernels.triton.linear import Keys, Means, key_states
from foveal.kernels.triton.lists import column_lists, noncritical_mask, padded_blocks
from foveal.kernels.triton.mixing import write_mix
from foveal.kernels.values import LinearTerm, Problem, linear_term, packable
from foveal.methods.gpu_routing import Scored
from foveal.methods.sla.gpu import fake_results, made_by_rule, mask_operand, new_selection, used_selection
from foveal.methods.sla.gpu_backward import own_states
from foveal.methods.sla.gpu_forward import Results, forward_in_groups, keys_of
from foveal.methods.sla2.gpu_choice import pooled
from foveal.methods.sla2.mixing import branches_with_keys, to_tokens
from foveal.rules import SelectionRule
from foveal.symbols import ceil_div


@packable
class SLA2Call(NamedTuple):
    """What a call reads.

    query: [B, H, Lq, D]. key, value: [B, H, Lk, D].
    logits: float32 [1, H, Tq], log-odds of alpha.
    proj_query, proj_key, fixed_query, fixed_key, ranked: the fields of a `CallRouter`.
    choice: what was chosen, or a rule for what the router's scores choose on the way.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    logits: Tensor
    proj_query: Tensor | None
    proj_key: Tensor | None
    fixed_query: Tensor | None
    fixed_key: Tensor | None
    ranked: Tensor | None
    choice: BlockSelection | SelectionRule

    @property
    def projections(self) -> tuple[Tensor, Tensor] | None:
        """By which a rule chooses, float32 [D, D] or [B * H, D, D]; None for the means as they are."""
        weights = (self.fixed_query, self.fixed_key) if self.proj_query is None else (self.proj_query, self.proj_key)
        if weights[0] is None:
            return None
        return tuple(x if x.dim() == 2 else x.repeat(self.query.shape[0], 1, 1) for x in weights)


class SLA2Options(NamedTuple):
    """What a call does not read from its tensors: `backend` is a backend's name, `temperature` the soft top-k's."""

    scale: float
    temperature: float
    feature_map: str
    backend: str


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
    results = forward_in_groups(problem, mask, rule, term, backend, save, call.projections, weigh)
    return results[:1], (*results[1:], mix, *made_by_rule(choice, selection))


def _backward(call: SLA2Call, options: SLA2Options, outputs, saved, grads) -> tuple[Tensor | None, ...]:
    query, key, value = call[:3]
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
    weights = call.proj_query, call.proj_key
    scored = look = None
    if call.proj_query is not None:
        scored = Scored.of(pooled(query, key, selection), weights, call.ranked, options.scale)
        loss = torch.empty_like(scored.scores, memory_format=torch.contiguous_format)
        look = partial(_write_loss, keys_of(problem, term), mask.shape[2], loss)
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
    if scored is None:
        return *grads, grad_logits, None, None
    if backend.centers_keys:
        lse = lse + lse_shift(query, key, selection, options.scale)
    unread = noncritical_mask(selection)
    gain = exact_gain(problem, grad, unread, GainFacts(mix, lse, exact_dot), scored.scores.shape[3])
    of_scores = scores_gradient(scored.scores, options.temperature, unread, gain, loss)
    return *grads, grad_logits, *scored.gradients(of_scores, weights, options.scale)


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
    "foveal::sla2_gpu", inputs=6, options=SLA2Options, forward=_forward, backward=_backward, fake=_fake
)
