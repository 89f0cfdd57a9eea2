"""psycopg 3: threads and asyncio, prepared statements, pipelines, COPY, cursors, cancel, notify, pool."""

import asyncio
import threading
import uuid
from collections.abc import Callable
from contextlib import AsyncExitStack, ExitStack
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from ipaddress import ip_address
from typing import Any

import psycopg
import psycopg_pool
import pytest
from psycopg import sql
from psycopg.rows import dict_row
from psycopg.types.json import Jsonb
from psycopg.types.range import Range

from tests.drivers.places import SIZE, Address, Place, diagnosis, same, wait_for_query

DRIVER = "psycopg 3"
VERSION = psycopg.__version__
TRIED = (
    "threads, asyncio, prepared statements, pipelines, transactions, savepoints, two-phase commit, COPY, "
    "server-side cursors, cancel, LISTEN/NOTIFY, notices, settings, psycopg_pool, reconnect"
)

Conn = psycopg.Connection[Any]

VALUES: tuple[tuple[str, object], ...] = (
    ("int2", -32768),
    ("int8", 2**63 - 1),
    ("float8", 1e-300),
    ("float8", float("-inf")),
    ("numeric", Decimal("-12345678901234567890.0987654321")),
    ("bool", True),
    ("text", "Zürich 北京 🐘 ' \" \\ \n"),
    ("text", ""),
    ("text", "x" * 100_000),
    ("bytea", bytes(range(256)) * 40),
    ("timestamptz", datetime(2024, 2, 29, 23, 59, 59, 999999, timezone(timedelta(hours=-3)))),
    ("timestamp", datetime(1, 1, 1)),  # noqa: DTZ001  # it has no zone
    ("date", date(9999, 12, 31)),
    ("time", time(12, 30, 0, 1)),
    ("interval", timedelta(days=-3, seconds=5, microseconds=7)),
    ("uuid", uuid.UUID(int=2**127)),
    ("int4[]", [[1, None], [3, 4]]),
    ("text[]", ["a,b", '"', "NULL", None, "{}"]),
    ("jsonb", Jsonb({"a": [1, 2.5, None, "ü"], "b": {}})),
    ("inet", ip_address("2001:db8::1")),
    ("int4range", Range(1, 5)),
    ("text", None),
)

STATEMENT = "SELECT pg_backend_pid(), %s::int + 1, %s::text"


def connect(at: Address, **options: Any) -> Conn:
    return psycopg.connect(at.url, **{"autocommit": True, **options})


def refused(
    conn: Conn, query: str, parameters: list[object] | None = None
) -> tuple[str | None, ...]:
    """How the server refuses the query."""
    with pytest.raises(psycopg.Error) as caught:
        conn.execute(query, parameters)
    return diagnosis(caught.value)


def login(at: Address) -> object:
    """What the server says of itself and of the session, by URL, by keywords and with options."""
    seen: list[Any] = []
    for conn in (
        psycopg.connect(at.url),
        psycopg.connect(**at.words, dbname=at.database, application_name="by keywords"),
        psycopg.connect(at.url, options="-c timezone=Asia/Tokyo -c DateStyle=German"),
        psycopg.connect(at.url, client_encoding="LATIN1"),
    ):
        with conn:
            info = conn.info
            names = (
                *("server_version", "server_encoding", "client_encoding", "application_name"),
                *("is_superuser", "session_authorization", "DateStyle", "IntervalStyle"),
                *("TimeZone", "integer_datetimes", "standard_conforming_strings"),
                *("default_transaction_read_only", "in_hot_standby", "search_path"),
            )
            seen.append([info.parameter_status(name) for name in names])
            seen.append([info.server_version, info.dbname, info.user, info.encoding])
            shown = conn.execute("SELECT current_database(), current_user, session_user, 'ü'")
            seen.append([*shown.fetchall()])
            seen.append([conn.execute(f"SHOW {n}").fetchall() for n in ("timezone", "datestyle")])
    return seen


def values(at: Address) -> object:
    """As parameters and as results, in text and in binary format."""
    seen: list[object] = []
    with connect(at) as conn:
        for binary in (False, True):
            mark = "%b" if binary else "%t"
            for kind, value in VALUES:
                query = sql.SQL(f"SELECT {mark}::{kind}, pg_typeof({mark}::{kind})::text")
                row = conn.execute(query, [value, value], binary=binary).fetchone()
                assert row is not None
                if not isinstance(value, Jsonb):
                    assert row[0] == value, kind
                seen.append(row)
    return seen


