"""Why a query hangs: asks the server, while it does, and says so in one log line.

Owns what is known of the slow and the blocked queries of one entry of the configuration, and the
diagnostic connection that the server is asked over: one beside ``max_size``, opened when there is
something to ask (``pool.sideline``). What is asked, and how a chain reads, is ``pool.chains``'.

Runs one task for each look: at most one at a time, and one a second. Nobody waits for it.
``tick`` is called every 100 ms; with nothing slow it costs a look at each leased connection.
"""

import asyncio
import logging
import random
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from sidecar.config import ServerTarget
from sidecar.errors import ServerProtocolError, SidecarError
from sidecar.events import PoolObserver
from sidecar.pool import chains, health, report
from sidecar.pool.chains import Backend
from sidecar.pool.opening import Spawn
from sidecar.pool.pool import Pool
from sidecar.pool.server import ServerConnection, clock
from sidecar.pool.sideline import Sideline
from sidecar.target import SessionAttrs
from sidecar.work import Blocker, Holder, SlowQuery, Trace

log = logging.getLogger("pgsidecar.pool")

APPLICATION: Final = "pgsidecar diagnosis"
"""The diagnostic connection's ``application_name``."""

_DEADLINE: Final = 1.5  # s for a look, connecting included
_PAUSE: Final = 1.0  # s from look to look
_SELDOM: Final = 10.0  # s: a slow query that waits for no lock may come to wait for one
_LONG: Final = 0.5
"""Seconds that a client has waited, and a query has run, from which on the one may be the other's fault."""

_OFF: Final = "the pool has diagnose: false"
_PAUSED: Final = "the pool is paused"
_NO_ROOM: Final = "the server has no room for another connection"
_TOO_MANY: Final = f"{chains.MOST_ASKED} others are asked about first"
_ENDED: Final = "it ended before the server had answered"
_UNKNOWN: Final = "the server has no such backend: is there another pooler in between?"


_Owned = tuple[Pool, ServerConnection]


@dataclass(frozen=True, slots=True)
class _Query:
    """One that runs, or ran."""

    pool: Pool
    server: ServerConnection
    started: float

    @property
    def is_running(self) -> bool:
        return bool(self.server.queries) and self.server.query_started == self.started

    @property
    def way(self) -> tuple[object, str]:
        """What a connection for a look at it has in common with it: server and user."""
        address = self.server.address
        return None if address is None else address.sockaddr, self.server.target.user


@dataclass(frozen=True, slots=True)
class _Crossing:
    """A query that has crossed the threshold, as it was then."""

    query: _Query
    holder: Holder
    age: float
    trace: Trace | None


