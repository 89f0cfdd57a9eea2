"""One logged-in client: its leases, its waiting, its end.

An ``asyncio.Protocol`` by shape for the client's socket and a ``Receiver`` for the server's. All
callbacks are synchronous; between a client's bytes and the server's there is no task and no await.
``Requests`` and ``Replies`` look into the bytes, the relay decides about the lease: it begins with
the first message that needs the server, and ends with ReadyForQuery when nothing is outstanding,
the transaction is over and nothing pins the connection.
"""

import asyncio
import logging
from dataclasses import dataclass
from typing import Any, Final, Protocol

from sidecar.errors import (
    ClientProtocolError,
    PoolError,
    ServerConnectionLost,
    ServerProtocolError,
    SidecarError,
)
from sidecar.events import CloseReason, ErrorOrigin, ErrorReason, Phase, PinPolicy, PoolMode
from sidecar.pool.pool import Pool
from sidecar.pool.server import ServerConnection, clock
from sidecar.protocol import messages as m
from sidecar.proxy import expect
from sidecar.proxy.carrier import Carrier
from sidecar.proxy.limits import CANCEL, CLIENT_IDLE, QUERY, Limits, Over
from sidecar.proxy.pins import Inquiry, reason_of
from sidecar.proxy.prepared import PreparedTable
from sidecar.proxy.replies import CHECKED, Replies
from sidecar.proxy.requests import Requests
from sidecar.proxy.settings import Settings, SettingsTable
from sidecar.proxy.unleased import GOODBYE, IGNORED_SYNC, NEED, Unleased
from sidecar.sql import NONE, TextCache

log = logging.getLogger("pgsidecar.proxy")

HELD_BACK: Final = 64 * 1024
"""Bytes of a waiting client that are kept before its socket is not read any more."""

_KILLED: Final = "terminating connection due to administrator command"
_SHUTTING_DOWN: Final = "terminating connection because the connection pool shuts down"

_SAMPLED: Final = 64
"""One lease in so many is timed for ``proxy_overhead_seconds``."""

_COPY_IS_OVER: Final = m.message(m.COPY_FAIL, CANCEL.message.encode() + b"\0")


@dataclass(frozen=True, slots=True)
class Client:
    """Who a client is, for messages and logs."""

    user: str
    database: str
    address: str


class Registry(Protocol):
    """Who keeps the relays."""

    def gone(self, relay: "Relay") -> None: ...

    def closing(self, relay: "Relay") -> None:
        """It has been told to go; it may not listen."""


class PoolTables:
    """What the clients of one pool share in the proxy."""

    def __init__(self, pool: Pool) -> None:
        self.pool: Final = pool
        self.settings: Final = SettingsTable()
        self.statements: Final = PreparedTable()
        self.texts: Final = TextCache()
        self.limits: dict[Limits, Limits] = {}
        """Those that clients have: one object for each combination."""
        self.leases = 0
        self.clients: Final[set[object]] = set()
        """Who uses the pool: relays, and sessions in login."""


