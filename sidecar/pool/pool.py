"""The pool: hands server connections to clients, opens, checks and closes them.

Owns the ``PoolState`` and does the I/O that it asks for. ``acquire`` and ``release`` are plain
functions and part of the hot path; ``tick`` is called every 100 ms by the service and sweeps every
deadline. Tasks, all in the service's TaskGroup: one for each connection being opened, one for
each cancel request.
"""

import asyncio
import logging
import random
import time
from collections.abc import Callable
from typing import Final, Protocol

from sidecar.config import PoolConfig, ServerTarget
from sidecar.errors import PoolClosed, SidecarError
from sidecar.events import (
    AcquireOutcome,
    CloseReason,
    ErrorReason,
    Phase,
    PingOutcome,
    PoolMode,
    PoolObserver,
    PoolSnapshot,
    ResetPolicy,
    TimeoutKind,
    Traffic,
)
from sidecar.pool import health, report
from sidecar.pool.budget import Budget
from sidecar.pool.login import Versions
from sidecar.pool.opening import Opener, Spawn
from sidecar.pool.server import ServerConnection, cancel_query, clock
from sidecar.pool.state import ConnectionState, PoolState
from sidecar.protocol import messages as m

log = logging.getLogger("pgsidecar.pool")

CLOSE_TIMEOUT: Final = 10.0
"""Seconds a server may take to end a backend that was told to go; its place stays taken so long."""

CANCEL_TIMEOUT: Final = 10.0  # s

_LOSSES: Final = frozenset(
    {CloseReason.SERVER_CLOSED, CloseReason.PING_FAILED, CloseReason.PING_TIMEOUT}
)
"""What is opened after these is a reconnect."""

# Names of their own for the hot path: ``Enum.MEMBER`` costs 0.2 us on Python 3.11.
_ACTIVE: Final = ConnectionState.ACTIVE
_WAITED: Final = AcquireOutcome.WAITED


class Waiter(Protocol):
    """A client that waits for a connection."""

    deadline: float
    waiting_since: float

    @property
    def acquire_timeout(self) -> float: ...

    def granted(self, server: ServerConnection, now: float) -> None: ...

    def refused(self, error: SidecarError) -> None: ...


