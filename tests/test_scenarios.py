"""Known causes, and what the verdict makes of them: the right kind, application and statement, while it lasts.

A real server, a real sidecar, and applications that do their daily work while one of them misbehaves. In a
healthy run of the same length nothing is said.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from uuid import uuid4

import psycopg
import pytest

from sidecar.demo.postgres import EmbeddedPostgres
from sidecar.events import IncidentKind
from sidecar.observe.incidents import Incident
from sidecar.observe.verdict import Kind, Verdict
from sidecar.pool.server import clock
from tests.conftest import MakePostgres
from tests.sidecar_process import MakeService, ServiceHere, come_true

Connection = psycopg.AsyncConnection[tuple[object, ...]]

LASTING = 5.0
"""Seconds for which each goes on."""


class Scene:
    """A sidecar with a pool of 4 connections, and what its verdicts are meanwhile."""

    def __init__(self, sidecar: ServiceHere) -> None:
        self.sidecar = sidecar
        self.verdicts: list[Verdict] = []
        self.is_over = asyncio.Event()
        self.recorder = sidecar.service.recorder.pool("main")

    def verdict(self) -> Verdict:
        return self.recorder.verdict(clock())

    async def connect(self, application: str) -> Connection:
        dsn = self.sidecar.dsn(application_name=application)
        return await psycopg.AsyncConnection.connect(dsn, autocommit=True)

    async def browse(self, name: str, work: float = 0.003, think: float = 0.02) -> None:
        """The daily work of one client: short statements of several kinds, with pauses."""
        texts = [
            f"SELECT pg_sleep({work}), 'cart of {name}'",
            f"SELECT pg_sleep({work}) AS price, 1 + 1",
            f"SELECT 'order', pg_sleep({work}), now()",
            f"SELECT count(*), pg_sleep({work}) FROM pg_class WHERE relname = 'x'",
        ]
        async with await self.connect(name) as conn:
            turn = hash(name)
            while not self.is_over.is_set():
                turn += 1
                try:
                    await conn.execute(texts[turn % len(texts)].encode())
                except psycopg.Error:
                    await asyncio.sleep(0.1)
                    if conn.closed:
                        return
                await asyncio.sleep(think)

    async def watch(self) -> None:
        while not self.is_over.is_set():
            self.verdicts.append(self.verdict())
            await asyncio.sleep(0.1)

    async def until(self, kind: Kind, within: float) -> Verdict:
        """The verdict, as soon as it is of this kind."""

        def look() -> Verdict | None:
            verdict = self.verdict()
            return verdict if verdict.kind is kind else None

        return await come_true(look, f"verdict {kind}; now: {self.verdict()}", within)

    async def incident(self, kind: IncidentKind) -> Incident:
        """The one incident there is, when it is over."""

        def look() -> list[Incident] | None:
            found = self.sidecar.service.recorder.incidents.all()
            return found if found and all(each.ended_at is not None for each in found) else None

        found = await come_true(look, "all incidents are over")
        assert [each.kind for each in found] == [kind], [each.summary() for each in found]
        return found[0]

    def blamed_share(self, application: str) -> float:
        blame = self.recorder.blame
        return blame.by_application().get(application, 0.0) / blame.charged


@asynccontextmanager
async def scene(
    make_service: MakeService, dsn: str, web: int = 4, **options: object
) -> AsyncIterator[Scene]:
    """With so many clients of ``web`` at work; it ends when the block does."""
    sidecar = await make_service(dsn, **{"max_size": 4, "min_idle": 2, **options})
    made = Scene(sidecar)
    async with asyncio.TaskGroup() as group:
        group.create_task(made.watch())
        for number in range(web):
            group.create_task(made.browse(f"web-{number % 2}"))
        await asyncio.sleep(1.5)  # the daily work, to compare with
        assert {each.kind for each in made.verdicts} == {Kind.HEALTHY}
        yield made
        made.is_over.set()


def text_of(verdict: Verdict) -> str:
    assert verdict.statement is not None
    return verdict.statement.text


async def test_leak_is_told(postgres: EmbeddedPostgres, make_service: MakeService) -> None:
    """Transactions left open by one application; the other ones wait, and none of them is to blame."""
    async with scene(make_service, postgres.dsn()) as it:
        async with AsyncExitStack() as stack:
            for number in range(4):
                conn = await it.connect("billing-worker")
                await stack.enter_async_context(conn)
                await conn.execute("BEGIN")
                await conn.execute(f"SELECT {number} AS invoice".encode())
            verdict = await it.until(Kind.LEAK, within=4)
            await asyncio.sleep(LASTING)
            after = it.verdict()
        for each in (verdict, after):
            assert (each.kind, each.application) == (Kind.LEAK, "billing-worker")
            assert "AS invoice" in text_of(each) or "as invoice" in text_of(each)
        assert "billing-worker left 4 transactions open" in after.headline
        assert any("pg_terminate_backend(" in step for step in after.next_steps)
        assert not [each for each in it.verdicts if each.kind not in (Kind.HEALTHY, Kind.LEAK)]
        incident = await it.incident(IncidentKind.EXHAUSTED)
        assert incident.verdict.kind is Kind.LEAK
        assert incident.verdict.application == "billing-worker"
        assert it.blamed_share("billing-worker") > 0.9
        assert it.verdict().kind is Kind.HEALTHY


async def test_lock_chain_is_told(postgres: EmbeddedPostgres, make_service: MakeService) -> None:
    """A transaction that holds a lock and does something else; everyone who needs the row queues behind it."""
    table = f"scenario_lock_{uuid4().hex}"
    postgres.psql(f"CREATE TABLE {table} (id int PRIMARY KEY, stock int)")
    postgres.psql(f"INSERT INTO {table} VALUES (1, 100)")

    async def order(it: Scene) -> None:
        async with await it.connect("checkout") as conn:
            await conn.execute(f"UPDATE {table} SET stock = stock - 1 WHERE id = 1".encode())

    async with scene(make_service, postgres.dsn(), slow_query_threshold="2s") as it:
        async with await it.connect("stock-taking") as conn, asyncio.TaskGroup() as group:
            await conn.execute("BEGIN")
            await conn.execute(f"SELECT stock FROM {table} WHERE id = 1 FOR UPDATE".encode())
            for _ in range(6):
                group.create_task(order(it))
            verdict = await it.until(Kind.LOCK_CHAIN, within=5)
            await asyncio.sleep(LASTING)
            after = it.verdict()
            await conn.execute("COMMIT")
        for each in (verdict, after):
            assert (each.kind, each.application) == (Kind.LOCK_CHAIN, "stock-taking")
            assert "for update" in text_of(each).lower()
        incident = await it.incident(IncidentKind.EXHAUSTED)
        assert incident.verdict.kind is Kind.LOCK_CHAIN
        assert incident.verdict.application == "stock-taking"
        assert it.blamed_share("stock-taking") > 0.9


async def test_slow_statement_is_told(
    postgres: EmbeddedPostgres, make_service: MakeService
) -> None:
    """One statement of one application takes long and runs on most connections."""

    async def report(it: Scene, until: float) -> None:
        async with await it.connect("reporting") as conn:
            while time.monotonic() < until:
                await conn.execute("SELECT 'monthly', pg_sleep(1.5)")

    async with scene(make_service, postgres.dsn()) as it:
        async with asyncio.TaskGroup() as group:
            for _ in range(8):
                group.create_task(report(it, time.monotonic() + LASTING))
            verdict = await it.until(Kind.SLOW_STATEMENT, within=4)
            await asyncio.sleep(3)
            after = it.verdict()
        for each in (verdict, after):
            assert (each.kind, each.application) == (Kind.SLOW_STATEMENT, "reporting")
            assert "pg_sleep" in text_of(each)
            assert "monthly" not in text_of(each)
        incident = await it.incident(IncidentKind.EXHAUSTED)
        assert incident.verdict.kind is Kind.SLOW_STATEMENT
        assert incident.verdict.statement == after.statement


async def test_undersized_pool_is_told(
    postgres: EmbeddedPostgres, make_service: MakeService
) -> None:
    """Many clients with short work of all kinds: nobody does anything wrong."""
    async with scene(make_service, postgres.dsn(), max_size=2) as it:
        async with asyncio.TaskGroup() as group:
            for number in range(80):
                group.create_task(it.browse(f"shop-{number % 4}", work=0.03, think=0.001))
            verdict = await it.until(Kind.POOL_TOO_SMALL, within=5)
            await asyncio.sleep(LASTING)
            after = it.verdict()
            it.is_over.set()
        for each in (verdict, after):
            assert (each.kind, each.application) == (Kind.POOL_TOO_SMALL, "")
        assert any("max_size (now 2)" in step for step in after.next_steps)
        incident = await it.incident(IncidentKind.EXHAUSTED)
        assert incident.verdict.kind is Kind.POOL_TOO_SMALL


async def test_connection_storm_is_told(
    postgres: EmbeddedPostgres, make_service: MakeService
) -> None:
    """An application that opens a connection for each bit of work, and does more of it than ever."""

    async def bit(it: Scene) -> None:
        async with await it.connect("cron-fleet") as conn:
            await conn.execute("SELECT 'bit', pg_sleep(0.1)")

    async with scene(make_service, postgres.dsn()) as it:
        async with asyncio.TaskGroup() as group:
            until = time.monotonic() + LASTING
            while time.monotonic() < until:
                group.create_task(bit(it))
                await asyncio.sleep(1 / 60)
            after = it.verdict()
        assert (after.kind, after.application) == (Kind.CONNECTION_STORM, "cron-fleet")
        assert "connections per second" in after.headline
        storm = [
            each
            for each in it.sidecar.service.recorder.incidents.all()
            if each.verdict.kind is Kind.CONNECTION_STORM
        ]
        assert [each.verdict.application for each in storm] == ["cron-fleet"]


async def test_database_that_is_down_is_told(
    own_postgres: MakePostgres, make_service: MakeService
) -> None:
    """The server goes away with everyone at work, and comes back."""
    server = own_postgres()
    async with scene(make_service, server.dsn()) as it:
        await asyncio.to_thread(server.kill)
        verdict = await it.until(Kind.DATABASE_DOWN, within=4)
        await asyncio.sleep(3)
        after = it.verdict()
        for each in (verdict, after):
            assert each.kind is Kind.DATABASE_DOWN
            assert "cannot reach PostgreSQL" in each.headline
        assert "connection refused" in after.headline
        await asyncio.to_thread(server.restart)
        await it.until(Kind.HEALTHY, within=15)
        incident = await it.incident(IncidentKind.DATABASE_DOWN)
        assert incident.verdict.kind is Kind.DATABASE_DOWN


async def test_error_burst_is_told(postgres: EmbeddedPostgres, make_service: MakeService) -> None:
    """An import that meets what is there already, row after row."""
    table = f"scenario_burst_{uuid4().hex}"
    postgres.psql(f"CREATE TABLE {table} (id int PRIMARY KEY)")
    postgres.psql(f"INSERT INTO {table} VALUES (7)")
    async with scene(make_service, postgres.dsn()) as it:
        until = time.monotonic() + LASTING
        async with await it.connect("importer") as conn:
            while time.monotonic() < until:
                with pytest.raises(psycopg.errors.UniqueViolation):
                    await conn.execute(f"INSERT INTO {table} VALUES (7)".encode())
                await asyncio.sleep(0.02)
            after = it.verdict()
        assert (after.kind, after.application) == (Kind.ERROR_BURST, "importer")
        assert text_of(after).lower().startswith("insert into")
        assert "23505" in after.headline
        assert "(7)" not in repr(after)
        incident = await it.incident(IncidentKind.ERROR_BURST)
        assert incident.verdict.kind is Kind.ERROR_BURST
        assert incident.verdict.application == "importer"


async def test_healthy_run_is_not_commented(
    postgres: EmbeddedPostgres, make_service: MakeService
) -> None:
    """A busy pool with its daily incidents: now and then full, an error, a longer query, a transaction."""

    async def now_and_then(it: Scene) -> None:
        async with await it.connect("back-office") as conn:
            while not it.is_over.is_set():
                await conn.execute("SELECT pg_sleep(0.3), 'overview'")
                with pytest.raises(psycopg.errors.DivisionByZero):
                    await conn.execute("SELECT 1 / 0")
                async with conn.transaction():
                    await conn.execute("SELECT 1")
                    await asyncio.sleep(0.2)
                    await conn.execute("SELECT 2")
                await asyncio.sleep(0.3)

    async def hold(it: Scene) -> None:
        """For a while, so that none is free."""
        async with await it.connect("batch") as conn:
            await conn.execute("SELECT pg_sleep(1), 'batch'")

    works: list[Callable[[Scene], Awaitable[None]]] = [now_and_then, now_and_then, hold]
    async with scene(make_service, postgres.dsn()) as it:
        async with asyncio.TaskGroup() as group:
            for work in works:
                group.create_task(_run(work, it))
            await asyncio.sleep(LASTING + 3)
            it.is_over.set()
        assert len(it.verdicts) > 50
        assert {each.kind for each in it.verdicts} == {Kind.HEALTHY}
        assert it.sidecar.service.recorder.incidents.all() == []
        assert sum(it.recorder.why.incidents.values()) == 0


async def _run(work: Callable[[Scene], Awaitable[None]], it: Scene) -> None:
    await work(it)