def transactions(at: Address) -> object:
    seen: list[object] = []
    with connect(at, autocommit=False) as conn:
        conn.execute("DROP TABLE IF EXISTS tx")
        conn.execute("CREATE TABLE tx (id int PRIMARY KEY, note text)")
        conn.commit()
        with conn.transaction():
            conn.execute("INSERT INTO tx VALUES (1, 'kept')")
            with pytest.raises(psycopg.errors.UniqueViolation), conn.transaction():
                conn.execute("INSERT INTO tx VALUES (2, 'undone')")
                conn.execute("INSERT INTO tx VALUES (1, 'doubled')")
            with conn.transaction(force_rollback=True):
                conn.execute("INSERT INTO tx VALUES (3, 'undone')")
            with conn.transaction("named"):
                conn.execute("INSERT INTO tx VALUES (4, 'kept')")
        conn.execute("INSERT INTO tx VALUES (5, 'undone')")
        conn.rollback()
        seen.append(refused(conn, "INSERT INTO tx VALUES (1, %s)", ["doubled"]))
        seen.append(refused(conn, "SELECT 1"))
        seen.append(conn.info.transaction_status)
        conn.rollback()
        conn.set_isolation_level(psycopg.IsolationLevel.SERIALIZABLE)
        conn.set_read_only(True)
        seen.append(conn.execute("SHOW transaction_isolation").fetchall())
        seen.append(refused(conn, "INSERT INTO tx VALUES (6, 'undone')"))
        conn.rollback()
        conn.set_read_only(None)
        conn.set_isolation_level(None)
        seen.append(conn.execute("SELECT * FROM tx ORDER BY id").fetchall())
    assert seen[-1] == [(1, "kept"), (4, "kept")]
    return seen


def two_phases(at: Address) -> object:
    """Prepared by one connection, committed by another."""
    with connect(at, autocommit=False) as conn, connect(at, autocommit=False) as other:
        conn.execute("DROP TABLE IF EXISTS two_phases")
        conn.execute("CREATE TABLE two_phases (id int)")
        conn.commit()
        for end in ("commit", "rollback"):
            xid = conn.xid(1, f"two phases {end}", "x")
            conn.tpc_begin(xid)
            conn.execute("INSERT INTO two_phases VALUES (1)")
            conn.tpc_prepare()
            conn.tpc_rollback() if end == "rollback" else other.tpc_commit(xid)
        return conn.execute("SELECT * FROM two_phases").fetchall()


def errors(at: Address) -> object:
    with connect(at) as conn:
        conn.execute("DROP TABLE IF EXISTS errs")
        conn.execute("CREATE TABLE errs (id int CONSTRAINT small CHECK (id < 5))")
        seen = [
            refused(conn, "SELEC 1"),
            refused(conn, "SELECT * FROM nowhere WHERE a = %s", [1]),
            refused(conn, "INSERT INTO errs VALUES (%s)", [7]),
            refused(conn, "SELECT 1/%s::int", [0]),
            refused(
                conn,
                "DO $$ BEGIN RAISE 'own' USING ERRCODE = 'AB123', HINT = 'h', DETAIL = 'd'; END $$",
            ),
            refused(conn, "SELECT 1; SELECT 1/0; SELECT 2"),
            refused(conn, "SET timezone = 'nowhere'"),
            refused(conn, "SET nonsense = 1"),
            conn.execute("SELECT 'goes on'").fetchall(),
        ]
    return seen


def notices(at: Address) -> object:
    heard = []
    with connect(at) as conn:
        conn.add_notice_handler(lambda told: heard.append((told.severity, told.message_primary)))
        conn.execute("DO $$ BEGIN RAISE NOTICE 'a %', 'ü'; RAISE WARNING 'b'; END $$")
        conn.execute("DROP TABLE IF EXISTS nowhere")
    assert len(heard) == 3
    return heard


