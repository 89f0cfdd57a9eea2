"""The server refuses a login: the client reads it in the server's words, at once, and it is not kept."""

import asyncio
import time

import asyncpg
import psycopg
import pytest

from sidecar.demo.postgres import EmbeddedPostgres
from sidecar.errors import ServerError
from sidecar.pool import health
from tests.sidecar_process import MakeService, Metrics, ServiceHere, come_true

SOON = 1.5
"""Seconds. Less than the pause after so many refusals as the tests have: 2.5 s at least."""


def attempts(metrics: Metrics) -> float:
    return metrics.total("pgsidecar_connection_errors_total", phase="auth")


async def refuse_often(sidecar: ServiceHere, sqlstate: str) -> None:
    """Until the pool on its own would pause for long before it asks again."""
    for _ in range(8):
        with pytest.raises(asyncpg.PostgresError) as caught:
            await asyncpg.connect(sidecar.dsn())
        assert caught.value.sqlstate == sqlstate


@pytest.mark.parametrize("min_idle", [0, 2])
async def test_a_refusal_is_not_remembered(
    postgres: EmbeddedPostgres, make_service: MakeService, min_idle: int
) -> None:
    """The database is there a moment later: so is the login, whatever the pool's own pauses."""
    name = f"refused_{min_idle}"
    sidecar = await make_service(postgres.dsn(database=name), max_size=4, min_idle=min_idle)
    await refuse_often(sidecar, "3D000")
    await asyncio.to_thread(postgres.psql, f"CREATE DATABASE {name}")
    began = time.monotonic()
    client = await asyncpg.connect(sidecar.dsn())
    assert time.monotonic() - began < SOON
    assert await client.fetchval("SELECT current_database()") == name
    await client.close()
    assert (await sidecar.metrics()).is_up


async def test_those_who_log_in_together_share_one_attempt(
    postgres: EmbeddedPostgres, make_service: MakeService
) -> None:
    """A crowd that reconnects is no burden for a server that refuses it."""
    sidecar = await make_service(postgres.dsn(database="no_such"), min_idle=0)
    await refuse_often(sidecar, "3D000")
    before = attempts(await sidecar.metrics())
    opener, deadline = sidecar.pool.opener, time.monotonic() + 5
    logins = [opener.wait_for_parameters(deadline) for _ in range(50)]
    told = await asyncio.gather(*logins, return_exceptions=True)
    assert all(isinstance(error, ServerError) and error.sqlstate == "3D000" for error in told)
    assert attempts(await sidecar.metrics()) == before + 1


async def test_a_server_without_room_says_so_in_the_login(
    postgres: EmbeddedPostgres, make_service: MakeService
) -> None:
    """53300 with the server's message, not after ``login_timeout``; and the next who asks gets in."""
    postgres.psql("CREATE ROLE crowded LOGIN CONNECTION LIMIT 1")
    sidecar = await make_service(postgres.dsn(user="crowded"), min_idle=0)
    async with await psycopg.AsyncConnection.connect(postgres.dsn(user="crowded")):
        began = time.monotonic()
        await refuse_often(sidecar, "53300")
        assert time.monotonic() - began < 5
        with pytest.raises(psycopg.OperationalError, match='too many connections for role "crowd'):
            await psycopg.AsyncConnection.connect(sidecar.dsn())
    there = "SELECT count(*) FROM pg_stat_activity WHERE usename = 'crowded'"
    await come_true(lambda: postgres.psql(there) == "0", "its backend has ended")
    began = time.monotonic()
    client = await asyncpg.connect(sidecar.dsn())
    assert time.monotonic() - began < SOON
    assert await client.fetchval("SELECT current_user") == "crowded"
    await client.close()


async def test_a_pool_whose_user_is_gone_refuses_logins_again(
    postgres: EmbeddedPostgres, make_service: MakeService
) -> None:
    """That it had connections once is no reason to let clients in whom the server would not."""
    postgres.psql("CREATE ROLE leaving LOGIN")
    sidecar = await make_service(postgres.dsn(user="leaving"), max_size=2, min_idle=1)
    client = await asyncpg.connect(sidecar.dsn())
    postgres.psql("ALTER ROLE leaving NOLOGIN")
    postgres.psql(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'leaving'"
    )
    opener = sidecar.pool.opener
    await come_true(lambda: health.is_refusal(opener.last_failure), "the server has refused it")
    with pytest.raises(asyncpg.PostgresError) as caught:
        await asyncpg.connect(sidecar.dsn())
    assert caught.value.sqlstate == "28000"
    postgres.psql("ALTER ROLE leaving LOGIN")
    other = await asyncpg.connect(sidecar.dsn())
    assert await other.fetchval("SELECT current_user") == "leaving"
    await other.close()
    assert await client.fetchval("SELECT 1") == 1  # it was idle all the time
    await client.close()
