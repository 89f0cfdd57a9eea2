"""What a transaction left behind on its server connection, as the server itself says.

Pure. ``sql`` suspects from a query's text; this asks the server, in one query, once the transaction
is over. So a rollback, ``ON COMMIT DROP``, ``UNLISTEN`` or a table that was dropped need no
bookkeeping: what is there pins the connection, what is not there does not. Settings are read with
their values, to be carried over to the client's next connection (``proxy.carrier``).
"""

from collections.abc import Mapping
from typing import Final

from sidecar import sql
from sidecar.errors import ServerProtocolError
from sidecar.events import PinReason
from sidecar.pool.server import MAX_LOGIN_MESSAGE, ServerConnection
from sidecar.protocol import messages as m
from sidecar.proxy import expect
from sidecar.proxy.settings import Settings, literal

REASONS: Final = (
    (sql.TEMP_TABLE, PinReason.TEMP_TABLE),
    (sql.LISTEN, PinReason.LISTEN),
    (sql.ADVISORY_LOCK, PinReason.ADVISORY_LOCK),
    (sql.CURSOR, PinReason.CURSOR),
    (sql.PREPARE, PinReason.PREPARE),
    (sql.ROLE, PinReason.SET),
    (sql.UNNAMED, PinReason.SET),
    (sql.UNCARRIED, PinReason.SET),
    (sql.LOAD, PinReason.SET),
)
"""Why an effect pins; the first one that is there is told."""

_LONGEST_VALUE: Final = 4096
"""Bytes of a setting's value that are carried along; with a longer one, the connection stays."""

_ANY_SETTING: Final = sql.SETTING | sql.UNCARRIED

# Of operators and functions only the server's own: the client's search_path may have others first.
_EQ: Final = b" OPERATOR(pg_catalog.=) "

_SETTINGS: Final = (
    b"SELECT 's', name, pg_catalog.substr(setting, 1, %d)"
    b" FROM pg_catalog.pg_settings WHERE source" + _EQ + b"'session'"
    b" AND name NOT IN ('transaction_isolation','transaction_read_only','transaction_deferrable')"
)

_QUESTIONS: Final = (
    (
        sql.LISTEN,
        b"SELECT 'l', '', '' WHERE EXISTS (SELECT FROM pg_catalog.pg_listening_channels())",
    ),
    (
        sql.TEMP_TABLE,
        b"SELECT 't', '', '' WHERE EXISTS (SELECT FROM pg_catalog.pg_class WHERE relnamespace"
        + _EQ
        + b"pg_catalog.pg_my_temp_schema()) OR EXISTS (SELECT FROM pg_catalog.pg_type WHERE"
        b" typnamespace" + _EQ + b"pg_catalog.pg_my_temp_schema()) OR EXISTS (SELECT FROM"
        b" pg_catalog.pg_proc WHERE pronamespace" + _EQ + b"pg_catalog.pg_my_temp_schema())",
    ),
    (
        sql.ADVISORY_LOCK,
        b"SELECT 'a', '', '' WHERE EXISTS (SELECT FROM pg_catalog.pg_locks WHERE locktype"
        + _EQ
        + b"'advisory' AND pid"
        + _EQ
        + b"pg_catalog.pg_backend_pid())",
    ),
    (sql.CURSOR, b"SELECT 'c', '', '' WHERE EXISTS (SELECT FROM pg_catalog.pg_cursors)"),
    (
        sql.PREPARE,
        b"SELECT 'p', '', '' WHERE EXISTS (SELECT FROM pg_catalog.pg_prepared_statements"
        b" WHERE from_sql)",
    ),
)
_ANSWERS: Final[Mapping[bytes, int]] = {
    b"l": sql.LISTEN,
    b"t": sql.TEMP_TABLE,
    b"a": sql.ADVISORY_LOCK,
    b"c": sql.CURSOR,
    b"p": sql.PREPARE,
    b"r": sql.ROLE,
}


def reason_of(effects: int) -> PinReason | None:
    """Why a connection on which these effects are there stays with its client; None: it does not."""
    for effect, reason in REASONS:
        if effects & effect:
            return reason
    return None


def suspect(server: ServerConnection, query: sql.Query) -> None:
    """What this query may leave behind; the server is asked when the transaction is over."""
    effects = query.effects & ~(sql.DEALLOCATE | sql.DIALECT)
    if query.effects & sql.DIALECT:
        server.is_odd = True
    if effects & sql.UNDO:
        server.undoes = True
    if effects & (sql.LASTING | sql.SETTING | sql.RESET) or server.effects:
        server.effects |= effects
        if query.names:
            server.custom_settings |= query.names
        if effects & sql.LOAD:
            server.age_limit = 0.0  # the library stays for as long as the backend does


