"""SLA2 without its linear branch on GPUs: the router's choice, attention, and the gradients of both as one operator.

Queries and keys are pooled once: the choice ranks blocks by their projected means, and the backward makes the
projections' gradients from the same means. What a row gains by reading a block comes from the kernel that SLA2 has.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from foveal.blocks import BlockSelection
from foveal.kernels.backend import BackwardCall, backend_named
from foveal.kernels.operator import KernelOperator
from foveal.kernels.triton.backward import output_delta
from foveal.kernels.triton.lists import column_lists
from foveal.kernels.triton.picking import new_lists
from foveal.kernels.triton.select import select
from foveal.kernels.values import Problem, packable
from foveal.methods.gpu_routing import Scored, Weights, projection_gradients
from foveal.methods.routing import Router
from foveal.methods.sla.gpu import used_selection
from foveal.methods.sla2.gpu_choice import pooled
from foveal.rules import SelectionRule
from foveal.symbols import ceil_div


@packable
class ExactCall(NamedTuple):
    """What a call reads.

    query: [B, H, Lq, D]. key, value: [B, H, Lk, D].
    proj_query, proj_key, fixed_query, fixed_key, ranked: the fields of a `CallRouter`.
    choice: what was chosen, or a rule for what is.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    proj_query: Tensor | None
    proj_key: Tensor | None
    fixed_query: Tensor | None
    fixed_key: Tensor | None
    ranked: Tensor | None
    choice: BlockSelection | SelectionRule

    @property
    def learning(self) -> Weights:
        return self.proj_query, self.proj_key

    @property
    def learns(self) -> bool:
        return self.proj_query is not None

    @property
    def router(self) -> Router:
        return Router(*self.learning) if self.learns else Router(self.fixed_query, self.fixed_key)


class ExactOptions(NamedTuple):
    """What a call does not read from its tensors: `temperature` is the soft top-k's, `backend` a backend's name."""

    scale: float
    temperature: float
    backend: str


def _forward(call: ExactCall, options: ExactOptions, save: bool) -> tuple[tuple[Tensor], tuple[Tensor, ...]]:
    query, key, value, choice = *call[:3], call.choice
    by_rule, means, made = isinstance(choice, SelectionRule), (), ()
    if by_rule or (save and call.learns):
        means = pooled(query, key, choice)
    if by_rule:
        made = tuple(select(*call.router.project(*means), options.scale, choice, with_marginal=False)[:2])
    problem = Problem(query, key, value, used_selection(choice, query, key, made), options.scale)
    output, lse = backend_named(options.backend).forward(problem).run_all()
    return (output,), (lse, *made, *(means if call.learns else ()))


def _backward(call: ExactCall, options: ExactOptions, outputs, saved, grads) -> tuple[Tensor | None, ...]:
    (output,), (lse, *made), (grad,) = outputs, saved, grads
    means = (made.pop(-2), made.pop()) if call.learns else ()
    selection, backend = used_selection(call.choice, *call[:2], tuple(made)), backend_named(options.backend)
    problem = Problem(*call[:3], selection, options.scale)
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    delta = output_delta(grad, output, None)
    fine = BackwardCall(problem, grad, delta, lse, column_lists(selection))
    found, of_router = backend.backward(fine), (None, None)
    if call.learns:
        scored = Scored.of(means, call.learning, call.ranked, options.scale)
        given = scored, call.learning, options.temperature
        of_router = projection_gradients(fine, *given, centers_keys=backend.centers_keys)
    return *found, *of_router


def _fake(call: ExactCall, options: ExactOptions) -> tuple[tuple[Tensor], tuple[Tensor, ...]]:
    query, key, choice = call.query, call.key, call.choice
    lse, made, means = query.new_empty(query.shape[:3], dtype=torch.float32), (), ()
    if isinstance(choice, SelectionRule):
        made = new_lists(query, key, choice, with_marginal=False)[:2]
    if call.learns:
        sides = (query, choice.block_q), (key, choice.block_k)
        means = (lse.new_empty((*x.shape[:2], ceil_div(x.shape[2], block), x.shape[3])) for x, block in sides)
    return (torch.empty_like(query),), (lse, *made, *means)


# softmax(q K^T * scale) V over the keys of the blocks that the router keeps, [B, H, Lq, D].
sla2_exact_gpu = KernelOperator(
    "foveal::sla2_exact_gpu", inputs=5, options=ExactOptions, forward=_forward, backward=_backward, fake=_fake
)
