"""TLS to clients, byte by byte: who breaks off, stalls, lies or floods harms nobody else; and the relay
works over it as over a plain socket."""

import asyncio
import gc
import random
import socket
import ssl
import struct
import threading
import time
from collections.abc import Iterator

import psycopg
import pytest

from sidecar.demo.postgres import EmbeddedPostgres
from sidecar.protocol import messages as m
from sidecar.protocol.authentication import ClientExchange, server_end_point
from sidecar.proxy.tls import TlsTransport
from tests.listener_files import ListenerFiles
from tests.sidecar_process import PATIENCE, MakeService
from tests.test_cancel import LONG, check_cancel_safe, until_running
from tests.wire import (
    GSSENC_REQUEST,
    SSL_REQUEST,
    Client,
    Sidecar,
    error,
    kinds,
    query,
    run,
    startup,
)

pytestmark = pytest.mark.usefixtures("no_errors_logged")

LOGIN_TIMEOUT = 1.0
LOGIN = startup({"user": "app", "database": "main"})
HELLO = bytes.fromhex("16030100c8010000c40303")  # of 200 bytes, and no more of it


@pytest.fixture(scope="module")
def running(postgres: EmbeddedPostgres, files: ListenerFiles) -> Iterator[Sidecar]:
    listen = files.listen(auth="trust", login_timeout=f"{LOGIN_TIMEOUT}s")
    with Sidecar(postgres, max_size=3, listen=listen) as sidecar:
        yield sidecar


@pytest.fixture
def sidecar(running: Sidecar, files: ListenerFiles) -> Iterator[Sidecar]:
    """Afterwards nothing is left of any client, and new ones are served."""
    yield running
    for client in running._clients:
        client.socket.close()
    running._clients.clear()
    running.until_whole()
    with logged_in(running, files) as client:
        assert client.value("select 1") == "1"
    running.until_whole()


def client_context(files: ListenerFiles, alpn: str = "postgresql") -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=files.root)
    if alpn:
        context.set_alpn_protocols([alpn])
    return context


def encrypted(
    sidecar: Sidecar, files: ListenerFiles, *, is_direct: bool = False, alpn: str = "postgresql"
) -> Client:
    """A client after the handshake."""
    client = sidecar.connect()
    if not is_direct:
        client.send(SSL_REQUEST)
        assert client.socket.recv(1) == b"S"
    context = client_context(files, alpn)
    client.socket = context.wrap_socket(client.socket, server_hostname="localhost")
    return client


def logged_in(sidecar: Sidecar, files: ListenerFiles) -> Client:
    client = encrypted(sidecar, files)
    client.log_in("app", "main")
    return client


def ends_silently(client: Client) -> bool:
    """The connection ends, without an error that the client could read."""
    try:
        while data := client.socket.recv(65536):
            assert data[:1] == b"\x15"  # a TLS alert
    except ConnectionResetError:
        pass
    return True


# -- before and in the handshake ---------------------------------------------------------------


@pytest.mark.parametrize("behind", [b"x", LOGIN, HELLO])
def test_bytes_before_the_upgrade_are_refused(sidecar, behind):
    """Whoever sits in between could have put them there (CVE-2021-23214)."""
    client = sidecar.connect()
    client.send(SSL_REQUEST + behind)
    said = error(client.until_closed())
    assert (said["C"], said["M"]) == (
        "08P01",
        "received unencrypted data after an encryption request",
    )


def test_gssapi_is_declined_before_and_not_within_tls(sidecar, files):
    client = sidecar.connect()
    client.send(GSSENC_REQUEST)
    assert client.socket.recv(1) == b"N"
    client.send(SSL_REQUEST)
    assert client.socket.recv(1) == b"S"
    client.socket = client_context(files).wrap_socket(client.socket, server_hostname="localhost")
    client.log_in("app", "main")
    for request in (SSL_REQUEST, GSSENC_REQUEST):
        client = encrypted(sidecar, files)
        client.send(request)
        assert error(client.until_closed())["C"] == "08P01"


