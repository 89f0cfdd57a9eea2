"""From client to server: frame, inspect, rename, forward.

Owns what a client's messages leave behind between cycles: its prepared statements and an
unfinished message. Bytes in which nothing must change are forwarded as they came, in one write.
Of a message only the beginning is needed, so that a long one is passed on in pieces.
"""

from collections import OrderedDict
from typing import Final

from sidecar.errors import ClientProtocolError
from sidecar.events import Operation, PoolObserver
from sidecar.pool.server import ServerConnection
from sidecar.protocol import messages as m
from sidecar.proxy import expect, policy, prepared
from sidecar.proxy.prepared import Prepared
from sidecar.sql import (
    DEALLOCATE,
    DIALECT,
    LASTING,
    LOAD,
    NONE,
    SETTING,
    TEMP_TABLE,
    UNKNOWN,
    Query,
    begins_block,
    classify,
    deallocated,
)

INSPECTED: Final = 16 * 1024
"""Bytes of a message that are gathered before it is looked at and passed on in pieces."""

MAX_STATEMENT: Final = 1024 * 1024
"""Bytes; up to here a statement is kept whole, to prepare it again elsewhere."""

_CACHED_TEXT: Final = 4096  # bytes; longer texts are classified each time
_CACHED_TEXTS: Final = 2048

_unpack: Final = m.HEADER.unpack_from

_KNOWN: Final = frozenset(
    {
        *(m.QUERY, m.PARSE, m.BIND, m.DESCRIBE, m.EXECUTE, m.CLOSE, m.SYNC, m.FLUSH),
        *(m.FUNCTION_CALL, m.COPY_DATA, m.COPY_DONE, m.COPY_FAIL, m.TERMINATE),
    }
)

_LONG: Final = frozenset({m.QUERY, m.PARSE, m.BIND, m.FUNCTION_CALL, m.COPY_DATA})
_LONGEST: Final = 0x3FFFFFFF  # bytes; PostgreSQL's PQ_LARGE_MESSAGE_LIMIT
_LONGEST_OTHERS: Final = 10_000
"""Bytes; its PQ_SMALL_MESSAGE_LIMIT. Less than ``INSPECTED``: these are always looked at whole."""

# Close of a statement that no server connection has: the server answers CloseComplete all the
# same, in its turn. The real statement stays, other clients may use it.
_CLOSE_NOTHING: Final = m.close_statement(prepared.PREFIX + b"none")
_CLOSE_UNNAMED: Final = m.close_statement(b"")

# In place of a statement that the pool refuses: certain to fail, whatever the state, and found in
# the server's log by those who wonder. What the client is told is ours (``replies``).
_REFUSED: Final = b"REFUSED /* by pgsidecar: the client is told why */"


class TextCache:
    """Classification by text, least recently added first out. For the extended protocol, where
    texts come back; in simple mode the literals are part of the text and nothing would hit."""

    def __init__(self) -> None:
        self._known: OrderedDict[bytes, Query] = OrderedDict()

    def classify(self, text: bytes) -> Query:
        found = self._known.get(text)
        if found is None:
            found = classify(text)
            if len(text) <= _CACHED_TEXT:
                self._known[text] = found
                if len(self._known) > _CACHED_TEXTS:
                    self._known.popitem(last=False)
        return found


def check_header(kind: int, length: int) -> None:
    """Raises ClientProtocolError for what no client message can begin with."""
    if kind not in _KNOWN:
        raise ClientProtocolError(f"invalid frontend message type {kind}")
    if not 4 <= length <= (_LONGEST if kind in _LONG else _LONGEST_OTHERS):
        raise ClientProtocolError(f"invalid message length: {length} bytes")


class _Unsure(Exception):
    """Before this message goes on, the server has to confirm what the client was told."""


