"""From the cause to the pager, with nothing between them that is not real.

PostgreSQL, sidecars, their clients, Prometheus with the shipped rules, Alertmanager with the shipped routes and
inhibitions, a webhook: each trouble is made, its alert has to arrive at the right receiver with a true
text, its symptoms have to be mute, and it has to be resolved once the trouble is over. Durations of rules
and routes are divided by ``FACTOR``, thresholds are as shipped.

One test, since they all share the processes and most of their time is waiting: each trouble has a sidecar
of its own, and beside them one is well and must page nobody for as long.
"""

import asyncio
import os
import random
import re
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import AsyncConnection

from deploy.observe.processes import Server, alertmanager, free_port, prometheus
from deploy.observe.quick import quick_routes, quick_rules
from deploy.observe.receiver import Page, Receiver
from sidecar.demo.postgres import EmbeddedPostgres
from tests.conftest import MakePostgres
from tests.sidecar_process import SidecarProcess, come_true, configuration

ROOT = Path(__file__).parent.parent
FACTOR = 20.0
ARRIVES = 40.0  # seconds; 2 to 12 on an idle machine
IS_OVER = 40.0


@dataclass
class Scene:
    """A sidecar with its clients, and what is known of it at the other end."""

    sidecar: SidecarProcess
    postgres: EmbeddedPostgres
    alertmanager: Server
    receiver: Receiver
    folder: Path
    options: dict[str, object]

    def close(self) -> None:
        self.sidecar.close()

    @property
    def instance(self) -> str:
        return f"127.0.0.1:{self.sidecar.http_port}"

    def alerts(self, name: str) -> list[dict[str, Any]]:
        """As Alertmanager has them."""
        found = self.alertmanager.get("/api/v2/alerts", filter=f'alertname="{name}"') or []
        return [each for each in found if each["labels"]["instance"] == self.instance]

    def pages(self) -> list[Page]:
        return [
            page for page in list(self.receiver.pages) if page.labels["instance"] == self.instance
        ]

    async def page(self, alert: str, status: str, within: float, since: float = 0.0) -> Page:
        """The first one since that instant (``time.monotonic``)."""

        def look() -> Page | None:
            for page in self.pages():
                if (page.alert, page.status) == (alert, status) and page.at >= since:
                    return page
            return None

        try:
            return await come_true(look, f"{alert} {status} of {self.instance}", within)
        except AssertionError as exc:
            exc.add_note(f"arrived: {[(p.alert, p.status) for p in self.pages()]}")
            raise

    async def muted(self, symptom: str, cause: str) -> None:
        """Alertmanager knows of the symptom, and says that this cause inhibits it."""

        def look() -> bool:
            causes = {each["fingerprint"] for each in self.alerts(cause)}
            return any(causes & {*each["status"]["inhibitedBy"]} for each in self.alerts(symptom))

        await come_true(look, f"{symptom} is muted by {cause}", ARRIVES)

    async def connect(self, application: str) -> AsyncConnection[tuple[object, ...]]:
        dsn = self.sidecar.dsn(application_name=application, connect_timeout=10)
        return await AsyncConnection.connect(dsn, autocommit=True)

    @asynccontextmanager
    async def transactions(self, count: int, application: str) -> AsyncIterator[None]:
        """So many are left open."""
        async with AsyncExitStack() as stack:
            for _ in range(count):
                conn = await self.connect(application)
                await stack.enter_async_context(conn)
                await conn.execute("BEGIN")
            yield

    @asynccontextmanager
    async def clients(self, count: int, sql: str, application: str) -> AsyncIterator[None]:
        """So many ask the same again and again, whatever the answer."""

        async def ask() -> None:
            while True:
                try:
                    async with await self.connect(application) as conn:
                        while True:
                            await conn.execute(sql.encode())
                            await asyncio.sleep(0.05)
                except psycopg.Error:
                    await asyncio.sleep(0.1)

        tasks = [asyncio.create_task(ask()) for _ in range(count)]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


# -- the troubles ----------------------------------------------------------------------------------


@asynccontextmanager
async def pool_at_80_percent(it: Scene) -> AsyncIterator[None]:
    async with it.transactions(20, "billing-worker"):
        yield


@asynccontextmanager
async def pool_exhausted(it: Scene) -> AsyncIterator[None]:
    async with it.transactions(4, "billing-worker"), it.clients(3, "SELECT 1", "web"):
        yield


@asynccontextmanager
async def slow_query(it: Scene) -> AsyncIterator[None]:
    async with it.clients(1, "SELECT pg_sleep(6)", "reporting"):
        await it.page("PgSidecarSlowQueries", "firing", ARRIVES)
        yield


@asynccontextmanager
async def most_queries_slow(it: Scene) -> AsyncIterator[None]:
    """P99 over 5 minutes: it comes down as soon as there are enough fast ones among them."""
    async with await it.connect("web") as conn:
        for _ in range(20):
            await conn.execute("SELECT 1")
        async with it.clients(2, "SELECT pg_sleep(5.2)", "reporting"):
            await it.page("PgSidecarQueryLatencyP99High", "firing", ARRIVES)
        yield
        for _ in range(2000):
            await conn.execute("SELECT 1")


