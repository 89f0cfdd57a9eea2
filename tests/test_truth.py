"""The metrics say what was really done, to the last query, and how long it took.

A query is one Query, Execute or FunctionCall message; a transaction lasts from its first query to
ReadyForQuery ``I``. A cycle without a query (Parse and Sync, to prepare) takes a lease and is
neither.
"""

import asyncio
import time
from collections import defaultdict
from pathlib import Path

import psycopg
import pytest

from sidecar.demo.postgres import EmbeddedPostgres
from tests.conftest import MakePostgres
from tests.pgbench import MODES, Finished, fill, pgbench
from tests.sidecar_process import MakeProcess, MakeService, Metrics, Sidecar

CLIENTS = 8
TIMES = 50
DONE = CLIENTS * TIMES


def leases(metrics: Metrics) -> float:
    """Requests for a connection: nobody timed out, was rejected or gave up."""
    acquires = metrics.acquires
    assert acquires.keys() <= {"immediate", "waited"}
    return sum(acquires.values())


async def run(
    server: EmbeddedPostgres, sidecar: Sidecar, mode: str, *script: str | Path
) -> Finished:
    """This script, so many times."""
    times = ("-t", str(TIMES))
    return await pgbench(server, sidecar, mode, *times, *script, clients=CLIENTS, threads=CLIENTS)


@pytest.mark.parametrize("mode", MODES)
async def test_selects_are_counted_exactly(
    postgres: EmbeddedPostgres, make_process: MakeProcess, mode: str
) -> None:
    """Before its own scripts pgbench runs two queries about its tables (``GetTableInfo``)."""
    fill(postgres)
    sidecar = make_process(postgres.dsn(), max_size=4)
    done = await run(postgres, sidecar, mode, "-S")
    assert (done.code, done.complained) == (0, "")
    metrics = await sidecar.until_whole()
    prepares = CLIENTS if mode == "prepared" else 0
    assert metrics.queries == {"select": 2 + DONE}
    assert metrics.transactions == {"commit": 2 + DONE, "rollback": 0}
    assert leases(metrics) == 2 + DONE + prepares
    assert metrics.errors == {}
    ended = metrics.value("pgsidecar_transaction_duration_seconds_count", pool="main")
    assert ended == 2 + DONE
    assert metrics.value("pgsidecar_query_latency_samples", pool="main", window="5m") == 2 + DONE


@pytest.mark.parametrize("mode", MODES)
async def test_transactions_are_counted_exactly(
    postgres: EmbeddedPostgres, make_process: MakeProcess, tmp_path: Path, mode: str
) -> None:
    """One lease each; BEGIN is prepared before the first transaction, what follows within it."""
    table = f"truth_written_{mode}"
    postgres.psql(f"CREATE TABLE {table} (client int)")
    script = tmp_path / "script"
    script.write_text(f"BEGIN;\nINSERT INTO {table} VALUES (:client_id);\nCOMMIT;\n")
    sidecar = make_process(postgres.dsn(), max_size=4)
    done = await run(postgres, sidecar, mode, "-f", script)
    assert (done.code, done.complained) == (0, "")
    metrics = await sidecar.until_whole()
    assert postgres.psql(f"SELECT count(*) FROM {table}") == str(DONE)
    prepares = CLIENTS if mode == "prepared" else 0
    assert metrics.queries == {"transaction": 2 * DONE, "insert": DONE}
    assert metrics.transactions == {"commit": DONE, "rollback": 0}
    assert leases(metrics) == DONE + prepares
    assert metrics.errors == {}


