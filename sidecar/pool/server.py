"""One connection to the server: carry bytes, close. ``login`` makes it.

Owns the socket and what the server knows of this session (transaction status, prepared
statements, settings). Does not decide who uses it: ``pool.pool`` does, and gives its bytes to a
``Receiver``. Runs no task of its own; ``open`` is awaited by the pool.
"""

import time
from collections import deque
from collections.abc import Mapping
from itertools import count
from typing import Any, Final, Protocol

from sidecar.config import ServerTarget
from sidecar.errors import ServerUnavailable
from sidecar.events import CloseReason, PinReason, Traffic
from sidecar.pool.link import MAX_LOGIN_MESSAGE as MAX_LOGIN_MESSAGE
from sidecar.pool.link import Address
from sidecar.pool.login import Login, Versions, remember, send_cancel
from sidecar.pool.state import ConnectionState
from sidecar.protocol import messages as m
from sidecar.protocol.startup import cancel_request
from sidecar.work import Statement, Who

_ids: Final = count(1)


REPLACED: Final = -1.0
KILLED: Final = -2.0
"""Each as an ``age_limit``: somebody wants this connection closed, as soon as it is released."""

_WHY_OVER: Final = {REPLACED: CloseReason.RECONNECT, KILLED: CloseReason.KILLED}


class Receiver(Protocol):
    """Who gets what the server sends: a client's relay, or a check."""

    def server_data(self, data: bytes) -> None: ...

    def server_lost(self) -> None:
        """The connection is gone; the receiver has been taken off it."""

    def server_writable(self, is_writable: bool) -> None:
        """The socket to the server is full, or takes bytes again."""

    def describe(self, now: float) -> str:
        """Who this is, for the error of a client that waits."""

    def who(self) -> Who: ...


class Owner(Protocol):
    """The pool, as its connections see it."""

    def lost(self, server: "ServerConnection") -> None: ...


