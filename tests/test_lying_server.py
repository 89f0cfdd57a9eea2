"""A server that breaks every rule of the protocol: its clients get an error or their data, in time.

The liar logs its clients in and then says what a test tells it to. Beside its pool there is one of a
real PostgreSQL, which must not notice. The pool of the liar ends whole, never above its size, and does
not try again without a pause.
"""

import asyncio
import gc
import random
import socket
import struct
import threading
import time
import warnings
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Self

import pytest

from sidecar.demo.postgres import EmbeddedPostgres
from sidecar.pool.pool import CLOSE_TIMEOUT, Pool
from sidecar.pool.server import clock
from sidecar.pool.state import ConnectionState
from sidecar.protocol import messages as m
from tests.sidecar_process import PATIENCE
from tests.wire import (
    Client,
    Message,
    Sidecar,
    describe,
    error,
    kinds,
    parse,
    query,
    resident_memory,
    run,
    startup,
)

MEMORY = 32 * 1024 * 1024  # bytes that the sidecar may grow by

LOGIN_TIMEOUT = 0.5  # s
HANG = 3.0  # s; longer than any deadline here

MAX_SIZE = 3


# -- the liar ----------------------------------------------------------------------------------


class Connection:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self.lie: Act | None = None  # instead of the replies up to Sync
        self.status = b"I"

    async def send(self, *data: bytes) -> None:
        self._writer.write(b"".join(data))
        await self._writer.drain()

    async def receive(self) -> tuple[str, bytes]:
        kind, length = m.HEADER.unpack(await self._reader.readexactly(5))
        return chr(kind), await self._reader.readexactly(length - 4)

    async def startup(self) -> int:
        length, code = struct.unpack("!II", await self._reader.readexactly(8))
        await self._reader.readexactly(length - 8)
        return int(code)

    async def keep_silent(self) -> None:
        """Until the other side goes."""
        while await self._reader.read(65536):
            pass
        raise EOFError

    def reset(self) -> None:
        self._writer.transport.abort()

    def close(self) -> None:
        self._writer.close()


Act = Callable[[Connection], Awaitable[None]]