@pytest.mark.parametrize("mode", MODES)
async def test_failures_are_counted_exactly(
    postgres: EmbeddedPostgres, make_process: MakeProcess, tmp_path: Path, mode: str
) -> None:
    """Of a serialisation failure pgbench says ROLLBACK, by simple query, and goes on."""
    function = f"truth_fail_{mode}"
    postgres.psql(
        f"""
        CREATE FUNCTION {function}() RETURNS int LANGUAGE plpgsql AS
        $$ BEGIN RAISE 'as told' USING ERRCODE = '40001'; END $$
        """
    )
    script = tmp_path / "script"
    script.write_text(f"BEGIN;\nSELECT {function}();\nCOMMIT;\n")
    sidecar = make_process(postgres.dsn(), max_size=4)
    done = await run(postgres, sidecar, mode, "-f", script)
    assert f"number of failed transactions: {DONE} (100.000%)" in done.said
    metrics = await sidecar.until_whole()
    prepares = CLIENTS if mode == "prepared" else 0
    assert metrics.queries == {"transaction": 2 * DONE, "select": DONE}
    assert metrics.transactions == {"commit": 0, "rollback": DONE}
    assert metrics.errors == {("server", "40"): DONE}
    assert leases(metrics) == DONE + prepares


async def test_every_operation_and_class_of_error_is_told_apart(
    postgres: EmbeddedPostgres, make_service: MakeService
) -> None:
    """One of each, through a driver that uses both protocols."""
    sidecar = await make_service(postgres.dsn(), max_size=2)
    conn = await psycopg.AsyncConnection.connect(sidecar.dsn(), autocommit=True)
    async with conn:
        await conn.execute("CREATE TABLE truth_kinds (n int PRIMARY KEY)")
        await conn.execute("INSERT INTO truth_kinds VALUES (1)")
        await conn.execute("INSERT INTO truth_kinds VALUES (%s)", [2])
        await conn.execute("UPDATE truth_kinds SET n = n + 10")
        await conn.execute("DELETE FROM truth_kinds WHERE n = 11")
        async with conn.cursor().copy("COPY truth_kinds FROM STDIN") as copy:
            await copy.write("3\n4\n")
        async with conn.transaction():
            await conn.execute("SELECT count(*) FROM truth_kinds")
        with pytest.raises(psycopg.errors.UniqueViolation):
            await conn.execute("INSERT INTO truth_kinds VALUES (3)")
        with pytest.raises(psycopg.errors.SyntaxError):
            await conn.execute("SELEC 1")
        with pytest.raises(psycopg.errors.DivisionByZero):
            await conn.execute("SELECT 1 / %s", [0])
        await conn.execute("")
        await conn.execute("DROP TABLE truth_kinds")
    metrics = await sidecar.until_whole()
    assert metrics.queries == {
        "insert": 3,
        "update": 1,
        "delete": 1,
        "copy": 1,
        "select": 2,
        "transaction": 2,
        "utility": 2,
        "other": 2,  # the typing error and the empty query
    }
    assert metrics.errors == {("server", "23"): 1, ("server", "42"): 1, ("server", "22"): 1}
    assert metrics.transactions == {"commit": 9, "rollback": 3}
    assert leases(metrics) == 12


@pytest.mark.parametrize("parameters", [None, [3]], ids=["simple", "extended"])
async def test_a_finished_copy_gives_its_connection_back(
    postgres: EmbeddedPostgres, make_service: MakeService, parameters: list[int] | None
) -> None:
    """While the client idles; it was kept until the next query, the end of the copy never settled."""
    sidecar = await make_service(postgres.dsn(), max_size=1)
    async with await psycopg.AsyncConnection.connect(sidecar.dsn(), autocommit=True) as conn:
        await conn.execute("CREATE TABLE IF NOT EXISTS truth_copied (n int)")
        statement = "COPY truth_copied FROM STDIN"
        if parameters is not None:
            statement += " WHERE n <> %s"
        async with conn.cursor().copy(statement, parameters) as copy:
            await copy.write("1\n2\n")
        metrics = await sidecar.until_whole(idle=1)
        assert metrics.queries["copy"] == 1
        async with conn.cursor().copy("COPY truth_copied TO STDOUT") as copy:
            assert b"".join([row async for row in copy]).startswith(b"1\n2\n")
        metrics = await sidecar.until_whole(idle=1)
        assert metrics.queries["copy"] == 2
    assert metrics.transactions == {"commit": 3, "rollback": 0}


async def divide(conn: psycopg.AsyncConnection[tuple[object, ...]], *numbers: int) -> None:
    """By each of them, in one pipeline."""
    async with conn.pipeline():
        for number in numbers:
            await conn.execute("SELECT 1 / %s::int", [number], prepare=False)


