"""Fuzz of what comes before a relay, and beside it: startup packets, TLS handshakes, cancel requests, the
console. Whoever sends it, nothing is left of it, and the others are served. How many examples are
tried: see ``fuzz_whole``."""

import ssl
import struct
from collections.abc import Iterator
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.demo.postgres import EmbeddedPostgres
from tests.fuzz_recordings import Mutation, mutant, mutations
from tests.fuzz_whole import check_newcomer, examples, quiet
from tests.listener_files import ListenerFiles
from tests.test_fuzz import ENDS, hear_out
from tests.wire import (
    GSSENC_REQUEST,
    SSL_REQUEST,
    SYNC,
    TERMINATE,
    Sidecar,
    bind,
    close,
    describe,
    execute,
    kinds,
    parse,
    query,
    run,
    startup,
)

RULES = """
hostssl   all       all    127.0.0.1/32  trust
host      main      app    127.0.0.1/32  trust
host      all       no     all           reject
hostnossl pgsidecar admin  127.0.0.1/32  scram-sha-256
host      main      all    samehost      scram-sha-256
"""

CONSOLE = {"admin_users": ["admin"], "stats_users": ["stats"]}

WAYS = st.sampled_from(sorted(set(ENDS) - {"cancel"}))


@pytest.fixture(scope="module")
def running(postgres: EmbeddedPostgres, files: ListenerFiles) -> Iterator[Sidecar]:
    listen = files.listen(hba=RULES, login_timeout="1s")
    users = {"app": "secret", "admin": "secret"}
    with Sidecar(postgres, max_size=2, listen=listen, users=users, console=CONSOLE) as sidecar:
        yield sidecar


@pytest.fixture
def sidecar(running: Sidecar) -> Iterator[Sidecar]:
    with quiet():
        yield running
        running._clients.clear()
        running.until_whole()
        check_newcomer(running)


def visit(sidecar: Sidecar, data: bytes, way: str) -> None:
    """One connection from its first byte to its end."""
    with sidecar.connect() as client:
        with suppress(ConnectionError):
            client.send(data)
        hear_out(client)
        ENDS[way](client)
    sidecar._clients.clear()
    sidecar.until_whole()


# -- before the login --------------------------------------------------------------------------

NAMES = [
    "user",
    "database",
    "options",
    "replication",
    "application_name",
    "search_path",
    "TimeZone",
]
NAMES += ["client_encoding", "_pq_.x", "_pq_.", "a.b", "DateStyle", "", "is_superuser"]
VALUES = ["app", "main", "pgsidecar", "no", "admin", "-c work_mem=1MB", "-c", "\\", "true", "ISO"]
VALUES += [
    "",
    "x" * 300,
    "'; drop table fuzz; --",
    '"$user"',
    "\x01",
    "é",
    "-c search_path=\\ x,'y",
]

packets: st.SearchStrategy[bytes] = st.builds(
    lambda minor, named, more: startup(named | dict(more), 3 << 16 | minor),
    st.sampled_from([0, 0, 0, 1, 2, 3, 9999, 0xFFFF]),
    st.sampled_from([{"user": "app", "database": "main"}, {"user": "no"}, {}]),
    st.lists(st.tuples(st.sampled_from(NAMES), st.sampled_from(VALUES)), max_size=5),
)


@pytest.mark.parametrize("is_changed", [False, True])
def test_startup_packet_of_any_kind_leaves_nothing(sidecar: Sidecar, is_changed: bool):
    @examples(40)
    @given(packets, mutations, WAYS)
    def check(packet: bytes, changes: list[Mutation], way: str) -> None:
        data = b"".join(mutant([packet], changes)) if is_changed else packet
        visit(sidecar, data + run("select 1"), way)

    check()


BEFORE = {"direct": b"", "asked": SSL_REQUEST, "asked twice": GSSENC_REQUEST + SSL_REQUEST}


