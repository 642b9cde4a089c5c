"""Means with confidence intervals, for a handful of videos."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean over videos and its confidence interval.

    Args:
        mean: the mean of the values.
        low, high: the ends of the interval; None for a single value, which has no interval.
        count: how many values.
    """

    mean: float
    low: float | None
    high: float | None
    count: int

    @classmethod
    def of(cls, values: list[float]) -> Estimate:
        """Student's t interval at `CONFIDENCE`.

        It is right for a few values of roughly normal spread, where a bootstrap is too narrow.

        Raises:
            ValueError: for no values.
        """
        if not values:
            raise ValueError("an estimate needs at least one value")
        mean, count = statistics.fmean(values), len(values)
        if count == 1:
            return cls(mean, None, None, 1)
        half = t_quantile((1 + CONFIDENCE) / 2, count - 1) * statistics.stdev(values) / math.sqrt(count)
        return cls(mean, mean - half, mean + half, count)

    def text(self, digits: int, unit: str = "") -> str:
        """Format as "31.2 [30.1, 32.3]", with this many digits after the point and the unit after the mean."""
        if self.low is None:
            return f"{self.mean:.{digits}f}{unit}"
        return f"{self.mean:.{digits}f}{unit} [{self.low:.{digits}f}, {self.high:.{digits}f}]"


def t_quantile(probability: float, degrees: int) -> float:
    """Quantile above the median of Student's t distribution, by bisection."""
    low, high = 0.0, 1.0
    while _t_cumulative(high, degrees) < probability:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_cumulative(middle, degrees) < probability else (low, middle)
    return (low + high) / 2


def _t_cumulative(value: float, degrees: int) -> float:
    """P(T <= value) for value >= 0, in closed form (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    angle = math.atan(value / math.sqrt(degrees))
    cosine = math.cos(angle)
    if degrees % 2:
        # 2/pi (theta + sin theta (cos theta + 2/3 cos^3 theta + ...))
        term, total = cosine, 0.0
        for power in range(1, degrees - 1, 2):
            total += term
            term *= cosine**2 * (power + 1) / (power + 2)
        inside = 2 / math.pi * (angle + math.sin(angle) * total)
    else:
        # sin theta (1 + 1/2 cos^2 theta + 3/8 cos^4 theta + ...)
        term, total = 1.0, 0.0
        for power in range(0, degrees - 1, 2):
            total += term
            term *= cosine**2 * (power + 1) / (power + 2)
        inside = math.sin(angle) * total
    return (1 + inside) / 2
