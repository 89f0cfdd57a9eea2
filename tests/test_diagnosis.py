"""Why a query hangs: the log line and the figures while it does, with what PostgreSQL waits for."""

import asyncio
import json
import logging
import re
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any
from uuid import uuid4

import psycopg
import pytest

from sidecar.demo.postgres import EmbeddedPostgres
from sidecar.pool import diagnosis
from sidecar.pool.diagnosis import Diagnosis
from sidecar.work import SlowQuery
from tests.conftest import MakePostgres
from tests.debian_postgres import TlsPostgres
from tests.sidecar_process import (
    POLL,
    MakeService,
    ServiceHere,
    come_true,
    configuration,
    hang_up,
)

Connection = psycopg.AsyncConnection[Any]

THRESHOLD = 0.3  # s
SLOW: dict[str, Any] = {"slow_query_threshold": "300ms", "min_idle": 0, "max_size": 5}
"""Options of pool ``main``."""
SOON = 2.0
"""Seconds from crossing the threshold in which it has to be told."""


@pytest.fixture(autouse=True)
def name(monkeypatch: pytest.MonkeyPatch) -> None:
    """The diagnostic connection's ``application_name``, of this test alone."""
    assert diagnosis.APPLICATION == "pgsidecar diagnosis"  # as documented
    monkeypatch.setattr(diagnosis, "APPLICATION", f"diagnosis {uuid4().hex[:8]}")


@pytest.fixture
def table(postgres: EmbeddedPostgres) -> Iterator[str]:
    """Three rows, 1 to 3."""
    name = f"accounts_{uuid4().hex[:8]}"
    postgres.psql(f"CREATE TABLE {name} AS SELECT id, 0 AS x FROM generate_series(1, 3) id")
    yield name
    postgres.psql(f"DROP TABLE {name}")


@asynccontextmanager
async def client(dsn: str, application: str) -> AsyncIterator[Connection]:
    connection = await psycopg.AsyncConnection.connect(
        dsn, application_name=application, autocommit=True, prepare_threshold=None
    )
    try:
        yield connection
    except BaseException:
        hang_up(connection)  # where a query hangs: it has to let go of the socket first
        await asyncio.sleep(POLL)
        raise
    finally:
        await connection.close()


class Hanging:
    """A query that another one holds up, from now on."""

    def __init__(self, connection: Connection, sql: str) -> None:
        self.connection = connection
        self.began = time.time()
        self.task = asyncio.create_task(connection.execute(sql))

    async def end(self) -> None:
        await self.connection.cancel_safe()
        with pytest.raises(psycopg.errors.QueryCanceled):
            await self.task


class Log:
    """The lines on slow queries."""

    def __init__(self, caplog: pytest.LogCaptureFixture) -> None:
        self._caplog = caplog
        caplog.set_level(logging.INFO, "pgsidecar")

    def lines(self, application: str) -> list[dict[str, Any]]:
        """Of this application, so far."""
        records = [vars(each) for each in self._caplog.records if each.message == "slow query"]
        return [each for each in records if each["application"] == application]

    async def line(self, application: str) -> dict[str, Any]:
        """The one line of this application."""
        await come_true(lambda: self.lines(application), f"a line on {application}")
        (line,) = self.lines(application)
        assert line["levelname"] == "WARNING"
        return line


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Log:
    return Log(caplog)


async def away(postgres: EmbeddedPostgres, sql: str) -> None:
    """Run it in a thread: it may wait for what the sidecar, on this event loop, has to end."""
    await asyncio.to_thread(postgres.psql, sql)


def connections(postgres: EmbeddedPostgres) -> int:
    """The diagnostic ones that this server has."""
    where = f"application_name = '{diagnosis.APPLICATION}'"
    return int(postgres.psql(f"SELECT count(*) FROM pg_stat_activity WHERE {where}"))


def seen(sidecar: ServiceHere) -> list[SlowQuery]:
    return [slow for _, slow in sidecar.service.recorder.pools["main"].slow_queries]


def blocked(sidecar: ServiceHere) -> list[str]:
    """The applications at the roots of the chains, of all leases that wait for a lock."""
    found = sidecar.service.recorder.pools["main"].blocked.values()
    return [each.holder.who.application if each.holder else each.application for each in found]


def look_of(sidecar: ServiceHere) -> Diagnosis:
    return sidecar.service.directory._diagnoses["main"]


