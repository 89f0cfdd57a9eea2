"""Brings a client's settings along to whichever server connection it gets.

Owns what one client's settings are now, and our own SET while its outcome is open. The SQL is made
in ``settings``; the ``relay`` decides when to send it and what a refusal means.
"""

from collections.abc import Mapping
from typing import Final

from sidecar.errors import ServerProtocolError
from sidecar.pool.server import MAX_LOGIN_MESSAGE, ServerConnection
from sidecar.protocol import messages as m
from sidecar.proxy import expect
from sidecar.proxy.replies import RESET, status_of
from sidecar.proxy.settings import READ_ONLY, Settings, SettingsTable, change
from sidecar.sql import RESET as RESET_EFFECT
from sidecar.sql import SETTING, UNDO

_SET_REPLIES: Final = frozenset(
    {
        *(m.COMMAND_COMPLETE, m.NOTICE_RESPONSE, m.NOTIFICATION_RESPONSE),
        *(m.ROW_DESCRIPTION, m.DATA_ROW),  # of set_config
    }
)
"""What a server may say to our SET, besides ParameterStatus, ErrorResponse and ReadyForQuery."""


class Carrier:
    """The settings of one client."""

    __slots__ = (
        "_brought",
        "_defaults",
        "_home",
        "_is_spelled",
        "_news",
        "_table",
        "error",
        "is_setting",
        "settings",
    )

    def __init__(
        self, table: SettingsTable, settings: Settings, defaults: Mapping[bytes, bytes]
    ) -> None:
        """``settings``: of the startup packet. ``defaults``: the server's ParameterStatus."""
        self._table: Final = table
        self._brought: Final = settings  # kept: others who bring the same learn its spelling
        self._home = settings.canonical or settings  # what RESET returns to
        self._is_spelled = settings.canonical is not None  # as the server does
        self._defaults: Final = defaults
        self._news: list[bytes] = []
        self.settings = self._home
        self.is_setting = False  # the server's next replies are to our own SET
        self.error: bytes | None = None  # the body of its ErrorResponse

    @property
    def must_be_tried(self) -> bool:
        """Whether the client brings what no server of the pool has accepted yet."""
        return not self._home.is_proven

    @property
    def application(self) -> str:
        """The client's ``application_name``."""
        return self.settings.values.get(b"application_name", b"").decode("utf-8", "replace")

    def told(self) -> list[bytes]:
        """ParameterStatus messages for the login, where no server connection is at hand."""
        values = self.settings.values
        return [
            m.parameter_status(name, values.get(name.lower(), value))
            for name, value in self._defaults.items()
        ]

    def set_up(self, server: ServerConnection) -> None:
        """Send what makes this connection this client's, if it is not: then ``is_setting``."""
        before = {} if server.settings is None else server.settings.values
        sql = change(before, self.settings.values)
        if sql:
            self._send(server, sql)
        else:
            server.settings = self.settings

    def set_back(self, server: ServerConnection) -> None:
        """The client's RESET took what it had brought along, and it keeps the connection."""
        sql = change({}, server.lacks)
        server.lacks = {}
        self._send(server, sql)

    def _send(self, server: ServerConnection, sql: bytes) -> None:
        server.expected.append(expect.SETUP)
        server.write(m.query(sql))
        self.is_setting = True
        self.error = None

    def take_reply(self, server: ServerConnection, data: bytes) -> int:
        """Read the replies to our SET; ``is_setting`` ends with them.

        Returns the position behind what was read. Raises ServerProtocolError.
        """
        pos = 0
        while len(data) - pos >= 5:
            kind, length = m.HEADER.unpack_from(data, pos)
            end = pos + 1 + length
            if not 4 <= length <= MAX_LOGIN_MESSAGE:
                raise ServerProtocolError(f"reply of {length} bytes to our SET")
            if end > len(data):
                break
            body = data[pos + 5 : end]
            pos = end
            if kind == m.PARAMETER_STATUS:
                self._note_spelling(server, status_of(body))
            elif kind == m.ERROR_RESPONSE:
                self.error = body
            elif kind == m.READY_FOR_QUERY:
                if server.expected.popleft() != expect.SETUP or body != b"I":
                    raise ServerProtocolError("ReadyForQuery from the server answers no request")
                self._finish(server)
                break
            elif kind not in _SET_REPLIES:
                raise ServerProtocolError(f"unexpected message type {kind} in reply to our SET")
        return pos

    def _finish(self, server: ServerConnection) -> None:
        self.is_setting = False
        if self.error is not None:
            return  # all SETs were one transaction: the connection is as it was
        if not self._is_spelled and self.settings is self._home:
            self._learn_spelling(server)
        server.settings = self.settings
        self.settings.is_proven = True

    def _learn_spelling(self, server: ServerConnection) -> None:
        """At its login the client was told what it had asked for; now it learns, as on a connection
        of its own, how the server spells it: ``iso`` is ``ISO, MDY``."""
        values = dict(self._brought.values)
        for name, value in server.parameters.items():
            key = name.lower()
            if values.get(key, value) != value:
                values[key] = value
                self._news.append(m.parameter_status(name, value))
        self._is_spelled = True
        self._home = self.settings = self._table.intern(values)
        self._table.note_spelling(self._brought, self._home)
        if self._home is not self._brought:
            self._brought.canonical = self._home
            self._brought.is_proven = True

    def _note_spelling(self, server: ServerConnection, body: bytes) -> None:
        """The client learns how the server spells the values it asked for at login."""
        server.remember_parameter(body)
        name, value = m.name_and_value(body)
        told = self.settings.values.get(name.lower(), self._defaults.get(name))
        if told != value and self._is_spelled:
            self._news.append(m.message(m.PARAMETER_STATUS, body))

    def note_values(
        self, server: ServerConnection, values: list[bytes], resets: frozenset[bytes]
    ) -> None:
        """The client has set reported settings: they go with it from now on.

        ``values``: bodies of ParameterStatus, or RESET where the client's RESET came; ``resets``: of
        which settings, or ``all``.
        """
        settings = self.settings
        for body in values:
            if body == RESET:
                settings = self._reset(server, settings, resets)
                continue
            server.remember_parameter(body)
            name, value = m.name_and_value(body)
            key = name.lower()
            if name in READ_ONLY or name not in server.parameters:
                continue
            if key in server.lacks:
                if value == self._defaults.get(name):  # reset, and to be set back
                    self._news.append(m.parameter_status(name, server.lacks[key]))
                    continue
                server.lacks = {k: v for k, v in server.lacks.items() if k != key}
            settings = self._table.with_value(settings, key, value)
        settings.is_proven = True
        self.settings = server.settings = settings

    def _reset(
        self, server: ServerConnection, settings: Settings, names: frozenset[bytes]
    ) -> Settings:
        """After RESET the client's settings are those it brought along, as on a connection of its
        own. The server's are not: it ``lacks`` them now."""
        home = self._home.values
        taken = {n: v for n, v in home.items() if n in names or b"all" in names}
        server.lacks = {**server.lacks, **taken}
        return self._table.intern({**settings.values, **taken})

    def note_session(
        self, server: ServerConnection, found: dict[bytes, bytes], *, stays: bool
    ) -> None:
        """The server has listed all settings of the session: they go with the client from now on.

        ``stays``: the client keeps the connection.
        """
        home = self._home.values
        self.settings = self._table.intern({**home, **found})
        self.settings.is_proven = True
        if stays:
            server.settings = self.settings
            server.lacks = {name: value for name, value in home.items() if name not in found}
        else:
            server.settings = self._table.intern(found)
            server.lacks = {}

    def judge_reset(self, server: ServerConnection) -> None:
        """After a RESET: is there anything that the server has to be asked for?

        Not where all that the client has set is reported: then it has been told. Pools of drivers say
        RESET ALL whenever a connection is given back, and reading all settings takes a millisecond.
        """
        if not server.effects & RESET_EFFECT:
            return
        server.effects &= ~RESET_EFFECT
        reported = {name.lower() for name in self._defaults}  # not kept: 1 KiB for every client
        if any(name not in reported for name in self.settings.values):
            server.effects |= SETTING
        elif server.effects == UNDO:
            server.effects = 0
            values = {} if server.settings is None else server.settings.values
            left = {name: value for name, value in values.items() if name not in server.lacks}
            server.settings = self._table.intern(left)
            server.lacks = {}

    def take_news(self) -> bytes:
        """What the client has to be told of its settings."""
        news, self._news = b"".join(self._news), []
        return news
