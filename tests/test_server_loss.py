"""PostgreSQL crashes, restarts, stalls or is not there: clients are told so, and the pool recovers."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Self

import asyncpg
import psycopg
import pytest

from sidecar.demo.postgres import EmbeddedPostgres
from sidecar.pool.state import ConnectionState
from tests.conftest import MakePostgres
from tests.sidecar_process import (
    MakeService,
    Metrics,
    ServiceHere,
    Sidecar,
    come_true,
    hang_up,
)

CLEAN = {
    "57P01",  # admin_shutdown: the server's own words
    "57P02",  # crash_shutdown
    "08006",  # lost in use
    "08001",  # not there
    "53300",  # no connection in time
}
"""What a client may be told while its server is lost."""

NEVER_A_HANG = 8.0
"""Seconds for one step of a client: acquire_timeout, and a slow machine."""

QUICK = {
    "acquire_timeout": "2s",
    "connect_timeout": "2s",
    "ping_interval": "100ms",
    "ping_timeout": "500ms",
    "min_idle": 3,
    "max_size": 5,
}


class Worker:
    """A client that goes on, whatever happens: another connection, another try."""

    def __init__(self, sidecar: Sidecar, number: int) -> None:
        self.number = number
        self.done = 0
        self.told: Counter[str] = Counter()
        """SQLSTATEs, "" for a connection that was closed without a word."""
        self._dsn = sidecar.dsn(application_name=f"worker-{number}")

    async def run(self) -> None:
        while True:
            try:
                async with asyncio.timeout(NEVER_A_HANG):
                    await self.connect()
                while True:
                    async with asyncio.timeout(NEVER_A_HANG):
                        await self.work()
                    self.done += 1
            except psycopg.OperationalError as error:
                self.told[error.sqlstate or self.state_in(str(error))] += 1
            except (asyncpg.PostgresError, asyncpg.InterfaceError, ConnectionError) as error:
                self.told[getattr(error, "sqlstate", None) or ""] += 1
            finally:
                await self.disconnect()

    @staticmethod
    def state_in(message: str) -> str:
        """Psycopg has no SQLSTATE of what came while it asked nothing, or of a failed login."""
        assert "server closed the connection" in message or "cannot reach PostgreSQL" in message
        return "08001" if "cannot reach PostgreSQL" in message else ""

    async def connect(self) -> None:
        raise NotImplementedError

    async def work(self) -> None:
        raise NotImplementedError

    async def disconnect(self) -> None:
        raise NotImplementedError


class PsycopgWorker(Worker):
    """Transactions, by the simple protocol and the extended one."""

    _conn: psycopg.AsyncConnection[tuple[object, ...]] | None = None

    async def connect(self) -> None:
        self._conn = await psycopg.AsyncConnection.connect(self._dsn)

    async def work(self) -> None:
        assert self._conn is not None
        async with self._conn.transaction():
            await self._conn.execute("SELECT pg_sleep(0.002)")
            row = await (await self._conn.execute("SELECT %s::int", [self.number])).fetchone()
            assert row == (self.number,)

    async def disconnect(self) -> None:
        if self._conn is not None:
            await self._conn.close()
            self._conn = None


class AsyncpgWorker(Worker):
    """Prepared statements."""

    _conn: asyncpg.Connection | None = None

    async def connect(self) -> None:
        self._conn = await asyncpg.connect(self._dsn)

    async def work(self) -> None:
        assert self._conn is not None
        query = "SELECT $1::int FROM pg_sleep(0.002)"
        assert await self._conn.fetchval(query, self.number) == self.number

    async def disconnect(self) -> None:
        if self._conn is not None:
            self._conn.terminate()
            self._conn = None


@asynccontextmanager
async def working(workers: list[Worker]) -> AsyncIterator[None]:
    """Runs the workers; at the end none may have been told anything but what it should be."""
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(worker.run()) for worker in workers]
        await all_work(workers)
        yield
        await all_work(workers)
        for task in tasks:
            task.cancel()
    told = sum((worker.told for worker in workers), Counter[str]())
    assert told.keys() <= CLEAN | {"", "08003"}, told  # 08003: asyncpg's word for ""


async def all_work(workers: list[Worker]) -> None:
    """Each has done something since."""
    before = [worker.done for worker in workers]

    def have_gone_on() -> bool:
        return all(w.done > done + 3 for w, done in zip(workers, before, strict=True))

    await come_true(have_gone_on, "all workers work", 15)


def some_workers(sidecar: Sidecar) -> list[Worker]:
    kinds = (PsycopgWorker, AsyncpgWorker)
    return [kinds[number % 2](sidecar, number) for number in range(8)]


def closed(metrics: Metrics, reason: str) -> float:
    return metrics.value("pgsidecar_connections_closed_total", pool="main", reason=reason)


def failed(metrics: Metrics, phase: str, reason: str) -> float:
    labels = {"phase": phase, "reason": reason}
    return metrics.value("pgsidecar_connection_errors_total", pool="main", **labels)


def reconnects(metrics: Metrics, outcome: str) -> float:
    return metrics.value("pgsidecar_reconnects_total", pool="main", outcome=outcome)


async def until_recovered(sidecar: ServiceHere) -> Metrics:
    """Up, whole, and with its warm connections; ready for traffic."""
    minimum = sidecar.pool.config.min_idle
    metrics = await sidecar.until(lambda now: now.is_up and now.is_whole and now.idle >= minimum)
    assert await asyncio.to_thread(sidecar.get, "/readyz") == (200, "ok\n")
    return metrics


async def ask_for_a_minute(sidecar: Sidecar) -> str | None:
    """The SQLSTATE a client is told that is in a query when its server goes."""
    async with await psycopg.AsyncConnection.connect(sidecar.dsn(), autocommit=True) as conn:
        with pytest.raises(psycopg.OperationalError) as caught:
            await conn.execute("SELECT pg_sleep(60)")
    return caught.value.sqlstate


def is_in_query(now: Metrics) -> bool:
    return now.value("pgsidecar_longest_running_query_seconds", pool="main") > 0.2


async def test_crash_and_restart_under_load(
    own_postgres: MakePostgres, make_service: MakeService
) -> None:
    """``kill -9``, as the kernel's memory killer does.

    A backend that sees its postmaster die before it is killed itself still says 57P01.
    """
    server = own_postgres()
    sidecar = await make_service(server.dsn(), **QUICK)
    async with working(some_workers(sidecar)):
        asking = asyncio.create_task(ask_for_a_minute(sidecar))
        await sidecar.until(is_in_query)
        await asyncio.to_thread(server.kill)
        assert await asking in ("08006", "57P01")
        down = await sidecar.until(lambda now: not now.is_up)
        assert down.used == down.idle == 0
        await sidecar.until(lambda now: failed(now, "connect", "refused"))
        status, why = await asyncio.to_thread(sidecar.get, "/readyz")
        assert status == 503
        assert f"127.0.0.1:{server.port} is not reachable (connection refused)" in why
        await asyncio.to_thread(server.restart)
        await sidecar.until(lambda now: now.is_up)
    metrics = await until_recovered(sidecar)
    assert reconnects(metrics, "ok") > 0
    assert reconnects(metrics, "error") > 0
    assert closed(metrics, "server_closed") > 0
    assert failed(metrics, "query", "reset") + failed(metrics, "query", "admin_shutdown") > 0
    assert failed(metrics, "connect", "refused") > 0


@pytest.mark.both_loops
async def test_fast_shutdown_and_restart_under_load(
    own_postgres: MakePostgres, make_service: MakeService
) -> None:
    """As an operator restarts it: a client in a query is told the server's own 57P01."""
    server = own_postgres()
    sidecar = await make_service(server.dsn(), **QUICK)
    async with working(some_workers(sidecar)):
        asking = asyncio.create_task(ask_for_a_minute(sidecar))
        await sidecar.until(is_in_query)
        await asyncio.to_thread(server.restart)
        assert await asking == "57P01"
    metrics = await until_recovered(sidecar)
    assert reconnects(metrics, "ok") > 0
    assert failed(metrics, "query", "admin_shutdown") > 0
    assert metrics.errors["server", "57"] > 0


