"""SLA on GPUs: the linear branch rides in the epilogue of the block-sparse forward, and shares its backward's passes.

The marginal sum H is one batched GEMM of the block mask with the key states, and so is the sum over its gradients. H is
saved for the backward, as the paper has it, at head_dim / block_q times the memory of Q.
Source: SLA (arXiv 2509.24006), Algorithms 1 and 2.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from foveal.blocks import BlockSelection
from foveal.kernels.backend import backend_named
from foveal.kernels.operator import KernelOperator
from foveal.kernels.triton.lists import noncritical_mask, padded_blocks
from foveal.kernels.triton.picking import new_lists
from foveal.kernels.values import Problem, copied_weight, linear_term, needs_copy, packable
from foveal.methods.sla.gpu_backward import gradients
from foveal.methods.sla.gpu_forward import Results, forward_in_groups
from foveal.rules import SelectionRule
from foveal.symbols import ceil_div


@packable
class SLACall(NamedTuple):
    """What a call reads.

    query: [B, H, Lq, D]. key, value: [B, H, Lk, D].
    weight, bias: W and b, [D, D] and [D], or None.
    choice: what was chosen, or a rule to apply on the way: one pass over K and V serves both.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    weight: Tensor | None
    bias: Tensor | None
    choice: BlockSelection | SelectionRule


class SLAOptions(NamedTuple):
    """What a call does not read from its tensors: `scope` is the config's linear_scope, `backend` a backend's name."""

    scale: float
    feature_map: str
    scope: str
    backend: str


def linear_branch_gpu(call: SLACall, options: SLAOptions) -> Tensor:
    """Only O^l W^T + b of a call whose choice is a selection: the same kernels, which get no block to read exactly."""
    mask = call.choice.linear_mask(options.scope)
    nothing = dataclasses.replace(
        call.choice,
        critical=torch.zeros_like(call.choice.critical[..., :1]),
        critical_count=torch.zeros_like(call.choice.critical_count),
        marginal=mask,
    )
    options = options._replace(scope="all" if mask is None else "marginal")
    return sla_attention_gpu(call._replace(choice=nothing), options)[0]


def new_selection(query: Tensor, key: Tensor, rule: SelectionRule, scope: str) -> BlockSelection:
    """Memory for what a rule chooses. Its marginal mask is padded, as the products want it; None over all keys."""
    return BlockSelection.by_rule(rule, query, key, *new_lists(query, key, rule, with_marginal=scope != "all"))


def made_by_rule(choice: BlockSelection | SelectionRule, selection: BlockSelection) -> tuple[Tensor, ...]:
    """What a rule made of a selection: lists, counts, and a mask if there is one; nothing if it was given."""
    if not isinstance(choice, SelectionRule):
        return ()
    lists = selection.critical, selection.critical_count
    return lists if selection.marginal is None else (*lists, selection.marginal)


def used_selection(
    choice: BlockSelection | SelectionRule, query: Tensor, key: Tensor, made: tuple[Tensor, ...]
) -> BlockSelection:
    """The selection that a forward used: the given one, or what `made_by_rule` returned of it."""
    if isinstance(choice, SelectionRule):
        return BlockSelection.by_rule(choice, query, key, *made)
    return choice.with_contiguous_lists()


def mask_operand(selection: BlockSelection, scope: str) -> Tensor | None:
    """The block mask as a GEMM operand, bfloat16 [B, H, padded Tq, padded Tk]; None to sum over every key."""
    if scope == "all":
        return None
    if scope != "marginal" or selection.marginal is None:
        return noncritical_mask(selection)
    marginal = selection.marginal
    rows, columns = marginal.shape[-2:]
    marginal = marginal if marginal.dtype == torch.bfloat16 else (marginal != 0).to(torch.bfloat16)
    padding = (0, padded_blocks(columns) - columns, 0, padded_blocks(rows) - rows)
    return F.pad(marginal, padding) if any(padding) else marginal


def _forward(call: SLACall, options: SLAOptions, save: bool) -> tuple[tuple[Tensor], tuple[Tensor, ...]]:
    query, key, value, weight, bias, choice = call
    if isinstance(choice, SelectionRule):
        rule, selection = choice, new_selection(query, key, choice, options.scope)
        mask = selection.marginal
    else:
        rule, selection = None, choice.with_contiguous_lists()
        mask = mask_operand(selection, options.scope)
    term = linear_term(options.feature_map, weight, bias, query)
    backend = backend_named(options.backend)
    problem = Problem(query, key, value, selection, options.scale)
    output, *saved = forward_in_groups(problem, mask, rule, term, backend, save)
    return (output,), (*saved, *made_by_rule(choice, selection), *copied_weight(weight, term))


def _backward(call: SLACall, options: SLAOptions, outputs, saved, grads) -> tuple[Tensor | None, ...]:
    query, key, value, weight, bias, choice = call
    results, made, operand = Results(*outputs, *saved[:4]), saved[4:], weight
    if needs_copy(weight):
        *made, operand = made
    (grad,) = grads
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    selection = used_selection(choice, query, key, made)
    mask = selection.marginal if made else mask_operand(selection, options.scope)
    mask = None if mask is None else mask.flatten(0, 1)
    term = linear_term(options.feature_map, operand, bias, query)
    backend = backend_named(options.backend)
    problem = Problem(query, key, value, selection, options.scale)
    *grads, grad_weight, grad_bias = gradients(problem, grad, results, mask, term, backend)
    grad_weight = None if weight is None else grad_weight.to(weight.dtype)
    return *grads, grad_weight, None if bias is None else grad_bias.to(bias.dtype)


def fake_results(query: Tensor, rows: int) -> Results:
    """Tensors like what the forward leaves for a backward, with so many rows of states."""
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    pairs, head_dim = query.shape[0] * query.shape[1], query.shape[3]
    norm = lse.new_empty((pairs, rows, head_dim))
    state = query.new_empty((pairs, rows, head_dim, head_dim), dtype=torch.bfloat16)
    return Results(torch.empty_like(query), lse, norm, state, lse.new_empty((2, pairs, 1, head_dim)))


def fake_copy(weight: Tensor | None) -> tuple[Tensor, ...]:
    """Tensors like those of `copied_weight`."""
    return (weight.new_empty(weight.shape, dtype=torch.bfloat16),) if needs_copy(weight) else ()


def _fake(call: SLACall, options: SLAOptions) -> tuple[tuple[Tensor], tuple[Tensor, ...]]:
    query, key, *_, choice = call
    rows = 1 if options.scope == "all" else padded_blocks(ceil_div(query.shape[2], choice.block_q))
    output, *saved = fake_results(query, rows)
    made = ()
    if isinstance(choice, SelectionRule):
        made = made_by_rule(choice, new_selection(query, key, choice, options.scope))
    return (output,), (*saved, *made, *fake_copy(call.weight))


# O = O^s + O^l W^T + b, [B, H, Lq, D]; for the feature maps "softmax", "elu" and "relu". The backend's kernels do the
# sparse part and its epilogue; the rest is Triton's on every GPU.
sla_attention_gpu = KernelOperator(
    "foveal::sla_gpu", inputs=5, options=SLAOptions, forward=_forward, backward=_backward, fake=_fake
)
