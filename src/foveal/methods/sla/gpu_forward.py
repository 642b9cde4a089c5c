"""The forward of SLA on GPUs, a few heads at a time: key states, selection, their masked sum, attention.

Each group of heads goes through all of it before the next one starts, so that the extra memory is a group's key states
h and sums H (all sums where a backward will want them), and one pass over K and V makes the states and the pooled keys
that the selection needs.
Source: SLA (arXiv 2509.24006), Algorithm 1.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from foveal.blocks import PARTS
from foveal.kernels.backend import Backend, ForwardCall
from foveal.kernels.side_stream import side_stream
from foveal.kernels.triton.linear import Keys, Means, key_state_sums, key_states
from foveal.kernels.triton.masked_sum import masked_sum
from foveal.kernels.triton.picking import Lists, pick
from foveal.kernels.triton.pooling import pool
from foveal.kernels.triton.scores import Sizes
from foveal.kernels.triton.select import ranked_of
from foveal.kernels.values import LinearTerm, Problem
from foveal.rules import SelectionRule
from foveal.symbols import ceil_div

# What h and H of the heads in flight may take; or as much as the output, if that is more. Larger groups mean fewer
# launches, and fewer times that the last programs of a kernel leave the device half idle.
GROUP_BYTES = 240 * 2**20


class Results(NamedTuple):
    """What the forward leaves.

    output: [B, H, Lq, D]. lse: float32 [B, H, Lq].
    norm, state: Z, float32 [B * H, padded Tq, D], and H, bfloat16 [B * H, padded Tq, D, D]. Over all keys their blocks
        are one; else both are empty unless they were to be kept.
    means: m of each head and W m, float32 [2, B * H, 1, D], and H is the state of V - m; empty unless states were to be
        kept, and H is that of V then.
    """

    output: Tensor
    lse: Tensor
    norm: Tensor
    state: Tensor
    means: Tensor


def groups(pairs: int, most: int) -> Iterator[range]:
    """Cuts `pairs` into ranges of like lengths with at most `most` each (one at least)."""
    step = -(-pairs // -(-pairs // max(1, most)))
    for start in range(0, pairs, step):
        yield range(start, min(start + step, pairs))


class Choice(NamedTuple):
    """A choice that is made on the way, a few heads at a time.

    rule: how to choose. scale: of the softmax. lists: what is written.
    query: of all heads what `pick` takes, [B * H, Tq, D].
    key: the same; None for what comes with the states of keys.
    project_key: float32 [D, D] or [B * H, D, D], what maps these means (x W^T); None for the identity.
    """

    rule: SelectionRule
    scale: float
    lists: Lists
    query: Tensor
    key: Tensor | None
    project_key: Tensor | None

    @classmethod
    def of(
        cls,
        problem: Problem,
        rule: SelectionRule,
        lists: Lists,
        projections: tuple[Tensor, Tensor] | None,
        wants_means: bool,
    ) -> Choice:
        """The choice of a rule over a problem's query and key; `projections` as in `forward_in_groups`.

        wants_means: whether the attention wants the means of blocks, so that the states of keys cannot bring quarters.
        """
        query, key, scale = problem.query, problem.key, problem.scale
        if rule.spread or (rule.quarters and wants_means):
            return cls(rule, scale, lists, *(x.flatten(0, 1) for x in ranked_of(query, key, rule, scale)), None)
        pooled, project_key = pool(query, rule.block_q, quarters=bool(rule.quarters)).flatten(0, 1), None
        if projections is not None:
            pooled, project_key = pooled @ projections[0].mT, projections[1]
        return cls(rule, scale, lists, pooled, None, project_key)

    def make(self, pairs: range, means: Tensor | None) -> None:
        """Writes the lists and the mask of these pairs, whose keys have these means, of blocks or of quarters."""
        key = means if self.key is None else self.key[pairs.start : pairs.stop]
        if self.project_key is not None:
            weight = self.project_key if self.project_key.dim() == 2 else self.project_key[pairs.start : pairs.stop]
            key = key @ weight.mT
        query = self.query if len(pairs) == self.query.shape[0] else self.query[pairs.start : pairs.stop]
        pick(query, key, self.scale, self.rule, pairs.start, self.lists, Sizes(key=self.rule.key_block_sizes))


def _means_of_keys(call: ForwardCall, choice: Choice | None, pairs: int) -> Tensor | None:
    """Where the means of the keys of some pairs go, as `key_states` takes them; None if nobody wants them."""
    ranked = choice is not None and choice.key is None
    if not call.wants_means and not ranked:
        return None
    output, lse = call.results
    if ranked and choice.rule.quarters:
        quarters = ceil_div(call.key_length, choice.rule.block_k // PARTS)
        return lse.new_empty((pairs, quarters, output.shape[-1]), dtype=torch.float16)
    return lse.new_empty((pairs, call.selection.num_key_blocks, output.shape[-1]))


def forward_in_groups(
    problem: Problem,
    mask: Tensor | None,
    rule: SelectionRule | None,
    term: LinearTerm,
    backend: Backend,
    keep_states: bool,
    projections: tuple[Tensor, Tensor] | None = None,
    weigh: Callable[[range], None] | None = None,
) -> Results:
    """The output and what the backward needs.

    Args:
        problem: its lists are memory for what is chosen where there is a rule.
        mask: bfloat16 [B, H, padded Tq, padded Tk], what to sum over; None for every key.
        rule: how to choose, into the problem's lists and `mask`; None if they hold a choice already.
        term: the linear branch without its states.
        keep_states: whether a backward follows.
        projections: float32 [D, D] or [B * H, D, D] each, what maps pooled queries and keys (x W^T) before a rule
            scores them.
        weigh: what writes `term.mix` of some pairs, whose lists it may read; None where there is no mix, as with a sum
            over every key.
    """
    # One H for all may be projected before it is added.
    early = backend.projects_early and mask is None and term.weight is not None
    call = backend.forward(problem, term._replace(weight=None) if early else term)
    selection = problem.selection
    lists = Lists(selection.critical, selection.critical_count, mask)
    choice = None if rule is None else Choice.of(problem, rule, lists, projections, call.wants_means)
    if mask is None:
        return _over_all_keys(problem, call, choice, term, early, keep_states)
    beside = backend.prepares_beside(selection.block_q)
    return _by_masks(problem, call, mask, choice, term, beside, keep_states, weigh)


def keys_of(problem: Problem, term: LinearTerm) -> Keys:
    """What the states of a problem's keys are made of."""
    sizes, block_k = problem.selection.key_block_sizes, problem.selection.block_k
    zeroed = sizes is not None and problem.uniform is not None
    return Keys(problem.key, problem.value, sizes, block_k, term.feature_map, zeroed)