def question(effects: int, names: frozenset[bytes], user: bytes, role: bytes) -> bytes:
    """The SQL that asks whether these effects are there.

    ``names``: settings that the server does not list. ``user`` and ``role``: who is nobody else than
    at the login.
    """
    parts = [part for effect, part in _QUESTIONS if effects & effect]
    if effects & _ANY_SETTING:
        parts.append(_SETTINGS % (_LONGEST_VALUE + 1))
        parts += [
            b"SELECT 's', %b, pg_catalog.substr(pg_catalog.current_setting(%b, true), 1, %d)"
            % (literal(name), literal(name), _LONGEST_VALUE + 1)
            for name in sorted(names)
        ]
    if effects & sql.ROLE:
        parts.append(
            b"SELECT 'r', '', '' WHERE pg_catalog.current_setting('role') OPERATOR(pg_catalog.<>) "
            + literal(role)
            + b" OR session_user OPERATOR(pg_catalog.<>) "
            + literal(user)
        )
    return b" UNION ALL ".join(parts) or b"SELECT '', '', '' WHERE false"


class Inquiry:
    """One such question, from sending it to its answer."""

    __slots__ = ("_effects", "_failed", "is_done", "news", "settings", "there")

    def __init__(self, server: ServerConnection, user: bytes, settings: Settings) -> None:
        """``user``: as whom the connection logged in. ``settings``: the client's, as far as known."""
        self._effects: Final[int] = server.effects
        self._failed = False
        self.is_done = False
        self.there = 0
        """The effects that are there."""
        self.settings: dict[bytes, bytes] | None = None
        """All settings of the session by name in lower case; None if they were not asked for."""
        self.news: list[bytes] = []
        """Messages for the client that came in between."""
        names = server.custom_settings.union(name for name in settings.values if b"." in name)
        text = question(self._effects, names, user, settings.values.get(b"role", b"none"))
        if self._effects & _ANY_SETTING:
            self.settings = {}
        server.expected.append(expect.SETUP)
        server.write(m.query(text))

    def take_reply(self, server: ServerConnection, data: bytes) -> int:
        """Read the answer; ``is_done`` at its end.

        Returns the position behind what was read. Raises ServerProtocolError.
        """
        pos = 0
        while len(data) - pos >= 5:
            kind, length = m.HEADER.unpack_from(data, pos)
            end: int = pos + 1 + length
            if not 4 <= length <= MAX_LOGIN_MESSAGE:
                raise ServerProtocolError(f"reply of {length} bytes to our own query")
            if end > len(data):
                break
            body = data[pos + 5 : end]
            if kind == m.DATA_ROW:
                self._take_row(body)
            elif kind == m.ERROR_RESPONSE:
                self._failed = True
            elif kind == m.READY_FOR_QUERY:
                if server.expected.popleft() != expect.SETUP or body != b"I":
                    raise ServerProtocolError("ReadyForQuery from the server answers no request")
                self._finish()
                return end
            elif kind in (m.NOTIFICATION_RESPONSE, m.PARAMETER_STATUS, m.NOTICE_RESPONSE):
                self.news.append(data[pos:end])
            elif kind not in (m.ROW_DESCRIPTION, m.COMMAND_COMPLETE):
                raise ServerProtocolError(f"unexpected message type {kind} in reply to our query")
            pos = end
        return pos

    def _finish(self) -> None:
        self.is_done = True
        self.there |= self._effects & (sql.LOAD | sql.UNNAMED)
        if self._failed:  # a statement_timeout, say: believe the worst
            self.settings = None
            self.there |= self._effects & sql.LASTING
            if self._effects & _ANY_SETTING:
                self.there |= sql.UNCARRIED

    def _take_row(self, body: bytes) -> None:
        kind, name, value = _columns(body)
        if kind != b"s":
            self.there |= _ANSWERS.get(kind or b"", 0)
        elif self.settings is not None and name is not None and value is not None:
            if value.isascii() and len(value) <= _LONGEST_VALUE:
                self.settings[name.lower()] = value
            else:
                self.there |= sql.UNCARRIED


def _columns(body: bytes) -> tuple[bytes | None, bytes | None, bytes | None]:
    """Of a DataRow with three columns. Raises ServerProtocolError."""
    found: list[bytes | None] = []
    pos = 2
    for _ in range(3):
        size = int.from_bytes(body[pos : pos + 4], "big", signed=True)
        pos += 4
        if size > len(body) - pos:
            raise ServerProtocolError("malformed DataRow from the server")
        found.append(body[pos : pos + size] if size >= 0 else None)
        pos += max(size, 0)
    return found[0], found[1], found[2]
