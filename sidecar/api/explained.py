"""SEAM: what explains, of one pool."""

from collections.abc import Sequence

from sidecar.observe.recorder import PoolRecorder
from sidecar.work import SlowQuery


def slow_queries(pool: PoolRecorder) -> Sequence[tuple[float, SlowQuery]]:
    return getattr(pool, "slow_queries", ())
