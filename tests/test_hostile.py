"""Whatever comes in on the clients' port: who sent it is told and closed, nobody else notices.

After every test the pool is whole, no task is left, nothing was logged as an error, and a new client
gets the right answers.
"""

import random
import socket
import struct
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress

import pytest

from sidecar.demo.postgres import EmbeddedPostgres
from sidecar.pool.pool import CLOSE_TIMEOUT
from sidecar.pool.server import clock
from sidecar.proxy.requests import MAX_STATEMENT
from tests.wire import (
    COPY_DONE,
    FLUSH,
    GSSENC_REQUEST,
    SSL_REQUEST,
    SYNC,
    TERMINATE,
    Client,
    Message,
    Sidecar,
    bind,
    close,
    copy_data,
    copy_fail,
    describe,
    error,
    execute,
    kinds,
    parse,
    query,
    resident_memory,
    run,
    startup,
)

LOGIN_TIMEOUT = 1.0  # s, of the sidecars here

AT_ONCE = 0.7  # s; less than the login timeout, which must not be what closes

MAX_CLIENTS = 24

MEMORY = 32 * 1024 * 1024  # bytes that the sidecar may grow by for a client that does not read

LOGIN = startup({"user": "app", "database": "main"})


def check_new_client(sidecar: Sidecar) -> None:
    """In the simple and the extended protocol, named and unnamed, and with nothing left to find."""
    with sidecar.login(application_name="newcomer") as client:
        assert client.rows("select 1, 'a'") == [["1", "a"]]
        messages = client.ask(
            parse("select $1::int + 1", "plus"), bind("41", name="plus"), execute(), SYNC
        )
        assert kinds(messages) == "12DCZ"
        assert messages[2].columns == [b"42"]
        assert kinds(client.ask(run("select $1::text", "x"))) == "12TDCZ"
        assert error(client.ask(bind(name="items"), execute(), SYNC))["C"] == "26000"
        assert client.value("show application_name") == "newcomer"
        assert (
            client.value(
                "select count(*) from pg_prepared_statements where name !~ '^pgsidecar|^plus$'"
            )
            == "0"
        )
        client.send(TERMINATE)
        assert client.until_closed() == []


def unharmed(sidecar: Sidecar, caplog: pytest.LogCaptureFixture) -> Iterator[Sidecar]:
    """The sidecar to attack; afterwards all that must hold, does."""
    sidecar.until_whole()
    tasks = sidecar.tasks
    yield sidecar
    for client in sidecar._clients:
        client.socket.close()
    sidecar._clients.clear()
    sidecar.until_whole()
    check_new_client(sidecar)
    sidecar.until_whole()
    sidecar.until(lambda: sidecar.service._children == set(), "no task of a client is left")
    assert sidecar.tasks <= tasks
    logged = [r for r in caplog.records if r.levelname in ("ERROR", "CRITICAL") or r.exc_info]
    assert not logged, [record.getMessage() for record in logged]


@pytest.fixture(scope="module")
def running(postgres: EmbeddedPostgres) -> Iterator[Sidecar]:
    postgres.psql("drop table if exists hostile; create table hostile (a int)")
    listen = {"login_timeout": f"{LOGIN_TIMEOUT}s", "max_clients": MAX_CLIENTS}
    with Sidecar(postgres, max_size=3, min_idle=1, listen=listen) as sidecar:
        yield sidecar


@pytest.fixture
def sidecar(running, caplog) -> Iterator[Sidecar]:
    yield from unharmed(running, caplog)


@pytest.fixture(scope="module")
def running_guarded(postgres: EmbeddedPostgres) -> Iterator[Sidecar]:
    listen = {"login_timeout": f"{LOGIN_TIMEOUT}s", "auth": "scram-sha-256"}
    with Sidecar(
        postgres, max_size=2, min_idle=1, listen=listen, users={"app": "secret"}
    ) as sidecar:
        yield sidecar