def _hello() -> bytes:
    context = ssl.create_default_context()
    context.set_alpn_protocols(["postgresql"])
    sent = ssl.MemoryBIO()
    client = context.wrap_bio(ssl.MemoryBIO(), sent, server_hostname="localhost")
    with suppress(ssl.SSLWantReadError):
        client.do_handshake()
    return sent.read()


@pytest.mark.parametrize("before", BEFORE.values(), ids=BEFORE)
def test_mutant_of_a_tls_hello_leaves_nothing(
    sidecar: Sidecar, files: ListenerFiles, before: bytes
):
    hello = _hello()
    context = ssl.create_default_context(cafile=files.root)

    @examples(20)
    @given(mutations, WAYS)
    def check(changes: list[Mutation], way: str) -> None:
        with sidecar.connect() as client:
            with suppress(ConnectionError):
                for at in range(0, len(before), 8):
                    client.send(before[at : at + 8])
                    assert client._take(1) in (b"N", b"S")
                client.send(b"".join(mutant([hello], changes)))
            hear_out(client)
            ENDS[way](client)
        sidecar._clients.clear()
        sidecar.until_whole()

    check()
    with sidecar.connect() as client:
        client.send(SSL_REQUEST)
        assert client._take(1) == b"S"
        client.socket = context.wrap_socket(client.socket, server_hostname="localhost")
        client.log_in("app", "main")
        assert client.value("select 1") == "1"


# -- beside the relay --------------------------------------------------------------------------


def test_cancel_request_with_a_wrong_key_cancels_nobody(sidecar: Sidecar):
    """Of a client that has a query running, the pid is known to all, and parts of the secret here."""
    with sidecar.login() as client:
        client.rows("begin")

        @examples(30)
        @given(st.integers(-1, 1), st.integers(0, 300), st.integers(0, 255))
        def check(beside: int, length: int, byte: int) -> None:
            secret = (client.secret * 75)[:length]
            if beside == 0 and secret == client.secret:
                secret = bytes([byte ^ secret[0]]) + secret[1:] if byte else secret[:-1]
            client.send(query("select 'still there' from pg_sleep(0.01)"))
            with sidecar.connect() as other:
                body = struct.pack("!II", 80877102, client.pid + beside) + secret
                other.send(struct.pack("!I", len(body) + 4) + body)
                other.until_closed()
            assert kinds(client.until_ready()) == "TDCZ"

        check()
        client.rows("commit")


SHOWS = ["show pools", "show clients; show servers", "show help", "show", "pause nobody", "kill"]
SHOWS += [
    "show stats_totals",
    "select 1",
    "resume",
    "show waits; show holders; show pins",
    "",
    ";;",
]
CONSOLE_WORDS = [
    *(query(sql) for sql in SHOWS),
    *(parse(sql, name) for sql in SHOWS[:4] for name in ("", "a")),
    *(bind(name=name) for name in ("", "a", "b")),
    *(describe("S", "a"), describe("P"), execute(), execute(1), close("S", "a"), SYNC, SYNC),
    *(run("show pools"), run("show config"), TERMINATE),
]


@pytest.mark.parametrize("user", ["admin", "stats"])
def test_console_bears_anything(postgres: EmbeddedPostgres, user: str):
    with Sidecar(postgres, console=CONSOLE, max_size=1) as sidecar, quiet():

        @examples(30)
        @given(
            st.lists(st.sampled_from(CONSOLE_WORDS), min_size=1, max_size=8),
            st.one_of(st.just([]), mutations),
            st.sampled_from(sorted(ENDS)),
        )
        def check(words: list[bytes], changes: list[Mutation], way: str) -> None:
            with sidecar.login(user, "pgsidecar") as client:
                with suppress(ConnectionError):
                    client.send(b"".join(mutant(words, changes)))
                hear_out(client)
                ENDS[way](client)
            sidecar._clients.clear()
            sidecar.until_whole()

        check()
        check_newcomer(sidecar)
        with sidecar.login(user, "pgsidecar") as client:
            assert kinds(client.ask(query("show version"))) == "TDCZ"
