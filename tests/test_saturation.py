"""A pool that is full: who gets a connection, who waits, and what those who wait in vain are told."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import asyncpg
import psycopg
import pytest
from psycopg.pq import DiagnosticField, TransactionStatus

from sidecar.demo.postgres import EmbeddedPostgres
from tests.sidecar_process import MakeProcess, MakeService, Metrics, Sidecar, hang_up

Connection = psycopg.AsyncConnection[tuple[object, ...]]


async def connect(sidecar: Sidecar, application: str, *, autocommit: bool = False) -> Connection:
    dsn = sidecar.dsn(application_name=application)
    return await psycopg.AsyncConnection.connect(dsn, autocommit=autocommit)


@asynccontextmanager
async def holder(sidecar: Sidecar, application: str = "holder") -> AsyncIterator[Connection]:
    """A client that holds a connection in a transaction, until told to commit."""
    async with await connect(sidecar, application) as conn:
        await conn.execute("SELECT 1")
        yield conn


def waiting(count: int):
    return lambda now: now.pending == count


def class_of(error: psycopg.Error) -> str:
    return (error.sqlstate or "")[:2]


async def test_40_clients_on_25_connections(
    postgres: EmbeddedPostgres, make_process: MakeProcess
) -> None:
    """25 are served, 15 wait and say so in the gauges, are told why, and are well afterwards."""
    sidecar = make_process(postgres.dsn(), max_size=25, acquire_timeout="1500ms")
    served: list[Connection] = []
    refused: dict[Connection, psycopg.Error] = {}

    async def hold(conn: Connection) -> None:
        try:
            await conn.execute("SELECT 1")
        except psycopg.Error as error:
            refused[conn] = error
        else:
            served.append(conn)

    async with AsyncExitStack() as stack:
        clients = [await connect(sidecar, "checkout") for _ in range(40)]
        for conn in clients:
            await stack.enter_async_context(conn)
        began = time.monotonic()
        async with asyncio.TaskGroup() as group:
            for conn in clients:
                group.create_task(hold(conn))
            full = await sidecar.until(lambda now: now.used == 25 and now.pending == 15)
            oldest = full.value("pgsidecar_pool_pending_max_wait_seconds", pool="main")
            assert 0 < oldest <= time.monotonic() - began
            assert full.idle == 0
        took = time.monotonic() - began
        assert (len(served), len(refused)) == (25, 15)
        assert 1.5 <= took < 3
        for conn, error in refused.items():
            check_message(error)
            # severity ERROR: the session goes on
            assert conn.info.transaction_status is TransactionStatus.IDLE
        metrics = await sidecar.metrics()
        assert metrics.used == 25
        assert metrics.pending == 0
        assert metrics.acquires["timeout"] == 15
        assert metrics.errors == {("sidecar", "53"): 15}
        for name, labels in (
            ("timeouts_total", {"kind": "acquire"}),
            ("connection_errors_total", {"phase": "acquire", "reason": "timeout"}),
            ("connection_attempts_total", {"outcome": "error"}),
        ):
            assert metrics.value(f"pgsidecar_{name}", pool="main", **labels) == 15
        peak = metrics.value("pgsidecar_pool_connections_used_peak", pool="main", window="1m")
        assert peak == 25
        for conn in served:
            await conn.commit()
        for conn in clients:
            await conn.execute("SELECT 1")
            await conn.commit()
        metrics = await sidecar.until_whole()
        assert metrics.transactions == {"commit": 25 + 40, "rollback": 0}


def check_message(error: psycopg.Error) -> None:
    """Who, what, the limit and the actual."""
    assert isinstance(error, psycopg.errors.TooManyConnections)  # 53300
    diag = error.diag
    assert diag.severity == diag.severity_nonlocalized == "ERROR"
    assert diag.message_primary is not None
    assert diag.message_primary.startswith("no connection from pool 'main' in 1.")
    assert "waiting)" in diag.message_primary
    assert diag.message_detail is not None
    assert diag.message_detail.startswith(
        "25 of 25 connections in use, 25 of them idle in a transaction. The oldest lease is 1."
    )
    assert 'application "checkout", user "app", 127.0.0.1:' in diag.message_detail
    assert diag.message_hint is not None
    assert "max_size (25)" in diag.message_hint
    assert error.pgresult is not None
    assert error.pgresult.error_field(DiagnosticField.SQLSTATE) == b"53300"


async def test_detail_names_the_oldest_holder_and_its_query(
    postgres: EmbeddedPostgres, make_service: MakeService
) -> None:
    """Who runs a query is told from who forgot to commit."""
    sidecar = await make_service(postgres.dsn(), max_size=1, acquire_timeout="400ms")
    async with (
        await connect(sidecar, "nightly report", autocommit=True) as slow,
        await connect(sidecar, "web") as conn,
    ):
        running = asyncio.create_task(slow.execute("SELECT pg_sleep(1)"))
        await sidecar.until(lambda now: now.used == 1)
        with pytest.raises(psycopg.errors.TooManyConnections) as caught:
            await conn.execute("SELECT 1")
        await running
    detail = caught.value.diag.message_detail
    assert detail is not None
    assert "1 of 1 connections in use, 0 of them idle in a transaction" in detail
    assert 'application "nightly report"' in detail
    assert "running a query for" in detail


async def test_detail_counts_connections_by_application(
    postgres: EmbeddedPostgres, make_service: MakeService
) -> None:
    """Who has most comes first, and names are three at most."""
    sidecar = await make_service(postgres.dsn(), max_size=7, acquire_timeout="400ms")
    async with AsyncExitStack() as stack:
        for name in ("report", "billing", "billing", "a", "", "report", "billing"):
            await stack.enter_async_context(holder(sidecar, name))
        with pytest.raises(psycopg.errors.TooManyConnections) as caught:
            await stack.enter_async_context(holder(sidecar, "late"))
    detail = caught.value.diag.message_detail
    assert detail is not None
    assert detail.endswith('By application: "billing" 3, "report" 2, "a" 1, others 1.')


async def test_a_pool_that_the_server_keeps_small_says_so(
    postgres: EmbeddedPostgres, make_service: MakeService
) -> None:
    """``max_size`` is more than the server allows: raising it would not help."""
    postgres.psql("CREATE ROLE few LOGIN PASSWORD 'few' CONNECTION LIMIT 2")
    try:
        dsn = postgres.dsn(user="few", password="few")
        sidecar = await make_service(dsn, max_size=5, min_idle=0, acquire_timeout="600ms")
        async with holder(sidecar, "one"), holder(sidecar, "two"):
            with pytest.raises(psycopg.errors.TooManyConnections) as caught:
                async with holder(sidecar, "three"):
                    pass
        await sidecar.stop()
    finally:
        postgres.psql("DROP ROLE few")
    diag = caught.value.diag
    assert diag.message_detail is not None
    assert diag.message_detail.startswith(
        "2 of 5 connections in use, 2 of them idle in a transaction."
        ' Another cannot be opened: too many connections for role "few".'
    )
    assert diag.message_hint == (
        "Give the server room for max_size (5) connections (its max_connections, the limits of role"
        " and database), or lower max_size."
    )


async def test_waiters_are_served_in_the_order_of_their_coming(
    postgres: EmbeddedPostgres, make_service: MakeService
) -> None:
    """First come, first served: no client starves."""
    sidecar = await make_service(postgres.dsn(), max_size=1)
    order: list[int] = []

    async def ask(number: int) -> None:
        async with await connect(sidecar, "waiter", autocommit=True) as conn:
            await conn.execute("SELECT 1")
            order.append(number)

    async with holder(sidecar) as first, asyncio.TaskGroup() as group:
        for number in range(10):
            group.create_task(ask(number))
            await sidecar.until(waiting(number + 1))
        await first.commit()
    assert order == list(range(10))
    metrics = await sidecar.until_whole()
    assert metrics.acquires == {"immediate": 1, "waited": 10}
    waits = metrics.value("pgsidecar_pool_acquire_duration_seconds_count", pool="main")
    assert waits == 11


async def test_an_idle_connection_is_not_taken_from_those_who_wait(
    postgres: EmbeddedPostgres, make_service: MakeService
) -> None:
    """The client that releases a connection and asks again at once goes to the end of the queue."""
    sidecar = await make_service(postgres.dsn(), max_size=1)
    order: list[str] = []

    async def ask(conn: Connection, name: str) -> None:
        await conn.execute("SELECT 1")
        order.append(name)

    async with holder(sidecar) as first, await connect(sidecar, "b", autocommit=True) as second:
        asking = asyncio.create_task(ask(second, "second"))
        await sidecar.until(waiting(1))
        await first.commit()
        await first.set_autocommit(True)
        await ask(first, "first")
        await asking
    assert order == ["second", "first"]


async def test_cancel_while_waiting(postgres: EmbeddedPostgres, make_service: MakeService) -> None:
    """The client's own cancel request ends its wait as it would end its query, at once."""
    sidecar = await make_service(postgres.dsn(), max_size=1)
    async with holder(sidecar) as first, await connect(sidecar, "impatient") as conn:
        asking = asyncio.create_task(conn.execute("SELECT 1"))
        await sidecar.until(waiting(1))
        await conn.cancel_safe()
        with pytest.raises(psycopg.errors.QueryCanceled):
            await asking
        metrics = await sidecar.until(waiting(0))
        assert metrics.acquires == {"immediate": 1, "cancelled": 1}
        assert metrics.errors == {("sidecar", "57"): 1}
        await first.commit()
        await conn.execute("SELECT 1")  # the connection is well
        await conn.commit()
    metrics = await sidecar.until_whole(idle=1)
    assert metrics.acquires == {"immediate": 2, "cancelled": 1}