def is_fatal(messages: list[Message], *sqlstates: str) -> bool:
    """The last message says why the connection is closed."""
    told = [m.fields for m in messages if m.kind == "E"]
    return bool(told) and told[-1]["S"] == "FATAL" and told[-1]["C"] in sqlstates


# -- before the login --------------------------------------------------------------------------


def _noise(seed: int, size: int) -> bytes:
    return bytes([255]) + random.Random(seed).randbytes(size - 1)


NO_STARTUP: dict[str, bytes] = {
    "length 0": bytes(4),
    "length 4": struct.pack("!I", 4),
    "length 7": struct.pack("!I", 7) + b"abc",
    "length 10001": struct.pack("!I", 10001),
    "length 2 GiB": struct.pack("!I", 0x7FFFFFFF) + bytes(100),
    "length -1": struct.pack("!i", -1),
    "length -2 GiB": struct.pack("!i", -(2**31)),
    "noise": _noise(1, 64),
    "much noise": _noise(2, 8192),
    "zeros": bytes(8192),
    "an HTTP request": b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "a long HTTP request": b"POST / HTTP/1.1\r\nContent-Length: 5000\r\n\r\n" + b"x" * 5000,
    "a TLS hello": bytes.fromhex("16030100c8010000c40303") + _noise(3, 190),
    "an SSH banner": b"SSH-2.0-OpenSSH_9.2\r\n",
    "a query": query("select 1"),
    "no terminator": struct.pack("!II", 14, 3 << 16) + b"user\0a",
    "a name without a value": struct.pack("!II", 14, 3 << 16) + b"user\0\0",
    "another protocol": struct.pack("!II", 12, 7 << 16) + bytes(4),
    "protocol 2": struct.pack("!II", 296, 2 << 16) + bytes(288),
    "no secret": struct.pack("!III", 12, 80877102, 1),
    "a secret too long": struct.pack("!III", 12 + 300, 80877102, 1) + bytes(300),
    "an SSL request, then noise": SSL_REQUEST + _noise(4, 20),
    "four encryption requests": SSL_REQUEST,
}


@pytest.mark.parametrize("name", NO_STARTUP)
def test_what_is_no_startup_packet_is_refused_at_once(sidecar, name):
    client = sidecar.connect()
    began = time.monotonic()
    client.send(NO_STARTUP[name])
    if name == "four encryption requests":
        for request in (GSSENC_REQUEST, SSL_REQUEST):
            assert client._take(1) == b"N"
            client.send(request)
        assert client._take(1) == b"N"
    messages = client.until_closed()
    assert time.monotonic() - began < AT_ONCE
    assert kinds(messages) == "E", messages
    assert is_fatal(messages, "08P01", "0A000", "28000"), messages[0].fields


def test_who_does_not_complete_the_login_is_closed_in_time(sidecar):
    """Half-open, in the middle of a packet, one byte at a time: none can stay."""
    half_open = sidecar.connect()
    in_length = sidecar.connect()
    in_length.send(LOGIN[:3])
    in_packet = sidecar.connect()
    in_packet.send(LOGIN[:-1])
    after_ssl = sidecar.connect()
    after_ssl.send(SSL_REQUEST)
    assert after_ssl._take(1) == b"N"
    slow = sidecar.connect()
    long_login = startup({"user": "app", "database": "main", "application_name": "x" * 1000})
    witness = sidecar.login()
    began = time.monotonic()
    for at in range(len(long_login)):
        try:
            slow.send(long_login[at : at + 1])
        except OSError:
            break
        time.sleep(0.02)
        assert witness.value("select 7") == "7"
    for client in (half_open, in_length, in_packet, after_ssl, slow):
        messages = client.until_closed()
        assert kinds(messages) == "E"
        assert is_fatal(messages, "57014"), messages[0].fields
    assert time.monotonic() - began < LOGIN_TIMEOUT + 2
    assert witness.value("select 8") == "8"


def _password(body: bytes, length: int | None = None) -> bytes:
    return b"p" + struct.pack("!I", len(body) + 4 if length is None else length % 2**32) + body


