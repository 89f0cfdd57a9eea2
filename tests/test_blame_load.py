"""Blame under real load: what is charged is what the clients have waited, and who is guilty is charged."""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable

import psycopg
import pytest

from sidecar.demo.postgres import EmbeddedPostgres
from sidecar.observe.blame import Blame
from sidecar.work import Statement
from tests.sidecar_process import MakeService, Metrics, ServiceHere

Connection = psycopg.AsyncConnection[tuple[object, ...]]

SECONDS = 4.0


def blame_of(sidecar: ServiceHere) -> Blame:
    return sidecar.service.recorder.pool("main").blame


def waited(metrics: Metrics) -> float:
    """By all requests for a connection that have ended."""
    return metrics.value("pgsidecar_pool_acquire_duration_seconds_sum", pool="main")


def by_application(metrics: Metrics) -> dict[str, float]:
    found = metrics.above_zero("pgsidecar_blamed_wait_seconds_total", "application")
    return {application: seconds for (application,), seconds in found.items()}


async def settled(sidecar: ServiceHere) -> Metrics:
    """Nobody waits, and the last wait has been charged."""
    await sidecar.until_whole()
    blame = blame_of(sidecar)
    return await sidecar.until(lambda now: blame.waited == pytest.approx(waited(now)))


async def connect(sidecar: ServiceHere, application: str) -> Connection:
    dsn = sidecar.dsn(application_name=application)
    return await psycopg.AsyncConnection.connect(dsn, autocommit=True)


async def test_all_waiting_is_charged_in_a_random_load(
    postgres: EmbeddedPostgres, make_service: MakeService
) -> None:
    """Within 1 %: by the sidecar's own sum, and by the clients' own clocks. They know how long their
    statements take in the server; what is on top is the wait, and what every round trip takes."""
    sidecar = await make_service(postgres.dsn(), max_size=3, min_idle=3, acquire_timeout="300ms")
    await sidecar.until(lambda now: now.idle == 3)
    dice = random.Random(4711)
    measured = 0.0
    until = time.monotonic() + SECONDS

    async def client(application: str, seed: int) -> float:
        own = random.Random(seed)
        total = 0.0
        async with await connect(sidecar, application) as conn:
            while time.monotonic() < until:
                work = own.choice([0.0, 0.01, 0.03, 0.1, 0.2])
                began = time.monotonic()
                try:
                    await conn.execute(f"SELECT pg_sleep({work})")
                    total += time.monotonic() - began - work
                except psycopg.errors.TooManyConnections:
                    total += time.monotonic() - began
                await asyncio.sleep(own.choice([0.0, 0.0, 0.05]))
        return total

    async with asyncio.TaskGroup() as group:
        clients = [
            group.create_task(client(f"app-{number % 4}", dice.randrange(10**6)))
            for number in range(12)
        ]
    measured = sum(each.result() for each in clients)
    metrics = await settled(sidecar)
    charged = sum(by_application(metrics).values())
    assert metrics.acquires.keys() == {"immediate", "waited", "timeout"}
    assert charged == pytest.approx(waited(metrics), rel=0.01)
    assert charged == pytest.approx(blame_of(sidecar).charged)
    assert by_application(metrics).keys() >= {f"app-{number}" for number in range(4)}
    # on a loaded machine every round trip is late, which is in the clients' sum only
    assert 0.85 * measured < charged < 1.01 * measured
    statements = statements_of(sidecar)
    by_statement = sum(each.blamed for each in statements)
    assert by_statement + blame_of(sidecar).without_statement == pytest.approx(charged)


def statements_of(sidecar: ServiceHere) -> list[Statement]:
    return list(sidecar.service.recorder.pool("main").statements.ranked("blamed", 100))


async def wait_for(
    sidecar: ServiceHere,
    hold: Callable[[Connection], Awaitable[object]],
    applications: list[str],
    enough: float,
) -> dict[str, float]:
    """Shares of the blame: the first holds, the others work, until there is enough to blame for."""
    async with await connect(sidecar, applications[0]) as guilty:
        await hold(guilty)
        others = [await connect(sidecar, application) for application in applications[1:]]
        work = "UPDATE blamed SET n = n + 1 WHERE id = 1"
        working = [asyncio.create_task(conn.execute(work)) for conn in others]
        blame = blame_of(sidecar)
        await sidecar.until(lambda _: blame.charged > enough, within=20.0)
        charged = by_application(await sidecar.metrics())
        await guilty.execute("ROLLBACK")
        await asyncio.gather(*working)
        for conn in others:
            await conn.close()
    total = sum(charged.values())
    return {application: seconds / total for application, seconds in charged.items()}


async def test_a_leak_is_charged_with_the_waiting(
    postgres: EmbeddedPostgres, make_service: MakeService
) -> None:
    """The application and its last statement."""
    postgres.psql("DROP TABLE IF EXISTS blamed; CREATE TABLE blamed AS SELECT 1 AS id, 0 AS n")
    sidecar = await make_service(postgres.dsn(), max_size=1, min_idle=1)
    await sidecar.until_pinged()

    async def leak(conn: Connection) -> None:
        await conn.execute("BEGIN")
        await conn.execute("SELECT 'leaking' FROM blamed")

    shares = await wait_for(sidecar, leak, ["leaky", *["web"] * 5], enough=2.0)
    assert shares["leaky"] > 0.9
    most = max(statements_of(sidecar), key=lambda each: each.blamed)
    assert most.text.startswith("SELECT $1 FROM blamed")


async def test_who_holds_a_lock_is_charged_for_those_who_wait_for_it(
    postgres: EmbeddedPostgres, make_service: MakeService
) -> None:
    """They have most of the connections; he has one. Until the server has been asked, which is after
    clients have waited for half a second, they are charged."""
    postgres.psql("DROP TABLE IF EXISTS blamed; CREATE TABLE blamed AS SELECT 1 AS id, 0 AS n")
    sidecar = await make_service(postgres.dsn(), max_size=4, min_idle=4)
    await sidecar.until_pinged()

    async def lock(conn: Connection) -> None:
        await conn.execute("BEGIN")
        await conn.execute("UPDATE blamed SET n = -1 WHERE id = 1")

    shares = await wait_for(sidecar, lock, ["locker", *["web"] * 15], enough=110.0)
    assert shares["locker"] > 0.9
    most = max(statements_of(sidecar), key=lambda each: each.blamed)
    assert most.text == "UPDATE blamed SET n = $1 WHERE id = $2"


async def test_waiting_while_the_server_is_away_is_nobodys(
    postgres: EmbeddedPostgres, make_service: MakeService
) -> None:
    """Nobody holds anything: neither an application is charged nor a statement."""
    dsn = postgres.dsn(dbname="not_there_yet")
    sidecar = await make_service(dsn, max_size=2, min_idle=0, acquire_timeout="500ms")
    postgres.psql("CREATE DATABASE not_there_yet")
    try:
        async with await connect(sidecar, "web") as conn:
            await conn.execute("SELECT 1")
            await sidecar.until_whole()
            await asyncio.to_thread(postgres.psql, "DROP DATABASE not_there_yet WITH (FORCE)")
            await sidecar.until(lambda now: now.idle == 0)
            for _ in range(2):
                with pytest.raises(psycopg.Error):
                    await conn.execute("SELECT 1")
    finally:
        postgres.psql("DROP DATABASE IF EXISTS not_there_yet WITH (FORCE)")
    metrics = await settled(sidecar)
    assert by_application(metrics).keys() <= {"(none)", "(pool)"}