class Liar:
    """On a thread of its own. ``lies`` are said in answer to the query of that text."""

    def __init__(self, log_in: Act | None = None, lies: dict[bytes, Act] | None = None) -> None:
        self.log_in = log_in or logs_in
        self.lies = lies or {}
        self.logins: list[float] = []
        """When each attempt to log in began."""
        self.ends = True  # when it is told to
        self.port = 0
        self._is_up = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="liar", daemon=True)
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._is_up.wait(PATIENCE)
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Close everything. Idempotent."""
        if self._thread.is_alive():
            asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(PATIENCE)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(PATIENCE)
            self._loop.close()
            # asyncio's server may drop a connection that it accepted in its last moment: it is the
            # liar's, and not to be told to whichever test runs when it is collected.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ResourceWarning)
                gc.collect()

    def _run(self) -> None:
        self._loop.run_until_complete(self._start())
        self._is_up.set()
        self._loop.run_forever()

    async def _start(self) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _stop(self) -> None:
        assert self._server is not None
        self._server.close()
        await self._server.wait_closed()
        for _ in range(5):  # who is being accepted now, and the transports' own last steps
            await asyncio.sleep(0)
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = Connection(reader, writer)
        task = self._loop.create_task(self._serve(connection))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(lambda _: connection.reset())  # even one that never began

    async def _serve(self, connection: Connection) -> None:
        try:
            if await connection.startup() not in (3 << 16, 3 << 16 | 2):
                return  # a cancel request
            self.logins.append(time.monotonic())
            await self.log_in(connection)
            while True:
                kind, body = await connection.receive()
                if kind != "X":
                    await self._answer(connection, kind, body)
                elif self.ends:
                    return
                else:
                    await asyncio.Event().wait()
        except (OSError, EOFError):
            return
        finally:
            connection.reset()

    async def _answer(self, connection: Connection, kind: str, body: bytes) -> None:
        text = body[1:] if kind == "P" else body
        lie = self.lies.get(text.partition(b"\0")[0]) if kind in "PQ" else None
        if kind == "P":
            connection.lie = lie
        if kind == "Q" and lie is not None:
            connection.status = b"I"  # as the lies end
            await lie(connection)
        elif connection.lie is not None:
            if kind == "S":
                lie, connection.lie = connection.lie, None
                await lie(connection)
        else:
            await answers(connection, kind, body)


OK = m.authentication(m.AUTH_OK)
PARAMETERS = m.parameter_status(b"server_version", b"16.0") + m.parameter_status(
    b"client_encoding", b"UTF8"
)
KEY = m.backend_key_data(4711, b"abcd")
READY = m.READY_IDLE_MESSAGE
COLUMNS = m.message(m.ROW_DESCRIPTION, struct.pack("!H", 1) + b"a\0" + bytes(18))
ROW = m.message(m.DATA_ROW, struct.pack("!HI", 1, 4) + b"true")
TAG = m.message(m.COMMAND_COMPLETE, b"SELECT 1\0")
ROWS = COLUMNS + ROW + TAG
LOGGED_IN = OK + PARAMETERS + KEY + READY


async def logs_in(connection: Connection) -> None:
    await connection.send(LOGGED_IN)


async def answers(connection: Connection, kind: str, body: bytes) -> None:
    """What a server says that is honest, but for the facts."""
    match kind:
        case "Q":
            word = body.rstrip(b"\0").upper().partition(b" ")[0]
            if word in (b"BEGIN", b"ROLLBACK", b"COMMIT"):
                connection.status = b"T" if word == b"BEGIN" else b"I"
            result = ROWS if word == b"SELECT" else m.message(m.COMMAND_COMPLETE, word + b"\0")
            ready = m.message(m.READY_FOR_QUERY, connection.status)
            await connection.send(result if word else m.message(m.EMPTY_QUERY_RESPONSE, b""), ready)
        case "S":
            await connection.send(m.message(m.READY_FOR_QUERY, connection.status))
        case "P" | "B" | "C":
            replies = {"P": m.PARSE_COMPLETE, "B": m.BIND_COMPLETE, "C": m.CLOSE_COMPLETE}
            await connection.send(m.message(replies[kind], b""))
        case "D":
            await connection.send(COLUMNS)
        case "E":
            await connection.send(ROW, TAG)


def says(*data: bytes) -> Act:
    """And goes on as if nothing were."""

    async def act(connection: Connection) -> None:
        await connection.send(*data)

    return act


def says_and_waits(*data: bytes) -> Act:
    async def act(connection: Connection) -> None:
        await connection.send(*data)
        await connection.keep_silent()

    return act


def says_and_closes(*data: bytes) -> Act:
    async def act(connection: Connection) -> None:
        await connection.send(*data)
        connection.close()
        raise EOFError

    return act


def says_for_ever(data: bytes, *before: bytes) -> Act:
    async def act(connection: Connection) -> None:
        await connection.send(*before)
        while True:
            await connection.send(data)
            await asyncio.sleep(0)  # the liar has others to lie to

    return act


def says_with_a_pause(*data: bytes) -> Act:
    async def act(connection: Connection) -> None:
        for piece in data:
            await connection.send(piece)
            await asyncio.sleep(0.05)

    return act


async def resets(connection: Connection) -> None:
    connection.reset()
    raise EOFError


def head(kind: int, length: int) -> bytes:
    return m.HEADER.pack(kind, length % 2**32)


NOISE = b"\xff" + random.Random(1).randbytes(5000)
HTTP = b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n"
NOTICE = m.message(m.NOTICE_RESPONSE, b"SNOTICE\0C00000\0Mlisten\0\0")
GIB = 0x40000000


# -- the pools ---------------------------------------------------------------------------------


@contextmanager
def between(
    postgres: EmbeddedPostgres, liar: Liar, caplog: pytest.LogCaptureFixture, **options: object
) -> Iterator[Sidecar]:
    """A sidecar with a pool for each of the two; afterwards all that must hold, does."""
    of_liar = {
        "dsn": f"postgresql://postgres:secret@127.0.0.1:{liar.port}/liar?sslmode=disable",
        "max_size": MAX_SIZE,
        "min_idle": 1,
        "connect_timeout": "300ms",
        "acquire_timeout": "1s",
        "ping_timeout": "300ms",
        **options,
    }
    pools = {"main": {"dsn": postgres.dsn(), "max_size": 2, "min_idle": 1}, "liar": of_liar}
    with Sidecar(pools=pools, listen={"login_timeout": f"{LOGIN_TIMEOUT}s"}) as sidecar:
        try:
            # the logins of these tests have little time: what they need is there before
            sidecar.until(lambda: sidecar.service.pools["main"].opener.is_up, "main is up")
            with sidecar.login() as witness:
                yield sidecar
                assert witness.rows("select 1, 'a'") == [["1", "a"]]
            for client in sidecar._clients:
                client.socket.close()
            pool = sidecar.service.pools["liar"]
            sidecar.until(
                lambda: not pool.state.active and not pool.state.waiters, "no lease is left"
            )
            sidecar.until(lambda: not pool.state.by_state[ConnectionState.CHECKING], "nor a check")
            assert sidecar.call(lambda: pool.state.size) <= MAX_SIZE
            with sidecar.login() as newcomer:
                assert kinds(newcomer.ask(run("select 1"))) == "12TDCZ"
        finally:
            liar.stop()  # lest the end waits for it
    loud = [r for r in caplog.records if r.levelname in ("ERROR", "CRITICAL") or r.exc_info]
    assert {record.getMessage() for record in loud} <= {"server broke the protocol"}


def pool_of(sidecar: Sidecar) -> Pool:
    return sidecar.service.pools["liar"]


def login(sidecar: Sidecar, **parameters: str) -> Client:
    client = sidecar.login(database="liar", **parameters)
    client.socket.settimeout(HANG)
    return client


def hear(client: Client) -> tuple[list[Message], bool]:
    """What comes up to ReadyForQuery or the end; whether it was the end."""
    messages: list[Message] = []
    try:
        while not messages or messages[-1].kind != "Z":
            messages.append(client.receive())
    except (EOFError, ConnectionResetError):
        return messages, True
    return messages, False


SQLSTATES = {"08006", "08001", "57P01", "22012", "XX000"}
"""Lost, not there; the server's own; the server's own that is none."""


def check_is_told(client: Client, name: str) -> None:
    """Its data, FATAL with an SQLSTATE, or the end in the middle of a message."""
    try:
        messages, is_closed = hear(client)
        rows = [message.columns for message in messages if message.kind == "D"]
        assert all(row == [b"true"] for row in rows), (name, messages)
    except TimeoutError:
        pytest.fail(f"{name}: the client hangs")
    if is_closed and messages and messages[-1].kind == "E":
        assert messages[-1].fields["S"] == "FATAL", (name, messages)
        assert messages[-1].fields["C"] in SQLSTATES, (name, messages)
    elif is_closed:
        assert name in CUT_OFF, (name, messages)


def check_honest_again(sidecar: Sidecar) -> None:
    with login(sidecar) as client:
        assert client.rows("select 1") == [["true"]]
        assert kinds(client.ask(run("select 1"))) == "12TDCZ"


def check_pauses(liar: Liar, at_once: int = 1) -> None:
    """The attempts so far had growing pauses between them: ``at_once`` connections at a time."""
    took = time.monotonic() - liar.logins[0]
    # 0.1, 0.2, 0.4 ... s, each with jitter down to the half
    allowed, pauses = 2, 0.05
    while pauses < took:
        allowed += 1
        pauses += 0.05 * 2 ** (allowed - 2)
    assert len(liar.logins) <= allowed * at_once, liar.logins


# -- in the login ------------------------------------------------------------------------------


def sasl(code: int, data: bytes) -> bytes:
    return m.authentication(code, data)


LOGINS: dict[str, Act] = {
    "noise": says_and_waits(NOISE),
    "HTTP": says_and_closes(HTTP),
    "zeros": says_and_waits(bytes(100)),
    "silence": says_and_waits(),
    "the end": says_and_closes(),
    "a reset": resets,
    "the end after the password": says_and_closes(OK),
    "the end amid a message": says_and_closes(OK, PARAMETERS[:10]),
    "no end": says_and_waits(OK, PARAMETERS, KEY),
    "not even OK": says_and_waits(PARAMETERS, KEY, READY),
    "ready, but nobody proved anything": says_and_waits(READY),
    "endless notices": says_for_ever(NOTICE * 100, OK),
    "endless parameters": says_for_ever(PARAMETERS * 100, OK),
    "endless bytes": says_for_ever(b"x" * 10_000, head(m.NOTICE_RESPONSE, GIB - 1)),
    "endless bytes after SASL": says_for_ever(
        b"x" * 10_000, sasl(m.AUTH_SASL, b"SCRAM-SHA-256\0\0"), head(m.NOTICE_RESPONSE, 60_000)
    ),
    **{
        f"length {length} of {chr(kind)}": says_and_waits(head(kind, length))
        for kind in b"RSKZE"
        for length in (3, 65537, -1)
    },
    "an unknown message": says_and_waits(OK, m.message(0x21, b"")),
    "rows": says_and_waits(OK, ROWS, READY),
    "an unknown method": says_and_waits(m.authentication(99)),
    "no method": says_and_waits(m.message(m.AUTHENTICATION, b"")),
    "an unknown mechanism": says_and_waits(sasl(m.AUTH_SASL, b"TRUST-ME\0\0")),
    "SASL from the middle": says_and_waits(sasl(m.AUTH_SASL_CONTINUE, b"r=x,s=eA==,i=4096")),
    "SASL from the end": says_and_waits(sasl(m.AUTH_SASL_FINAL, b"v=eA==")),
    "SCRAM that is none": says_and_waits(
        sasl(m.AUTH_SASL, b"SCRAM-SHA-256\0\0"), sasl(m.AUTH_SASL_CONTINUE, NOISE[:100])
    ),
    "SCRAM without proof": says_and_waits(sasl(m.AUTH_SASL, b"SCRAM-SHA-256\0\0"), LOGGED_IN),
    "SCRAM forgotten": says_and_waits(
        sasl(m.AUTH_SASL, b"SCRAM-SHA-256\0\0"), PARAMETERS, KEY, READY
    ),
    "an error without fields": says_and_waits(m.message(m.ERROR_RESPONSE, b"")),
    "an error of noise": says_and_waits(m.message(m.ERROR_RESPONSE, NOISE)),
    "an error": says_and_closes(m.error_response("FATAL", "57P03", "not today")),
    "something after ready": says_and_waits(LOGGED_IN, NOISE),
    "ready twice": says_and_waits(LOGGED_IN, READY),
    "ready, and the end": says_and_closes(LOGGED_IN),
    "ready, and a refusal": says_and_closes(
        LOGGED_IN, m.error_response("FATAL", "57P03", "not today")
    ),
}

OPENS = {"ready, and the end", "ready, and a refusal"}
"""A client may be let in before the server goes back on its word."""


@pytest.mark.parametrize("name", LOGINS)
def test_liar_in_the_login_is_named_to_the_client_and_not_hurried(postgres, caplog, name):
    with Liar(LOGINS[name]) as liar, between(postgres, liar, caplog) as sidecar:
        began = time.monotonic()
        before = resident_memory()
        client = sidecar.connect()
        client.socket.settimeout(HANG)
        try:
            client.log_in("app", "liar")
        except AssertionError as refusal:
            (fields,) = refusal.args if isinstance(refusal.args[0], dict) else ({},)
            text = str(refusal)
            assert fields.get("C") in ("08001", "28P01", "28000", "XX000") or "08001" in text, text
        else:
            assert name in OPENS, "nobody can be logged in by that"
            client.send(query("select 1"))
            check_is_told(client, "the end")
        assert time.monotonic() - began < LOGIN_TIMEOUT + 1
        assert resident_memory() - before < MEMORY
        with sidecar.login() as witness:
            assert witness.value("select 1") == "1"
        check_pauses(liar)


def test_login_that_is_late_with_its_server_is_told_of_the_server():
    """Also where our own loop was held up when the time was over."""
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        dsn = f"postgresql://postgres@127.0.0.1:{nobody.getsockname()[1]}/postgres"
        listen = {"login_timeout": "500ms"}
        with Sidecar(pools={"main": {"dsn": dsn}}, listen=listen) as sidecar:
            client = sidecar.connect()
            client.send(startup({"user": "app", "database": "main"}))
            sidecar.call(lambda: asyncio.get_running_loop().call_later(0.3, time.sleep, 0.4))
            refusal = client.until("E")[-1].fields
            assert refusal["C"] == "08001", refusal


@pytest.mark.parametrize("name", ["ready, and the end", "ready, and a refusal", "ready twice"])
def test_server_that_lets_in_only_to_throw_out_is_tried_with_pauses(postgres, caplog, name):
    """A login that succeeds is no proof of a server that works: think of a proxy without one."""
    with Liar(LOGINS[name]) as liar, between(postgres, liar, caplog, min_idle=3):
        time.sleep(1.5)  # what is seen is that nothing happens
        check_pauses(liar, at_once=MAX_SIZE)


def test_login_works_as_soon_as_the_liar_is_honest(postgres, caplog):
    with Liar(LOGINS["ready, and the end"]) as liar, between(postgres, liar, caplog) as sidecar:
        sidecar.until(lambda: len(liar.logins) >= 3, "it was tried")
        liar.log_in = logs_in
        pool = pool_of(sidecar)
        sidecar.until(lambda: pool.opener.is_up and pool.state.idle, "it is used")
        check_honest_again(sidecar)


# -- in a reply --------------------------------------------------------------------------------

PARSED = m.PARSE_COMPLETE_MESSAGE
BOUND = m.message(m.BIND_COMPLETE, b"")
CLOSED = m.message(m.CLOSE_COMPLETE, b"")

REPLIES: dict[str, Act] = {
    "noise": says(NOISE),
    "HTTP": says(HTTP),
    "zeros": says(bytes(100)),
    "noise after a row": says(COLUMNS, ROW, NOISE),
    "the end": says_and_closes(),
    "a reset": resets,
    "the end amid a row": says_and_closes(COLUMNS, ROW[:-2]),
    "the end amid a tag": says_and_closes(COLUMNS, ROW, TAG[:-2]),
    "noise amid a row": says_with_a_pause(COLUMNS + ROW[:-2], ROW[-2:] + NOISE),
    "the end after the tag": says_and_closes(ROWS),
    "the end after ready": says_and_closes(ROWS, READY),
    **{
        f"length {length} of {chr(kind)}": says(head(kind, length))
        for kind in b"ZCESTDNG123"
        for length in (0, 3, GIB + 64 * 1024, -1)
    },
    "an unknown message": says(ROWS, m.message(0x21, b""), READY),
    "a request for a password": says(m.authentication(m.AUTH_CLEARTEXT)),
    "a request of its own": says(query("select 1")),
    "ready at once": says(READY),
    "ready twice": says(ROWS, READY, READY),
    "ready a hundred times": says(ROWS, READY * 100),
    "ready without a status": says(ROWS, m.message(m.READY_FOR_QUERY, b"")),
    "ready with two": says(ROWS, m.message(m.READY_FOR_QUERY, b"II")),
    "ready with an unknown one": says(ROWS, m.message(m.READY_FOR_QUERY, b"X")),
    "a transaction": says(ROWS, m.message(m.READY_FOR_QUERY, b"T")),
    "a failed transaction": says(ROWS, m.message(m.READY_FOR_QUERY, b"E")),
    "ParseComplete for ever": says(PARSED * 10_000),
    "BindComplete for ever": says(BOUND * 10_000),
    "CloseComplete for ever": says(CLOSED * 10_000),
    "the wrong order": says(BOUND, PARSED, TAG, COLUMNS, READY),
    "ParseComplete twice": says(PARSED, PARSED, BOUND, ROWS, READY),
    "BindComplete left out": says(PARSED, ROWS, READY),
    "rows left out": says(PARSED, BOUND, READY),
    "two results": says(PARSED, BOUND, ROWS, ROWS, READY),
    "no such columns": says(PARSED, BOUND, COLUMNS, COLUMNS, TAG, READY),
    "a suspended portal": says(PARSED, BOUND, m.message(m.PORTAL_SUSPENDED, b""), READY),
    "copy in": says(m.message(m.COPY_IN_RESPONSE, bytes(3)), READY),
    "copy out": says(m.message(m.COPY_OUT_RESPONSE, bytes(3)), m.message(m.COPY_DONE, b""), READY),
    "copy of nothing": says(m.message(m.COPY_IN_RESPONSE, b""), TAG, READY),
    "a tag of nothing": says(m.message(m.COMMAND_COMPLETE, b"")),
    "a tag of nothing, then ready": says(m.message(m.COMMAND_COMPLETE, b""), READY),
    "a tag without an end": says(m.message(m.COMMAND_COMPLETE, b"SELECT 1"), READY),
    "a tag of noise": says(m.message(m.COMMAND_COMPLETE, NOISE), READY),
    "a long tag": says(m.message(m.COMMAND_COMPLETE, b"x" * 200_000 + b"\0"), READY),
    **{
        f"the tag {tag.decode()}": says(m.message(m.COMMAND_COMPLETE, tag + b"\0"), READY)
        for tag in (b"RESET", b"ROLLBACK", b"DISCARD ALL", b"DEALLOCATE", b"DEALLOCATE ALL", b"C")
    },
    "an error of nothing": says(m.message(m.ERROR_RESPONSE, b""), READY),
    "an error of one NUL": says(m.message(m.ERROR_RESPONSE, b"\0"), READY),
    "an error without a code": says(m.message(m.ERROR_RESPONSE, b"SERROR\0Mx\0\0"), READY),
    "an error with a code of noise": says(m.message(m.ERROR_RESPONSE, b"C\xff\xfe'\0\0"), READY),
    "an error of noise": says(m.message(m.ERROR_RESPONSE, NOISE), READY),
    "a long error": says(m.error_response("ERROR", "22012", "x" * 300_000), READY),
    "an error twice": says(m.error_response("ERROR", "22012", "a") * 2, READY),
    "an error after the tag": says(ROWS, m.error_response("ERROR", "22012", "a"), READY),
    "the last words": says_and_closes(m.error_response("FATAL", "57P01", "bye")),
    "last words, and more": says(m.error_response("FATAL", "57P01", "bye"), ROWS, READY),
    **{
        f"ParameterStatus {body!r}": says(m.message(m.PARAMETER_STATUS, body), ROWS, READY)
        for body in (b"", b"\0", b"a", b"a\0b", b"a\0b\0c\0", b"\0\0", b"a'\\\0b'\\\0")
    },
    "endless parameters": says(
        *(m.parameter_status(b"p%d" % i, b"v" * 100) for i in range(2000)), ROWS, READY
    ),
    "a long ParameterStatus": says(m.parameter_status(b"a", b"x" * 300_000), ROWS, READY),
}

CUT_OFF = {"the end amid a row", "the end amid a tag", "noise amid a row", "a long tag"}
"""The client has the beginning of a message: nothing can be said any more."""


@pytest.mark.parametrize("name", REPLIES)
def test_lie_in_a_reply_is_an_error_or_data_and_never_a_hang(postgres, caplog, name):
    lie = REPLIES[name]
    with Liar(lies={b"lie": lie}) as liar, between(postgres, liar, caplog) as sidecar:
        for before, data in (
            (b"", query("lie")),
            (b"", run("lie")),
            (query("begin"), query("lie")),
        ):
            client = login(sidecar)
            if before:
                assert kinds(client.ask(before)) == "CZ"
            client.send(data)
            check_is_told(client, name)
            client.socket.close()
            sidecar.until(lambda: not pool_of(sidecar).state.active, "it is given back")
        check_honest_again(sidecar)


IN_TURN = {"a tag of nothing", "ready twice"}
"""The first is followed by silence, the other's second one is what the client's query may get."""


@pytest.mark.parametrize("name", [name for name in REPLIES if name not in IN_TURN])
def test_lie_about_our_settings_is_an_error_or_data_and_never_a_hang(postgres, caplog, name):
    """Before the client's own first query the sidecar sets what the client brought along."""
    lies = {b"SET application_name TO 'lie'": REPLIES[name]}
    with Liar(lies=lies) as liar, between(postgres, liar, caplog) as sidecar:
        client = login(sidecar, application_name="lie")
        client.send(query("select 1"))
        check_is_told(client, name)
        client.socket.close()
        check_honest_again(sidecar)


