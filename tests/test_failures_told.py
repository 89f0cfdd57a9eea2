"""Failures of real clients: who raised them, of which statement, and the words that are kept."""

import asyncio
import os
import signal

import asyncpg
import psycopg
import pytest

from sidecar.demo.postgres import EmbeddedPostgres
from sidecar.observe.failures import FailureEntry
from tests.conftest import MakePostgres
from tests.sidecar_process import MakeService, ServiceHere, come_true

Connection = psycopg.AsyncConnection[tuple[object, ...]]


async def connect(sidecar: ServiceHere, application: str = "web") -> Connection:
    dsn = sidecar.dsn(application_name=application)
    return await psycopg.AsyncConnection.connect(dsn, autocommit=True)


def failures(sidecar: ServiceHere) -> list[FailureEntry]:
    return sidecar.service.recorder.pool("main").failures.entries()


async def only(sidecar: ServiceHere) -> tuple[str, str, str, str]:
    """The one failure there is: origin, SQLSTATE, application, and the text of the statement."""
    (entry,) = await come_true(lambda: failures(sidecar), "a failure")
    text = "" if entry.statement is None else entry.statement.text
    return entry.origin, entry.sqlstate, entry.application, text


async def test_errors_of_the_server(postgres: EmbeddedPostgres, make_service: MakeService) -> None:
    """However often, and with whatever values: one entry for a statement."""
    sidecar = await make_service(postgres.dsn())
    async with await connect(sidecar) as conn:
        for value in ("zebra", "giraffe"):
            with pytest.raises(psycopg.errors.InvalidTextRepresentation):
                await conn.execute(f"SELECT '{value}'::int AS failing")
    (entry,) = failures(sidecar)
    assert await only(sidecar) == ("server", "22P02", "web", "SELECT $1::int AS failing")
    assert (entry.count, entry.message) == (2, "invalid input syntax for type integer: ?")
    assert 0 < entry.first_at <= entry.last_at


@pytest.mark.parametrize("name", ["named", "unnamed"])
async def test_a_statement_that_cannot_be_parsed_is_known(
    postgres: EmbeddedPostgres, make_service: MakeService, name: str
) -> None:
    """In the extended protocol, before anything is executed."""
    sidecar = await make_service(postgres.dsn())
    size = 0 if name == "unnamed" else 100
    conn = await asyncpg.connect(
        sidecar.dsn(application_name="web"), ssl=False, statement_cache_size=size
    )
    with pytest.raises(asyncpg.UndefinedColumnError):
        await conn.fetch("SELECT no_column")
    await conn.close()
    assert await only(sidecar) == ("server", "42703", "web", "SELECT no_column")
    assert failures(sidecar)[0].message == 'column "no_column" does not exist'


@pytest.mark.parametrize("protocol", ["simple", "extended"])
async def test_a_wait_in_vain_has_the_statement_that_waited(
    postgres: EmbeddedPostgres, make_service: MakeService, protocol: str
) -> None:
    sidecar = await make_service(postgres.dsn(), max_size=1, acquire_timeout="200ms")
    async with await connect(sidecar, "holder") as holder, await connect(sidecar) as conn:
        await holder.execute("BEGIN")
        with pytest.raises(psycopg.errors.TooManyConnections):
            await conn.execute("SELECT 4711 AS waiting", prepare=protocol == "extended")
    assert await only(sidecar) == ("sidecar", "53300", "web", "SELECT $1 AS waiting")
    assert failures(sidecar)[0].message.startswith("no connection from pool 'main' in 0.")


async def test_a_timeout_has_the_statement_that_took_too_long(
    postgres: EmbeddedPostgres, make_service: MakeService
) -> None:
    sidecar = await make_service(postgres.dsn(), idle_in_transaction_timeout="200ms")
    async with await connect(sidecar) as conn:
        await conn.execute("BEGIN")
        await conn.execute("SELECT 1 AS last")
        assert await only(sidecar) == ("sidecar", "25P03", "web", "SELECT $1 AS last")
        await conn.close()


async def test_a_connection_lost_in_the_middle_is_the_networks(
    own_postgres: MakePostgres, make_service: MakeService
) -> None:
    """A backend that is killed says nothing."""
    server = own_postgres()
    sidecar = await make_service(server.dsn(), max_size=1, min_idle=1)
    async with await connect(sidecar) as conn:
        cursor = await conn.execute("SELECT pg_backend_pid()")
        row = await cursor.fetchone()
        assert row is not None
        asking = asyncio.create_task(conn.execute("SELECT pg_sleep(20) AS lost"))
        await sidecar.until(lambda now: now.value("pgsidecar_queries_in_flight", pool="main") == 1)
        os.kill(int(str(row[0])), signal.SIGKILL)
        with pytest.raises(psycopg.OperationalError):
            await asking
    assert await only(sidecar) == ("network", "08006", "web", "SELECT pg_sleep($1) AS lost")
