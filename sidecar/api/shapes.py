"""What the API says of each thing, in the words of ``openapi.yaml``: facts in, JSON out.

Pure. Instants come as those of the sidecar's clock, and leave as text; durations are cut to
microseconds.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import isnan
from typing import Final

from sidecar.events import (
    ClientSnapshot,
    Operation,
    PinReason,
    PoolMode,
    ServerSnapshot,
)
from sidecar.facts import PoolFacts
from sidecar.observe.failures import FailureEntry
from sidecar.work import Blocker, Holder, SlowQuery, Statement, Who

Json = dict[str, object]

LONGEST_TEXT: Final = 500
"""Most characters of a statement in lists."""
NAMED: Final = 5
"""Most leases that one wait names."""

_STATES: Final = {"new": "connecting", "tested": "checking", "being_canceled": "cancelling"}
"""Of server connections, where PgBouncer's words are not ours."""


@dataclass(frozen=True, slots=True)
class Moment:
    """When somebody looks."""

    now: float
    text: Callable[[float], str]
    """An instant as text."""

    def age(self, since: float) -> float:
        return seconds(self.now - since)

    def text_or_none(self, instant: float) -> str | None:
        return self.text(instant) if instant else None

    def age_or_none(self, since: float) -> float | None:
        return self.age(since) if since else None


def seconds(length: float) -> float:
    """A clock that was read earlier makes none negative."""
    return max(0.0, round(length, 6))


# -- who -----------------------------------------------------------------------------------------


def who(each: Who) -> Json:
    return {
        "client": each.client,
        "application": each.application,
        "user": each.user,
        "database": each.database,
        "address": each.address,
    }


def who_is(client: ClientSnapshot) -> Json:
    return {
        "client": client.id,
        "application": client.application,
        "user": client.user,
        "database": client.database,
        "address": address(client.address, client.port),
    }


def address(host: str, port: int) -> str:
    if not port:
        return host
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def client(each: ClientSnapshot, moment: Moment) -> Json:
    return {
        "pool": each.pool,
        **who_is(each),
        "tls": each.tls or None,
        "state": client_state(each),
        "connected_at": moment.text(each.opened_at),
        "connected_seconds": moment.age(each.opened_at),
        "waited_seconds": moment.age_or_none(each.waiting_since),
        "server": each.server or None,
        "prepared_statements": each.prepared_statements,
    }


def client_state(each: ClientSnapshot) -> str:
    if each.waiting_since:
        return "waiting"
    return "active" if each.server else "idle"


# -- statements ----------------------------------------------------------------------------------


def statement_or_none(each: Statement | None) -> Json | None:
    if each is None:
        return None
    return {
        "fingerprint": each.fingerprint,
        "operation": Operation(each.operation).label,
        "text": cut(each.text),
    }


def cut(text: str) -> str:
    return text if len(text) <= LONGEST_TEXT else text[:LONGEST_TEXT] + "…"


def latency(window: float, quantiles: tuple[list[float], int]) -> Json:
    """``quantiles``: P50, P90 and P99, and of how many samples."""
    values, samples = quantiles
    p50, p90, p99 = (None if isnan(value) else seconds(value) for value in values)
    return {
        "window_seconds": window,
        "samples": samples,
        "p50_seconds": p50,
        "p90_seconds": p90,
        "p99_seconds": p99,
    }


def statement(pool: str, each: Statement, its_latency: Json) -> Json:
    calls = each.calls
    return {
        "pool": pool,
        "fingerprint": each.fingerprint,
        "operation": Operation(each.operation).label,
        "text": cut(each.text),
        "calls_total": calls,
        "seconds_total": seconds(each.seconds),
        "mean_seconds": seconds(each.seconds / calls) if calls else 0.0,
        "longest_seconds": seconds(each.longest),
        "rows_total": each.rows,
        "errors_total": sum(each.errors.values()),
        "errors": dict(each.errors),
        "blamed_wait_seconds_total": seconds(each.blamed),
        "latency": its_latency,
    }


# -- connections and leases ------------------------------------------------------------------------