def test_endless_reply_to_our_settings_takes_no_memory(postgres, caplog):
    lie = says_for_ever(b"x" * 100_000, head(m.NOTICE_RESPONSE, GIB - 1))
    lies = {b"SET application_name TO 'lie'": lie}
    with Liar(lies=lies) as liar, between(postgres, liar, caplog) as sidecar:
        before = resident_memory()
        client = login(sidecar, application_name="lie")
        client.send(query("select 1"))
        check_is_told(client, "endless")
        assert resident_memory() - before < MEMORY


def test_row_without_end_is_the_clients_to_leave(postgres, caplog):
    """It takes no memory, and the server that does not stop is cut off in time."""
    lie = says_for_ever(b"x" * 100_000, COLUMNS, head(m.DATA_ROW, GIB - 1))
    with Liar(lies={b"lie": lie}) as liar, between(postgres, liar, caplog) as sidecar:
        client = login(sidecar)
        before = resident_memory()
        client.send(query("lie"))
        heard = 0
        while heard < 2 * MEMORY:
            heard += len(client.socket.recv(1 << 20))
        assert resident_memory() - before < MEMORY
        client.socket.close()
        pool = pool_of(sidecar)
        sidecar.until(lambda: not pool.state.active, "it is taken from the client")
        sidecar.call(lambda: pool.tick(clock() + CLOSE_TIMEOUT))
        sidecar.until(lambda: not pool.state.by_state[ConnectionState.CLOSING], "it is gone")
        check_honest_again(sidecar)


