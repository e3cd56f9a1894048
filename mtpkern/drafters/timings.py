"""Seconds of counts that were not measured, estimated from those that were."""

from collections import deque
from statistics import median

# Latest timings of a count of which the median is used.
TIMINGS = 7


class Timings:
    """Seconds by count: medians of the latest measurements, and straight lines between them."""

    def __init__(self) -> None:
        self._seen: dict[int, deque[float]] = {}
        self._median: dict[int, float] = {}

    def observe(self, count: int, *seconds: float) -> None:
        seen = self._seen.setdefault(count, deque(maxlen=TIMINGS))
        seen.extend(seconds)
        self._median[count] = median(seen)

    def __bool__(self) -> bool:
        return bool(self._median)

    def __call__(self, count: int) -> float:
        """Seconds for `count`: measured, or on the line through the nearest two measured counts.

        Above the largest the line is extended; below the smallest its value is used. 0 before any
        measurement.
        """
        known = self._median
        if count in known:
            return known[count]
        if not known:
            return 0.0
        below = max((n for n in known if n < count), default=None)
        above = min((n for n in known if n > count), default=None)
        if below is None:
            return known[min(known)]
        if above is None:
            below, above = max((n for n in known if n < below), default=0), below
        low, high = known.get(below, 0.0), known[above]
        return max(low, low + (high - low) * (count - below) / (above - below))
