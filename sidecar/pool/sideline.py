"""A connection beside the pool, for questions of our own: whom to let in, who waits for whom.

Owns one connection to the server that clients never get, and that ``max_size`` does not count. Such
questions come up when the pool is full, and one that waited for a lease would be answered when nobody
asks any more; one that took it would make a client wait. It is opened when there is a question, and
closed when there has been none for a while. Ours rather than psycopg's: the same TLS and the same
reading of a dsn as for the pool, and nothing from the environment.

Runs no task but the cancel requests of questions that were not answered in time.
"""

import asyncio
import logging
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from sidecar.config import ServerTarget
from sidecar.errors import ServerError, ServerProtocolError, ServerUnavailable, SidecarError
from sidecar.events import Traffic
from sidecar.pool import health
from sidecar.pool.login import Versions
from sidecar.pool.opening import Spawn
from sidecar.pool.server import ServerConnection, cancel_query, clock
from sidecar.protocol import messages as m
from sidecar.work import Who

log = logging.getLogger("pgsidecar.pool")

IDLE: Final = 60.0
"""Seconds it is kept without a question."""
_CANCEL_TIMEOUT: Final = 1.0  # s
_MOST_BYTES: Final = 64 * 1024  # of an answer


@dataclass(slots=True)
class Answer:
    """What the server said to a query."""

    columns: int = 0
    rows: list[list[bytes | None]] = field(default_factory=list, repr=False)
    error: ServerError | None = None


