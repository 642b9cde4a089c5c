"""Block-sparse softmax attention, as written on paper: the oracle for every other implementation.

    O_i = softmax over the keys of i's critical blocks (Q_i K^T * scale) V,    LSE_i = log sum exp of the same scores.

Any floating dtype, dense memory, differentiated by autograd. Suffixes give shapes: B, H, M = Lq, N = Lk, D.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from foveal.blocks import BlockSelection


def block_sparse_attention_reference(
    query_BHMD: Tensor, key_BHND: Tensor, value_BHND: Tensor, selection: BlockSelection, scale: float
) -> tuple[Tensor, Tensor]:
    """The output [B, H, Lq, D] in the input dtype and LSE [B, H, Lq]; 0 and -inf for rows without a critical key."""
    kept_BHMN = selection.expand(selection.critical_mask())
    # Padding may hold anything, NaN included, and 0 * NaN would spread it, backward too.
    key_BHND, value_BHND = (torch.where(selection.key_valid()[:, None, :, None], x, 0) for x in (key_BHND, value_BHND))

    scores_BHMN = (query_BHMD @ key_BHND.transpose(-1, -2)) * scale
    scores_BHMN = scores_BHMN.to(torch.promote_types(scores_BHMN.dtype, torch.float32))
    scores_BHMN = scores_BHMN.masked_fill(~kept_BHMN, -math.inf)

    any_BHM1 = kept_BHMN.any(-1, keepdim=True)
    top_BHM1 = torch.where(any_BHM1, scores_BHMN.amax(-1, keepdim=True).detach(), 0)
    weights_BHMN = torch.exp(scores_BHMN - top_BHM1)
    total_BHM1 = weights_BHMN.sum(-1, keepdim=True)
    probs_BHMN = weights_BHMN / torch.where(any_BHM1, total_BHM1, 1)

    output_BHMD = probs_BHMN.to(value_BHND.dtype) @ value_BHND
    lse_BHM = (top_BHM1 + torch.log(torch.where(any_BHM1, total_BHM1, 1))).squeeze(-1)
    return output_BHMD, lse_BHM.masked_fill(~any_BHM1.squeeze(-1), -math.inf)