# -- chains ------------------------------------------------------------------------------------


async def test_a_chain_is_told_while_it_hangs_with_its_applications_and_statements(
    postgres: EmbeddedPostgres, make_service: MakeService, table: str, log: Log
) -> None:
    """The web waits for shipping, which waits for billing, which has forgotten to commit."""
    sidecar = await make_service(postgres.dsn(), **SLOW)
    async with AsyncExitStack() as stack:
        billing, shipping, web = [
            await stack.enter_async_context(client(sidecar.dsn(), name))
            for name in ("billing", "shipping", "web")
        ]
        await billing.execute("BEGIN")
        await billing.execute(f"UPDATE {table} SET x = 4711 WHERE id = 1")
        await shipping.execute("BEGIN")
        await shipping.execute(f"UPDATE {table} SET x = 4712 WHERE id = 2")
        second = Hanging(shipping, f"UPDATE {table} SET x = 4713 WHERE id = 1")
        third = Hanging(web, f"UPDATE {table} SET x = 4714 WHERE id = 2")
        line, between = await log.line("web"), await log.line("shipping")
        assert not third.task.done()
        assert line["created"] - third.began - THRESHOLD < SOON

        assert (line["pool"], line["user"], line["wait_event"]) == (
            "main",
            "app",
            "Lock:transactionid",
        )
        assert line["query"] == f"UPDATE {table} SET x = $1 WHERE id = $2"
        assert THRESHOLD <= line["age"] < THRESHOLD + SOON
        assert re.fullmatch(r"127\.0\.0\.1:\d+", line["client"])
        (row,) = [s for s in sidecar.pool.state.active if s.pid == line["backend_pid"]]
        assert row.receiver is not None
        assert row.receiver.who().application == "web"
        near, far = line["blocked_by"].split(" <- ")
        text = rf"[0-9a-f]{{16}}: UPDATE {table} SET x = \$1 WHERE id = \$2"
        assert re.fullmatch(
            rf'pid \d+ application="shipping" user=app 127\.0\.0\.1:\d+ running for [\d.]+ s,'
            rf" statement {text}",
            near,
        )
        assert re.fullmatch(
            rf'pid \d+ application="billing" user=app 127\.0\.0\.1:\d+ idle in transaction for'
            rf" [\d.]+ s, last statement {text}",
            far,
        )
        assert between["blocked_by"] == re.sub(
            r"for [\d.]+ s", re.findall(r"for [\d.]+ s", between["blocked_by"])[0], far
        )
        assert not {"cause", "hint", "trace_id"} & line.keys()
        assert "471" not in str([vars(each) for each in log._caplog.records])

        slow = next(each for each in seen(sidecar) if each.holder.who.application == "web")
        nearest, root = slow.blockers
        assert nearest.waits_for == (root.backend_pid,)
        assert (root.waits_for, root.state, root.is_ours) == ((), "idle in transaction", True)
        assert root.holder is not None
        assert root.holder.who.application == "billing"
        assert root.holder.statement is not None
        assert root.holder.statement.calls > 0
        assert blocked(sidecar) == ["billing", "billing"]
        assert connections(postgres) == 1

        await billing.execute("ROLLBACK")
        await second.task
        await come_true(lambda: blocked(sidecar) == ["shipping"], "one of them goes on")
        await shipping.execute("ROLLBACK")
        await third.task
        await come_true(lambda: blocked(sidecar) == [], "nobody waits")
    assert len(log.lines("web")) == len(log.lines("shipping")) == 1


async def test_who_is_not_of_this_sidecar_is_told_as_the_server_knows_it(
    postgres: EmbeddedPostgres, make_service: MakeService, table: str, log: Log
) -> None:
    """Its text has literals, which nobody reads."""
    sidecar = await make_service(postgres.dsn(), **SLOW)
    async with (
        client(postgres.dsn(), 'a "nightly" job') as stranger,
        client(sidecar.dsn(), "web") as web,
    ):
        await stranger.execute("BEGIN")
        await stranger.execute(f"UPDATE {table} SET x = 4711 WHERE id = 1")
        hanging = Hanging(web, f"DELETE FROM {table} WHERE id = 1")
        line = await log.line("web")
        assert re.fullmatch(
            rf'pid {stranger.info.backend_pid} application="a \\"nightly\\" job" user=postgres'
            r" 127\.0\.0\.1:\d+, not of this sidecar, idle in transaction for [\d.]+ s",
            line["blocked_by"],
        )
        (slow,) = seen(sidecar)
        assert (slow.blockers[0].is_ours, slow.blockers[0].holder) == (False, None)
        assert blocked(sidecar) == ['a "nightly" job']
        await hanging.end()
    assert "4711" not in str([vars(each) for each in log._caplog.records])