def several(at: Address) -> object:
    """Several statements in one query; executemany with results."""
    seen: list[object] = []
    with connect(at) as conn, conn.cursor(row_factory=dict_row) as cursor:
        cursor.execute(
            "SELECT 1 AS a; SELECT 'two' AS b, 2 AS c; SET timezone = 'Asia/Tokyo'; SHOW timezone"
        )
        while True:
            seen.append((cursor.statusmessage, cursor.fetchall() if cursor.description else None))
            if not cursor.nextset():
                break
        cursor.execute("DROP TABLE IF EXISTS many")
        cursor.execute("CREATE TABLE many (id int, note text)")
        rows = [(n, f"n{n}") for n in range(500)]
        cursor.executemany(
            "INSERT INTO many VALUES (%s, %s) RETURNING id * 2 AS d", rows, returning=True
        )
        seen.append([each.fetchall() for each in cursor.results()])
        seen.append(cursor.execute("SELECT count(*), max(note) FROM many").fetchall())
    return seen


def copies(at: Address) -> object:
    seen: list[object] = []
    with connect(at) as conn, conn.cursor() as cursor:
        cursor.execute("DROP TABLE IF EXISTS copied")
        cursor.execute("CREATE TABLE copied (id int PRIMARY KEY, note text, at timestamptz)")
        rows = [
            (n, f"ü\t{n}\n", datetime(2024, 1, 1, tzinfo=UTC) + timedelta(n)) for n in range(3000)
        ]
        with cursor.copy("COPY copied FROM STDIN") as copy:
            for row in rows[:1500]:
                copy.write_row(row)
        with cursor.copy("COPY copied FROM STDIN (FORMAT BINARY)") as copy:
            copy.set_types(["int4", "text", "timestamptz"])
            for row in rows[1500:]:
                copy.write_row(row)
        seen.append(cursor.statusmessage)
        with pytest.raises(ZeroDivisionError), cursor.copy("COPY copied FROM STDIN") as copy:
            copy.write_row((-1, "the client gives up", None))
            raise ZeroDivisionError
        with (
            pytest.raises(psycopg.errors.UniqueViolation),
            cursor.copy("COPY copied FROM STDIN") as copy,
        ):
            for n in range(2000, 4000):
                copy.write_row((n, "the server gives up", None))
        with cursor.copy("COPY (SELECT * FROM copied ORDER BY id) TO STDOUT") as copy:
            copy.set_types(["int4", "text", "timestamptz"])
            seen.append([*copy.rows()])
        with cursor.copy(
            "COPY (SELECT * FROM copied ORDER BY id) TO STDOUT (FORMAT BINARY)"
        ) as copy:
            seen.append(b"".join(bytes(part) for part in copy))
        with (
            pytest.raises(ZeroDivisionError),
            cursor.copy("COPY (SELECT * FROM generate_series(1, 1000000)) TO STDOUT") as copy,
        ):
            seen.append(bytes(copy.read()))
            raise ZeroDivisionError  # psycopg cancels it
        seen.append(cursor.execute("SELECT count(*) FROM copied").fetchall())
    assert [row[:2] for row in seen[1]] == [row[:2] for row in rows]  # type: ignore[attr-defined]  # they are rows
    return seen


def cursors(at: Address) -> object:
    seen: list[object] = []
    query = "SELECT n, 'ü' || n FROM generate_series(1, %s) n"
    with connect(at, autocommit=False) as conn:
        with conn.cursor("plain") as cursor:
            cursor.itersize = 7
            cursor.execute(query, [50])
            seen.append([*cursor])
        with conn.cursor("scrolls", scrollable=True) as cursor:
            cursor.execute(query, [50], binary=True)
            cursor.scroll(40, mode="absolute")
            seen.append(cursor.fetchmany(3))
            cursor.scroll(-20)
            seen.append(cursor.fetchone())
        with conn.cursor("holds", withhold=True) as cursor:
            cursor.execute(query, [20])
            seen.append(cursor.fetchmany(5))
            conn.commit()
            seen.append(cursor.fetchall())
        conn.commit()
        with (
            psycopg.ServerCursor(conn, "fails") as cursor,
            pytest.raises(psycopg.errors.DivisionByZero),
        ):
            cursor.execute("SELECT 1 / (3 - n) FROM generate_series(1, 5) n")
            cursor.fetchall()
        conn.rollback()
        with conn.cursor() as cursor:
            seen.append(list(cursor.stream(query, [30])))
            seen.append(list(cursor.stream(query, [30], size=4)))
    return seen