def server(each: ServerSnapshot, holder: Holder | None, moment: Moment) -> Json:
    return {
        "pool": each.pool,
        "server": each.id,
        "backend_pid": each.pid,
        "database": each.database,
        "user": each.user,
        "address": address(each.address, each.port),
        "tls": each.tls or None,
        "state": _STATES.get(each.state, each.state),
        "opened_at": moment.text_or_none(each.opened_at),
        "age_seconds": moment.age(each.opened_at) if each.opened_at else 0.0,
        "query_seconds": moment.age_or_none(each.query_started),
        "is_in_transaction": each.in_transaction,
        "is_replaced": each.is_replaced,
        "pin": None if holder is None else holder.pin or None,
        "who": None if holder is None else who(holder.who),
        "statement": statement_or_none(each.statement),
        "prepared_statements": each.prepared_statements,
    }


def holder(each: Holder, moment: Moment, *, is_leak: bool, root: Blocker | None) -> Json:
    return {
        "pool": each.pool,
        "who": who(each.who),
        "server": each.server,
        "backend_pid": each.backend_pid,
        "state": each.state,
        "leased_at": moment.text(each.leased_at),
        "held_seconds": moment.age(each.leased_at),
        "state_seconds": moment.age(each.since),
        "transaction_seconds": moment.age_or_none(each.transaction_since),
        "statement": statement_or_none(each.statement),
        "pin": each.pin or None,
        "is_leak": is_leak,
        "blocked_by": None if root is None else blocker(root),
    }


def behind(each: Holder, moment: Moment) -> Json:
    return {
        "client": each.who.client,
        "server": each.server,
        "application": each.who.application,
        "state": each.state,
        "held_seconds": moment.age(each.leased_at),
        "fingerprint": None if each.statement is None else each.statement.fingerprint,
    }


def pin(each: Holder, moment: Moment) -> Json:
    return {
        "pool": each.pool,
        "who": who(each.who),
        "server": each.server,
        "backend_pid": each.backend_pid,
        "reason": each.pin,
        "pinned_at": moment.text(pinned_at(each)),
        "pinned_seconds": moment.age(pinned_at(each)),
    }


def pinned_at(each: Holder) -> float:
    return each.pinned_at or each.leased_at


def with_pin(each: Holder, mode: PoolMode) -> Holder:
    """In session mode every lease is one that outlives its transaction."""
    if each.pin or mode is not PoolMode.SESSION:
        return each
    return replace(each, pin=PinReason.SESSION_MODE.value)


def wait(
    each: ClientSnapshot,
    ahead: int,
    pool: PoolFacts,
    leases: list[Json],
    total: int,
    moment: Moment,
) -> Json:
    """``leases``: the oldest of the pool's, as ``behind``; of ``total``."""
    cause, reason = pool.why_wait()
    return {
        "pool": each.pool,
        "who": who_is(each),
        "waiting_since_at": moment.text(each.waiting_since),
        "waited_seconds": moment.age(each.waiting_since),
        "timeout_seconds": seconds(each.deadline - moment.now),
        "ahead": ahead,
        "cause": cause.value,
        "reason": reason,
        "behind": leases,
        "behind_total": total,
    }


# -- what explains ---------------------------------------------------------------------------------


def blocker(each: Blocker) -> Json:
    return {
        "backend_pid": each.backend_pid,
        "waits_for": list(each.waits_for),
        "state": each.state or None,
        "state_seconds": seconds(each.age),
        "address": each.address or None,
        "wait_event": each.wait_event or None,
        "application": each.application,
        "user": each.user,
        "is_ours": each.is_ours,
        "who": None if each.holder is None else who(each.holder.who),
        "statement": None if each.holder is None else statement_or_none(each.holder.statement),
    }


