"""One client of the console: its messages in, answers out.

Owns the client's socket after the login, and what little protocol state there is: prepared
statements and portals without parameters. Understands simple queries of several commands, and the
extended protocol. Runs one task, from the hand-over to the end; what a command does is ``desk``'s.
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from sidecar import __version__
from sidecar.console import extended
from sidecar.console.commands import PARAMETERS, Command, Verb, parse, split
from sidecar.console.rows import Column, Row, data_row, description
from sidecar.errors import ClientProtocolError, SidecarError
from sidecar.events import Traffic
from sidecar.protocol import messages as m

log = logging.getLogger("pgsidecar.console")

Spawn = Callable[[Coroutine[Any, Any, None]], object]

_LONGEST: Final = 64 * 1024
"""Bytes of one message; commands are short. Also: bytes kept before reading stops."""

_MOST_NAMED: Final = 1000
"""Prepared statements, and portals, of one client."""

_BATCH: Final = 20
"""Rows made in one go, under a millisecond, 2 of SHOW STATEMENTS: then others have their turn."""

_SEND_TIMEOUT: Final = 60.0
"""Seconds a client may take to read on."""

_EXTENDED: Final = frozenset({m.PARSE, m.BIND, m.DESCRIBE, m.EXECUTE, m.CLOSE, m.FLUSH})
_SHUTTING_DOWN: Final = "terminating connection because the connection pool shuts down"


@dataclass(frozen=True, slots=True)
class Answer:
    """What a command is answered with: rows, if it has columns, and its tag."""

    tag: str
    columns: Sequence[Column] = ()
    rows: Iterable[Row] = ()
    notices: Sequence[tuple[str, str]] = ()
    """Text and detail of each."""


class Desk(Protocol):
    """Who knows what commands mean."""

    def columns(self, command: Command) -> Sequence[Column]:
        """Of its answer; none if it has no rows."""

    async def answer(self, session: "ConsoleSession", command: Command) -> Answer:
        """Carry it out. Raises SidecarError."""

    def gone(self, session: "ConsoleSession") -> None: ...


@dataclass(slots=True)
class Portal:
    command: Command | None  # None: the empty query
    formats: tuple[int, ...]
    rows: Iterator[Row] | None = None  # once begun
    columns: Sequence[Column] = ()
    tag: str = ""
    count: int = 0
    is_done: bool = False


class _Gone(Exception):
    """The client closed its connection."""


class ConsoleSession:
    """An ``asyncio.Protocol`` by shape, and a ``Guest`` of the proxy's."""

    def __init__(
        self,
        desk: Desk,
        spawn: Spawn,
        traffic: Traffic,
        *,
        user: str,
        database: str,
        application: str,
    ) -> None:
        self.user: Final = user
        self.database: Final = database
        self.application: Final = application
        self.pid = 0
        self.secret = b""
        self.id = 0
        self.opened_at = 0.0
        self.transport: Any = None
        self._desk: Final = desk
        self._spawn: Final = spawn
        self._traffic: Final = traffic
        self._buffer = b""
        self._wake: asyncio.Future[None] | None = None
        self._may_write: asyncio.Future[None] | None = None
        self._is_reading_paused = False
        self._is_closed = False
        self._task: asyncio.Task[Any] | None = None  # of the command that waits
        self._is_cancelled = False
        self._status = m.IDLE
        self._statements: dict[bytes, Command | None] = {}
        self._portals: dict[bytes, Portal] = {}
        self._skips_to_sync = False

    def __repr__(self) -> str:
        return f"<ConsoleSession {self.user}>"

    def greeting(self) -> bytes:
        told = {
            "server_version": f"{__version__}/pgsidecar",
            **PARAMETERS,
            "session_authorization": self.user,
            "application_name": self.application,
        }
        return b"".join(
            m.parameter_status(name.encode(), value.replace("\0", "?").encode())
            for name, value in told.items()
        )

    # -- asyncio.Protocol ----------------------------------------------------------------------

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self._spawn(self._run())

    def data_received(self, data: bytes) -> None:
        self._traffic.client_received += len(data)
        self._buffer += data
        if len(self._buffer) > _LONGEST and not self._is_reading_paused:
            self._is_reading_paused = True
            self.transport.pause_reading()
        _settle(self._wake)

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._is_closed = True
        _settle(self._wake)
        _settle(self._may_write)
        if self._task is not None:
            self._task.cancel()
        self._desk.gone(self)

    def pause_writing(self) -> None:
        self._may_write = asyncio.get_running_loop().create_future()

    def resume_writing(self) -> None:
        _settle(self._may_write)
        self._may_write = None

    # -- Guest ---------------------------------------------------------------------------------

    def cancel(self) -> asyncio.Future[None] | None:
        if self._task is not None:
            self._is_cancelled = True
            self._task.cancel()
        return None

    def shut_down(self) -> None:
        """Stays: somebody may want to see how the drain goes on."""

    def end(self, text: str = _SHUTTING_DOWN) -> None:
        if self._is_closed or self.transport.is_closing():
            return
        self._write(m.error_response("FATAL", "57P01", text))
        self.transport.close()

    # -- messages ------------------------------------------------------------------------------

    async def _run(self) -> None:
        try:
            while True:
                kind, body = await self._next_message()
                if kind == m.TERMINATE:
                    break
                await self._message(kind, body)
        except _Gone:
            pass  # nobody is left to tell
        except ClientProtocolError as exc:
            self._write(m.error_response("FATAL", exc.sqlstate, exc.message))
        except Exception:
            log.exception("console failed", extra={"user": self.user})
            self._write(m.error_response("FATAL", "XX000", "internal error of the connection pool"))
        finally:
            self.transport.close()

    async def _next_message(self) -> tuple[int, bytes]:
        while True:
            if len(self._buffer) >= 5:
                kind, length = m.HEADER.unpack_from(self._buffer)
                if not 4 <= length <= _LONGEST:
                    raise ClientProtocolError(
                        f"invalid message length {length}; the console takes at most {_LONGEST} bytes"
                    )
                if len(self._buffer) > length:
                    body = self._buffer[5 : length + 1]
                    self._buffer = self._buffer[length + 1 :]
                    return kind, body
            if self._is_closed:
                raise _Gone
            if self._is_reading_paused:
                self._is_reading_paused = False
                self.transport.resume_reading()
            self._wake = asyncio.get_running_loop().create_future()
            await self._wake

    async def _message(self, kind: int, body: bytes) -> None:
        if kind == m.SYNC:
            self._skips_to_sync = False
            self._portals.clear()
            self._ready()
        elif kind == m.QUERY:
            self._skips_to_sync = False
            await self._query(body)
        elif kind in _EXTENDED:
            if not self._skips_to_sync:
                try:
                    await self._extended(kind, body)
                except SidecarError as exc:
                    self._skips_to_sync = True
                    self._refuse(exc)
        elif kind == m.FUNCTION_CALL:
            self._refuse(SidecarError("the console has no functions", sqlstate="0A000"))
            self._ready()
        elif kind not in (m.COPY_DATA, m.COPY_DONE, m.COPY_FAIL):
            raise ClientProtocolError(f"invalid message type {kind} from the client")

    async def _query(self, body: bytes) -> None:
        try:
            statements = split(extended.read_query(body))
            for words in statements:
                command = parse(words)
                answer = await self._answer(command)
                if answer.columns:
                    formats = (0,) * len(answer.columns)
                    self._write(description(answer.columns, formats))
                    await self._send_rows(answer.columns, iter(answer.rows), formats, limit=0)
                self._complete(command, answer.tag)
            if not statements:
                self._write(extended.EMPTY)
        except ClientProtocolError:
            raise
        except SidecarError as exc:
            self._refuse(exc)
        self._ready()

    async def _extended(self, kind: int, body: bytes) -> None:
        match kind:
            case m.PARSE:
                self._parse(body)
            case m.BIND:
                self._bind(body)
            case m.DESCRIBE:
                self._describe(body)
            case m.EXECUTE:
                await self._execute(body)
            case m.CLOSE:
                what, name = extended.read_target(body)
                named: dict[bytes, Any] = self._statements if what == 0x53 else self._portals
                named.pop(name, None)
                self._write(extended.CLOSE_COMPLETE)

    def _parse(self, body: bytes) -> None:
        name, text = extended.read_parse(body)
        statements = split(text)
        if len(statements) > 1:
            raise SidecarError(
                "cannot insert multiple commands into a prepared statement", sqlstate="42601"
            )
        if name and name in self._statements:
            raise SidecarError(f"prepared statement {_quoted(name)} exists", sqlstate="42P05")
        if len(self._statements) >= _MOST_NAMED and name not in self._statements:
            raise SidecarError(f"more than {_MOST_NAMED} prepared statements", sqlstate="54000")
        self._statements[name] = parse(statements[0]) if statements else None
        self._write(m.PARSE_COMPLETE_MESSAGE)

    def _bind(self, body: bytes) -> None:
        bind = extended.read_bind(body)
        command = self._statement(bind.statement)
        if len(self._portals) >= _MOST_NAMED and bind.portal not in self._portals:
            raise SidecarError(f"more than {_MOST_NAMED} portals", sqlstate="54000")
        count = len(self._desk.columns(command)) if command is not None else 0
        formats = bind.for_columns(count) if count else ()
        self._portals[bind.portal] = Portal(command, formats)
        self._write(extended.BIND_COMPLETE)

    def _statement(self, name: bytes) -> Command | None:
        if name not in self._statements:
            raise SidecarError(
                f"prepared statement {_quoted(name)} does not exist", sqlstate="26000"
            )
        return self._statements[name]

    def _portal(self, name: bytes) -> Portal:
        if name not in self._portals:
            raise SidecarError(f"portal {_quoted(name)} does not exist", sqlstate="34000")
        return self._portals[name]

    def _describe(self, body: bytes) -> None:
        what, name = extended.read_target(body)
        if what == 0x53:  # S
            command = self._statement(name)
            self._write(extended.PARAMETER_DESCRIPTION)
            formats: tuple[int, ...] | None = None
        else:
            portal = self._portal(name)
            command, formats = portal.command, portal.formats
        table = self._desk.columns(command) if command is not None else ()
        if table:
            self._write(description(table, (0,) * len(table) if formats is None else formats))
        else:
            self._write(extended.NO_DATA)

    async def _execute(self, body: bytes) -> None:
        name, limit = extended.read_execute(body)
        portal = self._portal(name)
        if portal.command is None:
            self._write(extended.EMPTY)
            return
        if portal.is_done:
            raise SidecarError(f"portal {_quoted(name)} cannot be run again", sqlstate="55000")
        if portal.rows is None:
            answer = await self._answer(portal.command)
            portal.rows, portal.columns, portal.tag = iter(answer.rows), answer.columns, answer.tag
        if await self._send_rows(portal.columns, portal.rows, portal.formats, limit=limit):
            portal.is_done = True
            self._complete(portal.command, portal.tag)
        else:
            self._write(extended.SUSPENDED)

    # -- answers -------------------------------------------------------------------------------

    async def _answer(self, command: Command) -> Answer:
        """What the desk says; a cancel request interrupts what it waits for."""
        self._is_cancelled = False
        self._task = asyncio.current_task()
        try:
            answer = await self._desk.answer(self, command)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and (self._is_cancelled or self._is_closed):
                task.uncancel()
                if self._is_closed:
                    raise _Gone from None
                raise SidecarError(
                    "canceling statement due to user request", sqlstate="57014"
                ) from None
            raise
        finally:
            self._task = None
        for text, detail in answer.notices:
            self._write(extended.notice(text, detail))
        return answer

    async def _send_rows(
        self, table: Sequence[Column], rows: Iterator[Row], formats: Sequence[int], *, limit: int
    ) -> bool:
        """True if that was all."""
        batch: list[bytes] = []
        for count, row in enumerate(rows, 1):
            batch.append(data_row(table, row, formats))
            if len(batch) >= _BATCH:
                await self._send(batch)
                batch = []
            if count == limit:
                break
        else:
            self._write(b"".join(batch))
            return True
        await self._send(batch)
        return False

    async def _send(self, batch: list[bytes]) -> None:
        self._write(b"".join(batch))
        await asyncio.sleep(0)
        may_write = self._may_write
        if may_write is not None:
            await asyncio.wait((may_write,), timeout=_SEND_TIMEOUT)
            if not may_write.done():
                self.transport.abort()
        if self._is_closed:
            raise _Gone

    def _complete(self, command: Command, tag: str) -> None:
        if command.verb is Verb.BEGIN:
            self._status = m.IN_TRANSACTION
        elif command.verb in (Verb.COMMIT, Verb.ROLLBACK):
            self._status = m.IDLE
        self._write(extended.complete(tag))

    def _refuse(self, error: SidecarError) -> None:
        if isinstance(error, ClientProtocolError):
            raise error
        self._write(
            m.error_response(
                "ERROR", error.sqlstate, error.message, detail=error.detail, hint=error.hint
            )
        )

    def _ready(self) -> None:
        self._write(m.message(m.READY_FOR_QUERY, bytes((self._status,))))

    def _write(self, data: bytes) -> None:
        if not self._is_closed:
            self._traffic.client_sent += len(data)
            self.transport.write(data)


def _quoted(name: bytes) -> str:
    return '"' + name.decode("utf-8", "replace") + '"'


def _settle(future: "asyncio.Future[None] | None") -> None:
    if future is not None and not future.done():
        future.set_result(None)
