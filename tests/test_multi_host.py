"""Several servers in one connection string: which is taken, when, and that a failover is followed.

A standby is a real one: a server that was shut down and started with ``standby.signal``.
"""

import socket
import time
from collections.abc import Iterator

import asyncpg
import pytest

from sidecar.demo.postgres import EmbeddedPostgres
from sidecar.errors import ServerError, ServerUnavailable, WrongRole
from sidecar.events import ErrorReason, Phase
from sidecar.pool import health, link, login
from sidecar.pool.link import Address
from sidecar.pool.server import ServerConnection, cancel_query, clock
from sidecar.protocol import messages as m
from sidecar.target import Host
from tests.copied_postgres import CopiedPostgres
from tests.server_connection import Reader, ask, opened, refused
from tests.sidecar_process import PATIENCE, come_true
from tests.tap import Tap
from tests.wire import error


def demote(server: EmbeddedPostgres) -> None:
    (server.data_dir / "standby.signal").touch()
    server.restart()


def promote(server: EmbeddedPostgres) -> None:
    assert server.psql("select pg_promote()") == "t"


@pytest.fixture(scope="module")
def primary(postgres: EmbeddedPostgres) -> EmbeddedPostgres:
    return postgres


@pytest.fixture(scope="module")
def standby(postgres_version: int) -> Iterator[EmbeddedPostgres]:
    with CopiedPostgres(postgres_version) as server:
        demote(server)
        yield server


@pytest.fixture(scope="module")
def nobody() -> Iterator[int]:
    """A port on which nobody listens."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()[1]


@pytest.fixture
def silent() -> Iterator[int]:
    """A port that takes connections and says nothing, as a host that hangs."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def dsn(*ports: int, **options: str) -> str:
    query = "&".join(f"{key}={value}" for key, value in options.items())
    hosts = ",".join(f"127.0.0.1:{port}" for port in ports)
    return f"postgresql://postgres@{hosts}/postgres?{query}"


def port_of(server: ServerConnection) -> int:
    assert server.address is not None
    return server.address.host.port


# -- which -----------------------------------------------------------------------------------------


async def test_next_host_is_taken_where_nobody_listens(primary, nobody):
    async with opened(dsn(nobody, primary.port)) as server:
        assert port_of(server) == primary.port
        assert await ask(server, "select 1") == [["1"]]


async def test_dead_host_leaves_time_for_the_others(primary, silent):
    """Of the time that is left each host gets an equal share: the first of two gets half."""
    began = time.monotonic()
    async with opened(dsn(silent, primary.port), within=1.0) as server:
        assert port_of(server) == primary.port
    assert 0.4 < time.monotonic() - began < 1.0 + PATIENCE


async def test_host_that_is_starting_up_is_passed_over(primary):
    """A liar, since a real start is over too soon."""
    words = m.error_response("FATAL", "57P03", "the database system is starting up")
    with Tap(primary.port, {b"R\0\0\0\x08\0\0\0\0": words}) as starting:
        async with opened(dsn(starting.port, primary.port, sslmode="disable")) as server:
            assert port_of(server) == primary.port
        problem = await refused(dsn(starting.port, sslmode="disable"), ServerError)
        assert "starting up" in str(problem)


async def test_login_that_is_refused_is_final(primary, tls_postgres):
    """As in libpq: another server is no remedy for a wrong password."""
    both = dsn(tls_postgres.port, primary.port, password="wrong")
    problem = await refused(both, ServerError)
    assert isinstance(problem, ServerError)
    assert problem.sqlstate == "28P01"


async def test_all_failures_are_told(nobody, silent):
    problem = await refused(dsn(nobody, silent), ServerUnavailable, within=0.4)
    assert str(problem) == (
        f"no server would do: 127.0.0.1:{nobody}: connection refused;"
        f" 127.0.0.1:{silent}: no answer in time"
    )
    assert health.explain(problem, has_connected=True) == (Phase.AUTH, ErrorReason.TIMEOUT)


async def test_load_is_balanced_where_asked_for(primary, standby):
    both = dsn(primary.port, standby.port, load_balance_hosts="random")
    seen = set()
    for _ in range(40):  # a good shuffle misses one of two in 40 with a chance of 2 in 10^12
        async with opened(both) as server:
            seen.add(port_of(server))
        if len(seen) == 2:
            break
    assert seen == {primary.port, standby.port}


# -- of which kind ---------------------------------------------------------------------------------

OLD = {b"in_hot_standby": b"IN_HOT_STANDBY", b"default_transaction_read_only": b"x" * 29}
"""What PostgreSQL says of itself since version 14, under names that mean nothing."""


@pytest.mark.parametrize("is_old", [False, True])
@pytest.mark.parametrize(
    ("wanted", "first", "taken"),
    [
        ("any", "standby", "standby"),
        ("read-write", "standby", "primary"),
        ("read-write", "primary", "primary"),
        ("read-only", "primary", "standby"),
        ("primary", "standby", "primary"),
        ("standby", "primary", "standby"),
        ("prefer-standby", "primary", "standby"),
    ],
)
async def test_server_is_of_the_kind_that_is_asked_for(
    primary, standby, wanted, first, taken, is_old
):
    """A server that does not report it, before 14, is asked."""
    with (
        Tap(primary.port, OLD if is_old else {}) as to_primary,
        Tap(standby.port, OLD if is_old else {}) as to_standby,
    ):
        ports = {"primary": to_primary.port, "standby": to_standby.port}
        order = [ports[first], *(port for name, port in ports.items() if name != first)]
        async with opened(dsn(*order, target_session_attrs=wanted)) as server:
            assert port_of(server) == ports[taken]
            assert await ask(server, "select 1") == [["1"]]