# -- unasked -----------------------------------------------------------------------------------

UNASKED: dict[str, tuple[bytes, bool]] = {
    "ready": (READY, False),
    "noise": (NOISE, False),
    "rows": (ROWS, False),
    "length 0": (head(m.NOTICE_RESPONSE, 0), False),
    "length 1 GiB": (head(m.NOTICE_RESPONSE, GIB), False),
    "ParseComplete": (PARSED, False),
    "a notice": (NOTICE, True),
    "a parameter": (m.parameter_status(b"a", b"b"), True),
    "a malformed parameter": (m.message(m.PARAMETER_STATUS, b"ab"), True),
}
"""What it says, and whether its connection may stay."""


@pytest.mark.parametrize("name", UNASKED)
def test_what_an_idle_connection_says_is_no_clients(postgres, caplog, name):
    data, may_stay = UNASKED[name]
    said = threading.Event()

    async def answers_then_says(connection: Connection) -> None:
        await connection.send(ROWS, READY)
        await asyncio.sleep(0.05)  # the lease is over
        await connection.send(data)
        said.set()

    with (
        Liar(lies={b"select 2": answers_then_says}) as liar,
        between(postgres, liar, caplog) as sidecar,
    ):
        client = login(sidecar)
        assert client.rows("select 2") == [["true"]]
        assert said.wait(PATIENCE)
        if not may_stay:
            sidecar.until(lambda: len(liar.logins) >= 2, "it is replaced")
        assert client.rows("select 1") == [["true"]]
        check_honest_again(sidecar)