NO_PASSWORD: dict[str, bytes] = {
    "noise": _noise(5, 64),
    "much noise": _noise(6, 60_000),
    "length 0": _password(b"", 0),
    "length -1": _password(b"", -1),
    "length 64 KiB + 1": _password(b"", 64 * 1024 + 1),
    "length 2 GiB": _password(bytes(1000), 0x7FFFFFFF),
    "nothing": _password(b""),
    "no mechanism": _password(b"\0"),
    "another mechanism": _password(b"PLAIN\0" + struct.pack("!i", 3) + b"abc"),
    "empty SCRAM": _password(b"SCRAM-SHA-256\0" + struct.pack("!i", -1)),
    "not SCRAM": _password(b"SCRAM-SHA-256\0" + struct.pack("!i", 200) + _noise(7, 200)),
    "64 KiB of SCRAM": _password(b"SCRAM-SHA-256\0" + struct.pack("!i", 60_000) + b"n,," * 20_000),
    "not UTF-8": _password(b"SCRAM-SHA-256\0" + struct.pack("!i", 4) + b"n,,\xff"),
    "a query": query("select 1"),
    "a password": _password(b"secret\0"),
}


@pytest.fixture
def guarded(running_guarded, caplog) -> Iterator[Sidecar]:
    sidecar = running_guarded
    sidecar.until_whole()
    tasks = sidecar.tasks
    yield sidecar
    for client in sidecar._clients:
        client.socket.close()
    sidecar._clients.clear()
    sidecar.until_whole()
    assert sidecar.tasks <= tasks
    logged = [r for r in caplog.records if r.levelname in ("ERROR", "CRITICAL") or r.exc_info]
    assert not logged, [record.getMessage() for record in logged]


@pytest.mark.parametrize("name", NO_PASSWORD)
def test_what_is_no_password_is_refused_at_once(guarded, name):
    client = guarded.connect()
    client.send(LOGIN)
    assert client.receive().kind == "R"
    began = time.monotonic()
    client.send(NO_PASSWORD[name])
    messages = client.until_closed()
    assert time.monotonic() - began < AT_ONCE
    assert is_fatal(messages, "08P01", "28P01"), messages


def test_who_is_slow_with_the_password_is_closed_in_time(guarded):
    silent, slow = guarded.connect(), guarded.connect()
    for client in (silent, slow):
        client.send(LOGIN)
        assert client.receive().kind == "R"
    began = time.monotonic()
    with suppress(OSError):
        while time.monotonic() - began < LOGIN_TIMEOUT + 1:
            slow.send(b"p\0\0\1\0"[:1] if time.monotonic() == began else b"\0")
            time.sleep(0.02)
    assert is_fatal(silent.until_closed(), "57014")
    assert is_fatal(slow.until_closed(), "57014", "08P01")
    assert time.monotonic() - began < LOGIN_TIMEOUT + 2


def test_a_burst_of_connections_leaves_nothing(sidecar):
    """Opened and closed at once: politely, by a reset, in the middle of the packet, after it."""
    witness = sidecar.login()
    for number in range(1200):
        client = Client(sidecar.address)
        if number % 4 == 1:
            client.send(LOGIN[:9])
        elif number % 4 == 2:
            client.send(LOGIN)
        elif number % 4 == 3:
            client.send(LOGIN, query("select 1"))
        if number % 3:
            client.abort()
        else:
            client.socket.close()
        if number % 100 == 0:
            assert witness.value("select 1") == "1"
    assert sidecar.pool.state.size <= 3


def test_clients_beyond_the_limit_are_told_and_the_others_stay(sidecar):
    inside = [sidecar.login() for _ in range(MAX_CLIENTS)]
    outside = [sidecar.connect() for _ in range(30)]
    for client in outside:
        client.send(LOGIN)
    for client in outside:
        assert is_fatal(client.until_closed(), "53300")
    for client in inside:
        assert client.value("select 1") == "1"
    for client in inside[:10]:
        client.send(TERMINATE)
        assert client.until_closed() == []
    assert [sidecar.login().value("select 2") for _ in range(10)] == ["2"] * 10


