"""psycopg2: simple queries, large objects by FunctionCall, its own way to wait for notifications."""

import importlib.metadata
import select
import threading
from collections.abc import Callable
from contextlib import closing
from io import StringIO
from typing import Any

import psycopg2
import psycopg2.extensions
import psycopg2.extras
import psycopg2.pool
import pytest

from tests.drivers.places import SIZE, Address, Place, diagnosis, same, wait_for_query

DRIVER = "psycopg2"
VERSION = importlib.metadata.version("psycopg2-binary")
TRIED = (
    "transactions, savepoints, autocommit, two-phase commit, COPY, named cursors, large objects, "
    "LISTEN/NOTIFY, notices, cancel, its pool, settings, reconnect"
)


def connect(at: Address, autocommit: bool = True, **options: Any) -> Any:
    conn = psycopg2.connect(at.url, **options)
    conn.autocommit = autocommit
    return closing(conn)


def rows(conn: Any, query: str, parameters: Any = None) -> list[Any]:
    with conn.cursor() as cursor:
        cursor.execute(query, parameters)
        return list(cursor.fetchall()) if cursor.description else [cursor.statusmessage]


def refused(conn: Any, query: str, parameters: Any = None) -> tuple[Any, ...]:
    with pytest.raises(psycopg2.Error) as caught:
        rows(conn, query, parameters)
    return diagnosis(caught.value)


def login(at: Address) -> object:
    seen: list[object] = []
    for conn in (
        psycopg2.connect(at.url),
        psycopg2.connect(**at.words, dbname=at.database, application_name="by keywords"),
        psycopg2.connect(at.url, options="-c timezone=Asia/Tokyo -c work_mem=7MB"),
    ):
        names = (
            "server_version",
            "client_encoding",
            "TimeZone",
            "application_name",
            "is_superuser",
        )
        seen.append([conn.get_parameter_status(name) for name in names])
        seen.append([conn.server_version, conn.encoding, conn.info.dbname])
        seen.append(
            [rows(conn, f"SHOW {name}") for name in ("timezone", "work_mem", "application_name")]
        )
        conn.set_client_encoding("LATIN1")
        seen.append(rows(conn, "SELECT 'ü', current_setting('client_encoding')"))
        conn.close()
    return seen


def values(at: Address) -> object:
    with connect(at) as conn:
        seen = []
        for value in (
            1,
            1.5,
            "Zürich 北京 🐘 ' \\",
            True,
            None,
            [1, 2],
            ["a,b", None],
            b"\0\1\xff" * 1000,
        ):
            given = psycopg2.Binary(value) if isinstance(value, bytes) else value
            ((found,),) = rows(conn, "SELECT %s", [given])
            found = bytes(found) if isinstance(value, bytes) else found
            assert found == value
            seen.append(found)
        seen += rows(
            conn,
            "SELECT %s::jsonb, now() - now(), '1.50'::numeric",
            [psycopg2.extras.Json({"ü": 1})],
        )
        with conn.cursor(cursor_factory=psycopg2.extras.RealDictCursor) as cursor:
            cursor.execute("CREATE TEMP TABLE v (a int, b text)")
            psycopg2.extras.execute_values(
                cursor, "INSERT INTO v VALUES %s", [(n, "b") for n in range(300)]
            )
            cursor.execute("SELECT count(*), sum(a) FROM v; DROP TABLE v")
            psycopg2.extras.execute_batch(cursor, "SELECT %s", [(n,) for n in range(50)])
            seen.append(cursor.fetchall())
        return seen


def transactions(at: Address) -> object:
    seen: list[object] = []
    with connect(at, autocommit=False) as conn:
        with conn:
            rows(conn, "DROP TABLE IF EXISTS tx; CREATE TABLE tx (id int PRIMARY KEY)")
        with conn:
            rows(conn, "INSERT INTO tx VALUES (1)")
        with pytest.raises(ZeroDivisionError), conn:
            rows(conn, "INSERT INTO tx VALUES (2)")
            raise ZeroDivisionError
        rows(conn, "SAVEPOINT s")
        seen.append(refused(conn, "INSERT INTO tx VALUES (%s)", [1]))
        seen.append(refused(conn, "SELECT 1"))
        seen.append(conn.get_transaction_status())
        rows(conn, "ROLLBACK TO s")
        rows(conn, "INSERT INTO tx VALUES (3)")
        conn.commit()
        conn.set_session(isolation_level="SERIALIZABLE", readonly=True, deferrable=True)
        seen.append(rows(conn, "SHOW transaction_isolation"))
        seen.append(refused(conn, "INSERT INTO tx VALUES (4)"))
        conn.rollback()
        conn.set_session(isolation_level="DEFAULT", readonly="DEFAULT", deferrable="DEFAULT")
        xid = conn.xid(1, f"psycopg2 {at.database}", "x")
        conn.tpc_begin(xid)
        rows(conn, "INSERT INTO tx VALUES (5)")
        conn.tpc_prepare()
        conn.tpc_commit()
        seen.append(rows(conn, "SELECT * FROM tx ORDER BY id"))
        conn.rollback()
    assert seen[-1] == [(1,), (3,), (5,)]
    return seen


def errors(at: Address) -> object:
    with connect(at) as conn:
        seen = [
            refused(conn, "SELEC 1"),
            refused(conn, "SELECT * FROM nowhere"),
            refused(conn, "SELECT 1; SELECT 1/0; SELECT 2"),
            refused(
                conn,
                "DO $$ BEGIN RAISE 'own' USING ERRCODE = 'AB123', HINT = 'h', DETAIL = 'd'; END $$",
            ),
        ]
        rows(conn, "DO $$ BEGIN RAISE NOTICE 'ü'; RAISE WARNING 'b'; END $$")
        return [*seen, *conn.notices]