@pytest.mark.parametrize("alpn", ["", "http/1.1"])
def test_direct_tls_has_to_name_the_protocol(sidecar, files, alpn):
    """Else a browser could be led here, and what it sends be taken for PostgreSQL's protocol."""
    client = encrypted(sidecar, files, is_direct=True, alpn=alpn)
    said = error(client.until_closed())
    assert said["M"].startswith("received direct SSL connection request without ALPN")
    client = encrypted(sidecar, files, is_direct=True)
    assert isinstance(client.socket, ssl.SSLSocket)
    assert client.socket.selected_alpn_protocol() == "postgresql"
    client.log_in("app", "main")
    encrypted(sidecar, files, alpn="").log_in("app", "main")  # clients before PostgreSQL 17


NOISE = {
    "a plain startup packet": LOGIN,
    "zeros": bytes(5000),
    "noise": random.Random(1).randbytes(5000),
    "a hello that is none": HELLO + random.Random(2).randbytes(194),
    "HTTP": b"GET / HTTP/1.1\r\n\r\n",
    "an alert": bytes.fromhex("15030300020228"),
    "much": random.Random(3).randbytes(300_000),
    "records without end": bytes.fromhex("1603014000") + bytes(100_000),
}


@pytest.mark.parametrize("is_direct", [False, True])
@pytest.mark.parametrize("name", NOISE)
def test_garbage_in_the_handshake_ends_it(sidecar, name, is_direct):
    client = sidecar.connect()
    data = NOISE[name]
    if is_direct:
        data = b"\x16" + data[1:]
    else:
        client.send(SSL_REQUEST)
        assert client.socket.recv(1) == b"S"
    began = time.monotonic()
    try:
        client.send(data)
    except ConnectionError:
        pass  # it has heard enough
    assert ends_silently(client)
    assert time.monotonic() - began < LOGIN_TIMEOUT + 2


def test_stalled_handshakes_end_in_time_and_delay_nobody(sidecar, files):
    """Before a byte of it, in the middle of the hello, after the server's answer."""
    stalled = [sidecar.connect() for _ in range(20)]
    for number, client in enumerate(stalled):
        client.send(SSL_REQUEST)
        assert client.socket.recv(1) == b"S"
        if number % 2:
            client.send(HELLO)
        if number % 4 == 3:
            client.send(bytes(100))
    began = time.monotonic()
    with logged_in(sidecar, files) as client:
        assert client.value("select 1") == "1"
    assert time.monotonic() - began < LOGIN_TIMEOUT
    for client in stalled:
        assert ends_silently(client)
    assert time.monotonic() - began < LOGIN_TIMEOUT + 2


def test_handshake_cut_anywhere_leaves_nothing(sidecar, files):
    """The client's part of a handshake, up to each of many bytes; then it goes, one way or another."""
    context = client_context(files)
    for cut in [0, 1, 4, 5, 6, 50, 150, 250, 300, 400, 500, 510, 520, 530, 540, 600]:
        client = sidecar.connect()
        client.send(SSL_REQUEST)
        assert client.socket.recv(1) == b"S"
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = context.wrap_bio(incoming, outgoing, server_hostname="localhost")
        left = cut
        while left > 0:
            try:
                tls.do_handshake()
                tls.write(LOGIN)
            except ssl.SSLWantReadError:
                pass
            data = outgoing.read()[:left]
            if not data:
                break
            client.send(data)
            left -= len(data)
            if left > 0:
                incoming.write(client.socket.recv(65536))
        if cut % 2:
            client.abort()
        else:
            client.socket.close()
    sidecar.until_whole()


