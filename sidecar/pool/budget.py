"""Who of a template's pools gets the next server connection: one budget for all of them.

Pure: no I/O, no clock, no task, and no knowledge of what a pool is but ``Member``. Connections
that are closing count, as in ``pool.state``. What is decided:

- Free room goes to the pools in which somebody waits, one connection each in turn, to the one whose
  client waits longest first; what is left goes to pools that want idle connections.
- Where room is lacking, as many idle connections are closed as it lacks, the longest unused first.
- Where nothing is idle, a connection that is released in one pool is closed for another one whose
  clients have waited for longer (``yields``). If that other pool has connections of its own, these
  serve its clients without a new login: it has to be behind by ``PATIENCE``.
"""

from collections.abc import Iterator
from typing import Final, Generic, Protocol, TypeVar

from sidecar.pool.state import ConnectionState

PATIENCE: Final = 0.1
"""Seconds. A handover costs a login, some milliseconds: two busy pools must not swap all the time."""

_IDLE: Final = ConnectionState.IDLE
_CLOSING: Final = ConnectionState.CLOSING


class Connection(Protocol):
    state: ConnectionState
    status_since: float  # idle since


class Member(Protocol):
    """One of the pools."""

    def waits_since(self) -> float | None:
        """When the client that waits longest began to; None if none waits."""

    def wanted(self, now: float) -> int:
        """How many connections it would open now, as if there were no budget."""


C = TypeVar("C", bound=Connection)
M = TypeVar("M", bound=Member)


class Budget(Generic[C, M]):
    """The connections of all pools of one template; ``limit`` at most, closing ones included."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._connections: dict[C, M] = {}
        self._waiting: dict[M, None] = {}  # some of them may not wait any more
        self._warming: dict[M, None] = {}  # want idle connections; so for these

    def __repr__(self) -> str:
        return f"<Budget {self.used} of {self.limit}, {len(self._waiting)} pools wait>"

    # -- connections ---------------------------------------------------------------------------

    @property
    def used(self) -> int:
        return len(self._connections)

    @property
    def room(self) -> int:
        return self.limit - len(self._connections)

    def add(self, connection: C, member: M) -> None:
        """A connection is being opened; there was room for it."""
        assert self.room > 0
        self._connections[connection] = member

    def remove(self, connection: C) -> None:
        """It is gone; nothing happens if it was gone already."""
        self._connections.pop(connection, None)

    def members(self) -> set[M]:
        """The pools that have a connection, or want one."""
        return {*self._connections.values(), *self._waiting, *self._warming}

    def _closing(self) -> int:
        return sum(1 for each in self._connections if each.state is _CLOSING)

    def _owners(self) -> set[M]:
        """The pools that have connections which will serve their clients."""
        return {m for each, m in self._connections.items() if each.state is not _CLOSING}

    # -- decisions -----------------------------------------------------------------------------

    def asks(self, member: M) -> None:
        """Somebody waits in this pool, or it wants idle connections: ``share`` sees to it."""
        if member.waits_since() is None:
            self._warming[member] = None
        else:
            self._waiting[member] = None

    def forget(self, member: M) -> None:
        """The pool is gone."""
        self._waiting.pop(member, None)
        self._warming.pop(member, None)

    def share(self, now: float) -> tuple[list[M], list[tuple[M, C]]]:
        """Pools that are to open a connection each, in this order, and idle connections to close.

        To be called after everything that may have changed the answer.
        """
        if not self._waiting and not self._warming:
            return [], []
        opening: list[M] = []
        room = self.room
        if room <= 0 and all(each.state is not _IDLE for each in self._connections):
            return [], []  # the usual case while all is busy
        needs = self._needs(now)
        lacking = 0
        for member in _in_turn(needs):
            if room > 0:
                opening.append(member)
                room -= 1
            else:
                lacking += 1
        lacking -= self._closing()
        closing = self._longest_idle({m for m, _, _ in needs})[:lacking] if lacking > 0 else []
        for member in list(self._warming):
            wanted = min(room, member.wanted(now)) if member not in self._waiting else 0
            opening += [member] * wanted
            room -= wanted
            if not wanted and not member.wanted(now):
                del self._warming[member]
        return opening, closing

    def yields(self, member: M, now: float) -> bool:
        """Whether a connection just released in this pool is to be closed for another one."""
        if not self._waiting:
            return False
        mine = member.waits_since()
        owners = self._owners()
        lacking = 0
        for other, since, wanted in self._needs(now):
            behind = since + PATIENCE if other in owners else since
            if other is not member and (mine is None or behind < mine):
                lacking += wanted
        return lacking > self.room + self._closing()

    def _needs(self, now: float) -> list[tuple[M, float, int]]:
        """The pools in which somebody waits whom only a new connection will serve: since when,
        and how many. Who waits longest comes first."""
        needs = []
        for member in list(self._waiting):
            since = member.waits_since()
            if since is None:
                del self._waiting[member]
            elif wanted := member.wanted(now):
                needs.append((member, since, wanted))
        needs.sort(key=lambda need: need[1])
        return needs

    def _longest_idle(self, spared: set[M]) -> list[tuple[M, C]]:
        idle = [
            (m, c) for c, m in self._connections.items() if c.state is _IDLE and m not in spared
        ]
        return sorted(idle, key=lambda each: each[1].status_since)


def _in_turn(needs: list[tuple[M, float, int]]) -> Iterator[M]:
    """Each pool as often as it needs a connection, in rounds."""
    for turn in range(max((wanted for _, _, wanted in needs), default=0)):
        yield from (member for member, _, wanted in needs if wanted > turn)