def cursors(at: Address) -> object:
    seen: list[object] = []
    with connect(at, autocommit=False) as conn:
        with conn.cursor("named") as cursor:
            cursor.itersize = 7
            cursor.execute("SELECT n, 'ü' || n FROM generate_series(1, %s) n", [50])
            seen.append(list(cursor))
        with conn.cursor("scrolls", scrollable=True) as cursor:
            cursor.execute("SELECT generate_series(1, 50)")
            cursor.scroll(40, mode="absolute")
            seen.append(cursor.fetchmany(3))
        with conn.cursor("holds", withhold=True) as cursor:
            cursor.execute("SELECT generate_series(1, 20)")
            seen.append(cursor.fetchmany(5))
            conn.commit()
            seen.append(cursor.fetchall())
        conn.commit()
    return seen


def copies(at: Address) -> object:
    with connect(at) as conn, conn.cursor() as cursor:
        cursor.execute(
            "DROP TABLE IF EXISTS copied; CREATE TABLE copied (id int PRIMARY KEY, note text)"
        )
        text = "".join(f"{n}\tü{n}\n" for n in range(3000))
        cursor.copy_from(StringIO(text), "copied")
        with pytest.raises(psycopg2.errors.UniqueViolation):
            cursor.copy_expert("COPY copied FROM STDIN", StringIO(text))
        out, table = StringIO(), StringIO()
        cursor.copy_expert("COPY (SELECT * FROM copied ORDER BY id) TO STDOUT", out)
        assert out.getvalue() == text
        cursor.copy_to(table, "copied", columns=["id"])
        return out.getvalue(), table.getvalue(), rows(conn, "SELECT count(*) FROM copied")


def large_objects(at: Address) -> object:
    """libpq calls the functions for them by number: FunctionCall messages."""
    with connect(at, autocommit=False) as conn:
        kept = conn.lobject(0, "wb")
        kept.write("ü and more ".encode() * 5000)
        kept.seek(10)
        kept.truncate(20_000)
        kept.close()
        conn.commit()
        again = conn.lobject(kept.oid, "rb")
        found = again.read()
        again.unlink()
        conn.commit()
        with pytest.raises(psycopg2.OperationalError):
            conn.lobject(kept.oid, "rb")
        conn.rollback()
        return found


def listens(at: Address) -> object:
    with connect(at) as conn, connect(at) as other:
        rows(conn, "LISTEN kanal")
        for n in range(3):
            rows(other, "SELECT pg_notify('kanal', %s)", [f"payload {n}"])
        while len(conn.notifies) < 3:
            assert select.select([conn], [], [], 10)[0]
            conn.poll()
        rows(conn, "UNLISTEN *")
        return [(n.channel, n.payload) for n in conn.notifies]


def settings(at: Address) -> object:
    seen: list[object] = []
    shown = "SELECT current_setting('search_path'), current_setting('timezone'), current_setting('work_mem')"
    with connect(at) as conn, connect(at) as other:
        first = rows(other, shown)
        rows(
            conn, "SET search_path TO pg_catalog; SET TIME ZONE 'Asia/Tokyo'; SET work_mem = '7MB'"
        )
        for _ in range(5):
            seen.append(rows(conn, shown))
            assert rows(other, shown) == first
        conn.reset()
        seen.append(rows(conn, shown))
    return seen


CHECKS = (login, values, transactions, errors, cursors, copies, large_objects, listens, settings)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_same_as_direct(place: Place, check: Callable[[Address], object]) -> None:
    same(place, check)


def test_transactions_run_wherever_there_is_a_connection(place: Place) -> None:
    with connect(place.through, autocommit=False) as conn:
        pids: list[int] = []
        for n in place.turns(pids):
            ((pid, found),) = rows(conn, "SELECT pg_backend_pid(), %s + 1", [n])
            assert found == n + 1
            pids.append(pid)
            conn.commit()


def test_cancel(place: Place) -> None:
    with connect(place.through) as conn:

        def cancel() -> None:
            wait_for_query(place, "pg_sleep(36)")
            conn.cancel()

        thread = threading.Thread(target=cancel)
        thread.start()
        with pytest.raises(psycopg2.errors.QueryCanceled, match="due to user request"):
            rows(conn, "SELECT pg_sleep(36)")
        thread.join()
        assert rows(conn, "SELECT 1") == [(1,)]


def test_more_clients_than_connections(place: Place) -> None:
    """In a pool of psycopg2's, with one thread each."""
    pool = psycopg2.pool.ThreadedConnectionPool(2, 3 * SIZE, place.through.url)
    found: list[bool] = []

    def work(client: int) -> None:
        conn = pool.getconn()
        for n in range(10):
            with conn:
                found.append(rows(conn, "SELECT %s * %s", [client, n]) == [(client * n,)])
        pool.putconn(conn)

    threads = [threading.Thread(target=work, args=[n]) for n in range(3 * SIZE)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    pool.closeall()
    assert found == [True] * 30 * SIZE


def test_client_learns_of_a_lost_connection_and_reconnects(place: Place) -> None:
    def terminated(at: Address) -> object:
        with connect(at) as conn:
            with pytest.raises(psycopg2.OperationalError) as caught:
                rows(conn, "SELECT pg_terminate_backend(pg_backend_pid())")
            assert conn.closed
        with connect(at) as again:
            return caught.value.pgcode, rows(again, "SELECT 'again'")

    same(place, terminated)
