"""Clients that do anything at any time: each gets its own answers, and the pool is whole afterwards."""

import asyncio
import random
from collections.abc import Awaitable, Callable

import psycopg
import pytest

from sidecar.demo.postgres import EmbeddedPostgres
from tests.sidecar_process import MakeService, Sidecar, hang_up

CLIENTS = 12
MAX_SIZE = 3
ACTIONS = 40

EXPECTED = (
    psycopg.errors.DivisionByZero,
    psycopg.errors.QueryCanceled,
    psycopg.errors.TooManyConnections,
    psycopg.errors.InFailedSqlTransaction,
)
"""What these clients provoke."""


class AnyClient:
    """One client; every answer it gets must carry its own number."""

    def __init__(self, sidecar: Sidecar, number: int, seed: int = 1) -> None:
        self.number = number
        self._sidecar = sidecar
        self._rng = random.Random(f"{seed} {number}")
        self._conn: psycopg.AsyncConnection[tuple[object, ...]]
        self._actions: list[Callable[[], Awaitable[None]]] = [
            self._simple,
            self._extended,
            self._prepared,
            self._pipeline,
            self._transaction,
            self._fail,
            self._copy,
            self._setting,
            self._cancel,
            self._leave,
        ]

    async def run(self) -> None:
        await self._connect()
        try:
            for _ in range(ACTIONS):
                try:
                    await self._rng.choice(self._actions)()
                except EXPECTED:
                    await self._rollback()
        finally:
            await self._conn.close()

    async def _connect(self) -> None:
        dsn = self._sidecar.dsn(application_name=f"client-{self.number}")
        self._conn = await psycopg.AsyncConnection.connect(dsn, autocommit=True)

    async def _rollback(self) -> None:
        while True:
            try:
                await self._conn.execute("ROLLBACK")
                return
            except psycopg.errors.TooManyConnections:
                pass  # there was no transaction, it had not begun

    async def _ask(self, query: str, *parameters: int, prepare: bool = False) -> None:
        cursor = await self._conn.execute(query, parameters or None, prepare=prepare)
        row = await cursor.fetchone()
        assert row is not None
        assert row[0] == self.number, (query, row)

    async def _simple(self) -> None:
        await self._ask(f"SELECT {self.number}, pg_sleep({self._rng.choice((0, 0.001))})")

    async def _extended(self) -> None:
        await self._ask("SELECT %s::int", self.number)

    async def _prepared(self) -> None:
        await self._ask(f"SELECT %s::int, {self._rng.randrange(5)}", self.number, prepare=True)

    async def _pipeline(self) -> None:
        divisor = self._rng.choice((0, 1, 1))
        async with self._conn.pipeline():
            first = await self._conn.execute("SELECT %s::int", [self.number])
            await self._conn.execute("SELECT 1 / %s::int", [divisor])
            last = await self._conn.execute("SELECT %s::int + 0", [self.number], prepare=True)
        assert [await cursor.fetchone() for cursor in (first, last)] == [(self.number,)] * 2

    async def _transaction(self) -> None:
        await self._conn.execute("BEGIN")
        await self._ask("INSERT INTO chaos VALUES (%s) RETURNING client", self.number)
        await self._rng.choice((self._simple, self._prepared, self._fail, self._extended))()
        await self._conn.execute(self._rng.choice(("COMMIT", "ROLLBACK")))

    async def _fail(self) -> None:
        await self._conn.execute("SELECT 1 / %s", [0])

    async def _copy(self) -> None:
        async with self._conn.cursor() as cursor:
            async with cursor.copy("COPY chaos FROM STDIN") as copy:
                for _ in range(self._rng.randrange(100)):
                    await copy.write_row([self.number])
            query = f"COPY (SELECT {self.number} FROM generate_series(1, 100)) TO STDOUT"
            async with cursor.copy(query) as copy:
                async for row in copy.rows():
                    assert row == (str(self.number),)

    async def _setting(self) -> None:
        """Pins the connection up to the client's end; its next owner must not see it."""
        unset = "coalesce(current_setting('chaos.x', true), '') = ''"  # '' after a reset
        await self._ask(f"SELECT {self.number} WHERE {unset}")
        await self._conn.execute(f"SET chaos.x = {self.number}")
        await self._ask("SELECT current_setting('chaos.x')::int")
        await self._conn.close()
        await self._connect()

    async def _cancel(self) -> None:
        asking = asyncio.create_task(self._conn.execute("SELECT pg_sleep(0.005)"))
        await asyncio.sleep(self._rng.uniform(0, 0.01))
        await self._conn.cancel_safe()
        await asking

    async def _leave(self) -> None:
        """Go in the middle of a query, a transaction or the wait for a connection; come again."""
        if self._rng.random() < 0.5:
            await self._conn.execute("BEGIN")
        asking = asyncio.create_task(self._conn.execute("SELECT pg_sleep(0.005)"))
        await asyncio.sleep(self._rng.uniform(0, 0.01))
        hang_up(self._conn)
        await asyncio.wait([asking])
        assert isinstance(asking.exception(), psycopg.Error | None)
        await self._conn.close()
        await self._connect()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {
            "max_prepared_statements": 2,
            "max_lifetime": "100ms",
            "idle_timeout": "50ms",
            "ping_interval": "20ms",
        },
        {"mode": "session", "max_size": CLIENTS},
    ],
    ids=["transaction", "everything expires", "session"],
)
async def test_whatever_clients_do(
    postgres: EmbeddedPostgres, make_service: MakeService, options: dict[str, object]
) -> None:
    """Queries, transactions, copies, settings, cancels and departures, four times too many clients."""
    postgres.psql("CREATE TABLE IF NOT EXISTS chaos (client int)")
    role = f"chaos_{len(options)}"
    postgres.psql(f"CREATE ROLE {role} LOGIN IN ROLE pg_read_all_data, pg_write_all_data")
    limits = {
        "diagnose": False,
        "max_size": MAX_SIZE,
        "min_idle": 1,
        "acquire_timeout": "300ms",
        **options,
    }
    sidecar = await make_service(postgres.dsn(user=role), **limits)
    async with asyncio.TaskGroup() as group:
        for number in range(CLIENTS):
            group.create_task(AnyClient(sidecar, number).run())
    metrics = await sidecar.until_whole()
    assert metrics.errors.keys() <= {
        *(("server", "22"), ("server", "25"), ("server", "57")),
        *(("sidecar", "53"), ("sidecar", "57")),
    }
    backends = f"SELECT state FROM pg_stat_activity WHERE usename = '{role}'"
    states = postgres.psql(backends).splitlines()
    assert len(states) <= sidecar.pool.state.max_size
    assert set(states) <= {"idle"}
    await sidecar.until(lambda now: now.value("pgsidecar_client_connections", listener="pg") == 0)
