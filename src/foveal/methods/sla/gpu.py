"""SLA on GPUs: the linear branch rides in the epilogue of the block-sparse forward, and shares its backward's passes.

The marginal sum H is one batched GEMM of the block mask with the key states, and so is the sum over its gradients. H is
saved for the backward, as the paper has it, at head_dim / block_q times the memory of Q. Both passes are custom ops.
Source: SLA (arXiv 2509.24006), Algorithms 1 and 2.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from foveal.blocks import BlockSelection, SelectionRule
from foveal.kernels.triton.lists import noncritical_mask, padded_blocks
from foveal.kernels.triton.select import Wanted, new_lists
from foveal.methods.sla.config import SLAConfig
from foveal.methods.sla.gpu_backward import gradients
from foveal.methods.sla.gpu_forward import forward_in_groups


def sla_attention_gpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    config: SLAConfig,
    selection: BlockSelection | SelectionRule,
    scale: float,
    proj_weight: Tensor | None,
    proj_bias: Tensor | None,
    *,
    hopper: bool,
) -> Tensor:
    """O = O^s + O^l W^T + b, [B, H, Lq, D], differentiable; for the feature maps "softmax", "elu" and "relu".

    A rule instead of a selection is applied on the way: one pass over K and V serves both. `hopper` takes the Gluon
    kernels for the sparse part and its epilogue; the rest is Triton's on every GPU.
    """
    inputs = (query, key, value, proj_weight, proj_bias)
    keep_states = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    if isinstance(selection, SelectionRule):
        return _select_forward_op(
            query,
            key,
            value,
            selection.key_block_sizes,
            selection.valid_blocks,
            selection.table,
            proj_weight,
            proj_bias,
            [config.block_q, config.block_k],
            [selection.width, selection.critical, selection.negligible, *selection.key_range, *selection.query_range],
            scale,
            config.feature_map,
            hopper,
            config.linear_scope == "all",
            keep_states,
        )[0]
    return _forward_op(
        query,
        key,
        value,
        selection.critical,
        selection.critical_count,
        selection.marginal if config.linear_scope == "marginal" else None,
        selection.key_block_sizes,
        proj_weight,
        proj_bias,
        [selection.block_q, selection.block_k],
        scale,
        config.feature_map,
        hopper,
        config.linear_scope == "all",
        keep_states,
    )[0]


def _mask_operand(
    critical: Tensor, counts: Tensor, marginal: Tensor | None, num_key_blocks: int, all_keys: bool
) -> Tensor | None:
    """The block mask as a GEMM operand, bfloat16 [B * H, padded Tq, padded Tk]; None to sum over every key."""
    if all_keys:
        return None
    if marginal is None:
        return noncritical_mask(critical, counts, num_key_blocks).flatten(0, 1)
    rows, columns = marginal.shape[-2:]
    marginal = marginal if marginal.dtype == torch.bfloat16 else (marginal != 0).to(torch.bfloat16)
    padding = (0, padded_blocks(columns) - columns, 0, padded_blocks(rows) - rows)
    return (F.pad(marginal, padding) if any(padding) else marginal).flatten(0, 1)


def _projection(
    weight: Tensor | None, bias: Tensor | None, query: Tensor, *, identity: bool = True
) -> tuple[Tensor | None, Tensor]:
    """W in bfloat16 and b in float32, where they are missing the identity (None unless `identity`) and zeros."""
    head_dim = query.shape[-1]
    if weight is None and identity:
        weight = torch.eye(head_dim, dtype=torch.bfloat16, device=query.device)
    if bias is None:
        bias = torch.zeros(head_dim, dtype=torch.float32, device=query.device)
    return None if weight is None else weight.to(torch.bfloat16).contiguous(), bias.float().contiguous()


@torch.library.custom_op("foveal::sla_triton_fwd", mutates_args=())
def _forward_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    critical: Tensor,
    counts: Tensor,
    marginal: Tensor | None,
    sizes: Tensor | None,
    proj_weight: Tensor | None,
    proj_bias: Tensor | None,
    blocks: list[int],
    scale: float,
    feature_map: str,
    hopper: bool,
    all_keys: bool,
    keep_states: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    critical, counts = critical.contiguous(), counts.contiguous()
    projection = _projection(proj_weight, proj_bias, query, identity=not hopper)
    with torch.cuda.device_of(query):  # Triton launches on the current device
        mask = _mask_operand(critical, counts, marginal, -(-key.shape[2] // blocks[1]), all_keys)
        mask = mask if mask is None else mask.unflatten(0, query.shape[:2])
        tensors = query, key, value, critical, counts, mask, sizes, projection
        return forward_in_groups(*tensors, *blocks, scale, feature_map, None, hopper=hopper, keep_states=keep_states)


def _fake_results(query: Tensor, block_q: int, all_keys: bool, keep_states: bool) -> tuple[Tensor, ...]:
    batch, heads, length, head_dim = query.shape
    rows = 1 if all_keys else padded_blocks(-(-length // block_q))
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    kept = batch * heads if all_keys or keep_states else 0
    norm = lse.new_empty((kept, rows, head_dim))
    state = query.new_empty((kept, rows, head_dim, head_dim), dtype=torch.bfloat16)
    return torch.empty_like(query), lse, norm, state


@_forward_op.register_fake
def _(query, key, value, critical, counts, marginal, sizes, proj_weight, proj_bias, blocks, *options):
    return _fake_results(query, blocks[0], *options[-2:])


@torch.library.custom_op("foveal::sla_triton_bwd", mutates_args=())
def _backward_op(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    norm: Tensor,
    state: Tensor,
    critical: Tensor,
    counts: Tensor,
    marginal: Tensor | None,
    sizes: Tensor | None,
    proj_weight: Tensor | None,
    proj_bias: Tensor | None,
    block_q: int,
    block_k: int,
    scale: float,
    feature_map: str,
    hopper: bool,
    all_keys: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    critical, counts = critical.contiguous(), counts.contiguous()
    assert state.shape[0] > 0, "the forward was told that no backward follows"
    with torch.cuda.device_of(query):
        return gradients(
            grad,
            query,
            key,
            value,
            output,
            lse,
            norm,
            state,
            critical,
            counts,
            _mask_operand(critical, counts, marginal, -(-key.shape[2] // block_k), all_keys),
            sizes,
            _projection(proj_weight, proj_bias, query),
            block_q,
            block_k,
            scale,
            feature_map,
            projected=proj_weight is not None,
            hopper=hopper,
        )


@_backward_op.register_fake
def _(grad, query, key, value, output, lse, norm, state, *options):
    head_dim = query.shape[-1]
    shapes = (head_dim, head_dim), (head_dim,)
    return *(torch.empty_like(x) for x in (query, key, value)), *(lse.new_empty(shape) for shape in shapes)


def _new_lists(query: Tensor, key: Tensor, block_q: int, block_k: int, width: int, all_keys: bool):
    """Memory for the lists, their counts and the marginal mask, which is empty over all keys."""
    rows, columns = -(-query.shape[2] // block_q), -(-key.shape[2] // block_k)
    return new_lists(*query.shape[:2], rows, columns, width, not all_keys, query.device)


@torch.library.custom_op("foveal::sla_select_fwd", mutates_args=())
def _select_forward_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sizes: Tensor | None,
    valid_blocks: Tensor | None,
    table: Tensor | None,
    proj_weight: Tensor | None,
    proj_bias: Tensor | None,
    blocks: list[int],
    rule: list[int],
    scale: float,
    feature_map: str,
    hopper: bool,
    all_keys: bool,
    keep_states: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What `_forward_op` returns, and the selection's lists, counts and marginal mask (padded; empty over all keys).

    Integers come in lists: where there are gradients, PyTorch spends time on an op that grows with the square of the
    number of its arguments, 180 us for 22.

    Args:
        rule: of a `SelectionRule`, width, critical, negligible, and where protected keys and queries start and stop.
    """
    width, critical, negligible, *ranges = rule
    lists, counts, marginal = _new_lists(query, key, *blocks, width, all_keys)
    wanted = Wanted(critical, negligible, valid_blocks, table, tuple(ranges[:2]), tuple(ranges[2:]))
    projection = _projection(proj_weight, proj_bias, query, identity=not hopper)
    mask = None if all_keys else marginal
    tensors = query, key, value, lists, counts, mask, sizes, projection
    with torch.cuda.device_of(query):
        results = forward_in_groups(
            *tensors, *blocks, scale, feature_map, wanted, hopper=hopper, keep_states=keep_states
        )
    return *results, lists, counts, marginal


