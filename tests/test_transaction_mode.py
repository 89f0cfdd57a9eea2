"""What transaction mode must carry over, and must not: statements, settings, session state, cancels.

Few connections and many clients, so that each keeps getting connections that others have used.
"""

import asyncio
from contextlib import AsyncExitStack
from typing import Any

import asyncpg
import psycopg
import pytest

from sidecar.demo.postgres import EmbeddedPostgres
from tests.sidecar_process import MakeService, ServiceHere


async def connect(sidecar: ServiceHere, **parameters: str) -> psycopg.AsyncConnection[Any]:
    return await psycopg.AsyncConnection.connect(sidecar.dsn(**parameters), autocommit=True)


async def one(conn: psycopg.AsyncConnection[Any], query: str) -> Any:
    row = await (await conn.execute(query)).fetchone()
    assert row is not None
    return row[0]


# -- prepared statements ---------------------------------------------------------------------------


async def test_statements_of_many_clients_are_found_on_few_connections(
    postgres: EmbeddedPostgres, make_service: MakeService
) -> None:
    """Each client's name ``__asyncpg_stmt_1__`` is another text; all run on two connections."""
    sidecar = await make_service(postgres.dsn(), max_size=2)
    async with AsyncExitStack() as stack:
        clients = []
        for _ in range(12):
            conn = await asyncpg.connect(sidecar.dsn())
            stack.push_async_callback(conn.close)
            clients.append(conn)
        statements = [await c.prepare(f"SELECT $1::int + {n}") for n, c in enumerate(clients)]
        for turn in range(20):
            answers = await asyncio.gather(*(s.fetchval(turn) for s in statements))
            assert answers == [turn + n for n in range(12)]
    metrics = await sidecar.until_whole()
    assert metrics.errors == {}


async def test_equal_statements_are_prepared_once_on_a_connection(
    postgres: EmbeddedPostgres, make_service: MakeService
) -> None:
    sidecar = await make_service(postgres.dsn(), max_size=1)
    async with AsyncExitStack() as stack:
        for _ in range(5):
            conn = await asyncpg.connect(sidecar.dsn())
            stack.push_async_callback(conn.close)
            statement = await conn.prepare("SELECT $1::int * 2")
            assert await statement.fetchval(21) == 42
        look = await asyncpg.connect(sidecar.dsn(), statement_cache_size=0)
        stack.push_async_callback(look.close)
        count = await look.fetchval(
            "SELECT count(*) FROM pg_prepared_statements WHERE statement = 'SELECT $1::int * 2'"
        )
        assert count == 1


async def test_a_connection_keeps_no_more_statements_than_allowed(
    postgres: EmbeddedPostgres, make_service: MakeService
) -> None:
    """The least recently used one makes room, and is prepared again when it is wanted."""
    sidecar = await make_service(postgres.dsn(), max_size=1, max_prepared_statements=3)
    conn = await asyncpg.connect(sidecar.dsn())
    try:
        statements = [await conn.prepare(f"SELECT {n} + $1::int") for n in range(8)]
        for turn in range(3):
            for n, statement in enumerate(statements):
                assert await statement.fetchval(turn) == n + turn
        kept = await conn.fetchval("SELECT count(*) FROM pg_prepared_statements")
        assert kept <= 3
    finally:
        await conn.close()
    assert (await sidecar.until_whole()).errors == {}


async def test_statements_survive_deallocate_all_of_another_client(
    postgres: EmbeddedPostgres, make_service: MakeService
) -> None:
    sidecar = await make_service(postgres.dsn(), max_size=1)
    keeps = await asyncpg.connect(sidecar.dsn())
    drops = await asyncpg.connect(sidecar.dsn())
    try:
        statement = await keeps.prepare("SELECT $1::text")
        for command in ("DEALLOCATE ALL", "DISCARD ALL"):
            await drops.execute(command)
            assert await statement.fetchval(command) == command
    finally:
        await keeps.close()
        await drops.close()


