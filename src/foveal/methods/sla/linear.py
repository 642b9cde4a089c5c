"""The linear branch of SLA in plain PyTorch, on any device: block states, one mask product, one apply.

    h_j = [phi(K_j)^T V_j, phi(K_j)^T 1]     a state of F x (D + 1) per key block
    H   = mask @ h                           one product of [Tq x Tk] by [Tk x F (D + 1)] per head, not a sum per row
    O^l = phi(Q_i) H_i / (phi(Q_i) Z_i + 1e-5)

O^l is a weighted mean of V, and the gradients of Q and K are differences that cancel as far as V has a mean m. So the
states are those of V - m, and O^l = phi(Q_i) H_i / n + m (1 - 1e-5 / n) with n = phi(Q_i) Z_i + 1e-5; m cancels in all
gradients.

The backward recomputes h and H instead of saving them, and uses the transposed mask once. Both passes process one head
at a time, so the extra memory is one head's states. They are custom ops, opaque to `torch.compile`.
Source: SLA (arXiv 2509.24006), eq. 5 and Algorithms 1 and 2, with the corrections of this project's tests.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from foveal.blocks import BlockSelection
from foveal.checks import is_transformed, without_autocast
from foveal.kernels.cpu import blocked
from foveal.methods.sla.config import SLAConfig
from foveal.methods.sla.feature_maps import apply_feature_map

EPSILON = 1e-5


def linear_branch(
    phi_query: Tensor, phi_key: Tensor, value: Tensor, mask: Tensor | None, block_q: int, block_k: int
) -> Tensor:
    """O^l, normalized, before the projection.

    Args:
        phi_query: [B, H, Lq, F], float32 or float64.
        phi_key: [B, H, Lk, F], same dtype; zero at padding keys.
        value: [B, H, Lk, D], same dtype; zero at padding keys.
        mask: [B, H, Tq, Tk], nonzero where summed; None sums over every key.
        block_q, block_k: block sizes in tokens; unused without a mask.

    Returns:
        [B, H, Lq, D] in the dtype of `phi_query`; 0 where a row sums over nothing. Differentiable.
    """
    if is_transformed(phi_query, phi_key, value):
        return _composed(phi_query, phi_key, value, mask, block_q, block_k)
    return _forward_op(phi_query, phi_key, value, mask, block_q, block_k)


def linear_output(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    config: SLAConfig,
    selection: BlockSelection,
    feature_weight: Tensor | None = None,
) -> Tensor:
    """O^l of a selection, [B, H, Lq, D] in float32 or better, before the projection; the weight is hedgehog's."""
    valid = None if selection.key_block_sizes is None else selection.key_valid()[:, None, :, None]
    if valid is not None:
        # Before phi: its gradient at a NaN is NaN, whatever comes after.
        key, value = torch.where(valid, key, 0), torch.where(valid, value, 0)
    phi_query = apply_feature_map(query, config.feature_map, feature_weight)
    phi_key = apply_feature_map(key, config.feature_map, feature_weight)
    value = value.to(phi_key.dtype)
    if valid is not None:
        phi_key = torch.where(valid, phi_key, 0)
    mask = selection.linear_mask(config.linear_scope)
    return linear_branch(phi_query, phi_key, value, mask, config.block_q, config.block_k)


def _states(phi_key: Tensor, value: Tensor) -> Tensor:
    """Turn [T, bk, F] and [T, bk, D] into the block states [T, F, D + 1], with the column sums of phi(K) last."""
    ones = value.new_ones((*value.shape[:-1], 1))
    return torch.bmm(phi_key.transpose(1, 2), torch.cat((value, ones), -1))


class _Head:
    """One head cut into blocks, with its states summed over each row's blocks."""

    def __init__(self, phi_query, phi_key, value, mask, block_q, block_k):
        if mask is None:
            block_q, block_k = phi_query.shape[0], phi_key.shape[0]
        self.phi_query = blocked(phi_query, block_q)
        self.phi_key = blocked(phi_key, block_k)
        self.mean = value.mean(0)
        self.value = blocked(value - self.mean, block_k)
        self.mask = None if mask is None else (mask != 0).to(phi_query.dtype)
        states = _states(self.phi_key, self.value)
        if self.mask is not None:
            states = (self.mask @ states.flatten(1)).unflatten(1, states.shape[1:])
        self.state, self.norm_state = states[..., :-1], states[..., -1:]
        self.norm = torch.bmm(self.phi_query, self.norm_state) + EPSILON


