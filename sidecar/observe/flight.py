"""The flight recorder of one pool: what its last five minutes were like.

Pure. Three rings, all of fixed size:

- gauges at each tick (100 ms): 3,000 of 29 bytes, in arrays;
- what each second brought: who held the connections with which statement, what failed, who came;
- the present second, which becomes one of those.

A second has at most 8 holders, 4 failures and 4 arrivals, each with texts that others have, too (a
statement's, an application's): 1.5 MiB a pool at most, about 0.2 MiB as a rule.

Who holds the connections is looked at once a second, and at each tick while clients wait: what is asked
of it then is what share of the connections' time each had.
"""

from array import array
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Final, NamedTuple

from sidecar.events import ErrorOrigin, PoolGauges
from sidecar.observe.blame import POOL, label_of
from sidecar.work import Failure, Holder, SlowQuery, Statement, Who

TICKS: Final = 3000
SECONDS: Final = 300
STALE: Final = 1.0
"""Seconds after which a lease that runs nothing is not between two statements any more."""
NEWCOMER: Final = 10.0
"""Seconds for which a client counts as new."""

_HOLDERS: Final = 8
_FAILURES: Final = 4
_ARRIVALS: Final = 4
_MOST_KEYS: Final = 200
"""Of one second, before the most important ones are chosen; whatever more comes is in no group."""
_SLOW: Final = 20
_MESSAGE: Final = 300  # characters
_NAME: Final = 64
"""Characters of a name of the client's choosing. PostgreSQL's own have 63 bytes."""


class Held(NamedTuple):
    """Connections of one application with one statement in one state, within one second."""

    application: str
    statement: Statement | None
    state: str  # as in work.Holder
    seconds: float  # of connections: two for half a second are one
    stale: float  # of them: by those that idled for STALE or longer
    aged: float  # the seconds, each times how long the state had lasted
    fresh: float  # of the seconds: by newcomers
    most: int  # at once
    oldest: float  # seconds in this state
    client: int  # whose that is


class Failed(NamedTuple):
    origin: str
    sqlstate: str
    application: str
    statement: Statement | None
    times: int
    message: str  # the last one, without literals


class Arrived(NamedTuple):
    """New clients."""

    application: str
    user: str
    host: str  # without the port; "unix"
    clients: int


class Second(NamedTuple):
    """What one second brought; totals besides the groups."""

    at: float  # its end
    transactions: int
    queries: int
    arrivals: int
    rejected: int  # clients, of the whole sidecar
    failures: int
    own_failures: int  # of them: that nobody could have a connection
    timeouts: int  # clients that waited in vain
    lost: int  # server connections
    refused: int  # attempts to open one that failed
    connection_seconds: float
    held: tuple[Held, ...]
    failed: tuple[Failed, ...]
    arrived: tuple[Arrived, ...]


class Gauge(NamedTuple):
    """One tick."""

    at: float
    used: int
    idle: int
    connecting: int
    pending: int
    oldest_wait: float
    is_up: bool


_NO_CONNECTION: Final = frozenset({"53300", "57P03", "08001", "08006"})
"""What the sidecar itself tells a client that could have no connection, or lost it."""