def pipelines(at: Address) -> object:
    seen: list[object] = []
    with connect(at) as conn:
        conn.execute("DROP TABLE IF EXISTS piped")
        conn.execute("CREATE TABLE piped (id int PRIMARY KEY)")
        with conn.pipeline() as pipeline:
            held = [conn.execute("SELECT %s::int * 2", [n]) for n in range(100)]
            for n in range(20):
                conn.execute("INSERT INTO piped VALUES (%s)", [n])
            pipeline.sync()
            with conn.transaction():
                conn.execute("INSERT INTO piped VALUES (100)")
            seen.append([cursor.fetchone() for cursor in held])
        with pytest.raises(psycopg.errors.UniqueViolation), conn.pipeline() as pipeline:
            conn.execute("INSERT INTO piped VALUES (200)")
            conn.execute("INSERT INTO piped VALUES (1)")
            conn.execute("INSERT INTO piped VALUES (201)")
            pipeline.sync()
        with conn.pipeline() as pipeline:
            conn.execute("SELECT 1/0")
            with pytest.raises(psycopg.errors.DivisionByZero):
                pipeline.sync()
            skipped = conn.execute("SELECT 'after'")
            pipeline.sync()
            seen.append(skipped.fetchall())
        with conn.cursor() as cursor:
            cursor.executemany("INSERT INTO piped VALUES (%s)", [(n,) for n in range(300, 400)])
        seen.append(conn.execute("SELECT id FROM piped ORDER BY id").fetchall())
    return seen


def settings(at: Address) -> object:
    """Each is there in later transactions, until it is reset."""
    seen: list[object] = []

    def shown(conn: Conn) -> list[object]:
        names = ("timezone", "datestyle", "search_path", "statement_timeout", "work_mem", "my.own")
        return [conn.execute("SELECT current_setting(%s, true)", [n]).fetchone() for n in names]

    with connect(at) as conn, connect(at) as other:
        first = shown(conn)
        conn.execute("CREATE SCHEMA IF NOT EXISTS apart")
        conn.execute("CREATE TABLE IF NOT EXISTS apart.there (id int)")
        conn.execute("SET search_path = apart, public")
        conn.execute("SET timezone = 'Asia/Tokyo'")
        conn.execute("SET my.own = 'ü'")
        conn.execute("SELECT set_config('work_mem', '7MB', false)")
        seen.append(conn.execute("SELECT count(*) FROM there").fetchall())
        for _ in range(5):
            seen.append(shown(conn))
            assert shown(other) == first
        with conn.transaction():
            conn.execute("SET LOCAL work_mem = '8MB'")
            conn.execute("SET statement_timeout = '1h'")
            seen.append(shown(conn))
        seen.append(shown(conn))
        with conn.transaction(force_rollback=True):
            conn.execute("SET timezone = 'Europe/Paris'")
            conn.execute("SET search_path = public")
        seen.append(shown(conn))
        conn.execute("RESET work_mem")
        seen.append(shown(conn))
        conn.execute("RESET ALL")
        seen.append(shown(conn)[:5])
        conn.execute("DISCARD ALL")
        seen.append(shown(conn)[:5])
    return seen


def temporary(at: Address) -> object:
    """Temporary tables and SQL PREPARE: of this client alone, in all its transactions."""
    with connect(at) as conn, connect(at) as other:
        conn.execute("CREATE TEMP TABLE mine (id int)")
        conn.execute("PREPARE plan AS SELECT $1::int * 3")
        for n in range(5):
            conn.execute("INSERT INTO mine VALUES (%s)", [n])
        seen: list[object] = [conn.execute("SELECT * FROM mine").fetchall()]
        seen.append(conn.execute("EXECUTE plan (14)").fetchall())
        seen.append(refused(other, "SELECT * FROM mine"))
        seen.append(refused(other, "EXECUTE plan (14)"))
        conn.execute("DEALLOCATE plan")
        seen.append(refused(conn, "EXECUTE plan (14)"))
        conn.execute("DROP TABLE mine")
        seen.append(refused(conn, "SELECT * FROM mine"))
    return seen


