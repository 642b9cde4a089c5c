"""Dense attention, for the few queries that read every key: those of protected tokens."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from foveal.checks import is_transformed


def dense_attention(
    query: Tensor, key: Tensor, value: Tensor, kv_lengths: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """softmax(Q K^T * scale) V over each sample's valid keys, [B, H, Lq, D].

    Args:
        query: [B, H, Lq, D]. key, value: [B, H, Lk, D].
        kv_lengths: int [B], valid keys at the front of each sample; None for all. Padding may hold anything.
        scale: None for 1 / sqrt(D).
    """
    mask = None
    if kv_lengths is not None:
        valid = torch.arange(key.shape[2], device=key.device) < kv_lengths[:, None].to(key.device)
        mask = valid[:, None, None]
        key, value = (torch.where(valid[:, None, :, None], x, 0) for x in (key, value))
    if not is_transformed(query, key, value):
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    # In operations that every transform of PyTorch knows.
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return scores.softmax(-1).to(value.dtype) @ value
