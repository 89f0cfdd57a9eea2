"""Histograms of classic buckets, and which ones: counts that Prometheus can add up.

Pure.
"""

from bisect import bisect_left
from math import inf
from typing import Final

from sidecar.observe.sketch import BUCKETS, index_of

WAIT_BUCKETS: Final[tuple[float, ...]] = (
    *(0.0001, 0.0005, 0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5),
    *(1.0, 2.5, 5.0, 10.0, 30.0),
)
USE_BUCKETS: Final[tuple[float, ...]] = (*WAIT_BUCKETS, 60.0, 300.0)
OVERHEAD_BUCKETS: Final[tuple[float, ...]] = (0.00001, 0.000025, 0.00005, *WAIT_BUCKETS)
LAG_BUCKETS: Final[tuple[float, ...]] = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0)
QUERY_BUCKETS: Final[tuple[float, ...]] = (
    *(0.0001, 0.00025, 0.0005, 0.00075, 0.001, 0.0015, 0.002, 0.003, 0.005, 0.0075),
    *(0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75),
    *(1.0, 2.0, 3.0, 5.0, 10.0, 30.0, 60.0),
)
"""Upper bounds, seconds. The query list holds OpenTelemetry's advised bounds and 5 s; between 0.25 ms and
10 s neighbours are at most a factor of 2 apart, since ``histogram_quantile`` is wrong by up to that."""


class Histogram:
    """Counts by classic buckets: bucket i counts bounds[i-1] < v <= bounds[i], the last what is above."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0  # sum of the values

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def count(self) -> int:
        return sum(self.counts)


def _align(bounds: tuple[float, ...]) -> tuple[list[int], list[float]]:
    """For each bucket of the sketch: the classic bucket its values belong to, and from where on the next.

    A sketch bucket is 2 % wide, so at most one classic bound lies in it: values above that edge
    belong to the classic bucket that follows.
    """
    first = [0] * BUCKETS
    edge = [inf] * BUCKETS
    for bound in bounds:
        index = index_of(bound)
        edge[index] = bound
        first[index + 1 :] = [n + 1 for n in first[index + 1 :]]
    return first, edge


_ALIGNED: Final = _align(QUERY_BUCKETS)
QUERY_FIRST: Final = _ALIGNED[0]
QUERY_EDGE: Final = _ALIGNED[1]

_USES_ALIGNED: Final = _align(USE_BUCKETS)
USE_FIRST: Final = _USES_ALIGNED[0]
USE_EDGE: Final = _USES_ALIGNED[1]
