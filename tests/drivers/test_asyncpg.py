"""asyncpg, with its cache of prepared statements and its pool, as they are."""

import asyncio
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from io import BytesIO
from typing import Any

import asyncpg
import pytest

from tests.drivers.places import SIZE, Address, Place
from tests.sidecar_process import come_true

DRIVER = "asyncpg"
VERSION = asyncpg.__version__
TRIED = (
    "prepared statements with the cache on, its pool, transactions, savepoints, cursors, COPY, executemany, "
    "LISTEN/NOTIFY, cancel by timeout, types and codecs, settings, reconnect"
)

VALUES: tuple[tuple[str, object], ...] = (
    ("int8", -(2**63)),
    ("float8", 1.5e300),
    ("numeric", Decimal("12345678901234567890.0987654321")),
    ("bool", False),
    ("text", "Zürich 北京 🐘"),
    ("bytea", bytes(range(256)) * 100),
    ("timestamptz", datetime(2024, 2, 29, 23, 59, 59, 999999, UTC)),
    ("date", date(9999, 12, 31)),
    ("interval", timedelta(days=-3, seconds=5)),
    ("uuid", uuid.UUID(int=7)),
    ("int4[]", [1, None, 3]),
    ("text[]", ["a,b", '"', None]),
    ("jsonb", '{"a": [1, 2.5, null]}'),
    ("text", None),
)


_opened: list[Any] = []


@pytest.fixture(autouse=True)
async def closed() -> AsyncIterator[None]:
    """What a failed test left open: uvloop does not close before."""
    yield
    for conn in _opened:
        conn.terminate()
    _opened.clear()


async def connect(at: Address, **options: Any) -> Any:
    conn = await asyncpg.connect(at.url, timeout=10, command_timeout=20, **options)
    _opened.append(conn)
    return conn


async def refused(conn: Any, query: str, *parameters: object) -> tuple[object, ...]:
    with pytest.raises(asyncpg.PostgresError) as caught:
        await conn.fetch(query, *parameters)
    told = caught.value
    return (
        *(type(told).__name__, told.sqlstate, told.severity, told.message, told.detail),
        *(told.hint, told.position, told.constraint_name),
    )


async def login(at: Address) -> object:
    """By URL and by keywords, with settings of its own."""
    seen: list[object] = []
    for conn in (
        await connect(at),
        await asyncpg.connect(
            host=at.host,
            port=at.port,
            user=at.user,
            password=at.password,
            database=at.database,
            server_settings={"application_name": "a name", "timezone": "Asia/Tokyo", "jit": "off"},
        ),
    ):
        shown = "SELECT current_user, current_database(), current_setting('timezone'), current_setting('jit')"
        seen.append(tuple(await conn.fetchrow(shown)))
        told = conn.get_settings()
        names = (
            "server_encoding",
            "client_encoding",
            "TimeZone",
            "application_name",
            "is_superuser",
        )
        seen.append([getattr(told, name) for name in names])
        seen.append(conn.get_server_version())
        await conn.close()
    return seen


async def values(at: Address) -> object:
    conn = await connect(at)
    seen = []
    for kind, value in VALUES:
        row = await conn.fetchrow(f"SELECT $1::{kind}, pg_typeof($1)::text", value)
        assert row[0] == value
        seen.append(tuple(row))
    await conn.close()
    return seen


async def types(at: Address) -> object:
    """Own types: asyncpg asks the catalogue for them, and keeps what it learns by their numbers."""
    conn = await connect(at)
    await conn.execute(
        """
        DROP SCHEMA IF EXISTS typed CASCADE;
        CREATE SCHEMA typed;
        CREATE TYPE typed.mood AS ENUM ('good', 'bad');
        CREATE TYPE typed.pair AS (a int, b typed.mood);
        CREATE DOMAIN typed.small AS int CHECK (VALUE < 10);
        """
    )
    row = await conn.fetchrow(
        "SELECT $1::typed.mood, ARRAY[(1, 'bad')::typed.pair], $2::typed.small, int4range(1, 5)",
        "good",
        3,
    )
    seen = [str(row)]
    await conn.set_type_codec("jsonb", encoder=str, decoder=len, schema="pg_catalog")
    seen.append(str(await conn.fetchval("SELECT '{\"a\": 1}'::jsonb")))
    seen.append(str(await refused(conn, "SELECT $1::typed.small", 30)))
    await conn.close()
    return seen