# -- after the login ---------------------------------------------------------------------------


def _message(kind: str | int, body: bytes = b"", length: int | None = None) -> bytes:
    head = bytes([kind if isinstance(kind, int) else ord(kind)])
    return head + struct.pack("!I", (len(body) + 4 if length is None else length) % 2**32) + body


NO_MESSAGE: dict[str, bytes] = {
    **{f"type {kind}": _message(kind, b"abc\0") for kind in (0, 1, 32, 127, 128, 255)},
    "a server's message": _message("Z", b"I"),
    "a password": _message("p", b"secret\0"),
    "a startup packet": LOGIN,
    "an HTTP request": b"GET / HTTP/1.1\r\n\r\n",
    "noise": _noise(8, 3000),
    "zeros": bytes(1000),
    **{
        f"{kind} of length {length}": _message(kind, b"x" * 8, length)
        for kind in "QPBDECSHFdcfX"
        for length in (0, 3, -1, 0x40000000, 0x7FFFFFFF)
    },
    "Parse without an end": _message("P", b"name"),
    "Parse of nothing": _message("P"),
    "Bind without an end": _message("B", b"portal"),
    "Bind with half its names": _message("B", b"\0stmt"),
    "Bind of nothing": _message("B"),
    "Describe without an end": _message("D", b"Sname"),
    "Describe with only a kind": _message("D", b"S"),
    "Close without an end": _message("C", b"Sname"),
    "Close of a portal without an end": _message("C", b"Pname"),
    "Close of nothing": _message("C"),
}


def _nothing(client: Client) -> None:
    """No lease."""


def _in_transaction(client: Client) -> None:
    client.rows("begin; insert into hostile values (1)")


def _in_failed_transaction(client: Client) -> None:
    client.ask(query("begin"))
    assert error(client.ask(query("insert into hostile values (1); select 1/0")))["C"] == "22012"


def _in_pipeline(client: Client) -> None:
    client.send(parse("insert into hostile values (1)"), bind(), execute(), FLUSH)
    client.until("C")


def _in_copy(client: Client) -> None:
    client.send(query("copy hostile from stdin"), copy_data(b"1\n"))
    client.until("G")


STATES: dict[str, Callable[[Client], None]] = {
    "without a lease": _nothing,
    "in a transaction": _in_transaction,
    "in a failed transaction": _in_failed_transaction,
    "in a pipeline": _in_pipeline,
    "in a copy": _in_copy,
}


@pytest.mark.parametrize("state", STATES)
def test_what_is_no_message_closes_that_client_only(sidecar, state):
    """With FATAL 08P01, at once; what it was doing is rolled back."""
    witness = sidecar.login()
    for name, data in NO_MESSAGE.items():
        client = sidecar.login()
        STATES[state](client)
        client.socket.settimeout(2)
        try:
            client.send(data)
            messages = client.until_closed()
        except TimeoutError:
            pytest.fail(f"{name}: not refused")
        assert is_fatal(messages, "08P01"), (name, messages)
        assert witness.rows("select count(*) from hostile") == [["0"]], name


HALF_TRUE: dict[str, bytes] = {
    "Query without an end": _message("Q", b"select 1"),
    "Query of nothing": _message("Q"),
    "Query with two ends": _message("Q", b"select 1\0select 2\0"),
    "Query that is not UTF-8": _message("Q", b"select '\xff\xfe'\0"),
    "Parse of no text": _message("P", b"\0"),
    "Parse whose text has no end": _message("P", b"\0select 1"),
    "named Parse whose text has no end": _message("P", b"half\0select 1"),
    "Parse with too few types": _message("P", b"\0select 1\0" + struct.pack("!h", 100)),
    "Parse with -1 types": _message("P", b"\0select 1\0" + struct.pack("!h", -1)),
    "Bind without counts": _message("B", b"\0\0"),
    "Bind with a value too long": _message(
        "B", b"\0\0" + struct.pack("!hhi", 0, 1, 0x7FFFFFFF) + b"x"
    ),
    "Bind with 65535 values": _message("B", b"\0\0" + struct.pack("!hh", 0, -1)),
    "Bind of a statement that is ours": bind(name="pgsidecar_1"),
    "Bind of no statement": bind(name="missing"),
    "Describe of nothing": _message("D"),
    "Describe of a third kind": _message("D", b"Xname\0"),
    "Execute without an end": _message("E", b"portal"),
    "Execute of nothing": _message("E"),
    "Close of a third kind": _message("C", b"Xname\0"),
    "FunctionCall of nothing": _message("F"),
    "FunctionCall of no function": _message("F", struct.pack("!ihhh", 0, 0, 0, 0)),
    "Sync with a body": _message("S", b"body"),
    "Flush with a body": _message("H", b"body"),
}
"""Well framed, so PostgreSQL may judge: with an error after which the client goes on."""


