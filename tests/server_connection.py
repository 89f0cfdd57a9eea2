"""Server connections without a pool, for tests of how they are made."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from sidecar.dsn import parse_dsn
from sidecar.events import CloseReason, Traffic
from sidecar.pool.health import NOBODY
from sidecar.pool.server import ServerConnection
from sidecar.pool.state import ConnectionState
from sidecar.protocol import messages as m
from sidecar.work import Who
from tests.sidecar_process import PATIENCE
from tests.wire import Message


class Owner:
    """In place of a pool."""

    def __init__(self) -> None:
        self.gone = asyncio.Event()

    def lost(self, server: ServerConnection) -> None:
        self.gone.set()


class Reader:
    """Takes what the server says up to ReadyForQuery."""

    def __init__(self) -> None:
        self._data = b""
        self.messages: asyncio.Future[list[Message]] = asyncio.get_running_loop().create_future()

    def server_data(self, data: bytes) -> None:
        self._data += data
        found, at = [], 0
        while len(self._data) - at >= 5:
            kind, length = m.HEADER.unpack_from(self._data, at)
            if len(self._data) - at <= length:
                break
            found.append(Message(chr(kind), self._data[at + 5 : at + 1 + length]))
            at += 1 + length
        if found and found[-1].kind == "Z" and not self.messages.done():
            self.messages.set_result(found)

    def who(self) -> Who:
        return NOBODY

    def server_lost(self) -> None:
        if not self.messages.done():
            self.messages.set_exception(EOFError())

    def server_writable(self, is_writable: bool) -> None:
        pass

    def describe(self, now: float) -> str:
        return "a test"


async def ask(server: ServerConnection, sql: str) -> list[list[str | None]]:
    """The rows of a query that must succeed."""
    server.receiver = reader = Reader()
    server.write(m.query(sql.encode()))
    async with asyncio.timeout(PATIENCE):
        messages = await reader.messages
    server.receiver = None
    errors = [message.fields for message in messages if message.kind == "E"]
    assert not errors, errors
    rows = [message.columns for message in messages if message.kind == "D"]
    return [[None if value is None else value.decode() for value in row] for row in rows]


async def encryption(server: ServerConnection) -> str:
    """The version of TLS as PostgreSQL sees it; empty if there is none."""
    ((version,),) = await ask(
        server, "select version from pg_stat_ssl where pid = pg_backend_pid()"
    )
    assert (version or "") == server.tls_version
    return server.tls_version


@asynccontextmanager
async def opened(dsn: str, *, within: float = PATIENCE) -> AsyncIterator[ServerConnection]:
    """An open connection, closed in the end as a pool closes it."""
    owner = Owner()
    server = ServerConnection(owner, parse_dsn(dsn), Traffic())
    try:
        await server.open(time.monotonic() + within)
        server.state = ConnectionState.IDLE
        yield server
        server.close(CloseReason.SHUTDOWN)
        async with asyncio.timeout(PATIENCE):
            await owner.gone.wait()
    finally:
        server.abort()


async def refused(dsn: str, kind: type[Exception], *, within: float = PATIENCE) -> Exception:
    """The error of an attempt that fails."""
    try:
        async with opened(dsn, within=within) as server:
            raise AssertionError(f"let in at {server.address}, TLS {server.tls_version!r}")
    except kind as exc:
        return exc