async def transactions(at: Address) -> object:
    seen: list[object] = []
    conn = await connect(at)
    await conn.execute("DROP TABLE IF EXISTS tx; CREATE TABLE tx (id int PRIMARY KEY, note text)")
    async with conn.transaction():
        await conn.execute("INSERT INTO tx VALUES ($1, $2)", 1, "kept")
        with pytest.raises(asyncpg.UniqueViolationError):
            async with conn.transaction():
                await conn.execute("INSERT INTO tx VALUES ($1, $2)", 2, "undone")
                await conn.execute("INSERT INTO tx VALUES ($1, $2)", 1, "doubled")
        await conn.execute("INSERT INTO tx VALUES ($1, $2)", 3, "kept")
    transaction = conn.transaction(isolation="serializable", readonly=True, deferrable=True)
    await transaction.start()
    seen.append(await conn.fetchval("SHOW transaction_isolation"))
    seen.append(await refused(conn, "INSERT INTO tx VALUES (4)"))
    seen.append(await refused(conn, "SELECT 1"))
    await transaction.rollback()
    seen.append([tuple(row) for row in await conn.fetch("SELECT * FROM tx ORDER BY id")])
    assert seen[-1] == [(1, "kept"), (3, "kept")]
    await conn.close()
    return seen


async def errors(at: Address) -> object:
    conn = await connect(at)
    await conn.execute(
        "DROP TABLE IF EXISTS errs; CREATE TABLE errs (id int CONSTRAINT small CHECK (id < 5))"
    )
    seen = [
        await refused(conn, "SELEC 1"),
        await refused(conn, "SELECT * FROM nowhere WHERE a = $1", 1),
        await refused(conn, "INSERT INTO errs VALUES ($1)", 7),
        await refused(conn, "SELECT 1/$1::int", 0),
        await refused(
            conn,
            "DO $$ BEGIN RAISE 'own' USING ERRCODE = 'AB123', HINT = 'h', DETAIL = 'd'; END $$",
        ),
    ]
    assert await conn.fetchval("SELECT 'goes on'") == "goes on"
    await conn.close()
    return seen


async def cursors(at: Address) -> object:
    seen: list[object] = []
    conn = await connect(at)
    async with conn.transaction():
        rows = conn.cursor(
            "SELECT n, n || 'ü' FROM generate_series(1, $1::int) n", 120, prefetch=25
        )
        seen.append([tuple(row) async for row in rows])
        cursor = await conn.cursor("SELECT generate_series(1, 100)")
        await cursor.forward(10)
        seen.append([tuple(row) for row in await cursor.fetch(5)])
        seen.append(tuple(await cursor.fetchrow()))
        statement = await conn.prepare("SELECT $1::int + n FROM generate_series(1, 30) n")
        seen.append([tuple(row) async for row in statement.cursor(100, prefetch=7)])
        other = await statement.cursor(200)
        seen.append([tuple(row) for row in await other.fetch(3)])
    await conn.close()
    return seen


async def copies(at: Address) -> object:
    seen: list[object] = []
    conn = await connect(at)
    await conn.execute(
        "DROP TABLE IF EXISTS copied; CREATE TABLE copied (id int PRIMARY KEY, note text)"
    )
    rows = [(n, f"ü\t{n}") for n in range(2000)]
    seen.append(await conn.copy_records_to_table("copied", records=rows))
    seen.append(
        await conn.copy_to_table("copied", source=BytesIO(b"5000,a\n5001,b\n"), format="csv")
    )
    with pytest.raises(asyncpg.UniqueViolationError):
        await conn.copy_records_to_table("copied", records=rows)
    for format in ("text", "csv", "binary"):
        into = BytesIO()
        seen.append(
            await conn.copy_from_query(
                "SELECT * FROM copied WHERE id > $1 ORDER BY id", 5, output=into, format=format
            )
        )
        seen.append(into.getvalue())
    await conn.close()
    return seen