async def test_a_cancel_never_hits_what_the_client_runs_next(
    postgres: EmbeddedPostgres, make_service: MakeService
) -> None:
    """As with PostgreSQL: once the cancel request's connection is closed, it is settled.

    It was closed before the server had the request: 1 in 9 of these transactions was hit later.
    """
    sidecar = await make_service(postgres.dsn(), max_size=1)
    cancelled = 0
    async with await connect(sidecar, "impatient", autocommit=True) as conn:
        for number in range(300):
            await conn.execute("BEGIN")
            takes = 0.0004 * 2 ** (number % 7)  # the longest are amid on any machine
            running = asyncio.create_task(conn.execute(f"SELECT pg_sleep({takes})".encode()))
            await asyncio.sleep(number % 30 * 0.0001)  # before, amid and after the query
            await conn.cancel_safe()
            try:
                await running
            except psycopg.errors.QueryCanceled:
                cancelled += 1
            else:
                await conn.execute("SELECT pg_sleep(0.0004)")
            await conn.execute("ROLLBACK")
    assert cancelled
    metrics = await sidecar.until_whole()
    assert metrics.errors == {("server", "57"): cancelled}


async def test_disconnect_while_waiting_leaves_no_trace(
    postgres: EmbeddedPostgres, make_service: MakeService
) -> None:
    """A connection is not handed to a client that is gone."""
    sidecar = await make_service(postgres.dsn(), max_size=1)
    async with holder(sidecar) as first:
        conn = await connect(sidecar, "gone")
        asking = asyncio.create_task(conn.execute("SELECT 1"))
        await sidecar.until(waiting(1))
        hang_up(conn)
        with pytest.raises(psycopg.OperationalError):
            await asking
        metrics = await sidecar.until(waiting(0))
        assert metrics.acquires == {"immediate": 1, "cancelled": 1}
        assert metrics.used == 1
        await first.commit()
    metrics = await sidecar.until_whole(idle=1)
    assert metrics.acquires == {"immediate": 1, "cancelled": 1}
    assert metrics.above_zero("pgsidecar_connections_closed_total", "reason") == {}


