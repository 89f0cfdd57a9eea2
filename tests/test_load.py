"""Many clients on a small pool: no error, and PostgreSQL never sees more than the pool's limit.

``PGSIDECAR_TEST_LOAD_SECONDS`` (default 4) is the length of each load.
"""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import psycopg
import pytest

from sidecar.demo.postgres import EmbeddedPostgres
from tests.pgbench import MODES, fill, pgbench
from tests.sidecar_process import MakeProcess, MakeService, Metrics, come_true

CLIENTS = 200
MAX_SIZE = 25
SECONDS = float(os.environ.get("PGSIDECAR_TEST_LOAD_SECONDS", "4"))

_LOOK_EVERY = 0.02  # seconds


class Seen:
    """How many backends of one role PostgreSQL had, at each look."""

    def __init__(self) -> None:
        self.counts: list[int] = []

    async def watch(self, server: EmbeddedPostgres, role: str) -> None:
        query = "SELECT count(*) FROM pg_stat_activity WHERE usename = %s"
        async with await psycopg.AsyncConnection.connect(server.dsn(), autocommit=True) as conn:
            while True:
                row = await (await conn.execute(query, [role])).fetchone()
                assert row is not None
                self.counts.append(row[0])
                await asyncio.sleep(_LOOK_EVERY)


@asynccontextmanager
async def backends_of(server: EmbeddedPostgres, role: str) -> AsyncIterator[Seen]:
    """Counts the backends of a role that nobody but the pool logs in as."""
    seen = Seen()
    async with asyncio.TaskGroup() as group:
        watching = group.create_task(seen.watch(server, role))
        yield seen
        watching.cancel()


def create_role(server: EmbeddedPostgres, role: str) -> str:
    """The connection string of a new role that may read and write what is in the database."""
    server.psql(f"CREATE ROLE {role} LOGIN IN ROLE pg_read_all_data, pg_write_all_data")
    return server.dsn(user=role)


@pytest.mark.parametrize("mode", MODES)
async def test_200_clients_never_get_more_than_25_backends(
    postgres: EmbeddedPostgres, make_process: MakeProcess, mode: str
) -> None:
    """In each of the protocol's ways to run a query; afterwards the pool is as before."""
    role = f"load_{mode}"
    fill(postgres)
    sidecar = make_process(create_role(postgres, role), max_size=MAX_SIZE, diagnose=False)
    async with backends_of(postgres, role) as seen:
        lasting = ("-S", "-T", f"{SECONDS:g}")
        done = await pgbench(postgres, sidecar, mode, *lasting, clients=CLIENTS, threads=2)
    assert (done.code, done.complained) == (0, "")
    assert "number of failed transactions: 0 " in done.said
    assert max(seen.counts) == MAX_SIZE
    metrics = await sidecar.until_whole()
    assert metrics.acquires.keys() <= {"immediate", "waited"}
    assert metrics.errors == {}
    await sidecar.until(lambda now: now.value("pgsidecar_client_connections", listener="pg") == 0)


async def test_connections_are_replaced_under_load_within_the_limit(
    postgres: EmbeddedPostgres, make_process: MakeProcess
) -> None:
    """``max_lifetime`` of next to nothing: no client notices, and the limit holds."""
    fill(postgres)
    dsn = create_role(postgres, "load_replaced")
    sidecar = make_process(dsn, max_size=MAX_SIZE, diagnose=False, max_lifetime="200ms")
    async with backends_of(postgres, "load_replaced") as seen:
        lasting = ("-S", "-T", "3")
        done = await pgbench(postgres, sidecar, "prepared", *lasting, clients=50, threads=2)
    assert (done.code, done.complained) == (0, "")
    assert MAX_SIZE - 5 <= max(seen.counts) <= MAX_SIZE
    metrics = await sidecar.until_whole()
    closed = metrics.above_zero("pgsidecar_connections_closed_total", "reason")
    assert closed.keys() == {("max_lifetime",)}
    assert closed["max_lifetime",] > 3 * MAX_SIZE
    assert metrics.errors == {}


async def test_a_backend_that_does_not_go_keeps_its_place(
    postgres: EmbeddedPostgres, make_service: MakeService
) -> None:
    """A pool that counts its own sockets only would open the next one, and go over the limit."""
    dsn = create_role(postgres, "load_stuck")
    sidecar = await make_service(dsn, max_size=1, min_idle=1, max_lifetime="500ms")
    async with await psycopg.AsyncConnection.connect(sidecar.dsn(), autocommit=True) as conn:
        await sidecar.until_pinged()
        idle = sidecar.pool.state.idle
        pid = await come_true(lambda: max((server.pid for server in idle), default=0), "idle")
        os.kill(pid, signal.SIGSTOP)
        try:
            await sidecar.until(lambda now: now.idle == now.used == 0)  # it was told to go
            asking = asyncio.create_task(conn.execute("SELECT pg_backend_pid()"))
            await sidecar.until(oldest_wait_over(0.5))
            backends = "SELECT pid FROM pg_stat_activity WHERE usename = 'load_stuck'"
            assert postgres.psql(backends) == str(pid)
        finally:
            os.kill(pid, signal.SIGCONT)
        row = await (await asking).fetchone()
        assert row is not None
        assert row[0] != pid
    await sidecar.until_whole()


def oldest_wait_over(seconds: float) -> Callable[[Metrics], bool]:
    name = "pgsidecar_pool_pending_max_wait_seconds"
    return lambda now: now.value(name, pool="main") > seconds