async def test_advisory_lock_whose_holder_is_in_another_pool(
    postgres: EmbeddedPostgres, log: Log
) -> None:
    """Pools that go to one server know each other's clients."""
    text = json.loads(configuration(postgres.dsn(), **SLOW))
    text["pools"]["direct"] = {"dsn": postgres.dsn(), "max_size": 1, "mode": "session"}
    key = int(uuid4().hex[:8], 16)
    async with AsyncExitStack() as stack:
        sidecar = await ServiceHere.start(json.dumps(text))
        stack.push_async_callback(sidecar.stop)
        cron = await stack.enter_async_context(client(sidecar.dsn(database="direct"), "cron"))
        web = await stack.enter_async_context(client(sidecar.dsn(), "web"))
        await cron.execute(f"SELECT pg_advisory_lock({key})")
        hanging = Hanging(web, f"SELECT pg_advisory_lock({key})")
        line = await log.line("web")
        assert line["wait_event"] == "Lock:advisory"
        assert re.fullmatch(
            r'pid \d+ application="cron" user=app 127\.0\.0\.1:\d+ pool=direct idle for [\d.]+ s,'
            r" last statement [0-9a-f]{16}: SELECT pg_advisory_lock\(\$1\)",
            line["blocked_by"],
        )
        await hanging.end()


async def test_prepared_transaction_is_a_blocker_without_a_backend(
    own_postgres: MakePostgres, make_service: MakeService, log: Log
) -> None:
    server = own_postgres(settings={"max_prepared_transactions": "2"})
    server.psql("CREATE TABLE t (x int); BEGIN; LOCK t; PREPARE TRANSACTION 'left'")
    sidecar = await make_service(server.dsn(), **SLOW)
    async with client(sidecar.dsn(), "web") as web:
        hanging = Hanging(web, "SELECT * FROM t")
        line = await log.line("web")
        assert line["wait_event"] == "Lock:relation"
        assert line["blocked_by"] == "a prepared transaction (pg_prepared_xacts)"
        await hanging.end()
    server.psql("ROLLBACK PREPARED 'left'")


async def test_long_queue_for_one_lock_costs_one_look(
    postgres: EmbeddedPostgres, make_service: MakeService, table: str, log: Log
) -> None:
    """Each of twenty waits for all before it: everyone's chain ends with who has the lock."""
    sidecar = await make_service(postgres.dsn(), **SLOW | {"max_size": 22})
    async with AsyncExitStack() as stack:
        holder = await stack.enter_async_context(client(sidecar.dsn(), "holder"))
        await holder.execute("BEGIN")
        await holder.execute(f"LOCK {table}")
        waiting = [
            await stack.enter_async_context(client(sidecar.dsn(), f"w{n}")) for n in range(20)
        ]
        tasks = [Hanging(each, f"SELECT * FROM {table}").task for each in waiting]
        await come_true(lambda: len(seen(sidecar)) == 20, "all are told")
        await come_true(lambda: blocked(sidecar) == ["holder"] * 20, "all wait for one")
        assert all(not slow.cause and len(slow.blockers) <= 20 for slow in seen(sidecar))
        assert connections(postgres) == 1
        await holder.execute("COMMIT")
        await asyncio.gather(*tasks)


# -- slow without a lock -----------------------------------------------------------------------


async def test_what_waits_for_no_lock_has_no_blockers(
    postgres: EmbeddedPostgres, make_service: MakeService, log: Log
) -> None:
    sidecar = await make_service(postgres.dsn(), **SLOW)
    async with client(sidecar.dsn(), "sleeper") as one, client(sidecar.dsn(), "busy") as two:
        sleeping = Hanging(one, "SELECT pg_sleep(60)")
        computing = Hanging(two, "SELECT count(*) FROM (SELECT generate_series(1, 10000000000)) n")
        line = await log.line("sleeper")
        assert (line["wait_event"], line["query"]) == ("Timeout:PgSleep", "SELECT pg_sleep($1)")
        assert not {"blocked_by", "cause"} & line.keys()
        line = await log.line("busy")
        assert line["wait_event"] == ""
        assert not {"blocked_by", "cause"} & line.keys()
        await sleeping.end()
        await computing.end()
    assert blocked(sidecar) == []


