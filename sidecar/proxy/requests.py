"""From client to server: frame, inspect, forward.

Owns an unfinished message, and what each message does to the ledger (``proxy.expect``). Bytes in which
nothing must change are forwarded as they came, in one write. Of a message only the beginning is
needed, so that a long one is passed on in pieces. What a message has to do with prepared
statements is decided in ``statements``, what is refused in ``policy``.
"""

from typing import Final

from sidecar.config import PoolConfig
from sidecar.errors import ClientProtocolError
from sidecar.events import PoolMode, PoolObserver
from sidecar.pool.server import ServerConnection
from sidecar.protocol import messages as m
from sidecar.proxy import expect
from sidecar.proxy.pins import suspect
from sidecar.proxy.policy import Policy
from sidecar.proxy.prepared import PreparedTable
from sidecar.proxy.rewriter import Rewriter
from sidecar.proxy.statements import Statements, Unsure, end_of
from sidecar.proxy.texts import Texts
from sidecar.sql import DEALLOCATE, NONE, UNKNOWN, Query, deallocated
from sidecar.work import Statement

INSPECTED: Final = 16 * 1024
"""Bytes of a message that are gathered before it is looked at and passed on in pieces."""

MAX_STATEMENT: Final = 1024 * 1024
"""Bytes; up to here a statement is kept whole, to prepare it again elsewhere."""

_REST: Final = m.message(m.DESCRIBE, b"P\0") + m.message(m.EXECUTE, bytes(5)) + m.SYNC_MESSAGE
"""What libpq and others send behind a Bind: all of the unnamed portal's rows, and Sync."""

_REST_SIZE: Final = len(_REST)
_REST_REPLIES: Final = (m.DESCRIBE, m.EXECUTE, m.SYNC)

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


def check_header(kind: int, length: int) -> None:
    """Raises ClientProtocolError for what no client message can begin with."""
    if kind not in _KNOWN:
        raise ClientProtocolError(f"invalid frontend message type {kind}")
    if not 4 <= length <= (_LONGEST if kind in _LONG else _LONGEST_OTHERS):
        raise ClientProtocolError(f"invalid message length: {length} bytes")


