"""Which leases are leaks: held for longer than anybody should have to.

Pure. Owns what is measured: the age of a lease; where a client keeps its connection by right (session mode, or
pinned), the age of its transaction. Who is idle in a transaction for too long is a leak either way. What is
done about it is ``proxy.sweeper``'s.
"""

from collections.abc import Iterable
from typing import Final

from sidecar.events import PoolMode
from sidecar.pool.pool import Pool
from sidecar.pool.report import holder
from sidecar.pool.server import ServerConnection
from sidecar.work import Holder

_LOOK_EVERY: Final = 1.0
"""Seconds between two searches, or a tenth of the threshold if that is less."""


class Leak:
    """A lease that is one, for as long as it lasts."""

    __slots__ = ("began_at", "holder", "pool", "server", "since")

    def __init__(self, pool: Pool, server: ServerConnection, since: float, now: float) -> None:
        self.pool: Final = pool
        self.server: Final = server
        self.since: Final = since  # the beginning of what is too old
        self.began_at: Final = now  # as a leak
        self.holder: Final[Holder] = holder(pool.name, server)  # then

    @property
    def is_over(self) -> bool:
        server = self.server
        return server not in self.pool.state.active or held_since(self.pool, server) != self.since


def held_since(pool: Pool, server: ServerConnection) -> float:
    """The beginning of what must not get too old; 0: nothing that must not."""
    keeps = server.pin is not None or pool.config.mode is PoolMode.SESSION
    return server.tx_started if keeps else server.leased_at


class Leaks:
    """Those of all pools."""

    def __init__(self) -> None:
        self._known: dict[ServerConnection, Leak] = {}
        self._next_look: dict[Pool, float] = {}

    def over(self) -> list[Leak]:
        """Those that have ended, forgotten."""
        ended = [leak for leak in self._known.values() if leak.is_over]
        for leak in ended:
            del self._known[leak.server]
        return ended

    def search(self, pools: Iterable[Pool], now: float) -> list[Leak]:
        """Those that have begun. To be called after ``over``."""
        begun: list[Leak] = []
        next_look: dict[Pool, float] = {}
        for pool in pools:
            threshold = pool.config.leak_threshold
            if not threshold:
                continue
            due = self._next_look.get(pool, 0.0)
            if now >= due:
                begun += self._search(pool, threshold, now)
                due = now + min(_LOOK_EVERY, threshold / 10)
            next_look[pool] = due
        self._next_look = next_look
        return begun

    def _search(self, pool: Pool, threshold: float, now: float) -> list[Leak]:
        begun: list[Leak] = []
        for server in pool.state.active:
            since = held_since(pool, server)
            if 0.0 < since <= now - threshold and server not in self._known:
                leak = self._known[server] = Leak(pool, server, since, now)
                begun.append(leak)
        return begun
