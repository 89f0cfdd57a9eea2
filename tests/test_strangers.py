"""Fifty strangers on five server connections: none ever meets what is another's.

Each client lives the same life twice, step by step: through the sidecar in transaction mode, among 49
others, and on a direct connection to a database of its own kind, where there is nobody else. Whatever it
is answered has to be the same. Its life is made of what session state is made of: settings, temporary
tables, prepared statements by protocol and by SQL, channels, advisory locks, cursors, open
transactions, errors. What keeps a connection is undone after a while, so that all make progress.
"""

import asyncio
import os
import random
from collections.abc import Awaitable, Callable
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sidecar.demo.postgres import EmbeddedPostgres
from tests.sidecar_process import MakeProcess, SidecarProcess

CLIENTS = 50
CONNECTIONS = 5
STEPS = 12
EXAMPLES = int(os.environ.get("PGSIDECAR_TEST_EXAMPLES", "2"))
"""Lives of fifty clients; a life takes some seconds. Set it to 100 after a change that matters."""

Connection = psycopg.AsyncConnection[Any]
Step = Callable[["Client", Connection], Awaitable[object]]

SETTINGS: dict[str, list[str]] = {
    "search_path": ["public", "pg_catalog, public", '"$user", strange'],
    "timezone": ["UTC", "Asia/Tokyo", "America/Lima"],
    "datestyle": ["ISO, DMY", "German", "SQL", "ISO"],
    "intervalstyle": ["iso_8601", "postgres"],
    "extra_float_digits": ["0", "3"],
    "bytea_output": ["hex", "escape"],
    "work_mem": ["1MB", "2MB"],
    "statement_timeout": ["50s", "61s"],
    "lock_timeout": ["33s"],
    "default_transaction_isolation": ["serializable", "read committed"],
    "stranger.name": ["it's me", "nobody \\ else", "ü"],
    "stranger.user": ["1", "2"],
}
SHOWN = "SELECT " + ", ".join(f"coalesce(current_setting('{name}', true), '')" for name in SETTINGS)
SEEN = (
    "SELECT '2020-03-04 05:06:07+00'::timestamptz::text, '1 day 2 hours'::interval::text,"
    " 0.1::float8::text, '\\x00ff'::bytea::text"
)
PRESENT = """
    SELECT (SELECT count(*) FROM pg_class WHERE relnamespace = pg_my_temp_schema() AND relkind = 'r'),
           (SELECT coalesce(array_agg(c ORDER BY c), '{}') FROM pg_listening_channels() AS c),
           (SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()),
           (SELECT count(*) FROM pg_cursors WHERE is_holdable),
           (SELECT count(*) FROM pg_prepared_statements WHERE from_sql), current_user
"""


