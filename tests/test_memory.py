"""Much data and little memory: results, COPY and messages of up to 1 GiB, with clients that are slow.

The sidecar is a process of its own, and the kernel says how much memory it has had at most.
"""

import re
import ssl
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sidecar.demo.postgres import EmbeddedPostgres
from sidecar.protocol import messages as m
from tests import wire
from tests.certificates import Authority
from tests.sidecar_process import SidecarProcess, configuration
from tests.wire import Client, query

MIB = 1 << 20
GIB = 1 << 30

GROWTH = 32 * MIB
"""More the sidecar's memory must not grow, whatever passes through it."""

SPURT = 64 * MIB
"""Bytes that a slow client reads, or sends, before it pauses."""

PAUSE = 0.05  # s

LARGEST = 1_000_000_000
"""Bytes of the largest value: with what surrounds it, a message of PostgreSQL has to stay below 1 GiB."""

pytestmark = pytest.mark.timeout(180)  # seconds; 10 or less, where nobody else computes


class Memory:
    """Of a process, in bytes (Linux)."""

    def __init__(self, pid: int) -> None:
        self._folder = Path(f"/proc/{pid}")

    def now(self) -> int:
        return self._read("VmRSS")

    def most(self) -> int:
        """Since ``forget``."""
        return self._read("VmHWM")

    def forget(self) -> None:
        (self._folder / "clear_refs").write_text("5")  # proc(5)

    def _read(self, name: str) -> int:
        found = re.search(rf"{name}:\s+(\d+) kB", (self._folder / "status").read_text())
        assert found
        return int(found[1]) * 1024


class Slow:
    """A client that reads and sends in spurts, and keeps nothing."""

    def __init__(self, sidecar: SidecarProcess, *, tls: bool) -> None:
        self.sidecar = sidecar
        self.client = Client(("127.0.0.1", sidecar.pg_port))
        if tls:
            self.client.send(wire.SSL_REQUEST)
            assert self.client.socket.recv(1) == b"S"
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
            self.client.socket = context.wrap_socket(self.client.socket)
        self.client.log_in("app", "main")
        self.client.socket.settimeout(60)

    def read(self) -> tuple[int, bytes]:
        """Up to ReadyForQuery. How many bytes, and the last of them."""
        time.sleep(0.3)  # for whoever buffers to show it
        buffer = memoryview(bytearray(MIB))
        total, spurt, last = 0, 0, b""
        while not last.endswith(m.READY_IDLE_MESSAGE):
            size = self.client.socket.recv_into(buffer)
            assert size, f"closed after {total} bytes"
            total += size
            spurt += size
            last = (last + bytes(buffer[max(0, size - 64) : size]))[-64:]
            if spurt >= SPURT:
                spurt = 0
                time.sleep(PAUSE)
        return total, last

    def send(self, pieces: Iterator[bytes]) -> int:
        """Returns how many bytes."""
        total = spurt = 0
        for piece in pieces:
            self.client.send(piece)
            total += len(piece)
            spurt += len(piece)
            if spurt >= SPURT:
                spurt = 0
                time.sleep(PAUSE)
        return total


def tag(last: bytes) -> str:
    """Of the CommandComplete before ReadyForQuery."""
    found = re.search(
        rb"C\0\0\0.([A-Z]+[ 0-9]*)\0$", last.removesuffix(m.READY_IDLE_MESSAGE), re.DOTALL
    )
    return found[1].decode() if found else ""


@pytest.fixture(scope="module", params=["plain", "tls"])
def sidecar(
    postgres: EmbeddedPostgres,
    tmp_path_factory: pytest.TempPathFactory,
    request: pytest.FixtureRequest,
) -> Iterator[SidecarProcess]:
    folder = tmp_path_factory.mktemp("memory")
    listen: dict[str, object] = {}
    if request.param == "tls":
        certificate, key = Authority("memory").issue("localhost").write(folder, "server")
        listen = {
            "tls_mode": "require",
            "tls_cert_file": str(certificate),
            "tls_key_file": str(key),
        }
    text = configuration(postgres.dsn(), listen=listen, max_size=2, min_idle=2)
    process = SidecarProcess.start(text, folder)
    yield process
    process.close()


@pytest.fixture
def slow(sidecar: SidecarProcess, request: pytest.FixtureRequest) -> Iterator[Slow]:
    """A client of a sidecar that has done all of this before, on a small scale. At the end its memory
    must not have been larger than then, but for ``GROWTH``."""
    client = Slow(sidecar, tls="tls" in request.node.callspec.id)
    client.client.ask(query("CREATE TABLE IF NOT EXISTS memory (t text)"))
    client.client.ask(query("SELECT repeat('x', 1000) FROM generate_series(1, 1000)"))
    memory = Memory(sidecar.process.pid)
    before = memory.now()
    memory.forget()
    yield client
    client.client.socket.close()
    grown = memory.most() - before
    print(f"grown by {grown / MIB:.1f} MiB from {before / MIB:.1f} MiB")
    assert grown < GROWTH


