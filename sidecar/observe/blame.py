"""Who is to blame for waiting: each second that clients wait is charged to those who hold the pool then.

Pure. What is charged is the growth of one sum, the time that clients have waited so far: waits that are
over, however short, and those that go on. So the sum charged equals the sum waited. Each tick's part is
shared equally among the connections that are not to be had at that instant. One whose statement waits for
a lock passes its share on to whoever it waits for in the end.

Applications are bounded, as they are labels of a metric: those that come when there are enough are charged as
``other``, until one of the others has not been seen for a while. Its series then ends: what it had is not
added to ``other``, so that no counter falls or jumps. If it comes back it begins at 0 again.
"""

import re
from collections.abc import Callable, Mapping
from typing import Final

from sidecar.events import PoolGauges
from sidecar.work import Blocker, Holder, Statement

NOBODY: Final = "(none)"
"""Nobody holds anything: there are no connections, or there were none to wait for any more."""
POOL: Final = "(pool)"
"""The pool itself: it opens, checks, resets or closes a connection."""
UNNAMED: Final = "(unnamed)"
"""Clients without application_name."""
OTHER: Final = "other"

_RESERVED: Final = (NOBODY, POOL, UNNAMED, OTHER)

APPLICATIONS: Final = 20
FORGOTTEN: Final = 60.0
"""Seconds after which an application that holds nothing makes room for another."""

_LOOK_EVERY: Final = 1.0
"""Seconds; who holds something has a series at 0 before it is charged: ``increase()`` misses the first
charge otherwise."""

_LONGEST: Final = 63  # characters: NAMEDATALEN - 1, as PostgreSQL cuts them
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def label_of(application: str) -> str:
    """An application_name as a label value: whatever the client says, it is short, of one line, and none
    of the names that mean something here."""
    name = application[:_LONGEST]
    if not name.isprintable():
        name = _CONTROL.sub("?", name)
    if not name.strip():
        return UNNAMED
    return f'"{name}"' if name in _RESERVED else name


def _add_to(statement: Statement, seconds: float) -> None:
    statement.blamed += seconds


class Blame:
    """Of one pool."""

    def __init__(
        self,
        charge: Callable[[Statement, float], None] = _add_to,
        applications: int = APPLICATIONS,
    ) -> None:
        """``charge``: how a statement is charged with seconds."""
        self._charge_statement: Final = charge
        self.waited = 0.0  # seconds, by all clients together; all of it is charged
        self.charged = 0.0  # seconds
        self.without_statement = 0.0  # of them: charged to no statement of ours
        self._limit: Final = applications
        self._seconds: dict[str, float] = dict.fromkeys(_RESERVED, 0.0)
        self._seen: dict[str, float] = {}  # applications with a series, longest not seen first
        self._next_look = 0.0
        self._gauges: PoolGauges | None = None  # as of the last tick
        self._now = 0.0  # the instant of it

    def by_application(self) -> dict[str, float]:
        """Seconds charged, of those that have a series."""
        return self._seconds.copy()

    def held(self) -> dict[str, int]:
        """Leases at this instant, by application; 0 for those that have a series and hold nothing. Who holds
        something gets a series with it, as with a tick."""
        holders = [] if self._gauges is None else self._gauges.holders()
        names = [self._see(_application_of(holder), self._now) for holder in holders]
        counts = dict.fromkeys(self._seconds, 0)
        del counts[NOBODY]
        for name in names:
            counts[name if name in counts else OTHER] += 1  # a later one may have had its room
        return counts

    def watch(
        self,
        now: float,
        ended: float,
        gauges: PoolGauges,
        blocked: Mapping[int, Blocker | Holder],
    ) -> None:
        """Charge what has been waited since the last call. ``ended``: seconds of all waits that are
        over; ``blocked``: what the leases wait for that wait for a lock, by the id of their connection."""
        self._gauges, self._now = gauges, now
        waited = ended + gauges.waited
        part = waited - self.waited
        if part > 0.0:
            self.waited = waited
            self._charge(part, gauges, blocked, now)
        elif gauges.used and now >= self._next_look:
            self._next_look = now + _LOOK_EVERY
            for holder in gauges.holders():
                self._see(_application_of(holder), now)

    def _charge(
        self,
        part: float,
        gauges: PoolGauges,
        blocked: Mapping[int, Blocker | Holder],
        now: float,
    ) -> None:
        holders = gauges.holders()
        if not holders and not (gauges.connecting and gauges.is_up):
            self._add(NOBODY, None, part)
            return
        share = part / (len(holders) + gauges.connecting)
        for holder in holders:
            guilty: Blocker | Holder = blocked.get(holder.server, holder)
            if isinstance(guilty, Blocker) and guilty.holder is not None:
                guilty = guilty.holder
            name = self._see(_application_of(guilty), now)
            self._add(name, None if isinstance(guilty, Blocker) else guilty.statement, share)
        if gauges.connecting:
            self._add(POOL, None, share * gauges.connecting)

    def _add(self, name: str, statement: Statement | None, seconds: float) -> None:
        self.charged += seconds
        self._seconds[name] += seconds
        if statement is None:
            self.without_statement += seconds
        else:
            self._charge_statement(statement, seconds)

    def _see(self, name: str, now: float) -> str:
        """The series of an application that holds something now."""
        if name in _RESERVED:
            return name
        seen = self._seen
        if name not in seen:
            if len(seen) >= self._limit:
                oldest = next(iter(seen))
                if now - seen[oldest] < FORGOTTEN:
                    return OTHER
                del seen[oldest], self._seconds[oldest]
            self._seconds[name] = 0.0
        else:
            del seen[name]
        seen[name] = now
        return name


def _application_of(guilty: Blocker | Holder) -> str:
    if isinstance(guilty, Blocker):
        return label_of(guilty.application)
    return label_of(guilty.who.application) if guilty.who.user else POOL
