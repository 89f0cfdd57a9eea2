"""Who does what: statements with their figures, clients, leases, failures, slow queries.

Pure, and below ``events``: what pool and proxy say about the work that passes through, and what those
who explain it (``observe``, ``api``, ``console``) read. Query texts here are normalised: no literal,
no bind value. Instants are those of the sidecar's clock (seconds of time.monotonic).
"""

from dataclasses import dataclass, field
from typing import Final, Optional

NO_ANSWER: Final = "no answer in time"
"""The ``cause`` of a server that takes what it is sent, and says nothing."""


@dataclass(frozen=True, slots=True)
class Trace:
    """The trace context of one execution: W3C Trace Context, by sqlcommenter's ``traceparent``."""

    trace_id: str  # 32 hexadecimal digits
    span_id: str  # 16


class Statement:
    """One normalised statement of a pool, and what became of it. Plain attributes: the recorder adds
    to them without a look-up. The table of them, and their quantiles, are ``observe.statements``'.

    An execution with a trace context has an object of its own, whose ``shared`` is the statement:
    its ``rows`` are added to those of the statement when it ends.
    """

    __slots__ = (
        "__weakref__",
        "blamed",
        "calls",
        "errors",
        "fingerprint",
        "is_retired",
        "longest",
        "operation",
        "recent",
        "rows",
        "seconds",
        "shared",
        "text",
        "trace",
    )

    def __init__(
        self,
        fingerprint: str,
        text: str,
        operation: int,
        shared: Optional["Statement"] = None,
        trace: Trace | None = None,
    ) -> None:
        self.fingerprint: Final = fingerprint  # 16 hexadecimal digits, or "other"
        self.text: Final = text
        self.operation: Final = operation
        self.shared: Final = shared
        self.trace: Final = trace
        self.calls = 0  # ended, failed ones included
        self.seconds = 0.0
        self.longest = 0.0  # seconds
        self.rows = 0  # returned or affected, by the command tags
        self.blamed = 0.0  # seconds that clients waited while it held connections
        self.errors: dict[str, int] = {}  # by SQLSTATE
        # durations by bucket of observe.sketch, since the last slot
        self.recent: dict[int, int] = {}
        # not in the table (any more); of an execution always: the hot path asks one question only
        self.is_retired = shared is not None

    def __repr__(self) -> str:
        return f"<Statement {self.fingerprint} {self.text[:60]!r}>"


OTHER_STATEMENT: Final = "other"
"""The fingerprint of what is not told apart."""


@dataclass(frozen=True, slots=True)
class Who:
    """A client, as far as others may know it."""

    client: int  # its id; 0: the pool itself
    application: str  # application_name; may be empty
    user: str
    database: str
    address: str  # host:port, or "unix"


@dataclass(frozen=True, slots=True)
class Holder:
    """One lease at one instant."""

    pool: str
    server: int  # the id of the server connection
    backend_pid: int
    who: Who
    statement: Statement | None  # that runs, else the last one of this lease
    state: str  # "running", "idle in transaction", "idle"
    leased_at: float
    since: float  # in this state
    transaction_since: float  # 0: none is open
    pin: str  # a PinReason, or empty
    pinned_at: float = 0.0  # 0: it is not known


@dataclass(frozen=True, slots=True)
class Failure:
    """An error that a client was told, or should have been."""

    origin: str  # an ErrorOrigin
    sqlstate: str
    message: str  # without literals
    application: str
    statement: Statement | None


@dataclass(frozen=True, slots=True)
class Blocker:
    """A backend that another one waits for."""

    backend_pid: int
    waits_for: tuple[int, ...]  # backends; empty: it is the root of the chain
    state: str  # as in pg_stat_activity; empty where the server does not tell
    wait_event: str
    application: str
    user: str
    is_ours: bool  # one of the sidecar's connections
    holder: Holder | None  # then: its lease; None if its client is gone
    address: str = ""  # of who is connected to it, where the server tells
    age: float = 0.0  # seconds in this state


@dataclass(frozen=True, slots=True)
class SlowQuery:
    """A running query that has crossed the threshold, and what the server says about it."""

    holder: Holder
    age: float  # seconds
    trace: Trace | None
    wait_event: str  # "Lock:transactionid"; empty: it does not wait, or nobody could ask
    blockers: tuple[Blocker, ...] = field(default=())
    """All backends it waits for, directly or through others, nearest first."""
    cause: str = ""  # why the server could not be asked; empty if it was
