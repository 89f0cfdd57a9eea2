"""What there is to tell of a pool: its state at one instant, and who holds it.

Pure: reads the collections and changes nothing. Of a template, what its pools have in common.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any, Final

from sidecar.config import PoolConfig, ServerTarget
from sidecar.errors import AcquireTimeout, PoolSaturated
from sidecar.events import PinReason, PoolGauges, PoolMode, PoolSnapshot
from sidecar.pool.health import NOBODY
from sidecar.pool.server import ServerConnection
from sidecar.pool.state import PoolState
from sidecar.protocol import messages as m
from sidecar.work import Holder, Statement

State = PoolState[ServerConnection, Any]

_NAMED: Final = 3
"""Most applications that an error names."""


def snapshot(
    config: PoolConfig,
    target: ServerTarget,
    state: State,
    now: float,
    *,
    is_up: bool,
    last_ping: float,
) -> PoolSnapshot:
    """One pool; ``last_ping`` is a unix time."""
    active, idle = len(state.active), len(state.idle)
    running = [s for s in state.active if s.queries]
    open_idle = [s for s in state.active if s.tx_status != m.IDLE and not s.expected]
    first = next(iter(state.waiters), None)
    return PoolSnapshot(
        name=config.name,
        mode=config.mode,
        database=target.database,
        user=target.user,
        server=target.describe(),
        used=active,
        idle=idle,
        connecting=state.size - active - idle,
        max_size=state.max_size,
        min_idle=state.min_idle,
        pending=len(state.waiters),
        oldest_wait=0.0 if first is None else now - first.waiting_since,
        waited=waited(state, now),
        is_up=is_up,
        last_ping=last_ping,
        queries_in_flight=len(running),
        longest_running_query=max((now - s.query_started for s in running), default=0.0),
        longest_idle_in_transaction=max((now - s.status_since for s in open_idle), default=0.0),
        slow_query_threshold=config.slow_query_threshold,
        pinned=_pinned(config, state),
        prepared_statements=sum(
            len(server.prepared) for servers in state.by_state for server in servers
        ),
    )


def _pinned(config: PoolConfig, state: State) -> dict[PinReason, int]:
    pinned = dict.fromkeys(PinReason, 0)
    if config.mode is PoolMode.SESSION:
        pinned[PinReason.SESSION_MODE] = len(state.active)
        return pinned
    for server in state.active:
        if server.pin is not None:
            pinned[server.pin] += 1
    return pinned


def in_one(config: PoolConfig, pools: Sequence[PoolSnapshot], *, is_up: bool) -> PoolSnapshot:
    """All pools of a template together; there need not be any."""
    target = config.target
    return PoolSnapshot(
        name=config.name,
        mode=config.mode,
        database=target.database or "*",
        user=target.user or "*",
        server=target.describe(),
        used=sum(pool.used for pool in pools),
        idle=sum(pool.idle for pool in pools),
        connecting=sum(pool.connecting for pool in pools),
        max_size=config.max_size,
        min_idle=config.min_idle,
        pending=sum(pool.pending for pool in pools),
        oldest_wait=max((pool.oldest_wait for pool in pools), default=0.0),
        waited=sum(pool.waited for pool in pools),
        is_up=is_up,
        last_ping=max((pool.last_ping for pool in pools), default=0.0),
        queries_in_flight=sum(pool.queries_in_flight for pool in pools),
        longest_running_query=max((pool.longest_running_query for pool in pools), default=0.0),
        longest_idle_in_transaction=max(
            (pool.longest_idle_in_transaction for pool in pools), default=0.0
        ),
        slow_query_threshold=config.slow_query_threshold,
        pinned={reason: sum(pool.pinned[reason] for pool in pools) for reason in PinReason},
        prepared_statements=sum(pool.prepared_statements for pool in pools),
    )


def who_holds(state: State, limit: int, others: str, why_small: str, now: float) -> str:
    """What has the pool: for the error of a client that waited in vain. ``others`` is a sentence on
    the other pools of its template, or empty; ``why_small`` says why there are no more connections."""
    active = list(state.active)
    more = f" {others}" if others else ""
    if why_small:
        more += f" Another cannot be opened: {why_small}."
    if not active:
        return f"0 of {limit} connections in use.{more}"
    left_open = sum(1 for s in active if not s.expected and s.tx_status != m.IDLE)
    oldest = min(active, key=lambda s: s.leased_at)
    who = "a client that is gone" if oldest.receiver is None else oldest.receiver.describe(now)
    shares = f" By application: {_by_application(active)}." if len(active) > 1 else ""
    return (
        f"{len(active)} of {limit} connections in use, {left_open} of them idle in a transaction."
        f"{more} The oldest lease is {now - oldest.leased_at:.1f} s old: {who}.{shares}"
    )


def _by_application(active: Sequence[ServerConnection]) -> str:
    """How many connections each has, most first."""
    counts = Counter(map(_application, active))
    named = [(name, count) for name, count in counts.most_common() if name][:_NAMED]
    parts = [f'"{name}" {count}' for name, count in named]
    if rest := len(active) - sum(count for _, count in named):
        parts.append(f"others {rest}" if named else f"without application_name {rest}")
    return ", ".join(parts)


def _application(server: ServerConnection) -> str:
    """Of the client that has the connection; logins and checks, and who is gone, have none."""
    who = NOBODY if server.receiver is None else server.receiver.who()
    return who.application if who.client else ""


def too_many_wait(config: PoolConfig, holders: str) -> PoolSaturated:
    limit = config.max_waiting
    return PoolSaturated(
        f"{limit} clients wait for a connection from pool {config.name!r} already",
        detail=holders,
        hint=f"The limit is max_waiting ({limit}).",
    )


def waited_in_vain(
    config: PoolConfig, waited: float, waiting: int, holders: str, is_kept_small: bool
) -> AcquireTimeout:
    """``is_kept_small``: the pool would be larger, but the server has no room for it."""
    limit = f"max_size ({config.max_size})"
    return AcquireTimeout(
        f"no connection from pool {config.name!r} in {waited:.1f} s ({waiting} waiting)",
        detail=holders,
        hint=f"Give the server room for {limit} connections (its max_connections, the limits of role"
        " and database), or lower max_size."
        if is_kept_small
        else "Look for transactions left open and for slow queries; if all is busy for good "
        f"reason, raise {limit}.",
    )


def waited(state: State, now: float) -> float:
    """How long all who wait now have waited together, seconds."""
    total: float = sum([now - waiter.waiting_since for waiter in state.waiters])
    return total


def statement_of(server: ServerConnection) -> Statement | None:
    """The statement that runs, else the last one of this lease."""
    queries = server.queries
    found = queries[0] if queries else server.statement
    return None if found is None else found.shared or found


def holder(pool: str, server: ServerConnection) -> Holder:
    """The lease of a connection that is leased."""
    receiver = server.receiver
    if server.queries:
        state, since = "running", server.query_started
    else:
        state = "idle" if server.tx_status == m.IDLE else "idle in transaction"
        since = max(server.status_since, server.leased_at)
    return Holder(
        pool=pool,
        server=server.id,
        backend_pid=server.pid,
        who=NOBODY if receiver is None else receiver.who(),
        statement=statement_of(server),
        state=state,
        leased_at=server.leased_at,
        since=since,
        transaction_since=server.tx_started if server.tx_status != m.IDLE else 0.0,
        pin="" if server.pin is None else server.pin.value,
        pinned_at=server.pinned_at,
    )


def gauges(
    name: str,
    states: Sequence[State],
    max_size: int,
    now: float,
    *,
    is_up: bool,
    is_paused: bool = False,
    why_down: str = "",
    logins: Sequence[float] = (),
) -> PoolGauges:
    """Of one pool, or of all pools of a template together. ``logins``: since when they wait for a
    connection, too."""
    sinces = [next(iter(state.waiters)).waiting_since for state in states if state.waiters]
    sinces += logins
    used, idle = sum(len(s.active) for s in states), sum(len(s.idle) for s in states)
    return PoolGauges(
        name=name,
        used=used,
        idle=idle,
        connecting=sum(state.size for state in states) - used - idle,
        max_size=max_size,
        pending=sum(len(state.waiters) for state in states) + len(logins),
        oldest_wait=max((now - since for since in sinces), default=0.0),
        waited=sum(waited(state, now) for state in states),
        is_up=is_up,
        holders=lambda: [holder(name, server) for state in states for server in state.active],
        waiters=lambda: [waiter.who() for state in states for waiter in state.waiters],
        is_paused=is_paused,
        why_down=why_down,
        in_login=len(logins),
    )
