"""One logged-in client: its leases, its waiting, its end.

An ``asyncio.Protocol`` by shape for the client's socket and a ``Receiver`` for the server's. All callbacks are
synchronous; between a client's bytes and the server's there is no task and no await. ``Requests`` and ``Replies``
look into the bytes, the relay decides about the lease: it begins with the first message that needs the server, and
ends with ReadyForQuery when nothing is outstanding, the transaction is over and nothing pins the connection.
"""

import asyncio
from typing import Any, Final, Protocol

from sidecar.errors import ClientProtocolError, PoolError, ServerProtocolError, SidecarError
from sidecar.events import CloseReason, PoolMode
from sidecar.pool.report import statement_of
from sidecar.pool.server import ServerConnection, clock
from sidecar.protocol import messages as m
from sidecar.proxy import endings, expect
from sidecar.proxy.carrier import Carrier
from sidecar.proxy.errands import Errands
from sidecar.proxy.limits import Limits
from sidecar.proxy.replies import Replies
from sidecar.proxy.requests import Requests
from sidecar.proxy.settings import Settings
from sidecar.proxy.tables import Client, PoolTables
from sidecar.proxy.unleased import GOODBYE, IGNORED_SYNC, NEED, Unleased
from sidecar.work import Statement, Who

HELD_BACK: Final = 64 * 1024
"""Bytes of a waiting client that are kept before its socket is not read any more."""

_KILLED: Final = "terminating connection due to administrator command"
_SHUTTING_DOWN: Final = "terminating connection because the connection pool shuts down"

_SAMPLED: Final = 64
"""One lease in so many is timed for ``proxy_overhead_seconds``."""


class Registry(Protocol):
    """Who keeps the relays."""

    def gone(self, relay: "Relay") -> None: ...

    def closing(self, relay: "Relay") -> None:
        """It has been told to go; it may not listen."""