class Sideline:
    """One question at a time: the caller sees to that."""

    def __init__(self, spawn: Spawn, idle: float = IDLE) -> None:
        self._spawn: Final = spawn
        self.idle = idle  # s
        self._versions: Final = Versions()
        self._server: ServerConnection | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._is_closed = False

    def __repr__(self) -> str:
        return f"<Sideline {self._server!r}>"

    @property
    def is_open(self) -> bool:
        return self._server is not None

    async def ask(
        self, target: ServerTarget, query: str, value: str, most_rows: int, deadline: float
    ) -> Answer:
        """Run the query with this value as ``$1``, on a connection to this target.

        An error of the query is in the answer. Raises OSError (TimeoutError is one) and
        SidecarError if there is none.
        """
        self._stay()
        try:
            if self._server is not None and self._server.target == target:
                try:
                    return await self._ask(self._server, query, value, most_rows, deadline)
                except ServerUnavailable:
                    pass  # it had been closed while nobody asked
            server = await self._open(target, deadline)
            return await self._ask(server, query, value, most_rows, deadline)
        finally:
            self._leave()

    async def _open(self, target: ServerTarget, deadline: float) -> ServerConnection:
        self._say_goodbye()
        server = ServerConnection(self, target, Traffic(), self._versions)
        try:
            await server.open(deadline)
        except BaseException:
            server.abort()
            raise
        self._server = server
        return server

    async def _ask(
        self, server: ServerConnection, query: str, value: str, most_rows: int, deadline: float
    ) -> Answer:
        try:
            return await ask(server, query, value, most_rows, deadline)
        except TimeoutError:
            self._drop()
            self._spawn(_cancel(server))
            raise
        except BaseException:
            self._drop()
            raise

    def close(self) -> None:
        """No more questions will be asked; the one under way is answered."""
        self._is_closed = True
        self.hang_up()

    def lost(self, server: ServerConnection) -> None:
        if server is self._server:
            self._server = None

    def _stay(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _leave(self) -> None:
        """Nobody asks anything now."""
        idle = 0.0 if self._is_closed else self.idle
        self._timer = asyncio.get_running_loop().call_later(idle, self.hang_up)

    def hang_up(self) -> None:
        """Close the connection, unless it has a question to answer."""
        if self._timer is None:
            return
        self._stay()
        self._say_goodbye()

    def _say_goodbye(self) -> None:
        server, self._server = self._server, None
        if server is not None and not server.transport.is_closing():
            server.write(m.TERMINATE_MESSAGE)
            server.transport.close()

    def _drop(self) -> None:
        server, self._server = self._server, None
        if server is not None:
            server.abort()


async def _cancel(server: ServerConnection) -> None:
    """Else its backend would go on, and the next question have another one beside it."""
    try:
        await cancel_query(server, clock() + _CANCEL_TIMEOUT)
    except (OSError, SidecarError) as exc:
        log.info("cancel request failed", extra={"cause": health.describe(exc)})


# -- one query ---------------------------------------------------------------------------------


class _Reader:
    """A receiver for the answer."""

    def __init__(self, server: ServerConnection, most_rows: int) -> None:
        self._server = server
        self._most_rows = most_rows
        self._data = b""
        self._answer = Answer()
        self.done: asyncio.Future[Answer | SidecarError] = (
            asyncio.get_running_loop().create_future()
        )

    def server_data(self, data: bytes) -> None:
        self._data += data
        try:
            for kind, body in self._messages():
                self._take(kind, body)
        except (ValueError, IndexError, struct.error):
            self._end(ServerProtocolError("an answer that cannot be read"))
        if len(self._data) > _MOST_BYTES:
            self._end(ServerProtocolError(f"an answer of more than {_MOST_BYTES} bytes"))

    def _messages(self) -> Iterator[tuple[int, bytes]]:
        while len(self._data) >= 5:
            kind, length = m.HEADER.unpack_from(self._data)
            if not 4 <= length <= _MOST_BYTES:
                raise ValueError
            if len(self._data) <= length:
                return
            body, self._data = self._data[5 : length + 1], self._data[length + 1 :]
            yield kind, body

    def _take(self, kind: int, body: bytes) -> None:
        answer = self._answer
        if kind == m.ROW_DESCRIPTION:
            answer.columns = int.from_bytes(body[:2], "big")
        elif kind == m.DATA_ROW and len(answer.rows) < self._most_rows:
            answer.rows.append(_columns(body))
        elif kind == m.ERROR_RESPONSE:
            text = m.error_fields(body).get("M", "error")
            answer.error = ServerError(text, sqlstate=m.sqlstate_of(body))
        elif kind == m.PARAMETER_STATUS:
            self._server.remember_parameter(body)
        elif kind == m.READY_FOR_QUERY:
            self._server.receiver = None
            self._end(answer)

    def _end(self, outcome: Answer | SidecarError) -> None:
        if not self.done.done():
            self.done.set_result(outcome)

    def server_lost(self) -> None:
        self._end(ServerUnavailable("the server closed the connection"))

    def server_writable(self, is_writable: bool) -> None:
        pass  # a query is a few bytes

    def describe(self, now: float) -> str:
        return "a question of the pool's own"

    def who(self) -> Who:
        return health.NOBODY


def _columns(body: bytes) -> list[bytes | None]:
    (count,) = struct.unpack_from("!H", body)
    at = 2
    values: list[bytes | None] = []
    for _ in range(count):
        (size,) = struct.unpack_from("!i", body, at)
        at += 4
        values.append(None if size < 0 else body[at : at + size])
        at += max(0, size)
    return values


async def ask(
    server: ServerConnection, query: str, value: str, most_rows: int, deadline: float
) -> Answer:
    """Run the query with this value as ``$1``. Raises TimeoutError and SidecarError."""
    data = value.encode()
    reader = _Reader(server, most_rows)
    server.receiver = reader
    server.write(
        m.parse(b"", query.encode() + b"\0\0\0")
        + m.message(m.BIND, b"\0\0" + struct.pack("!HHi", 0, 1, len(data)) + data + b"\0\0")
        + m.message(m.DESCRIBE, b"P\0")
        + m.message(m.EXECUTE, b"\0" + struct.pack("!I", most_rows))
        + m.SYNC_MESSAGE
    )
    async with asyncio.timeout_at(deadline):
        outcome = await reader.done
    if isinstance(outcome, SidecarError):
        raise outcome
    return outcome