async def test_stalled_server_is_noticed_and_forgiven(
    own_postgres: MakePostgres, make_service: MakeService
) -> None:
    """SIGSTOP: it takes bytes and answers nothing. What it ran before is finished, late."""
    server = own_postgres()
    sidecar = await make_service(server.dsn(), **QUICK)
    async with await psycopg.AsyncConnection.connect(sidecar.dsn(), autocommit=True) as conn:
        running = asyncio.create_task(conn.execute("SELECT pg_sleep(0.3)"))
        await sidecar.until(lambda now: now.used == 1 and now.idle > 0)
        server.pause()
        try:
            down = await sidecar.until(lambda now: not now.is_up)
            assert down.value("pgsidecar_pings_total", pool="main", outcome="timeout") > 0
            assert failed(down, "ping", "timeout") > 0
            assert closed(down, "ping_timeout") == 0  # told to go, but not gone
            assert down.used == 1
            await sidecar.until(lambda now: failed(now, "auth", "timeout") > 0)
        finally:
            server.resume()
        await running
    metrics = await until_recovered(sidecar)
    assert closed(metrics, "ping_timeout") > 0
    assert metrics.value("pgsidecar_timeouts_total", pool="main", kind="connect") > 0
    assert metrics.transactions == {"commit": 1, "rollback": 0}