class Requests:
    """The requests of one client."""

    __slots__ = (
        "_cache",
        "_has_bound",
        "_has_unnamed",
        "_observer",
        "_operation",
        "_out",
        "_prepared",
        "_refused",
        "_refuses_blocks",
        "_renames",
        "_start",
        "_statement_limit",
        "_statements",
        "_unnamed",
        "_unnamed_parse",
        "awaits_check",
        "awaits_sync",
        "dialect",
        "has_failed",
        "passing",
        "refusal",
        "resets",
        "rest",
        "wants_to_leave",
    )

    def __init__(
        self,
        cache: TextCache,
        table: prepared.PreparedTable,
        *,
        renames: bool,
        statement_limit: int,
        observer: PoolObserver,
        refused: int = 0,
        refuses_blocks: bool = False,
    ) -> None:
        """``renames``: this client's statements must be found on any connection. ``refused``: effects
        that no statement may have, see ``sql``. ``refuses_blocks``: BEGIN is refused."""
        self._observer = observer
        self._refused = refused
        self._refuses_blocks = refuses_blocks
        self.refusal = b""  # the ErrorResponse for what was refused last
        self._cache = cache
        self._prepared = table
        self._renames = renames
        self._statement_limit = statement_limit
        self._statements: dict[bytes, Prepared] = {}
        self._unnamed: Query | None = None
        self._unnamed_parse: bytes | None = None  # its Parse, to repeat elsewhere
        self._has_unnamed = False  # this connection has it
        self._has_bound = False  # a portal, since the last Sync
        self.awaits_sync = False  # our own Sync is on its way
        self.awaits_check: Prepared | None = None  # our Describe of it is, and what uses it waits
        self.has_failed = False  # before it: the client expects to be ignored up to its own Sync
        self._operation = int(Operation.OTHER)  # of the last Bind
        self._out: list[bytes] | None = None
        self._start = 0
        self.dialect = b""  # of the client's settings
        self.resets = NONE  # the settings that the client resets now, "all": every one
        self.rest = b""  # the beginning of an unfinished message
        self.passing = 0  # bytes of a message that are still to come
        self.wants_to_leave = False  # Terminate was seen

    @property
    def statements(self) -> int:
        """Prepared statements that the client has names for."""
        return len(self._statements)

    def begin_lease(self) -> None:
        self._has_unnamed = False
        self._has_bound = False

    def forget_statements(self) -> None:
        """The client said DEALLOCATE ALL or DISCARD ALL."""
        self._statements.clear()

    def renew_statements(self) -> None:
        """The server has found one of its plans out of date. Others will be, too."""
        self._prepared.renew()

    def miss_unnamed(self) -> None:
        """Our Parse of it, on this connection, was skipped."""
        self._has_unnamed = False

    def forget_unnamed(self) -> None:
        """The unnamed statement is gone, or was never made."""
        self._unnamed = None
        self._unnamed_parse = None
        self._has_unnamed = False

    def forward(self, server: ServerConnection, data: bytes, now: float) -> None:
        """Inspect and write to the server. Raises ClientProtocolError; nothing was written then."""
        self._start = pos = 0
        size = len(data)
        if self.passing:
            if self.passing >= size:
                self.passing -= size
                server.mid_message = self.passing > 0
                server.write(data)
                return
            pos = self.passing
            self.passing = 0
        try:
            pos = self._inspect(server, data, pos, size, now)
        except _Unsure as exc:
            pos = exc.args[0]
        done = min(pos, size)
        if self._out is not None:
            self._out.append(data[self._start : done])
            server.write(b"".join(self._out))
            self._out = None
        elif done == size:
            server.write(data)
        elif done:
            server.write(data[:done])
        self.passing = pos - done
        server.mid_message = self.passing > 0
        if not self.passing and not self.wants_to_leave:
            self.rest = data[pos:]

    def _inspect(
        self, server: ServerConnection, data: bytes, pos: int, size: int, now: float
    ) -> int:
        """Look at every message. Returns where the next begins (beyond ``size``: it goes on)."""
        expected = server.expected
        kind: int  # declared: compiled, these are then plain integers
        length: int
        while size - pos >= 5:
            kind, length = _unpack(data, pos)
            end = pos + 1 + length
            if end > size or length < 4 or kind not in _KNOWN:
                check_header(kind, length)
                if size - pos < INSPECTED and kind != m.COPY_DATA:
                    break
                if kind == m.PARSE and self._renames:
                    if length <= MAX_STATEMENT:
                        break
                    if data[pos + 5] != 0:
                        raise ClientProtocolError(
                            f"named statement of {length} bytes; at most {MAX_STATEMENT} are allowed",
                            sqlstate="54000",
                        )
                if kind in (m.QUERY, m.PARSE):
                    # its end is not looked at: anything may be in it
                    server.is_dirty = True
                    server.effects |= UNKNOWN
            if server.is_skipping and kind != m.SYNC and kind != m.TERMINATE:
                pass  # the server ignores it, after an error
            elif kind == m.QUERY:
                # compiled, a slice must not end before it begins
                text = data[pos + 5 : end - 1] if length > 4 else b""
                query = classify(text)
                if (query.effects or self._refuses_blocks) and self._replaces(
                    server, query, text, data, pos, end
                ):
                    self._run(server, query.operation, now)
                else:
                    self._add_query(server, m.QUERY, query, now)
            elif kind == m.BIND:
                self._has_bound = True
                self._bind(server, data, pos, end)
            elif kind == m.EXECUTE:
                expected.append(m.EXECUTE)
                self._has_bound = True
                self._run(server, self._operation, now)
            elif kind == m.FLUSH:
                if self._renames and end == size and not self._has_bound:
                    self._sync(server, data, pos, end)
            elif kind == m.SYNC:
                self._has_bound = False
                server.is_skipping = False
                if not server.copy_in:
                    expected.append(m.SYNC)
            elif kind == m.PARSE:
                self._parse(server, data, pos, end)
            elif kind == m.DESCRIBE:
                self._describe(server, data, pos, end)
            elif kind == m.CLOSE:
                self._close(server, data, pos, end)
            elif kind == m.FUNCTION_CALL:
                expected.append(m.FUNCTION_CALL)
                self._run(server, int(Operation.OTHER), now)
            elif kind == m.COPY_DONE or kind == m.COPY_FAIL:
                server.copy_in = False
                if expected:
                    expected.append(expect.COPY_END)
                    server.automatic += 1
            elif kind == m.TERMINATE:
                self.wants_to_leave = True
                break
            pos = end
        return pos

    def _sync(self, server: ServerConnection, data: bytes, pos: int, end: int) -> None:
        """A client that prepares and flushes (asyncpg's ``prepare``) may come back in an hour.

        Nothing has been bound, so a Sync of our own changes nothing it could see, and the lease
        ends. What it sends next waits until that is done: see ``awaits_sync``.
        """
        if server.tx_status != m.IDLE or server.effects or not server.expected:
            return
        self._replace(data, pos, end, data[pos:end] + m.SYNC_MESSAGE)
        server.expected.append(expect.OUR_SYNC)
        self.awaits_sync = True
        self.has_failed = False

    def _run(self, server: ServerConnection, operation: int, now: float) -> None:
        if not server.operations:
            server.query_started = now
            if server.tx_started == 0.0:
                server.tx_started = now
        server.operations.append(operation)

    def _add_query(self, server: ServerConnection, kind: int, query: Query, now: float) -> None:
        server.expected.append(kind)
        self._run(server, query.operation, now)
        if query.effects:
            _note_effects(server, query)
        if query.resets:
            self.resets |= query.resets
        self._has_unnamed = False  # a Query takes it away (54.2.3)
        self._unnamed_parse = None

    def _replaces(
        self, server: ServerConnection, query: Query, text: bytes, data: bytes, pos: int, end: int
    ) -> bool:
        """Of a Query with effects: send something else to the server, where it must not get this."""
        if self._is_refused(query, text):
            self._replace(data, pos, end, m.query(_REFUSED))
            server.expected.append(expect.REFUSED_QUERY)
            self._has_unnamed = False
            self._unnamed_parse = None
            return True
        if (
            query.effects & DEALLOCATE
            and self._renames
            and not server.expected
            and server.tx_status != m.FAILED
            and self._statements.pop(deallocated(text), None) is not None
        ):
            # The server may not have it, others may use it: an empty cycle does for the answer.
            self._replace(data, pos, end, m.SYNC_MESSAGE)
            server.expected.append(expect.DEALLOCATED)
            return True
        return False

    def _is_refused(self, query: Query, text: bytes) -> bool:
        if self._refuses_blocks and begins_block(query, text):
            self.refusal = policy.NO_BLOCKS
            return True
        effects = query.effects & self._refused
        if not effects or query.effects == UNKNOWN:
            return False
        if effects == TEMP_TABLE and b"on commit drop" in text.lower():
            return False
        self.refusal = policy.no_pin(effects)
        return True

    # -- extended protocol ---------------------------------------------------------------------

    def _parse(self, server: ServerConnection, data: bytes, pos: int, end: int) -> None:
        name_end = _end_of(data, pos + 5, end)
        text_end = data.find(0, name_end + 1, end)
        text = data[name_end + 1 : text_end] if text_end >= 0 else data[name_end + 1 : end]
        query = self._cache.classify(text)
        if query.resets:
            self.resets |= query.resets
        if (query.effects or self._refuses_blocks) and self._replaces_parse(
            server, query, text, data, pos, end
        ):
            return
        if name_end == pos + 5:
            server.expected.append(m.PARSE)
            self._unnamed = query
            self._has_unnamed = True
            self._unnamed_parse = data[pos:end] if end <= len(data) else None
            return
        name = data[pos + 5 : name_end]
        definition = data[name_end + 1 : end]
        if server.is_odd:
            statement = self._prepared.unshared(definition, self.dialect, query)
        else:
            statement = self._prepared.intern(definition, self.dialect, query)
        if not self._renames:
            self._statements[name] = statement
            server.expected.append(m.PARSE)
            return
        before = self._statements.get(name)
        if before is not None:
            # The server must refuse this as on a direct connection (42P05): have it try.
            before = self._ensure(server, name, before, data, pos)
            self._replace(data, pos, end, m.parse(before.name, definition))
            server.expected.append(expect.PARSE_TAKEN)
            self.refusal = policy.name_is_taken(name)
            return
        self._statements[name] = statement
        is_new = not prepared.touch(server, statement)
        if not is_new:
            self._observer.parsed(True)
            self._replace(data, pos, end, b"")
            server.expected.append(expect.FAKE_PARSE)
            server.automatic += 1
        else:
            self._observer.parsed(False)
            self._make_room(server, data, pos)
            self._replace(data, pos, end, statement.parse)
            server.prepared[statement] = None
            server.expected.append(expect.PARSE_NAMED)
        server.undo.append((self._statements, name, statement))
        if is_new and statement.shape is None:
            self._describe_ourselves(server, statement, data, end)

    def _describe_ourselves(
        self, server: ServerConnection, statement: Prepared, data: bytes, pos: int
    ) -> None:
        self._piece(data, pos).append(m.describe_statement(statement.name))
        server.expected.append(expect.OUR_DESCRIBE)
        server.described.append(statement)

    def _replaces_parse(
        self, server: ServerConnection, query: Query, text: bytes, data: bytes, pos: int, end: int
    ) -> bool:
        """As ``_replaces``, of a Parse."""
        if self._is_refused(query, text):
            self._replace(data, pos, end, m.parse(b"", _REFUSED + b"\0\0\0"))
            server.expected.append(expect.REFUSED_PARSE)
            self.forget_unnamed()
            return True
        if not (query.effects & DEALLOCATE and self._renames and data[pos + 5] == 0):
            return False
        name = deallocated(text)
        statement = self._statements.get(name)
        if statement is None:
            return False
        statement = self._ensure(server, name, statement, data, pos)
        del self._statements[name]
        instead = m.parse(b"", b'DEALLOCATE "%b"\0\0\0' % statement.name)
        self._replace(data, pos, end, instead)
        server.expected.append(m.PARSE)
        server.is_dirty = True  # whether it will have been executed, our books do not know
        self._unnamed = query
        self._unnamed_parse = instead
        self._has_unnamed = True
        return True

    def _bind(self, server: ServerConnection, data: bytes, pos: int, end: int) -> None:
        query = self._unnamed
        if query is not None and self._has_unnamed and data.startswith(b"\0\0", pos + 5, end):
            # the common case, without a call: unnamed portal, unnamed statement, and it is there
            self._operation = query.operation
            if query.effects:
                _note_effects(server, query)
        else:
            name = _end_of(data, pos + 5, end) + 1  # behind the portal's
            self._use(server, data, pos, end, name)
        server.expected.append(m.BIND)

    def _describe(self, server: ServerConnection, data: bytes, pos: int, end: int) -> None:
        if data.startswith(b"S", pos + 5, end):  # a statement, not a portal
            self._use(server, data, pos, end, pos + 6)
        server.expected.append(m.DESCRIBE)

    def _close(self, server: ServerConnection, data: bytes, pos: int, end: int) -> None:
        is_statement = data.startswith(b"S", pos + 5, end)
        name = data[pos + 6 : _end_of(data, pos + 6, end)]
        if not is_statement or not name or not self._renames:
            server.expected.append(m.CLOSE)
            if is_statement and not name:
                self.forget_unnamed()
            return
        self._replace(data, pos, end, _CLOSE_NOTHING)
        statement = self._statements.pop(name, None)
        if statement is None:
            server.expected.append(m.CLOSE)
        else:
            server.expected.append(expect.CLOSE_NAMED)
            server.undo.append((self._statements, name, statement))

    def _use(self, server: ServerConnection, data: bytes, pos: int, end: int, start: int) -> None:
        """A Bind or Describe names a statement at ``start``: make sure that it is there."""
        stop = _end_of(data, start, end)
        if start == stop:
            self._use_unnamed(server, data, pos)
            return
        name = data[start:stop]
        statement = self._statements.get(name)
        if statement is not None:
            self._operation = statement.query.operation
            if statement.query.effects:
                _note_effects(server, statement.query)
        if not self._renames:
            return
        if statement is not None:
            if statement.is_stale:
                self._refuse_stale(server, data, pos)
            else:
                statement = self._ensure(server, name, statement, data, pos)
            name_there = statement.name
        elif name.startswith(prepared.PREFIX):
            name_there = name + b"?"  # not this client's: the server shall not find it
        else:
            return
        self._piece(data, pos).append(
            m.HEADER.pack(data[pos], end - pos - 1 + len(name_there) - len(name))
            + data[pos + 5 : start]
            + name_there
        )
        self._start = stop

    def _use_unnamed(self, server: ServerConnection, data: bytes, pos: int) -> None:
        query = self._unnamed
        if query is not None:
            self._operation = query.operation
            if query.effects:
                _note_effects(server, query)
        if self._has_unnamed or not self._renames:
            return
        if self._unnamed_parse is not None:
            # prepared in an earlier cycle, on another connection
            self._piece(data, pos).append(self._unnamed_parse)
            server.expected.append(expect.OUR_UNNAMED_PARSE)
            self._has_unnamed = True
        else:
            # this client has none: it must not find what another one has left
            self._piece(data, pos).append(_CLOSE_UNNAMED)
            server.expected.append(expect.OUR_UNNAMED_CLOSE)

    def _ensure(
        self, server: ServerConnection, name: bytes, statement: Prepared, data: bytes, pos: int
    ) -> Prepared:
        """Have the statement on this connection. Returns it, or its like under other settings.

        Raises _Unsure if the message at ``pos`` has to wait.
        """
        if prepared.touch(server, statement):
            return statement
        if server.is_odd or statement.dialect != self.dialect:
            # It would be parsed by other settings than those whom it is shared with had.
            other = self._variant(server, statement)
            self._statements[name] = statement = other
            if prepared.touch(server, other):
                return other
        self._observer.parsed(False)
        self._make_room(server, data, pos)
        self._piece(data, pos).append(statement.parse)
        server.prepared[statement] = None
        server.expected.append(expect.OUR_PARSE)
        server.undo.append((None, b"", statement))
        self._describe_ourselves(server, statement, data, pos)
        if statement.shape is not None:
            # On this connection it is prepared later than the client was told its types: only when
            # they are still the same may it be used.
            self._piece(data, pos).append(m.FLUSH_MESSAGE)
            self.awaits_check = statement
            raise _Unsure(pos)
        return statement

    def _variant(self, server: ServerConnection, statement: Prepared) -> Prepared:
        table, dialect = self._prepared, self.dialect
        if not server.is_odd:
            other = table.intern(statement.definition, dialect, statement.query)
            if other.shape is None or other.shape == statement.shape:
                other.shape = statement.shape
                return other
        other = table.unshared(statement.definition, dialect, statement.query)
        other.shape = statement.shape
        return other

    def _refuse_stale(self, server: ServerConnection, data: bytes, pos: int) -> None:
        """As on a connection of the client's own, the statement fails until it is prepared anew."""
        self._piece(data, pos).append(m.parse(b"", _REFUSED + b"\0\0\0"))
        server.expected.append(expect.REFUSED_PARSE)
        self.refusal = policy.STALE_PLAN

    def checked(self, server: ServerConnection) -> None:
        """The server has answered: what waits may go on, or is refused if the types have changed."""
        statement = self.awaits_check
        assert statement is not None
        self.awaits_check = None
        if statement.is_stale:
            self._prepared.renew()

    def _make_room(self, server: ServerConnection, data: bytes, pos: int) -> None:
        oldest = prepared.oldest(server, self._statement_limit)
        if oldest is not None:
            self._piece(data, pos).append(m.close_statement(oldest.name))
            del server.prepared[oldest]
            server.expected.append(expect.OUR_CLOSE)
            server.undo.append((None, b"", oldest))

    # -- rewriting -----------------------------------------------------------------------------

    def _piece(self, data: bytes, pos: int) -> list[bytes]:
        """The list of pieces to write, complete up to ``pos``."""
        out = self._out
        if out is None:
            out = self._out = []
        if self._start < pos:
            out.append(data[self._start : pos])
            self._start = pos
        return out

    def _replace(self, data: bytes, pos: int, end: int, instead: bytes) -> None:
        self._piece(data, pos).append(instead)
        self._start = end


def _note_effects(server: ServerConnection, query: Query) -> None:
    """What this query may leave behind; the server is asked when the transaction is over."""
    effects = query.effects & ~(DEALLOCATE | DIALECT)
    if query.effects & DIALECT:
        server.is_odd = True
    if effects & (LASTING | SETTING) or server.effects:
        server.effects |= effects
        if query.names:
            server.custom_settings |= query.names
        if effects & LOAD:
            server.age_limit = 0.0  # the library stays for as long as the backend does


def _end_of(data: bytes, start: int, end: int) -> int:
    """Where the string that begins here ends. Raises ClientProtocolError if it does not."""
    stop = data.find(0, start, end)
    if stop < 0:
        raise ClientProtocolError("invalid message: a string has no end")
    return stop
