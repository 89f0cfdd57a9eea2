"""Who has which server connection: the pool's decisions, as plain data and plain functions.

Pure: no I/O, no clock, no task. Every connection is in exactly one collection, the one of its
state; ``move`` is the only way from one to another, and every gauge is the length of a collection,
so counts cannot drift. Functions decide; the caller does the I/O.
"""

from collections import OrderedDict
from enum import IntEnum
from math import inf
from typing import Final, Generic, Protocol, TypeVar


class ConnectionState(IntEnum):
    """States of a server connection. An int, since it indexes on the hot path."""

    CONNECTING = 0  # TCP and login under way
    IDLE = 1
    ACTIVE = 2  # leased to a client
    CHECKING = 3  # pinged, reset, or held until a cancel request has passed
    CLOSING = 4  # told to go, its backend may still run


# Names of their own: ``Enum.MEMBER`` costs 0.2 us on Python 3.11.
_IDLE: Final = ConnectionState.IDLE
_ACTIVE: Final = ConnectionState.ACTIVE

_NEXT: dict[ConnectionState, frozenset[ConnectionState]] = {
    ConnectionState.CONNECTING: frozenset(
        {ConnectionState.IDLE, ConnectionState.ACTIVE, ConnectionState.CLOSING}
    ),
    ConnectionState.IDLE: frozenset(
        {ConnectionState.ACTIVE, ConnectionState.CHECKING, ConnectionState.CLOSING}
    ),
    ConnectionState.ACTIVE: frozenset(
        {ConnectionState.IDLE, ConnectionState.CHECKING, ConnectionState.CLOSING}
    ),
    ConnectionState.CHECKING: frozenset(
        {ConnectionState.IDLE, ConnectionState.ACTIVE, ConnectionState.CLOSING}
    ),
    ConnectionState.CLOSING: frozenset(),
}


_AT_ONCE: Final = 50
"""Waiters told in one go that their time is over: 1 ms or so."""

_ROUNDING: Final = 1e-3  # seconds; sums of floats are not exact


class Connection(Protocol):
    state: ConnectionState


class Waiter(Protocol):
    waiting_since: float
    deadline: float


C = TypeVar("C", bound=Connection)
W = TypeVar("W", bound=Waiter)


class PoolState(Generic[C, W]):
    """The collections of one pool. ``max_size`` bounds the sum of all states, closing included:
    a backend that has been told to go is still there for PostgreSQL."""

    def __init__(self, max_size: int, min_idle: int, max_waiting: int) -> None:
        self.max_size = max_size
        self.min_idle = min_idle
        self.max_waiting = max_waiting
        # Dicts keep their order: the idle ones are a stack, longest unused first.
        self.by_state: tuple[dict[C, None], ...] = tuple({} for _ in ConnectionState)
        self.idle = self.by_state[ConnectionState.IDLE]
        self.active = self.by_state[ConnectionState.ACTIVE]
        self.waiters: OrderedDict[W, None] = OrderedDict()
        self._least_patience = inf  # seconds; nobody in the queue waits for less

    def __repr__(self) -> str:
        counts = " ".join(
            f"{state.name.lower()}={len(self.by_state[state])}" for state in ConnectionState
        )
        return f"<PoolState {counts} waiting={len(self.waiters)} max={self.max_size}>"

    @property
    def size(self) -> int:
        return sum(map(len, self.by_state))

    @property
    def established(self) -> int:
        """Connections that have logged in and were not told to go."""
        return len(self.idle) + len(self.active) + len(self.by_state[ConnectionState.CHECKING])

    # -- connections ---------------------------------------------------------------------------

    def add(self, connection: C) -> None:
        """A connection is being opened. The caller asked ``room`` first."""
        assert self.size < self.max_size
        connection.state = ConnectionState.CONNECTING
        self.by_state[ConnectionState.CONNECTING][connection] = None

    def move(self, connection: C, state: ConnectionState) -> None:
        """The one way from state to state. Raises ValueError, and changes nothing, if there is none."""
        before = connection.state
        if state not in _NEXT[before]:
            raise ValueError(f"a connection cannot go from {before.name} to {state.name}")
        del self.by_state[before][connection]
        self.by_state[state][connection] = None
        connection.state = state

    def remove(self, connection: C) -> bool:
        """The connection is gone. False if it was gone already."""
        return self.by_state[connection.state].pop(connection, self) is None

    # -- acquire and release -------------------------------------------------------------------

    def take_idle(self) -> C | None:
        """The most recently used idle connection, now active; None if a client has to wait.

        Last in, first out: what is not needed stays unused and can be closed. Clients that wait
        come first.
        """
        if not self.idle or self.waiters:
            return None
        connection, _ = self.idle.popitem()
        self.active[connection] = None
        connection.state = _ACTIVE
        return connection

    def give_back(self, connection: C) -> None:
        """The counterpart of ``take_idle``: an active connection becomes idle. The same as
        ``move``, without its questions: 0.15 us of 0.4."""
        del self.active[connection]
        self.idle[connection] = None
        connection.state = _IDLE

    def can_wait(self) -> bool:
        return not self.max_waiting or len(self.waiters) < self.max_waiting

    def enqueue(self, waiter: W) -> None:
        """Its ``waiting_since`` is now."""
        patience = waiter.deadline - waiter.waiting_since
        if not self.waiters or patience < self._least_patience:
            self._least_patience = patience
        self.waiters[waiter] = None

    def abandon(self, waiter: W) -> bool:
        """The waiter does not wait any more. False if it did not."""
        return self.waiters.pop(waiter, self) is None

    def next_waiter(self) -> W | None:
        """The waiter that waits longest, taken off the queue."""
        return self.waiters.popitem(last=False)[0] if self.waiters else None

    def overdue(self, now: float, most: int = _AT_ONCE) -> list[W]:
        """The waiters whose deadline has passed, longest waiting first, taken off the queue.

        At most ``most`` of them. Who came too late to be overdue, even with the least patience of
        all, and whoever came after that, is not looked at: where all wait equally long, that is
        everyone who is not overdue.
        """
        found: list[W] = []
        came_by = now - self._least_patience + _ROUNDING
        for waiter in self.waiters:
            if waiter.waiting_since > came_by or len(found) == most:
                break
            if waiter.deadline <= now:
                found.append(waiter)
        for waiter in found:
            del self.waiters[waiter]
        return found

    # -- size ----------------------------------------------------------------------------------

    def wanted(self) -> int:
        """How many more connections there should be: for each waiter that no opening, checked or
        idle connection will serve, and to keep ``min_idle`` idle. Negative: so many are not needed."""
        coming = len(self.by_state[ConnectionState.CONNECTING])
        serving = coming + len(self.idle) + len(self.by_state[ConnectionState.CHECKING])
        return max(len(self.waiters), self.min_idle) - serving

    def missing(self) -> int:
        """How many of them may be opened now."""
        return max(0, min(self.wanted(), self.max_size - self.size))

    def surplus(self) -> int:
        """How many idle connections are more than ``min_idle``."""
        return max(0, len(self.idle) - self.min_idle)
