"""From server to client: frame, count off, forward.

Owns an unfinished server message. Every reply settles the head of the ledger (``proxy.expect``);
what the client did not ask for is left out, what was not asked of the server is put in. Rows and
other bulk are passed on in pieces; the short messages that steer us are taken whole.
"""

from typing import Final, Protocol

from sidecar.config import PoolConfig
from sidecar.errors import ServerProtocolError
from sidecar.events import ErrorOrigin, PoolMode, PoolObserver
from sidecar.pool.server import ServerConnection
from sidecar.protocol import messages as m
from sidecar.proxy import expect
from sidecar.proxy.limits import QUERY_HINT
from sidecar.proxy.prepared import PREFIX, Prepared, shape
from sidecar.proxy.requests import Requests
from sidecar.proxy.scrub import message_of
from sidecar.proxy.tags import COMMON, rows_of
from sidecar.sql import LOAD, SETTING, UNDO, UNNAMED
from sidecar.work import Failure

_HELD: Final = 64 * 1024
"""Bytes; a message that we need whole and that is longer is looked at so far and passed on."""

_STREAMED: Final = frozenset(
    {
        *(m.DATA_ROW, m.COPY_DATA, m.ROW_DESCRIPTION, m.PARAMETER_DESCRIPTION),
        *(m.NOTICE_RESPONSE, m.NOTIFICATION_RESPONSE, m.FUNCTION_CALL_RESPONSE),
    }
)
_UNSETTLING: Final = frozenset(
    {
        *_STREAMED,
        *(m.COPY_OUT_RESPONSE, m.COPY_DONE, m.COPY_BOTH_RESPONSE),
        *(m.PARAMETER_STATUS, m.NEGOTIATE_PROTOCOL_VERSION, m.BACKEND_KEY_DATA),
    }
)
"""Messages that settle nothing in the ledger (RowDescription does when it answers Describe)."""

_KNOWN: Final = _UNSETTLING | {
    *(m.COMMAND_COMPLETE, m.READY_FOR_QUERY, m.NO_DATA, m.PARSE_COMPLETE, m.BIND_COMPLETE),
    *(m.CLOSE_COMPLETE, m.ERROR_RESPONSE, m.EMPTY_QUERY_RESPONSE, m.PORTAL_SUSPENDED),
    m.COPY_IN_RESPONSE,
}

CHECKED: Final = b"\0"
"""Among the values that the relay notes: our Describe has been answered."""

RESET: Final = b""
"""Among the values that the relay notes: settings have been reset. No ParameterStatus is empty."""

_DEALLOCATED: Final = m.message(m.COMMAND_COMPLETE, b"DEALLOCATE\0")

_ENDS_BY_ITSELF: Final = (m.QUERY, m.SYNC, m.FUNCTION_CALL, expect.REFUSED_QUERY)
"""After an error to one of these the server does not skip to the next Sync."""

_LONGEST: Final = 0x40000000
"""Bytes; PostgreSQL's MaxAllocSize: no message of its is as long."""


def status_of(body: bytes) -> bytes:
    """The body of a ParameterStatus. Raises ServerProtocolError if it is not one."""
    if body.count(0) != 2 or not body.endswith(b"\0"):
        raise ServerProtocolError("malformed ParameterStatus from the server")
    return body


def _waits_for_more(server: ServerConnection, kind: int, length: int, come: int) -> bool:
    """Whether a message of which ``come`` bytes are there is kept; else it is passed on in pieces."""
    if length >= _LONGEST or kind not in _KNOWN:
        raise ServerProtocolError(f"invalid message from the server: type {kind} of {length} bytes")
    expected = server.expected
    is_needed = kind not in _STREAMED or (expected and expected[0] == expect.OUR_DESCRIBE)
    return bool(is_needed) and come < _HELD


class Named(Protocol):
    """Whose replies these are."""

    @property
    def application(self) -> str: ...


