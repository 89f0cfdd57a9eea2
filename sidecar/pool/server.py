"""One connection to the server: connect, log in, carry bytes, close.

Owns the socket and what the server knows of this session (transaction status, prepared
statements, settings). Does not decide who uses it: ``pool.pool`` does, and gives its bytes to a
``Receiver``. Runs no task of its own; ``open`` is awaited by the pool.
"""

import asyncio
import socket
import time
from collections import deque
from collections.abc import Mapping
from itertools import count
from typing import Any, Final, Protocol

from sidecar.config import ServerTarget
from sidecar.errors import ServerError, ServerProtocolError, ServerUnavailable
from sidecar.events import CloseReason, PinReason, Traffic
from sidecar.pool.state import ConnectionState
from sidecar.protocol import messages as m
from sidecar.protocol.authentication import MECHANISM, ClientExchange, md5_response
from sidecar.protocol.startup import cancel_request, startup_message

MAX_LOGIN_MESSAGE = 64 * 1024
"""Bytes; nothing a server says during a login is longer."""

_MAX_LOGIN_MESSAGES = 1000  # PostgreSQL 18 sends about 20
_MAX_PARAMETERS = 200  # PostgreSQL 18 reports 16


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


class Owner(Protocol):
    """The pool, as its connections see it."""

    def lost(self, server: "ServerConnection") -> None: ...


class ServerConnection:
    """An ``asyncio.Protocol`` by shape (native classes cannot inherit from it)."""

    __slots__ = (
        "_buffer",
        "_closed",
        "_wake",
        "age_limit",
        "asked",
        "automatic",
        "cancels",
        "close_reason",
        "copy_in",
        "custom_settings",
        "cycle_failed",
        "deadline",
        "effects",
        "expected",
        "id",
        "is_dirty",
        "is_skipping",
        "lacks",
        "last_error",
        "leased_at",
        "mid_message",
        "opened_at",
        "operations",
        "owner",
        "parameters",
        "pid",
        "pin",
        "pinned_at",
        "prepared",
        "query_is_slow",
        "query_started",
        "receiver",
        "secret",
        "settings",
        "state",
        "status_since",
        "target",
        "traffic",
        "transport",
        "tx_started",
        "tx_status",
        "undo",
    )

    def __init__(self, owner: Owner, target: ServerTarget, traffic: Traffic) -> None:
        self.owner: Final = owner
        self.target: Final = target
        self.traffic: Final = traffic
        self.state = ConnectionState.CONNECTING
        self.transport: Any = None  # asyncio.Transport, set by connection_made
        self.receiver: Receiver | None = None
        self.close_reason = CloseReason.SERVER_CLOSED
        self.last_error = ""  # SQLSTATE of an error that nobody had asked for
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
        # what the server is doing
        self.tx_status = m.IDLE
        self.expected: deque[int] = deque()  # replies owed, see proxy.relay
        self.automatic = 0  # of them without a reply of the server's own
        self.undo: deque[Any] = deque()
        self.operations: deque[int] = deque()  # of the queries that run or are queued
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
        self.effects = 0  # what a client may have left behind, see sql
        self.asked = 0  # of them, what the server has said is there
        self.custom_settings: frozenset[bytes] = frozenset()  # set, and listed by no server
        self.pin: PinReason | None = None  # what keeps the lease beyond the transaction
        self.pinned_at = 0.0
        # login
        self._buffer = b""
        self._wake: asyncio.Future[None] | None = None
        self._closed = False

    def __repr__(self) -> str:
        return f"<ServerConnection pid={self.pid} {self.state.name.lower()} {chr(self.tx_status)}>"

    # -- asyncio.Protocol ----------------------------------------------------------------------

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        sock = transport.get_extra_info("socket")
        if sock is not None and sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)

    def data_received(self, data: bytes) -> None:
        self.traffic.server_received += len(data)
        receiver = self.receiver
        if receiver is not None:
            receiver.server_data(data)
        elif self.state is ConnectionState.CONNECTING:
            self._buffer += data
            self._notify()
        elif self.state is not ConnectionState.CLOSING:
            self.unasked_data(data)

    def eof_received(self) -> bool:
        return False  # close the transport; connection_lost follows

    def connection_lost(self, exc: Exception | None) -> None:
        self._closed = True
        self._notify()
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
        try:
            name, value = m.name_and_value(body)
        except ValueError:
            return
        if name in self.parameters or len(self.parameters) < _MAX_PARAMETERS:
            self.parameters[name] = value

    # -- login ---------------------------------------------------------------------------------

    async def open(self) -> None:
        """Connect and log in; afterwards the server has said ReadyForQuery.

        Raises OSError, ServerError (the server refused), ServerProtocolError, ServerUnavailable
        (it hung up). The caller sets the deadline.
        """
        loop = asyncio.get_running_loop()
        target = self.target
        factory: Any = lambda: self  # noqa: E731  a protocol by shape, which typeshed cannot see
        if target.host.startswith("/"):
            path = f"{target.host}/.s.PGSQL.{target.port}"
            await loop.create_unix_connection(factory, path)
        else:
            await loop.create_connection(factory, target.host, target.port)
        self.write(startup_message(_startup_parameters(target)))
        await self._log_in()
        rest, self._buffer = self._buffer, b""
        self.unasked_data(rest)
        if self._closed or self.transport.is_closing():
            raise ServerUnavailable("the server closed the connection after the login")

    async def _log_in(self) -> None:
        scram: ClientExchange | None = None
        is_authenticated = False
        for _ in range(_MAX_LOGIN_MESSAGES):
            kind, body = await self._next_message()
            if kind == m.READY_FOR_QUERY and is_authenticated:
                return
            if kind == m.ERROR_RESPONSE:
                raise _refusal(body)
            if kind == m.AUTHENTICATION:
                scram = await self._authenticate(body, scram)
                is_authenticated = body == _AUTH_OK
            elif kind == m.PARAMETER_STATUS:
                self.remember_parameter(body)
            elif kind == m.BACKEND_KEY_DATA:
                if len(body) < 8:
                    raise ServerProtocolError(f"BackendKeyData of {len(body)} bytes")
                self.pid, self.secret = int.from_bytes(body[:4], "big"), body[4:]
            elif kind not in (m.NOTICE_RESPONSE, m.NEGOTIATE_PROTOCOL_VERSION):
                raise ServerProtocolError(f"unexpected message {chr(kind)!r} during login")
        raise ServerProtocolError("the login has no end")

    async def _authenticate(
        self, body: bytes, scram: ClientExchange | None
    ) -> ClientExchange | None:
        if len(body) < 4:
            raise ServerProtocolError(f"Authentication of {len(body)} bytes")
        code, data = int.from_bytes(body[:4], "big"), body[4:]
        if code == m.AUTH_OK:
            if scram is not None and not scram.is_verified:
                raise ServerProtocolError("the server did not prove that it knows the password")
            return scram
        secret, keys = self.target.password, self.target.scram_keys
        if keys is not None and code == m.AUTH_SASL:
            scram = ClientExchange(keys)
            self.write(m.sasl_initial_response(MECHANISM.encode(), scram.begin()))
            return scram
        if scram is not None and code == m.AUTH_SASL_CONTINUE:
            self.write(m.password(await asyncio.to_thread(scram.respond, data)))
            return scram
        if scram is not None and code == m.AUTH_SASL_FINAL:
            scram.verify(data)
            return scram
        if secret is None:
            raise ServerError(
                f"the server asks for a password of user {self.target.user!r}, the dsn has none",
                sqlstate="28P01",
            )
        password = secret.get_secret_value()
        if code == m.AUTH_CLEARTEXT:
            self.write(m.password(password.encode() + b"\0"))
        elif code == m.AUTH_MD5:
            self.write(m.password(md5_response(self.target.user, password, data[:4])))
        elif code == m.AUTH_SASL and MECHANISM.encode() in data.split(b"\0"):
            scram = ClientExchange(password)
            self.write(m.sasl_initial_response(MECHANISM.encode(), scram.begin()))
        elif code == m.AUTH_SASL_CONTINUE and scram is not None:
            # in a thread: PBKDF2 would stall every client for milliseconds
            self.write(m.password(await asyncio.to_thread(scram.respond, data)))
        elif code == m.AUTH_SASL_FINAL and scram is not None:
            scram.verify(data)
        else:
            raise ServerError(
                f"the server asks for an authentication method we do not have (code {code})",
                sqlstate="28000",
                hint="Available: trust, password, md5, scram-sha-256.",
            )
        return scram

    async def _next_message(self) -> tuple[int, bytes]:
        while True:
            if len(self._buffer) >= 5:
                kind, length = m.HEADER.unpack_from(self._buffer)
                if not 4 <= length <= MAX_LOGIN_MESSAGE:
                    raise ServerProtocolError(f"invalid message length {length} during login")
                if len(self._buffer) > length:
                    body = self._buffer[5 : length + 1]
                    self._buffer = self._buffer[length + 1 :]
                    return kind, body
            if self._closed:
                raise ServerUnavailable("the server closed the connection during login")
            self._wake = asyncio.get_running_loop().create_future()
            await self._wake

    def _notify(self) -> None:
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)