@pytest.mark.parametrize("state", ["without a lease", "in a transaction"])
def test_what_postgresql_refuses_costs_no_connection_of_others(sidecar, state):
    witness = sidecar.login()
    for name, data in HALF_TRUE.items():
        client = sidecar.login()
        STATES[state](client)
        client.socket.settimeout(2)
        try:
            client.send(data, SYNC, query("rollback"), query("select 'a', 5"))
            while True:
                message = client.receive()
                if message.kind == "D" and message.columns == [b"a", b"5"]:
                    break
                if message.kind == "E" and message.fields["S"] == "FATAL":
                    assert client.until_closed() == [], name
                    break
        except (TimeoutError, EOFError):
            pytest.fail(f"{name}: no answer")
        assert witness.rows("select count(*) from hostile") == [["0"]], name


def test_copy_messages_out_of_place_are_nobodys(sidecar):
    """PostgreSQL ignores them after a copy that failed; so they must not count as requests."""
    client = sidecar.login()
    for state in (_nothing, _in_transaction):
        state(client)
        client.send(copy_data(b"1\n"), COPY_DONE, copy_fail("no"), copy_data(b"x" * 100_000))
        assert client.value("select 3") == "3"
        client.rows("rollback")


@pytest.mark.parametrize("state", ["without a lease", "in a transaction"])
def test_named_statement_over_the_limit_is_refused(sidecar, state):
    """A client that goes on writing still finds the error. Up to the limit it is served."""
    client = sidecar.login()
    assert (
        kinds(client.ask(parse("select 1 -- " + "x" * (MAX_STATEMENT - 100), "long"), SYNC)) == "1Z"
    )
    STATES[state](client)
    with suppress(ConnectionError):
        client.send(parse("select 1 -- " + "x" * MAX_STATEMENT, "longer"), SYNC)
    assert is_fatal(client.until_closed(), "54000")


# -- clients that take, or give, too much ------------------------------------------------------


def _flood(client: Client, data: bytes) -> None:
    """Send until nobody reads it any more."""
    sent = 0
    try:
        while sent < 2 * MEMORY:
            sent += client.socket.send(data)
    except TimeoutError:
        return
    pytest.fail(f"{sent} bytes were read without an answer being read")


def test_client_that_never_reads_costs_its_connection_and_no_memory(sidecar):
    witness = sidecar.login()
    before = resident_memory()
    reluctant = sidecar.login()
    reluctant.send(query("select repeat('x', 1000) from generate_series(1, 100000)"))
    sidecar.until(lambda: len(sidecar.pool.state.active) == 1, "it has its lease")
    deadline = time.monotonic() + 1.0
    while time.monotonic() < deadline:
        assert witness.value("select 'and I?'") == "and I?"
    assert resident_memory() - before < MEMORY
    assert len(sidecar.pool.state.active) == 1
    reluctant.socket.close()
    sidecar.until(lambda: not sidecar.pool.state.active, "its connection is given back")


