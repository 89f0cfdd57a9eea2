"""What the JSON API says of leaks, errors, blame, incidents and verdicts, while there are some."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import psycopg
import pytest

from sidecar.demo.postgres import EmbeddedPostgres
from tests.api_client import Api, Clients
from tests.contract import is_a
from tests.sidecar_process import PATIENCE, MakeService, ServiceHere


@pytest.fixture
async def sidecar(make_service: MakeService, postgres: EmbeddedPostgres) -> ServiceHere:
    """Two connections; a lease of half a second is a leak."""
    return await make_service(
        postgres.dsn(), max_size=2, min_idle=1, leak_threshold="500ms", slow_query_threshold="300ms"
    )


@pytest.fixture
async def api(sidecar: ServiceHere) -> AsyncIterator[Api]:
    async with Api.of(sidecar) as client:
        yield client


@pytest.fixture
async def clients(sidecar: ServiceHere) -> AsyncIterator[Clients]:
    async with AsyncExitStack() as stack:
        yield Clients(sidecar, stack)


async def test_a_leak_is_told_while_it_lasts(api, clients):
    conn = await clients.holding("forgetful", "select 'secret'")
    async with api.events() as events:
        (leak,) = await api.until("/leaks", 1)
        assert leak["who"]["application"] == "forgetful"
        assert leak["threshold_seconds"] == 0.5
        assert leak["held_seconds"] >= 0.5
        assert leak["is_leak"]
        (holder,) = await api.items("/holders")
        assert holder["is_leak"]
        (pool,) = await api.items("/pools")
        assert pool["leaked"] == 1
        began = await events.next("leak_began")
        is_a("Holder", began)
        assert began["server"] == leak["server"]

        await conn.execute("commit")
        await api.until("/leaks", 0)
        ended = await events.next("leak_ended")
        is_a("Holder", ended)
        assert ended["server"] == leak["server"]
    assert (await api.get("/pools/main"))["totals"]["leaks_total"] == 1


async def test_errors_are_told_by_application_and_statement(api, clients):
    conn = await clients.connect("web")
    for number in (41, 42):
        with pytest.raises(psycopg.errors.DivisionByZero):
            await conn.execute(f"select {number}/0")
    with pytest.raises(psycopg.errors.UndefinedTable):
        await conn.execute("select * from nowhere")

    later, first = await api.items("/errors")
    assert (first["origin"], first["sqlstate"], first["application"]) == ("server", "22012", "web")
    assert first["errors_total"] == 2
    assert first["first_at"] <= first["last_at"] <= later["last_at"]
    assert first["statement"]["operation"] == "select"
    assert "42" not in first["statement"]["text"]
    assert later["sqlstate"] == "42P01"


async def test_waiting_is_charged_to_who_holds(api, clients):
    holders = [await clients.holding("report") for _ in range(2)]
    waiter = await clients.connect("web")
    waiting = asyncio.create_task(waiter.execute("select 1"))
    await api.until("/waits", 1)
    await asyncio.sleep(0.5)  # that is what is charged
    await holders[0].execute("commit")
    await waiting
    await asyncio.sleep(0.25)  # two ticks

    answer = await api.get("/blame")
    account = answer["items"][0]
    (pool,) = answer["pools"]
    assert (account["application"], account["statement"]) == ("report", None)
    assert 0.4 <= account["blamed_wait_seconds_total"] < 5
    assert account["share"] > 0.9
    assert pool["charged_seconds_total"] == pytest.approx(pool["waited_seconds_total"], rel=0.01)

    by_statement = await api.items("/blame", by="statement")
    assert by_statement[0]["application"] is None
    assert by_statement[0]["statement"]["operation"] == "select"
    assert by_statement[0]["share"] > 0.9


async def test_a_healthy_pool_is_said_to_be(api):
    (item,) = await api.items("/why")
    assert (item["pool"], item["verdict"]["kind"]) == ("main", "healthy")
    (pool,) = await api.items("/pools")
    assert pool["verdict"] == "healthy"
    assert await api.items("/incidents") == []


async def test_a_full_pool_has_a_verdict_and_an_incident(api, clients):
    """The whole way: who leaks, why others wait, the incident while it lasts and afterwards."""
    holders = [await clients.holding("forgetful", "select 'secret'") for _ in range(2)]
    waiter = await clients.connect("web")
    async with api.events() as events:
        waiting = asyncio.create_task(waiter.execute("select 1"))
        incident = await events.next("incident")
        is_a("IncidentSummary", incident)
        deadline = time.monotonic() + PATIENCE
        while (verdict := (await api.items("/why"))[0]["verdict"])["kind"] == "healthy":
            assert time.monotonic() < deadline
            await asyncio.sleep(0.05)
        assert verdict["kind"] == "leak"
        assert verdict["application"] == "forgetful"
        assert verdict["evidence"]
        assert verdict["next_steps"]
        assert "secret" not in str(verdict)
        (pool,) = await api.items("/pools")
        assert pool["verdict"] == "leak"

        summaries = await api.items("/incidents", pool="main")
        assert incident["id"] in [each["id"] for each in summaries]
        whole = await api.get(f"/incidents/{incident['id']}")
        assert whole["pool"] == "main"
        assert whole["timeline"]["rows"]
        assert "secret" not in str(whole)
        for conn in holders:
            await conn.execute("commit")
        await waiting
        while True:
            told = await events.next("incident")
            is_a("IncidentSummary", told)
            if told["id"] == incident["id"] and told["ended_at"] is not None:
                break
        assert told["duration_seconds"] > 0


async def test_statements_are_told_with_their_figures(api, clients):
    conn = await clients.connect("web")
    for number in range(3):
        await conn.execute(f"select generate_series(1, {number + 4})")
    await conn.execute("select pg_sleep(0.5)")
    with pytest.raises(psycopg.errors.DivisionByZero):
        await conn.execute("select 1 / 0")

    by_calls = await api.items("/statements", sort="calls")
    most = by_calls[0]
    assert "generate_series" in most["text"]
    assert (most["calls_total"], most["rows_total"], most["errors_total"]) == (3, 4 + 5 + 6, 0)
    assert most["latency"]["samples"] == 3
    slowest = (await api.items("/statements"))[0]
    assert "pg_sleep" in slowest["text"]
    assert slowest["longest_seconds"] >= 0.05
    (worst, *_) = await api.items("/statements", sort="errors")
    assert worst["errors"] == {"22012": 1}
    for sort in ("rows", "mean", "longest", "blamed", "p99"):
        assert len(await api.items("/statements", sort=sort)) == len(by_calls)

    one = await api.get(f"/statements/{most['fingerprint']}", pool="main")
    assert one["pools"] == [most]
    assert one["text"] == most["text"]


async def test_long_texts_are_cut_in_lists_only(api, clients):
    conn = await clients.connect("web")
    columns = ", ".join(f"relname as column_{number}" for number in range(60))
    await conn.execute(f"select {columns} from pg_class limit 1")
    (statement,) = await api.items("/statements")
    assert len(statement["text"]) == 501
    assert statement["text"].endswith("…")
    one = await api.get(f"/statements/{statement['fingerprint']}")
    assert "column_59" in one["text"]


async def test_a_query_that_hangs_on_a_lock_is_told_with_its_blocker(api, clients, postgres):
    """While it hangs, in the lists and as an event."""
    postgres.psql("CREATE TABLE api_locked (id int); INSERT INTO api_locked VALUES (1)")
    blocker = await clients.holding("nightly job", "update api_locked set id = 2")
    hanging = await clients.connect("web")
    async with api.events() as events:
        update = asyncio.create_task(hanging.execute("update api_locked set id = 3"))
        (slow,) = await api.until("/slow", 1)
        assert slow["holder"]["who"]["application"] == "web"
        assert slow["age_seconds"] >= 0.3
        assert slow["wait_event"].startswith("Lock:")
        (root,) = slow["blockers"]
        assert root["is_ours"]
        assert root["waits_for"] == []
        assert root["who"]["application"] == "nightly job"
        assert root["statement"]["operation"] == "update"
        assert slow["not_asked_because"] is None

        (held,) = await api.items("/holders", application="web")
        assert held["blocked_by"]["who"]["application"] == "nightly job"
        told = await events.next("slow_query")
        is_a("SlowQuery", told)
        assert told == slow | {"holder": told["holder"]}
        await blocker.execute("rollback")
        await update
    assert await api.items("/slow") == [slow], "it is remembered"
    postgres.psql("DROP TABLE api_locked")