async def test_hung_query_is_visible_at_the_next_scrape(
    postgres: EmbeddedPostgres, make_service: MakeService, log: Log
) -> None:
    """Not when it is over: as the oldest running one, and as a slow one when it crosses."""
    sidecar = await make_service(postgres.dsn(), **SLOW)
    async with client(sidecar.dsn(), "web") as web, client(sidecar.dsn(), "idler") as idler:
        await idler.execute("BEGIN")
        began = time.monotonic()
        hanging = Hanging(web, "SELECT pg_sleep(60)")
        while not (
            age := await sidecar.value("pgsidecar_longest_running_query_seconds", pool="main")
        ):
            assert time.monotonic() - began < THRESHOLD + SOON
        assert 0 < age <= time.monotonic() - began
        slow = {"pool": "main", "operation": "select"}
        metrics = await sidecar.until(
            lambda now: now.value("pgsidecar_slow_queries_total", **slow) == 1, THRESHOLD + SOON
        )
        age = metrics.value("pgsidecar_longest_running_query_seconds", pool="main")
        assert THRESHOLD <= age <= time.monotonic() - began
        idle = metrics.value("pgsidecar_longest_idle_in_transaction_seconds", pool="main")
        assert age <= idle
        assert not hanging.task.done()
        await hanging.end()
        metrics = await sidecar.metrics()
        assert metrics.value("pgsidecar_longest_running_query_seconds", pool="main") == 0
        assert metrics.value("pgsidecar_slow_queries_total", **slow) == 1


async def test_trace_context_of_the_query_is_in_the_line(
    postgres: EmbeddedPostgres, make_service: MakeService, log: Log
) -> None:
    trace = "0af7651916cd43dd8448eb211c80319c"
    sidecar = await make_service(postgres.dsn(), **SLOW)
    async with client(sidecar.dsn(), "web") as web:
        comment = f"/*traceparent='00-{trace}-b7ad6b7169203331-01'*/"
        hanging = Hanging(web, f"SELECT pg_sleep(60) {comment}")
        line = await log.line("web")
        assert (line["trace_id"], line["query"]) == (trace, "SELECT pg_sleep($1)")
        await hanging.end()


async def test_sidecar_stops_amid_a_look(
    own_postgres: MakePostgres, make_service: MakeService
) -> None:
    """Nothing is left behind, and nobody waits for the answer."""
    server = own_postgres()
    sidecar = await make_service(server.dsn(), **SLOW)
    await sidecar.until_pinged()  # one amid a ping would not be to be had for the query
    async with client(sidecar.dsn(), "web") as web:
        await web.execute("SELECT 1")
        server.pause()
        try:
            task = asyncio.create_task(web.execute("SELECT 2"))
            await come_true(lambda: look_of(sidecar)._is_busy, "it is asked")
            await sidecar.stop()
            with pytest.raises(psycopg.OperationalError):
                await task
        finally:
            server.resume()
    assert not look_of(sidecar).sideline.is_open


# -- what keeps us from asking -----------------------------------------------------------------


async def test_server_that_does_not_answer_is_the_cause(
    own_postgres: MakePostgres, make_service: MakeService, log: Log
) -> None:
    """And nothing waits for it: neither line nor scrape."""
    server = own_postgres()
    sidecar = await make_service(server.dsn(), **SLOW)
    async with client(sidecar.dsn(), "web") as web, client(sidecar.dsn(), "second") as second:
        await web.execute("BEGIN")
        await second.execute("BEGIN")
        server.pause()
        try:
            hanging = Hanging(web, "SELECT 2")
            line = await log.line("web")
            assert line["created"] - hanging.began - THRESHOLD < SOON
            assert line["cause"] == "no answer in time"
            assert (line["wait_event"], line["query"]) == ("", "SELECT $1")
            # whoever is next need not wait for another attempt
            another = Hanging(second, "SELECT 3")
            assert (await log.line("second"))["cause"] == "no answer in time"
            await sidecar.metrics()
        finally:
            server.resume()
        await hanging.task
        await another.task
        stuck = Hanging(web, "SELECT pg_sleep(60)")
        await come_true(lambda: len(log.lines("web")) == 2, "it is asked again")
        await stuck.end()