def test_handshake_one_byte_at_a_time_is_fine(sidecar, files):
    client = sidecar.connect()
    client.send(SSL_REQUEST)
    assert client.socket.recv(1) == b"S"
    client.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = client_context(files).wrap_bio(incoming, outgoing, server_hostname="localhost")
    is_done = False
    while not is_done:
        try:
            tls.do_handshake()
            is_done = True
            tls.write(LOGIN)
        except ssl.SSLWantReadError:
            pass
        for byte in outgoing.read():
            client.send(bytes([byte]))
        if not is_done:
            incoming.write(client.socket.recv(65536))
    said = b""
    while not said.endswith(m.READY_IDLE_MESSAGE):
        incoming.write(client.socket.recv(65536))
        try:
            while text := tls.read(65536):
                said += text
        except ssl.SSLWantReadError:
            pass


# -- after it ----------------------------------------------------------------------------------


@pytest.mark.parametrize("moment", ["idle", "in a transaction", "in a query", "in a copy"])
@pytest.mark.parametrize("way", ["garbage", "reset", "close", "goodbye", "terminate"])
def test_client_that_breaks_off_gives_its_connection_back(sidecar, files, moment, way):
    client = logged_in(sidecar, files)
    tls = client.socket
    assert isinstance(tls, ssl.SSLSocket)
    if moment == "in a transaction":
        client.rows("begin")
    elif moment == "in a query":
        client.send(query(LONG))
    elif moment == "in a copy":
        client.send(query("copy (select generate_series(1, 100000000)) to stdout"))
        client.until("d")
    if way == "garbage":
        raw = socket.socket(fileno=tls.detach())
        raw.sendall(bytes.fromhex("1703030020") + bytes(500))
        raw.settimeout(PATIENCE)
        client.socket = raw
        assert ends_silently_after_records(raw)
    elif way == "reset":
        client.abort()
    elif way == "close":
        tls.close()
    elif way == "terminate":
        client.send(m.TERMINATE_MESSAGE)
        tls.close()
    else:
        tls.settimeout(0)
        try:
            tls.unwrap()
        except OSError:
            pass  # the answer; what matters is that the alert is sent
        tls.close()
    sidecar.until_whole()


def ends_silently_after_records(raw: socket.socket) -> bool:
    try:
        while raw.recv(1 << 20):
            pass
    except ConnectionResetError:
        pass
    return True


def test_records_of_one_byte_are_put_together(sidecar, files):
    with logged_in(sidecar, files) as client:
        for byte in run("select $1::text || '!'", "hello") * 3:
            client.send(bytes([byte]))
        answers = client.until_ready(3)
        assert [a.columns for a in answers if a.kind == "D"] == [[b"hello!"]] * 3


def test_many_queries_in_one_record_and_long_ones_in_many(sidecar, files):
    with logged_in(sidecar, files) as client:
        client.send(query("select 1") * 300)
        assert kinds(client.until_ready(300)) == "TDCZ" * 300
        text = "x" * 3_000_000
        assert client.value(f"select length('{text}')") == "3000000"
        assert client.value("select repeat('x', 3000000)") == text


def test_client_is_told_why_it_is_closed(postgres, files):
    """What is written just before the end arrives."""
    with Sidecar(postgres, listen=files.listen(auth="trust")) as sidecar:
        client = logged_in(sidecar, files)
        other = encrypted(sidecar, files)
        other.send(startup({"user": "app", "database": "nonesuch"}))
        assert error(other.until_closed())["C"] == "3D000"
        listener = sidecar.service._listener
        assert listener is not None
        sidecar.call(listener.send_away)
        assert error(client.until_closed())["C"] == "57P01"


