"""What can happen in a pool, as values: enums for states and reasons, snapshots, the Observer.

Pure: no I/O, no clock. Enum values are metric labels and log fields alike, so a renamed member is
a change of the metrics contract. ``pool`` and ``proxy`` report to the ``Observer`` and know nothing
of Prometheus.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from typing import Protocol

from sidecar.work import Blocker, Failure, Holder, SlowQuery, Statement, Who


class PoolMode(StrEnum):
    """How long a client keeps a server connection (PgBouncer's ``pool_mode``)."""

    SESSION = "session"
    TRANSACTION = "transaction"
    STATEMENT = "statement"


class PinPolicy(StrEnum):
    """What becomes of a statement whose effect outlives its transaction, in transaction mode."""

    AUTO = "auto"  # the client keeps the connection until the effect is undone
    REFUSE = "refuse"  # the statement fails
    OFF = "off"  # nothing: what it leaves is removed before the next client


class ResetPolicy(StrEnum):
    """Which connections are reset (DISCARD ALL) before the next client gets them."""

    DIRTY = "dirty"  # those on which something was seen that outlives a transaction
    ALWAYS = "always"


class ConnectReason(StrEnum):
    """Why a server connection was opened."""

    WARM = "warm"  # to keep min_idle connections ready
    DEMAND = "demand"  # a client waits
    RECONNECT = "reconnect"  # after a loss


class CloseReason(StrEnum):
    """Why a server connection was closed."""

    IDLE_TIMEOUT = "idle_timeout"  # idle longer than idle_timeout, more than min_idle are idle
    MAX_LIFETIME = "max_lifetime"
    SERVER_CLOSED = "server_closed"  # the server ended it
    PING_FAILED = "ping_failed"  # a ping was answered with an error
    PING_TIMEOUT = "ping_timeout"
    RESET_FAILED = "reset_failed"  # session state could not be removed
    CLIENT_LOST = "client_lost"  # its client vanished in the middle of a transaction or query
    PROTOCOL_ERROR = "protocol_error"  # server or client broke the protocol
    SETTINGS_FAILED = "settings_failed"  # a client's startup parameters were refused
    QUERY_TIMEOUT = "query_timeout"  # cancelled in vain
    TRANSACTION_TIMEOUT = "transaction_timeout"
    IDLE_IN_TRANSACTION_TIMEOUT = "idle_in_transaction_timeout"
    LEAK = "leak"  # of a client that was closed for it (leak_action: close)
    BUDGET = "budget"  # another pool of the template needs its place
    RECONNECT = "reconnect"  # someone told us to replace it
    KILLED = "killed"  # someone told us to end it
    SHUTDOWN = "shutdown"


class AcquireOutcome(StrEnum):
    """How a request for a connection ended."""

    IMMEDIATE = "immediate"
    WAITED = "waited"
    TIMEOUT = "timeout"
    REJECTED = "rejected"  # queue full, draining, or the server refuses logins
    CANCELLED = "cancelled"  # the client left or cancelled while waiting


class PingOutcome(StrEnum):
    OK = "ok"
    TIMEOUT = "timeout"
    ERROR = "error"


class Phase(StrEnum):
    """Where a connection error happened."""

    CONNECT = "connect"
    TLS = "tls"
    AUTH = "auth"
    ACQUIRE = "acquire"
    PING = "ping"
    QUERY = "query"


class ErrorReason(StrEnum):
    """The cause of a connection error."""

    REFUSED = "refused"  # nobody listens
    UNREACHABLE = "unreachable"  # no route, no such socket
    DNS = "dns"
    TIMEOUT = "timeout"
    RESET = "reset"  # the server closed or reset the connection
    TLS = "tls"
    AUTH = "auth"  # SQLSTATE class 28
    DATABASE = "database"  # SQLSTATE 3D000: no such database
    TOO_MANY_CONNECTIONS = "too_many_connections"  # SQLSTATE 53300 from the server
    STARTING_UP = "starting_up"  # SQLSTATE 57P03
    ADMIN_SHUTDOWN = "admin_shutdown"  # SQLSTATE 57P01, 57P02
    SERVER_ERROR = "server_error"  # any other SQLSTATE
    ROLE = "role"  # not what target_session_attrs asks for
    PROTOCOL = "protocol"  # bytes that are not the PostgreSQL protocol
    REJECTED = "rejected"  # queue full or draining


_LOGIN_REASONS = (
    ErrorReason.TIMEOUT,
    ErrorReason.RESET,
    ErrorReason.AUTH,
    ErrorReason.DATABASE,
    ErrorReason.TOO_MANY_CONNECTIONS,
    ErrorReason.STARTING_UP,
    ErrorReason.ADMIN_SHUTDOWN,
    ErrorReason.SERVER_ERROR,
    ErrorReason.ROLE,
    ErrorReason.PROTOCOL,
)

CONNECTION_ERRORS: dict[Phase, tuple[ErrorReason, ...]] = {
    Phase.CONNECT: (
        ErrorReason.REFUSED,
        ErrorReason.UNREACHABLE,
        ErrorReason.DNS,
        ErrorReason.TIMEOUT,
        ErrorReason.RESET,
    ),
    Phase.TLS: (ErrorReason.TLS,),
    Phase.AUTH: _LOGIN_REASONS,
    Phase.ACQUIRE: (ErrorReason.TIMEOUT, ErrorReason.REJECTED),
    Phase.PING: (ErrorReason.TIMEOUT, ErrorReason.RESET, ErrorReason.SERVER_ERROR),
    Phase.QUERY: (ErrorReason.RESET, ErrorReason.ADMIN_SHUTDOWN, ErrorReason.PROTOCOL),
}
"""The combinations that can occur; each is exported at 0 from the first scrape."""


class Operation(IntEnum):
    """What a query does, told from its first keyword. An int, since it indexes on the hot path."""

    SELECT = 0
    INSERT = 1
    UPDATE = 2
    DELETE = 3
    COPY = 4
    TRANSACTION = 5
    UTILITY = 6
    OTHER = 7

    @property
    def label(self) -> str:
        return self.name.lower()


class ErrorOrigin(StrEnum):
    """Who said so, or what broke."""

    SERVER = "server"
    SIDECAR = "sidecar"
    NETWORK = "network"  # the connection to the server was lost


class IncidentKind(StrEnum):
    """What begins an incident."""

    EXHAUSTED = "exhausted"  # all connections in use, and clients wait
    LEAK = "leak"
    SLOW_QUERY = "slow_query"
    DATABASE_DOWN = "database_down"
    CONNECTION_STORM = "connection_storm"
    ERROR_BURST = "error_burst"


class TimeoutKind(StrEnum):
    ACQUIRE = "acquire"
    QUERY = "query"
    IDLE_IN_TRANSACTION = "idle_in_transaction"
    CLIENT_IDLE = "client_idle"
    LOGIN = "login"
    CONNECT = "connect"
    TRANSACTION = "transaction"


class PinReason(StrEnum):
    """Why a lease outlives its transaction."""

    SET = "set"
    LISTEN = "listen"
    TEMP_TABLE = "temp_table"
    ADVISORY_LOCK = "advisory_lock"
    CURSOR = "cursor"
    PREPARE = "prepare"
    SESSION_MODE = "session_mode"


class Listener(StrEnum):
    PG = "pg"
    HTTP = "http"


class ClientOutcome(StrEnum):
    ACCEPTED = "accepted"
    REJECTED = "rejected"  # limit reached, draining, or not a PostgreSQL client
    AUTH_FAILED = "auth_failed"


class Stop(IntEnum):
    """How the sidecar ends. A later word counts if it is more urgent."""

    CLIENTS_GONE = 0  # take no more clients, and wait until all have left
    RELEASED = 1  # send away who has no lease, and wait until all are over
    DRAIN = 2  # the same, up to a deadline
    NOW = 3


@dataclass(frozen=True, slots=True)
class PoolSnapshot:
    """The state of one pool at one instant. Times in seconds."""

    name: str
    mode: PoolMode
    database: str
    user: str
    server: str  # host:port or the socket's path
    used: int  # leased to clients
    idle: int
    connecting: int  # being opened, checked, reset or closed: takes a place, serves nobody
    max_size: int
    min_idle: int
    pending: int  # clients waiting
    oldest_wait: float  # of them; 0 if none
    waited: float  # by all of them together, so far
    is_up: bool
    last_ping: float  # unix time of the last good ping; 0 before the first
    queries_in_flight: int
    longest_running_query: float  # 0 if none
    longest_idle_in_transaction: float  # 0 if none
    slow_query_threshold: float
    pinned: dict[PinReason, int]  # connections kept beyond the transaction, by what keeps them
    prepared_statements: int  # on all connections together


@dataclass(frozen=True, slots=True)
class PoolGauges:
    """What changes from moment to moment in a pool; all pools of a template are one. Read every
    100 ms, so it is cheap. Times in seconds."""

    name: str
    used: int
    idle: int
    connecting: int
    max_size: int
    pending: int
    oldest_wait: float  # 0 if none waits
    waited: float  # by all who wait now together
    is_up: bool
    holders: Callable[[], list[Holder]]  # at this instant; costs 1 us for each
    waiters: Callable[[], list[Who]] = list  # at this instant, longest waiting first; 1 us for each
    is_paused: bool = False  # by someone at the console: clients wait since they are meant to
    why_down: str = ""  # what the last attempt to open a connection met with; empty if all is well
    in_login: int = 0  # of those who wait: that cannot log in before there is a connection


@dataclass(frozen=True, slots=True)
class ClientSnapshot:
    """One client connection at one instant. Instants are those of the sidecar's clock."""

    id: int
    pool: str
    pool_key: int  # tells the pools of a template apart
    user: str
    database: str  # as the client named it
    application: str
    address: str  # "unix" for a local socket
    port: int
    local_address: str
    local_port: int
    tls: str  # version/cipher; empty if not encrypted
    opened_at: float
    asked_at: float  # the beginning of its query, lease or wait; else the end of its last lease
    waiting_since: float  # 0 if it does not wait
    deadline: float  # of that wait
    server: int  # the id of the server connection it has; 0 if none
    prepared_statements: int


@dataclass(frozen=True, slots=True)
class ServerSnapshot:
    """One server connection at one instant. Instants are those of the sidecar's clock."""

    id: int
    pool: str
    pool_key: int
    user: str
    database: str
    state: str
    address: str  # "unix" for a local socket
    port: int
    local_address: str
    local_port: int
    tls: str  # version/cipher; empty if not encrypted
    opened_at: float
    leased_at: float  # the last lease; 0 if there was none
    query_started: float  # 0 if none runs
    status_since: float  # the last time the server was ready
    in_transaction: bool
    pid: int
    prepared_statements: int
    cancels: int  # cancel requests under way
    is_replaced: bool  # closed as soon as it is released
    pin: PinReason | None
    pinned_at: float  # 0 if it is not known
    statement: Statement | None  # that runs, else the last one of its lease


class Traffic:
    """Bytes moved since start. Plain attributes: sessions add to them without a call."""

    __slots__ = ("client_received", "client_sent", "server_received", "server_sent")

    def __init__(self) -> None:
        self.client_received = 0
        self.client_sent = 0
        self.server_received = 0
        self.server_sent = 0

    def add(self, other: "Traffic") -> None:
        self.client_received += other.client_received
        self.client_sent += other.client_sent
        self.server_received += other.server_received
        self.server_sent += other.server_sent


class PoolObserver(Protocol):
    """What one pool reports. Calls are synchronous, cheap and never raise. Durations in seconds."""

    def acquired(self, outcome: AcquireOutcome, waited: float, used: int) -> None:
        """A request for a connection ended; ``used`` connections are leased now."""

    def acquired_at_once(self, used: int) -> None:
        """The hot case of ``acquired``: outcome immediate, no wait."""

    def released(self, held: float) -> None:
        """A lease ended."""

    def pinned(self, reason: PinReason) -> None:
        """A client keeps its connection beyond the transaction."""

    def parsed(self, reused: bool) -> None:
        """A client's named statement was needed on a connection; ``reused``: it was there."""

    def statement(self, fingerprint: str, text: str, operation: int) -> Statement:
        """The statement of this fingerprint, where its figures are kept; or one for all others."""

    def query_done(self, statement: Statement, took: float) -> None:
        """A query (one Query, Execute or FunctionCall message) ended, failed or not."""

    def query_slow(self, statement: Statement) -> None:
        """A running query crossed the slow threshold; once a query, before its ``query_done``."""

    def slow_query_seen(self, slow: SlowQuery) -> None:
        """What a query that crossed the threshold waits for: the server has been asked."""

    def blocked_seen(self, blocked: Mapping[int, Blocker]) -> None:
        """By the id of the server connection: the leases that wait for a lock, each with the root
        of its chain. Called when it has changed, or may have."""

    def query_failed(self, failure: Failure) -> None:
        """The client was sent an ErrorResponse, or should have been."""

    def leak_began(self, holder: Holder) -> None:
        """A lease is a leak from now on."""

    def leak_ended(self, holder: Holder) -> None: ...

    def client_came(self, who: Who) -> None:
        """A client has logged in."""

    def transaction_done(self, committed: bool, took: float) -> None: ...

    def overhead(self, took: float) -> None:
        """Our own time within one cycle (sampled)."""

    def connection_opened(self, reason: ConnectReason, took: float) -> None: ...

    def connection_closed(self, reason: CloseReason) -> None: ...

    def connection_failed(self, phase: Phase, reason: ErrorReason) -> None: ...

    def reconnected(self, ok: bool) -> None:
        """An attempt to replace a lost connection ended."""

    def pinged(self, outcome: PingOutcome, took: float) -> None: ...

    def timed_out(self, kind: TimeoutKind) -> None: ...


class Observer(Protocol):
    """What the sidecar as a whole reports."""

    traffic: Traffic  # of logins, and of whoever has no pool

    def pool(self, name: str) -> PoolObserver: ...

    def pool_traffic(self, name: str) -> Traffic: ...

    def client_ended(self, listener: Listener, outcome: ClientOutcome) -> None:
        """The fate of a new client connection is known: accepted, rejected or auth_failed."""

    def login_timed_out(self, pool: str | None) -> None:
        """A client did not finish its login in time; ``pool`` if it had got that far."""

    def http_request(self, route: str, method: str, code: int, took: float) -> None: ...

    def loop_lag(self, late: float) -> None:
        """How late the event loop ran a timer."""