def test_client_that_asks_without_reading_is_not_read_any_more(sidecar):
    """The server waits for it, we wait for the server, it waits for us."""
    witness = sidecar.login()
    before = resident_memory()
    greedy = sidecar.login()
    greedy.socket.settimeout(0.5)
    asked = query("select repeat('y', 10000)") * 1000
    _flood(greedy, asked)
    assert witness.value("select 1") == "1"
    assert resident_memory() - before < MEMORY
    greedy.socket.close()
    sidecar.until(lambda: not sidecar.pool.state.active, "its connection is taken away")
    # The server has a pipeline to run for nobody: it gets CLOSE_TIMEOUT for that.
    sidecar.call(lambda: sidecar.pool.tick(clock() + CLOSE_TIMEOUT))


def test_client_that_is_refused_without_reading_is_not_read_any_more(postgres, caplog):
    """What it is told is longer than what it asks: it must not fill our memory with refusals."""
    with Sidecar(postgres, max_size=1, max_waiting=1, min_idle=1) as sidecar:
        for running in unharmed(sidecar, caplog):
            holder, waiter = running.login(), running.login()
            holder.rows("begin")
            waiter.send(query("select 1"))
            running.until(lambda: sidecar.pool.state.waiters, "one waits")
            before = resident_memory()
            greedy = running.login()
            greedy.socket.settimeout(1)
            asked = query("x") * 10_000
            _flood(greedy, asked)
            assert resident_memory() - before < MEMORY
            assert holder.value("select 1") == "1"
            # who reads again is answered again: everything it asked, in order
            greedy.socket.settimeout(5)
            for _ in range(1000):
                assert kinds(greedy.until_ready()) == "EZ"
            holder.rows("commit")
            assert kinds(waiter.until_ready()) == "TDCZ"