@asynccontextmanager
async def backends_hang(it: Scene) -> AsyncIterator[None]:
    """Every now and then one, when it is pinged; most requests are served."""

    async def stop_some() -> None:
        idle = (
            "SELECT pid FROM pg_stat_activity WHERE application_name = 'hangs' AND state = 'idle'"
        )
        while True:
            found = await asyncio.to_thread(it.postgres.psql, f"{idle} ORDER BY random() LIMIT 2")
            pids = [int(pid) for pid in found.split()]
            for pid in pids:
                os.kill(pid, signal.SIGSTOP)
            try:
                await asyncio.sleep(0.6)
            finally:
                for pid in pids:
                    os.kill(pid, signal.SIGCONT)

    # an idle connection is told by the application that had it last: each has to be used once
    async with it.transactions(5, "hangs"):
        pass
    async with it.clients(1, "SELECT 1", "hangs"):
        task = asyncio.create_task(stop_some())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


@asynccontextmanager
async def database_down(it: Scene) -> AsyncIterator[None]:
    async with it.clients(3, "SELECT 1", "web"):
        await asyncio.sleep(1)
        await asyncio.to_thread(it.postgres.kill)
        yield
        await asyncio.to_thread(it.postgres.restart)


@asynccontextmanager
async def leak(it: Scene) -> AsyncIterator[None]:
    async with it.transactions(1, "billing-worker"):
        yield


@asynccontextmanager
async def sidecar_down(it: Scene) -> AsyncIterator[None]:
    """Killed; and started again on the same port for HTTP, else it would be another instance."""
    it.sidecar.process.kill()
    it.sidecar.process.wait()
    yield
    text = configuration(it.postgres.dsn(), http={"port": it.sidecar.http_port}, **it.options)  # type: ignore[arg-type]  # passed on
    it.sidecar = await asyncio.to_thread(SidecarProcess.start, text, it.folder)


@dataclass(frozen=True)
class Trouble:
    """What is done, and what has to arrive: the alert, at which receiver, with which text."""

    make: Callable[[Scene], AbstractAsyncContextManager[None]]
    alert: str
    receiver: str
    text: str
    """A regular expression that the whole description has to match."""
    muted: tuple[str, ...] = ()
    also: frozenset[str] = frozenset()
    """Further alerts that may arrive, since they are as true."""
    options: dict[str, object] = field(default_factory=dict)
    has_own_server: bool = False


FIRST_STEP = r"First step: pgsidecar why --pool main, on 127\.0\.0\.1:\d+\."

BUSY = "PgSidecarEventLoopLag"
"""May arrive from anywhere, and be true: the machine has other tests to run."""
BUDGETS = frozenset({"PgSidecarErrorBudgetBurnFast", "PgSidecarErrorBudgetBurnSlow"})
"""True of errors once the sidecar has run for half an hour: here 90 s, for which it takes a slow machine."""

TROUBLES = [
    Trouble(
        pool_at_80_percent,
        "PgSidecarPoolNearExhaustion",
        "pager",
        r"Pool main on 127\.0\.0\.1:\d+ is 8[04]% used: 2[01] of 25 connections, clients waiting: 0\."
        rf" Most are held by billing-worker \(20\)\. {FIRST_STEP}",
    ),
    Trouble(
        pool_exhausted,
        "PgSidecarPoolExhausted",
        "pager",
        r"Pool main on 127\.0\.0\.1:\d+ is exhausted: 4 of 4 connections are in use, clients waiting: [1-3],"
        r" the first for [\d.]+m?s\. Most are held by billing-worker \(4\)\. (Verdict: leak\. )?"
        + FIRST_STEP,
        muted=("PgSidecarPoolNearExhaustion",),
        options={"max_size": 4},
    ),
    Trouble(
        slow_query,
        "PgSidecarSlowQueries",
        "chat",
        r"Queries of pool main on 127\.0\.0\.1:\d+ that have reached 5s in the last 5 minutes: [1-9]\.( The oldest"
        r" that runs now has run for [\d.]+m?s\.)? (The slowest statement that has ended: .* \([0-9a-f]{16}\)\. )?"
        r"First step: SHOW SLOW at the console of 127\.0\.0\.1:\d+ says what they waited for\.",
    ),
    Trouble(
        most_queries_slow,
        "PgSidecarQueryLatencyP99High",
        "pager",
        r"The P99 of the queries of pool main on 127\.0\.0\.1:\d+ is \d+\.\d+s over 5 minutes; \d of 25"
        r" connections are in use, clients waiting: 0\."
        r" (Most are held by reporting \(\d\)\. )?The slowest statement: SELECT pg_sleep\(\$1\)"
        rf" \([0-9a-f]{{16}}\)\. {FIRST_STEP}",
        muted=("PgSidecarSlowQueries",),
        also=frozenset({"PgSidecarSlowQueries"}),  # the first one crossed the threshold before
    ),
    Trouble(
        backends_hang,
        "PgSidecarConnectionErrorRateHigh",
        "pager",
        r"[\d.]+% of the attempts to get a connection from pool main on 127\.0\.0\.1:\d+ have failed in the"
        r" last 5 minutes, most in phase ping with timeout\. \d+ of 25 connections are in use, clients"
        rf" waiting: \d\. (Most are held by hangs \(\d\)\. )?{FIRST_STEP}",
        also=BUDGETS,
        options={"ping_interval": "300ms", "ping_timeout": "200ms"},
    ),
    Trouble(
        database_down,
        "PgSidecarDatabaseDown",
        "pager",
        r"Pool main on 127\.0\.0\.1:\d+ cannot use PostgreSQL at 127\.0\.0\.1:\d+; the last good ping was"
        r" [\d.]+m?s ago; most attempts fail in phase \w+ with \w+\."
        r" \d+ of 25 connections are in use, clients waiting: \d+\."
        r" First step: does psql reach that server from there\? The pool comes back by itself\.",
        muted=("PgSidecarAcquireTimeouts", "PgSidecarConnectionErrorRateHigh"),
        also=BUDGETS,
        options={"ping_interval": "300ms", "acquire_timeout": "500ms"},
        has_own_server=True,
    ),
    Trouble(
        leak,
        "PgSidecarConnectionLeak",
        "chat",
        r"Connections of pool main on 127\.0\.0\.1:\d+ held for longer than leak_threshold: 1 of 25\."
        r" Most connections are held by billing-worker \(1\)\. First step: SHOW LEAKS at the console of"
        r" 127\.0\.0\.1:\d+ names client and statement\.",
        options={"leak_threshold": "1s"},
    ),
    Trouble(
        sidecar_down,
        "PgSidecarDown",
        "pager",
        r"Sidecar 127\.0\.0\.1:\d+ has not answered a scrape for a minute: its clients have probably no"
        r" database, and nobody watches its pools\. First step: is its process or container there, and"
        r" what was the last it logged\?",
    ),
]


