"""What the console is shown, and what it may have done: its one window to the rest of the sidecar.

Pure. ``service`` implements ``Control``; snapshots of clients and server connections come from
``events``.
"""

from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from sidecar.config import Config
from sidecar.console.insight import Incident, Insight
from sidecar.events import ClientSnapshot, PoolSnapshot, ServerSnapshot, Stop
from sidecar.facts import PoolFacts, Totals

PERIOD: Final = 60.0
"""Seconds over which averages are taken (PgBouncer's ``stats_period``)."""


@dataclass(frozen=True, slots=True)
class Changes:
    """The options that a RELOAD changed, and those that it could not."""

    applied: Sequence[str]
    needs_restart: Sequence[str]


class Control(Protocol):
    """The service, as the console sees it. A database is meant by the name of its pool."""

    @property
    def config(self) -> Config: ...

    @property
    def pg_address(self) -> tuple[str, int]: ...

    def pools(self) -> list[PoolFacts]:
        """One for each entry of the configuration."""

    def live_pools(self) -> list[tuple[int, str, PoolSnapshot]]:
        """One for each database and user: its key, the name that clients use, its state."""

    def clients(self) -> Iterator[ClientSnapshot]: ...

    def servers(self) -> Iterator[ServerSnapshot]: ...

    def logins(self) -> int: ...

    def insights(self) -> Iterable[Insight]:
        """One for each entry of the configuration."""

    def incidents(self) -> Iterable[Incident]:
        """Latest first."""

    def meant(self, database: str) -> list[str]:
        """The names of the pools meant by it; of all by an empty one. Raises SidecarError."""

    def pause(self, pools: Sequence[str]) -> list[str]:
        """Take no connection from anybody, and give none. Returns those that were not paused."""

    def resume(self, pools: Sequence[str]) -> list[str]:
        """Returns those that were paused."""

    def has_connections(self, pools: Sequence[str]) -> bool: ...

    def reconnect(self, pools: Sequence[str]) -> None:
        """Replace all connections, each as soon as it is released."""

    def has_replaced(self, pools: Sequence[str]) -> bool:
        """Whether some of those are still there."""

    def kill(self, pools: Sequence[str]) -> None:
        """Pause, and drop all clients and connections at once."""

    def kill_client(self, id: int) -> bool:
        """False if there is none."""

    def set_enabled(self, pools: Sequence[str], enabled: bool) -> None:
        """Whether new clients may log in."""

    def reload(self) -> Awaitable[Changes]:
        """Read the configuration again. Raises ConfigError, and then nothing has changed."""

    def shut_down(self, stop: Stop) -> None: ...


@dataclass(frozen=True, slots=True)
class View:
    """What a SHOW command is made from."""

    control: Control
    now: float
    when: Callable[[float], str]
    """An instant in words; empty for 0."""
    at: Callable[[float], str]
    """The same of a unix time."""
    guests: Sequence[ClientSnapshot]
    """The clients of the console."""
    averages: Callable[[PoolFacts], "tuple[Totals, float]"]
    """What happened in the last period, and how many seconds it had."""
    memory: int
    """Bytes of memory in use."""


class Averages:
    """Remembers totals, so that there are figures of the last full period."""

    def __init__(self, now: float) -> None:
        self._started = now
        self._due = now + PERIOD
        self._before: dict[str, tuple[float, Totals]] = {}
        self._last: dict[str, tuple[float, Totals]] = {}

    def tick(self, now: float, pools: Callable[[], list[PoolFacts]]) -> None:
        """Called often; looks at the pools once a period."""
        if now >= self._due:
            self._due = max(self._due + PERIOD, now)
            self._before = self._last
            self._last = {facts.snapshot.name: (now, facts.totals) for facts in pools()}

    def of(self, facts: PoolFacts, now: float) -> tuple[Totals, float]:
        """In the last full period; before there was one, since the start."""
        name = facts.snapshot.name
        at, totals = self._last.get(name, (now, facts.totals))
        since, before = self._before.get(name, (self._started, Totals()))
        return totals.since(before), max(at - since, 0.001)