class Flight:
    """``watch`` at each tick; the other calls whenever it happens."""

    def __init__(self, began: float, leaks: Mapping[int, Holder]) -> None:
        self.began: Final = began
        self.gauges: PoolGauges | None = None  # of the last tick
        self.at = began  # that tick
        self.down_since = 0.0  # 0: the server can be used
        self.waiting_since = 0.0  # clients have been waiting, with no pause above a second; 0: none
        self.last_waiting = 0.0  # the last tick at which one did
        self.timeouts = 0  # clients that have waited in vain so far
        self.slow_seen = 0  # slow queries so far
        self.longest_running = 0.0  # age of the oldest running query at the last look
        self.leaks: Final = leaks  # by server connection
        self.slow: Final[deque[tuple[float, SlowQuery]]] = deque(maxlen=_SLOW)
        self.seconds: Final[deque[Second]] = deque(maxlen=SECONDS)
        self._size = 0
        self._next = 0
        self._ats = array("d", bytes(8 * TICKS))
        self._used = array("i", bytes(4 * TICKS))
        self._idle = array("i", bytes(4 * TICKS))
        self._connecting = array("i", bytes(4 * TICKS))
        self._pending = array("i", bytes(4 * TICKS))
        self._oldest = array("f", bytes(4 * TICKS))
        self._up = array("b", bytes(TICKS))

        self._due = began + 1.0  # the end of the present second
        self._looked = began
        self._transactions = 0  # as of the last second
        self._queries = 0
        self._newest: deque[tuple[float, int]] = deque(maxlen=64)  # (instant, highest client id)
        self._highest_client = 0
        self._begin_second()

    def _begin_second(self) -> None:
        self._arrivals = self._rejected = self._failures = self._own_failures = 0
        self._timeouts = self._lost = self._refused = 0
        self._connection_seconds = 0.0
        self._held: dict[tuple[str, Statement | None, str], list[float]] = {}
        self._failed: dict[tuple[str, str, str, Statement | None], int] = {}
        self._messages: dict[tuple[str, str, str, Statement | None], str] = {}
        self._arrived: dict[tuple[str, str, str], int] = {}

    # -- what happens --------------------------------------------------------------------------

    def came(self, who: Who) -> None:
        self._arrivals += 1
        self._highest_client = max(self._highest_client, who.client)
        key = (
            label_of(who.application),
            who.user[:_NAME],
            who.address.rpartition(":")[0] or "unix",
        )
        if key in self._arrived or len(self._arrived) < _MOST_KEYS:
            self._arrived[key] = self._arrived.get(key, 0) + 1

    def failed(self, failure: Failure) -> None:
        self._failures += 1
        if failure.origin != ErrorOrigin.SERVER and failure.sqlstate in _NO_CONNECTION:
            self._own_failures += 1
        application = label_of(failure.application)
        key = (str(failure.origin), failure.sqlstate, application, failure.statement)
        if key in self._failed or len(self._failed) < _MOST_KEYS:
            self._failed[key] = self._failed.get(key, 0) + 1
            self._messages[key] = failure.message[:_MESSAGE]

    def timed_out(self) -> None:
        self._timeouts += 1
        self.timeouts += 1

    def slow_query(self, slow: SlowQuery) -> None:
        self.slow.append((self.at, slow))
        self.slow_seen += 1

    def lost(self) -> None:
        self._lost += 1

    def has_lost_some(self, now: float) -> bool:
        """Server connections, within the last seconds."""
        return self.losses(now - 3.0, now) > 0

    def losses(self, since: float, now: float) -> int:
        """Of server connections, those of the present second included."""
        return self._lost + sum(second.lost for second in self.between(since, now))

    def turned_away(self) -> None:
        self._rejected += 1

    def refused(self) -> None:
        """An attempt to open a server connection has failed."""
        self._refused += 1

    # -- each tick -----------------------------------------------------------------------------

    def watch(self, now: float, gauges: PoolGauges) -> bool:
        """Whether a second is over: then ``turn`` is to be called."""
        self.gauges = gauges
        self.at = now
        i = self._next
        self._ats[i] = now
        self._used[i] = gauges.used
        self._idle[i] = gauges.idle
        self._connecting[i] = gauges.connecting
        self._pending[i] = gauges.pending
        self._oldest[i] = gauges.oldest_wait
        self._up[i] = gauges.is_up
        self._next = (i + 1) % TICKS
        self._size = min(self._size + 1, TICKS)

        if gauges.is_up:
            self.down_since = 0.0
        elif not self.down_since:
            self.down_since = now
        if gauges.pending:
            if not self.waiting_since:
                self.waiting_since = now - gauges.oldest_wait
            self.last_waiting = now
        elif self.waiting_since and now - self.last_waiting > 1.0:
            self.waiting_since = 0.0
        is_over = now >= self._due
        if gauges.pending or is_over:
            self._look(now, gauges.holders() if gauges.used else ())
        return is_over

    def _look(self, now: float, holders: Iterable[Holder]) -> None:
        weight = min(now - self._looked, 1.0)
        self._looked = now
        self.longest_running = 0.0
        oldest_client = self._newcomers_from(now)
        counts: dict[tuple[str, Statement | None, str], int] = {}
        for holder in holders:
            key = (application_of(holder.who), holder.statement, holder.state)
            age = now - holder.since
            counts[key] = count = counts.get(key, 0) + 1
            self._connection_seconds += weight
            if holder.state == "running" and age > self.longest_running:
                self.longest_running = age
            found = self._held.get(key)
            if found is None:
                if len(self._held) >= _MOST_KEYS:
                    continue
                found = self._held[key] = [0.0, 0.0, 0.0, 0.0, 0, -1.0, 0]
            found[0] += weight
            if age >= STALE and holder.state != "running":
                found[1] += weight
            found[2] += weight * age
            if holder.who.client >= oldest_client:
                found[3] += weight
            if count > found[4]:
                found[4] = count
            if age > found[5]:
                found[5] = age
                found[6] = holder.who.client

    def _newcomers_from(self, now: float) -> float:
        """The id of the first client that still counts as new: ids are given in order."""
        newest = self._newest
        while len(newest) > 1 and newest[1][0] <= now - NEWCOMER:
            newest.popleft()
        if newest and newest[0][0] <= now - NEWCOMER:
            return newest[0][1] + 1
        return 1  # all came within that time, as far as is known

    def turn(self, now: float, transactions: int, queries: int) -> None:
        """The present second is over; the counts are those since the start."""
        held = sorted(self._held.items(), key=lambda each: -each[1][0])[:_HOLDERS]
        failed = sorted(self._failed.items(), key=lambda each: -each[1])[:_FAILURES]
        arrived = sorted(self._arrived.items(), key=lambda each: -each[1])[:_ARRIVALS]
        self.seconds.append(
            Second(
                now,
                transactions - self._transactions,
                queries - self._queries,
                self._arrivals,
                self._rejected,
                self._failures,
                self._own_failures,
                self._timeouts,
                self._lost,
                self._refused,
                self._connection_seconds,
                tuple(
                    Held(*key, v[0], v[1], v[2], v[3], int(v[4]), v[5], int(v[6]))
                    for key, v in held
                ),
                tuple(Failed(*key, count, self._messages[key]) for key, count in failed),
                tuple(Arrived(*key, count) for key, count in arrived),
            )
        )
        self._transactions, self._queries = transactions, queries
        self._newest.append((now, self._highest_client))
        self._due = max(self._due + 1.0, now)
        self._begin_second()

    # -- what was ------------------------------------------------------------------------------

    def between(self, since: float, until: float) -> list[Second]:
        """The whole seconds that ended after ``since``, up to ``until``."""
        found: list[Second] = []
        for second in reversed(self.seconds):
            if second.at <= since:
                break
            if second.at <= until:
                found.append(second)
        return found[::-1]

    def columns(self) -> list["array[float] | array[int]"]:
        """Copies of the rings, oldest first: instants, used, idle, connecting, pending, oldest wait, up."""
        rings: list[array[float] | array[int]] = [
            self._ats,
            self._used,
            self._idle,
            self._connecting,
            self._pending,
            self._oldest,
            self._up,
        ]
        if self._size < TICKS:
            return [ring[: self._size] for ring in rings]
        return [ring[self._next :] + ring[: self._next] for ring in rings]  # type: ignore[operator]  # of one type

    def ticks(self, since: float) -> Iterator[Gauge]:
        """Newest first."""
        for back in range(1, self._size + 1):
            i = self._next - back  # negative ones count from the end
            at = self._ats[i]
            if at <= since:
                return
            yield Gauge(
                at,
                self._used[i],
                self._idle[i],
                self._connecting[i],
                self._pending[i],
                self._oldest[i],
                bool(self._up[i]),
            )


def application_of(who: Who) -> str:
    """By name; without user: the pool itself, for a login or a check."""
    return label_of(who.application) if who.user else POOL