async def play(trouble: Trouble, it: Scene) -> None:
    async with trouble.make(it):
        page = await it.page(trouble.alert, "firing", ARRIVES)
        for symptom in trouble.muted:
            await it.muted(symptom, trouble.alert)
        over = time.monotonic()
    await it.page(trouble.alert, "resolved", IS_OVER, over)

    assert page.receiver == trouble.receiver
    severity = {"pager": "critical", "chat": "warning"}[page.receiver]
    assert page.labels["severity"] == severity
    assert re.fullmatch(trouble.text, page.annotations["description"]), page.annotations
    assert page.annotations["runbook_url"].endswith(f"/{trouble.alert}.md")
    others = {page.alert for page in it.pages()} - {trouble.alert, BUSY}
    assert others <= trouble.also, others


@pytest.mark.timeout(180)
async def test_each_trouble_pages_the_right_person_and_health_pages_nobody(
    own_postgres: MakePostgres, tmp_path: Path
) -> None:
    server = own_postgres(settings={"max_connections": "300"})
    receiver = Receiver()
    async with AsyncExitStack() as stack:
        stack.enter_context(receiver.running())
        alerts = stack.enter_context(alertmanager(tmp_path, routes(receiver)))
        scenes = []
        for number, trouble in enumerate([*TROUBLES, None]):
            folder = tmp_path / str(number)
            folder.mkdir()
            options = {} if trouble is None else trouble.options
            own = trouble is not None and trouble.has_own_server
            of = own_postgres() if own else server
            # a port that stays free while nobody listens: the kernel gives none of these to anybody
            http = {"port": free_port(random.randrange(20_000, 32_000))}
            sidecar = SidecarProcess.start(configuration(of.dsn(), http=http, **options), folder)  # type: ignore[arg-type]  # passed on
            scenes.append(Scene(sidecar, of, alerts, receiver, folder, options))
            stack.callback(scenes[-1].close)
        *troubled, well = scenes
        targets = [it.instance for it in scenes]
        rules = quick_rules((ROOT / "alerts/pgsidecar.rules.yml").read_text(), FACTOR)
        watching = stack.enter_context(
            prometheus(tmp_path, targets, rules=rules, alertmanager=alerts.url, every="500ms")
        )
        stack.callback(lambda: print(receiver.pages))
        await come_true(
            lambda: watching.value("sum(pgsidecar_up)") == len(scenes) or None, "all up"
        )
        async with well.clients(4, "SELECT 1", "web"), well.transactions(2, "web"):
            ends = await asyncio.gather(
                *(play(trouble, it) for trouble, it in zip(TROUBLES, troubled, strict=True)),
                return_exceptions=True,
            )
        broken = [end for end in ends if isinstance(end, Exception)]
        if broken:
            raise ExceptionGroup("troubles", broken)
        assert [page for page in well.pages() if page.alert != BUSY] == []
        ever = f'count_over_time(ALERTS{{instance="{well.instance}",alertname!="{BUSY}"}}[10m])'
        assert watching.query(ever) == []


def routes(receiver: Receiver) -> str:
    text = (ROOT / "alerts/alertmanager.example.yml").read_text()
    return quick_routes(text, FACTOR, {name: receiver.url(name) for name in ("pager", "chat")})