class HoldingProxy:
    """Between sidecar and server; what the server says can be held back, to arrive all at once."""

    def __init__(self, server: EmbeddedPostgres) -> None:
        self.port = 0
        self.passing = asyncio.Event()
        self.passing.set()
        self._server = server
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._listener = await asyncio.start_server(self._accept, "127.0.0.1")
        self.port = self._listener.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._listener.close()
        for task in self._tasks:
            task.cancel()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", self._server.port)
        for work in (self._pass(reader, back), self._pass(there, writer, self.passing)):
            task = asyncio.create_task(work)
            self._tasks.add(task)

    async def _pass(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        passing: asyncio.Event | None = None,
    ) -> None:
        try:
            while data := await reader.read(65536):
                if passing is not None and not passing.is_set():
                    await passing.wait()
                    data += await reader.read(65536)
                writer.write(data)
        finally:
            writer.close()


@pytest.mark.parametrize("waiting", [0, 1])
async def test_what_a_server_says_after_the_transaction_is_not_the_clients(
    postgres: EmbeddedPostgres, make_service: MakeService, waiting: int
) -> None:
    """The end of a query and the server's FATAL in one piece, as a shutdown may send them.

    The client was told of an end of its connection that never came, and a client that waited got the
    dying connection.
    """
    async with HoldingProxy(postgres) as proxy:
        sidecar = await make_service(postgres.dsn(port=proxy.port), max_size=1)
        client = await asyncpg.connect(sidecar.dsn())
        other = await asyncpg.connect(sidecar.dsn())
        try:
            pid = await client.fetchval("SELECT pg_backend_pid()")
            await sidecar.until_pinged()
            proxy.passing.clear()
            asking = asyncio.create_task(client.execute("SELECT 'held back'"))
            backend = f"FROM pg_stat_activity WHERE pid = {pid}"
            look = f"SELECT count(*) {backend} AND query LIKE '%held back%' AND state = 'idle'"
            await come_true(lambda: postgres.psql(look) == "1", "the server has answered")
            also = [asyncio.create_task(other.execute("SELECT 1")) for _ in range(waiting)]
            await sidecar.until(lambda now: now.pending == waiting)
            postgres.psql(f"SELECT pg_terminate_backend({pid})")
            await come_true(lambda: postgres.psql(f"SELECT {backend}") == "", "it is gone")
            proxy.passing.set()
            assert await asking == "SELECT 1"
            await asyncio.gather(*also)
            assert await client.execute("SELECT 1") == "SELECT 1"
        finally:
            await client.close()
            await other.close()
        metrics = await sidecar.until_whole()
        assert metrics.errors == {}
        assert closed(metrics, "server_closed") == 1
        await sidecar.stop()