def _over_all_keys(
    problem: Problem, call: ForwardCall, choice: Choice | None, term: LinearTerm, early: bool, keep_states: bool
) -> Results:
    (output, lse), pairs = call.results, range(call.pairs)
    means = lse.new_empty((2, call.pairs if keep_states else 0, 1, output.shape[-1]))
    pooled = _means_of_keys(call, choice, call.pairs)
    keys = keys_of(problem, term)
    state, norm = key_state_sums(keys, pooled, Means(means[0], means[1], term.weight) if keep_states else None)
    if call.wants_means:
        call.take_means(pairs, pooled)
    if choice is not None:
        choice.make(pairs, pooled)
    projected = state @ term.weight.t() if early else state
    call.run(pairs, projected, norm, means if keep_states else None)
    return Results(output, lse, norm, state, means)


def _by_masks(
    problem: Problem,
    call: ForwardCall,
    mask: Tensor,
    choice: Choice | None,
    term: LinearTerm,
    beside: bool,
    keep_states: bool,
    weigh: Callable[[range], None] | None,
) -> Results:
    """beside: whether a group of heads may be prepared beside another one that attends."""
    output, lse = call.results
    head_dim, (rows, columns) = output.shape[-1], mask.shape[2:]
    area, square = head_dim**2, (head_dim, head_dim)
    most = max(GROUP_BYTES, output.nbytes) // ((rows + columns) * head_dim * (head_dim + 1) * 2)
    parts = list(groups(call.pairs, most))
    largest, kept = len(parts[0]), call.pairs if keep_states else 0
    norm = lse.new_empty((kept, rows, head_dim))
    state = mask.new_empty((kept, rows, *square))
    means = lse.new_empty((2, kept, 1, head_dim))
    if keep_states:
        h, z, sums = mask.new_empty((largest, columns, area)), lse.new_empty((largest, columns, head_dim)), None
    else:
        # Side by side, for one product. Rounding Z costs next to nothing: phi(Q) Z sums products of positive numbers,
        # each rounded on its own.
        h = mask.new_empty((largest, columns, area + head_dim))
        z, sums = h[..., area:], mask.new_empty((largest, rows, area + head_dim))
    squares = (h if keep_states else h[..., :area]).unflatten(2, square)
    mask_of_pairs = mask.flatten(0, 1)
    keys = keys_of(problem, term)

    def prepare(group: range) -> None:
        """A group's key states in h and z, its keys where the call wants their means, its lists, mask, and mix."""
        count = len(group)
        pooled = _means_of_keys(call, choice, count)
        states = (squares, z) if count == largest else (squares[:count], z[:count])
        of_group = (x[group.start : group.stop] for x in (means[0], means[1]))
        key_states(keys, group, pooled, *states, Means(*of_group, term.weight) if keep_states else None)
        if call.wants_means:
            call.take_means(group, pooled)
        if choice is not None:
            choice.make(group, pooled)
        if weigh is not None:
            weigh(group)

    side = None
    if len(parts) > 1 and beside:
        side = side_stream(output.device)  # the next group is prepared while one attends
    prepare(parts[0])
    for group, following in itertools.zip_longest(parts, parts[1:]):
        group_mask, group_h, group_z, group_sums = mask_of_pairs, h, z, sums
        group_state, group_norm = state, norm
        if len(parts) > 1:  # views cost the host time
            part, count = slice(group.start, group.stop), len(group)
            group_mask, group_h, group_z = mask_of_pairs[part], h[:count], z[:count]
            if keep_states:
                group_state, group_norm = state[part], norm[part]
            else:
                group_sums = sums[:count]
        if keep_states:
            torch.bmm(group_mask, group_h, out=group_state.flatten(2))
            masked_sum(group_mask, group_z, group_norm)
        else:
            torch.bmm(group_mask, group_h, out=group_sums)
            group_state, group_norm = group_sums[..., :area].unflatten(2, square), group_sums[..., area:]
        group_means = means[:, group.start : group.stop] if keep_states else None
        if side is not None and following is not None:
            side.follow()  # h and z are free again
        call.run(group, group_state, group_norm, group_means)
        if following is not None:
            with contextlib.nullcontext() if side is None else side:
                prepare(following)
    return Results(output, lse, norm, state, means)