class Requests:
    """The requests of one client."""

    __slots__ = (
        "_has_bound",
        "_policy",
        "_renames",
        "_rewriter",
        "_texts",
        "awaits_sync",
        "has_failed",
        "passing",
        "resets",
        "rest",
        "statements",
        "wants_to_leave",
    )

    def __init__(
        self,
        texts: Texts,
        table: PreparedTable,
        config: PoolConfig,
        observer: PoolObserver,
    ) -> None:
        self._texts: Final = texts
        self._policy: Final = Policy(config)
        self._renames: Final = config.mode is not PoolMode.SESSION
        self._rewriter: Final = Rewriter()
        self.statements: Final = Statements(
            table,
            self._rewriter,
            observer,
            renames=self._renames,
            limit=config.max_prepared_statements,
        )
        self._has_bound = False  # a portal, since the last Sync
        self.awaits_sync = False  # our own Sync is on its way
        self.has_failed = False  # before it: the client expects to be ignored up to its own Sync
        self.resets = NONE  # the settings that the client resets now, "all": every one
        self.rest = b""  # the beginning of an unfinished message
        self.passing = 0  # bytes of a message that are still to come
        self.wants_to_leave = False  # Terminate was seen

    def begin_lease(self) -> None:
        self.statements.has_unnamed = False
        self._has_bound = False

    def forward(self, server: ServerConnection, data: bytes, now: float) -> None:
        """Inspect and write to the server. Raises ClientProtocolError; nothing was written then."""
        pos = 0
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
        except Unsure as exc:
            pos = exc.args[0]
        done = min(pos, size)
        if self._rewriter.pieces is not None:
            server.write(self._rewriter.take(data, done))
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
        statements = self.statements
        while size - pos >= 5:
            kind = data[pos]
            length = data[pos + 4]
            if data[pos + 1] or data[pos + 2] or data[pos + 3]:
                length = m.length_at(data, pos)
            end = pos + 1 + length
            if end > size or length < 4:
                check_header(kind, length)
                if self._waits_for_more(server, kind, length, data, pos, size):
                    break
            if server.is_skipping and kind != m.SYNC and kind != m.TERMINATE:
                check_header(kind, length)  # the server ignores it, after an error
            elif kind == m.QUERY:
                # compiled, a slice must not end before it begins
                text = data[pos + 5 : end - 1] if length > 4 else b""
                query = self._texts.query(text)
                if (query.effects or self._policy.refuses_blocks) and self._replaces(
                    server, query, text, data, pos, end
                ):
                    self._run(server, query.statement, now)
                else:
                    self._add_query(server, m.QUERY, query, now)
            elif kind == m.BIND:
                self._has_bound = True
                statements.bind(server, data, pos, end)
                # at one look: 0.5 us of 7
                if size - end == _REST_SIZE and not server.copy_in and data[end:] == _REST:
                    expected.extend(_REST_REPLIES)
                    self._run(server, statements.bound, now)
                    self._has_bound = False
                    return size
            elif kind == m.EXECUTE:
                expected.append(m.EXECUTE)
                self._has_bound = True
                self._run(server, statements.bound, now)
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
                statements.describe(server, data, pos, end)
            elif kind == m.CLOSE:
                statements.close(server, data, pos, end)
            elif kind == m.FUNCTION_CALL:
                expected.append(m.FUNCTION_CALL)
                self._run(server, self._texts.function_call, now)
            elif kind == m.COPY_DONE or kind == m.COPY_FAIL:
                server.copy_in = False
                if expected:
                    expected.append(expect.COPY_END)
                    server.automatic += 1
            elif kind == m.TERMINATE:
                self.wants_to_leave = True
                break
            elif kind != m.COPY_DATA:
                check_header(kind, length)
            pos = end
        return pos

    def _waits_for_more(
        self, server: ServerConnection, kind: int, length: int, data: bytes, pos: int, size: int
    ) -> bool:
        """Whether a message that goes on beyond ``size`` is kept; else it is passed on in pieces."""
        if size - pos < INSPECTED and kind != m.COPY_DATA:
            return True
        if kind == m.PARSE and self._renames:
            if length <= MAX_STATEMENT:
                return True
            if data[pos + 5] != 0:
                raise ClientProtocolError(
                    f"named statement of {length} bytes; at most {MAX_STATEMENT} are allowed",
                    sqlstate="54000",
                )
        if kind in (m.QUERY, m.PARSE):
            # its end is not looked at: anything may be in it
            server.is_dirty = True
            server.effects |= UNKNOWN
        return False

    def _sync(self, server: ServerConnection, data: bytes, pos: int, end: int) -> None:
        """A client that prepares and flushes (asyncpg's ``prepare``) may come back in an hour.

        Nothing has been bound, so a Sync of our own changes nothing it could see, and the lease
        ends. What it sends next waits until that is done: see ``awaits_sync``.
        """
        if server.tx_status != m.IDLE or server.effects or not server.expected:
            return
        self._rewriter.insert(data, end, m.SYNC_MESSAGE)
        server.expected.append(expect.OUR_SYNC)
        self.awaits_sync = True
        self.has_failed = False

    def _run(self, server: ServerConnection, statement: Statement, now: float) -> None:
        if not server.queries:
            server.query_started = now
            if server.tx_started == 0.0:
                server.tx_started = now
        server.queries.append(statement)

    def _add_query(self, server: ServerConnection, kind: int, query: Query, now: float) -> None:
        server.expected.append(kind)
        self._run(server, query.statement, now)
        if query.effects:
            suspect(server, query)
        if query.resets:
            self.resets |= query.resets
        statements = self.statements  # lose_unnamed, without a call
        statements.has_unnamed = False
        statements.unnamed_parse = None

    def _replaces(
        self, server: ServerConnection, query: Query, text: bytes, data: bytes, pos: int, end: int
    ) -> bool:
        """Of a Query with effects: send something else to the server, where it must not get this."""
        refusal = self._policy.refusal(query, text)
        if refusal:
            self._rewriter.refuse_query(server, data, pos, end, refusal)
            self.statements.lose_unnamed()
            return True
        if (
            query.effects & DEALLOCATE
            and self._renames
            and not server.expected
            and server.tx_status != m.FAILED
            and self.statements.forget(deallocated(text))
        ):
            # The server may not have it, others may use it: an empty cycle does for the answer.
            self._rewriter.replace(data, pos, end, m.SYNC_MESSAGE)
            server.expected.append(expect.DEALLOCATED)
            return True
        return False

    def _parse(self, server: ServerConnection, data: bytes, pos: int, end: int) -> None:
        statements = self.statements
        parse = data[pos:end]
        last = statements.unnamed
        if (
            last is not None
            and not last.effects
            and parse == statements.unnamed_parse
            and not last.statement.is_retired
            and last.statement.shared is None
        ):  # the same again, which is known at a comparison: 0.3 us less
            server.expected.append(m.PARSE)
            statements.has_unnamed = True
            return
        is_unnamed = len(parse) > 5 and parse[5] == 0
        name_end = pos + 5 if is_unnamed else end_of(data, pos + 5, end)
        text_end = data.find(0, name_end + 1, end)
        text = data[name_end + 1 : text_end] if text_end >= 0 else data[name_end + 1 : end]
        query = self._texts.parse(text, name_end != pos + 5)
        if query.resets:
            self.resets |= query.resets
        if (query.effects or self._policy.refuses_blocks) and self._replaces_parse(
            server, query, text, data, pos, end
        ):
            return
        if is_unnamed:
            server.expected.append(m.PARSE)
            statements.unnamed = query  # parse_unnamed, without a call
            statements.unnamed_parse = parse if end <= len(data) else None
            statements.has_unnamed = True
        else:
            statements.parse_named(server, query, data, pos, name_end, end)

    def _replaces_parse(
        self, server: ServerConnection, query: Query, text: bytes, data: bytes, pos: int, end: int
    ) -> bool:
        """As ``_replaces``, of a Parse."""
        refusal = self._policy.refusal(query, text)
        if refusal:
            self._rewriter.refuse_parse(server, data, pos, end, refusal)
            self.statements.forget_unnamed()
            return True
        if not (query.effects & DEALLOCATE and self._renames and data[pos + 5] == 0):
            return False
        return self.statements.deallocate(server, query, deallocated(text), data, pos, end)