plainly = pytest.mark.parametrize("sidecar", ["plain"], indirect=True)
"""For what is no other matter with TLS than without."""


# -- from the server -------------------------------------------------------------------------------


def test_result_of_1_gib(slow: Slow) -> None:
    rows = GIB // 8000
    slow.client.send(query(f"SELECT repeat('x', 8000) FROM generate_series(1, {rows})"))
    total, last = slow.read()
    assert total > rows * 8000
    assert tag(last) == f"SELECT {rows}"


@plainly
def test_copy_of_1_gib_to_the_client(slow: Slow) -> None:
    rows = GIB // 8000
    select = f"SELECT repeat('x', 8000) FROM generate_series(1, {rows})"
    slow.client.send(query(f"COPY ({select}) TO STDOUT"))
    total, last = slow.read()
    assert total > rows * 8000
    assert tag(last) == f"COPY {rows}"


@plainly  # PostgreSQL itself takes three times as much
def test_largest_value(slow: Slow) -> None:
    """A single row of nearly 1 GiB: a message that nobody could keep."""
    slow.client.send(query(f"SELECT repeat(repeat('x', 100000), {LARGEST // 100_000})"))
    total, last = slow.read()
    assert total > LARGEST
    assert tag(last) == "SELECT 1"


@plainly
@pytest.mark.parametrize("level", ["NOTICE", "EXCEPTION"])
def test_long_notice_and_error(slow: Slow, level: str) -> None:
    text = f"RAISE {level} '%', repeat(repeat('x', 100000), 1000)"
    slow.client.send(query(f"DO $$ BEGIN {text}; END $$"))
    total, last = slow.read()
    assert total > 100_000_000
    assert (tag(last) == "DO") is (level == "NOTICE")
    assert slow.client.value("SELECT 1") == "1"


# -- from the client -------------------------------------------------------------------------------

PIECE = 64 * 1024


def in_pieces(kind: int, head: bytes, filling: bytes, size: int, tail: bytes) -> Iterator[bytes]:
    """One message with a body of ``head``, ``size`` bytes of ``filling``, and ``tail``."""
    yield m.HEADER.pack(kind, 4 + len(head) + size + len(tail)) + head
    piece = filling * (PIECE // len(filling))
    for at in range(0, size, len(piece)):
        yield piece[: size - at]
    yield tail


@plainly  # with TLS: see the long parameter
def test_copy_of_1_gib_from_the_client(slow: Slow) -> None:
    """As libpq sends it, and then as one message of a quarter of a GiB."""
    slow.client.send(query("COPY memory FROM STDIN WHERE false"))
    slow.client.until("G")
    line = b"x" * 8191 + b"\n"
    data = wire.copy_data(line * 8)
    slow.send(data for _ in range(GIB // (8 * len(line))))
    slow.send(in_pieces(m.COPY_DATA, b"", line, GIB // 4, b""))
    slow.client.send(wire.COPY_DONE)
    _, last = slow.read()
    assert tag(last) == "COPY 0"


def test_long_parameter(slow: Slow) -> None:
    """Bind with 300 MiB."""
    size = 300 * MIB
    slow.client.send(wire.parse("SELECT length($1)", types=[17]))
    head = b"\0\0" + struct.pack("!HHHi", 1, 1, 1, size)
    slow.send(in_pieces(m.BIND, head, b"x", size, struct.pack("!H", 0)))
    slow.client.send(wire.execute(), wire.SYNC)
    messages = slow.client.until_ready()
    assert [each.columns for each in messages if each.kind == "D"] == [[str(size).encode()]]


@plainly
def test_long_query(slow: Slow) -> None:
    """Of 100 MiB, by the simple protocol and by the extended one."""
    size = 100 * MIB
    select = b"SELECT length('"
    slow.send(in_pieces(m.QUERY, select, b"x", size, b"')\0"))
    messages = slow.client.until_ready()
    slow.send(in_pieces(m.PARSE, b"\0" + select, b"x", size, b"')\0\0\0"))
    slow.client.send(wire.bind(), wire.execute(), wire.SYNC)
    messages += slow.client.until_ready()
    assert [each.columns for each in messages if each.kind == "D"] == [[str(size).encode()]] * 2


@plainly
def test_waiting_client_is_not_read(slow: Slow) -> None:
    """What it has sent stays with the kernel, and with the client, until it has a connection."""
    holders = [Client(("127.0.0.1", slow.sidecar.pg_port)) for _ in range(2)]
    for holder in holders:
        holder.log_in("app", "main")
        holder.ask(query("BEGIN"))
    size = 100 * MIB
    sending = threading.Thread(
        target=slow.send, args=(in_pieces(m.QUERY, b"SELECT length('", b"x", size, b"')\0"),)
    )
    sending.start()
    sending.join(1.0)
    assert sending.is_alive()
    for holder in holders:
        holder.socket.close()
    messages = slow.client.until_ready()
    sending.join()
    assert [each.columns for each in messages if each.kind == "D"] == [[str(size).encode()]]