async def test_a_client_that_only_prepares_keeps_no_connection(
    postgres: EmbeddedPostgres, make_service: MakeService
) -> None:
    """asyncpg's ``prepare`` ends in Flush, not Sync: on its own it would hold the lease for ever."""
    sidecar = await make_service(postgres.dsn(), max_size=1)
    one_client = await asyncpg.connect(sidecar.dsn())
    other = await asyncpg.connect(sidecar.dsn())
    try:
        for n in range(3):
            first = await one_client.prepare(f"SELECT {n}, $1::int")
            second = await other.prepare(f"SELECT {n}, $1::text")
            await sidecar.until(lambda now: now.used == 0)
            assert tuple(await first.fetchrow(n)) == (n, n)
            assert tuple(await second.fetchrow("x")) == (n, "x")
        for client in (one_client, other):
            with pytest.raises(asyncpg.PostgresSyntaxError):
                await client.prepare("SELECT nothing FROM FROM")
            assert await client.fetchval("SELECT 7") == 7
        async with other.transaction():
            inside = await other.prepare("SELECT 1 + $1::int")
            assert (await sidecar.metrics()).used == 1
            assert await inside.fetchval(1) == 2
    finally:
        await one_client.close()
        await other.close()
    await sidecar.until_whole()


# -- session state ---------------------------------------------------------------------------------

LEFT_BEHIND = [
    ("SET statement_timeout = '77s'", "SHOW statement_timeout", "0"),
    (
        "CREATE TEMP TABLE left_behind (n int)",
        "SELECT coalesce(to_regclass('pg_temp.left_behind')::text, 'none')",
        "none",
    ),
    ("LISTEN left_behind", "SELECT count(*)::text FROM pg_listening_channels()", "0"),
    (
        "SELECT pg_advisory_lock(4711)",
        "SELECT count(*)::text FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()",
        "0",
    ),
    (
        "PREPARE left_behind AS SELECT 1",
        "SELECT count(*)::text FROM pg_prepared_statements WHERE name = 'left_behind'",
        "0",
    ),
    (
        "BEGIN; DECLARE left_behind CURSOR WITH HOLD FOR SELECT 1; COMMIT",
        "SELECT count(*)::text FROM pg_cursors WHERE name = 'left_behind'",
        "0",
    ),
    ("SELECT set_config('work_mem', '7MB', false)", "SHOW work_mem", "4MB"),
    ("SET ROLE pg_monitor", "SELECT current_user::text", "postgres"),
]


@pytest.mark.parametrize(
    ("leave", "look", "clean"), LEFT_BEHIND, ids=[row[0] for row in LEFT_BEHIND]
)
async def test_session_state_stays_with_its_client_and_is_gone_after_it(
    postgres: EmbeddedPostgres, make_service: MakeService, leave: str, look: str, clean: str
) -> None:
    """The client keeps its connection, and others get another; when it leaves, it is reset."""
    sidecar = await make_service(postgres.dsn(), max_size=2, min_idle=1)
    other = await connect(sidecar)
    leaves = await connect(sidecar)
    try:
        await leaves.execute(leave)
        backend = await one(leaves, "SELECT pg_backend_pid()")
        for _ in range(3):
            assert str(await one(other, look)) == clean
            assert await one(leaves, "SELECT pg_backend_pid()") == backend
            assert str(await one(leaves, look)) != clean
        await leaves.close()
        await sidecar.until_whole()
        pids = set()
        async with AsyncExitStack() as stack:  # hold both connections at once, to see both
            for _ in range(2):
                conn = await connect(sidecar)
                stack.push_async_callback(conn.close)
                await conn.execute("BEGIN")
                pids.add(await one(conn, "SELECT pg_backend_pid()"))
                assert str(await one(conn, look)) == clean
                stack.push_async_callback(conn.rollback)
        assert backend in pids, "the connection was meant to be reset, not closed"
    finally:
        await leaves.close()
        await other.close()