@torch.library.custom_op("foveal::linear_branch_fwd", mutates_args=())
def _forward_op(
    phi_query: Tensor, phi_key: Tensor, value: Tensor, mask: Tensor | None, block_q: int, block_k: int
) -> Tensor:
    length = phi_query.shape[2]
    output = phi_query.new_empty((*phi_query.shape[:3], value.shape[-1]))
    for b in range(phi_query.shape[0]):
        for h in range(phi_query.shape[1]):
            head_mask = None if mask is None else mask[b, h]
            head = _Head(phi_query[b, h], phi_key[b, h], value[b, h], head_mask, block_q, block_k)
            out = torch.bmm(head.phi_query, head.state).div_(head.norm)
            out += head.mean * (1.0 - EPSILON / head.norm)
            output[b, h] = out.flatten(0, 1)[:length]
    return output


@_forward_op.register_fake
def _(phi_query, phi_key, value, mask, block_q, block_k):
    return phi_query.new_empty((*phi_query.shape[:3], value.shape[-1]))


@torch.library.custom_op("foveal::linear_branch_bwd", mutates_args=())
def _backward_op(
    grad: Tensor, phi_query: Tensor, phi_key: Tensor, value: Tensor, mask: Tensor | None, block_q: int, block_k: int
) -> tuple[Tensor, Tensor, Tensor]:
    grads = tuple(torch.empty_like(x) for x in (phi_query, phi_key, value))
    for b in range(phi_query.shape[0]):
        for h in range(phi_query.shape[1]):
            head_mask = None if mask is None else mask[b, h]
            head = _Head(phi_query[b, h], phi_key[b, h], value[b, h], head_mask, block_q, block_k)
            g = blocked(grad[b, h], head.phi_query.shape[1])
            # Of what is left of O^l without m times the sum of the weights, and that sum is not quite 1.
            g_dot_o = (g * torch.bmm(head.phi_query, head.state) / head.norm).sum(-1, keepdim=True)
            g_dot_o -= (g @ head.mean)[..., None] * (EPSILON / head.norm)
            d_phi_query = (torch.bmm(g, head.state.transpose(1, 2)) - g_dot_o * head.norm_state.transpose(1, 2)).div_(
                head.norm
            )
            scaled = (head.phi_query / head.norm).transpose(1, 2)
            d_state = torch.bmm(scaled, torch.cat((g, -g_dot_o), -1))
            if head.mask is not None:
                d_state = (head.mask.T @ d_state.flatten(1)).unflatten(1, d_state.shape[1:])
            d_h, d_z = d_state[..., :-1], d_state[..., -1:]
            d_phi_key = torch.bmm(head.value, d_h.transpose(1, 2)) + d_z.transpose(1, 2)
            d_value = torch.bmm(head.phi_key, d_h)
            for out, blocks in zip(grads, (d_phi_query, d_phi_key, d_value), strict=True):
                out[b, h] = blocks.flatten(0, 1)[: out.shape[2]]
    return grads


@_backward_op.register_fake
def _(grad, phi_query, phi_key, value, mask, block_q, block_k):
    return tuple(torch.empty_like(x) for x in (phi_query, phi_key, value))


@without_autocast
def _composed(
    phi_query: Tensor, phi_key: Tensor, value: Tensor, mask: Tensor | None, block_q: int, block_k: int
) -> Tensor:
    """The same in operations that every transform of PyTorch knows; all heads' states at once."""
    length = phi_query.shape[2]
    if mask is None:
        block_q, block_k = length, phi_key.shape[2]

    def blocks(x: Tensor, block: int) -> Tensor:
        return F.pad(x, (0, 0, 0, -x.shape[2] % block)).unflatten(2, (-1, block))

    mean = value.detach().mean(2, keepdim=True)  # of which no derivative depends
    value = value - mean
    rows, keys = blocks(phi_query, block_q), blocks(phi_key, block_k)
    ones = torch.ones_like(value[..., :1])
    states = keys.transpose(-1, -2) @ blocks(torch.cat((value, ones), -1), block_k)
    if mask is not None:
        states = ((mask != 0).to(states.dtype) @ states.flatten(3)).unflatten(3, states.shape[3:])
    summed = rows @ states
    norm = summed[..., -1:] + EPSILON
    output = summed[..., :-1] / norm + mean.unsqueeze(2) * (1.0 - EPSILON / norm)
    return output.flatten(2, 3)[:, :, :length]


def _setup_context(ctx, inputs, output) -> None:
    phi_query, phi_key, value, mask, ctx.block_q, ctx.block_k = inputs
    ctx.save_for_backward(phi_query, phi_key, value, mask)


def _backward(ctx, grad: Tensor):
    inputs = ctx.saved_tensors
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph: it will be derived again
        wanted = [x for x in inputs[:3] if x.requires_grad]
        output = _composed(*inputs, ctx.block_q, ctx.block_k)
        found = iter(torch.autograd.grad(output, wanted, grad, create_graph=True))
        grads = tuple(next(found) if x.requires_grad else None for x in inputs[:3])
    else:
        grads = without_autocast(_backward_op)(grad, *inputs, ctx.block_q, ctx.block_k)
    return *grads, None, None, None


_forward_op.register_autograd(_backward, setup_context=_setup_context)
