"""One client's prepared statements, the named ones and the unnamed one.

Pure. Owns which statement a name of the client's means, and what has to go before a message that uses
one: a Parse where this connection lacks it, a Close where that makes room, our name for the client's.
What clients of a pool share of their statements is in ``prepared``.
"""

from typing import Final

from sidecar.errors import ClientProtocolError
from sidecar.events import Operation, PoolObserver
from sidecar.pool.server import ServerConnection
from sidecar.protocol import messages as m
from sidecar.proxy import expect, policy, prepared
from sidecar.proxy.pins import suspect
from sidecar.proxy.prepared import Prepared
from sidecar.proxy.rewriter import Rewriter
from sidecar.sql import UNKNOWN_STATEMENT, Query

# Close of a statement that no server connection has: the server answers CloseComplete all the
# same, in its turn. The real statement stays, other clients may use it.
_CLOSE_NOTHING: Final = m.close_statement(prepared.PREFIX + b"none")
_CLOSE_UNNAMED: Final = m.close_statement(b"")


_UTILITY: Final = int(Operation.UTILITY)


class Unsure(Exception):
    """Before this message goes on, the server has to confirm what the client was told."""


class Statements:
    """The prepared statements of one client."""

    __slots__ = (
        "_limit",
        "_named",
        "_observer",
        "_renames",
        "_rewriter",
        "_table",
        "awaits_check",
        "awaits_outcome",
        "bound",
        "dialect",
        "has_unnamed",
        "unnamed",
        "unnamed_parse",
    )

    def __init__(
        self,
        table: prepared.PreparedTable,
        rewriter: Rewriter,
        observer: PoolObserver,
        *,
        renames: bool,
        limit: int,
    ) -> None:
        """``renames``: they must be found on any connection. ``limit``: of one connection."""
        self._table: Final = table
        self._rewriter: Final = rewriter
        self._observer: Final = observer
        self._renames: Final = renames
        self._limit: Final = limit
        self._named: dict[bytes, Prepared] = {}
        self.unnamed: Query | None = None
        self.unnamed_parse: bytes | None = None  # its Parse, to repeat elsewhere
        self.has_unnamed = False  # this connection has it
        self.bound = UNKNOWN_STATEMENT  # by the last Bind
        self.dialect = b""  # of the client's settings
        self.awaits_outcome = False  # of earlier cycles, and what depends on it waits
        # our Describe of it is on its way: what uses it waits
        self.awaits_check: Prepared | None = None

    def __len__(self) -> int:
        """Those that the client has names for."""
        return len(self._named)

    def forget_named(self) -> None:
        """The client said DEALLOCATE ALL or DISCARD ALL."""
        self._named.clear()

    def forget(self, name: bytes) -> bool:
        """The client said DEALLOCATE. False if it has no such statement."""
        return self._named.pop(name, None) is not None

    def renew(self) -> None:
        """The server has found one of its plans out of date. Others will be, too."""
        self._table.renew()

    def miss_unnamed(self) -> None:
        """Our Parse of it, on this connection, was skipped."""
        self.has_unnamed = False

    def lose_unnamed(self) -> None:
        """A Query takes it away (54.2.3)."""
        self.has_unnamed = False
        self.unnamed_parse = None

    def forget_unnamed(self) -> None:
        """The unnamed statement is gone, or was never made."""
        self.unnamed = None
        self.lose_unnamed()

    # -- the client's messages -----------------------------------------------------------------

    def parse_unnamed(self, query: Query, parse: bytes | None) -> None:
        """``parse``: the whole message; None if it was too long to be kept."""
        self.unnamed = query
        self.unnamed_parse = parse
        self.has_unnamed = True

    def parse_named(
        self, server: ServerConnection, query: Query, data: bytes, pos: int, stop: int, end: int
    ) -> None:
        """``stop``: where the statement's name ends."""
        name = data[pos + 5 : stop]
        definition = data[stop + 1 : end]
        if server.is_odd:
            statement = self._table.unshared(definition, self.dialect, query)
        else:
            statement = self._table.intern(definition, self.dialect, query)
        if not self._renames:
            self._named[name] = statement
            server.expected.append(m.PARSE)
            return
        before = self._named.get(name)
        if server.undo or server.undoes:
            self._await_outcome(server, name, before or statement, data, pos)
        if before is not None:
            # The server must refuse this as on a direct connection (42P05): have it try.
            before = self._ensure(server, name, before, data, pos)
            self._rewriter.replace(data, pos, end, m.parse(before.name, definition))
            server.expected.append(expect.PARSE_TAKEN)
            server.refusals.append(name)
            return
        is_new = not prepared.touch(server, statement)
        if not is_new and not server.copy_in:
            if expect.has_cycles(server):
                self._wait(data, pos)  # an earlier one may fail, or end, the transaction
            if server.tx_status == m.FAILED and query.operation != Operation.TRANSACTION:
                # The server has to refuse it (25P02), as on a direct connection.
                self._rewriter.replace(data, pos, end, statement.parse)
                server.expected.append(expect.PARSE_TAKEN)
                server.refusals.append(name)
                return
        self._named[name] = statement
        if not is_new:
            self._observer.parsed(True)
            self._rewriter.replace(data, pos, end, b"")
            server.expected.append(expect.FAKE_PARSE)
            server.automatic += 1
        else:
            self._observer.parsed(False)
            self._make_room(server, data, pos)
            self._rewriter.replace(data, pos, end, statement.parse)
            server.prepared[statement] = None
            server.expected.append(expect.PARSE_NAMED)
        server.undo.append((self._named, name, statement))
        if is_new and statement.shape is None:
            self._describe_ourselves(server, statement, data, end)

    def deallocate(
        self, server: ServerConnection, query: Query, name: bytes, data: bytes, pos: int, end: int
    ) -> bool:
        """An unnamed Parse whose text is DEALLOCATE. False if the client has no such statement."""
        statement = self._named.get(name)
        if server.undo or server.undoes:
            self._await_outcome(server, name, statement, data, pos)
        if statement is None:
            return False
        statement = self._ensure(server, name, statement, data, pos)
        del self._named[name]
        instead = m.parse(b"", b'DEALLOCATE "%b"\0\0\0' % statement.name)
        self._rewriter.replace(data, pos, end, instead)
        server.expected.append(m.PARSE)
        server.is_dirty = True  # whether it will have been executed, our books do not know
        self.parse_unnamed(query, instead)
        return True

    def bind(self, server: ServerConnection, data: bytes, pos: int, end: int) -> None:
        query = self.unnamed
        if (
            query is not None
            and self.has_unnamed
            and end - pos > 6
            and data[pos + 5] == 0
            and data[pos + 6] == 0
        ):
            # the common case, without a call: unnamed portal, unnamed statement, and it is there
            self.bound = query.statement
            if query.effects:
                suspect(server, query)
        else:
            # behind the portal's, which mostly has none
            is_unnamed = end - pos > 5 and data[pos + 5] == 0
            name = (pos + 5 if is_unnamed else end_of(data, pos + 5, end)) + 1
            self._use(server, data, pos, end, name)
        server.expected.append(m.BIND)

    def describe(self, server: ServerConnection, data: bytes, pos: int, end: int) -> None:
        if end - pos > 5 and data[pos + 5] == 0x53:  # S: a statement, not a portal
            self._use(server, data, pos, end, pos + 6)
        server.expected.append(m.DESCRIBE)

    def close(self, server: ServerConnection, data: bytes, pos: int, end: int) -> None:
        is_statement = data.startswith(b"S", pos + 5, end)
        name = data[pos + 6 : end_of(data, pos + 6, end)]
        if not is_statement or not name or not self._renames:
            server.expected.append(m.CLOSE)
            if is_statement and not name:
                self.forget_unnamed()
            return
        if server.undo or server.undoes:
            self._await_outcome(server, name, self._named.get(name), data, pos)
        self._rewriter.replace(data, pos, end, _CLOSE_NOTHING)
        statement = self._named.pop(name, None)
        if statement is None:
            server.expected.append(m.CLOSE)
        else:
            server.expected.append(expect.CLOSE_NAMED)
            server.undo.append((self._named, name, statement))

    # -- what has to go before them ------------------------------------------------------------

    def _use(self, server: ServerConnection, data: bytes, pos: int, end: int, start: int) -> None:
        """A Bind or Describe names a statement at ``start``: make sure that it is there."""
        stop = end_of(data, start, end)
        if start == stop:
            self._use_unnamed(server, data, pos)
            return
        name = data[start:stop]
        statement = self._named.get(name)
        if self._renames and (server.undo or server.undoes):
            self._await_outcome(server, name, statement, data, pos)
        if statement is not None:
            self.bound = statement.query.statement
            if statement.query.effects:
                suspect(server, statement.query)
        if not self._renames:
            return
        if statement is not None:
            if statement.is_stale:
                # as on a connection of the client's own, it fails until it is prepared anew
                self._rewriter.refuse_parse(server, data, pos, pos, policy.STALE_PLAN)
            else:
                statement = self._ensure(server, name, statement, data, pos)
            name_there = statement.name
        elif name.startswith(prepared.PREFIX):
            name_there = name + b"?"  # not this client's: the server shall not find it
        else:
            return
        header = m.HEADER.pack(data[pos], end - pos - 1 + len(name_there) - len(name))
        self._rewriter.replace(data, pos, stop, header + data[pos + 5 : start] + name_there)

    def _use_unnamed(self, server: ServerConnection, data: bytes, pos: int) -> None:
        query = self.unnamed
        if query is not None:
            self.bound = query.statement
            if query.effects:
                suspect(server, query)
        if self.has_unnamed or not self._renames:
            return
        if self.unnamed_parse is not None:
            # prepared in an earlier cycle, on another connection
            self._rewriter.insert(data, pos, self.unnamed_parse)
            server.expected.append(expect.OUR_UNNAMED_PARSE)
            self.has_unnamed = True
        else:
            # this client has none: it must not find what another one has left
            self._rewriter.insert(data, pos, _CLOSE_UNNAMED)
            server.expected.append(expect.OUR_UNNAMED_CLOSE)

    def _ensure(
        self, server: ServerConnection, name: bytes, statement: Prepared, data: bytes, pos: int
    ) -> Prepared:
        """Have the statement on this connection. Returns it, or its like under other settings.

        Raises Unsure if the message at ``pos`` has to wait.
        """
        if prepared.touch(server, statement):
            return statement
        if server.is_odd or statement.dialect != self.dialect:
            # It would be parsed by other settings than those whom it is shared with had.
            other = self._variant(server, statement)
            self._named[name] = statement = other
            if prepared.touch(server, other):
                return other
        self._observer.parsed(False)
        self._make_room(server, data, pos)
        self._rewriter.insert(data, pos, statement.parse)
        server.prepared[statement] = None
        server.expected.append(expect.OUR_PARSE)
        server.undo.append((None, b"", statement))
        self._describe_ourselves(server, statement, data, pos)
        if statement.shape is not None:
            # On this connection it is prepared later than the client was told its types: only when
            # they are still the same may it be used.
            self._rewriter.insert(data, pos, m.FLUSH_MESSAGE)
            self.awaits_check = statement
            raise Unsure(pos)
        return statement

    def _await_outcome(
        self, server: ServerConnection, name: bytes, at: Prepared | None, data: bytes, pos: int
    ) -> None:
        """Raises Unsure if the message at ``pos`` has to wait: in a pipeline, a cycle before it may
        fail, and what that prepared or closed is then not what our books say."""
        if not server.expected or server.copy_in:  # nothing is open, or the server waits for us
            server.undoes = server.undoes and server.copy_in
            return
        victim = prepared.oldest(server, self._limit)
        if server.undoes or expect.is_open(server, name, (at, victim)):
            self._wait(data, pos)

    def _wait(self, data: bytes, pos: int) -> None:
        self._rewriter.insert(data, pos, m.FLUSH_MESSAGE)
        self.awaits_outcome = True
        raise Unsure(pos)

    def checked(self) -> None:
        """The server has answered: what waits may go on, or is refused if the types have changed."""
        statement = self.awaits_check
        assert statement is not None
        self.awaits_check = None
        if statement.is_stale:
            self.renew()

    def _variant(self, server: ServerConnection, statement: Prepared) -> Prepared:
        table, dialect = self._table, self.dialect
        if not server.is_odd:
            other = table.intern(statement.definition, dialect, statement.query)
            if other.shape is None or other.shape == statement.shape:
                other.shape = statement.shape
                return other
        other = table.unshared(statement.definition, dialect, statement.query)
        other.shape = statement.shape
        return other

    def _make_room(self, server: ServerConnection, data: bytes, pos: int) -> None:
        oldest = prepared.oldest(server, self._limit)
        if oldest is not None:
            self._rewriter.insert(data, pos, m.close_statement(oldest.name))
            del server.prepared[oldest]
            server.expected.append(expect.OUR_CLOSE)
            server.undo.append((None, b"", oldest))

    def _describe_ourselves(
        self, server: ServerConnection, statement: Prepared, data: bytes, pos: int
    ) -> None:
        if statement.query.operation == _UTILITY:
            return  # FETCH, EXECUTE, SHOW: their columns are another's matter, and may change
        self._rewriter.insert(data, pos, m.describe_statement(statement.name))
        server.expected.append(expect.OUR_DESCRIBE)
        server.described.append(statement)


def end_of(data: bytes, start: int, end: int) -> int:
    """Where the string that begins here ends. Raises ClientProtocolError if it does not."""
    stop = data.find(0, start, end)
    if stop < 0:
        raise ClientProtocolError("invalid message: a string has no end")
    return stop