async def many(at: Address) -> object:
    conn = await connect(at)
    await conn.execute(
        "DROP TABLE IF EXISTS many; CREATE TABLE many (id int PRIMARY KEY, note text)"
    )
    await conn.executemany("INSERT INTO many VALUES ($1, $2)", [(n, f"n{n}") for n in range(1000)])
    with pytest.raises(asyncpg.UniqueViolationError):
        await conn.executemany(
            "INSERT INTO many VALUES ($1, $2)", [(n, None) for n in (2000, 2001, 7)]
        )
    found = await conn.fetchmany(
        "INSERT INTO many VALUES ($1) RETURNING id", [(n,) for n in range(3000, 3010)]
    )
    seen = [tuple(row) for row in found]
    seen.append(tuple(await conn.fetchrow("SELECT count(*), max(note), max(id) FROM many")))
    await conn.close()
    return seen


async def prepared(at: Address) -> object:
    conn = await connect(at)
    statement = await conn.prepare("SELECT $1::int AS a, $2::text AS b")
    seen: list[object] = [str(statement.get_parameters()), str(statement.get_attributes())]
    seen.append(tuple(await statement.fetchrow(1, "ü")))
    seen.append(await statement.explain(1, "ü", analyze=False))
    seen.append([tuple(row) for row in await statement.fetchmany([(1, "a"), (2, "b")])])
    named = await conn.prepare("SELECT 5", name="a name")
    seen.append((await named.fetchval(), named.get_statusmsg()))
    await conn.close()
    return seen


async def changed_tables(at: Address) -> object:
    """asyncpg prepares anew, by itself, where a cached plan must not change its result type."""
    conn, other = await connect(at), await connect(at)
    await other.execute(
        "DROP TABLE IF EXISTS changes_asyncpg; CREATE TABLE changes_asyncpg AS SELECT 1 AS a"
    )
    seen = [tuple(await conn.fetchrow("SELECT * FROM changes_asyncpg"))]
    await other.execute("ALTER TABLE changes_asyncpg ADD b text DEFAULT 'new'")
    seen.append(tuple(await conn.fetchrow("SELECT * FROM changes_asyncpg")))
    async with conn.transaction():
        await conn.fetchrow("SELECT * FROM changes_asyncpg")
    await other.execute("ALTER TABLE changes_asyncpg DROP a")
    seen.append(tuple(await conn.fetchrow("SELECT * FROM changes_asyncpg")))
    await conn.close()
    await other.close()
    return seen


async def settings(at: Address) -> object:
    conn, other = await connect(at), await connect(at)
    names = ("timezone", "search_path", "work_mem")

    async def shown(of: Any) -> list[object]:
        return [await of.fetchval("SELECT current_setting($1)", name) for name in names]

    first = await shown(other)
    seen: list[object] = []
    await conn.execute(
        "SET search_path = pg_catalog; SET timezone = 'Asia/Tokyo'; SET work_mem = '7MB'"
    )
    for _ in range(5):
        seen.append(await shown(conn))
        assert await shown(other) == first
    async with conn.transaction():
        await conn.execute("SET LOCAL work_mem = '8MB'")
        seen.append(await shown(conn))
    seen.append(await shown(conn))
    await conn.reset()
    seen.append(await shown(conn))
    await conn.close()
    await other.close()
    return seen


async def listens(at: Address) -> object:
    conn, other = await connect(at), await connect(at)
    heard: list[tuple[str, str]] = []

    def hear(_conn: object, _pid: int, channel: str, payload: str) -> None:
        heard.append((channel, payload))

    await conn.add_listener("kanal", hear)
    for n in range(3):
        await other.execute("SELECT pg_notify('kanal', $1)", f"payload {n}")
    await come_true(lambda: len(heard) == 3, "three notifications")
    await conn.remove_listener("kanal", hear)
    await other.execute("NOTIFY kanal")
    await conn.fetchval("SELECT 1")
    await conn.close()
    await other.close()
    return heard