async def test_session_mode_resets_between_clients(
    postgres: EmbeddedPostgres, make_service: MakeService
) -> None:
    sidecar = await make_service(postgres.dsn(), max_size=1, mode="session")
    first = await connect(sidecar)
    backend = await one(first, "SELECT pg_backend_pid()")
    for leave, look, clean in LEFT_BEHIND[:4]:
        await first.execute(leave)
        assert str(await one(first, look)) != clean
    await first.close()
    async with await connect(sidecar) as second:
        assert await one(second, "SELECT pg_backend_pid()") == backend
        for _, look, clean in LEFT_BEHIND[:4]:
            assert str(await one(second, look)) == clean


async def test_settings_follow_their_client_from_connection_to_connection(
    postgres: EmbeddedPostgres, make_service: MakeService
) -> None:
    """Startup parameters, and reported settings that were SET later, on whichever connection."""
    sidecar = await make_service(postgres.dsn(), max_size=2)
    zones = ["UTC", "Asia/Tokyo", "America/New_York", "Europe/Berlin", "Asia/Kolkata"]
    async with AsyncExitStack() as stack:
        clients = []
        for n, zone in enumerate(zones):
            options = f"-c search_path=schema_{n} -c extra_float_digits={n - 2}"
            conn = await connect(sidecar, application_name=f"app-{n}", options=options)
            stack.push_async_callback(conn.close)
            await conn.execute(f"SET TIME ZONE '{zone}'")
            clients.append(conn)

        async def look(n: int) -> None:
            conn = clients[n]
            async with conn.transaction():
                assert await one(conn, "SHOW application_name") == f"app-{n}"
                assert await one(conn, "SHOW timezone") == zones[n]
                assert await one(conn, "SHOW search_path") == f"schema_{n}"
                assert await one(conn, "SHOW extra_float_digits") == str(n - 2)
            assert conn.info.parameter_status("TimeZone") == zones[n]

        for _ in range(10):
            await asyncio.gather(*map(look, range(len(zones))))
    assert (await sidecar.until_whole()).errors == {}


async def test_a_refused_startup_parameter_harms_its_own_client_only(
    postgres: EmbeddedPostgres, make_service: MakeService
) -> None:
    sidecar = await make_service(postgres.dsn(), max_size=1)
    async with await connect(sidecar) as good:
        with pytest.raises(psycopg.OperationalError, match="TimeZone"):
            await connect(sidecar, options="-c TimeZone=Nowhere/Never")
        assert await one(good, "SELECT 1") == 1
    await sidecar.until_whole(idle=1)


# -- cancel ----------------------------------------------------------------------------------------


async def test_a_storm_of_cancels_hits_nobody_else(
    postgres: EmbeddedPostgres, make_service: MakeService
) -> None:
    """Four clients cancel what they run, at any moment; four others share the connections."""
    sidecar = await make_service(postgres.dsn(), max_size=3)
    stop = asyncio.Event()
    hits = 0

    async def bystander() -> int:
        done = 0
        async with await connect(sidecar) as conn:
            while not stop.is_set():
                await conn.execute("SELECT pg_sleep(0.0005)")
                done += 1
        return done

    async def cancelling(delay: float) -> None:
        nonlocal hits
        async with await connect(sidecar) as conn:
            for _ in range(60):
                running = asyncio.create_task(conn.execute("SELECT pg_sleep(0.002)"))
                await asyncio.sleep(delay)
                await conn.cancel_safe()
                try:
                    await running
                except psycopg.errors.QueryCanceled:
                    hits += 1

    bystanders = [asyncio.create_task(bystander()) for _ in range(4)]
    await asyncio.gather(*map(cancelling, (0.0, 0.001, 0.002, 0.003)))
    stop.set()
    done = await asyncio.gather(*bystanders)  # raises if one of theirs was cancelled
    assert hits, "no cancel came in time: the test shows nothing"
    assert all(done)
    await sidecar.until_whole()