async def test_a_full_queue_rejects_at_once(
    postgres: EmbeddedPostgres, make_service: MakeService
) -> None:
    """``max_waiting``: better a clear error now than one after the timeout."""
    sidecar = await make_service(postgres.dsn(), max_size=1, max_waiting=1)
    async with (
        holder(sidecar) as first,
        await connect(sidecar, "second", autocommit=True) as second,
        await connect(sidecar, "third", autocommit=True) as third,
    ):
        asking = asyncio.create_task(second.execute("SELECT 1"))
        await sidecar.until(waiting(1))
        with pytest.raises(psycopg.errors.TooManyConnections, match="1 clients wait") as caught:
            await third.execute("SELECT 1")
        assert caught.value.diag.severity_nonlocalized == "ERROR"
        assert caught.value.diag.message_hint == "The limit is max_waiting (1)."
        await first.commit()
        await asking
        await third.execute("SELECT 1")
    metrics = await sidecar.until_whole()
    assert metrics.acquires["rejected"] == 1
    rejected = {"phase": "acquire", "reason": "rejected"}
    assert metrics.value("pgsidecar_connection_errors_total", pool="main", **rejected) == 1


async def pipeline(conn: Connection) -> list[tuple[object, ...] | None]:
    """Twenty queries, sent before the first is answered."""
    async with conn.pipeline():
        cursors = [await conn.execute("SELECT %s::int", [number]) for number in range(20)]
        return [await cursor.fetchone() for cursor in cursors]


async def test_pipelines_that_time_out_recover(
    postgres: EmbeddedPostgres, make_service: MakeService
) -> None:
    """All of the pipeline up to its Sync is refused with one error; the next one works."""
    sidecar = await make_service(postgres.dsn(), max_size=1, acquire_timeout="300ms")
    async with holder(sidecar) as first, await connect(sidecar, "pipeline") as conn:
        await conn.set_autocommit(True)
        with pytest.raises(psycopg.errors.TooManyConnections):
            await pipeline(conn)
        await first.commit()
        assert await pipeline(conn) == [(number,) for number in range(20)]
    metrics = await sidecar.until_whole(idle=1)
    assert metrics.acquires["timeout"] == 1
    assert metrics.errors == {("sidecar", "53"): 1}


