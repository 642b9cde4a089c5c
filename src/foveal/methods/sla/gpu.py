"""SLA on GPUs: the linear branch rides in the epilogue of the block-sparse forward, and shares its backward's passes.

The marginal sum H is one batched GEMM of the block mask with the key states, and so is the sum over its gradients. H is
saved for the backward, as the paper has it, at head_dim / block_q times the memory of Q.

There is one forward and one backward. Plain eager calls reach them through one autograd function; under
`torch.compile`, modes and transforms they are a pair of custom ops. Source: SLA (arXiv 2509.24006), Algorithms 1 and 2.
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
from foveal.kernels.replay import replayed
from foveal.kernels.triton.lists import noncritical_mask, padded_blocks
from foveal.kernels.triton.picking import new_lists
from foveal.kernels.values import flatten, linear_term, unflatten
from foveal.methods.sla.config import SLAConfig
from foveal.methods.sla.gpu_backward import gradients
from foveal.methods.sla.gpu_forward import Results, forward_in_groups
from foveal.rules import SelectionRule
from foveal.symbols import ceil_div


class Options(NamedTuple):
    """What a call does not read from its tensors: `scope` is the config's linear_scope, `backend` a backend's name."""

    scale: float
    feature_map: str
    scope: str
    backend: str


def sla_attention_gpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    config: SLAConfig,
    choice: BlockSelection | SelectionRule,
    scale: float,
    proj_weight: Tensor | None,
    proj_bias: Tensor | None,
    backend: str,
) -> Tensor:
    """O = O^s + O^l W^T + b, [B, H, Lq, D], differentiable; for the feature maps "softmax", "elu" and "relu".

    A rule instead of a selection is applied on the way: one pass over K and V serves both. The backend's kernels do the
    sparse part and its epilogue; the rest is Triton's on every GPU.
    """
    inputs = query, key, value, proj_weight, proj_bias
    refuse_forward_mode(*inputs)
    train = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    options = Options(scale, config.feature_map, config.linear_scope, backend)
    if isinstance(choice, BlockSelection) and options.scope != "marginal" and choice.marginal is not None:
        choice = _with_marginal(choice, None)
    if is_plain(*inputs):
        tensors, numbers = flatten(choice)
        given = tuple(numbers), options, train
        if train:
            return _Attention.apply(given, *inputs, *tensors)
        return replayed(_flat_forward, (*inputs, *tensors), given)[0][0]
    return _forward_op(*inputs, *flatten(choice), *options, train)[0]


def linear_branch_gpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    config: SLAConfig,
    selection: BlockSelection,
    scale: float,
    proj_weight: Tensor | None,
    proj_bias: Tensor | None,
    backend: str,
) -> Tensor:
    """Only O^l W^T + b, by the same kernels: they get no block to read exactly."""
    mask = selection.linear_mask(config.linear_scope)
    scope = "all" if mask is None else "marginal"
    nothing = dataclasses.replace(
        selection,
        critical=torch.zeros_like(selection.critical[..., :1]),
        critical_count=torch.zeros_like(selection.critical_count),
        marginal=mask,
    )
    config = config.replace(linear_scope=scope, tail="none")
    return sla_attention_gpu(query, key, value, config, nothing, scale, proj_weight, proj_bias, backend)


def _with_marginal(selection: BlockSelection, marginal: Tensor | None) -> BlockSelection:
    return BlockSelection(
        critical=selection.critical,
        critical_count=selection.critical_count,
        marginal=marginal,
        block_q=selection.block_q,
        block_k=selection.block_k,
        query_length=selection.query_length,
        key_length=selection.key_length,
        key_block_sizes=selection.key_block_sizes,
    )


def new_selection(query: Tensor, key: Tensor, rule: SelectionRule, scope: str) -> BlockSelection:
    """Memory for what a rule chooses. Its marginal mask is padded, as the products want it; None over all keys."""
    lists = new_lists(query, key, rule, with_marginal=scope != "all")
    return _chosen_by(rule, query, key, lists.critical, lists.counts, lists.marginal)


def made_selection(
    choice: BlockSelection | SelectionRule, query: Tensor, key: Tensor, lists: Tensor, counts: Tensor, marginal: Tensor
) -> BlockSelection:
    """The selection that a forward used: the given one, or what `made_by_rule` returned of it."""
    if not isinstance(choice, SelectionRule):
        return choice
    return _chosen_by(choice, query, key, lists, counts, marginal if marginal.dim() == 4 else None)


def _chosen_by(
    rule: SelectionRule, query: Tensor, key: Tensor, lists: Tensor, counts: Tensor, marginal: Tensor | None
) -> BlockSelection:
    return BlockSelection(
        critical=lists,
        critical_count=counts,
        marginal=marginal,
        block_q=rule.block_q,
        block_k=rule.block_k,
        query_length=query.shape[2],
        key_length=key.shape[2],
        key_block_sizes=rule.key_block_sizes,
    )


def mask_operand(selection: BlockSelection, scope: str) -> Tensor | None:
    """The block mask as a GEMM operand, bfloat16 [B, H, padded Tq, padded Tk]; None to sum over every key."""
    if scope == "all":
        return None
    if selection.marginal is None:
        return noncritical_mask(selection)
    marginal = selection.marginal
    rows, columns = marginal.shape[-2:]
    marginal = marginal if marginal.dtype == torch.bfloat16 else (marginal != 0).to(torch.bfloat16)
    padding = (0, padded_blocks(columns) - columns, 0, padded_blocks(rows) - rows)
    return F.pad(marginal, padding) if any(padding) else marginal


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    choice: BlockSelection | SelectionRule,
    options: Options,
    keep_states: bool,
) -> tuple[Results, BlockSelection]:
    """The results, and the selection that was given or made."""
    with on_device_of(query):  # Triton launches on the current device
        if isinstance(choice, SelectionRule):
            rule, selection = choice, new_selection(query, key, choice, options.scope)
            mask = selection.marginal
        else:
            rule, selection = None, choice.with_contiguous_lists()
            mask = mask_operand(selection, options.scope)
        term = linear_term(options.feature_map, weight, bias, query)
        backend = backend_named(options.backend)
        results = forward_in_groups(query, key, value, selection, mask, rule, term, options.scale, backend, keep_states)
    return results, selection


def _backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    results: Results,
    selection: BlockSelection,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    assert results.state.shape[0] > 0, "the forward was told that no backward follows"
    with on_device_of(query):
        grad = grad if grad.stride(-1) == 1 else grad.contiguous()
        mask = mask_operand(selection, options.scope)
        mask = None if mask is None else mask.flatten(0, 1)
        term = linear_term(options.feature_map, weight, bias, query)
        backend = backend_named(options.backend)
        *grads, grad_weight, grad_bias = gradients(
            grad, query, key, value, results, selection, mask, term, options.scale, backend
        )
    grad_weight = None if weight is None else grad_weight.to(weight.dtype)
    return *grads, grad_weight, None if bias is None else grad_bias.to(bias.dtype)


def _flat_forward(tensors: Sequence[Tensor | None], given: tuple) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """`_forward` for `replayed`: `Results` and a flat selection, and the selection's numbers; else only the output."""
    numbers, options, keep_states = given
    results, selection = _forward(*tensors[:5], unflatten(tensors[5:], numbers), options, keep_states)
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
        results, numbers = replayed(_flat_forward, tensors, given)
        ctx.num_inputs, ctx.given = len(tensors), (numbers, given[1])
        ctx.save_for_backward(*tensors[:5], *results)
        return results[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        saved = ctx.saved_tensors  # once: checkpointing recomputes them for one look
        grads, _ = replayed(_flat_backward, (grad, *saved), ctx.given)
        return None, *grads, *[None] * (ctx.num_inputs - 5)


@torch.library.custom_op("foveal::sla_gpu_fwd", mutates_args=())
def _forward_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    choice_tensors: list[Tensor],
    choice_numbers: list[int],
    scale: float,
    feature_map: str,
    scope: str,
    backend: str,
    keep_states: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`Results`, and the lists, counts and marginal mask that a rule made, which are empty for a selection.

    Numbers come in a list: where there are gradients, PyTorch spends time on an op that grows with the square of the
    number of its arguments, 180 us for 22.
    """
    choice, options = unflatten(choice_tensors, choice_numbers), Options(scale, feature_map, scope, backend)
    results, selection = _forward(query, key, value, weight, bias, choice, options, keep_states)
    # An op may not return what it was given.
    return *results, *made_by_rule(query, selection if isinstance(choice, SelectionRule) else None)


def made_by_rule(query: Tensor, selection: BlockSelection | None) -> tuple[Tensor, Tensor, Tensor]:
    """The lists, counts and marginal mask of a selection, empty for what there is not."""
    lists = (None,) * 3 if selection is None else (selection.critical, selection.critical_count, selection.marginal)
    dtypes = torch.int32, torch.int32, torch.bfloat16
    return tuple(query.new_empty(0, dtype=dtype) if x is None else x for x, dtype in zip(lists, dtypes, strict=True))


@_forward_op.register_fake
def _(query, key, value, weight, bias, choice_tensors, choice_numbers, scale, feature_map, scope, backend, keep_states):
    choice = unflatten(choice_tensors, choice_numbers)
    batch, heads, length, head_dim = query.shape
    rows = 1 if scope == "all" else padded_blocks(ceil_div(length, choice.block_q))
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    kept = batch * heads if scope == "all" or keep_states else 0
    norm = lse.new_empty((kept, rows, head_dim))
    state = query.new_empty((kept, rows, head_dim, head_dim), dtype=torch.bfloat16)
    means = lse.new_empty((2, batch * heads if keep_states else 0, 1, head_dim))
    made = new_selection(query, key, choice, scope) if isinstance(choice, SelectionRule) else None
    return torch.empty_like(query), lse, norm, state, means, *made_by_rule(query, made)


@torch.library.custom_op("foveal::sla_gpu_bwd", mutates_args=())
def _backward_op(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    saved: list[Tensor],
    selection_numbers: list[int],
    scale: float,
    feature_map: str,
    scope: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients, those of weight and bias empty where these are None; `saved` is `Results` and a selection."""
    selection = unflatten(saved[5:], selection_numbers)
    options = Options(scale, feature_map, scope, backend)
    grads = _backward(grad, query, key, value, weight, bias, Results(*saved[:5]), selection, options)
    return tuple(grad.new_empty(0) if x is None else x for x in grads)


@_backward_op.register_fake
def _(grad, query, key, value, weight, bias, *rest):
    weights = (grad.new_empty(0) if x is None else x.new_empty(x.shape) for x in (weight, bias))
    return *(torch.empty_like(x) for x in (query, key, value)), *weights


def _setup_context(ctx, inputs, output) -> None:
    query, key, value, weight, bias, choice_tensors, choice_numbers, *ctx.options, _ = inputs
    *results, lists, counts, marginal = output
    choice = made_selection(unflatten(choice_tensors, choice_numbers), query, key, lists, counts, marginal)
    tensors, ctx.numbers = flatten(choice)
    ctx.num_choice_tensors = len(choice_tensors)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(query, key, value, weight, bias, *results, *tensors)


def _backward_of_op(ctx, grad: Tensor | None, *_):
    saved = ctx.saved_tensors  # once: checkpointing recomputes them for one look
    inputs = saved[:5]
    grads = _backward_op(grad, *inputs, list(saved[5:]), ctx.numbers, *ctx.options)
    grads = (None if x is None else dx for x, dx in zip(inputs, grads, strict=True))
    return *grads, [None] * ctx.num_choice_tensors, None, None, None, None, None, None


_forward_op.register_autograd(_backward_of_op, setup_context=_setup_context)