class ServerConnection:
    """An ``asyncio.Protocol`` by shape (native classes cannot inherit from it)."""

    __slots__ = (
        "_buffer",
        "_closed",
        "_versions",
        "address",
        "age_limit",
        "asked",
        "automatic",
        "cancels",
        "close_reason",
        "copy_in",
        "custom_settings",
        "cycle_failed",
        "deadline",
        "described",
        "effects",
        "expected",
        "has_connected",
        "id",
        "is_dirty",
        "is_odd",
        "is_skipping",
        "lacks",
        "last_error",
        "leased_at",
        "mid_message",
        "opened_at",
        "owner",
        "parameters",
        "pid",
        "pin",
        "pinned_at",
        "prepared",
        "queries",
        "query_is_slow",
        "query_started",
        "receiver",
        "refusals",
        "secret",
        "settings",
        "state",
        "statement",
        "status_since",
        "target",
        "tls_version",
        "traffic",
        "transport",
        "tx_started",
        "tx_status",
        "undo",
        "undoes",
    )

    def __init__(
        self,
        owner: Owner,
        target: ServerTarget,
        traffic: Traffic,
        versions: Versions | None = None,
    ) -> None:
        self._versions: Final = versions or Versions()
        self.owner: Final = owner
        self.target: Final = target
        self.traffic: Final = traffic
        self.state = ConnectionState.CONNECTING
        self.transport: Any = None  # asyncio.Transport, once logged in
        self.receiver: Receiver | None = None
        self.close_reason = CloseReason.SERVER_CLOSED
        self.last_error = ""  # SQLSTATE of an error that nobody had asked for
        # where it leads to
        self.address: Address | None = None
        self.tls_version = ""  # empty: not encrypted
        self.has_connected = False  # the attempt to open it got as far as that
        # identity
        self.id: Final = next(_ids)  # told to people; no two connections have the same
        self.pid = 0
        self.secret = b""
        self.parameters: dict[bytes, bytes] = {}  # as the server reports them
        # instants and limits (seconds of time.monotonic)
        self.opened_at = 0.0
        self.age_limit = 0.0
        self.leased_at = 0.0
        self.deadline = 0.0  # of a check or of closing
        self.status_since = 0.0  # last ReadyForQuery
        self._buffer = b""  # of an unfinished message that nobody asked for
        self._closed = False
        # The rest are books that the proxy keeps with the connection (``expect``, ``prepared``,
        # ``settings``, ``pins``); the pool reads and clears some. ``Any`` is a type of the proxy's,
        # which the pool must not import. Books of a class of their own would be typed no better,
        # and each of about twenty reads per query would be two.
        #
        # what the server is doing
        self.tx_status = m.IDLE
        self.expected: deque[int] = deque()  # replies owed, see proxy.expect
        self.automatic = 0  # of them without a reply of the server's own
        self.undo: deque[Any] = deque()  # proxy.expect.Undo, of what changed ``prepared``
        # for what the server must refuse: errors of ours, names of the client's for its own
        self.refusals: deque[bytes] = deque()
        # proxy.prepared.Prepared, of our Describes that are owed
        self.described: deque[Any] = deque()
        self.queries: deque[Statement] = deque()  # that run or are queued
        self.statement: Statement | None = None  # the last one that has ended in this lease
        self.query_started = 0.0  # of the first of them
        self.query_is_slow = False
        self.tx_started = 0.0
        self.cycle_failed = False
        self.copy_in = False
        self.is_skipping = False  # after an error, up to the next Sync
        self.mid_message = False  # a client message has been forwarded in part
        self.cancels = 0  # cancel requests under way
        # what a session leaves behind
        self.prepared: dict[Any, None] = {}  # proxy.prepared.Prepared, longest unused first
        self.settings: Any = None  # proxy.settings.Settings in force; None as connected
        self.lacks: Mapping[bytes, bytes] = {}  # of its client's settings, since a RESET
        self.is_dirty = False
        self.undoes = False  # what is under way may be DEALLOCATE ALL
        # other settings than its client's may be in force, for this transaction
        self.is_odd = False
        self.effects = 0  # what a client may have left behind, see sql
        self.asked = 0  # of them, what the server has said is there
        self.custom_settings: frozenset[bytes] = frozenset()  # set, and listed by no server
        self.pin: PinReason | None = None  # what keeps the lease beyond the transaction
        self.pinned_at = 0.0

    def __repr__(self) -> str:
        return f"<ServerConnection pid={self.pid} {self.state.name.lower()} {chr(self.tx_status)}>"

    # -- asyncio.Protocol, once logged in --------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        self.traffic.server_received += len(data)
        receiver = self.receiver
        if receiver is not None:
            receiver.server_data(data)
        elif self.state is not ConnectionState.CLOSING:
            self.unasked_data(data)

    def eof_received(self) -> bool:
        return False  # close the transport; connection_lost follows

    def connection_lost(self, exc: Exception | None) -> None:
        self._closed = True
        receiver, self.receiver = self.receiver, None
        if receiver is not None:
            receiver.server_lost()
        self.owner.lost(self)

    def pause_writing(self) -> None:
        if self.receiver is not None:
            self.receiver.server_writable(False)

    def resume_writing(self) -> None:
        if self.receiver is not None:
            self.receiver.server_writable(True)

    # -- use -----------------------------------------------------------------------------------

    def write(self, data: bytes) -> None:
        self.traffic.server_sent += len(data)
        self.transport.write(data)

    def close(self, reason: CloseReason) -> None:
        """Say goodbye and wait for the server's end of file: until then its backend exists.

        ``owner.lost`` is called when it is gone. Idempotent; the first reason counts.
        """
        if self.state is ConnectionState.CLOSING or self._closed:
            return
        self.close_reason = reason
        self.receiver = None
        if self.transport is None or self.transport.is_closing():
            return
        self.transport.resume_reading()
        if not self.mid_message:
            self.write(m.TERMINATE_MESSAGE)
        if self.tls_version:
            # TLS has no half of an end: PostgreSQL ends it after a Terminate.
            if self.mid_message:
                self.transport.close()
            return
        try:
            self.transport.write_eof()
        except OSError:  # from asyncio's own loop, where the server has reset the connection
            self.transport.abort()

    def forget_session(self) -> None:
        """DISCARD ALL has been done: the session is as it was after the login."""
        self.prepared.clear()
        self.settings = None
        self.lacks = {}
        self.is_dirty = False
        self.effects = self.asked = 0
        self.custom_settings = frozenset()
        self.pin = None

    def why_over(self) -> CloseReason:
        """The reason to close it, if it is past its ``age_limit``."""
        return _WHY_OVER.get(self.age_limit, CloseReason.MAX_LIFETIME)

    def abort(self) -> None:
        """Close the socket without further ado; ``owner.lost`` follows."""
        if self.transport is not None and not self._closed:
            self.transport.abort()

    def unasked_data(self, data: bytes) -> None:
        """What a server says unasked: settings changed by a reload, notices, its own shutdown.

        Anything else means that we do not know what state it is in.
        """
        data = self._buffer + data
        pos = 0
        while len(data) - pos >= 5:
            kind, length = m.HEADER.unpack_from(data, pos)
            end = pos + 1 + length
            if kind not in _UNASKED or not 4 <= length <= MAX_LOGIN_MESSAGE:
                self.close_reason = CloseReason.PROTOCOL_ERROR
                self.abort()
                return
            if end > len(data):
                break
            body = data[pos + 5 : end]
            if kind == m.PARAMETER_STATUS:
                self.remember_parameter(body)
            elif kind == m.ERROR_RESPONSE:
                self.last_error = m.sqlstate_of(body)
            pos = end
        self._buffer = data[pos:]

    def remember_parameter(self, body: bytes) -> None:
        remember(self.parameters, body)

    # -- login ---------------------------------------------------------------------------------

    async def open(self, deadline: float) -> None:
        """Connect and log in; afterwards the server has said ReadyForQuery.

        Raises OSError, ServerError (the server refused), ServerProtocolError, ServerUnavailable.
        """
        login = Login(self.target, self.traffic, self._versions)
        try:
            session = await login.run(deadline)
        finally:
            self.has_connected = login.has_connected
        link = session.link
        rest = link.hand_over(self)
        self.transport = link.transport
        self.address = session.address
        self.pid, self.secret = session.pid, session.secret
        self.parameters = session.parameters
        encryption = link.encryption
        self.tls_version = "" if encryption is None else encryption.version() or ""
        self.unasked_data(rest)
        if self._closed or self.transport.is_closing():
            raise ServerUnavailable("the server closed the connection after the login")


_UNASKED = (m.PARAMETER_STATUS, m.NOTICE_RESPONSE, m.ERROR_RESPONSE, m.NOTIFICATION_RESPONSE)


async def cancel_query(server: ServerConnection, deadline: float) -> None:
    """Ask the server to cancel what this backend runs; returns when the signal has been sent.

    Goes to the address that the connection was made to, encrypted if that is: the secret in it is
    as good for others. Raises OSError and SidecarError.
    """
    assert server.address is not None, "only an open connection runs anything"
    await send_cancel(
        server.address,
        server.target.tls,
        cancel_request(server.pid, server.secret),
        is_encrypted=bool(server.tls_version),
        deadline=deadline,
    )


clock: Final = time.monotonic
"""Every instant in pool and proxy. uvloop's ``loop.time()`` is the same clock, but in whole
milliseconds, too coarse for a query of 0.1 ms."""