async def test_prepared_statements_that_time_out_recover(
    postgres: EmbeddedPostgres, make_service: MakeService
) -> None:
    """A refused Parse prepares nothing: the same statement is prepared when there is room."""
    sidecar = await make_service(postgres.dsn(), max_size=1, acquire_timeout="300ms")
    client = await asyncpg.connect(sidecar.dsn())
    try:
        async with holder(sidecar) as first:
            with pytest.raises(asyncpg.exceptions.TooManyConnectionsError):
                await client.fetchval("SELECT $1::int + 1", 1)
            with pytest.raises(asyncpg.exceptions.TooManyConnectionsError):
                await client.execute("SELECT 1; SELECT 2")
            await first.commit()
        assert await client.fetchval("SELECT $1::int + 1", 1) == 2
        assert await client.execute("SELECT 1; SELECT 2") == "SELECT 1"
    finally:
        await client.close()
    metrics = await sidecar.until_whole(idle=1)
    assert metrics.acquires["timeout"] == 2


async def test_a_forgotten_transaction_is_rolled_back_for_the_next_in_line(
    postgres: EmbeddedPostgres, make_service: MakeService
) -> None:
    """The holder dies in its transaction: who waits gets the same connection, clean."""
    postgres.psql("CREATE TABLE saturation_forgotten (n int)")
    sidecar = await make_service(postgres.dsn(), max_size=1)
    dying = await connect(sidecar, "dying")
    await dying.execute("INSERT INTO saturation_forgotten VALUES (1)")
    async with await connect(sidecar, "next", autocommit=True) as conn:
        asking = asyncio.create_task(conn.execute("SELECT count(*) FROM saturation_forgotten"))
        await sidecar.until(waiting(1))
        hang_up(dying)
        assert await (await asking).fetchone() == (0,)
    await dying.close()
    metrics = await sidecar.until_whole(idle=1)
    assert metrics.transactions == {"commit": 1, "rollback": 1}
    assert metrics.above_zero("pgsidecar_connections_closed_total", "reason") == {}


async def test_a_client_that_dies_in_a_query_does_not_keep_the_server_busy(
    postgres: EmbeddedPostgres, make_service: MakeService
) -> None:
    """Its query is cancelled and the place is free for who waits, long before the query's end."""
    sidecar = await make_service(postgres.dsn(), max_size=1)
    dying = await connect(sidecar, "dying", autocommit=True)
    running = asyncio.create_task(dying.execute("SELECT pg_sleep(60)"))
    await sidecar.until(lambda now: now.used == 1)
    async with await connect(sidecar, "next", autocommit=True) as conn:
        asking = asyncio.create_task(conn.execute("SELECT 1"))
        await sidecar.until(waiting(1))
        hang_up(dying)
        with pytest.raises(psycopg.OperationalError):
            await running
        async with asyncio.timeout(5):
            await asking
    metrics = await sidecar.until_whole()
    closed = metrics.above_zero("pgsidecar_connections_closed_total", "reason")
    assert closed == {("client_lost",): 1}
    await sidecar.until(lambda now: now.idle == 1)
    assert is_gone(postgres, "pg_sleep(60)")


def is_gone(server: EmbeddedPostgres, query: str) -> bool:
    found = server.psql(
        f"SELECT count(*) FROM pg_stat_activity WHERE state = 'active'"
        f" AND query LIKE '%{query}%' AND pid <> pg_backend_pid()"
    )
    return found == "0"


def idle_and_used(metrics: Metrics) -> tuple[float, float]:
    return metrics.idle, metrics.used


async def test_a_pool_shrinks_to_its_minimum_after_a_burst(
    postgres: EmbeddedPostgres, make_service: MakeService
) -> None:
    """Connections above ``min_idle`` are closed once idle for ``idle_timeout``, not before."""
    sidecar = await make_service(postgres.dsn(), max_size=10, min_idle=2, idle_timeout="500ms")
    async with AsyncExitStack() as stack:
        holders = [await stack.enter_async_context(holder(sidecar)) for _ in range(8)]
        metrics = await sidecar.until(lambda now: now.used == 8)
        assert metrics.used == len(holders)
    await sidecar.until(lambda now: idle_and_used(now) == (2, 0))
    metrics = await sidecar.until_whole(idle=2)
    closed = metrics.above_zero("pgsidecar_connections_closed_total", "reason")
    assert closed.keys() == {("idle_timeout",)}
    opened = metrics.above_zero("pgsidecar_connections_opened_total", "reason")
    assert sum(opened.values()) == closed["idle_timeout",] + 2