async def test_clients_that_leave_before_their_settings_hold(
    own_postgres: MakePostgres, make_service: MakeService
) -> None:
    """The reply to our own SET is owed: such a connection was handed to the next client."""
    server = own_postgres()
    sidecar = await make_service(server.dsn(), max_size=1)
    async with await psycopg.AsyncConnection.connect(sidecar.dsn(), autocommit=True) as other:
        await sidecar.until_pinged()
        dsn = sidecar.dsn(application_name="nobody had this before")
        leaving = await psycopg.AsyncConnection.connect(dsn, autocommit=True)
        server.pause()
        try:
            asking = asyncio.create_task(leaving.execute("SELECT 1"))
            await sidecar.until(lambda now: now.used == 1)
            hang_up(leaving)
            await sidecar.until(lambda now: now.used == 0)
            with pytest.raises(psycopg.OperationalError):
                await asking
        finally:
            server.resume()
        await other.execute("SELECT 1")
    await sidecar.until_whole(idle=1)


async def test_lost_idle_connections_are_replaced_unnoticed(
    own_postgres: MakePostgres, make_service: MakeService
) -> None:
    """Who is not in the middle of a transaction hears nothing of it."""
    server = own_postgres()
    sidecar = await make_service(server.dsn(), **{**QUICK, "max_size": 3})
    await sidecar.until(lambda now: now.idle == 3)
    async with await psycopg.AsyncConnection.connect(sidecar.dsn(), autocommit=True) as conn:
        await conn.execute("SELECT 1")
        # in a thread: the sidecar must not seem to be stalled
        ended = await asyncio.to_thread(
            server.psql,
            "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity"
            " WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()",
        )
        assert ended == "3"
        await sidecar.until(lambda now: reconnects(now, "ok") == 3)
        await conn.execute("SELECT 1")
    metrics = await until_recovered(sidecar)
    assert metrics.errors == {}
    assert closed(metrics, "server_closed") == 3


async def test_a_stall_of_our_own_is_not_taken_for_the_servers(
    postgres: EmbeddedPostgres, make_service: MakeService
) -> None:
    """A ping whose answer is there, but could not be read in time, is a good one."""
    options = {"min_idle": 3, "max_size": 3, "ping_interval": "20ms", "ping_timeout": "100ms"}
    sidecar = await make_service(postgres.dsn(), **options)
    await sidecar.until(lambda now: now.idle == 3)
    checking = sidecar.pool.state.by_state[ConnectionState.CHECKING]
    for _ in range(5):
        while not checking:  # noqa: ASYNC110  step by step of the loop
            await asyncio.sleep(0)
        time.sleep(0.25)  # noqa: ASYNC251  the ping is out, its answer not read
        while checking:  # noqa: ASYNC110
            await asyncio.sleep(0)
    metrics = await until_recovered(sidecar)
    assert closed(metrics, "ping_timeout") == 0
    assert metrics.value("pgsidecar_pings_total", pool="main", outcome="ok") > 0


