"""A PostgreSQL client of plain sockets, and a sidecar on a thread of its own, for tests of the wire.

The client hides nothing: it sends the bytes it is told to and shows the messages that come back, so a
test can break every rule and compare what the sidecar says with what PostgreSQL says. Because the
sidecar has its own event loop, such a test may block.
"""

import asyncio
import json
import os
import socket
import struct
import threading
from collections.abc import Callable, Coroutine, Iterable, Mapping
from types import TracebackType
from typing import NamedTuple, Self, TypeVar
from urllib.parse import quote, urlencode

import uvloop

from sidecar import config_file
from sidecar.demo.postgres import EmbeddedPostgres
from sidecar.operate import Operations
from sidecar.pool.pool import Pool
from sidecar.protocol import messages as m
from sidecar.service import Service
from tests.sidecar_process import PATIENCE, eventually

T = TypeVar("T")
Address = tuple[str, int] | str
"""Host and port, or the path of a Unix socket."""


# -- messages ----------------------------------------------------------------------------------


class Message(NamedTuple):
    kind: str
    body: bytes

    @property
    def fields(self) -> dict[str, str]:
        """Of an ErrorResponse or NoticeResponse."""
        return m.error_fields(self.body)

    @property
    def columns(self) -> list[bytes | None]:
        """Of a DataRow."""
        (count,) = struct.unpack_from("!H", self.body)
        values: list[bytes | None] = []
        at = 2
        for _ in range(count):
            (size,) = struct.unpack_from("!i", self.body, at)
            at += 4
            values.append(None if size < 0 else self.body[at : at + size])
            at += max(0, size)
        return values


def _strings(*texts: str | bytes) -> bytes:
    return b"".join((t.encode() if isinstance(t, str) else t) + b"\0" for t in texts)


def query(sql: str | bytes) -> bytes:
    return m.message(m.QUERY, _strings(sql))


def parse(sql: str | bytes, name: str = "", types: Iterable[int] = ()) -> bytes:
    oids = list(types)
    return m.message(
        m.PARSE, _strings(name, sql) + struct.pack(f"!H{len(oids)}I", len(oids), *oids)
    )


def bind(*values: str | bytes | None, name: str = "", portal: str = "") -> bytes:
    """Values as text, results as text."""
    body = _strings(portal, name) + struct.pack("!HH", 0, len(values))
    for value in values:
        if value is None:
            body += struct.pack("!i", -1)
        else:
            data = value.encode() if isinstance(value, str) else value
            body += struct.pack("!i", len(data)) + data
    return m.message(m.BIND, body + struct.pack("!H", 0))


def execute(limit: int = 0, portal: str = "") -> bytes:
    return m.message(m.EXECUTE, _strings(portal) + struct.pack("!I", limit))


def describe(what: str, name: str = "") -> bytes:
    return m.message(m.DESCRIBE, what.encode() + _strings(name))


def close(what: str, name: str = "") -> bytes:
    return m.message(m.CLOSE, what.encode() + _strings(name))


def copy_data(data: bytes) -> bytes:
    return m.message(m.COPY_DATA, data)


def copy_fail(reason: str) -> bytes:
    return m.message(m.COPY_FAIL, _strings(reason))


SYNC = m.SYNC_MESSAGE
FLUSH = m.message(m.FLUSH, b"")
COPY_DONE = m.message(m.COPY_DONE, b"")
TERMINATE = m.TERMINATE_MESSAGE


def run(sql: str, *values: str | None) -> bytes:
    """One whole cycle of the extended protocol, unnamed."""
    return parse(sql) + bind(*values) + describe("P") + execute() + SYNC


def startup(parameters: Mapping[str, str | bytes], version: int = 3 << 16) -> bytes:
    body = b"".join(_strings(name, value) for name, value in parameters.items()) + b"\0"
    return struct.pack("!II", len(body) + 8, version) + body


SSL_REQUEST = struct.pack("!II", 8, 80877103)
GSSENC_REQUEST = struct.pack("!II", 8, 80877104)


# -- the client --------------------------------------------------------------------------------