async def test_a_pipeline_is_one_transaction_of_many_queries(
    postgres: EmbeddedPostgres, make_service: MakeService
) -> None:
    """Up to Sync: what follows a failure there never runs, and is no query."""
    sidecar = await make_service(postgres.dsn(), max_size=2)
    async with await psycopg.AsyncConnection.connect(sidecar.dsn(), autocommit=True) as conn:
        await divide(conn, 1, 2, 3, 4, 5)
        with pytest.raises(psycopg.errors.DivisionByZero):
            await divide(conn, 2, 1, 0, 1, 2)
    metrics = await sidecar.until_whole()
    assert metrics.queries == {"select": 5 + 3}
    assert metrics.transactions == {"commit": 1, "rollback": 1}
    assert metrics.errors == {("server", "22"): 1}
    assert leases(metrics) == 2


async def test_rolling_quantiles_are_true_to_1_percent(
    own_postgres: MakePostgres, make_process: MakeProcess
) -> None:
    """Between what the server was told to sleep and what the client measured around it.

    No sleep is shorter than it was told, and what lies between client and sidecar is no part of a
    query: so each of the 101 durations, in order, lies between the two, whatever else the machine
    does. The difference of the two is the floor of this measurement.
    """
    sleeps = [0.02] * 90 + [0.1] * 9 + [0.3] * 2
    sidecar = make_process(own_postgres().dsn(), max_size=8, min_idle=8)
    await sidecar.until(lambda now: now.idle == 8)
    todo = sleeps.copy()
    measured: list[float] = []

    async def sleeper() -> None:
        async with await psycopg.AsyncConnection.connect(sidecar.dsn(), autocommit=True) as conn:
            while todo:
                query = f"SELECT pg_sleep({todo.pop()})"
                began = time.perf_counter()
                await conn.execute(query)
                measured.append(time.perf_counter() - began)

    async with asyncio.TaskGroup() as group:
        for _ in range(8):
            group.create_task(sleeper())
    measured.sort()
    metrics = await sidecar.until_whole()
    for window in ("1m", "5m"):
        labels = {"pool": "main", "window": window}
        assert metrics.value("pgsidecar_query_latency_samples", **labels) == len(sleeps) == 101
        for quantile, rank in (("0.5", 50), ("0.9", 90), ("0.99", 99)):
            said = metrics.value("pgsidecar_query_latency_seconds", **labels, quantile=quantile)
            told, floor = sleeps[rank], measured[rank] - sleeps[rank]
            assert told * 0.99 <= said <= (told + floor) * 1.01, (window, quantile, floor)
    total = metrics.value("pgsidecar_query_duration_seconds_sum", pool="main", operation="select")
    assert sum(sleeps) <= total <= sum(measured)


async def test_histograms_are_true(postgres: EmbeddedPostgres, make_service: MakeService) -> None:
    """What falls on which side of a bound is known where the duration is far from it."""
    sidecar = await make_service(postgres.dsn(), max_size=1)
    async with await psycopg.AsyncConnection.connect(sidecar.dsn()) as conn:
        await conn.execute("SELECT pg_sleep(0.06)")
        await conn.execute("SELECT pg_sleep(0.06)")
        await conn.commit()
    metrics = await sidecar.until_whole()
    buckets: dict[str, dict[str, float]] = defaultdict(dict)
    for what in ("transaction_duration", "pool_connection_use"):
        for bound in ("0.1", "60.0"):
            name = f"pgsidecar_{what}_seconds_bucket"
            buckets[what][bound] = metrics.value(name, pool="main", le=bound)
    assert buckets["transaction_duration"] == {"0.1": 0, "60.0": 1}
    assert buckets["pool_connection_use"] == {"0.1": 0, "60.0": 1}
    slept = {
        bound: metrics.value(
            "pgsidecar_query_duration_seconds_bucket", pool="main", operation="select", le=bound
        )
        for bound in ("0.05", "60.0")
    }
    assert slept == {"0.05": 0, "60.0": 2}