def test_nothing_is_left_of_a_connection_that_has_ended(sidecar, files):
    """Without help from Python's garbage collection: OpenSSL's part is 20 KiB, which it does not see."""
    gc.collect()
    gc.disable()
    try:
        for number in range(30):
            client = encrypted(sidecar, files)
            if number % 3:
                client.log_in("app", "main")
            if number % 3 == 2:
                client.rows("select 1")
            client.socket.close()
        sidecar.until_whole()
        left = [each for each in gc.get_objects() if isinstance(each, TlsTransport)]
        assert len(left) <= 1  # the last one may still be in the stack of a callback
    finally:
        gc.enable()


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_no_sessions_are_kept_for_later(sidecar, files, version):
    """OpenSSL would keep 20,480 of them, 190 MB with clients' certificates."""
    listener = sidecar.service._listener
    assert listener is not None
    context = client_context(files)
    context.maximum_version = version
    for _ in range(3):
        client = sidecar.connect()
        client.send(SSL_REQUEST)
        assert client.socket.recv(1) == b"S"
        tls = context.wrap_socket(client.socket, server_hostname="localhost")
        client.socket = tls
        client.log_in("app", "main")
        assert tls.session is None or not tls.session.has_ticket
        client.send(m.TERMINATE_MESSAGE)
        assert client.until_closed() == []
        client.socket.close()
    sidecar.until_whole()
    identity = sidecar.await_(listener.identity())
    assert identity is not None
    assert identity.context.session_stats()["number"] == 0


# -- flow --------------------------------------------------------------------------------------


@pytest.mark.both_loops
async def test_slow_client_holds_the_server_back(
    postgres: EmbeddedPostgres, files: ListenerFiles, make_service: MakeService
):
    """Nothing is kept for it but what sockets hold; then it reads, and all is there."""
    service = await make_service(postgres.dsn(), listen=files.listen(auth="trust"))
    rows, width = 3000, 10_000

    def work() -> int:
        with Client(("127.0.0.1", service.pg_port)) as client:
            client.send(SSL_REQUEST)
            assert client.socket.recv(1) == b"S"
            client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 * 1024)
            context = client_context(files)
            client.socket = context.wrap_socket(client.socket, server_hostname="localhost")
            client.log_in("app", "main")
            client.send(query(f"select repeat('x', {width}) from generate_series(1, {rows})"))
            client.until("D")
            paused.set()
            assert go_on.wait(PATIENCE)
            return sum(len(each.body) for each in client.until_ready() if each.kind == "D")

    paused, go_on = threading.Event(), threading.Event()
    task = asyncio.create_task(asyncio.to_thread(work))
    await asyncio.to_thread(paused.wait, PATIENCE)
    traffic = service.pool.traffic

    async def is_still() -> bool:
        before = traffic.server_received
        await asyncio.sleep(0.2)
        return traffic.server_received == before

    while not await is_still():
        pass
    assert traffic.server_received < rows * width / 2
    go_on.set()
    assert await task == (rows - 1) * (width + 6)


@pytest.mark.both_loops
@pytest.mark.parametrize("negotiation", ["postgres", "direct"])
async def test_much_goes_both_ways(
    postgres: EmbeddedPostgres, files: ListenerFiles, make_service: MakeService, negotiation: str
):
    service = await make_service(postgres.dsn(), listen=files.listen(auth="trust"))
    dsn = service.dsn(sslmode="require", sslnegotiation=negotiation)
    piece = random.Random(4).randbytes(50_000).hex().encode()
    async with await psycopg.AsyncConnection.connect(dsn) as connection:
        await connection.execute("create temp table much (t text)")
        async with connection.cursor() as cursor:
            async with cursor.copy("copy much from stdin") as copy:
                for _ in range(200):
                    await copy.write(piece + b"\n")
            back = 0
            async with cursor.copy("copy much to stdout") as copy:
                async for data in copy:
                    assert bytes(data) == piece + b"\n"
                    back += 1
        assert back == 200


# -- cancel ------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["allow", "require"])
@pytest.mark.parametrize("way", ["tls", "direct", "plain"])
def test_cancel_request_comes_by_tls_or_not(postgres, files, mode, way):
    """Plain also where TLS is required: libpq before 17 sends them so, and PostgreSQL takes them."""
    with Sidecar(postgres, listen=files.listen(auth="trust", tls_mode=mode)) as sidecar:
        with logged_in(sidecar, files) as client:
            client.send(query(LONG))
            until_running(postgres, LONG)
            with (
                sidecar.connect()
                if way == "plain"
                else encrypted(sidecar, files, is_direct=way == "direct")
            ) as other:
                body = struct.pack("!II", 80877102, client.pid) + client.secret
                other.send(struct.pack("!I", len(body) + 4) + body)
                assert other.until_closed() == []
            assert error(client.until_ready())["C"] == "57014"
        sidecar.until_whole()