class Relay:
    __slots__ = (
        "__weakref__",
        "_holds_lease",
        "_is_one_statement",
        "_is_server_full",
        "_is_unread",
        "_own_time",
        "_registry",
        "_unleased",
        "carrier",
        "client",
        "deadline",
        "errands",
        "id",
        "idle_since",
        "is_closed",
        "is_leaving",
        "is_waiting",
        "is_write_paused",
        "limits",
        "opened_at",
        "pid",
        "pool",
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
        self.pool: Final = pool
        self._registry: Final = registry
        self.client: Final = client
        self.carrier: Final = Carrier(tables.settings, settings, pool.opener.parameters)
        self.transport: Any = None  # asyncio.Transport
        self.server: ServerConnection | None = None
        self.requests: Final = Requests(tables.texts, tables.statements, pool.config, pool.observer)
        self._holds_lease: Final = pool.config.mode is PoolMode.SESSION
        self._is_one_statement: Final = pool.config.mode is PoolMode.STATEMENT
        self.replies: Final = Replies(self.requests, pool.config, pool.observer, self.carrier)
        self.errands: Final = Errands(pool, self.carrier, self.requests, self.replies)
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
        self.is_write_paused = False
        self._is_server_full = False  # and the client not read from
        self._is_unread = False  # not read from until it reads: refused without a lease
        self._unleased: Final = Unleased()
        self._own_time = -1.0  # seconds spent in this lease; negative: not sampled

    def __repr__(self) -> str:
        state = "waiting" if self.is_waiting else "idle" if self.server is None else "active"
        return f"<Relay {self.client.user}@{self.client.address} {state}>"

    @property
    def acquire_timeout(self) -> float:
        return self.limits.acquire

    # -- the client's socket -------------------------------------------------------------------

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.pool.traffic.client_received += len(data)
        requests = self.requests
        if requests.rest:
            data = requests.rest + data
            requests.rest = b""
        server = self.server
        if server is None:
            if self.is_waiting:
                self._hold_back(data)
            else:
                self.begin(data)
        elif self.errands.is_holding:
            self.errands.hold(self, data)
        elif (
            requests.awaits_sync
            or requests.statements.awaits_outcome
            or requests.statements.awaits_check is not None
        ):
            self._hold_back(data)
        elif server.lacks and self.replies.is_at_rest and server.tx_status == m.IDLE:
            self.errands.set_back(self, server, data, clock())
        else:
            self.forward(server, data, clock())

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_closed = True
        now = clock()
        if self.is_waiting:
            self.is_waiting = False
            self.pool.abandon(self, now)
        server = self.server
        if server is not None:
            if not self.errands.is_asking:
                self.leave(server, CloseReason.CLIENT_LOST, now)
            else:  # once that is answered, which is no work
                patience = self.pool.config.ping_timeout
                asyncio.get_running_loop().call_later(patience, self._miss_answer)
        self._registry.gone(self)

    def _miss_answer(self) -> None:
        """The client has gone, and the server still owes the answer to our question."""
        if self.server is not None:
            self.leave(self.server, CloseReason.PING_TIMEOUT, clock())

    def pause_writing(self) -> None:
        self.is_write_paused = True
        if self.server is not None:
            self.server.transport.pause_reading()

    def resume_writing(self) -> None:
        self.is_write_paused = False
        if self.server is not None:
            self.server.transport.resume_reading()
        elif self._is_unread and not self.transport.is_closing():
            self._is_unread = False
            self.transport.resume_reading()
            data, self.requests.rest = self.requests.rest, b""
            self.begin(data)

    def read_again(self, _: object) -> None:
        """A cancel request has come to its end: nothing of the client's can be hit by it any more."""
        if not (self._is_server_full or self._is_unread or self.transport.is_closing()):
            self.transport.resume_reading()

    def held(self, data: bytes) -> None:
        """The client has sent this, and it has to wait."""
        if len(data) > HELD_BACK:
            self.transport.pause_reading()

    def taken(self, data: bytes) -> None:
        """It goes on."""
        if len(data) > HELD_BACK:
            self.transport.resume_reading()

    def write(self, data: bytes) -> None:
        self.pool.traffic.client_sent += len(data)
        self.transport.write(data)

    # -- no lease ------------------------------------------------------------------------------

    def begin(self, data: bytes) -> None:
        """The client has no connection: does it need one now?"""
        unleased = self._unleased
        pos = 0
        while True:
            try:
                pos = unleased.find(data, pos)
            except ClientProtocolError as exc:
                self.fail(exc)
                return
            found = unleased.found
            if found == NEED:
                if self._acquire(data, pos):
                    return
                if self.is_write_paused:
                    self._is_unread = True  # it asks on, and does not read that it is refused
                    self.transport.pause_reading()
                    break
            elif found == IGNORED_SYNC:
                self.write(m.READY_IDLE_MESSAGE)
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
            server = self.pool.acquire(self, now)
        except PoolError as exc:
            self._refuse_cycle(exc, data, pos)
            return False
        if server is None:
            self.is_waiting = True
            self._hold_back(data[pos:])
        else:
            self._attach(server, data[pos:] if pos else data, now)
        return True

    def _hold_back(self, data: bytes) -> None:
        self.requests.rest = data
        self.held(data)

    def take_held_back(self) -> bytes:
        data, self.requests.rest = self.requests.rest, b""
        self.taken(data)
        return data

    def granted(self, server: ServerConnection, now: float) -> None:
        """The pool gives a waiting client its connection."""
        self.is_waiting = False
        self._attach(server, self.take_held_back(), now)

    def refused(self, error: SidecarError) -> None:
        """No connection for this cycle. The session goes on: the client may try again."""
        self.is_waiting = False
        data = self.take_held_back()
        self._refuse_cycle(error, data, 0)
        if self.is_leaving:
            self.end()
        else:
            self.begin(data)

    def _refuse_cycle(self, error: SidecarError, data: bytes, pos: int) -> None:
        """Answer the cycle that begins here with an error; what belongs to it is skipped."""
        self.idle_since = clock()
        self.write(endings.refusal(self.tables, error, self.who(), data, pos))
        if self._unleased.ignore_cycle(data, pos):
            self.write(m.READY_IDLE_MESSAGE)

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
        if self.is_write_paused:
            server.transport.pause_reading()
        if server.settings is not self.carrier.settings and not self.errands.set_up(server, data):
            return
        self.forward(server, data, now)

    def forward(self, server: ServerConnection, data: bytes, now: float) -> None:
        requests, replies = self.requests, self.replies
        try:
            requests.forward(server, data, now)
        except ClientProtocolError as exc:
            replies.is_at_rest = False
            self.fail(exc)
            return
        expected = server.expected
        if expected:
            replies.is_at_rest = False
            if expected[0] <= expect.AUTOMATIC:
                self.write(replies.answer_ourselves(server))
        if self._own_time >= 0.0:
            self._own_time += clock() - now
        if requests.wants_to_leave:
            self.close()
        elif replies.is_at_rest and server.tx_status == m.IDLE and not requests.passing:
            # the end of a message that nobody answers: CopyData after the copy has failed
            self.end_lease(server, now)

    def server_data(self, data: bytes) -> None:
        """Bytes from the server; part of the ``Receiver`` interface."""
        server = self.server
        assert server is not None
        now = clock()
        replies = self.replies
        try:
            if self.errands.is_running:
                data = self.errands.take_reply(self, server, data, now)
                if self.server is not server or self.errands.is_running:
                    return
            if data:
                data = replies.forward(server, data, now)
        except ServerProtocolError as exc:
            self._lose(server, exc, now)
            return
        if data:
            self.write(data)
        if replies.values:
            self.errands.note_values(self, server, now)
        if self._own_time >= 0.0:
            self._own_time += clock() - now
        if replies.is_at_rest and not self.requests.passing:
            if server.tx_status == m.IDLE:
                self.end_lease(server, now)
            elif self._is_one_statement:
                self.fail(endings.block_in_statement_mode(self.pool))
        if self.requests.statements.awaits_outcome:
            self.errands.note_outcome(self, server)

    def end_lease(self, server: ServerConnection, now: float) -> None:
        """Nothing is outstanding: give the connection back, unless it is kept for longer."""
        if self.is_leaving:
            self.end()
            return
        if self._holds_lease or (
            server.effects and self.errands.keep(server, can_ask=not self._is_server_full)
        ):
            return
        if self._is_server_full:
            return  # what is left of a copy that has failed: the server still has to take it
        if self._own_time >= 0.0:
            self.pool.observer.overhead(self._own_time)
        self.server = None
        self.idle_since = now
        if self.is_write_paused:
            server.transport.resume_reading()
        is_sound = True
        if self.replies.held:
            server.unasked_data(self.replies.take_held())
            is_sound = not (server.last_error or server.transport.is_closing())
        if is_sound:
            self.pool.release(server, now)
        else:
            self.pool.discard(server, server.close_reason, now)
        if self.requests.awaits_sync:
            self._go_on()

    def _go_on(self) -> None:
        """Our own Sync is through. If what it followed has failed, the client's next messages are
        ignored up to its own Sync, as the server would have."""
        requests = self.requests
        requests.awaits_sync = False
        if requests.has_failed:
            self._unleased.ignore_to_sync()
        if data := self.take_held_back():
            self.begin(data)

    def leave(self, server: ServerConnection, reason: CloseReason, now: float) -> None:
        """The client is gone, or has to go, and holds a connection."""
        self.server = None
        if self.is_write_paused:
            server.transport.resume_reading()
        endings.give_up(self.pool, server, self.replies, reason, now)

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
            self.end_lease(server, clock())

    def server_lost(self) -> None:
        server = self.server
        assert server is not None
        self.server = None
        is_in_message = self.replies.incoming > 0
        self.replies.abandon(server, clock())
        if self.replies.said_fatal or is_in_message:
            self.close()
        else:
            self.fail(endings.server_is_gone(self.pool), statement_of(server))

    def _lose(self, server: ServerConnection, exc: ServerProtocolError, now: float) -> None:
        self.server = None
        is_in_message = self.replies.incoming > 0
        endings.lose(self.pool, server, self.replies, exc, now)
        if is_in_message:
            self.close()
        else:
            self.fail(exc, statement_of(server))

    # -- the end -------------------------------------------------------------------------------

    def cancel(self) -> asyncio.Future[None] | None:
        """The client's CancelRequest: out of the queue, or on to the server that works for it.

        Returns when the request has reached the server, where one had to be asked.
        """
        if self.is_waiting:
            self.pool.abandon(self, clock())
            self.refused(SidecarError("canceling statement due to user request", sqlstate="57014"))
        elif self.server is not None and self.server.expected and not self.errands.is_running:
            self.replies.why_cancelled = ""
            return self.pool.cancel(self.server)
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
        self.fail(SidecarError(text, sqlstate="57P01"))

    def kill(self) -> None:
        """An administrator ends it, whatever it does, and its server connection."""
        self.end(_KILLED)
        if self.server is not None:
            self.leave(self.server, CloseReason.KILLED, clock())
        if self.is_write_paused:
            self.transport.abort()  # it does not read: it would stay for ever

    def close(self) -> None:
        """Close the client's socket; ``connection_lost`` does the rest."""
        if not self.is_closed and self.transport is not None:
            self.transport.close()
            self._registry.closing(self)

    def fail(self, error: SidecarError, statement: Statement | None = None) -> None:
        """Say why with FATAL, and close."""
        if self.is_closed or self.transport.is_closing():
            return
        if self.replies.incoming == 0:
            self.write(endings.farewell(self.pool, error, self.who(), statement))
        endings.log_closed(self.pool, self.client, error)
        self.close()

    def who(self) -> Who:
        return self.client.who(self.id, self.carrier.application)

    def describe(self, now: float) -> str:
        return self.client.describe(self.carrier.application, self.server, now)