async def test_what_is_not_needed_again_is_not_owed(
    own_postgres: MakePostgres, make_service: MakeService
) -> None:
    """Five are lost, two come back: what a client waits for later is opened on demand, no reconnect."""
    server = own_postgres()
    sidecar = await make_service(server.dsn(), **{**QUICK, "min_idle": 2})

    async def hold(count: int) -> list[psycopg.AsyncConnection[tuple[object, ...]]]:
        conns = [await psycopg.AsyncConnection.connect(sidecar.dsn()) for _ in range(count)]
        await asyncio.gather(*(conn.execute("SELECT 1") for conn in conns))
        return conns

    for conn in await hold(5):
        await conn.close()
    await asyncio.to_thread(
        server.psql,
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()",
    )
    await sidecar.until(lambda now: closed(now, "server_closed") == 5 and now.idle == 2)
    before = reconnects(await sidecar.metrics(), "ok")
    for conn in await hold(5):
        await conn.close()
    metrics = await sidecar.until_whole()
    assert metrics.value("pgsidecar_connections_opened_total", pool="main", reason="demand") > 0
    assert reconnects(metrics, "ok") == before == 2


async def test_starts_without_postgresql(
    own_postgres: MakePostgres, make_service: MakeService
) -> None:
    """A sidecar starts with its application, which may be before the database."""
    server = own_postgres()
    server.kill()
    sidecar = await make_service(server.dsn(), listen={"login_timeout": "1s"}, **QUICK)
    assert await asyncio.to_thread(sidecar.get, "/livez") == (200, "ok\n")
    status, why = await asyncio.to_thread(sidecar.get, "/readyz")
    assert status == 503
    assert "pool 'main'" in why
    metrics = await sidecar.metrics()
    assert not metrics.is_up
    began = time.monotonic()
    with pytest.raises(asyncpg.PostgresError) as caught:
        await asyncpg.connect(sidecar.dsn())
    assert 0.5 < time.monotonic() - began < 3
    error = caught.value
    assert error.sqlstate == "08001"
    assert error.severity == "FATAL"
    address = f"127.0.0.1:{server.port}"
    assert str(error).splitlines()[0] == (
        f"pool 'main' cannot reach PostgreSQL at {address}: connection refused"
    )
    # one that is patient enough is let in when the server comes
    patient = await make_service(server.dsn(), **QUICK)
    login = asyncio.create_task(psycopg.AsyncConnection.connect(patient.dsn()))
    await patient.until(lambda now: failed(now, "connect", "refused") > 0)
    await asyncio.to_thread(server.restart)
    async with await login as conn:
        await conn.execute("SELECT 1")
    await until_recovered(sidecar)
    await until_recovered(patient)


async def test_a_server_with_fewer_connections_than_the_pool(
    own_postgres: MakePostgres, make_service: MakeService
) -> None:
    """Clients are served by what there is, and never see the server's refusals."""
    server = own_postgres(settings={"max_connections": "8", "superuser_reserved_connections": "3"})
    server.psql("CREATE ROLE app LOGIN")
    sidecar = await make_service(server.dsn(user="app"), max_size=25, min_idle=0)

    async def work() -> None:
        async with await psycopg.AsyncConnection.connect(sidecar.dsn()) as conn:
            for _ in range(5):
                await conn.execute("SELECT pg_sleep(0.01)")
                await conn.commit()

    async with asyncio.TaskGroup() as group:
        for _ in range(20):
            group.create_task(work())
    metrics = await sidecar.until_whole()
    assert metrics.transactions == {"commit": 100, "rollback": 0}
    assert metrics.errors == {}
    assert failed(metrics, "auth", "too_many_connections") > 0
    assert metrics.value("pgsidecar_pool_connections_used_peak", pool="main", window="1m") == 5
    assert metrics.is_up


@pytest.mark.parametrize(
    ("wrong", "sqlstate", "message"),
    [
        ({"password": "wrong"}, "28P01", 'password authentication failed for user "postgres"'),
        ({"database": "nowhere"}, "3D000", 'database "nowhere" does not exist'),
    ],
)
async def test_a_server_that_refuses_us_is_quoted_at_once(
    own_postgres: MakePostgres,
    make_service: MakeService,
    wrong: dict[str, str],
    sqlstate: str,
    message: str,
) -> None:
    """Waiting would not help: the client sees what it would see without the sidecar."""
    server = own_postgres(auth="scram-sha-256")
    sidecar = await make_service(server.dsn(**wrong))
    began = time.monotonic()
    with pytest.raises(asyncpg.PostgresError, match=message) as caught:
        await asyncpg.connect(sidecar.dsn())
    assert time.monotonic() - began < 2
    assert caught.value.sqlstate == sqlstate
    status, why = await asyncio.to_thread(sidecar.get, "/readyz")
    assert status == 503
    assert message in why


