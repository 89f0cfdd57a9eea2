"""Figures of statements against those that PostgreSQL itself has: the extension pg_stat_statements.

Its texts are read by our own fingerprint, so what it tells apart and we do not (IN lists of different
lengths; utility statements, whose literals it keeps) is added up. What failed it does not count.
"""

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import psycopg
import pytest

from sidecar.demo.postgres import EmbeddedPostgres
from sidecar.fingerprint import normalise
from sidecar.work import Statement
from tests.debian_postgres import debian_bin
from tests.pgbench import MODES, pgbench
from tests.sidecar_process import MakeService, ServiceHere

Connection = psycopg.AsyncConnection[Any]

CLIENTS = 4
TIMES = 25


@dataclass
class Figures:
    calls: int = 0
    rows: int = 0
    seconds: float = 0.0

    def add(self, calls: int, rows: int, seconds: float) -> None:
        self.calls += calls
        self.rows += rows
        self.seconds += seconds


@pytest.fixture(scope="module")
def server() -> Iterator[EmbeddedPostgres]:
    """Debian's: the embedded one comes without extensions."""
    bin_dir = debian_bin()
    settings = {
        "shared_preload_libraries": "pg_stat_statements",
        "pg_stat_statements.track": "top",
    }
    version = int(float(bin_dir.parts[-2]))
    with EmbeddedPostgres(version, settings=settings, bin_dir=bin_dir) as started:
        started.psql("CREATE EXTENSION pg_stat_statements")
        started.psql("CREATE TABLE mixed (id int PRIMARY KEY, name text, amount numeric)")
        yield started


def theirs(server: EmbeddedPostgres) -> dict[str, tuple[str, Figures]]:
    """By our fingerprint: a text, and the figures of all entries with this fingerprint."""
    with psycopg.connect(server.dsn(), autocommit=True) as conn:
        entries = conn.execute(
            "SELECT query, calls, rows, total_exec_time FROM pg_stat_statements"
            " WHERE query NOT LIKE '%pg_stat_statements%'"
            " AND query NOT LIKE 'SET application_name %'"  # we: on a connection with another one
        ).fetchall()
    found: dict[str, tuple[str, Figures]] = {}
    for query, calls, rows, milliseconds in entries:
        fingerprint = normalise(query.encode()).fingerprint()
        figures = found.setdefault(fingerprint, (query, Figures()))[1]
        figures.add(calls, rows, milliseconds / 1000)
    return found


def ours(sidecar: ServiceHere) -> dict[str, Statement]:
    table = sidecar.service.recorder.pool("main").statements
    assert table.evicted == 0
    return {kept.statement.fingerprint: kept.statement for kept in table.kept()}


async def until_equal(
    server: EmbeddedPostgres, sidecar: ServiceHere, *besides: str
) -> dict[str, Statement]:
    """All calls and rows are the same, and the time is theirs and some; of all but these texts.
    Returns our statements."""
    await sidecar.until_whole()
    expected = await asyncio.to_thread(theirs, server)
    counted = {
        fingerprint: statement
        for fingerprint, statement in ours(sidecar).items()
        if statement.calls > sum(statement.errors.values()) and statement.text not in besides
    }
    differences = {}
    for fingerprint, (text, figures) in expected.items():
        if text in besides:
            continue
        statement = counted.get(fingerprint)
        have = (
            None
            if statement is None
            else (statement.calls - sum(statement.errors.values()), statement.rows)
        )
        if have != (figures.calls, figures.rows):
            differences[text] = (have, (figures.calls, figures.rows))
    assert not differences, "ours, and theirs"
    assert not {s.text for f, s in counted.items() if f not in expected}, "only ours"
    for fingerprint, statement in counted.items():
        text, figures = expected[fingerprint]
        share = (statement.seconds - figures.seconds) / statement.calls
        # the network, parsing and planning; a clock of theirs, and one of ours
        assert -0.0001 < share < 0.1, text
    return ours(sidecar)


async def connect(sidecar: ServiceHere) -> Connection:
    return await psycopg.AsyncConnection.connect(sidecar.dsn(), autocommit=True)


@pytest.mark.parametrize("mode", MODES)
async def test_pgbench(server: EmbeddedPostgres, make_service: MakeService, mode: str) -> None:
    """Its own transaction, of seven statements."""
    for relation, columns in {
        "branches": "bid int, bbalance int",
        "tellers": "tid int, bid int, tbalance int",
        "accounts": "aid int, bid int, abalance int",
        "history": "tid int, bid int, aid int, delta int, mtime timestamp, filler text",
    }.items():
        server.psql(f"CREATE TABLE IF NOT EXISTS pgbench_{relation} ({columns})")
    server.psql(
        "TRUNCATE pgbench_branches, pgbench_accounts, pgbench_tellers;"
        " INSERT INTO pgbench_branches VALUES (1, 0);"
        " INSERT INTO pgbench_tellers SELECT n, 1, 0 FROM generate_series(1, 10) n;"
        " INSERT INTO pgbench_accounts SELECT n, 1, 0 FROM generate_series(1, 200) n"
    )
    sidecar = await make_service(server.dsn(), max_size=3)
    await sidecar.until_pinged()
    server.psql("SELECT pg_stat_statements_reset()")
    done = await pgbench(server, sidecar, mode, "-t", str(TIMES), clients=CLIENTS, threads=CLIENTS)
    assert (done.code, done.complained) == (0, "")

    # Of a utility statement that is prepared, PostgreSQL 14 and 15 count the first execution only:
    # pgss_ProcessUtility takes the queryId out of the cached plan.
    besides = ("BEGIN", "END") if mode == "prepared" else ()
    statements = await until_equal(server, sidecar, *besides)
    calls = {statement.text.split()[0]: statement.calls for statement in statements.values()}
    assert calls["BEGIN"] == calls["END"] == calls["INSERT"] == CLIENTS * TIMES