@_select_forward_op.register_fake
def _(query, key, value, sizes, valid_blocks, table, weight, bias, blocks, rule, *options):
    all_keys, keep_states = options[-2:]
    lists = _new_lists(query, key, *blocks, rule[0], all_keys)
    return *_fake_results(query, blocks[0], all_keys, keep_states), *lists


def _save(ctx, inputs, blocks, options, results) -> None:
    """Keeps what `_backward` reads: of `_forward_op` nine tensors, the block sizes, four options, and the results."""
    ctx.options = *blocks, *options
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, *results)


def _setup_context(ctx, inputs, output) -> None:
    *tensors, blocks, scale, feature_map, hopper, all_keys, _ = inputs
    _save(ctx, tensors, blocks, (scale, feature_map, hopper, all_keys), output)
    ctx.others = 6


def _select_setup_context(ctx, inputs, output) -> None:
    query, key, value, sizes, _, _, weight, bias, blocks, _, *options, _ = inputs
    *results, lists, counts, marginal = output
    marginal = marginal if marginal.shape[-1] else None
    _save(ctx, (query, key, value, lists, counts, marginal, sizes, weight, bias), blocks, options, results)
    ctx.others = 7


def _backward(ctx, grad: Tensor, *_):
    *inputs, output, lse, norm, state = ctx.saved_tensors
    query, key, value, critical, counts, marginal, sizes, weight, bias = inputs
    *grads, grad_weight, grad_bias = _backward_op(
        grad, query, key, value, output, lse, norm, state, critical, counts, marginal, sizes, weight, bias, *ctx.options
    )
    grad_weight = None if weight is None else grad_weight.to(weight.dtype)
    grad_bias = None if bias is None else grad_bias.to(bias.dtype)
    return *grads, None, None, None, None, grad_weight, grad_bias, *([None] * ctx.others)


def _select_backward(ctx, grad: Tensor, *_):
    grads = _backward(ctx, grad)
    return *grads[:3], None, None, None, *grads[7:]


_forward_op.register_autograd(_backward, setup_context=_setup_context)
_select_forward_op.register_autograd(_select_backward, setup_context=_select_setup_context)
