"""phi, the feature maps of the linear branch, and their derivatives, on tiles in registers."""

from __future__ import annotations

import triton
import triton.language as tl

EPSILON = tl.constexpr(1e-5)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def feature_map(x, FEATURE_MAP: tl.constexpr):
    """phi(x) in float32 for a tile [N, D]: "softmax" over D, "elu" + 1 or "relu"."""
    tl.static_assert(FEATURE_MAP == "softmax" or FEATURE_MAP == "elu" or FEATURE_MAP == "relu")
    x = x.to(tl.float32)
    if FEATURE_MAP == "softmax":
        x = x * LOG2_E
        e = tl.math.exp2(x - tl.max(x, 1)[:, None])
        return e * (1.0 / tl.sum(e, 1))[:, None]
    elif FEATURE_MAP == "elu":
        return tl.where(x > 0.0, x + 1.0, tl.math.exp2(tl.minimum(x, 0.0) * LOG2_E))
    else:
        return tl.maximum(x, 0.0)


@triton.jit
def feature_map_backward(x, phi, grad_phi, FEATURE_MAP: tl.constexpr):
    """The gradient of x [N, D] in float32, given phi(x) and the gradient of phi(x)."""
    if FEATURE_MAP == "softmax":
        return phi * (grad_phi - tl.sum(phi * grad_phi, 1)[:, None])
    elif FEATURE_MAP == "elu":
        # elu(x) + 1 is exp(x) below zero, its own derivative.
        return grad_phi * tl.where(x.to(tl.float32) > 0.0, 1.0, phi)
    else:
        return tl.where(x.to(tl.float32) > 0.0, grad_phi, 0.0)