def test_huge_query_written_slowly_keeps_nobody_waiting(sidecar):
    """64 MiB pass through in pieces: it takes one connection, not the memory."""
    witness = sidecar.login()
    size = 64 * 1024 * 1024
    piece = b"z" * (1024 * 1024)
    before = resident_memory()
    writer = sidecar.login()
    writer.send(
        b"Q" + struct.pack("!I", 4 + len(b"select length('')\0") + size) + b"select length('"
    )
    for _ in range(size // len(piece)):
        writer.send(piece)
        assert witness.value("select 9") == "9"
    assert resident_memory() - before < MEMORY
    writer.send(b"')\0")
    messages = writer.until_ready()
    assert kinds(messages) == "TDCZ"
    assert messages[1].columns == [str(size).encode()]


def test_client_that_goes_amid_a_huge_query_takes_its_connection_with_it(sidecar):
    witness = sidecar.login()
    for end in (Client.abort, lambda client: client.socket.close()):
        writer = sidecar.login()
        writer.send(_message("Q", b"insert into hostile values (1) -- " + b"x" * 100_000, 200_000))
        sidecar.until(lambda: len(sidecar.pool.state.active) == 1, "it has its lease")
        end(writer)
        sidecar.until(lambda: not sidecar.pool.state.active, "it is gone")
        assert witness.rows("select count(*) from hostile") == [["0"]]


# -- mutations of legal streams ----------------------------------------------------------------

LEGAL: list[list[bytes]] = [
    [query("select 1"), query("select 'x', null, 3"), query("select 1/0"), query("")],
    [
        query("begin"),
        query("select 1"),
        query("savepoint a"),
        query("rollback to a"),
        query("commit"),
    ],
    [parse("select $1::int"), bind("1"), describe("P"), execute(), SYNC],
    [
        *(parse("select $1::text", "items"), describe("S", "items"), SYNC),
        *(bind("a", name="items"), execute(), bind("b", name="items"), execute(), SYNC),
        *(close("S", "items"), parse("select $1::int", "items"), SYNC),
    ],
    [
        *(parse("select i from generate_series(1, 9) i"), bind(portal="p"), execute(2, "p"), FLUSH),
        *(execute(2, "p"), close("P", "p"), SYNC),
    ],
    [query("copy hostile to stdout"), query("create temp table copied (a int)")],
    [
        query("begin"),
        query("copy hostile from stdin"),
        copy_data(b"1\n"),
        COPY_DONE,
        query("rollback"),
    ],
    [query("copy hostile from stdin"), copy_data(b"1\n"), copy_fail("no"), query("select 2")],
    [run("select 1/0"), run("select 2"), run("begin"), run("select 3"), run("rollback")],
    [query("set application_name = 'mutant'"), query("reset all"), query("discard all")],
    [parse("set search_path = 'mutant'", "s"), bind(name="s"), execute(), SYNC],
    [query("select '" + "x" * 20_000 + "'"), parse("select '" + "y" * 20_000 + "'", "long"), SYNC],
]


def _mutant(rng: random.Random) -> bytes:
    messages = list(rng.choice(LEGAL)) + list(rng.choice(LEGAL))
    for _ in range(rng.choice((0, 1, 1, 2))):
        at, other = rng.randrange(len(messages)), rng.randrange(len(messages))
        match rng.randrange(3):
            case 0:
                messages[at], messages[other] = messages[other], messages[at]
            case 1:
                messages.insert(at, messages[other])
            case _:
                del messages[at]
    data = bytearray(b"".join(messages))
    for _ in range(rng.choice((0, 1, 1, 3, 10))):
        at = rng.randrange(len(data))
        match rng.randrange(5):
            case 0:
                data[at] ^= 1 << rng.randrange(8)
            case 1:
                data[at] = rng.choice((0, 1, 4, 5, 127, 255))
            case 2:
                del data[at : at + rng.randrange(1, 9)]
            case 3:
                data[at:at] = rng.randbytes(rng.randrange(1, 9))
            case _:
                data[at:at] = data[max(0, at - 20) : at]
        if not data:
            break
    if rng.random() < 0.3:
        del data[rng.randrange(len(data) + 1) :]
    return bytes(data)


def _pieces(rng: random.Random, data: bytes) -> Iterable[bytes]:
    if rng.random() < 0.7:
        return [data]
    cuts = sorted(rng.randrange(len(data) + 1) for _ in range(3))
    return [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]


def _attack(sidecar: Sidecar, rng: random.Random) -> None:
    data = _mutant(rng)
    with Client(sidecar.address) as client, suppress(ConnectionError, EOFError, AssertionError):
        if rng.random() < 0.1:
            start = bytearray(LOGIN)
            start[rng.randrange(len(start))] ^= 1 << rng.randrange(8)
            data = bytes(start) + data
        else:
            client.log_in("app", "main")
        client.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for piece in _pieces(rng, data):
            client.send(piece)
        client.socket.settimeout(rng.choice((0.001, 0.02, 0.02)))
        with suppress(TimeoutError):
            while client.socket.recv(65536):
                pass
        if rng.random() < 0.3:
            client.abort()


@pytest.mark.parametrize("mode", ["transaction", "session"])
@pytest.mark.parametrize("seed", [1, 2])
def test_no_mutation_of_a_legal_stream_harms_the_next_client(postgres, caplog, seed, mode):
    """One connection for all, so that whatever a mutant left on it, the next one would find."""
    postgres.psql("create table if not exists hostile (a int)")
    rng = random.Random(seed)
    listen = {"login_timeout": f"{LOGIN_TIMEOUT}s"}
    with Sidecar(postgres, max_size=1, min_idle=1, mode=mode, listen=listen) as sidecar:
        for running in unharmed(sidecar, caplog):
            for _ in range(60):
                _attack(running, rng)
                check_new_client(running)
    postgres.psql("truncate hostile")


def test_more_sockets_than_can_be_told_why_do_not_end_the_service(postgres):
    """Beyond ``max_clients`` and 100 in login, sockets are closed unheard: before they were made,
    which ended the whole service."""
    with Sidecar(postgres, max_size=1, listen={"max_clients": 1}) as sidecar:
        sockets = [socket.create_connection(sidecar.address) for _ in range(150)]
        for each in sockets:
            each.close()
        listener = sidecar.service._listener
        assert listener is not None
        sidecar.until(lambda: not listener._logins, "the sockets are gone")
        check_new_client(sidecar)