def changed_tables(at: Address) -> object:
    """A prepared statement whose result would change its columns fails, and says so."""
    with connect(at) as conn, connect(at) as other:
        other.execute("DROP TABLE IF EXISTS changes_psycopg")
        other.execute("CREATE TABLE changes_psycopg AS SELECT 1 AS a")
        for _ in range(3):
            assert conn.execute("SELECT * FROM changes_psycopg", prepare=True).fetchall() == [(1,)]
        other.execute("ALTER TABLE changes_psycopg ADD b text")
        anew = other.execute("SELECT * FROM changes_psycopg", prepare=True).fetchall()
        return anew, refused_prepared(conn, "SELECT * FROM changes_psycopg")


def refused_prepared(conn: Conn, query: str) -> tuple[str, str | None, str | None]:
    with pytest.raises(psycopg.Error) as caught:
        conn.execute(query, prepare=True)
    return (type(caught.value).__name__, caught.value.sqlstate, caught.value.diag.message_primary)


def listens(at: Address) -> object:
    """Between two clients, with a payload, until it unlistens."""
    heard = []
    with connect(at) as conn, connect(at) as other:
        conn.execute('LISTEN "Kanal ü"')
        for n in range(3):
            other.execute("SELECT pg_notify('Kanal ü', %s)", [f"payload {n}"])
        heard += [(n.channel, n.payload) for n in conn.notifies(timeout=5, stop_after=3)]
        conn.execute("NOTIFY \"Kanal ü\", 'own'")
        heard += [(n.channel, n.payload) for n in conn.notifies(timeout=5, stop_after=1)]
        conn.execute("UNLISTEN *")
        other.execute('NOTIFY "Kanal ü"')
        heard += [(n.channel, n.payload) for n in conn.notifies(timeout=0.1)]
    assert len(heard) == 4
    return heard


CHECKS = (
    *(
        login,
        values,
        transactions,
        two_phases,
        errors,
        notices,
        several,
        copies,
        cursors,
        pipelines,
    ),
    *(settings, temporary, changed_tables, listens),
)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_same_as_direct(place: Place, check: Callable[[Address], object]) -> None:
    same(place, check)


def test_prepared_statements_follow_the_client(place: Place) -> None:
    """Prepared on one server connection, executed on all: psycopg prepares at the 5th time."""
    with connect(place.through) as conn:
        pids: list[int] = []
        for n in place.turns(pids):
            row = conn.execute(STATEMENT, [n, f"ü{n}"]).fetchone()
            assert row is not None
            assert row[1:] == (n + 1, f"ü{n}")
            pids.append(row[0])


def test_more_statements_than_psycopg_keeps(place: Place) -> None:
    """It deallocates the oldest beyond ``prepared_max``, and all of them after a failed rollback."""
    with connect(place.through, prepare_threshold=0) as conn:
        conn.prepared_max = 10
        for turn in range(3):
            for n in range(25):
                found = conn.execute(f"SELECT %s::int + {n}", [turn]).fetchone()
                assert found == (turn + n,)
        conn.execute("DEALLOCATE ALL")
        conn.execute("DISCARD ALL")
    with connect(place.through, prepare_threshold=0) as conn:
        assert conn.execute("SELECT %s::int", [7]).fetchone() == (7,)


def test_more_clients_than_connections(place: Place) -> None:
    """All connected, none of them keeps a connection that another needs."""
    with ExitStack() as stack:
        clients = [
            stack.enter_context(connect(place.through, prepare_threshold=0))
            for _ in range(3 * SIZE)
        ]
        for turn in range(5):
            for n, conn in enumerate(clients):
                with conn.transaction():
                    found = conn.execute(f"SELECT %s::int * {n}", [turn]).fetchone()
                    assert found == (turn * n,)


def test_clients_at_the_same_time(place: Place) -> None:
    """asyncio: 16 clients transfer money, with statements of their own; none is lost."""

    async def transfer(client: int) -> list[int]:
        pids = []
        conn: psycopg.AsyncConnection[Any]
        async with await psycopg.AsyncConnection.connect(
            place.through.url, prepare_threshold=1
        ) as conn:
            for n in range(20):
                async with conn.transaction():
                    await conn.execute(
                        "UPDATE money SET sum = sum - %s WHERE id = %s", [n, client % 5]
                    )
                    other = (client + n) % 5 + 5
                    await conn.execute("UPDATE money SET sum = sum + %s WHERE id = %s", [n, other])
                    row = await (await conn.execute("SELECT pg_backend_pid()")).fetchone()
                    assert row is not None
                    pids.append(row[0])
        return pids

    async def everybody() -> list[list[int]]:
        return await asyncio.gather(*(transfer(n) for n in range(16)))

    with connect(place.direct) as conn:
        conn.execute("DROP TABLE IF EXISTS money")
        conn.execute("CREATE TABLE money AS SELECT id, 0 AS sum FROM generate_series(0, 9) id")
        backends = {pid for pids in asyncio.run(everybody()) for pid in pids}
        assert len(backends) == SIZE if place.is_shared else len(backends) == 16
        sums = conn.execute("SELECT sum(sum), sum(sum) FILTER (WHERE id > 4) FROM money").fetchone()
    assert sums == (0, 16 * sum(range(20)))


