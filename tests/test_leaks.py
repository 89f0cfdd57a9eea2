"""Leaks: which leases are, that they are told while they last, and ended where that is asked for."""

import asyncio
import logging

import psycopg
import pytest
from psycopg.pq import TransactionStatus

from sidecar.demo.postgres import EmbeddedPostgres
from sidecar.work import Holder
from tests.sidecar_process import MakeService, Metrics, ServiceHere

THRESHOLD = "300ms"


def leaked(count: int):
    return lambda now: now.value("pgsidecar_leaked_connections", pool="main") == count


def begun(now: Metrics) -> float:
    return now.value("pgsidecar_leaks_total", pool="main")


def leaks(sidecar: ServiceHere) -> list[Holder]:
    return list(sidecar.service.recorder.pool("main").leaks.values())


async def connect(sidecar: ServiceHere, application: str, *, autocommit: bool = False):
    dsn = sidecar.dsn(application_name=application)
    return await psycopg.AsyncConnection.connect(dsn, autocommit=autocommit)


async def longer_than_the_threshold(sidecar: ServiceHere) -> None:
    """And a search for leaks since: that of another client, which is one."""
    before = begun(await sidecar.metrics())
    async with await connect(sidecar, "control") as conn:
        await conn.execute("SELECT 1")
        await sidecar.until(lambda now: begun(now) > before)


async def test_an_idle_transaction_is_a_leak_while_it_lasts(
    postgres: EmbeddedPostgres, make_service: MakeService, caplog: pytest.LogCaptureFixture
) -> None:
    """With all that is needed to find it, in the log and for whoever asks; without literals."""
    caplog.set_level(logging.INFO, "pgsidecar")
    sidecar = await make_service(postgres.dsn(), leak_threshold=THRESHOLD)
    async with await connect(sidecar, "batch") as conn:
        await conn.execute("SELECT 'zebra' WHERE 4711 = 4711")
        await sidecar.until(leaked(1))
        (leak,) = leaks(sidecar)
        assert (leak.who.application, leak.who.user, leak.state) == (
            *("batch", "app"),
            "idle in transaction",
        )
        assert leak.statement is not None
        assert "WHERE" in leak.statement.text
        assert begun(await sidecar.metrics()) == 1
    metrics = await sidecar.until(leaked(0))
    assert begun(metrics) == 1
    assert leaks(sidecar) == []
    (warning,) = (r for r in caplog.records if r.getMessage() == "leak")
    (ended,) = (r for r in caplog.records if r.getMessage() == "leak ended")
    assert (warning.levelno, ended.levelno) == (logging.WARNING, logging.INFO)
    told = vars(warning)
    assert told["application"] == "batch"
    assert told["client"] == leak.who.address != ""
    assert (told["pool"], told["user"], told["state"]) == ("main", "app", "idle in transaction")
    assert told["fingerprint"] == leak.statement.fingerprint
    assert told["backend_pid"] == leak.backend_pid > 0
    assert told["age"] >= 0.3
    assert "transaction" in told["hint"]
    assert "zebra" not in str(told)
    assert "4711" not in told["query"]
    assert vars(ended)["age"] >= told["age"]


async def test_a_long_query_is_a_leak_in_transaction_mode(
    postgres: EmbeddedPostgres, make_service: MakeService
) -> None:
    sidecar = await make_service(postgres.dsn(), leak_threshold=THRESHOLD)
    async with await connect(sidecar, "report", autocommit=True) as conn:
        asking = asyncio.create_task(conn.execute("SELECT pg_sleep(1)"))
        await sidecar.until(leaked(1))
        (leak,) = leaks(sidecar)
        assert leak.state == "running"
        await asking
        await sidecar.until(leaked(0))


async def test_many_short_transactions_are_none(
    postgres: EmbeddedPostgres, make_service: MakeService
) -> None:
    """However long the client is there: each has a lease of its own."""
    sidecar = await make_service(postgres.dsn(), max_size=2, leak_threshold=THRESHOLD)
    async with await connect(sidecar, "web", autocommit=True) as conn:
        working = asyncio.create_task(_work(conn))
        await longer_than_the_threshold(sidecar)
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)
    assert begun(await sidecar.metrics()) == 1  # the control's


async def _work(conn: psycopg.AsyncConnection) -> None:
    while True:
        await conn.execute("SELECT pg_sleep(0.01)")