class Replies:
    """The replies to one client."""

    __slots__ = (
        "_client",
        "_has_changed_tables",
        "_has_rolled_back",
        "_holds_lease",
        "_observer",
        "_out",
        "_parameters",
        "_requests",
        "_start",
        "_statements",
        "_threshold",
        "held",
        "incoming",
        "is_at_rest",
        "said_fatal",
        "values",
        "why_cancelled",
    )

    def __init__(
        self, requests: Requests, config: PoolConfig, observer: PoolObserver, client: Named
    ) -> None:
        self._requests: Final = requests
        self._statements: Final = requests.statements
        self._observer = observer
        self._client: Final = client
        self._threshold: Final = config.slow_query_threshold
        # what the server says between transactions is for this client, too
        self._holds_lease: Final = config.mode is PoolMode.SESSION
        self.held = b""  # the beginning of a message, or what follows the end of the lease
        self._has_rolled_back = False  # in this cycle
        self._has_changed_tables = False  # in this transaction
        self._out: list[bytes] | None = None
        self._parameters = b""  # of the statement that we describe
        self._start = 0
        self.incoming = 0  # bytes of a message that are still to come
        self.is_at_rest = True  # the last thing the server said was ReadyForQuery, nothing is owed
        self.said_fatal = False  # the client has been told why the server ends the connection
        self.why_cancelled = ""  # by ourselves: the server would say, by its user
        self.values: list[bytes] = []  # bodies of ParameterStatus, RESET: for the relay to note

    def forward(self, server: ServerConnection, data: bytes, now: float) -> bytes:
        """What the client gets of this. Sets ``is_at_rest``. Raises ServerProtocolError."""
        if self.held:
            data = self.held + data
            self.held = b""
        pos = 0
        size = len(data)
        if self.incoming:
            if self.incoming >= size:
                self.incoming -= size
                return data
            pos = self.incoming
        self._start = 0
        pos = self._inspect(server, data, pos, size, now)
        self.incoming = 0  # only now: if that raised, the client has half a message
        if pos > size:
            if pos - size >= _LONGEST:
                raise ServerProtocolError("invalid message length from the server")
            self.incoming = pos - size
        elif pos < size:
            self.held = data[pos:]
            size = pos
        out = self._out
        if out is not None:
            self._out = None
            out.append(data[self._start : size])
            return b"".join(out)
        return data if size == len(data) else data[:size]

    def take_held(self) -> bytes:
        """The beginning of an unfinished message, for who reads on."""
        held, self.held = self.held, b""
        return held

    def hold(self, data: bytes) -> None:
        self.held = data

    def _inspect(
        self, server: ServerConnection, data: bytes, pos: int, size: int, now: float
    ) -> int:
        expected = server.expected
        while size - pos >= 5:
            kind = data[pos]
            length = data[pos + 4]
            if data[pos + 1] or data[pos + 2] or data[pos + 3]:
                length = m.length_at(data, pos)
            end = pos + 1 + length
            if length < 4:
                raise ServerProtocolError(f"invalid message length from the server: {length}")
            if kind == m.DATA_ROW:
                pos = end
                continue
            if end > size and _waits_for_more(server, kind, length, size - pos):
                break
            if kind == m.COMMAND_COMPLETE:
                self._complete(server, data, pos + 5, end, now)
            elif kind == m.READY_FOR_QUERY:
                if length != 5:
                    raise ServerProtocolError(f"ReadyForQuery of {length} bytes")
                if expected and expected[0] <= expect.LAST:
                    self._own_ready(expected[0], data, pos, end)
                self._ready(server, data[pos + 5], now)
                if end < size and self._is_lease_over(server):
                    pos = end
                    break
            elif kind == m.ROW_DESCRIPTION or kind == m.NO_DATA:
                if expected and expected[0] == m.DESCRIBE:
                    expected.popleft()
                elif expected and expected[0] == expect.OUR_DESCRIBE:
                    self._described(server, kind, data, pos, end)
            elif kind == m.PARAMETER_DESCRIPTION:
                if expected and expected[0] == expect.OUR_DESCRIBE:
                    self._described(server, kind, data, pos, end)
            elif kind == m.BIND_COMPLETE:
                if not expected or expected.popleft() != m.BIND:
                    raise ServerProtocolError("BindComplete from the server answers no request")
            elif kind == m.PARSE_COMPLETE:
                if expected and expected[0] == m.PARSE:
                    expected.popleft()
                else:
                    self._parsed(server, data, pos, end)
            elif kind == m.ERROR_RESPONSE:
                self._failed(server, data, pos, end, now)
            elif kind == m.CLOSE_COMPLETE:
                self._closed(server, data, pos, end)
            elif kind == m.EMPTY_QUERY_RESPONSE or kind == m.PORTAL_SUSPENDED:
                if expected and expected[0] == m.EXECUTE:
                    self._executed(server, now)
            elif kind == m.COPY_IN_RESPONSE:
                server.copy_in = not expect.remove_ignored_syncs(server)
            elif kind == m.PARAMETER_STATUS:
                self.values.append(status_of(data[pos + 5 : end]))
            elif kind not in _UNSETTLING:
                raise ServerProtocolError(f"unexpected message type {kind} from the server")
            if server.automatic and expected and expected[0] <= expect.AUTOMATIC:
                self._advance(server, data, end)
            pos = end
        return pos

    # -- the ledger ----------------------------------------------------------------------------

    def _advance(self, server: ServerConnection, data: bytes, end: int) -> None:
        """Settle what has come to the head and has no reply of the server's own."""
        expected = server.expected
        while expected and expected[0] <= expect.AUTOMATIC:
            server.automatic -= 1
            if expected.popleft() == expect.FAKE_PARSE:
                server.undo.popleft()
                self._cut(data, end, end).append(m.PARSE_COMPLETE_MESSAGE)

    def answer_ourselves(self, server: ServerConnection) -> bytes:
        """After forwarding requests: the replies that are due before the server says anything."""
        self._start = 0
        self._advance(server, b"", 0)
        out = self._out
        self._out = None
        return b"" if out is None else b"".join(out)

    def _parsed(self, server: ServerConnection, data: bytes, pos: int, end: int) -> None:
        head = server.expected.popleft() if server.expected else 0
        if head in (expect.PARSE_NAMED, expect.OUR_PARSE):
            server.undo.popleft()
        elif head != expect.OUR_UNNAMED_PARSE:
            raise ServerProtocolError("ParseComplete from the server answers no request")
        if head != expect.PARSE_NAMED:
            self._cut(data, pos, end)

    def _described(
        self, server: ServerConnection, kind: int, data: bytes, pos: int, end: int
    ) -> None:
        """The answer to our own Describe, which the client does not see."""
        self._cut(data, pos, end)
        if kind == m.PARAMETER_DESCRIPTION:
            self._parameters = data[pos + 5 : end]
            return
        server.expected.popleft()
        statement: Prepared = server.described.popleft()
        columns = data[pos + 5 : end] if kind == m.ROW_DESCRIPTION else b""
        try:
            found = shape(self._parameters, columns)
        except ValueError as exc:
            raise ServerProtocolError("malformed RowDescription from the server") from exc
        if statement.shape is None:
            statement.shape = found
        elif statement.shape != found:
            statement.is_stale = True
        if self._statements.awaits_check is statement:
            self.values.append(CHECKED)

    def _closed(self, server: ServerConnection, data: bytes, pos: int, end: int) -> None:
        head = server.expected.popleft() if server.expected else 0
        if head in (expect.CLOSE_NAMED, expect.OUR_CLOSE):
            server.undo.popleft()
        elif head not in (m.CLOSE, expect.OUR_UNNAMED_CLOSE):
            raise ServerProtocolError("CloseComplete from the server answers no request")
        if head in (expect.OUR_CLOSE, expect.OUR_UNNAMED_CLOSE):
            self._cut(data, pos, end)

    def _cut(self, data: bytes, pos: int, end: int) -> list[bytes]:
        """Leave out ``data[pos:end]``. Returns the list of pieces, complete up to ``end``."""
        if end > len(data):
            raise ServerProtocolError(f"reply of {end - pos} bytes to a request of ours")
        out = self._out
        if out is None:
            out = self._out = []
        out.append(data[self._start : pos])
        self._start = end
        return out

    def _failed(
        self, server: ServerConnection, data: bytes, pos: int, end: int, now: float
    ) -> None:
        """ErrorResponse: in the words of the server, or in ours where we made it fail."""
        head = server.expected[0] if server.expected else 0
        if head in expect.REFUSED:
            refusal = server.refusals[0]
            self._cut(data, pos, end).append(refusal)
            self._error(server, refusal[5:], now, ErrorOrigin.SIDECAR)
            return
        if head == expect.PARSE_TAKEN:
            self._name_taken(server, data, pos, end)
        self._error(server, data[pos + 5 : end], now, ErrorOrigin.SERVER)
        if self.why_cancelled and end <= len(data):
            self._say_why(data, pos, end)

    def _name_taken(self, server: ServerConnection, data: bytes, pos: int, end: int) -> None:
        """The server's error has our name of the statement, the client shall see its own."""
        body = data[pos + 5 : end]
        if m.sqlstate_of(body) == "42P05":
            before, _, after = body.partition(PREFIX)
            told = before + server.refusals[0] + after.lstrip(b"0123456789")
            self._cut(data, pos, end).append(m.message(m.ERROR_RESPONSE, told))

    def _say_why(self, data: bytes, pos: int, end: int) -> None:
        """In the server's "canceling statement due to user request"."""
        body = data[pos + 5 : end]
        if m.sqlstate_of(body) == "57014":
            error = m.error_response("ERROR", "57014", self.why_cancelled, hint=QUERY_HINT)
            self._cut(data, pos, end).append(error)
            self.why_cancelled = ""

    def _is_lease_over(self, server: ServerConnection) -> bool:
        """What follows is not for this client: FATAL, for one, from a server that shuts down."""
        is_idle = self.is_at_rest and server.tx_status == m.IDLE
        return is_idle and not server.effects and not self._holds_lease

    def _own_ready(self, head: int, data: bytes, pos: int, end: int) -> None:
        """ReadyForQuery that answers what we sent in place of something else, or on top of it."""
        if head == expect.OUR_SYNC:
            self._cut(data, pos, end)
        elif head == expect.DEALLOCATED:
            self._cut(data, pos, pos).append(_DEALLOCATED)

    # -- ends of queries and transactions ------------------------------------------------------

    def _complete(
        self, server: ServerConnection, data: bytes, pos: int, end: int, now: float
    ) -> None:
        """CommandComplete. Its tag is the one sure sign of what a statement did."""
        tag = data[pos:end]
        if not tag:
            raise ServerProtocolError("CommandComplete from the server without a tag")
        rows = COMMON.get(tag)
        if rows is None:
            rows = rows_of(tag)
            self._note_tag(server, tag)
        if rows and server.queries:
            server.queries[0].rows += rows
        if server.expected and server.expected[0] == m.EXECUTE:
            self._executed(server, now)

    def _note_tag(self, server: ServerConnection, tag: bytes) -> None:
        """What has changed, for us."""
        first = tag[0]
        if first == 0x52:  # R
            self._has_rolled_back = tag.startswith(b"ROLLBACK\0")
            if tag.startswith(b"RESET\0"):
                # the server is asked what is left of what we carried over
                self.values.append(RESET)
        elif first == 0x43:  # C
            self._has_rolled_back = False
            if tag.startswith(b"CREATE VIEW\0"):  # OR REPLACE, perhaps
                self._note_changed_tables()
        elif first == 0x44:  # D
            self._note_discarded(server, tag)
        elif first == 0x41:  # A
            self._note_changed_tables()

    def _note_discarded(self, server: ServerConnection, tag: bytes) -> None:
        if tag.startswith(b"DELETE"):
            return
        if tag.startswith(b"DROP "):
            self._note_changed_tables()
            return
        if tag.startswith(b"DEALLOCATE\0"):
            server.is_dirty = True  # it may have been one of ours
            return
        is_all = tag.startswith(b"DISCARD ALL\0")
        if is_all or tag.startswith(b"DEALLOCATE ALL\0"):
            if server.undo:
                server.is_dirty = True  # what is prepared behind it will not be in our books
            server.prepared.clear()
            self._statements.forget_named()
        if is_all:  # undoes whatever pinned, and our settings too: the server is asked
            if len(server.expected) <= 1:
                server.effects &= ~(UNNAMED | LOAD)  # which nobody can be asked for
            server.effects |= SETTING | UNDO
            self._requests.resets |= {b"all"}
            self.values.append(RESET)

    def _note_changed_tables(self) -> None:
        """What is prepared from now on must not share a plan that may be out of date."""
        self._has_changed_tables = True
        self._statements.renew()

    def _executed(self, server: ServerConnection, now: float) -> None:
        server.expected.popleft()
        self._query_done(server, now)

    def _query_done(self, server: ServerConnection, now: float) -> None:
        statement = server.queries.popleft()
        server.statement = statement
        took = now - server.query_started
        if server.query_is_slow:
            server.query_is_slow = False
        elif took >= self._threshold:
            self._observer.query_slow(statement)
        self._observer.query_done(statement, took)
        server.query_started = now  # the next one, if it waits already, begins here

    def _ready(self, server: ServerConnection, status: int, now: float) -> None:
        expected = server.expected
        head = expected.popleft() if expected else 0
        if (
            head == m.QUERY
            or head == m.FUNCTION_CALL
            or head == expect.REFUSED_QUERY
            or head == expect.DEALLOCATED
        ):
            self._query_done(server, now)
            if head == expect.REFUSED_QUERY:
                server.refusals.popleft()
        elif head == expect.OUR_SYNC:
            self._requests.has_failed = server.cycle_failed
        elif head != m.SYNC:
            raise ServerProtocolError("ReadyForQuery from the server answers no request")
        server.tx_status = status
        server.status_since = now
        server.copy_in = False  # whatever became of it: the next one has its own CopyInResponse
        if status == m.IDLE:
            if server.tx_started != 0.0:
                committed = not (server.cycle_failed or self._has_rolled_back)
                self._observer.transaction_done(committed, now - server.tx_started)
                server.tx_started = now if server.queries else 0.0
            if self._has_changed_tables:  # only now for the others
                self._has_changed_tables = False
                self._statements.renew()
        elif status != m.IN_TRANSACTION and status != m.FAILED:
            raise ServerProtocolError(f"unknown transaction status {status} from the server")
        server.cycle_failed = False
        self._has_rolled_back = False
        while expected and expected[0] == expect.COPY_END:
            expected.popleft()  # of the Query that has just ended
            server.automatic -= 1
        self.is_at_rest = not expected

    def _error(
        self, server: ServerConnection, body: bytes, now: float, origin: ErrorOrigin
    ) -> None:
        sqlstate = m.sqlstate_of(body)
        statement = expect.failing(server, self._statements.unnamed)
        self._observer.query_failed(
            Failure(
                origin, sqlstate, message_of(body, statement), self._client.application, statement
            )
        )
        server.cycle_failed = True
        server.copy_in = False
        if b"\0VFATAL\0" in body or b"\0VPANIC\0" in body:
            server.last_error = sqlstate
            self.said_fatal = True
        if b"\0RRevalidateCachedQuery\0" in body:
            self._statements.renew()
        expected = server.expected
        if expected and expected[0] not in _ENDS_BY_ITSELF:
            has_parse, has_ours = m.PARSE in expected, expect.OUR_UNNAMED_PARSE in expected
            dropped = expect.skip_to_sync(server)
            if m.PARSE not in expected and expect.OUR_UNNAMED_PARSE not in expected:
                if has_parse:
                    self._statements.forget_unnamed()  # the server did, or never had it
                elif has_ours:
                    self._statements.miss_unnamed()
            if dropped:
                # The first of them failed, or could not begin; the others never ran.
                self._query_done(server, now)
                for _ in range(dropped - 1):
                    server.queries.popleft()
            if self._statements.awaits_check is not None and expect.OUR_DESCRIBE not in expected:
                self.values.append(CHECKED)

    def abandon(self, server: ServerConnection, now: float) -> None:
        """The lease ends in the middle: account for what was under way."""
        if server.queries:
            self._query_done(server, now)
            server.queries.clear()
        if server.tx_started != 0.0:
            self._observer.transaction_done(False, now - server.tx_started)
            server.tx_started = 0.0
        self.held = b""
        self.incoming = 0