async def cancels(at: Address) -> object:
    """asyncpg sends a cancel request when time is up, or the task is cancelled."""
    conn = await connect(at)
    for _ in range(2):
        with pytest.raises(TimeoutError):
            await conn.fetchval("SELECT pg_sleep(30)", timeout=0.2)
    task = asyncio.create_task(conn.fetchval("SELECT pg_sleep(30)"))
    await asyncio.sleep(0.1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    seen = [await conn.fetchval("SELECT $1::int", n) for n in range(5)]
    await conn.close()
    return seen


CHECKS = (
    *(login, values, types, transactions, errors, cursors, copies, many, prepared, changed_tables),
    *(settings, listens, cancels),
)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
async def test_same_as_direct(place: Place, check: Callable[[Address], Awaitable[object]]) -> None:
    expected = await check(place.direct)
    assert await check(place.through) == expected


async def test_prepared_statements_follow_the_client(place: Place) -> None:
    conn = await connect(place.through)
    pids: list[int] = []
    explicit = await conn.prepare("SELECT $1::int * 2")
    for n in place.turns(pids):
        row = await conn.fetchrow("SELECT pg_backend_pid(), $1::int + 1, $2::text", n, f"ü{n}")
        assert tuple(row)[1:] == (n + 1, f"ü{n}")
        assert await explicit.fetchval(n) == 2 * n
        pids.append(row[0])
    await conn.close()


async def test_more_statements_than_asyncpg_keeps(place: Place) -> None:
    """Its cache holds 100: it closes the oldest."""
    conn = await connect(place.through, statement_cache_size=10)
    for turn in range(3):
        for n in range(25):
            assert await conn.fetchval(f"SELECT $1::int + {n}", turn) == turn + n
    await conn.close()


async def test_more_clients_than_connections(place: Place) -> None:
    """All connected, each with the same names for other statements, at work at the same time."""
    async with AsyncExitStack() as stack:
        clients = []
        for _ in range(4 * SIZE):
            clients.append(conn := await connect(place.through))
            stack.push_async_callback(conn.close)

        async def work(client: int, conn: Any) -> None:
            for n in range(20):
                async with conn.transaction():
                    assert await conn.fetchval(f"SELECT $1::int * {client}", n) == n * client

        async with asyncio.TaskGroup() as group:
            for number, conn in enumerate(clients):
                group.create_task(work(number, conn))


async def test_pool_of_asyncpg(place: Place) -> None:
    """It resets each connection after use: UNLISTEN, CLOSE ALL, RESET ALL, advisory unlock."""
    async with asyncpg.create_pool(
        place.through.url, min_size=2, max_size=6, command_timeout=20
    ) as pool:

        async def work(client: int) -> None:
            for n in range(10):
                async with pool.acquire() as conn, conn.transaction():
                    assert await conn.fetchval("SELECT $1::int * $2::int", client, n) == client * n
                assert await pool.fetchval("SELECT $1::text", f"{client} {n}") == f"{client} {n}"

        async with asyncio.TaskGroup() as group:
            for n in range(16):
                group.create_task(work(n))


async def test_client_learns_of_a_lost_connection_and_reconnects(place: Place) -> None:
    async def terminated(at: Address) -> object:
        conn = await connect(at)
        transaction = conn.transaction()
        await transaction.start()
        pid = await conn.fetchval("SELECT pg_backend_pid()")
        killer = await connect(place.direct)
        await killer.fetchval("SELECT pg_terminate_backend($1, 5000)", pid)
        await killer.close()
        with pytest.raises(
            (asyncpg.PostgresConnectionError, asyncpg.AdminShutdownError, asyncpg.InterfaceError)
        ):
            await conn.fetchval("SELECT 1")
        assert conn.is_closed()
        again = await connect(at)
        found = await again.fetchval("SELECT 'again'")
        await again.close()
        return found

    assert await terminated(place.through) == await terminated(place.direct)
