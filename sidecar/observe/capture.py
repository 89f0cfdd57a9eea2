"""The recording of an incident: what the flight recorder has, as JSON of at most 256 KiB.

Pure. ``capture`` takes a copy of plain values on the event loop, in 1 ms or so; ``written`` makes text of it, in
a thread.
"""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Final

from sidecar.observe.evidence import Evidence, Settings
from sidecar.observe.failures import FailureEntry
from sidecar.observe.flight import Flight, application_of
from sidecar.work import Blocker, Holder, SlowQuery, Statement

LARGEST: Final = 256 * 1024
"""Bytes of one incident."""

_POINTS: Final = 300
_HOLDERS: Final = 50
_SLOW: Final = 10
_BLOCKERS: Final = 10
_FAILURES: Final = 20
_STATEMENTS: Final = 20
_SECONDS: Final = 60
_WAITERS: Final = 20
_TEXT: Final = 500  # characters of a statement
_NAME: Final = 64  # characters of a name

Json = dict[str, object]
Wall = Callable[[float], str]
"""An instant of the sidecar's clock as a date."""


def iso(unix: float) -> str:
    """ISO 8601, UTC."""
    return (
        datetime.fromtimestamp(unix, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    )


def capture(
    flight: Flight,
    evidence: Evidence,
    statements: Sequence[Statement],
    failures: Sequence[FailureEntry],
    wall: Wall,
    now: float,
) -> Json:
    """Everything but the incident's own fields. ``statements``: the ones with most time."""
    gauges = flight.gauges
    holders = [] if gauges is None else sorted(gauges.holders(), key=lambda each: each.leased_at)
    waiters = [] if gauges is None else gauges.waiters()
    texts: dict[str, Statement] = {}

    def known(statement: Statement | None) -> str | None:
        if statement is None:
            return None
        if len(texts) < 2 * _STATEMENTS:
            texts.setdefault(statement.fingerprint, statement)
        return statement.fingerprint

    for statement in statements[:_STATEMENTS]:
        known(statement)
    by_application = Counter((application_of(who), who.user[:_NAME]) for who in waiters)
    return {
        "evidence_figures": _figures(evidence),
        "timeline": _timeline(flight, now),
        "seconds": _seconds(flight, wall),
        "holders": [_holder(each, known, now, wall) for each in holders[:_HOLDERS]],
        "holders_total": len(holders),
        "waiters": [
            {"application": application, "user": user, "clients": count}
            for (application, user), count in by_application.most_common(_WAITERS)
        ],
        "waiters_total": len(waiters),
        "slow_queries": [_slow(at, each, known, now, wall) for at, each in flight.slow][-_SLOW:],
        "leaks": [
            _holder(each, known, now, wall) for each in list(flight.leaks.values())[:_HOLDERS]
        ],
        "recent_failures": [_failure(each, known, wall) for each in failures[:_FAILURES]],
        "statements": [_statement(each) for each in texts.values()],
        "config": _config(evidence.settings),
    }


def _figures(e: Evidence) -> Json:
    return {
        "window_seconds": _rounded(e.seconds),
        "used": e.used,
        "idle": e.idle,
        "connecting": e.connecting,
        "max_size": e.max_size,
        "pending": e.pending,
        "most_pending": e.most_pending,
        "oldest_wait_seconds": _rounded(e.oldest_wait),
        "longest_wait_seconds": _rounded(e.longest_wait),
        "full_ratio": _rounded(e.full),
        "is_up": e.is_up,
        "down_seconds": _rounded(e.down_for),
        "why_down": e.why_down,
        "acquire_timeouts": e.timeouts,
        "connections_lost": e.lost,
        "connections_refused": e.refused,
        "transactions_per_second": _rounded(e.transactions),
        "transactions_per_second_before": _maybe(e.transactions_before),
        "queries_per_second": _rounded(e.queries),
        "errors_per_second": _rounded(e.failures),
        "errors_per_second_before": _maybe(e.failures_before),
        "clients_per_second": _rounded(sum(e.arrivals) / max(len(e.arrivals), 1)),
        "clients_per_second_before": _maybe(e.arrived_before),
        "clients_rejected_per_second": _rounded(e.rejected),
        "connection_seconds": _rounded(e.connection_seconds),
        "shares": [
            {
                "application": share.application,
                "fingerprint": None if share.statement is None else share.statement.fingerprint,
                "state": share.state,
                "connection_seconds": _rounded(share.seconds),
                "most_connections": share.most,
                "oldest_seconds": _rounded(share.oldest),
            }
            for share in e.shares
        ],
        "errors": [
            {
                "origin": each.origin,
                "sqlstate": each.sqlstate,
                "application": each.application,
                "fingerprint": None if each.statement is None else each.statement.fingerprint,
                "count": each.times,
                "message": each.message,
            }
            for each in e.failed
        ],
        "new_clients": [
            {
                "application": each.application,
                "user": each.user,
                "host": each.host[:_NAME],
                "clients": each.clients,
            }
            for each in e.arrived
        ],
    }


def _timeline(flight: Flight, now: float) -> Json:
    """One row for each step: of its ticks the largest values, and whether the server was always up."""
    columns = [
        "at_seconds",
        "used",
        "idle",
        "connecting",
        "pending",
        "oldest_wait_seconds",
        "is_up",
    ]
    ats, *gauges, oldest, up = (
        flight.columns()
    )  # as tuples of ticks it would take ten times as long
    size = max(1, -(-len(ats) // _POINTS))
    rows: list[list[object]] = []
    for first in range(0, len(ats), size):
        end = first + size
        largest = [max(gauge[first:end]) for gauge in gauges]
        wait = _rounded(max(oldest[first:end]))
        rows.append([_rounded(ats[first] - now), *largest, wait, bool(min(up[first:end]))])
    return {"step_seconds": _rounded(size * 0.1), "columns": columns, "rows": rows}


def _seconds(flight: Flight, wall: Wall) -> list[Json]:
    """What the last minute brought, second by second."""
    return [
        {
            "at": wall(second.at),
            "transactions": second.transactions,
            "queries": second.queries,
            "new_clients": second.arrivals,
            "errors": second.failures,
            "acquire_timeouts": second.timeouts,
            "connections_lost": second.lost,
            "connections_refused": second.refused,
            "holders": [
                {
                    "application": held.application,
                    "fingerprint": None if held.statement is None else held.statement.fingerprint,
                    "state": held.state,
                    "connections": held.most,
                    "oldest_seconds": _rounded(held.oldest),
                }
                for held in second.held[:3]
            ],
        }
        for second in list(flight.seconds)[-_SECONDS:]
    ]


def _holder(
    holder: Holder, known: Callable[[Statement | None], str | None], now: float, wall: Wall
) -> Json:
    who = holder.who
    opened = holder.transaction_since
    return {
        "server_id": holder.server,
        "backend_pid": holder.backend_pid,
        "client_id": who.client,
        "application": application_of(who),
        "user": who.user[:_NAME],
        "database": who.database[:_NAME],
        "address": who.address[:_NAME],
        "state": holder.state,
        "state_seconds": _rounded(max(0.0, now - holder.since)),
        "leased_at": wall(holder.leased_at),
        "lease_seconds": _rounded(max(0.0, now - holder.leased_at)),
        "transaction_seconds": _rounded(max(0.0, now - opened)) if opened else None,
        "pin": holder.pin or None,
        "fingerprint": known(holder.statement),
    }


def _slow(
    at: float,
    slow: SlowQuery,
    known: Callable[[Statement | None], str | None],
    now: float,
    wall: Wall,
) -> Json:
    return {
        "seen_at": wall(at),
        "age_seconds": _rounded(slow.age),
        "trace_id": None if slow.trace is None else slow.trace.trace_id,
        "wait_event": slow.wait_event[:_NAME],
        "cause": slow.cause[:_TEXT],
        "holder": _holder(slow.holder, known, now, wall),
        "blockers": [_blocker(each, known, now, wall) for each in slow.blockers[:_BLOCKERS]],
    }


def _blocker(
    blocker: Blocker, known: Callable[[Statement | None], str | None], now: float, wall: Wall
) -> Json:
    return {
        "backend_pid": blocker.backend_pid,
        "waits_for": list(blocker.waits_for[:_BLOCKERS]),
        "state": blocker.state[:_NAME],
        "wait_event": blocker.wait_event[:_NAME],
        "application": blocker.application[:_NAME],
        "user": blocker.user[:_NAME],
        "is_ours": blocker.is_ours,
        "holder": None if blocker.holder is None else _holder(blocker.holder, known, now, wall),
    }


def _failure(
    entry: FailureEntry, known: Callable[[Statement | None], str | None], wall: Wall
) -> Json:
    return {
        "origin": entry.origin,
        "sqlstate": entry.sqlstate,
        "application": entry.application,
        "fingerprint": known(entry.statement),
        "count": entry.count,
        "first_at": wall(entry.first_at),
        "last_at": wall(entry.last_at),
        "message": entry.message[:_TEXT],
    }


def _statement(statement: Statement) -> Json:
    return {
        "fingerprint": statement.fingerprint,
        "text": statement.text[:_TEXT],
        "calls": statement.calls,
        "seconds": _rounded(statement.seconds),
        "longest_seconds": _rounded(statement.longest),
        "rows": statement.rows,
        "errors": dict(list(statement.errors.items())[:_FAILURES]),
        "blamed_wait_seconds": _rounded(statement.blamed),
    }


def _config(settings: Settings) -> Json:
    return dict(settings.options)


def _rounded(value: float) -> float:
    return round(value, 3)


def _maybe(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


_FIRST_TO_GO: Final = ("seconds", "slow_queries", "leaks", "holders", "statements", "timeline")


def written(incident: Json) -> bytes:
    """UTF-8 text. What makes it too large is left out, and named in ``left_out``."""
    text = _dumped(incident)
    left_out: list[str] = []
    for key in _FIRST_TO_GO:
        if len(text) <= LARGEST:
            break
        left_out.append(key)
        text = _dumped({**incident, key: None, "left_out": left_out})
        incident = {**incident, key: None}
    return text


def _dumped(incident: Json) -> bytes:
    text = json.dumps(incident, indent=1, ensure_ascii=False, default=str)
    return text.encode("utf-8", "backslashreplace") + b"\n"