# -- pings, resets, the end --------------------------------------------------------------------

PINGS: dict[str, Act] = {
    "noise": says(NOISE),
    "HTTP": says(HTTP),
    "silence": says_and_waits(),
    "the end": says_and_closes(),
    "ready twice": says(m.message(m.EMPTY_QUERY_RESPONSE, b""), READY, READY),
    "ParseComplete": says(PARSED, m.message(m.EMPTY_QUERY_RESPONSE, b""), READY),
    "rows": says(ROWS, READY),
    "a transaction": says(m.message(m.READY_FOR_QUERY, b"T")),
    "no status": says(m.message(m.READY_FOR_QUERY, b"")),
    "an error": says(m.error_response("ERROR", "XX000", "no"), READY),
    "an error of nothing": says(m.message(m.ERROR_RESPONSE, b""), READY),
    "length 0": says(head(m.READY_FOR_QUERY, 0)),
    "length 1 GiB": says(head(m.READY_FOR_QUERY, GIB)),
    "notices for ever": says_for_ever(NOTICE * 10),
}


@pytest.mark.parametrize("name", PINGS)
def test_lie_to_a_ping_costs_that_connection_only(postgres, caplog, name):
    """And it is not replaced faster than pings are due."""
    with (
        Liar(lies={b"": PINGS[name]}) as liar,
        between(postgres, liar, caplog, ping_interval="300ms") as sidecar,
    ):
        client = login(sidecar)
        sidecar.until(lambda: len(liar.logins) >= 2, "it is replaced")
        took = time.monotonic() - liar.logins[0]
        assert len(liar.logins) <= 3 + took / 0.05, liar.logins
        client.send(query("select 1"))
        check_is_told(client, "the end")
        liar.lies.clear()
        sidecar.until(lambda: pool_of(sidecar).state.idle, "one is there")
        check_honest_again(sidecar)