async def test_a_password_that_is_changed_later(
    own_postgres: MakePostgres, make_service: MakeService
) -> None:
    """Clients that are logged in are told at once, too; and all is well with the password."""
    server = own_postgres(auth="scram-sha-256", password="first")
    server.psql("CREATE ROLE app LOGIN PASSWORD 'first'")
    sidecar = await make_service(server.dsn(user="app", password="first"), **QUICK)
    async with await psycopg.AsyncConnection.connect(sidecar.dsn(), autocommit=True) as conn:
        await sidecar.until(lambda now: now.idle == 3)
        server.psql("ALTER ROLE app PASSWORD 'second'")
        ends = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'app'"
        await asyncio.to_thread(server.psql, ends)
        await sidecar.until(lambda now: not now.is_up)
        with pytest.raises(psycopg.errors.InvalidPassword) as caught:
            await conn.execute("SELECT 1")
        assert caught.value.diag.severity_nonlocalized == "ERROR"
        server.psql("ALTER ROLE app PASSWORD 'first'")
        await sidecar.until(lambda now: now.is_up)
        await conn.execute("SELECT 1")
    metrics = await until_recovered(sidecar)
    assert failed(metrics, "auth", "auth") > 0
    assert metrics.acquires["rejected"] == 1


class Clerk(Worker):
    """Writes numbered rows, and notes which of them the server acknowledged."""

    def __init__(self, sidecar: Sidecar, number: int) -> None:
        super().__init__(sidecar, number)
        self.acknowledged: set[int] = set()
        self._next = 0


class PsycopgClerk(Clerk, PsycopgWorker):
    async def work(self) -> None:
        assert self._conn is not None
        self._next += 1  # first: what failed is not written again, its fate is not known
        number = self._next
        await self._conn.execute("INSERT INTO ledger VALUES (%s, %s)", [self.number, number])
        await self._conn.commit()
        self.acknowledged.add(number)


class AsyncpgClerk(Clerk, AsyncpgWorker):
    async def work(self) -> None:
        assert self._conn is not None
        self._next += 1
        number = self._next
        await self._conn.execute("INSERT INTO ledger VALUES ($1, $2)", self.number, number)
        self.acknowledged.add(number)


@pytest.mark.both_loops
async def test_no_acknowledged_row_is_lost_or_doubled(
    own_postgres: MakePostgres, make_service: MakeService
) -> None:
    """Through a crash and a restart: COMMIT is forwarded once, and its answer is the server's."""
    server = own_postgres()
    server.psql("CREATE TABLE ledger (clerk int, number int)")
    sidecar = await make_service(server.dsn(), **QUICK)
    kinds = (PsycopgClerk, AsyncpgClerk)
    clerks = [kinds[number % 2](sidecar, number) for number in range(8)]
    async with working([*clerks]):
        await asyncio.to_thread(server.kill)
        await asyncio.to_thread(server.restart)
        await all_work([*clerks])
        await asyncio.to_thread(server.restart)
        await all_work([*clerks])
    await until_recovered(sidecar)
    rows = server.psql("SELECT clerk, number, count(*) FROM ledger GROUP BY 1, 2").splitlines()
    found = {(int(c), int(n)): int(times) for c, n, times in (row.split("|") for row in rows)}
    assert set(found.values()) == {1}
    acknowledged = {(clerk.number, n) for clerk in clerks for n in clerk.acknowledged}
    assert acknowledged <= found.keys()
    # what was not acknowledged is at most what was under way when the server went, twice
    assert len(found) - len(acknowledged) <= 2 * len(clerks)
