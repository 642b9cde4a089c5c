"""Searches of a row of scores by halves, over integers that order like them. For Triton kernels."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def order_preserving(x):
    """int32 that order like the float32 x, -0 equal to 0."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def from_order_preserving(keys):
    """The inverse of `order_preserving`."""
    return (keys ^ ((keys >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def middle(first, last, step):
    """A number from first + 1 to last: half way between the scores, and after ten steps between their integers.

    The first finds a score among others like it in two thirds of the steps, the second ends after 32 in any case.
    """
    scores = order_preserving(0.5 * from_order_preserving(first) + 0.5 * from_order_preserving(last))
    integers = (first | last) - ((first ^ last) >> 1)  # rounded up, without overflow
    return tl.where(step < 10, tl.minimum(tl.maximum(scores, first + 1), last), integers)


@triton.jit
def thresholds(keys, low_keys, first, last, wanted_top, wanted_low, BOTH: tl.constexpr):
    """The `wanted_top`th largest of `keys` and the `wanted_low`th smallest of `low_keys`, all within first ... last.

    Or another number that parts those wanted from the rest: the search stops when the count is right.
    """
    top_from = tl.where(wanted_top > 0, first, last)
    top_to = last
    low_from = first
    low_to = tl.where(wanted_low > 0, last, first) if BOTH else first
    step = 0
    while (top_from < top_to) | (low_from < low_to):
        top = middle(top_from, top_to, step)
        if BOTH:
            low = middle(low_from, low_to, step) - 1
            counts = tl.sum((keys >= top).to(tl.int32) + ((low_keys <= low).to(tl.int32) << 16), 0)
            count = counts & 0xFFFF
            low_count = counts >> 16
            low_from = tl.where(low_count > wanted_low, low_from, tl.where(low_count == wanted_low, low, low + 1))
            low_to = tl.where(low_count >= wanted_low, low, low_to)
        else:
            count = tl.sum((keys >= top).to(tl.int32), 0)
        top_to = tl.where(count > wanted_top, top_to, tl.where(count == wanted_top, top, top - 1))
        top_from = tl.where(count >= wanted_top, top, top_from)
        step += 1
    return top_from, low_to


@triton.jit
def count_for_mass(keys, valid, mass, first, last):
    """How many of the largest valid `keys`, all within first ... last, have `mass` of the softmax of their scores."""
    highest = from_order_preserving(last)
    weights = tl.where(valid, tl.exp(from_order_preserving(keys) - highest), 0.0)
    wanted = mass * tl.sum(weights, 0)
    step = 0
    # To the highest threshold with enough: a key, since the mass changes only there.
    while first < last:
        threshold = middle(first, last, step)
        enough = tl.sum(tl.where(keys >= threshold, weights, 0.0), 0) >= wanted
        first = tl.where(enough, threshold, first)
        last = tl.where(enough, last, threshold - 1)
        step += 1
    above = valid & (keys > first)
    tied = tl.sum((valid & (keys == first)).to(tl.int32), 0)
    missing = wanted - tl.sum(tl.where(above, weights, 0.0), 0)
    needed = tl.ceil(missing / tl.exp(from_order_preserving(first) - highest)).to(tl.int32)
    return tl.sum(above.to(tl.int32), 0) + tl.minimum(tl.maximum(needed, 1), tied)