async def test_any_is_better_than_none_where_a_standby_is_preferred(primary, nobody):
    both = dsn(primary.port, nobody, target_session_attrs="prefer-standby")
    async with opened(both) as server:
        assert port_of(server) == primary.port


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ("read-only", "the server is not read-only, target_session_attrs asks for read-only"),
        ("standby", "the server is not a standby, target_session_attrs asks for standby"),
    ],
)
async def test_server_of_another_kind_is_told_as_that(primary, wanted, words):
    problem = await refused(
        dsn(primary.port, target_session_attrs=wanted, application_name="unwanted"), WrongRole
    )
    assert str(problem) == words
    assert health.explain(problem, has_connected=True) == (Phase.AUTH, ErrorReason.ROLE)
    look = "select count(*) from pg_stat_activity where application_name = 'unwanted'"
    assert primary.psql(look) == "0", "its backend has ended"


async def test_read_only_primary_is_not_for_writing(tls_postgres):
    wanted = tls_postgres.dsn(target_session_attrs="read-write")
    with tls_postgres.configured(default_transaction_read_only="on"):
        await refused(wanted, WrongRole)
    async with opened(wanted) as server:
        assert await ask(server, "show transaction_read_only") == [["off"]]


# -- addresses -------------------------------------------------------------------------------------


async def test_name_is_resolved_anew_and_all_its_addresses_are_tried(
    primary, standby, nobody, monkeypatch
):
    """What the name leads to changes from one connection to the next."""
    found = [[nobody, primary.port], [nobody, standby.port]]

    async def resolve(host: Host) -> list[Address]:
        assert host == Host("db.example", 1)
        return [Address(host, socket.AF_INET, ("127.0.0.1", port)) for port in found.pop(0)]

    monkeypatch.setattr(login, "resolve", resolve)
    by_name = "host=db.example port=1 user=postgres dbname=postgres"
    for expected in (primary.port, standby.port):
        async with opened(by_name) as server:
            assert server.address is not None
            assert server.address.sockaddr[1] == expected


async def test_addresses_of_this_host_are_found():
    found = await link.resolve(Host("localhost", 5433))
    assert ("127.0.0.1", 5433) in [address.sockaddr[:2] for address in found]
    (address,) = await link.resolve(Host("db.example", 1, "::1"))
    assert (address.family, address.sockaddr[:2]) == (socket.AF_INET6, ("::1", 1))
    (path,) = await link.resolve(Host("/run/pg", 5433))
    assert path.sockaddr == "/run/pg/.s.PGSQL.5433"


async def test_unix_socket_is_a_host_like_any(primary, nobody):
    hosts = f"host=127.0.0.1,{primary.socket_dir} port={nobody},{primary.port}"
    async with opened(f"{hosts} user=postgres dbname=postgres") as server:
        assert await ask(server, "select inet_server_addr()") == [[None]]


async def test_options_of_the_socket_are_set(primary):
    options = {"keepalives_idle": "77", "keepalives_count": "3", "tcp_user_timeout": "4000"}
    async with opened(dsn(primary.port, **options)) as server:
        sock = server.transport.get_extra_info("socket")
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 77
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT) == 3
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 4000
    async with opened(dsn(primary.port, keepalives="0")) as server:
        sock = server.transport.get_extra_info("socket")
        assert not sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)


# -- in use ----------------------------------------------------------------------------------------


async def test_cancel_request_goes_where_the_connection_went(primary, nobody):
    async with opened(dsn(nobody, primary.port)) as server:
        server.receiver = reader = Reader()
        server.write(m.query(b"select pg_sleep(30)"))
        await cancel_query(server, clock() + PATIENCE)
        assert error(await reader.messages)["C"] == "57014"
        server.receiver = None


async def test_failover_is_followed(own_postgres, make_service):
    """The primary becomes a standby and the other way round: writing goes on at the other host."""
    one, other = own_postgres(), own_postgres()
    demote(other)
    sidecar = await make_service(
        dsn(one.port, other.port, target_session_attrs="read-write"),
        max_size=3,
        acquire_timeout="10s",
        connect_timeout="2s",
    )
    where = "select current_setting('port') || pg_is_in_recovery()"
    client = await asyncpg.connect(sidecar.dsn())
    try:
        assert await client.fetchval(where) == f"{one.port}false"
        demote(one)
        promote(other)

        answers: list[str] = []
        deadline = time.monotonic() + PATIENCE
        while not answers and time.monotonic() < deadline:
            try:
                answers.append(await client.fetchval(where))
            except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError):
                await client.close()  # what was open is lost with the server
                client = await asyncpg.connect(sidecar.dsn())
        assert answers == [f"{other.port}false"]
    finally:
        await client.close()
    await sidecar.until_whole()
    look = "select count(*) from pg_stat_activity where backend_type = 'client backend'"
    await come_true(lambda: one.psql(look) == "1", "none is left at the standby but who looks")


async def test_metrics_and_health_name_all_hosts(primary, nobody, make_service):
    sidecar = await make_service(dsn(nobody, primary.port))
    snapshot = sidecar.pool.snapshot(clock())
    assert snapshot.server == f"127.0.0.1:{nobody},127.0.0.1:{primary.port}"
    await sidecar.until(lambda now: now.is_up)
