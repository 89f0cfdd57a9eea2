"""Who of a template's pools gets the next server connection: one budget for all of them.

Pure: no I/O, no clock, no task, and no knowledge of what a pool is but ``Member``. Connections
that are closing count, as in ``pool.state``. What is decided:

- Free room goes to the pools in which somebody waits, one connection each in turn, to the one whose
  client waits longest first; what is left goes to pools that want idle connections.
- Where room is lacking, as many idle connections are closed as it lacks, the longest unused first.
- Where nothing is idle, a connection that is released in one pool is closed for another one whose
  clients have waited for longer (``yields``).

A move costs a login at the server, the time of many queries. So a connection that was used a moment
ago stays for ``GRACE``, since its client may be about to come back, and a pool has to be behind by
``PATIENCE`` to be given one that is in use all the time: busy pools take turns of that length.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Generic, Protocol, TypeVar

from sidecar.pool.state import ConnectionState

GRACE: Final = 0.01  # s
PATIENCE: Final = 0.1  # s

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


@dataclass(slots=True)
class Plan(Generic[C, M]):
    """What has to be done in the pools."""

    opening: list[M]
    """Pools that are to open a connection each, in this order."""
    closing: list[tuple[M, C]]
    """Idle connections to close."""
    again: float | None = None
    """When to ask again, unless something happens before; None: no need to."""


class Budget(Generic[C, M]):
    """The connections of all pools of one template; ``limit`` at most, closing ones included."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._connections: dict[C, M] = {}
        self._waiting: dict[M, None] = {}  # some of them may not wait any more
        self._warming: dict[M, None] = {}  # want idle connections; so for these
        self._alarm = 0.0  # when ``share`` was said to be called again

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

    def share(self, now: float) -> "Plan[C, M]":
        """What to do now. To be called after everything that may have changed the answer."""
        plan: Plan[C, M] = Plan([], [])
        room = self.room
        if not self._waiting and not self._warming:
            return plan
        if room <= 0 and all(each.state is not _IDLE for each in self._connections):
            return plan  # the usual case while all is busy
        needs = self._needs(now)
        lacking: list[float] = []  # since when they wait
        for member, since in _in_turn(needs):
            if room > 0:
                plan.opening.append(member)
                room -= 1
            else:
                lacking.append(since)
        for member in list(self._warming):
            wanted = min(room, member.wanted(now)) if member not in self._waiting else 0
            plan.opening.extend([member] * wanted)
            room -= wanted
            if not wanted and not member.wanted(now):
                del self._warming[member]
        idle = self._longest_idle({member for member, _, _ in needs})
        for since, (member, connection) in zip(lacking[self._closing() :], idle, strict=False):
            due = min(connection.status_since + GRACE, since + PATIENCE)
            if due <= now:
                plan.closing.append((member, connection))
            elif self._alarm <= now:
                self._alarm = plan.again = due
        return plan

    def yields(self, member: M, now: float) -> bool:
        """Whether a connection just released in this pool is to be closed for another one."""
        if not self._waiting:
            return False
        mine = member.waits_since()
        turn = (now if mine is None else mine) - PATIENCE
        lacking = sum(
            wanted
            for other, since, wanted in self._needs(now)
            if other is not member and since <= turn
        )
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


def _in_turn(needs: list[tuple[M, float, int]]) -> Iterator[tuple[M, float]]:
    """Each pool as often as it needs a connection, in rounds; and since when it waits."""
    for turn in range(max((wanted for _, _, wanted in needs), default=0)):
        yield from ((member, since) for member, since, wanted in needs if wanted > turn)
