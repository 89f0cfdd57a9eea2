"""SEAM: what explains, of one pool."""

from collections.abc import Mapping, Sequence
from typing import Any

from sidecar.observe.recorder import PoolRecorder, Recorder
from sidecar.work import Blocker, Holder, SlowQuery, Statement


def leaks(pool: PoolRecorder) -> Mapping[int, Holder]:
    return getattr(pool, "leaks", {})


def leaks_began(pool: PoolRecorder) -> int:
    return getattr(pool, "leaks_began", 0)


def blocked(pool: PoolRecorder) -> Mapping[int, Blocker]:
    return getattr(pool, "blocked", {})


def slow_queries(pool: PoolRecorder) -> Sequence[tuple[float, SlowQuery]]:
    return getattr(pool, "slow_queries", ())


def failures(pool: PoolRecorder) -> Sequence[Any]:
    table = getattr(pool, "failures", None)
    return () if table is None else table.entries()


def ranked(pool: PoolRecorder, sort: str, limit: int) -> list[Statement]:
    table: Any = pool.statements
    return table.ranked(sort, limit) if hasattr(table, "ranked") else list(table._known.values())


def statement(pool: PoolRecorder, fingerprint: str) -> Statement | None:
    table: Any = pool.statements
    found: Statement | None = (
        table.get(fingerprint) if hasattr(table, "get") else table._known.get(fingerprint)
    )
    return found


def quantiles(pool: PoolRecorder, statement: Statement, now: float) -> tuple[list[float], int]:
    table: Any = pool.statements
    if hasattr(table, "quantiles"):
        found: tuple[list[float], int] = table.quantiles(statement, now)
        return found
    return [float("nan")] * 3, 0


def blame(pool: PoolRecorder) -> tuple[float, float, dict[str, float]]:
    account = getattr(pool, "blame", None)
    if account is None:
        return 0.0, 0.0, {}
    return account.waited, account.charged, account.by_application()


def verdict(pool: PoolRecorder, now: float) -> dict[str, object]:
    if not hasattr(pool, "verdict"):
        return {"kind": "healthy"}
    found: dict[str, object] = pool.verdict(now).to_json()
    return found


def incidents(recorder: Recorder) -> Sequence[Any]:
    store = getattr(recorder, "incidents", None)
    return () if store is None else store.all()


def incident(recorder: Recorder, id: str) -> Any:
    store = getattr(recorder, "incidents", None)
    return None if store is None else store.get(id)
