"""Protocol 3.0 and 3.2: what is agreed upon, and cancel keys. PostgreSQL 18 is asked what is right."""

import socket
from collections.abc import Iterator

import psycopg
import pytest

from sidecar.demo.postgres import EmbeddedPostgres
from sidecar.protocol import messages as m
from tests.copied_postgres import CopiedPostgres
from tests.tap import Tap, end
from tests.wire import Client, Sidecar, error, kinds, query, startup


@pytest.fixture(scope="module")
def postgres18() -> Iterator[EmbeddedPostgres]:
    with CopiedPostgres(18) as server:
        yield server


@pytest.fixture(scope="module")
def sidecar(postgres18) -> Iterator[Sidecar]:
    with Sidecar(postgres18) as running:
        yield running


OPTIONS = [{}, {"_pq_.some": "on"}, {"_pq_.a": "", "_pq_.b": "x"}]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("minor", [0, 1, 2, 3, 4, 9999, 0xFFFF])
def test_version_is_negotiated_as_by_postgresql(postgres18, sidecar, minor, options):
    """9999 is what libpq asks for to see whether negotiation works ("grease", 54.1.4)."""
    told = []
    for address, database in [
        ((postgres18.host, postgres18.port), postgres18.database),
        (sidecar.address, "main"),
    ]:
        with Client(address) as client:
            parameters = {"user": postgres18.user, "database": database, **options}
            client.send(startup(parameters, 3 << 16 | minor))
            messages = client.until_ready()
            assert client.value("select 1") == "1"
        negotiated = [message for message in messages if message.kind == "v"]
        order = kinds(messages).replace("S", "")
        told.append((negotiated, order, len(client.secret)))
    assert told[0] == told[1]


@pytest.mark.parametrize("version", ["3.0", "3.2", "latest"])
def test_libpq_gets_the_version_it_wants(sidecar, version):
    with psycopg.connect(sidecar.dsn(max_protocol_version=version)) as connection:
        assert connection.execute("select 1").fetchone() == (1,)
        assert connection.pgconn.full_protocol_version == (30000 if version == "3.0" else 30002)


def test_cancel_keys_are_long_and_never_the_same(sidecar):
    secrets = set()
    for minor in (0, 2) * 20:
        with sidecar.connect() as client:
            client.send(startup({"user": "app", "database": "main"}, 3 << 16 | minor))
            client.until_ready()
            secrets.add(client.secret)
    assert sorted(map(len, secrets)) == [4] * 20 + [32] * 20
    for size in (4, 32):
        # no byte of them is a constant
        columns = zip(*(secret for secret in secrets if len(secret) == size), strict=True)
        assert all(len(set(column)) > 1 for column in columns)


# -- towards servers ---------------------------------------------------------------------------


def secret_sizes(sidecar: Sidecar) -> set[int]:
    """Of the cancel keys that the server has given us."""
    sidecar.until(lambda: sidecar.pool.state.idle, "it has connected")
    return {len(server.secret) for server in sidecar.call(lambda: list(sidecar.pool.state.idle))}


def cancels(sidecar: Sidecar, postgres: EmbeddedPostgres) -> bool:
    """Whether a query is cancelled, by the key the server has given us."""
    with sidecar.login() as client:
        client.send(query("select pg_sleep(60)"))
        running = (
            "select count(*) from pg_stat_activity where query ~ 'sleep[(]60' and state = 'active'"
        )
        sidecar.until(lambda: "1" in postgres.psql(running), "it runs")
        client.cancel()
        return error(client.until_ready())["C"] == "57014"


def test_server_gives_the_longest_keys_it_has(postgres18, sidecar):
    assert secret_sizes(sidecar) == {32}
    assert cancels(sidecar, postgres18)
    with CopiedPostgres(16) as postgres16, Sidecar(postgres16) as other:
        assert secret_sizes(other) == {4}
        assert cancels(other, postgres16)


class OldPooler(Tap):
    """A way to PostgreSQL that knows protocol 3.0 only, and closes or complains about another."""

    def __init__(self, postgres: EmbeddedPostgres, answer: bytes) -> None:
        super().__init__(postgres.port)
        self.refused = 0
        self._answer = answer

    def serve(self, client: socket.socket) -> None:
        head = client.recv(8, socket.MSG_WAITALL)
        if head[4:6] == b"\0\3" and head[6:8] != b"\0\0":
            self.refused += 1
            client.sendall(self._answer)
            end(client)
            return
        self.pass_on(client, head)


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        m.error_response("FATAL", "08P01", "unsupported protocol version"),
        m.error_response("FATAL", "0A000", "unsupported frontend protocol 3.2"),
    ],
)
def test_server_that_knows_no_other_protocol_is_spoken_to_in_3_0(postgres18, answer):
    with OldPooler(postgres18, answer) as pooler:
        dsn = postgres18.dsn(port=pooler.port, sslmode="disable")
        with Sidecar(pools={"main": {"dsn": dsn, "min_idle": 1}}) as sidecar:
            assert secret_sizes(sidecar) == {4}
            assert pooler.refused
            assert cancels(sidecar, postgres18)
