"""What may be wrong with a pool, and by which signs that is told.

Pure. It is calm: without clients that have waited for some time, a server that is gone, a burst of errors
or of new clients, a leak or a slow query, all is well, however full the pool is.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from sidecar.observe.evidence import Evidence, Name

WAIT: Final = 0.1
"""Seconds of waiting from which on it matters: the objective for the P99 of queries is 100 ms."""
WAITING: Final = 1.0
"""Seconds for which clients have to wait without a pause: less is a burst that the pool takes."""
CALM: Final = 2.0
"""Seconds without a waiting client after which it is over."""
FULL: Final = 0.5
"""Share of the window in which all connections are in use: else something else makes clients wait."""
MOST: Final = 0.5
"""Share of the connections' time from which on one cause holds the pool: without it, the rest would
have more than it needs now."""
SLOW: Final = 0.1
"""Mean age, in seconds, of a statement when it is looked at: it takes at least as long. Below, it is
not slow, however often it runs."""
SURELY_SLOW: Final = 1.0
"""So: no crowd of new clients explains it."""
DOWN: Final = 1.0
"""Seconds without a usable server, if no connection was lost: the first ones take some time to open."""
STORM: Final = 10.0
"""New clients per second below which there is no storm: applications open their pools at start."""
STORM_SECONDS: Final = 3
"""Seconds of the window in which so many have to come: a pool of clients that starts comes at once."""
CROWD: Final = 100
"""New clients within the window that are a storm however they come."""
BURST: Final = 5.0
"""Errors per second below which there is no burst."""
BURST_SHARE: Final = 0.01
"""Of queries that fail: the alert on connection errors has the same threshold."""
FAR_ABOVE: Final = 5.0
"""Times the rate before: a peak hour has two or three times the usual."""
HUNG: Final = 5.0
"""Seconds in which nothing ends although all connections work: then it is the server."""


class Kind(StrEnum):
    HEALTHY = "healthy"
    POOL_TOO_SMALL = "pool_too_small"
    SLOW_STATEMENT = "slow_statement"
    LEAK = "leak"
    LOCK_CHAIN = "lock_chain"
    DATABASE_DOWN = "database_down"
    CONNECTION_STORM = "connection_storm"
    ERROR_BURST = "error_burst"


@dataclass(frozen=True, slots=True)
class Verdict:
    kind: Kind
    pool: str
    headline: str
    application: str = ""  # whose doing it is; empty: nobody's, or it has no name
    statement: Name | None = None  # that did it, or that holds the connections
    evidence: tuple[str, ...] = ()
    next_steps: tuple[str, ...] = ()

    def to_json(self) -> dict[str, object]:
        name = self.statement
        return {
            "kind": self.kind.value,
            "pool": self.pool,
            "headline": self.headline,
            "application": self.application,
            "statement": None
            if name is None
            else {"fingerprint": name.fingerprint, "text": name.text[:1000]},
            "evidence": list(self.evidence),
            "next_steps": list(self.next_steps),
        }


def is_down(e: Evidence) -> bool:
    return not e.is_up and not e.is_paused and (e.down_for >= DOWN or e.lost > 0)


def is_contended(e: Evidence) -> bool:
    """Clients wait, longer than they should, and not since a second ago."""
    if e.is_paused or e.quiet_for > CALM or e.waiting_for < WAITING:
        return False
    if not e.pending and not e.flickers and e.used + e.connecting < e.max_size:
        return False  # it was one long wait, and it is over
    return e.longest_wait >= WAIT and (e.full >= FULL or e.refused > 0 or e.timeouts > 0)


def is_storm(e: Evidence) -> bool:
    """Many more new clients than before, and they have to wait or are turned away."""
    if e.is_paused or not (is_contended(e) or e.rejected >= STORM):
        return False
    usual = max(STORM, FAR_ABOVE * (e.arrived_before or 0.0))
    busy = sum(count >= usual for count in e.arrivals)
    is_crowd = sum(e.arrivals) >= max(CROWD, usual * e.seconds)
    return busy >= STORM_SECONDS or is_crowd or e.rejected >= usual


def is_burst(e: Evidence) -> bool:
    usual = max(BURST, FAR_ABOVE * (e.failures_before or 0.0), BURST_SHARE * e.queries)
    return e.failures >= usual
