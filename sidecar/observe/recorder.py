"""Counts what the pools, the proxy and the API report: the ``Observer`` of the running sidecar.

Owns the counts; the names they are exported under are ``metrics``' business. Runs no task: the
service calls ``tick`` every 100 ms, which moves the rolling windows on.

Everything here is called from the event loop. ``acquired_at_once``, ``query_done``, ``released`` and
``transaction_done`` run for every query or transaction: they add to plain attributes and lists, and what
can be derived from other counts is derived when it is read (``acquires``, ``transactions``).
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import log
from typing import Final

from sidecar.events import (
    AcquireOutcome,
    ClientOutcome,
    CloseReason,
    ConnectReason,
    ErrorOrigin,
    ErrorReason,
    Listener,
    Operation,
    Phase,
    PingOutcome,
    PinReason,
    PoolGauges,
    TimeoutKind,
    Traffic,
)
from sidecar.observe import keys
from sidecar.observe.blame import Blame
from sidecar.observe.evidence import Settings
from sidecar.observe.exported import EXPORTED, ExportedStatements
from sidecar.observe.failures import FailureTable
from sidecar.observe.histogram import (
    LAG_BUCKETS,
    OVERHEAD_BUCKETS,
    QUERY_BUCKETS,
    QUERY_EDGE,
    QUERY_FIRST,
    USE_BUCKETS,
    USE_EDGE,
    USE_FIRST,
    WAIT_BUCKETS,
    Histogram,
)
from sidecar.observe.incidents import KEEP, IncidentStore
from sidecar.observe.sketch import (
    HIGHEST,
    LAST,
    LOWEST,
    SCALE,
    SHIFT,
    RollingPeak,
    RollingQuantiles,
    index_of,
)
from sidecar.observe.statements import LIMIT, StatementTable
from sidecar.observe.verdict import Verdict
from sidecar.observe.why import Why
from sidecar.work import Blocker, Failure, Holder, SlowQuery, Statement, Who

KEPT_SLOW_QUERIES: Final = 100
_WAITED: Final = AcquireOutcome.WAITED
_IMMEDIATE: Final = AcquireOutcome.IMMEDIATE
_TIMEOUT: Final = AcquireOutcome.TIMEOUT


class PoolRecorder:
    """What happened in one pool since the start. Implements ``events.PoolObserver``.

    Every call to ``acquired_at_once`` or to ``acquired`` with outcome waited opens a lease, which one
    call to ``released`` ends.
    """

    __slots__ = (
        "_failed_acquires",
        "_immediate",
        "_index",
        "_now",
        "_peak",
        "_rollbacks",
        "_slot",
        "_took",
        "_used",
        "_waited",
        "_waits",
        "blame",
        "blocked",
        "closed",
        "connection_errors",
        "creates",
        "errors",
        "exported",
        "failures",
        "latency",
        "leaks",
        "leaks_began",
        "name",
        "opened",
        "overheads",
        "parses",
        "ping_durations",
        "pings",
        "pins",
        "queries",
        "reconnects",
        "slow",
        "slow_queries",
        "slow_query_threshold",
        "statements",
        "timeouts",
        "traffic",
        "transactions",
        "uses",
        "why",
    )

    def __init__(
        self,
        name: str,
        slow_query_threshold: float,
        now: float,
        incidents: IncidentStore | None = None,
        limit: int = LIMIT,
        exported: int = EXPORTED,
    ) -> None:
        self.name = name
        self.slow_query_threshold = slow_query_threshold  # seconds

        self._now = now  # as of the last ``tick``
        self._immediate = 0
        self._waited = 0
        self._failed_acquires = dict.fromkeys(keys.FAILED_ACQUIRES, 0)
        self._waits = Histogram(WAIT_BUCKETS)  # of all requests but the immediate ones
        self._used = 0
        self._peak = RollingPeak(now)
        self.uses = Histogram(USE_BUCKETS)

        self.queries = [Histogram(QUERY_BUCKETS) for _ in Operation]
        self.slow = [0 for _ in Operation]
        self.latency = RollingQuantiles(now)
        self._slot = self.latency.slot
        # The last duration and its bucket. A query that is its own transaction and lease ends and
        # began with them: they all last equally long.
        self._took = 0.0
        self._index = 0
        self.statements = StatementTable(limit, now)
        self.exported = ExportedStatements(name, self.statements, exported, now)
        self.errors = dict.fromkeys(keys.ERROR_KEYS, 0)
        self.failures = FailureTable()
        self.blame = Blame(self.statements.charge)
        self.blocked: dict[int, Blocker] = {}
        """Whom the leases wait for in the end that wait for a lock, by the id of their connection."""
        self.leaks: dict[int, Holder] = {}  # while they last, as they began; by the same
        self.leaks_began = 0
        self.why = Why(
            name,
            now,
            IncidentStore(KEEP, lambda: self._now) if incidents is None else incidents,
            self.leaks,
            lambda: self.blocked,
            self.failures.entries,
            lambda: self.statements.ranked("seconds", 20),
        )
        self.transactions = Histogram(QUERY_BUCKETS)
        self._rollbacks = 0
        self.overheads = Histogram(OVERHEAD_BUCKETS)

        self.opened = dict.fromkeys(ConnectReason, 0)
        self.closed = dict.fromkeys(CloseReason, 0)
        self.creates = Histogram(WAIT_BUCKETS)
        self.connection_errors = dict.fromkeys(keys.CONNECTION_ERROR_KEYS, 0)
        self.reconnects = {True: 0, False: 0}  # by success
        self.pings = dict.fromkeys(PingOutcome, 0)
        self.ping_durations = Histogram(WAIT_BUCKETS)
        self.timeouts = dict.fromkeys(TimeoutKind, 0)
        self.pins = dict.fromkeys(PinReason, 0)
        self.parses = {True: 0, False: 0}  # by whether the statement was there already
        self.traffic = Traffic()
        self.slow_queries: deque[tuple[float, SlowQuery]] = deque(maxlen=KEPT_SLOW_QUERIES)
        """With the instants at which the server was asked."""

    # The hot path. ``list[i] = list[i] + 1``, since compiled that adds plain integers, ``+=`` objects.
    # Measured, ns a call: interpreted 60, 150, 270, 150 in this order (30 of them are the
    # call itself), compiled by mypyc 15, 105, 90, 115; prometheus_client's observe takes 1000 to 2200.

    def acquired_at_once(self, used: int) -> None:
        self._immediate += 1
        self._used = used
        if used > self._peak.highest:
            self._peak.highest = used

    def released(self, held: float) -> None:
        self._used -= 1
        index = self._index if held == self._took else index_of(held)
        uses = self.uses
        uses.total += held
        place = USE_FIRST[index] + 1 if held > USE_EDGE[index] else USE_FIRST[index]
        uses.counts[place] = uses.counts[place] + 1

    def query_done(self, statement: Statement, took: float) -> None:
        # sketch.index_of inlined, 50 ns a call. Its index tells the classic bucket, too: 50 ns less
        # than a bisect for that
        if LOWEST < took < HIGHEST:
            index = int(log(took) * SCALE + SHIFT)
        else:
            index = 0 if took <= LOWEST else LAST
        self._took = took
        self._index = index
        self._slot[index] = self._slot[index] + 1
        query = self.queries[statement.operation]
        query.total += took
        place = QUERY_FIRST[index] + 1 if took > QUERY_EDGE[index] else QUERY_FIRST[index]
        query.counts[place] = query.counts[place] + 1
        if statement.is_retired:
            statement = self.statements.home(statement, took, place, time.time())
        statement.calls += 1
        statement.seconds += took
        if took > statement.longest:
            statement.longest = took
        recent = statement.recent
        recent[index] = recent.get(index, 0) + 1

    def transaction_done(self, committed: bool, took: float) -> None:
        if took != self._took:
            self._took = took
            self._index = index_of(took)
        index = self._index
        transactions = self.transactions
        transactions.total += took
        place = QUERY_FIRST[index] + 1 if took > QUERY_EDGE[index] else QUERY_FIRST[index]
        transactions.counts[place] = transactions.counts[place] + 1
        if not committed:
            self._rollbacks += 1

    # Once a wait, a connection, an error or a ping

    def acquired(self, outcome: AcquireOutcome, waited: float, used: int) -> None:
        if outcome is _IMMEDIATE:
            self.acquired_at_once(used)
            return
        if outcome is _WAITED:
            self._waited += 1
        else:
            self._failed_acquires[outcome] += 1
            if outcome is _TIMEOUT:
                self.why.flight.timed_out()
        self._waits.observe(waited)
        self._used = used
        if used > self._peak.highest:
            self._peak.highest = used

    def statement(self, fingerprint: str, text: str, operation: int) -> Statement:
        return self.statements.find(fingerprint, text, operation)

    def query_slow(self, statement: Statement) -> None:
        self.slow[statement.operation] += 1

    def slow_query_seen(self, slow: SlowQuery) -> None:
        self.why.flight.slow_query(slow)
        self.slow_queries.append((slow.holder.since + slow.age, slow))

    def blocked_seen(self, blocked: Mapping[int, Blocker]) -> None:
        self.blocked = dict(blocked)

    def leak_began(self, holder: Holder) -> None:
        self.leaks[holder.server] = holder
        self.leaks_began += 1

    def leak_ended(self, holder: Holder) -> None:
        self.leaks.pop(holder.server, None)

    def client_came(self, who: Who) -> None:
        self.why.flight.came(who)

    def query_failed(self, failure: Failure) -> None:
        origin = ErrorOrigin(failure.origin)
        key = (origin, failure.sqlstate[:2])
        if key not in self.errors:
            key = (origin, keys.OTHER)
        self.errors[key] += 1
        self.failures.note(failure, self._now)
        self.why.flight.failed(failure)
        if failure.statement is not None:
            self.statements.failed(failure.statement, failure.sqlstate)

    def overhead(self, took: float) -> None:
        self.overheads.observe(took)

    def connection_opened(self, reason: ConnectReason, took: float) -> None:
        self.opened[reason] += 1
        self.creates.observe(took)

    def connection_closed(self, reason: CloseReason) -> None:
        self.closed[reason] += 1
        if reason in keys.LOSSES:
            self.why.flight.lost()

    def connection_failed(self, phase: Phase, reason: ErrorReason) -> None:
        self.connection_errors[phase, reason] += 1
        if phase in keys.OPENING:
            self.why.flight.refused()

    def reconnected(self, ok: bool) -> None:
        self.reconnects[ok] += 1

    def pinged(self, outcome: PingOutcome, took: float) -> None:
        self.pings[outcome] += 1
        self.ping_durations.observe(took)

    def pinned(self, reason: PinReason) -> None:
        self.pins[reason] += 1

    def parsed(self, reused: bool) -> None:
        self.parses[reused] += 1

    def timed_out(self, kind: TimeoutKind) -> None:
        self.timeouts[kind] += 1

    # Read at a scrape

    def acquires(self) -> dict[AcquireOutcome, int]:
        """Requests for a connection by outcome."""
        return {_IMMEDIATE: self._immediate, _WAITED: self._waited, **self._failed_acquires}

    def acquire_durations(self) -> Histogram:
        """The times to get a connection, or not to."""
        durations = Histogram(WAIT_BUCKETS)
        durations.counts[:] = self._waits.counts
        durations.counts[0] += self._immediate
        durations.total = self._waits.total
        return durations

    def attempts(self) -> tuple[int, int]:
        """Attempts to get a usable connection: how many went well, how many did not.

        Acquires and pings. A client that gave up waiting says nothing about the server.
        """
        failed = self._failed_acquires
        ok = self._immediate + self._waited + self.pings[PingOutcome.OK]
        return ok, (
            failed[AcquireOutcome.TIMEOUT]
            + failed[AcquireOutcome.REJECTED]
            + self.pings[PingOutcome.TIMEOUT]
            + self.pings[PingOutcome.ERROR]
        )

    def committed_and_rolled_back(self) -> tuple[int, int]:
        return self.transactions.count() - self._rollbacks, self._rollbacks

    def used_peak(self) -> int:
        """The most leases at once within the last minute, as of the last ``tick``."""
        return self._peak.value()

    def tick(self, now: float) -> None:
        self._now = now
        self.latency.advance(now)
        self._peak.advance(now, self._used)
        self.statements.tick(now)
        self.exported.tick(now)

    def watch(self, now: float, gauges: PoolGauges) -> None:
        """The state of the pool now; every 100 ms."""
        self.blame.watch(now, self._waits.total, gauges, self.blocked)
        self.why.watch(now, gauges, self._ended, self.slow_query_threshold)

    def _ended(self) -> tuple[int, int]:
        queries = sum([histogram.count() for histogram in self.queries])
        return self.transactions.count(), queries

    def verdict(self, now: float) -> Verdict:
        """What is wrong now, and why; that all is well if nothing is."""
        return self.why.verdict(now)


class SharedPoolRecorder(PoolRecorder):
    """For all pools of a template: ``used`` is what one of them uses, so leases are counted."""

    __slots__ = ()

    def acquired_at_once(self, used: int) -> None:
        super().acquired_at_once(self._used + 1)

    def acquired(self, outcome: AcquireOutcome, waited: float, used: int) -> None:
        is_lease = outcome is _WAITED or outcome is _IMMEDIATE
        super().acquired(outcome, waited, self._used + 1 if is_lease else self._used)


class Recorder:
    """What happened in the sidecar since the start. Implements ``events.Observer``.

    ``pools`` gives the name and the slow-query threshold (seconds) of each pool; ``limit`` is how many
    statements of each are told apart, and ``exported`` how many of them have series of their own.
    """

    def __init__(
        self,
        pools: Sequence[tuple[str, float]],
        clock: Callable[[], float] = time.monotonic,
        incidents: IncidentStore | None = None,
        limit: int = LIMIT,
        exported: int = EXPORTED,
    ) -> None:
        self.clock = clock
        self.incidents = IncidentStore(KEEP, clock) if incidents is None else incidents
        self._limit = limit
        self._exported = exported
        self.config_read_at = time.time()
        self.is_config_read = True  # the last attempt went well
        now = clock()
        self.pools: dict[str, PoolRecorder] = {}
        for name, threshold in pools:
            self.pools[name] = self._new(name, threshold, now)
        self.traffic = Traffic()  # of logins
        self.clients = dict.fromkeys(keys.CLIENT_KEYS, 0)
        self.logins_timed_out = 0  # before the client had named its pool
        self.http_requests: dict[tuple[str, str, int], int] = {}  # by route, method, code
        self.http_durations: dict[str, Histogram] = {}  # by route
        self.lags = Histogram(LAG_BUCKETS)

    def _new(self, name: str, threshold: float, now: float) -> PoolRecorder:
        kind = SharedPoolRecorder if "*" in name else PoolRecorder
        return kind(name, threshold, now, self.incidents, self._limit, self._exported)

    def pool(self, name: str) -> PoolRecorder:
        return self.pools[name]

    def config_read(self, pools: Sequence[tuple[str, float]]) -> None:
        """A new configuration is in force, with these pools. Counts of those that stay go on."""
        self.config_read_at = time.time()
        self.is_config_read = True
        now = self.clock()
        before = self.pools
        self.pools = {}
        for name, threshold in pools:
            recorder = before.get(name) or self._new(name, threshold, now)
            recorder.slow_query_threshold = threshold
            self.pools[name] = recorder
        for name in before.keys() - self.pools.keys():  # a counter never falls
            self.traffic.add(before[name].traffic)
            before[name].why.close(now)

    def settle(self, settings: Mapping[str, Settings]) -> None:
        """What is in force now, by pool: verdicts say it."""
        for name, each in settings.items():
            if name in self.pools:
                self.pools[name].why.settings = each

    def close(self, now: float) -> None:
        """The sidecar stops."""
        for pool in self.pools.values():
            pool.why.close(now)

    def config_refused(self) -> None:
        """The configuration could not be read again."""
        self.is_config_read = False

    def pool_traffic(self, name: str) -> Traffic:
        return self.pools[name].traffic

    def client_ended(self, listener: Listener, outcome: ClientOutcome) -> None:
        self.clients[listener, outcome] += 1
        if listener is Listener.PG and outcome is ClientOutcome.REJECTED:
            for pool in self.pools.values():  # which one it wanted may not be known
                pool.why.flight.turned_away()

    def login_timed_out(self, pool: str | None) -> None:
        if pool is None:
            self.logins_timed_out += 1
        elif pool in self.pools:  # a reload may have taken it away
            self.pools[pool].timed_out(TimeoutKind.LOGIN)

    def expect_http(self, route: str, method: str, code: int) -> None:
        """Export requests of this kind from the start, at 0."""
        self.http_requests.setdefault((route, method, code), 0)
        self.http_durations.setdefault(route, Histogram(WAIT_BUCKETS))

    def http_request(self, route: str, method: str, code: int, took: float) -> None:
        self.expect_http(route, method, code)
        self.http_requests[route, method, code] += 1
        self.http_durations[route].observe(took)

    def loop_lag(self, late: float) -> None:
        self.lags.observe(late)

    def tick(self, now: float) -> None:
        """Move the rolling windows on; every 100 ms."""
        for pool in self.pools.values():
            pool.tick(now)

    def watch(self, now: float, gauges: Iterable[PoolGauges]) -> None:
        """The state of the pools now; every 100 ms."""
        for each in gauges:
            self.pools[each.name].watch(now, each)