@pytest.mark.parametrize("version", ["3.0", "3.2"])
def test_libpq_cancels_by_tls(postgres, files, version):
    """PQcancelStart encrypts as the connection did."""
    with Sidecar(postgres, listen=files.listen(auth="trust", tls_mode="require")) as sidecar:
        dsn = sidecar.dsn(
            sslmode="verify-full", sslrootcert=files.root, max_protocol_version=version
        )
        with psycopg.connect(dsn, autocommit=True) as connection:
            check_cancel_safe(postgres, connection)
        sidecar.until_whole()


# -- SCRAM that is bound -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def guarded(postgres: EmbeddedPostgres, files: ListenerFiles) -> Iterator[Sidecar]:
    with Sidecar(postgres, listen=files.listen(), users={"app": "secret"}) as sidecar:
        yield sidecar


def scram(client: Client, exchange: ClientExchange, mechanism: str = "") -> dict[str, str]:
    """Log in; the error's fields, or none."""
    client.send(LOGIN)
    offered = client.receive().body[4:].split(b"\0")
    assert offered == [b"SCRAM-SHA-256-PLUS", b"SCRAM-SHA-256", b"", b""]
    name = (mechanism or exchange.mechanism).encode()
    client.send(m.sasl_initial_response(name, exchange.begin()))
    answer = client.receive()
    if answer.kind == "R":
        client.send(m.password(exchange.respond(answer.body[4:])))
        answer = client.receive()
    if answer.kind == "E":
        assert client.until_closed() == []
        return answer.fields
    exchange.verify(answer.body[4:])
    return {}


def binding(client: Client) -> bytes:
    assert isinstance(client.socket, ssl.SSLSocket)
    found = server_end_point(client.socket.getpeercert(binary_form=True) or b"")
    assert found is not None
    return found


def test_login_is_bound_or_not_as_the_client_likes(guarded, files):
    client = encrypted(guarded, files)
    assert scram(client, ClientExchange("secret", end_point=binding(client))) == {}
    assert scram(encrypted(guarded, files), ClientExchange("secret")) == {}


def test_client_that_was_told_of_no_binding_is_refused(guarded, files):
    """It could bind, and believes that we cannot: somebody took our offer away (RFC 5802, 6)."""
    fields = scram(encrypted(guarded, files), ClientExchange("secret", could_bind=True))
    assert fields["C"] == "28000"
    assert fields["M"] == "SCRAM channel binding negotiation error"


def test_login_bound_to_another_certificate_is_refused(guarded, files):
    """That of who sits in between."""
    fields = scram(encrypted(guarded, files), ClientExchange("secret", end_point=bytes(32)))
    assert (fields["C"], fields["M"]) == ("28000", "SCRAM channel binding check failed")


@pytest.mark.parametrize(
    ("is_bound", "mechanism"), [(True, "SCRAM-SHA-256"), (False, "SCRAM-SHA-256-PLUS")]
)
def test_mechanism_and_message_have_to_agree(guarded, files, is_bound, mechanism):
    client = encrypted(guarded, files)
    exchange = ClientExchange("secret", end_point=binding(client) if is_bound else None)
    assert scram(client, exchange, mechanism)["C"] == "08P01"


def test_binding_is_not_offered_without_tls(guarded):
    with guarded.connect() as client:
        client.send(LOGIN)
        assert client.receive().body[4:] == b"SCRAM-SHA-256\0\0"
        exchange = ClientExchange("secret", end_point=bytes(32))
        client.send(m.sasl_initial_response(b"SCRAM-SHA-256-PLUS", exchange.begin()))
        assert error(client.until_closed())["C"] == "08P01"