def slow_query(seen_at: float, each: SlowQuery, moment: Moment) -> Json:
    then = Moment(seen_at, moment.text)
    return {
        "pool": each.holder.pool,
        "seen_at": moment.text(seen_at),
        "age_seconds": seconds(each.age),
        "holder": holder(each.holder, then, is_leak=False, root=_root(each)),
        "trace_id": None if each.trace is None else each.trace.trace_id,
        "span_id": None if each.trace is None else each.trace.span_id,
        "wait_event": each.wait_event or None,
        "blockers": [blocker(one) for one in each.blockers],
        "not_asked_because": each.cause or None,
    }


def _root(slow: SlowQuery) -> Blocker | None:
    return next((one for one in slow.blockers if not one.waits_for), None)


def failure(pool: str, each: FailureEntry, moment: Moment) -> Json:
    return {
        "pool": pool,
        "origin": each.origin,
        "sqlstate": each.sqlstate,
        "application": each.application,
        "statement": statement_or_none(each.statement),
        "errors_total": each.count,
        "first_at": moment.text(each.first_at),
        "last_at": moment.text(each.last_at),
        "message": each.message,
    }


def waiting(pool: str, waited: float, charged: float) -> Json:
    return {
        "pool": pool,
        "waited_seconds_total": seconds(waited),
        "charged_seconds_total": seconds(charged),
    }


def account(
    pool: str, application: str | None, of: Statement | None, length: float, waited: float
) -> Json:
    """``length`` seconds of the pool's ``waited``."""
    return {
        "pool": pool,
        "application": application,
        "statement": statement_or_none(of),
        "blamed_wait_seconds_total": seconds(length),
        "share": round(length / waited, 6) if waited else 0.0,
    }


# -- pools -----------------------------------------------------------------------------------------


def pool(each: PoolFacts, leaked: int, verdict: str, moment: Moment, last_ping: str | None) -> Json:
    now = each.snapshot
    return {
        "name": now.name,
        "mode": now.mode.value,
        "server": now.server,
        "database": now.database,
        "user": now.user,
        "is_up": now.is_up,
        "is_paused": each.is_paused,
        "is_disabled": each.is_disabled,
        "down_reason": each.why_down or None,
        "used": now.used,
        "idle": now.idle,
        "connecting": now.connecting,
        "max_size": now.max_size,
        "min_idle": now.min_idle,
        "saturation": min(1.0, round(now.used / now.max_size, 4)),
        "waiting": now.pending,
        "oldest_wait_seconds": seconds(now.oldest_wait),
        "queries_in_flight": now.queries_in_flight,
        "longest_query_seconds": seconds(now.longest_running_query),
        "longest_idle_in_transaction_seconds": seconds(now.longest_idle_in_transaction),
        "pinned": sum(now.pinned.values()),
        "leaked": leaked,
        "last_ping_at": last_ping,
        "verdict": verdict,
    }


def pool_detail(each: PoolFacts, leaks: int, errors: int, its_latency: Json, at: str) -> Json:
    """What is said of one pool besides."""
    now, config, totals = each.snapshot, each.config, each.totals
    return {
        "at": at,
        "pins": {reason.value: count for reason, count in now.pinned.items()},
        "prepared_statements": now.prepared_statements,
        "limits": {
            "acquire_timeout_seconds": config.acquire_timeout,
            "query_timeout_seconds": config.query_timeout,
            "transaction_timeout_seconds": config.transaction_timeout,
            "idle_in_transaction_timeout_seconds": config.idle_in_transaction_timeout,
            "client_idle_timeout_seconds": config.client_idle_timeout,
            "slow_query_threshold_seconds": config.slow_query_threshold,
            "leak_threshold_seconds": config.leak_threshold,
            "max_waiting": config.max_waiting,
            "max_clients": config.max_clients,
        },
        "totals": {
            "leases_total": totals.assignments,
            "transactions_total": totals.transactions,
            "transaction_seconds_total": seconds(totals.transaction_time),
            "queries_total": totals.queries,
            "query_seconds_total": seconds(totals.query_time),
            "waited_seconds_total": seconds(totals.wait_time),
            "received_bytes_total": totals.received,
            "sent_bytes_total": totals.sent,
            "errors_total": errors,
            "leaks_total": leaks,
        },
        "latency": its_latency,
    }