async def mixed(conn: Connection) -> None:
    """All kinds of statements, in several spellings."""
    for number in range(10):
        await conn.execute(f"INSERT INTO mixed VALUES ({number}, 'it''s {number}', {number}.5)")
        await conn.execute("INSERT INTO mixed VALUES (%s, %s, %s)", (number + 100, "x", 1))
        await conn.execute(
            f"/* {number} */ insert  into mixed\n values ({number + 200}, E'\\'', -1) -- {number}"
        )
    await conn.execute("INSERT INTO mixed SELECT n, 'many', 0 FROM generate_series(1000, 1999) n")
    for count in (1, 2, 5, 30):
        numbers = ", ".join(map(str, range(count)))
        await conn.execute(f"SELECT * FROM mixed WHERE id IN ({numbers})")
    for _ in range(8):  # psycopg prepares the sixth and later ones
        await conn.execute("SELECT name FROM mixed WHERE id < %s ORDER BY id", (150,))
    await conn.execute("UPDATE mixed SET amount = amount + 1.25 WHERE id BETWEEN 0 AND 9")
    await conn.execute("UPDATE mixed SET amount=amount+%s WHERE id BETWEEN %s AND %s", (2, 3, 4))
    await conn.execute("DELETE FROM mixed WHERE name = 'many' AND id > 1500 RETURNING id")
    async with conn.cursor().copy("COPY mixed FROM STDIN") as copy:
        for number in range(3000, 3025):
            await copy.write_row((number, "copied", 0))
    async with conn.cursor().copy("COPY (SELECT * FROM mixed WHERE id > 2000) TO STDOUT") as copy:
        assert len([row async for row in copy.rows()]) == 25
    async with conn.transaction():
        await conn.execute("DECLARE c CURSOR FOR SELECT id FROM mixed")
        for count in (7, 3):
            await conn.execute(f"FETCH {count} FROM c")
        await conn.execute("CLOSE c")
    await conn.execute("CREATE TABLE copied AS SELECT * FROM mixed WHERE id < 50")
    await conn.execute("ANALYZE copied")
    await conn.execute("DROP TABLE copied")
    await conn.execute("SELECT pg_sleep(0.2)")
    for text in (
        "INSERT INTO mixed VALUES (0, 'again', 0)",  # the same statement as those that went well
        "SELECT 1 / 0",
        "SELEC 1",
    ):
        with pytest.raises(psycopg.Error):
            await conn.execute(text)


async def test_mixed_statements(server: EmbeddedPostgres, make_service: MakeService) -> None:
    """Different literals, spacing, comments and IN lists; COPY, cursors, DDL; and what fails."""
    server.psql("TRUNCATE mixed")
    sidecar = await make_service(server.dsn())
    await sidecar.until_pinged()
    async with await connect(sidecar) as conn:
        server.psql("SELECT pg_stat_statements_reset()")
        await mixed(conn)
        # which psycopg says after an error, and PostgreSQL does not count
        statements = await until_equal(server, sidecar, "DEALLOCATE ALL")

    inserted = statements[normalise(b"insert into mixed values (1, '', 2)").fingerprint()]
    assert (inserted.calls, inserted.rows, inserted.errors) == (31, 30, {"23505": 1})
    selected = statements[normalise(b"SELECT * FROM mixed WHERE id IN (1)").fingerprint()]
    assert (selected.calls, selected.rows) == (4, 1 + 2 + 5 + 10)
    divided = statements[normalise(b"SELECT 1 / 0").fingerprint()]
    assert (divided.calls, divided.rows, divided.errors) == (1, 0, {"22012": 1})


async def test_a_text_of_several_statements_has_the_rows_of_all(
    server: EmbeddedPostgres, make_service: MakeService
) -> None:
    """To us the text is one statement; the server looks at each."""
    server.psql("TRUNCATE mixed; INSERT INTO mixed SELECT n, '', 0 FROM generate_series(1, 50) n")
    sidecar = await make_service(server.dsn())
    await sidecar.until_pinged()
    async with await connect(sidecar) as conn:
        server.psql("SELECT pg_stat_statements_reset()")
        for number in range(4):
            await conn.execute(
                f"UPDATE mixed SET amount = {number} WHERE id < 10; SELECT id FROM mixed WHERE id > {number}"
            )
    await sidecar.until_whole()
    (statement,) = (s for s in ours(sidecar).values() if s.calls)
    parts = [figures for _, figures in theirs(server).values()]

    assert [part.calls for part in parts] == [4, 4] == [statement.calls] * 2
    assert sum(part.rows for part in parts) == statement.rows == 4 * 9 + 50 + 49 + 48 + 47
