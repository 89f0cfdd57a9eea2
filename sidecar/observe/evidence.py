"""What a verdict is reached from: the figures of the last seconds, and of the time before.

Pure. The window is as long as clients have been waiting, 2 to 10 seconds: so it holds what is going on now
and nothing of what was before.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from sidecar.observe.flight import Arrived, Failed, Flight, Gauge, Second
from sidecar.work import Blocker, Holder, SlowQuery, Statement

SHORTEST: Final = 2.0
LONGEST: Final = 10.0
BASELINE: Final = 60.0
"""Seconds of the window, at least and at most, and before it."""

_ENOUGH: Final = 3.0
"""Seconds of baseline without which there is none."""

LATELY: Final = 5
"""Seconds in which failures are counted: they end as suddenly as they begin. And for which the longest
wait is remembered: clients that wait about as long as matters are one trouble, not one each second."""

_MOST: Final = 20
"""Shares, failures and arrivals that are told apart."""


class Name(NamedTuple):
    """A statement by name."""

    fingerprint: str
    text: str  # normalised


def name_of(statement: Statement | None) -> Name | None:
    return None if statement is None else Name(statement.fingerprint, statement.text)


@dataclass(frozen=True, slots=True)
class Share:
    """Of the time of the connections: that of one application, statement and state. In seconds."""

    application: str
    statement: Name | None
    state: str
    seconds: float
    stale: float  # of them: by leases that have run nothing for a second or longer
    aged: float  # the seconds, each times the age of the state
    fresh: float  # of the seconds: by clients that have come lately
    most: int  # connections at once
    oldest: float  # age of the state
    client: int  # whose that is


@dataclass(frozen=True, slots=True)
class Settings:
    """What is in force in the pool. Durations in seconds; 0: none."""

    mode: str = "transaction"
    server: str = "the server"
    acquire_timeout: float = 30.0
    query_timeout: float = 0.0
    idle_in_transaction_timeout: float = 0.0
    slow_query_threshold: float = 5.0
    leak_threshold: float = 60.0
    leak_action: str = "report"
    max_clients: int = 0
    console: str = "psql pgsidecar"
    """The command that a person steers the sidecar with."""
    has_admin: bool = True
    """Somebody may steer it."""
    options: Mapping[str, object] = field(default_factory=dict)
    """All of them, as a file has them, without secrets."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """Figures of a window. Durations in seconds, rates per second."""

    pool: str
    seconds: float
    max_size: int
    used: int = 0
    idle: int = 0
    connecting: int = 0
    pending: int = 0
    in_login: int = 0  # of them
    oldest_wait: float = 0.0
    is_up: bool = True
    is_paused: bool = False
    why_down: str = ""
    down_for: float = 0.0
    waiting_for: float = 0.0  # since when clients wait, without a pause
    quiet_for: float = 0.0  # since one last waited; 0 if one does
    longest_wait: float = 0.0  # of the last seconds
    flickers: bool = False  # clients have waited, then nobody, then clients again
    most_pending: int = 0
    full: float = 0.0  # share of the last seconds in which no connection was free
    timeouts: int = 0
    lost: int = 0
    refused: int = 0
    transactions: float = 0.0
    transactions_before: float | None = None  # None: there is no time before, so for the next two
    queries: float = 0.0
    silent_for: float = 0.0  # since a query or transaction ended
    connection_seconds: float = 0.0
    shares: tuple[Share, ...] = ()  # most first
    arrivals: tuple[int, ...] = ()  # in each second
    arrived_before: float | None = None
    rejected: float = 0.0  # of the whole sidecar
    arrived: tuple[Arrived, ...] = ()  # most first
    failures: float = (
        0.0  # of the last seconds, but for those that say that no connection can be had
    )
    failures_before: float | None = None
    failed: tuple[Failed, ...] = ()  # most first
    holders: tuple[Holder, ...] = ()  # at this instant
    leaks: tuple[Holder, ...] = ()  # as they began; oldest first
    blocked: tuple[tuple[int, Blocker], ...] = ()  # server connection, and the root of its chain
    slow: tuple[SlowQuery, ...] = ()  # that still run; oldest first
    now: float = 0.0
    settings: Settings = field(default_factory=Settings)


def gather(
    name: str,
    flight: Flight,
    now: float,
    settings: Settings,
    blocked: Mapping[int, Blocker],
    since: float = 0.0,
) -> Evidence:
    """``since``: the window begins no later."""
    gauges = flight.gauges
    if gauges is None:  # before the first tick
        return Evidence(name, SHORTEST, 0, now=now, settings=settings)
    episode = now - flight.waiting_since if flight.waiting_since else LONGEST
    length = min(max(episode, now - since if since else 0.0, SHORTEST), LONGEST)
    window = flight.between(now - length - 0.5, now)
    before = flight.between(now - length - BASELINE, now - length - 0.5)
    has_before = len(before) >= _ENOUGH
    ticks = list(flight.ticks(now - length))
    lately = [tick for tick in ticks if tick.at > now - SHORTEST]
    holders = tuple(gauges.holders())
    running = {each.server: each.since for each in holders if each.state == "running"}
    return Evidence(
        pool=name,
        seconds=length,
        max_size=gauges.max_size,
        used=gauges.used,
        idle=gauges.idle,
        connecting=gauges.connecting,
        pending=gauges.pending,
        in_login=gauges.in_login,
        oldest_wait=gauges.oldest_wait,
        is_up=gauges.is_up,
        is_paused=gauges.is_paused,
        why_down=gauges.why_down,
        down_for=now - flight.down_since if flight.down_since else 0.0,
        waiting_for=now - flight.waiting_since if flight.waiting_since else 0.0,
        quiet_for=now - flight.last_waiting if flight.last_waiting else now - flight.began,
        longest_wait=max(
            (tick.oldest_wait for tick in ticks if tick.at > now - LATELY), default=0.0
        ),
        flickers=_flickers(ticks, flight.waiting_since),
        most_pending=max((tick.pending for tick in ticks), default=0),
        full=sum(tick.used + tick.connecting >= gauges.max_size for tick in lately)
        / max(len(lately), 1),
        timeouts=sum(second.timeouts for second in window),
        lost=flight.losses(now - length - 0.5, now),
        refused=sum(second.refused for second in window),
        transactions=_rate([second.transactions for second in window]),
        transactions_before=_rate([s.transactions for s in before]) if has_before else None,
        queries=_rate([second.queries for second in window]),
        silent_for=now
        - next(
            (s.at for s in reversed(flight.seconds) if s.transactions or s.queries), flight.began
        ),
        connection_seconds=sum(second.connection_seconds for second in window),
        shares=_shares(window),
        arrivals=tuple(second.arrivals for second in window),
        arrived_before=_rate([second.arrivals for second in before]) if has_before else None,
        rejected=_rate([second.rejected for second in window]),
        arrived=_arrived(window),
        failures=_rate([s.failures - s.own_failures for s in window[-LATELY:]]),
        failures_before=_rate([s.failures - s.own_failures for s in before])
        if has_before
        else None,
        failed=_failed(window[-LATELY:]),
        holders=holders,
        leaks=tuple(sorted(flight.leaks.values(), key=lambda holder: holder.leased_at)),
        blocked=tuple(blocked.items()),
        slow=tuple(
            slow for _, slow in flight.slow if running.get(slow.holder.server) == slow.holder.since
        ),
        now=now,
        settings=settings,
    )


def _rate(counts: list[int]) -> float:
    return sum(counts) / len(counts) if counts else 0.0


def _flickers(ticks: list[Gauge], since: float) -> bool:
    """Whether there is a tick without a waiting client between two with one, newest first."""
    has_waited = has_paused = False
    for tick in ticks:
        if tick.at < since:
            return False
        if not tick.pending:
            has_paused = has_waited
        elif has_paused:
            return True
        else:
            has_waited = True
    return False


def _shares(window: list[Second]) -> tuple[Share, ...]:
    found: dict[tuple[str, Name | None, str], Share] = {}
    for second in window:
        for held in second.held:
            key = (held.application, name_of(held.statement), held.state)
            share = found.get(key)
            if share is None:
                found[key] = Share(
                    *key,
                    held.seconds,
                    held.stale,
                    held.aged,
                    held.fresh,
                    held.most,
                    held.oldest,
                    held.client,
                )
                continue
            is_older = held.oldest >= share.oldest
            found[key] = Share(
                *key,
                share.seconds + held.seconds,
                share.stale + held.stale,
                share.aged + held.aged,
                share.fresh + held.fresh,
                max(share.most, held.most),
                held.oldest if is_older else share.oldest,
                held.client if is_older else share.client,
            )
    return tuple(sorted(found.values(), key=lambda share: -share.seconds)[:_MOST])


def _arrived(window: list[Second]) -> tuple[Arrived, ...]:
    found: dict[tuple[str, str, str], int] = {}
    for second in window:
        for application, user, host, count in second.arrived:
            key = (application, user, host)
            found[key] = found.get(key, 0) + count
    ranked = sorted(found.items(), key=lambda each: -each[1])
    return tuple(Arrived(*key, count) for key, count in ranked[:_MOST])


def _failed(window: list[Second]) -> tuple[Failed, ...]:
    found: dict[tuple[str, str, str, Statement | None], Failed] = {}
    for second in window:
        for each in second.failed:
            key = (each.origin, each.sqlstate, each.application, each.statement)
            before = found.get(key)
            count = each.times + (0 if before is None else before.times)
            found[key] = each._replace(times=count)
    return tuple(sorted(found.values(), key=lambda each: -each.times)[:_MOST])