_AUTH_OK = m.AUTH_OK.to_bytes(4, "big")
_UNASKED = (m.PARAMETER_STATUS, m.NOTICE_RESPONSE, m.ERROR_RESPONSE, m.NOTIFICATION_RESPONSE)


def _startup_parameters(target: ServerTarget) -> dict[bytes, bytes]:
    parameters = {b"user": target.user.encode(), b"database": target.database.encode()}
    own: Mapping[str, str] = target.parameters
    return parameters | {name.encode(): value.encode() for name, value in own.items()}


def _refusal(body: bytes) -> ServerError:
    fields = m.error_fields(body)
    return ServerError(
        fields.get("M", "the server refused the connection"),
        detail=fields.get("D", ""),
        hint=fields.get("H", ""),
        sqlstate=m.sqlstate_of(body),
    )


class _Canceller(asyncio.Protocol):
    """Sends one CancelRequest; the server answers by closing the connection."""

    def __init__(self, packet: bytes) -> None:
        self._packet = packet
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: Any) -> None:  # uvloop's are not asyncio's by class
        transport.write(self._packet)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.done.done():
            self.done.set_result(None)


async def cancel_query(server: ServerConnection, deadline: float) -> None:
    """Ask the server to cancel what this backend runs; returns when the signal has been sent.

    PostgreSQL closes the connection after it has signalled the backend (54.2.9). Raises OSError
    or TimeoutError.
    """
    loop = asyncio.get_running_loop()
    target, packet = server.target, cancel_request(server.pid, server.secret)
    transport: asyncio.BaseTransport | None = None
    try:
        async with asyncio.timeout_at(deadline):
            if target.host.startswith("/"):
                path = f"{target.host}/.s.PGSQL.{target.port}"
                transport, protocol = await loop.create_unix_connection(
                    lambda: _Canceller(packet), path
                )
            else:
                transport, protocol = await loop.create_connection(
                    lambda: _Canceller(packet), target.host, target.port
                )
            await protocol.done
    finally:
        if transport is not None:
            transport.close()


clock: Final = time.monotonic
"""Every instant in pool and proxy. uvloop's ``loop.time()`` is the same clock, but in whole
milliseconds, too coarse for a query of 0.1 ms."""