async def test_server_without_room_is_the_cause(
    postgres: EmbeddedPostgres, make_service: MakeService, log: Log
) -> None:
    role = f"few_{uuid4().hex[:8]}"
    postgres.psql(f"CREATE ROLE {role} LOGIN CONNECTION LIMIT 1")
    try:
        sidecar = await make_service(postgres.dsn(user=role), **SLOW)
        async with client(sidecar.dsn(), "web") as web:
            hanging = Hanging(web, "SELECT pg_sleep(60)")
            assert (await log.line("web"))["cause"] == f'too many connections for role "{role}"'
            await hanging.end()
        await sidecar.stop()
    finally:
        await away(postgres, f"DROP ROLE {role}")


async def test_what_the_server_hides_is_said_to_be_hidden(
    postgres: EmbeddedPostgres, make_service: MakeService, table: str, log: Log
) -> None:
    """Backends of other roles take pg_monitor, or pg_read_all_stats."""
    role = f"plain_{uuid4().hex[:8]}"
    postgres.psql(f"CREATE ROLE {role} LOGIN; GRANT ALL ON {table} TO {role}")
    try:
        sidecar = await make_service(postgres.dsn(user=role), **SLOW)
        async with (
            client(postgres.dsn(), "stranger") as stranger,
            client(sidecar.dsn(), "web") as web,
        ):
            await stranger.execute("BEGIN")
            await stranger.execute(f"LOCK {table}")
            hanging = Hanging(web, f"SELECT * FROM {table}")
            line = await log.line("web")
            assert line["wait_event"] == "Lock:relation"  # our own
            assert line["blocked_by"] == (
                f'pid {stranger.info.backend_pid} application="stranger" user=postgres, not of this'
                " sidecar, state not told"
            )
            assert line["hint"] == f"to be told more: GRANT pg_monitor TO {role}"
            (slow,) = seen(sidecar)
            assert (slow.blockers[0].state, slow.cause) == ("", "")
            await hanging.end()
        await sidecar.stop()
    finally:
        await away(postgres, f"DROP OWNED BY {role}; DROP ROLE {role}")


async def test_diagnosis_that_is_off_costs_no_connection_but_the_line_is_there(
    postgres: EmbeddedPostgres, make_service: MakeService, table: str, log: Log
) -> None:
    sidecar = await make_service(postgres.dsn(), diagnose=False, **SLOW)
    async with client(sidecar.dsn(), "billing") as billing, client(sidecar.dsn(), "web") as web:
        await billing.execute("BEGIN")
        await billing.execute(f"LOCK {table}")
        hanging = Hanging(web, f"SELECT * FROM {table}")
        line = await log.line("web")
        assert line["cause"] == "the pool has diagnose: false"
        assert line["query"] == f"SELECT * FROM {table}"
        assert not look_of(sidecar).sideline.is_open
        assert [slow.cause for slow in seen(sidecar)] == ["the pool has diagnose: false"]
        await hanging.end()


# -- the connection ----------------------------------------------------------------------------


async def test_pool_that_is_exhausted_by_a_lock_knows_whose_it_is(
    postgres: EmbeddedPostgres, make_service: MakeService, table: str, log: Log
) -> None:
    """Nothing is slow yet; but clients wait for those who wait. The pool is full all the while."""
    sidecar = await make_service(postgres.dsn(), max_size=2, min_idle=0)
    async with AsyncExitStack() as stack:
        billing, web, late = [
            await stack.enter_async_context(client(sidecar.dsn(), name))
            for name in ("billing", "web", "late")
        ]
        await billing.execute("BEGIN")
        await billing.execute(f"LOCK {table}")
        hanging = Hanging(web, f"SELECT * FROM {table}")
        waiting = Hanging(late, "SELECT 1")
        await come_true(lambda: blocked(sidecar) == ["billing"], "the root is known", within=3)
        assert sidecar.pool.state.size == 2
        assert connections(postgres) == 1
        await billing.execute("COMMIT")
        await hanging.task
        await waiting.task
        await come_true(lambda: blocked(sidecar) == [], "nobody waits")
    assert seen(sidecar) == []
    assert not log.lines("web")