class Client:
    """One connection. Blocks, at most ``PATIENCE`` seconds for anything."""

    def __init__(self, address: Address) -> None:
        family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
        self.socket = socket.socket(family)
        self.socket.settimeout(PATIENCE)
        self.socket.connect(address)
        self.parameters: dict[str, str] = {}
        self.pid = 0
        self.secret = b""
        self._address = address
        self._buffer = b""
        self._at = 0  # what has been taken of it

    @classmethod
    def login(
        cls, address: Address, user: str = "app", database: str = "main", **parameters: str
    ) -> Self:
        """A client that PostgreSQL, or the sidecar, trusts."""
        client = cls(address)
        client.log_in(user, database, **parameters)
        return client

    def log_in(self, user: str, database: str, **parameters: str) -> list[Message]:
        self.send(startup({"user": user, "database": database, **parameters}))
        messages = self.until("ZE")
        assert messages[-1].kind == "Z", messages[-1].fields
        return messages

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, *data: bytes) -> None:
        self.socket.sendall(b"".join(data))

    def receive(self) -> Message:
        """The next message. EOFError if there is none."""
        head = self._take(5)
        (length,) = struct.unpack("!I", head[1:])
        message = Message(chr(head[0]), self._take(length - 4))
        if message.kind == "S":
            name, value, _ = message.body.split(b"\0")
            self.parameters[name.decode(errors="replace")] = value.decode(errors="replace")
        elif message.kind == "K":
            self.pid, self.secret = struct.unpack("!I", message.body[:4])[0], message.body[4:]
        return message

    def until(self, kinds: str) -> list[Message]:
        """What comes, up to and with the first message of one of these kinds."""
        messages = [self.receive()]
        while messages[-1].kind not in kinds:
            messages.append(self.receive())
        return messages

    def until_ready(self, cycles: int = 1) -> list[Message]:
        """What comes, up to this many ReadyForQuery."""
        return [message for _ in range(cycles) for message in self.until("Z")]

    def until_closed(self) -> list[Message]:
        """What comes before the end of the connection."""
        messages = []
        try:
            while True:
                messages.append(self.receive())
        except (EOFError, ConnectionResetError):
            return messages

    def ask(self, *data: bytes) -> list[Message]:
        """Send; what comes up to ReadyForQuery."""
        self.send(*data)
        return self.until_ready()

    def rows(self, sql: str | bytes) -> list[list[str | None]]:
        """The rows of a simple query that must succeed."""
        messages = self.ask(query(sql))
        errors = [message.fields for message in messages if message.kind == "E"]
        assert not errors, (sql, errors)
        return [
            [None if v is None else v.decode() for v in message.columns]
            for message in messages
            if message.kind == "D"
        ]

    def value(self, sql: str) -> str | None:
        ((value,),) = self.rows(sql)
        return value

    def cancel(self, pid: int | None = None, secret: bytes | None = None) -> None:
        """Send a cancel request, by default for this client; return when the other side closed."""
        with Client(self._address) as other:
            body = struct.pack("!II", 80877102, self.pid if pid is None else pid)
            body += self.secret if secret is None else secret
            other.send(struct.pack("!I", len(body) + 4) + body)
            assert other.until_closed() == []

    def abort(self) -> None:
        """Go without a word: the other side gets a reset."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()

    def _take(self, size: int) -> bytes:
        if len(self._buffer) - self._at < size:
            pieces = [self._buffer[self._at :]]
            missing = size - len(pieces[0])
            while missing > 0:
                data = self.socket.recv(max(65536, missing))
                if not data:
                    raise EOFError
                pieces.append(data)
                missing -= len(data)
            self._buffer, self._at = b"".join(pieces), 0
        self._at += size
        return self._buffer[self._at - size : self._at]


def kinds(messages: Iterable[Message]) -> str:
    """The types of messages, one letter each."""
    return "".join(message.kind for message in messages)


def error(messages: Iterable[Message]) -> dict[str, str]:
    """The fields of the one ErrorResponse."""
    (found,) = [message.fields for message in messages if message.kind == "E"]
    return found


# -- the sidecar -------------------------------------------------------------------------------


class Sidecar:
    """A sidecar on a thread, pool ``main`` unless ``pools`` says else. It must end whole.

    ``users`` has a password or the options of each. Clients need no password unless ``listen`` says
    else, and failed logins are not delayed.
    """

    def __init__(
        self,
        postgres: EmbeddedPostgres | None = None,
        *,
        pools: Mapping[str, Mapping[str, object]] | None = None,
        listen: Mapping[str, object] | None = None,
        users: Mapping[str, str | Mapping[str, object]] | None = None,
        console: Mapping[str, object] | None = None,
        **main: object,
    ) -> None:
        if pools is None:
            assert postgres is not None
            pools = {"main": {"dsn": postgres.dsn(), **main}}
        sections = {
            "listen": {"port": 0, "auth": "trust", "auth_failure_delay": "0", **(listen or {})},
            "http": {"port": 0},
            "pools": pools,
            "users": {
                name: {"password": entry} if isinstance(entry, str) else entry
                for name, entry in (users or {}).items()
            },
            "console": console or {},
            "drain_timeout": "0",
        }
        text = json.dumps(sections).replace("$", "$$")
        self.service = Service(config_file.parse(text, {}, "test"))
        self._loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="sidecar", daemon=True)
        self._noise: list[dict[str, object]] = []
        self._tasks = 0
        self._clients: list[Client] = []

    def __enter__(self) -> Self:
        self._loop.set_exception_handler(lambda _loop, context: self._noise.append(context))
        self._thread.start()
        try:
            asyncio.run_coroutine_threadsafe(self.service.start(), self._loop).result(PATIENCE)
        except BaseException:
            self._end()
            raise
        self._tasks = self.tasks
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for client in self._clients:
            client.socket.close()
        try:
            asyncio.run_coroutine_threadsafe(self.service.stop(), self._loop).result(PATIENCE)
        finally:
            self._end()
        if kind is None:
            assert not self._noise
            for pool in self.service.pools.values():
                assert pool.state.size == 0, f"left behind: {pool.state!r}"

    def _end(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(PATIENCE)
        self._loop.close()

    @property
    def address(self) -> tuple[str, int]:
        return self.service.pg_address

    @property
    def port(self) -> int:
        return self.address[1]

    @property
    def pool(self) -> Pool:
        return self.service.pools["main"]

    @property
    def operations(self) -> Operations:
        """What the console reads and does."""
        return self.service.operations

    @property
    def tasks(self) -> int:
        return self.call(lambda: len(asyncio.all_tasks(self._loop)))

    def call(self, function: Callable[[], T]) -> T:
        """Run it on the sidecar's event loop."""

        async def work() -> T:
            return function()

        return self.await_(work())

    def await_(self, work: Coroutine[object, object, T]) -> T:
        """Await it on the sidecar's event loop."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(PATIENCE)

    def login(self, user: str = "app", database: str = "main", **parameters: str) -> Client:
        client = self.connect()
        client.log_in(user, database, **parameters)
        return client

    def connect(self) -> Client:
        self._clients.append(Client(self.address))
        return self._clients[-1]

    def dsn(self, user: str = "app", database: str = "main", **parameters: str | int) -> str:
        options = urlencode({k: str(v) for k, v in parameters.items()}, quote_via=quote)
        return f"postgresql://{user}@127.0.0.1:{self.port}/{database}?{options}"

    def until(self, condition: Callable[[], object], what: str) -> None:
        """Wait for what the sidecar does in its own time."""
        try:
            eventually(lambda: self.call(condition), what)
        except AssertionError as exc:
            exc.add_note(f"now: {self.service.pools}")
            raise

    def until_whole(self, *, clients: int | None = 0) -> None:
        """Nobody uses or wants a connection, no books are open, no task is left of any client; so
        many clients are there (None: any number)."""
        self.until(lambda: self._is_whole(clients), "the sidecar is whole")

    def _is_whole(self, clients: int | None) -> bool:
        listener = self.service._listener
        assert listener is not None
        for pool in self.service.pools.values():
            now = pool.snapshot(0.0)
            if now.used or now.pending or now.connecting or now.queries_in_flight:
                return False
            for server in pool.state.idle:
                open_books = (server.expected, server.undo, server.queries, server.receiver)
                assert not any(open_books), (server, open_books)
        if clients is not None and listener.clients != clients:
            return False
        return len(asyncio.all_tasks(self._loop)) <= self._tasks + 1


def resident_memory() -> int:
    """Bytes of memory this process uses now (Linux)."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
