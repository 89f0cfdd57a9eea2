"""How long a client may take for what: its limits, and what of it is over.

Pure. Owns how the options of pool and user become one client's ``Limits``, what is measured by which
limit, and what is said when one runs out. The ``sweeper`` asks, every 100 ms, so that nothing is
added to a query.

A query lasts from its first byte to its end: a client that is slow to send it, to send COPY data or to
read the rows spends its query's time. A transaction may be a single statement, as in PostgreSQL 17.
"""

from collections.abc import Hashable
from dataclasses import dataclass
from math import ceil
from typing import Final, Generic, TypeVar

from sidecar.config import PoolConfig, UserConfig
from sidecar.errors import SidecarError
from sidecar.events import CloseReason, TimeoutKind
from sidecar.pool.server import ServerConnection
from sidecar.protocol import messages as m

GRACE: Final = 5.0
"""Seconds that the server gets to cancel a query whose time is over."""

CANCELLED: Final = "canceling statement due to statement timeout"
"""PostgreSQL's words. It speaks of a "user request" itself, since it cannot know who cancels, or why."""


def hint(option: str) -> str:
    """What tells a limit of ours from the server's, which has the same words."""
    return f"The limit is the connection pool's {option}."


QUERY_HINT: Final = hint("query_timeout")


@dataclass(frozen=True, slots=True)
class Limits:
    """Of one client, in seconds. 0: none."""

    acquire: float
    query: float
    transaction: float
    idle_in_transaction: float
    client_idle: float

    @property
    def concern_leases(self) -> bool:
        return self.query > 0 or self.transaction > 0 or self.idle_in_transaction > 0


def limits_of(pool: PoolConfig, user: UserConfig | None) -> Limits:
    """What the user's entry says, else what the pool's says."""

    def chosen(own: float | None, of_pool: float) -> float:
        return of_pool if own is None else own

    if user is None:
        user = _NO_ENTRY
    return Limits(
        acquire=chosen(user.acquire_timeout, pool.acquire_timeout),
        query=chosen(user.query_timeout, pool.query_timeout),
        transaction=chosen(user.transaction_timeout, pool.transaction_timeout),
        idle_in_transaction=chosen(
            user.idle_in_transaction_timeout, pool.idle_in_transaction_timeout
        ),
        client_idle=chosen(user.client_idle_timeout, pool.client_idle_timeout),
    )


_NO_ENTRY: Final = UserConfig.model_construct()


@dataclass(frozen=True, slots=True)
class Over:
    """A limit that has run out, and how the client's session ends."""

    kind: TimeoutKind | None
    """None: it is counted elsewhere."""
    reason: CloseReason
    """Of the server connection, where it cannot be used any more."""
    sqlstate: str
    message: str
    hint: str
    detail: str = ""

    @property
    def error(self) -> SidecarError:
        return SidecarError(
            self.message, detail=self.detail, hint=self.hint, sqlstate=self.sqlstate
        )


CANCEL: Final = Over(TimeoutKind.QUERY, CloseReason.QUERY_TIMEOUT, "57014", CANCELLED, QUERY_HINT)
"""The session does not end: the server is to cancel the query."""
QUERY: Final = Over(
    TimeoutKind.QUERY,
    CloseReason.QUERY_TIMEOUT,
    "57014",
    CANCELLED,
    QUERY_HINT,
    detail=f"The server was asked to, and has not for {GRACE:g} s: the connection is closed.",
)
TRANSACTION: Final = Over(
    TimeoutKind.TRANSACTION,
    CloseReason.TRANSACTION_TIMEOUT,
    "25P04",
    "terminating connection due to transaction timeout",
    hint("transaction_timeout"),
)
IDLE_IN_TRANSACTION: Final = Over(
    TimeoutKind.IDLE_IN_TRANSACTION,
    CloseReason.IDLE_IN_TRANSACTION_TIMEOUT,
    "25P03",
    "terminating connection due to idle-in-transaction timeout",
    hint("idle_in_transaction_timeout"),
)
CLIENT_IDLE: Final = Over(
    TimeoutKind.CLIENT_IDLE,
    CloseReason.CLIENT_LOST,
    "57P05",
    "terminating connection due to idle-session timeout",
    hint("client_idle_timeout"),
)