class Client:
    """One client's life. ``rng`` is asked once for each step, and both lives get the same step."""

    def __init__(self, number: int, rng: random.Random) -> None:
        self.number = number
        self.rng = rng
        self.name = f"stranger_{number}"

    async def live(self, here: Connection, there: Connection) -> None:
        for turn in range(STEPS):
            step = self.rng.choice(STEPS_OF_LIFE)
            seed = self.rng.getrandbits(64)
            answers = []
            for conn in (here, there):
                self.rng.seed(seed)
                answers.append(await step(self, conn))
            assert answers[0] == answers[1], (self.name, turn, step.__name__, answers)
        for look in (SHOWN, SEEN, PRESENT):
            assert await ask(here, look) == await ask(there, look), (self.name, look)

    # -- steps: each returns what the client got to see ------------------------------------------

    async def changes_a_setting(self, conn: Connection) -> object:
        """What is prepared under other settings may mean something else: psycopg prepares it anew."""
        conn._prepared.clear()
        name = self.rng.choice(list(SETTINGS))
        value = self.rng.choice(SETTINGS[name])
        quoted = ".".join(f'"{part}"' for part in name.split("."))
        way = self.rng.randrange(5)
        if way == 0:
            return await ask(conn, "SELECT set_config(%s, %s, false)", name, value)
        if way == 1:
            return await ask(conn, f"RESET {quoted}"), await ask(conn, SHOWN)
        literal = value if name == "search_path" else "'" + value.replace("'", "''") + "'"
        change = f"SET {quoted} TO {literal}"
        if way == 2:
            return await ask(conn, f"BEGIN; {change}; ROLLBACK"), await ask(conn, SHOWN)
        return await ask(conn, change), await ask(conn, SHOWN)

    async def looks_around(self, conn: Connection) -> object:
        return await ask(conn, SHOWN), await ask(conn, SEEN), await ask(conn, PRESENT)

    async def resets_everything(self, conn: Connection) -> object:
        text = self.rng.choice(("DISCARD ALL", "RESET ALL"))
        done = await ask(conn, text)
        if text == "DISCARD ALL":
            await conn.set_autocommit(True)
            conn.prepared_max = (
                conn.prepared_max
            )  # psycopg has not noticed that its statements are gone
            conn._prepared.clear()
        return done, await ask(conn, SHOWN), await ask(conn, PRESENT)

    async def keeps_a_temporary_table(self, conn: Connection) -> object:
        seen = [await ask(conn, "CREATE TEMP TABLE mine (n int)")]
        for n in range(self.rng.randrange(1, 4)):
            seen.append(await ask(conn, "INSERT INTO mine VALUES (%s)", self.number * 100 + n))
            seen.append(await ask(conn, "SELECT n FROM mine ORDER BY n"))
        seen.append(await ask(conn, PRESENT))
        seen.append(await ask(conn, "DROP TABLE mine"))
        seen.append(await ask(conn, "SELECT n FROM mine"))
        return seen

    async def uses_prepared_statements(self, conn: Connection) -> object:
        """psycopg calls them _pg3_0 and so on, in every client: one name, fifty texts."""
        texts = [f"SELECT {self.number} + %s::int", "SELECT 'all of us', %s::int", SEEN]
        self.rng.shuffle(texts)
        seen: list[object] = []
        for text in texts * 2:
            values = (7,) if "%s" in text else ()
            try:
                cursor = await conn.execute(text, values or None, prepare=True)
                seen.append(await cursor.fetchall())
            except psycopg.Error as exc:
                seen.append(exc.sqlstate)
        return seen

    async def prepares_by_sql(self, conn: Connection) -> object:
        return [
            await ask(conn, f"PREPARE stranger AS SELECT {self.number}, $1::int"),
            await ask(conn, "EXECUTE stranger(1)"),
            await ask(conn, "EXECUTE stranger(2)"),
            await ask(conn, self.rng.choice(("DEALLOCATE stranger", "DEALLOCATE ALL"))),
            await ask(conn, "EXECUTE stranger(3)"),
            conn._prepared.clear(),
        ]

    async def listens(self, conn: Connection) -> object:
        texts = (f"LISTEN {self.name}", f"NOTIFY {self.name}, '0'", f"NOTIFY {self.name}, '1'")
        seen = [await ask(conn, text) for text in texts]
        heard = [n.payload async for n in conn.notifies(timeout=20, stop_after=2)]
        seen.append(await ask(conn, self.rng.choice((f"UNLISTEN {self.name}", "UNLISTEN *"))))
        return seen, heard, await ask(conn, PRESENT)

    async def holds_a_lock(self, conn: Connection) -> object:
        key = self.number
        return [
            await ask(conn, f"SELECT pg_advisory_lock({key})"),
            await ask(conn, PRESENT),
            await ask(conn, f"SELECT pg_try_advisory_lock({key})"),
            await ask(conn, f"SELECT pg_advisory_unlock({key})"),
            await ask(conn, "SELECT pg_advisory_unlock_all()"),
            await ask(conn, PRESENT),
        ]

    async def keeps_a_cursor(self, conn: Connection) -> object:
        declare = f"DECLARE mine CURSOR WITH HOLD FOR SELECT {self.number} + generate_series(1, 9)"
        return [
            await ask(conn, f"BEGIN; {declare}; COMMIT"),
            await ask(conn, "FETCH 2 FROM mine"),
            await ask(conn, "FETCH 3 FROM mine"),
            await ask(conn, "CLOSE mine"),
            await ask(conn, "FETCH 1 FROM mine"),
        ]

    async def works_in_a_transaction(self, conn: Connection) -> object:
        seen = [await ask(conn, "BEGIN")]
        seen.append(await ask(conn, "INSERT INTO strange VALUES (%s)", self.number))
        seen.append(await ask(conn, "SAVEPOINT a"))
        seen.append(await ask(conn, self.rng.choice(("SELECT 1", "SELECT 1/0"))))
        seen.append(await ask(conn, "ROLLBACK TO a"))
        seen.append(await ask(conn, "SET LOCAL work_mem = '9MB'"))
        seen.append(await ask(conn, SHOWN))
        seen.append(await ask(conn, self.rng.choice(("COMMIT", "ROLLBACK"))))
        seen.append(await ask(conn, "SELECT count(*) FROM strange WHERE n = %s", self.number))
        return seen

    async def makes_mistakes(self, conn: Connection) -> object:
        wrong = ["SELECT 1/0", "SELEC", "SELECT * FROM nowhere", "SET nothing_like_that = 1"]
        return [await ask(conn, text) for text in self.rng.sample(wrong, 2)]

    async def takes_a_role(self, conn: Connection) -> object:
        seen = [await ask(conn, "SET ROLE pg_monitor"), await ask(conn, "SELECT current_user")]
        return seen, await ask(conn, "RESET ROLE"), await ask(conn, "SELECT current_user")

    async def copies(self, conn: Connection) -> object:
        async with conn.cursor() as cursor:
            text = f"COPY (SELECT {self.number}, generate_series(1, 3)) TO STDOUT"
            async with cursor.copy(text) as copy:
                return [bytes(row) async for row in copy]