class Relay:
    __slots__ = (
        "__weakref__",
        "_has_own_query",
        "_holds_lease",
        "_inquiry",
        "_is_holding",
        "_is_one_statement",
        "_is_server_full",
        "_is_unread",
        "_is_write_paused",
        "_own_time",
        "_pool",
        "_registry",
        "_setup_rest",
        "_unleased",
        "carrier",
        "client",
        "deadline",
        "id",
        "idle_since",
        "is_closed",
        "is_leaving",
        "is_waiting",
        "limits",
        "opened_at",
        "pid",
        "replies",
        "requests",
        "secret",
        "server",
        "tables",
        "transport",
        "waiting_since",
    )

    def __init__(
        self,
        tables: PoolTables,
        registry: Registry,
        client: Client,
        settings: Settings,
        limits: Limits,
    ) -> None:
        pool = tables.pool
        self.tables: Final = tables
        self._pool: Final = pool
        self._registry: Final = registry
        self.client: Final = client
        self.carrier: Final = Carrier(tables.settings, settings, pool.opener.parameters)
        self.transport: Any = None  # asyncio.Transport
        self.server: ServerConnection | None = None
        self.requests: Final = Requests(tables.texts, tables.statements, pool.config, pool.observer)
        self.requests.statements.dialect = self.carrier.settings.dialect
        self._holds_lease: Final = pool.config.mode is PoolMode.SESSION
        self._is_one_statement: Final = pool.config.mode is PoolMode.STATEMENT
        self.replies: Final = Replies(
            self.requests,
            pool.observer,
            pool.config.slow_query_threshold,
            holds_lease=self._holds_lease,
        )
        self.id = 0  # told to people; no two clients have the same
        self.opened_at = 0.0
        self.limits = tables.limits.setdefault(limits, limits)
        self.idle_since = clock()  # the end of the last lease
        self.pid = 0  # of BackendKeyData
        self.secret = b""
        self.is_waiting = False
        self.waiting_since = 0.0
        self.deadline = 0.0
        self.is_leaving = False  # close as soon as there is no lease
        self.is_closed = False
        self._is_write_paused = False
        self._is_server_full = False  # and the client not read from
        self._is_unread = False  # not read from until it reads: refused without a lease
        self._has_own_query = False  # what the server says next answers a query of ours
        self._is_holding = False  # and the client's messages wait until it is through:
        self._setup_rest = b""
        self._inquiry: Inquiry | None = None
        self._unleased: Final = Unleased()
        self._own_time = -1.0  # seconds spent in this lease; negative: not sampled

    def __repr__(self) -> str:
        state = "waiting" if self.is_waiting else "idle" if self.server is None else "active"
        return f"<Relay {self.client.user}@{self.client.address} {state}>"

    # -- the client's socket -------------------------------------------------------------------

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self._pool.traffic.client_received += len(data)
        requests = self.requests
        if requests.rest:
            data = requests.rest + data
            requests.rest = b""
        server = self.server
        if server is None:
            if self.is_waiting:
                self._hold_back(data)
            else:
                self._begin(data)
        elif self._is_holding:
            self._setup_rest += data
            if len(self._setup_rest) > HELD_BACK:
                self.transport.pause_reading()
        elif (
            requests.awaits_sync
            or requests.statements.awaits_outcome
            or requests.statements.awaits_check is not None
        ):
            self._hold_back(data)
        elif server.lacks and self.replies.is_at_rest and server.tx_status == m.IDLE:
            self._set_back(server, data)
        else:
            self._forward(server, data, clock())

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_closed = True
        now = clock()
        if self.is_waiting:
            self.is_waiting = False
            self._pool.abandon(self, now)
        server = self.server
        if server is not None and self._inquiry is None:  # else once that is answered
            self._leave(server, CloseReason.CLIENT_LOST, now)
        self._registry.gone(self)

    def pause_writing(self) -> None:
        self._is_write_paused = True
        if self.server is not None:
            self.server.transport.pause_reading()

    def resume_writing(self) -> None:
        self._is_write_paused = False
        if self.server is not None:
            self.server.transport.resume_reading()
        elif self._is_unread and not self.transport.is_closing():
            self._is_unread = False
            self.transport.resume_reading()
            data, self.requests.rest = self.requests.rest, b""
            self._begin(data)

    def _write(self, data: bytes) -> None:
        self._pool.traffic.client_sent += len(data)
        self.transport.write(data)

    # -- no lease ------------------------------------------------------------------------------

    def _begin(self, data: bytes) -> None:
        """The client has no connection: does it need one now?"""
        unleased = self._unleased
        pos = 0
        while True:
            try:
                pos = unleased.find(data, pos)
            except ClientProtocolError as exc:
                self._fail(exc)
                return
            found = unleased.found
            if found == NEED:
                if self._acquire(data, pos):
                    return
                if self._is_write_paused:
                    self._is_unread = True  # it asks on, and does not read that it is refused
                    self.transport.pause_reading()
                    break
            elif found == IGNORED_SYNC:
                self._write(m.READY_IDLE_MESSAGE)
            elif found == GOODBYE:
                self.close()
                return
            else:
                break
        self.requests.rest = data[pos:]

    def _acquire(self, data: bytes, pos: int) -> bool:
        """Ask the pool. False if it refused; the refused cycle is then skipped."""
        now = clock()
        try:
            server = self._pool.acquire(self, now)
        except PoolError as exc:
            self._refuse_cycle(exc, data, pos)
            return False
        data = data[pos:]
        if server is None:
            self.is_waiting = True
            self._hold_back(data)
        else:
            self._attach(server, data, now)
        return True

    def _hold_back(self, data: bytes) -> None:
        self.requests.rest = data
        if len(data) > HELD_BACK:
            self.transport.pause_reading()

    def granted(self, server: ServerConnection, now: float) -> None:
        """The pool gives a waiting client its connection."""
        self.is_waiting = False
        data = self.requests.rest
        self.requests.rest = b""
        if len(data) > HELD_BACK:
            self.transport.resume_reading()
        self._attach(server, data, now)

    def refused(self, error: SidecarError) -> None:
        """No connection for this cycle. The session goes on: the client may try again."""
        self.is_waiting = False
        data = self.requests.rest
        self.requests.rest = b""
        if len(data) > HELD_BACK:
            self.transport.resume_reading()
        self._refuse_cycle(error, data, 0)
        if self.is_leaving:
            self.end()
        else:
            self._begin(data)

    def _refuse_cycle(self, error: SidecarError, data: bytes, pos: int) -> None:
        """Answer the cycle that begins here with an error; what belongs to it is skipped."""
        self.idle_since = clock()
        self._report(error, "ERROR")
        if self._unleased.ignore_cycle(data, pos):
            self._write(m.READY_IDLE_MESSAGE)

    # -- a lease -------------------------------------------------------------------------------

    def adopt(self, server: ServerConnection, data: bytes) -> None:
        """In session mode: take over the connection of the login, and what it has said since."""
        self.server = server
        server.receiver = self
        self.tables.leases += 1
        if data:
            self.server_data(data)

    def _attach(self, server: ServerConnection, data: bytes, now: float) -> None:
        tables = self.tables
        self.server = server
        server.receiver = self
        server.is_odd = False
        self.requests.begin_lease()
        tables.leases += 1
        self._own_time = -1.0 if tables.leases % _SAMPLED else 0.0
        if self._is_write_paused:
            server.transport.pause_reading()
        if server.settings is not self.carrier.settings and not self._set_up(server, data):
            return
        self._forward(server, data, now)

    def _set_up(self, server: ServerConnection, data: bytes) -> bool:
        """Carry over this client's settings. False if ``data`` has to wait for the outcome.

        Settings that a server has accepted before travel together with the client's first
        message and cost no round trip of their own.
        """
        carrier = self.carrier
        carrier.set_up(server)
        self._has_own_query = carrier.is_setting
        if not carrier.is_setting or carrier.settings.is_proven:
            return True
        self._is_holding = True
        self._setup_rest = data
        self.replies.is_at_rest = False  # the reply to our SET is owed, should the client leave now
        return False

    def _set_back(self, server: ServerConnection, data: bytes) -> None:
        self.requests.begin_lease()  # our Query takes the unnamed statement away
        self.carrier.set_back(server)
        self._has_own_query = True
        self._forward(server, data, clock())

    def _forward(self, server: ServerConnection, data: bytes, now: float) -> None:
        requests, replies = self.requests, self.replies
        try:
            requests.forward(server, data, now)
        except ClientProtocolError as exc:
            replies.is_at_rest = False
            self._fail(exc)
            return
        expected = server.expected
        if expected:
            replies.is_at_rest = False
            if expected[0] <= expect.AUTOMATIC:
                self._write(replies.answer_ourselves(server))
        if self._own_time >= 0.0:
            self._own_time += clock() - now
        if requests.wants_to_leave:
            self.close()
        elif replies.is_at_rest and server.tx_status == m.IDLE and not requests.passing:
            # the end of a message that nobody answers: CopyData after the copy has failed
            self._end_lease(server, now)

    def server_data(self, data: bytes) -> None:
        """Bytes from the server; part of the ``Receiver`` interface."""
        server = self.server
        assert server is not None
        now = clock()
        replies = self.replies
        try:
            if self._has_own_query:
                data = self._own_reply(server, data)
                if self.server is not server or self._has_own_query:
                    return
            if data:
                data = replies.forward(server, data, now)
        except ServerProtocolError as exc:
            self._lose(server, exc, CloseReason.PROTOCOL_ERROR, now)
            return
        if data:
            self._write(data)
        if replies.values:
            self._note_values(server, replies)
        if self._own_time >= 0.0:
            self._own_time += clock() - now
        if replies.is_at_rest and not self.requests.passing:
            if server.tx_status == m.IDLE:
                self._end_lease(server, now)
            elif self._is_one_statement:
                self._refuse_transaction()
        if self.requests.statements.awaits_outcome and (
            self.server is not server
            or not server.expected
            or server.copy_in  # what the server waits for may be what we hold back
            or self._is_holding
        ):
            self._take_up()

    def _take_up(self) -> None:
        """The outcome of earlier cycles is known: what has waited for it goes on."""
        requests = self.requests
        requests.statements.awaits_outcome = False
        data, requests.rest = requests.rest, b""
        if len(data) > HELD_BACK:
            self.transport.resume_reading()
        self._pool.traffic.client_received -= len(data)  # they have been counted
        self.data_received(data)

    def _refuse_transaction(self) -> None:
        self._fail(
            SidecarError(
                "transaction blocks are not allowed in statement mode",
                detail=f"The mode of pool {self._pool.name!r} is statement. "
                "The transaction has been rolled back.",
                hint="Use a pool in transaction mode.",
                sqlstate="0A000",
            )
        )

    def _end_lease(self, server: ServerConnection, now: float) -> None:
        """Nothing is outstanding: give the connection back, unless it is kept for longer."""
        if self.is_leaving:
            self.end()
            return
        if self._holds_lease or (server.effects and self._keeps(server)):
            return
        if self._is_server_full:
            return  # what is left of a copy that has failed: the server still has to take it
        if self._own_time >= 0.0:
            self._pool.observer.overhead(self._own_time)
        self.server = None
        self.idle_since = now
        if self._is_write_paused:
            server.transport.resume_reading()
        is_sound = True
        if self.replies.held:
            server.unasked_data(self.replies.take_held())
            is_sound = not (server.last_error or server.transport.is_closing())
        if is_sound:
            self._pool.release(server, now)
        else:
            self._pool.discard(server, server.close_reason, now)
        if self.requests.awaits_sync:
            self._go_on()

    def _go_on(self) -> None:
        """Our own Sync is through. If what it followed has failed, the client's next messages are
        ignored up to its own Sync, as the server would have."""
        requests = self.requests
        requests.awaits_sync = False
        if requests.has_failed:
            self._unleased.ignore_to_sync()
        data, requests.rest = requests.rest, b""
        if len(data) > HELD_BACK:
            self.transport.resume_reading()
        if data:
            self._begin(data)

    def _leave(self, server: ServerConnection, reason: CloseReason, now: float) -> None:
        """The client is gone, or has to go, and holds a connection."""
        self.server = None
        replies = self.replies
        is_between = not (server.mid_message or replies.held or replies.incoming)
        is_fit = replies.is_at_rest and is_between
        replies.abandon(server, now)
        if self._is_write_paused:
            server.transport.resume_reading()
        if server.effects:
            server.is_dirty = True
        if is_fit:
            self._pool.release(server, now)
        else:
            self._pool.discard(server, reason, now)

    def server_writable(self, is_writable: bool) -> None:
        self._is_server_full = not is_writable
        if not is_writable:
            self.transport.pause_reading()
            return
        self.transport.resume_reading()
        server = self.server
        if (
            server is not None
            and self.replies.is_at_rest
            and server.tx_status == m.IDLE
            and not self.requests.passing
        ):
            self._end_lease(server, clock())

    def server_lost(self) -> None:
        server = self.server
        assert server is not None
        self.server = None
        is_in_message = self.replies.incoming > 0
        self.replies.abandon(server, clock())
        if self.replies.said_fatal or is_in_message:
            self.close()
        else:
            self._fail(
                ServerConnectionLost(
                    "the server closed the connection unexpectedly",
                    detail=f"Pool {self._pool.name!r}, server {self._pool.config.target.describe()}.",
                    hint="The transaction was not completed, or its outcome is not known.",
                )
            )

    def _lose(
        self, server: ServerConnection, exc: ServerProtocolError, reason: CloseReason, now: float
    ) -> None:
        # a warning: a client that breaks the protocol amid a copy can make a server say this, too
        log.warning("server broke the protocol", extra={"pool": self._pool.name, "cause": str(exc)})
        self._pool.observer.connection_failed(Phase.QUERY, ErrorReason.PROTOCOL)
        self.server = None
        is_in_message = self.replies.incoming > 0
        self.replies.abandon(server, now)
        self._pool.discard(server, reason, now)
        if is_in_message:
            self.close()
        else:
            self._fail(exc)

    # -- queries of our own ----------------------------------------------------------------------

    def _own_reply(self, server: ServerConnection, data: bytes) -> bytes:
        """Take the replies to a query of ours. Returns what follows them."""
        carrier, inquiry = self.carrier, self._inquiry
        data = self.replies.take_held() + data
        if inquiry is not None:
            pos = inquiry.take_reply(server, data)
            news = b"".join(inquiry.news)
            inquiry.news.clear()
        else:
            pos = carrier.take_reply(server, data)
            news = carrier.take_news()
        if news:
            self._write(news)
        self.replies.hold(data[pos:])
        if inquiry is not None:
            if inquiry.is_done:
                self._answered(server, inquiry)
        elif not carrier.is_setting:
            self._has_own_query = False
            self._settings_done(server, carrier.error)
        return b"" if self._has_own_query else self.replies.take_held()

    def _take_held_back(self) -> bytes:
        """What the client has sent meanwhile."""
        self._is_holding = False
        rest, self._setup_rest = self._setup_rest, b""
        if len(rest) > HELD_BACK:
            self.transport.resume_reading()
        return rest

    def _keeps(self, server: ServerConnection) -> bool:
        """The client may have left something behind: ask, and keep the connection if it is there."""
        if self._pool.config.pin is PinPolicy.OFF:
            server.is_dirty = True
            return False
        self.carrier.judge_reset(server)
        if not server.effects:
            return False
        if server.effects != server.asked and not self._is_server_full:
            user = self._pool.opener.parameters.get(b"session_authorization", b"")
            self._inquiry = Inquiry(server, user, self.carrier.settings)
            self._has_own_query = self._is_holding = True
            self.replies.is_at_rest = False
        return True

    def _answered(self, server: ServerConnection, inquiry: Inquiry) -> None:
        now = clock()
        self._inquiry = None
        self._has_own_query = False
        self.replies.is_at_rest = True
        was_pinned = server.pin is not None
        if inquiry.there and self._pool.config.pin is PinPolicy.REFUSE:
            server.is_dirty = True  # what could not be seen beforehand
            inquiry.there = 0
        server.effects = server.asked = inquiry.there
        server.pin = reason_of(inquiry.there)
        if inquiry.settings is not None:
            self.carrier.note_session(server, inquiry.settings, stays=bool(inquiry.there))
            self.requests.statements.dialect = self.carrier.settings.dialect
        if server.pin is not None and not was_pinned:
            server.pinned_at = now
            self._pool.observer.pinned(server.pin)
        server.is_odd = False
        rest = self._take_held_back()
        if self.is_closed:
            self._leave(server, CloseReason.CLIENT_LOST, now)
            return
        self._end_lease(server, now)
        if not rest:
            return
        if self.server is None:
            self._begin(rest)
        elif server.lacks:
            self._set_back(server, rest)
        else:
            self._forward(server, rest, now)

    def _settings_done(self, server: ServerConnection, error: bytes | None) -> None:
        now = clock()
        rest = self._take_held_back()
        if rest:
            self.replies.is_at_rest = True  # nothing of the client's has been sent
        self.requests.statements.dialect = self.carrier.settings.dialect
        if error is not None:
            self._leave(server, CloseReason.SETTINGS_FAILED, now)
            text = m.error_fields(error).get("M", "a startup parameter was refused")
            self._fail(SidecarError(text, sqlstate=m.sqlstate_of(error)))
        elif rest:
            self._forward(server, rest, now)
        elif server.expected and server.expected[0] <= expect.AUTOMATIC:
            self._write(self.replies.answer_ourselves(server))

    def _note_values(self, server: ServerConnection, replies: Replies) -> None:
        carrier, requests = self.carrier, self.requests
        values = [value for value in replies.values if value != CHECKED]
        is_checked = len(values) < len(replies.values)
        replies.values.clear()
        if values:
            carrier.note_values(server, values, requests.resets)
            requests.resets = NONE
        requests.statements.dialect = carrier.settings.dialect
        if replies.is_at_rest and server.tx_status == m.IDLE:
            server.is_odd = False
        news = carrier.take_news()
        if news:
            self._write(news)
        if is_checked and requests.statements.awaits_check is not None:
            requests.statements.checked()
            data, requests.rest = requests.rest, b""
            if len(data) > HELD_BACK:
                self.transport.resume_reading()
            self._forward(server, data, clock())

    # -- limits --------------------------------------------------------------------------------

    @property
    def acquire_timeout(self) -> float:
        return self.limits.acquire

    def cancel_overdue(self, server: ServerConnection) -> None:
        """Its query has run for too long."""
        self._pool.observer.timed_out(CANCEL.kind)
        self.replies.why_cancelled = CANCEL.message
        if server.copy_in and not server.mid_message:
            server.write(_COPY_IS_OVER)  # a server that waits for COPY data is deaf to cancels
        # What the client sends next must not be hit instead, should the query end meanwhile.
        self.transport.pause_reading()
        self._pool.cancel(server).add_done_callback(self._read_again)

    def _read_again(self, _: object) -> None:
        if not (self._is_server_full or self._is_unread or self.transport.is_closing()):
            self.transport.resume_reading()

    def end_overdue(self, over: Over, now: float) -> None:
        """Close the client for a limit. Its server connection is kept where that is sound."""
        if over is not QUERY:  # that was counted when it was to be cancelled
            self._pool.observer.timed_out(over.kind)
        is_in_message = self.replies.incoming > 0
        if self.server is not None:
            self._leave(self.server, over.reason, now)
        if is_in_message:
            self.close()
        else:
            self._fail(over.error, is_error=over is not CLIENT_IDLE)

    # -- the end -------------------------------------------------------------------------------

    def cancel(self) -> asyncio.Future[None] | None:
        """The client's CancelRequest: out of the queue, or on to the server that works for it.

        Returns when the request has reached the server, where one had to be asked.
        """
        if self.is_waiting:
            self._pool.abandon(self, clock())
            self.refused(SidecarError("canceling statement due to user request", sqlstate="57014"))
        elif self.server is not None and self.server.expected and not self._has_own_query:
            self.replies.why_cancelled = ""
            return self._pool.cancel(self.server)
        return None

    def shut_down(self) -> None:
        """The sidecar drains: go when the lease is over."""
        self.is_leaving = True
        server = self.server
        if server is None:
            is_busy = self.is_waiting
        else:
            is_busy = not self.replies.is_at_rest or server.tx_status != m.IDLE
        if not is_busy:
            self.end()

    def end(self, text: str = _SHUTTING_DOWN) -> None:
        """Tell the client that the sidecar goes, and close."""
        self._fail(SidecarError(text, sqlstate="57P01"), is_error=False)

    def kill(self) -> None:
        """An administrator ends it, whatever it does, and its server connection."""
        self.end(_KILLED)
        server = self.server
        if server is not None:
            self._leave(server, CloseReason.KILLED, clock())
        if self._is_write_paused:
            self.transport.abort()  # it does not read: it would stay for ever

    def close(self) -> None:
        """Close the client's socket; ``connection_lost`` does the rest."""
        if not self.is_closed and self.transport is not None:
            self.transport.close()
            self._registry.closing(self)

    def _report(self, error: SidecarError, severity: str) -> None:
        self._pool.observer.query_failed(ErrorOrigin.SIDECAR, error.sqlstate)
        text = m.error_response(
            severity, error.sqlstate, error.message, detail=error.detail, hint=error.hint
        )
        self._write(text)

    def _fail(self, error: SidecarError, *, is_error: bool = True) -> None:
        """Say why with FATAL, and close."""
        if self.is_closed or self.transport.is_closing():
            return
        if self.replies.incoming == 0:
            if is_error:
                self._report(error, "FATAL")
            else:
                self._write(m.error_response("FATAL", error.sqlstate, error.message))
        log.info(
            "client connection closed",
            extra={
                "pool": self._pool.name,
                "client": self.client.address,
                "user": self.client.user,
                "sqlstate": error.sqlstate,
                "cause": error.message,
            },
        )
        self.close()

    @property
    def pool(self) -> Pool:
        return self._pool

    def application(self) -> str:
        name = self.carrier.settings.values.get(b"application_name", b"")
        return name.decode("utf-8", "replace")

    def describe(self, now: float) -> str:
        server = self.server
        application = self.application()
        who = f'application "{application}"' if application else "a client without application_name"
        who += f', user "{self.client.user}", {self.client.address}'
        if server is None:
            return who
        if server.expected:
            return f"{who}, running a query for {now - server.query_started:.1f} s"
        where = "idle" if server.tx_status == m.IDLE else "idle in transaction"
        return f"{who}, {where} for {now - server.status_since:.1f} s"
