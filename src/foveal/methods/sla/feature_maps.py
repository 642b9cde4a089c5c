"""phi, the feature maps of the linear branch. They are positive, so their products can replace softmax weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from foveal.checks import product


def apply_feature_map(x: Tensor, feature_map: str, weight: Tensor | None = None) -> Tensor:
    """phi(x) in float32 or better.

    Args:
        x: [..., D].
        feature_map: "softmax" over D, "elu" + 1, "relu", or "hedgehog": softmax of [Wx, -Wx] (arXiv 2402.04347).
        weight: W of hedgehog, [D, D].

    Returns:
        [..., D], or [..., 2D] for hedgehog.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    match feature_map:
        case "softmax":
            return x.softmax(-1)
        case "elu":
            return F.elu(x) + 1
        case "relu":
            return F.relu(x)
        case "hedgehog":
            wx = linear_layer(x, weight)
            return torch.cat((wx, -wx), -1).softmax(-1)
    raise AssertionError(feature_map)


def linear_layer(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` in the dtype of x, also where the backward runs inside of autocast."""
    output = product(x.flatten(0, -2), weight.to(x.dtype).t()).unflatten(0, x.shape[:-1])
    return output if bias is None else output + bias.to(x.dtype)


def feature_dim(feature_map: str, head_dim: int) -> int:
    """D_phi: features per head."""
    return 2 * head_dim if feature_map == "hedgehog" else head_dim
