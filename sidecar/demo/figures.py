"""What the demo's view shows, worked out from the sidecar's own counters.

Owns: the differences between two looks (queries and errors per second) and what counts as an event.
Does not own: the counting (``observe.recorder``) nor how it looks (``view``).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import nan

from sidecar.events import PoolSnapshot
from sidecar.observe.recorder import PoolRecorder, Recorder

WINDOW = "1m"
IDLE_IN_TRANSACTION = 5.0  # seconds after which the view speaks of it


@dataclass(frozen=True, slots=True)
class PoolFigures:
    """One pool over the time since the look before. Times in seconds."""

    name: str
    mode: str
    is_up: bool
    was_up: bool  # now or before: what precedes the first connection is no event
    used: int
    idle: int
    connecting: int
    max_size: int
    waiting: int
    oldest_wait: float
    longest_idle_in_transaction: float
    queries_per_second: float
    errors_per_second: float
    error_rate: float  # errors per query, 0-1
    quantiles: tuple[float, float, float]  # P50, P90, P99 of WINDOW; NaN without queries
    queries: int  # since the start, as the next two
    errors_by_class: Mapping[str, int]  # the class is the first two characters of the SQLSTATE
    slow: int

    @property
    def errors(self) -> int:
        return sum(self.errors_by_class.values())

    @property
    def is_full(self) -> bool:
        return self.used >= self.max_size

    @property
    def saturation(self) -> float:
        return self.used / self.max_size


@dataclass(frozen=True, slots=True)
class DemoFigures:
    """One look at the sidecar. Times in seconds."""

    elapsed: float
    pools: tuple[PoolFigures, ...]
    events: tuple[str, ...]  # what happened since the look before


class FigureReader:
    """Reads a recorder again and again; ``began`` and ``now`` are the recorder's clock."""

    def __init__(self, recorder: Recorder, began: float) -> None:
        self._recorder = recorder
        self._began = began
        self._read_at = began
        self._before: dict[str, PoolFigures] = {}

    def read(self, snapshots: Sequence[PoolSnapshot], now: float) -> DemoFigures:
        took = max(now - self._read_at, 1e-3)
        self._read_at = now
        pools = tuple(
            _figures(
                snapshot,
                self._recorder.pools[snapshot.name],
                self._before.get(snapshot.name),
                took,
                now,
            )
            for snapshot in snapshots
        )
        events = tuple(
            event for pool in pools for event in _events(pool, self._before.get(pool.name))
        )
        self._before = {pool.name: pool for pool in pools}
        return DemoFigures(now - self._began, pools, events)


def _figures(
    snapshot: PoolSnapshot,
    counted: PoolRecorder,
    before: PoolFigures | None,
    took: float,
    now: float,
) -> PoolFigures:
    queries = sum(histogram.count() for histogram in counted.queries)
    errors_by_class: dict[str, int] = {}
    for (_, sqlstate_class), count in counted.errors.items():
        errors_by_class[sqlstate_class] = errors_by_class.get(sqlstate_class, 0) + count
    new_queries = queries - (before.queries if before else 0)
    new_errors = sum(errors_by_class.values()) - (before.errors if before else 0)
    values, samples = counted.latency.quantiles(WINDOW, now, (0.5, 0.9, 0.99))
    p50, p90, p99 = values if samples else (nan, nan, nan)
    return PoolFigures(
        name=snapshot.name,
        mode=snapshot.mode.value,
        is_up=snapshot.is_up,
        was_up=snapshot.is_up or (before is not None and before.was_up),
        used=snapshot.used,
        idle=snapshot.idle,
        connecting=snapshot.connecting,
        max_size=snapshot.max_size,
        waiting=snapshot.pending,
        oldest_wait=snapshot.oldest_wait,
        longest_idle_in_transaction=snapshot.longest_idle_in_transaction,
        queries_per_second=new_queries / took,
        errors_per_second=new_errors / took,
        error_rate=new_errors / max(new_queries, new_errors, 1),
        quantiles=(p50, p90, p99),
        queries=queries,
        errors_by_class=errors_by_class,
        slow=sum(counted.slow),
    )


def _events(pool: PoolFigures, before: PoolFigures | None) -> list[str]:
    """What began or ended between two looks, most important last."""
    events: list[str] = []
    if before is None or not before.was_up:
        return events
    if _forgets(pool) and not _forgets(before):
        took = pool.longest_idle_in_transaction
        events.append(f"a transaction is open and idle for {took:.0f} s: forgotten?")
    for sqlstate_class, count in pool.errors_by_class.items():
        new = count - before.errors_by_class.get(sqlstate_class, 0)
        if new:
            events.append(f"{_count(new, 'query')} failed, SQLSTATE {sqlstate_class}...")
    if pool.slow > before.slow:
        events.append(f"{_count(pool.slow - before.slow, 'query')} slower than the threshold")
    if pool.waiting and not before.waiting:
        events.append(
            f"{pool.used} of {pool.max_size} used, {_count(pool.waiting, 'client')} waiting"
        )
    if before.waiting and not pool.waiting:
        events.append("nobody waits any more")
    if pool.is_up is not before.is_up:
        events.append("PostgreSQL is back" if pool.is_up else "PostgreSQL is down")
    return [f"{pool.name}: {event}" for event in events]


def _forgets(pool: PoolFigures) -> bool:
    return pool.longest_idle_in_transaction >= IDLE_IN_TRANSACTION


def _count(number: int, noun: str) -> str:
    if number == 1:
        return f"1 {noun}"
    return f"{number} {noun[:-1]}ies" if noun.endswith("y") else f"{number} {noun}s"