@pytest.mark.parametrize("name", PINGS)
def test_connection_that_is_not_reset_is_nobody_elses(postgres, caplog, name):
    with (
        Liar(lies={b"DISCARD ALL": PINGS[name]}) as liar,
        between(postgres, liar, caplog, mode="session", max_size=1) as sidecar,
    ):
        with login(sidecar) as client:
            assert client.rows("select 1") == [["true"]]
            before = len(liar.logins)  # while the lease lasts: it may be replaced right after
        if name == "notices for ever":  # nor does it go when told to
            pool = pool_of(sidecar)
            sidecar.until(lambda: pool.state.by_state[ConnectionState.CLOSING], "it has to go")
            sidecar.call(lambda: pool.tick(clock() + CLOSE_TIMEOUT))
        sidecar.until(lambda: len(liar.logins) > before, "it is replaced")
        sidecar.until(lambda: pool_of(sidecar).state.idle, "by one that is ready")
        with login(sidecar) as client:
            assert client.rows("select 1") == [["true"]]


def test_server_that_does_not_end_when_told_to_keeps_its_place_for_a_while_only(postgres, caplog):
    with (
        Liar(lies={b"DISCARD ALL": says(m.error_response("ERROR", "XX000", "no"), READY)}) as liar,
        between(postgres, liar, caplog, mode="session", max_size=1) as sidecar,
    ):
        liar.ends = False
        pool = pool_of(sidecar)
        with login(sidecar) as client:
            assert client.rows("select 1") == [["true"]]
        sidecar.until(lambda: pool.state.by_state[ConnectionState.CLOSING], "it has to go")
        with Client(sidecar.address) as client:
            client.send(startup({"user": "app", "database": "liar"}))
            assert error(client.until_closed())["C"] in ("53300", "08001")
        assert len(liar.logins) == 1
        sidecar.call(lambda: pool.tick(clock() + CLOSE_TIMEOUT))
        liar.ends = True
        with login(sidecar) as client:
            assert client.rows("select 1") == [["true"]]
            assert len(liar.logins) == 2


def test_statements_of_a_liar_are_not_mixed_up(postgres, caplog):
    """Named statements: their replies are cut out and put in, so a lie must not confuse the books."""
    lie = says(PARSED * 3, CLOSED * 2, m.message(m.NO_DATA, b""), READY)
    with Liar(lies={b"lie": lie}) as liar, between(postgres, liar, caplog) as sidecar:
        for _ in range(3):
            client = login(sidecar)
            client.send(parse("select 1", "s"), describe("S", "s"), m.SYNC_MESSAGE)
            assert kinds(client.until_ready()) == "1TZ"
            client.send(parse("select 1", "t"), run("lie"), describe("S", "s"), m.SYNC_MESSAGE)
            check_is_told(client, "the end")
            client.socket.close()
        check_honest_again(sidecar)
