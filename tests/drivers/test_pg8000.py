"""pg8000, which speaks the protocol itself, in Python."""

import functools
import threading
from collections.abc import Callable
from contextlib import closing
from datetime import UTC, date, datetime
from decimal import Decimal
from io import BytesIO
from typing import Any
from uuid import UUID

import pg8000.dbapi
import pg8000.native
import pytest

from tests.drivers.places import SIZE, Address, Place, same

DRIVER = "pg8000"
VERSION = pg8000.__version__
TRIED = "native and DB-API, prepared statements, transactions, savepoints, COPY, LISTEN/NOTIFY, settings"

VALUES = (
    *(5, -(2**62), 1.5, "Zürich 北京 🐘 ' \\", True, None, b"\0\1\xff" * 1000, Decimal("1.50")),
    *(datetime(2024, 2, 29, 23, 59, 59, 999, UTC), date(9999, 12, 31), UUID(int=7), [1, 2, 3]),
)


def native(at: Address, **options: Any) -> Any:
    return closing(
        pg8000.native.Connection(
            at.user,
            host=at.host,
            port=at.port,
            database=at.database,
            password=at.password,
            timeout=20,
            **options,
        )
    )


def dbapi(at: Address) -> Any:
    return closing(
        pg8000.dbapi.connect(
            user=at.user,
            host=at.host,
            port=at.port,
            database=at.database,
            password=at.password,
            timeout=20,
        )
    )


def refused(run: Callable[[], object]) -> dict[str, str]:
    with pytest.raises((pg8000.native.DatabaseError, pg8000.dbapi.DatabaseError)) as caught:
        run()
    told: dict[str, str] = caught.value.args[0]
    return told


def values(at: Address) -> object:
    with native(at, application_name="a name") as conn:
        seen = [conn.run("SHOW application_name"), str(conn.parameter_statuses["TimeZone"])]
        for value in VALUES:
            seen += conn.run("SELECT :v, :v::text", v=value)
        ((found,),) = conn.run("SELECT :v::bytea", v=b"\0\1\xff" * 1000)
        assert found == b"\0\1\xff" * 1000
        seen.append([column["name"] for column in conn.columns])
        return seen


def transactions(at: Address) -> object:
    seen: list[object] = []
    with dbapi(at) as conn:
        cursor = conn.cursor()
        cursor.execute("DROP TABLE IF EXISTS tx")
        cursor.execute("CREATE TABLE tx (id int PRIMARY KEY)")
        conn.commit()
        cursor.executemany("INSERT INTO tx VALUES (%s)", [(1,), (2,)])
        cursor.execute("SAVEPOINT s")
        seen.append(refused(lambda: cursor.execute("INSERT INTO tx VALUES (%s)", (1,))))
        seen.append(refused(lambda: cursor.execute("SELECT 1")))
        cursor.execute("ROLLBACK TO s")
        conn.commit()
        cursor.execute("INSERT INTO tx VALUES (3)")
        conn.rollback()
        cursor.execute("SELECT * FROM tx ORDER BY id")
        seen.append(list(map(list, cursor.fetchall())))
    assert seen[-1] == [[1], [2]]
    return seen


def errors(at: Address) -> object:
    with native(at) as conn:
        queries = (
            "SELEC 1",
            "SELECT * FROM nowhere",
            "SELECT 1/0",
            "SELECT 1; SELECT 1/0; SELECT 2",
        )
        seen: list[object] = [refused(functools.partial(conn.run, query)) for query in queries]
        return [*seen, conn.run("SELECT 'goes on'")]


def copies(at: Address) -> object:
    with native(at) as conn:
        conn.run("DROP TABLE IF EXISTS copied")
        conn.run("CREATE TABLE copied (id int PRIMARY KEY, note text)")
        text = "".join(f"{n}\tü{n}\n" for n in range(3000)).encode()
        conn.run("COPY copied FROM STDIN", stream=BytesIO(text))
        refusal = refused(lambda: conn.run("COPY copied FROM STDIN", stream=BytesIO(text)))
        out = BytesIO()
        conn.run("COPY (SELECT * FROM copied ORDER BY id) TO STDOUT", stream=out)
        assert out.getvalue() == text
        return refusal["C"], conn.run("SELECT count(*) FROM copied")


def listens(at: Address) -> object:
    with native(at) as conn, native(at) as other:
        conn.run("LISTEN kanal")
        for n in range(3):
            other.run(f"NOTIFY kanal, 'payload {n}'")
        for _ in range(100):
            if len(conn.notifications) == 3:
                break
            conn.run("SELECT 1")
        conn.run("UNLISTEN *")
        return [(channel, payload) for _, channel, payload in conn.notifications]


def settings(at: Address) -> object:
    with native(at) as conn, native(at) as other:
        shown = "SELECT current_setting('search_path'), current_setting('timezone'), current_setting('work_mem')"
        first = other.run(shown)
        for query in (
            "SET search_path = pg_catalog",
            "SET TIME ZONE 'Asia/Tokyo'",
            "SET work_mem = '7MB'",
        ):
            conn.run(query)
        seen = []
        for _ in range(5):
            seen.append(conn.run(shown))
            assert other.run(shown) == first
        conn.run("RESET ALL")
        return [*seen, conn.run(shown)]


CHECKS = (values, transactions, errors, copies, listens, settings)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_same_as_direct(place: Place, check: Callable[[Address], object]) -> None:
    same(place, check)


def test_prepared_statements_follow_the_client(place: Place) -> None:
    with native(place.through) as conn:
        statement = conn.prepare("SELECT pg_backend_pid(), :n::int + 1")
        pids: list[int] = []
        for n in place.turns(pids):
            ((pid, found),) = statement.run(n=n)
            assert found == n + 1
            pids.append(pid)
        statement.close()


def test_more_clients_than_connections(place: Place) -> None:
    found: list[bool] = []

    def work(client: int) -> None:
        with native(place.through) as conn:
            statement = conn.prepare("SELECT :n::int * :m::int")
            for n in range(10):
                conn.run("BEGIN")
                found.append(statement.run(n=n, m=client) == [[n * client]])
                conn.run("COMMIT")

    threads = [threading.Thread(target=work, args=[n]) for n in range(3 * SIZE)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 30 * SIZE