STEPS_OF_LIFE: list[Any] = [
    *[Client.changes_a_setting] * 3,
    *[Client.uses_prepared_statements] * 2,
    Client.looks_around,
    Client.resets_everything,
    Client.keeps_a_temporary_table,
    Client.prepares_by_sql,
    Client.listens,
    Client.holds_a_lock,
    Client.keeps_a_cursor,
    Client.works_in_a_transaction,
    Client.makes_mistakes,
    Client.takes_a_role,
    Client.copies,
]


async def ask(conn: Connection, text: str, *values: object) -> object:
    """The rows, the command tag, or the SQLSTATE."""
    try:
        cursor = await conn.execute(text, values or None)
        if cursor.description is None:
            return cursor.statusmessage
        return await cursor.fetchall()
    except psycopg.Error as exc:
        return exc.sqlstate or str(exc)


async def fifty_lives(sidecar: SidecarProcess, postgres: EmbeddedPostgres, seed: int) -> None:
    async def live(number: int) -> None:
        rng = random.Random(seed * CLIENTS + number)
        here = await psycopg.AsyncConnection.connect(
            sidecar.dsn(application_name=f"stranger {number}"), autocommit=True
        )
        there = await psycopg.AsyncConnection.connect(
            postgres.dsn(database="strangers_direct"), autocommit=True
        )
        async with here, there:
            await Client(number, rng).live(here, there)

    async with asyncio.TaskGroup() as group:
        for number in range(CLIENTS):
            group.create_task(live(number))


@pytest.fixture
def sidecar(postgres: EmbeddedPostgres, make_process: MakeProcess) -> SidecarProcess:
    """The two lives need different databases: locks and channels are a database's."""
    for database in ("strangers", "strangers_direct"):
        postgres.psql(f"DROP DATABASE IF EXISTS {database}")
        postgres.psql(f"CREATE DATABASE {database}")
    made = make_process(
        postgres.dsn(database="strangers"),
        max_size=CONNECTIONS,
        max_prepared_statements=10,
        acquire_timeout="50s",
    )
    for database in ("strangers", "strangers_direct"):
        with psycopg.connect(postgres.dsn(database=database), autocommit=True) as conn:
            conn.execute("CREATE TABLE strange (n int)")
    return made


@pytest.mark.timeout(120 + 30 * EXAMPLES)
def test_fifty_strangers_on_five_connections_never_meet(
    postgres: EmbeddedPostgres, sidecar: SidecarProcess
) -> None:
    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow],
    )
    @given(st.integers(0, 2**32))
    def check(seed: int) -> None:
        with psycopg.connect(postgres.dsn(database="strangers"), autocommit=True) as conn:
            conn.execute("TRUNCATE strange")
        with psycopg.connect(postgres.dsn(database="strangers_direct"), autocommit=True) as conn:
            conn.execute("TRUNCATE strange")
        asyncio.run(fifty_lives(sidecar, postgres, seed))

    check()
    now = sidecar.scrape()
    assert now.is_whole
    assert (
        now.value("pgsidecar_pool_connections_used_peak", pool="main", window="1m") <= CONNECTIONS
    )
    assert now.total("pgsidecar_pins_total") > CLIENTS
    assert now.total("pgsidecar_pinned_connections") == 0
    assert now.acquires.get("timeout", 0) == 0