@pytest.mark.parametrize("mode", ["transaction", "session"])
async def test_who_keeps_its_connection_by_right_is_none_without_a_transaction(
    postgres: EmbeddedPostgres, make_service: MakeService, mode: str
) -> None:
    """Pinned, or in session mode: only its transactions count."""
    sidecar = await make_service(postgres.dsn(), mode=mode, leak_threshold=THRESHOLD)
    async with await connect(sidecar, "listener", autocommit=True) as conn:
        await conn.execute("LISTEN news")
        await longer_than_the_threshold(sidecar)
        await conn.execute("SELECT 1")
        assert begun(await sidecar.metrics()) == 1  # the control's
        await sidecar.until(leaked(0))
        await conn.execute("BEGIN")
        await sidecar.until(leaked(1))
        (leak,) = leaks(sidecar)
        assert leak.who.application == "listener"
        await conn.execute("COMMIT")
        await sidecar.until(leaked(0))
        assert begun(await sidecar.metrics()) == 2


async def test_without_a_threshold_nothing_is_a_leak(
    postgres: EmbeddedPostgres, make_service: MakeService
) -> None:
    sidecar = await make_service(postgres.dsn(), leak_threshold="0")
    async with await connect(sidecar, "batch") as conn:
        await conn.execute("SELECT 1")
        name = "pgsidecar_longest_idle_in_transaction_seconds"
        metrics = await sidecar.until(lambda now: now.value(name, pool="main") > 1.2)
        assert begun(metrics) == 0


@pytest.mark.parametrize("mode", ["transaction", "session"])
async def test_an_idle_leak_is_closed_and_its_connection_rolled_back(
    postgres: EmbeddedPostgres, make_service: MakeService, mode: str
) -> None:
    """The client is told by which option; the server connection serves the next."""
    postgres.psql("DROP TABLE IF EXISTS leaked; CREATE TABLE leaked (n int)")
    sidecar = await make_service(
        postgres.dsn(),
        mode=mode,
        max_size=1,
        leak_threshold=THRESHOLD,
        leak_action="close",
    )
    async with await connect(sidecar, "batch") as conn:
        cursor = await conn.execute("INSERT INTO leaked VALUES (1) RETURNING pg_backend_pid()")
        backend = await cursor.fetchone()
        await sidecar.until(lambda now: begun(now) == 1 and leaked(0)(now))
        with pytest.raises(psycopg.Error) as caught:
            await conn.execute("SELECT 1")
        assert caught.value.sqlstate == "25P04"
        assert "has kept a server connection for 0." in str(caught.value)
        assert "(leak_threshold 0.3 s)" in str(caught.value)
        assert conn.info.transaction_status is TransactionStatus.UNKNOWN
    async with await connect(sidecar, "next", autocommit=True) as conn:
        cursor = await conn.execute("SELECT pg_backend_pid(), (SELECT count(*) FROM leaked)")
        assert await cursor.fetchone() == (*(backend or ()), 0)
    metrics = await sidecar.metrics()
    assert metrics.errors == {("sidecar", "25"): 1}
    assert metrics.above_zero("pgsidecar_timeouts_total", "kind") == {}
    (failure,) = sidecar.service.recorder.pool("main").failures.entries()
    assert (failure.application, failure.sqlstate) == ("batch", "25P04")
    assert failure.statement is not None
    assert "leaked" in failure.statement.text


async def test_a_running_leak_is_cancelled_and_its_connection_closed(
    postgres: EmbeddedPostgres, make_service: MakeService
) -> None:
    sidecar = await make_service(
        postgres.dsn(), max_size=1, leak_threshold=THRESHOLD, leak_action="close"
    )
    async with await connect(sidecar, "report", autocommit=True) as conn:
        with pytest.raises(psycopg.Error) as caught:
            await conn.execute("SELECT pg_sleep(20) AS leaking")
        assert caught.value.sqlstate == "25P04"
    metrics = await sidecar.until_whole()
    closed = "pgsidecar_connections_closed_total"
    await sidecar.until(lambda now: now.value(closed, pool="main", reason="leak") == 1)
    assert metrics.errors == {("sidecar", "25"): 1}
    running = (
        "SELECT count(*) FROM pg_stat_activity WHERE query LIKE '%leaking' AND state = 'active'"
    )
    assert postgres.psql(running) == "0"