def leaked(threshold: float, age: float) -> Over:
    """What a client is told that is closed for a leak."""
    return Over(
        None,
        CloseReason.LEAK,
        "25P04",
        f"terminating connection because it has kept a server connection for {age:.1f} s"
        f" (leak_threshold {threshold:g} s)",
        "End transactions as soon as their work is done. The limit is the connection pool's"
        " leak_threshold, with leak_action close.",
    )


class Watch:
    """What one client does with its lease, as far as it can be seen every 100 ms."""

    __slots__ = ("_asked_at", "_asked_for", "_seen", "since")

    def __init__(self) -> None:
        self._seen: tuple[float, float, int, int] | None = None
        self.since = 0.0
        """Since when nothing has changed in a cycle without a running query."""
        self._asked_for = -1.0  # beginning of the query that the server was asked to cancel
        self._asked_at = 0.0

    def judge(
        self,
        limits: Limits,
        server: ServerConnection,
        now: float,
        *,
        is_at_rest: bool,
        passing: int,
    ) -> Over | None:
        """What is over. ``passing``: bytes that the client still has to send of a message."""
        if server.tx_started and 0 < limits.transaction <= now - server.tx_started:
            return TRANSACTION
        idle_limit = limits.idle_in_transaction
        if is_at_rest:
            is_open = server.tx_status != m.IDLE
            is_over = is_open and 0 < idle_limit <= now - server.status_since
            return IDLE_IN_TRANSACTION if is_over else None
        if server.queries:
            return self._judge_query(limits, server.query_started, now)
        # Between Parse and Execute, or behind the last Execute and not at Sync yet: nothing tells
        # when that began, but it can be seen to stand still.
        seen = (server.status_since, server.query_started, len(server.expected), passing)
        if seen != self._seen:
            self._seen = seen
            self.since = now
        if server.expected:
            return self._judge_query(limits, self.since, now)
        is_open = server.tx_status != m.IDLE or server.tx_started != 0.0
        return IDLE_IN_TRANSACTION if is_open and 0 < idle_limit <= now - self.since else None

    def _judge_query(self, limits: Limits, started: float, now: float) -> Over | None:
        if started == self._asked_for:
            return QUERY if now - self._asked_at >= GRACE else None
        if 0 < limits.query <= now - started:
            self._asked_for = started
            self._asked_at = now
            return CANCEL
        return None


T = TypeVar("T", bound=Hashable)


class Wheel(Generic[T]):
    """Who is to be looked at when. Costs nothing until then, however many there are."""

    def __init__(self, step: float, now: float) -> None:
        """``step``: seconds; nobody is due early, or late by more than this."""
        self._step: Final = step
        self._slots: dict[int, dict[T, None]] = {}
        self._slot_of: dict[T, int] = {}
        self._next = int(now / step)  # the first slot that is still to come

    def __len__(self) -> int:
        return len(self._slot_of)

    def put(self, item: T, at: float) -> None:
        """Instead of when it was due before, if it was."""
        self.remove(item)
        slot = max(ceil(at / self._step), self._next)
        self._slots.setdefault(slot, {})[item] = None
        self._slot_of[item] = slot

    def remove(self, item: T) -> None:
        slot = self._slot_of.pop(item, None)
        if slot is not None:
            items = self._slots[slot]
            del items[item]
            if not items:
                del self._slots[slot]

    def due(self, now: float) -> list[T]:
        """Who is due, taken off."""
        found: list[T] = []
        end = int(now / self._step) + 1
        for slot in range(self._next, end):
            found += self._slots.pop(slot, ())
        self._next = max(self._next, end)
        for item in found:
            del self._slot_of[item]
        return found