async def test_the_connection_is_closed_when_nobody_asks(
    postgres: EmbeddedPostgres,
    make_service: MakeService,
    log: Log,
) -> None:
    sidecar = await make_service(postgres.dsn(), **SLOW)
    look_of(sidecar).sideline.idle = 0.3
    async with client(sidecar.dsn(), "web") as web:
        hanging = Hanging(web, "SELECT pg_sleep(60)")
        await log.line("web")
        assert connections(postgres) == 1
        await hanging.end()
        await come_true(lambda: connections(postgres) == 0, "it is closed")
        assert not look_of(sidecar).sideline.is_open
        hanging = Hanging(web, "SELECT pg_sleep(60)")  # and opened again
        await come_true(lambda: len(log.lines("web")) == 2, "it is asked again")
        assert "cause" not in log.lines("web")[1]
        await hanging.end()


async def test_the_connection_ends_with_a_pause_and_with_the_sidecar(
    postgres: EmbeddedPostgres,
    make_service: MakeService,
    log: Log,
) -> None:
    """Whoever pauses a pool wants the server to have no connections of it."""
    sidecar = await make_service(postgres.dsn(), **SLOW)
    async with client(sidecar.dsn(), "web") as web:
        hanging = Hanging(web, "SELECT pg_sleep(60)")
        await log.line("web")
        sidecar.pool.opener.is_paused = True
        await come_true(lambda: connections(postgres) == 0, "it is closed")
        sidecar.pool.opener.is_paused = False
        await hanging.end()
        hanging = Hanging(web, "SELECT pg_sleep(60)")
        await come_true(lambda: len(log.lines("web")) == 2, "it is asked again")
        assert connections(postgres) == 1
        await hanging.end()
    await sidecar.stop()
    await come_true(lambda: connections(postgres) == 0, "it is closed")


async def test_server_with_tls_is_asked_over_tls(
    tls_postgres: TlsPostgres, make_service: MakeService, log: Log
) -> None:
    """As the pool logs in: certificate checked against the name, SCRAM."""
    dsn = tls_postgres.dsn(
        host="localhost",
        user="encrypted",
        password=tls_postgres.password,
        sslmode="verify-full",
        sslrootcert=str(tls_postgres.root),
    )
    sidecar = await make_service(dsn, **SLOW)
    async with client(sidecar.dsn(), "web") as web:
        hanging = Hanging(web, "SELECT pg_sleep(60)")
        line = await log.line("web")
        assert "cause" not in line
        assert line["wait_event"] == "Timeout:PgSleep"
        ((is_encrypted, version),) = tls_postgres.encryption_of(diagnosis.APPLICATION)
        assert is_encrypted
        assert version
        await hanging.end()


async def test_pools_of_a_template_are_looked_at_by_their_own_users(
    postgres: EmbeddedPostgres, table: str, log: Log
) -> None:
    """And a holder in one pool is known to who waits in another."""
    roles = [f"tenant_{uuid4().hex[:8]}" for _ in range(2)]
    for role in roles:
        postgres.psql(f"CREATE ROLE {role} LOGIN; GRANT ALL ON {table} TO {role}")
    try:
        text = json.loads(configuration(postgres.dsn(), **SLOW))
        server = f"postgresql://127.0.0.1:{postgres.port}"
        text["pools"]["*"] = {"dsn": server, "slow_query_threshold": "300ms"}
        sidecar = await ServiceHere.start(json.dumps(text))
        async with AsyncExitStack() as stack:
            stack.push_async_callback(sidecar.stop)
            first, second, third = [
                await stack.enter_async_context(client(sidecar.dsn(role, "postgres"), application))
                for role, application in zip(
                    (*roles, roles[1]), ("holder", "web", "sleeper"), strict=True
                )
            ]
            await first.execute("BEGIN")
            await first.execute(f"LOCK {table}")
            hanging = Hanging(second, f"SELECT * FROM {table}")
            sleeping = Hanging(third, "SELECT pg_sleep(60)")
            line = await log.line("web")
            assert line["wait_event"] == "Lock:relation"
            assert f'application="holder" user={roles[0]}' in line["blocked_by"]
            assert (await log.line("sleeper"))["wait_event"] == "Timeout:PgSleep"
            assert connections(postgres) == 1
            await hanging.end()
            await sleeping.end()
    finally:
        for role in roles:
            await away(postgres, f"DROP OWNED BY {role}; DROP ROLE {role}")
