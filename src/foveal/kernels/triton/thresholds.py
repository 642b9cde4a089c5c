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
def narrowed(low_from, low_to, low, count, wanted):
    """Where the `wanted`th smallest key is, if `count` keys are at most `low`: from low_from to low_to."""
    low_from = tl.where(count > wanted, low_from, tl.where(count == wanted, low, low + 1))
    return low_from, tl.where(count >= wanted, low, low_to)


@triton.jit
def thresholds(keys, low_keys, top_from, top_to, low_from, low_to, wanted_top, wanted_low, BOTH: tl.constexpr):
    """The `wanted_top`th largest of `keys`, from top_from to top_to, and the `wanted_low`th smallest of `low_keys`.

    Or another number that parts those wanted from the rest: the search stops when the count is right.
    """
    step = 0
    while (top_from < top_to) | (low_from < low_to):
        top = middle(top_from, top_to, step)
        if BOTH:
            low = middle(low_from, low_to, step) - 1
            counts = tl.sum((keys >= top).to(tl.int32) + ((low_keys <= low).to(tl.int32) << 16), 0)
            count = counts & 0xFFFF
            low_from, low_to = narrowed(low_from, low_to, low, counts >> 16, wanted_low)
        else:
            count = tl.sum((keys >= top).to(tl.int32), 0)
        top_to = tl.where(count > wanted_top, top_to, tl.where(count == wanted_top, top, top - 1))
        top_from = tl.where(count >= wanted_top, top, top_from)
        step += 1
    return top_from, low_to


@triton.jit
def threshold_of_mass(keys, valid, low_keys, first, last, low_from, low_to, mass, wanted_low, BOTH: tl.constexpr):
    """Of the valid `keys`, all within first ... last, those that reach a threshold have `mass` of their softmax.

    Returns the highest such threshold, how many keys reach it, and how many of these the mass takes: fewer only where
    keys are equal to the threshold. And where the search for the `wanted_low`th smallest of `low_keys`, as in
    `thresholds`, has got on the way.
    """
    highest = from_order_preserving(last)
    weights = tl.where(valid, tl.exp(from_order_preserving(keys) - highest), 0.0)
    wanted = mass * tl.sum(weights, 0)
    reached = tl.sum(valid.to(tl.int32), 0)
    above = 0
    mass_above = 0.0
    step = 0
    # Keys from `first` on have enough, those above `last` do not. With one key between them that is the threshold.
    while (first < last) & (reached - above > 1):
        threshold = middle(first, last, step)
        reaches = (keys >= threshold) & valid
        found = tl.sum(tl.where(reaches, weights, 0.0), 0)
        if BOTH:
            low = middle(low_from, low_to, step) - 1
            counts = tl.sum(reaches.to(tl.int32) + ((low_keys <= low).to(tl.int32) << 16), 0)
            count = counts & 0xFFFF
            searched = low_from < low_to
            new_from, new_to = narrowed(low_from, low_to, low, counts >> 16, wanted_low)
            low_from, low_to = tl.where(searched, new_from, low_from), tl.where(searched, new_to, low_to)
        else:
            count = tl.sum(reaches.to(tl.int32), 0)
        enough = found >= wanted
        first = tl.where(enough, threshold, first)
        reached = tl.where(enough, count, reached)
        last = tl.where(enough, last, threshold - 1)
        above = tl.where(enough, above, count)
        mass_above = tl.where(enough, mass_above, found)
        step += 1
    each = tl.exp(from_order_preserving(first) - highest)
    more = tl.maximum(tl.ceil((wanted - mass_above) / each).to(tl.int32), 1)
    return first, reached, tl.minimum(above + more, reached), low_from, low_to