class Diagnosis:
    """Of one pool, or of all pools of a template. ``everywhere`` has all pools of the sidecar."""

    def __init__(
        self,
        observer: PoolObserver,
        spawn: Spawn,
        everywhere: Callable[[], Iterable[Pool]],
    ) -> None:
        self._observer: Final = observer
        self._spawn: Final = spawn
        self._everywhere: Final = everywhere
        self.sideline: Final = Sideline(spawn)
        self._slow: dict[ServerConnection, float] = {}
        """Since when the slow query of each runs."""
        self._crossed: list[_Crossing] = []  # and not told yet
        self._blocked: dict[ServerConnection, tuple[_Query, Blocker]] = {}
        """Those that wait for a lock, and the roots of their chains, as of the last look."""
        self._looked: dict[tuple[object, str], float] = {}  # when each way was last used
        self._looked_at = 0.0
        self._is_busy = False
        self._is_closed = False
        self._backoff: Final = health.Backoff(random.Random())
        self._cause = ""  # of the last failure

    def close(self) -> None:
        """No more looks; one under way goes on."""
        self._is_closed = True
        self.sideline.close()

    # -- when to look --------------------------------------------------------------------------

    def tick(self, pools: Iterable[Pool], now: float) -> None:
        """See what has become slow, and have the server asked; called every 100 ms."""
        if self._is_closed:
            return
        slow: list[_Query] = []
        long: list[_Query] = []
        why_not, is_waited_for = "", False
        for pool in pools:
            first = next(iter(pool.state.waiters), None)
            is_waited_for = is_waited_for or (
                first is not None and now - first.waiting_since >= _LONG
            )
            why_not = why_not or _why_not(pool)
            for server in pool.state.active:
                if not server.queries:
                    continue
                if server.query_is_slow:
                    slow.append(_Query(pool, server, server.query_started))
                elif now - server.query_started >= _LONG:
                    long.append(_Query(pool, server, server.query_started))
        self._note(slow, now)
        self._prune(is_asked=not why_not)
        if why_not:
            self.sideline.hang_up()
        if not self._is_busy:
            self._act(slow, long if is_waited_for else [], why_not, now)

    def _note(self, slow: Sequence[_Query], now: float) -> None:
        """Take down those that have crossed since the last tick, once each."""
        before, self._slow = self._slow, {each.server: each.started for each in slow}
        for query in slow:
            server = query.server
            if before.get(server) != query.started:
                holder = report.holder(query.pool.name, server)
                trace = server.queries[0].trace
                self._crossed.append(_Crossing(query, holder, now - query.started, trace))

    def _prune(self, is_asked: bool) -> None:
        """Forget those that are not blocked any more: their query is over, or nobody looks."""
        left = {s: each for s, each in self._blocked.items() if is_asked and each[0].is_running}
        if len(left) < len(self._blocked):
            self._blocked = left
            self._report_blocked()

    def _act(
        self, slow: Sequence[_Query], long: Sequence[_Query], why_not: str, now: float
    ) -> None:
        if not why_not and now < self._backoff.not_before:
            why_not = self._cause
        if why_not:
            if self._crossed:
                told, self._crossed = self._crossed, []
                self._begin(self._tell_all(told, why_not))
            return
        crossed = [each.query for each in self._crossed]
        others = [*(query for query, _ in self._blocked.values()), *slow, *long]
        is_urgent = crossed or self._blocked or long
        pause = _PAUSE if is_urgent else _SELDOM
        if (crossed or others) and now - self._looked_at >= pause:
            self._looked_at = now
            self._begin(self._look(self._choose(crossed, others, now)))

    def _choose(
        self, crossed: Sequence[_Query], others: Sequence[_Query], now: float
    ) -> list[_Query]:
        """What one look is for: queries of one user on one server. With several (pools of a
        template; several hosts) they take turns."""
        ways = {each.way: each for each in (crossed or others)}
        chosen = min(ways, key=lambda way: self._looked.get(way, 0.0))
        all_ways = {each.way for each in (*crossed, *others)}
        self._looked = {way: at for way, at in self._looked.items() if way in all_ways}
        self._looked[chosen] = now
        return list(dict.fromkeys(q for q in (*crossed, *others) if q.way == chosen))

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        self._is_busy = True
        self._spawn(self._guarded(work))

    async def _guarded(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except Exception:
            log.exception("diagnosis failed")
        finally:
            self._is_busy = False

    # -- one look ------------------------------------------------------------------------------

    async def _look(self, queries: Sequence[_Query]) -> None:
        asked, left = queries[: chains.MOST_ASKED], queries[chains.MOST_ASKED :]
        known: dict[int, Backend] = {}
        cause = ""
        try:
            known = await self._ask(asked)
            self._backoff.succeeded()
        except (OSError, SidecarError) as exc:
            cause = self._cause = health.describe(exc)
            self._backoff.failed(clock())
        leases = self._leases(asked[0]) if known else {}
        chain_of: dict[_Query, tuple[Blocker, ...]] = {}
        for query in asked:
            self._blocked.pop(query.server, None)
            pid = query.server.pid
            chain = chains.blockers(pid, known, lambda pid: _lease(leases, pid))
            if chain and query.is_running:
                chain_of[query] = chain
                self._blocked[query.server] = query, chains.root(chain)
                await asyncio.sleep(0)  # the event loop is others', too
        self._report_blocked()
        for crossing in self._take(asked):
            query = crossing.query
            backend = known.get(query.server.pid)
            why = cause or ("" if backend is not None and backend.is_there else _UNKNOWN)
            await self._tell(crossing, chain_of.get(query, ()), known, why)
        await self._tell_all(self._take(left), cause or _TOO_MANY)

    async def _ask(self, queries: Sequence[_Query]) -> dict[int, Backend]:
        target = _target(queries[0])
        value = chains.value(query.server.pid for query in queries)
        deadline = clock() + _DEADLINE
        answer = await self.sideline.ask(target, chains.QUERY, value, chains.MOST_ROWS, deadline)
        if answer.error is not None:
            raise answer.error
        try:
            return chains.backends(answer.rows)
        except ValueError as exc:
            raise ServerProtocolError("an answer that cannot be read") from exc

    def _take(self, queries: Sequence[_Query]) -> list[_Crossing]:
        """Those of these queries that have crossed, to be told now."""
        wanted = set(queries)
        taken = [each for each in self._crossed if each.query in wanted]
        self._crossed = [each for each in self._crossed if each.query not in wanted]
        return taken

    def _leases(self, asked: _Query) -> dict[int, _Owned]:
        """All our connections to this server by backend, whatever pool they are of."""
        address = asked.server.address
        return {
            server.pid: (pool, server)
            for pool in self._everywhere()
            for servers in pool.state.by_state
            for server in servers
            if server.address is not None
            and address is not None
            and server.address.sockaddr == address.sockaddr
        }

    def _report_blocked(self) -> None:
        self._observer.blocked_seen(
            {server.id: blocker for server, (_, blocker) in self._blocked.items()}
        )

    # -- telling -------------------------------------------------------------------------------

    async def _tell_all(self, crossings: Sequence[_Crossing], cause: str) -> None:
        for crossing in crossings:
            await self._tell(crossing, (), {}, cause)

    async def _tell(
        self,
        crossing: _Crossing,
        chain: tuple[Blocker, ...],
        known: dict[int, Backend],
        cause: str,
    ) -> None:
        """Report it, and log it: one line."""
        now = clock()
        query, holder = crossing.query, crossing.holder
        backend = known.get(holder.backend_pid)
        age = crossing.age
        if query.is_running:
            age = now - query.started
        elif not cause:
            cause, backend, chain = _ENDED, None, ()
        wait_event = "" if backend is None else backend.wait_event
        slow = SlowQuery(holder, age, crossing.trace, wait_event, chain, cause)
        self._observer.slow_query_seen(slow)
        is_hidden = any(
            known[pid].is_hidden
            for pid in (holder.backend_pid, *(b.backend_pid for b in chain if not b.is_ours))
            if pid in known
        )
        log.warning("slow query", extra=_fields(slow, now, query.pool if is_hidden else None))
        await asyncio.sleep(0)


def _lease(owned: dict[int, _Owned], pid: int) -> tuple[bool, Holder | None]:
    if pid not in owned:
        return False, None
    pool, server = owned[pid]
    is_leased = server in pool.state.active
    return True, report.holder(pool.name, server) if is_leased else None


def _why_not(pool: Pool) -> str:
    """Why the server is not to be asked; empty if it is."""
    if not pool.config.diagnose:
        return _OFF
    if pool.opener.is_paused:
        return _PAUSED
    return _NO_ROOM if pool.opener.is_kept_small else ""  # a client needs it more


def _target(query: _Query) -> ServerTarget:
    """The very server that this backend is of, by the login of its pool."""
    target, address = query.pool.target, query.server.address
    assert address is not None, "only an open connection runs anything"
    host = address.host
    if not host.is_unix:
        host = replace(host, address=address.sockaddr[0])
    ours = {"application_name": APPLICATION, "client_encoding": "UTF8"}
    return replace(
        target,
        hosts=(host,),
        session_attrs=SessionAttrs.ANY,
        parameters={**target.parameters, **ours},
    )


def _fields(slow: SlowQuery, now: float, hidden_from: Pool | None) -> dict[str, object]:
    """Of the log line. No query text but normalised ones: literals are nobody's business."""
    holder, who, statement = slow.holder, slow.holder.who, slow.holder.statement
    fields: dict[str, object] = {
        "pool": holder.pool,
        "fingerprint": "" if statement is None else statement.fingerprint,
        "query": "" if statement is None else chains.cut(statement.text),
        "client": who.address,
        "application": who.application,
        "user": who.user,
        "age": round(slow.age, 3),
        "backend_pid": holder.backend_pid,
        "wait_event": slow.wait_event,
    }
    if slow.trace is not None:
        fields["trace_id"] = slow.trace.trace_id
    if slow.blockers:
        fields["blocked_by"] = chains.describe(slow.blockers, holder.pool, now)
    if slow.cause:
        fields["cause"] = slow.cause
    if hidden_from is not None:
        fields["hint"] = f"to be told more: GRANT pg_monitor TO {hidden_from.target.user}"
    return fields