async def test_asyncio_does_all_of_it(place: Place) -> None:
    """Pipelines, COPY, a server-side cursor, cancelling the task and notifications."""
    async with AsyncExitStack() as stack:
        conns = [
            await psycopg.AsyncConnection.connect(place.through.url, autocommit=True)
            for _ in range(2)
        ]
        for each in conns:
            await stack.enter_async_context(each)
        conn, other = conns
        async with conn.pipeline():
            held = [await conn.execute("SELECT %s::int", [n]) for n in range(50)]
            assert [await cursor.fetchone() for cursor in held] == [(n,) for n in range(50)]
        async with (
            conn.cursor() as cursor,
            cursor.copy("COPY (SELECT generate_series(1, 500)) TO STDOUT") as copy,
        ):
            copy.set_types(["int4"])
            assert [row async for row in copy.rows()] == [(n,) for n in range(1, 501)]
        async with conn.transaction(), conn.cursor("named") as named:
            named.itersize = 9
            await named.execute("SELECT generate_series(1, 50)")
            assert len([row async for row in named]) == 50
        with pytest.raises(asyncio.TimeoutError):
            async with asyncio.timeout(0.2):
                await conn.execute("SELECT pg_sleep(30)")
        assert await (await conn.execute("SELECT 'goes on'")).fetchone() == ("goes on",)
        await conn.execute("LISTEN async")
        await other.execute("NOTIFY async, 'x'")
        assert [n.payload async for n in conn.notifies(timeout=5, stop_after=1)] == ["x"]


@pytest.mark.parametrize("way", ["cancel", "cancel_safe"])
def test_cancel(place: Place, way: str) -> None:
    """Amid a query: it is cancelled, the neighbours' are not, and the client goes on."""
    with connect(place.through) as conn:

        def cancel() -> None:
            wait_for_query(place, "pg_sleep(31)")
            getattr(conn, way)()

        thread = threading.Thread(target=cancel)
        thread.start()
        with pytest.raises(psycopg.errors.QueryCanceled, match="due to user request"):
            conn.execute("SELECT pg_sleep(31)")
        thread.join()
        for n in range(10):
            assert conn.execute("SELECT %s::int", [n]).fetchone() == (n,)


def test_pool_of_psycopg(place: Place) -> None:
    """A pool before the pool: checks, resets, and more threads than connections of either."""
    with psycopg_pool.ConnectionPool(
        place.through.url,
        min_size=2,
        max_size=6,
        check=psycopg_pool.ConnectionPool.check_connection,
        open=True,
    ) as pool:
        pool.wait(10)
        found = []

        def work(client: int) -> None:
            for n in range(5):
                with pool.connection() as conn:
                    row = conn.execute("SELECT %s::int * %s", [client, n]).fetchone()
                    found.append(row == (client * n,))

        threads = [threading.Thread(target=work, args=[n]) for n in range(10)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == [True] * 50


def test_client_learns_of_a_lost_connection_and_reconnects(place: Place) -> None:
    """Its backend is terminated amid a transaction: what it is told is what it is told directly."""

    def terminated(at: Address) -> object:
        conn = psycopg.connect(at.url)
        row = conn.execute("SELECT pg_backend_pid()").fetchone()
        assert row is not None
        with connect(place.direct) as killer:
            killer.execute("SELECT pg_terminate_backend(%s, 5000)", [row[0]])
        with pytest.raises(psycopg.OperationalError) as caught:
            conn.execute("SELECT 1")
        assert conn.broken
        conn.close()
        with connect(at) as again:
            return caught.value.sqlstate, again.execute("SELECT 'again'").fetchone()

    same(place, terminated)