class Pool:
    def __init__(
        self,
        config: PoolConfig,
        observer: PoolObserver,
        traffic: Traffic,
        spawn: Spawn,
        rng: random.Random | None = None,
        *,
        target: ServerTarget | None = None,
        budget: "Budget[ServerConnection, Pool] | None" = None,
        share: Callable[[float], None] | None = None,
    ) -> None:
        """Of a template: ``target`` is the pool's own, ``budget`` that of all pools of it, ``share``
        does what the budget decides."""
        self.config = config
        self.name: Final = config.name
        self.target = target or config.target  # for the connections to be opened
        self.budget: Final = budget
        self._share: Final = share
        self.observer: Final = observer
        self.traffic: Final = traffic
        self.state: Final[PoolState[ServerConnection, Waiter]] = PoolState(
            config.max_size, config.min_idle, config.max_waiting
        )
        self.resets_always = config.mode is PoolMode.SESSION or config.reset is ResetPolicy.ALWAYS
        self.is_closing = False
        self.last_ping = 0.0  # unix time
        self.opener: Final = Opener(
            config,
            observer,
            self.state,
            spawn,
            rng or random.Random(),
            make=self._add,
            remove=self._remove,
            opened=self._hand_over,
            refused=self._refuse_all,
            share=None if share is None else self._ask,
        )
        self._spawn: Final = spawn
        self._versions: Final = Versions()
        self._next_ping = 0.0
        self._ping_started: dict[ServerConnection, float] = {}

    def __repr__(self) -> str:
        return f"<Pool {self.name!r} {self.state!r}>"

    def start(self, now: float) -> None:
        """Begin to open the warm connections; the first idle one is pinged at once."""
        self._next_ping = now
        self.opener.grow(now)

    # -- acquire and release (hot path) --------------------------------------------------------

    def acquire(self, waiter: Waiter, now: float) -> ServerConnection | None:
        """A connection at once, or None: the waiter is queued and gets ``granted`` or ``refused``.

        Raises PoolClosed or PoolSaturated.
        """
        server = self.state.take_idle()
        if server is None:
            self._enqueue(waiter, now)
            return None
        server.leased_at = now
        self.observer.acquired_at_once(len(self.state.active))
        return server

    def release(self, server: ServerConnection, now: float) -> None:
        """The lease is over: the server said ReadyForQuery and nothing is outstanding.

        A transaction left open (its client is gone) is rolled back before the next lease.
        """
        self.observer.released(now - server.leased_at)
        server.receiver = None
        server.statement = None
        if server.cancels or server.is_dirty or self.resets_always or server.tx_status != m.IDLE:
            self.state.move(server, ConnectionState.CHECKING)
            self._make_fit(server, now)
        elif (
            self.state.waiters
            or now >= server.age_limit
            or self.is_closing
            or self.budget is not None
        ):
            self._pass_on(server, now)
        else:
            server.status_since = now
            self.state.give_back(server)

    def _pass_on(self, server: ServerConnection, now: float) -> None:
        """A connection that has served is handed over, or makes room for another pool."""
        if self.budget is not None and self.budget.yields(self, now):
            self._close(server, CloseReason.BUDGET, now)
            return
        self._hand_over(server, now)
        if self._share is not None and server.state is ConnectionState.IDLE:
            self._share(now)

    def _hand_over(self, server: ServerConnection, now: float) -> None:
        """A fit connection goes to the next waiter or becomes idle."""
        state = self.state
        if now >= server.age_limit or self.is_closing:
            self._close(server, CloseReason.SHUTDOWN if self.is_closing else server.why_over(), now)
            return
        waiter = state.next_waiter()
        if waiter is None:
            server.status_since = now
            state.move(server, ConnectionState.IDLE)
            return
        if server.state is not _ACTIVE:
            state.move(server, _ACTIVE)
        server.leased_at = now
        waited = now - waiter.waiting_since
        self.observer.acquired(_WAITED, waited, len(state.active))
        waiter.granted(server, now)

    def _enqueue(self, waiter: Waiter, now: float) -> None:
        if self.is_closing:
            self._refused()
            raise PoolClosed(f"pool {self.name!r} is closing")
        if not self.state.can_wait():
            self._refused()
            raise report.too_many_wait(self.config, self._who_holds(now))
        waiter.waiting_since = now
        waiter.deadline = now + waiter.acquire_timeout
        self.state.enqueue(waiter)
        self.opener.grow(now)

    def _refused(self, waited: float = 0.0) -> None:
        self.observer.acquired(AcquireOutcome.REJECTED, waited, len(self.state.active))
        self.observer.connection_failed(Phase.ACQUIRE, ErrorReason.REJECTED)

    def abandon(self, waiter: Waiter, now: float) -> None:
        """The client left or cancelled while it waited."""
        if self.state.abandon(waiter):
            waited = now - waiter.waiting_since
            self.observer.acquired(AcquireOutcome.CANCELLED, waited, len(self.state.active))

    def discard(self, server: ServerConnection, reason: CloseReason, now: float) -> None:
        """In doubt: close it. What it still runs is cancelled, lest its backend outlives it."""
        self.observer.released(now - server.leased_at)
        if server.expected:
            self.cancel(server)
        self._close(server, reason, now)

    def cancel(self, server: ServerConnection) -> asyncio.Future[None]:
        """Cancel what this connection runs. It is not handed on before the signal has arrived, or
        cannot arrive any more; the future is done then."""
        server.cancels += 1
        settled: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._spawn(self._cancel(server, settled))
        return settled

    async def _cancel(self, server: ServerConnection, settled: asyncio.Future[None]) -> None:
        try:
            await cancel_query(server, clock() + CANCEL_TIMEOUT)
        except (OSError, SidecarError) as exc:  # TimeoutError is an OSError
            log.warning(
                "cancel request failed", extra={"pool": self.name, "cause": health.describe(exc)}
            )
            # The signal may still come, and hit whoever is next.
            server.age_limit = 0.0
        finally:
            server.cancels -= 1
            if not settled.done():
                settled.set_result(None)
        if server.state is ConnectionState.CHECKING and server.receiver is None:
            self._make_fit(server, clock())

    def _make_fit(self, server: ServerConnection, now: float) -> None:
        """Roll back, reset where session state was left behind, then hand over."""
        if server.cancels:
            return  # _cancel comes back
        if server.tx_status != m.IDLE:
            server.is_dirty = True  # the rollback takes settings with it that we have noted
        queries = health.clean_up(server, is_dirty=server.is_dirty or self.resets_always)
        if not queries:
            self._pass_on(server, now)
            return
        server.deadline = now + self.config.ping_timeout
        health.Check(server, queries, self._was_reset)

    def _was_reset(self, server: ServerConnection, sqlstate: str) -> None:
        now = clock()
        if sqlstate == health.LOST:
            return  # ``lost`` follows
        if sqlstate:
            self._close(server, CloseReason.RESET_FAILED, now)
            return
        if server.is_dirty or self.resets_always:
            server.forget_session()
        self._pass_on(server, now)

    # -- the budget of a template --------------------------------------------------------------

    def waits_since(self) -> float | None:
        """When the client that waits longest, in the queue or in login, began to."""
        login = self.opener.waits_since()
        first = next(iter(self.state.waiters), None)
        if first is None:
            return login
        return first.waiting_since if login is None else min(login, first.waiting_since)

    def wanted(self, now: float) -> int:
        """How many connections it would open now."""
        return self.opener.wanted(now)

    def _ask(self, now: float) -> None:
        assert self.budget is not None
        assert self._share is not None
        if self.waits_since() is not None or self.opener.wanted(now):
            self.budget.asks(self)
        self._share(now)

    def _is_crowded_out(self) -> bool:
        """The other pools of the template have all connections."""
        budget = self.budget
        return budget is not None and budget.room <= 0 and self.opener.last_failure is None

    def give_up(self, server: ServerConnection, now: float) -> None:
        """Close an idle connection: another pool needs its place."""
        self._close(server, CloseReason.BUDGET, now)

    # -- closing -------------------------------------------------------------------------------

    def _close(self, server: ServerConnection, reason: CloseReason, now: float) -> None:
        if reason in _LOSSES:
            self.opener.owed += 1
        server.deadline = now + CLOSE_TIMEOUT
        server.close(reason)
        self.state.move(server, ConnectionState.CLOSING)

    def lost(self, server: ServerConnection) -> None:
        """The socket of a server connection is closed, by whomever."""
        was = server.state
        if was is ConnectionState.CONNECTING or not self._remove(server):
            return  # its attempt reports
        now = clock()
        self._ping_started.pop(server, None)
        reason = server.close_reason
        self.observer.connection_closed(reason)
        if was is not ConnectionState.CLOSING:
            self.opener.lost(server, now, was_leased=was is ConnectionState.ACTIVE)
            if was is ConnectionState.ACTIVE:
                self.observer.released(now - server.leased_at)
                cause = health.reason_of(server.last_error)
                if cause is not ErrorReason.ADMIN_SHUTDOWN:
                    cause = ErrorReason.RESET
                self.observer.connection_failed(Phase.QUERY, cause)
        log.log(
            logging.WARNING if reason in _LOSSES else logging.DEBUG,
            "server connection closed",
            extra={
                "pool": self.name,
                "reason": reason.value,
                "backend_pid": server.pid,
                "age": round(now - server.opened_at, 3),
                "sqlstate": server.last_error,
            },
        )
        self.opener.grow(now)

    # -- the janitor ---------------------------------------------------------------------------

    def tick(self, now: float) -> None:
        """Sweep every deadline; called every 100 ms."""
        self._time_out_waiters(now)
        self.sweep(now)
        self._note_slow_queries(now)
        if now >= self._next_ping and not self.is_closing:
            self._ping_all(now)
        self.opener.tick(now)

    def _time_out_waiters(self, now: float) -> None:
        overdue = self.state.overdue(now)
        if not overdue:
            return
        holders = self._who_holds(now)
        waiting = len(self.state.waiters) + len(overdue)
        for before, waiter in enumerate(overdue):
            self._time_out(waiter, now, waiting - before, holders)
        asyncio.get_running_loop().call_soon(self._time_out_waiters, now)  # others have their turn

    def _time_out(self, waiter: Waiter, now: float, waiting: int, holders: str) -> None:
        waited = now - waiter.waiting_since
        error: SidecarError
        is_served = self.state.established or self._is_crowded_out()
        if is_served and not self.opener.is_paused:
            is_small = self.opener.is_kept_small
            error = report.waited_in_vain(self.config, waited, waiting, holders, is_small)
        else:
            error = self.opener.unavailable()
        self.observer.acquired(AcquireOutcome.TIMEOUT, waited, len(self.state.active))
        self.observer.connection_failed(Phase.ACQUIRE, ErrorReason.TIMEOUT)
        self.observer.timed_out(TimeoutKind.ACQUIRE)
        waiter.refused(error)

    def _refuse_all(self, error: SidecarError) -> None:
        """Nobody needs to wait any longer."""
        while (waiter := self.state.next_waiter()) is not None:
            self._refused(clock() - waiter.waiting_since)
            waiter.refused(error)

    def _add(self) -> ServerConnection:
        server = ServerConnection(self, self.target, self.traffic, self._versions)
        self.state.add(server)
        if self.budget is not None:
            self.budget.add(server, self)
        return server

    def _remove(self, server: ServerConnection) -> bool:
        if self.budget is not None:
            self.budget.remove(server)
        return self.state.remove(server)

    def sweep(self, now: float) -> None:
        """Close what is over."""
        for server in list(self.state.by_state[ConnectionState.CLOSING]):
            if now >= server.deadline:
                server.abort()
            elif server.expected and not server.cancels:
                # The one before came too early, or there was another query behind the one it hit.
                self.cancel(server)
        for server in list(self.state.by_state[ConnectionState.CHECKING]):
            if server.receiver is not None and now >= server.deadline:
                self._check_timed_out(server, now)
        surplus = self.state.surplus()
        for server in list(self.state.idle):  # longest unused first
            if now >= server.age_limit:
                self._close(server, server.why_over(), now)
                surplus -= 1
            elif surplus > 0 and now - server.status_since >= self.config.idle_timeout:
                self._close(server, CloseReason.IDLE_TIMEOUT, now)
                surplus -= 1

    def _note_slow_queries(self, now: float) -> None:
        threshold = self.config.slow_query_threshold
        for server in self.state.active:
            if (
                server.queries
                and not server.query_is_slow
                and now - server.query_started >= threshold
            ):
                server.query_is_slow = True
                self.observer.query_slow(server.queries[0])

    # -- pings ---------------------------------------------------------------------------------

    def _ping_all(self, now: float) -> None:
        """Ping what is idle. While all are in use, the ping stays due; where there is none (a pool
        with ``min_idle`` 0), one is opened: health is known of every pool."""
        if self.state.idle:
            self._next_ping = now + self.config.ping_interval
            for server in list(self.state.idle):
                self._ping(server, now)
        elif self.budget is None:
            self.opener.ensure_one(now)

    def _ping(self, server: ServerConnection, now: float) -> None:
        self.state.move(server, ConnectionState.CHECKING)
        server.deadline = now + self.config.ping_timeout
        self._ping_started[server] = now
        health.Check(server, health.PING, self._was_pinged)

    def _was_pinged(self, server: ServerConnection, sqlstate: str) -> None:
        now = clock()
        took = now - self._ping_started.pop(server, now)
        if not sqlstate:
            self.opener.is_up = True
            self.last_ping = time.time()
            self.observer.pinged(PingOutcome.OK, took)
            idle_since = server.status_since
            self._pass_on(server, now)
            if server.state is ConnectionState.IDLE:
                server.status_since = idle_since  # a ping is no use
            return
        self.opener.is_up = False
        self.observer.pinged(PingOutcome.ERROR, took)
        is_lost = sqlstate == health.LOST
        cause = ErrorReason.RESET if is_lost else ErrorReason.SERVER_ERROR
        self.observer.connection_failed(Phase.PING, cause)
        if not is_lost:
            self._close(server, CloseReason.PING_FAILED, now)

    def _check_timed_out(self, server: ServerConnection, now: float) -> None:
        started = self._ping_started.pop(server, None)
        if started is None:
            self._close(server, CloseReason.RESET_FAILED, now)
            return
        self.opener.is_up = False
        self.observer.pinged(PingOutcome.TIMEOUT, now - started)
        self.observer.connection_failed(Phase.PING, ErrorReason.TIMEOUT)
        log.warning("ping not answered in time", extra={"pool": self.name})
        self._close(server, CloseReason.PING_TIMEOUT, now)

    # -- telling ---------------------------------------------------------------------------------

    def snapshot(self, now: float) -> PoolSnapshot:
        return report.snapshot(
            self.config,
            self.target,
            self.state,
            now,
            is_up=self.opener.is_up,
            last_ping=self.last_ping,
        )

    def _who_holds(self, now: float) -> str:
        """What has the pool: for the error of a client that waited in vain."""
        limit, others = self.config.max_size, ""
        if self.budget is not None:
            others = f"All pools of template {self.name!r} have {self.budget.used} of {limit}."
        return report.who_holds(self.state, limit, others, self.opener.why_small(), now)

    # -- the end ---------------------------------------------------------------------------------

    def close(self, now: float) -> None:
        """Refuse whoever waits, close what is not leased; leased connections close on release."""
        self.is_closing = self.opener.is_closed = True
        error = PoolClosed(f"pool {self.name!r} is closing")
        self.opener.end_logins(error)
        self._refuse_all(error)
        for server in [*self.state.idle, *self.state.by_state[ConnectionState.CHECKING]]:
            self._close(server, CloseReason.SHUTDOWN, now)

    def abort(self) -> None:
        """Close every socket now."""
        for servers in self.state.by_state:
            for server in list(servers):
                server.abort()
