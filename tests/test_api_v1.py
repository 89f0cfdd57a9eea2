"""The JSON API of a running sidecar: what each path says of clients that hold, wait, fail and keep.

Each answer is held against the contract, whatever else a test looks at.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from datetime import UTC, datetime

import psycopg
import pytest

from sidecar.demo.postgres import EmbeddedPostgres
from tests.api_client import PATHS, V1, Api, Clients, named
from tests.contract import contract, operation
from tests.sidecar_process import MakeService, ServiceHere

LISTS = [
    path
    for path in PATHS
    if {"$ref": "#/components/parameters/limit"} in operation(path).get("parameters", [])
]


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


# -- the whole ---------------------------------------------------------------------------------------


async def test_every_documented_path_is_served_and_every_served_one_documented(sidecar):
    router = sidecar.service._http._runner.app.router
    served = {
        resource.canonical
        for resource in router.resources()
        if resource.canonical.startswith("/api")
    }
    assert served == {*PATHS}


@pytest.mark.parametrize("path", [path for path in PATHS if path != f"{V1}/events"])
async def test_an_idle_sidecar_answers_everything(api, path):
    """Empty lists are lists; nothing else is missing."""
    status, body = await api.ask(named(path).removeprefix(V1))
    assert status == (404 if path.endswith(("{fingerprint}", "{id}")) else 200), body


async def test_the_contract_is_served_as_json(api):
    assert await api.get("/openapi.json") == contract()


async def test_parameters_are_those_of_the_contract(sidecar):
    """What a path takes and what it says it takes is the same."""
    for endpoint in sidecar.service._http._v1._answers.endpoints():
        names = []
        for each in operation(endpoint.path).get("parameters", []):
            if "$ref" in each:
                each = contract()["components"]["parameters"][each["$ref"].rpartition("/")[2]]
            if each["in"] == "query":
                names.append(each["name"])
        assert sorted(names) == sorted(endpoint.parameters), endpoint.path


# -- now ---------------------------------------------------------------------------------------------


async def test_pools_tell_how_full_they_are(api, clients):
    await clients.holding("web")
    (pool,) = await api.items("/pools")
    assert (pool["name"], pool["used"], pool["max_size"]) == ("main", 1, 2)
    assert pool["saturation"] == 0.5
    assert pool["is_up"]
    assert not pool["is_paused"]


async def test_a_pool_tells_its_limits_and_totals(api, clients):
    conn = await clients.connect("web")
    for _ in range(3):
        await conn.execute("select 1")
    with pytest.raises(psycopg.errors.DivisionByZero):
        await conn.execute("select 1/0")
    pool = await api.get("/pools/main")
    assert pool["limits"]["leak_threshold_seconds"] == 0.5
    assert pool["limits"]["acquire_timeout_seconds"] == 30
    assert pool["totals"]["queries_total"] == 4
    assert pool["totals"]["errors_total"] == 1
    assert pool["latency"]["samples"] == 4
    assert 0 < pool["latency"]["p50_seconds"] <= pool["latency"]["p99_seconds"]


async def test_clients_tell_their_state(api, clients):
    holders = [await clients.holding(f"holder {number}") for number in (1, 2)]
    await clients.connect("idle")
    waiter = await clients.connect("waiter")
    waiting = asyncio.create_task(waiter.execute("select 1"))
    await api.until("/waits", 1)

    states = {each["application"]: each["state"] for each in await api.items("/clients")}
    assert states == {
        "holder 1": "active",
        "holder 2": "active",
        "idle": "idle",
        "waiter": "waiting",
    }
    (one,) = await api.items("/clients", state="waiting")
    assert one["application"] == "waiter"
    assert one["waited_seconds"] >= 0
    assert one["server"] is None
    (one,) = await api.items("/clients", application="holder 2")
    assert one["server"] is not None
    await holders[0].execute("commit")
    await waiting


async def test_a_wait_says_behind_whom_and_why(api, clients):
    """The question that nobody answers today."""
    first = await clients.holding("report", "select 'secret of the report'")
    await clients.holding("web")
    waiters = [await clients.connect(f"waiter {number}") for number in (1, 2)]
    waiting = []
    for number, waiter in enumerate(waiters, 1):
        waiting.append(asyncio.create_task(waiter.execute("select 1")))
        await api.until("/waits", number)

    waits = await api.items("/waits")
    assert [wait["who"]["application"] for wait in waits] == ["waiter 1", "waiter 2"]
    assert [wait["ahead"] for wait in waits] == [0, 1]
    assert waits[0]["waited_seconds"] >= waits[1]["waited_seconds"]
    assert 29 < waits[0]["timeout_seconds"] < 30
    assert waits[0]["cause"] == "all_used"
    assert waits[0]["reason"] == "2 of 2 connections in use"
    assert [each["application"] for each in waits[0]["behind"]] == ["report", "web"]
    assert waits[0]["behind"][0]["state"] == "idle in transaction"
    assert waits[0]["behind_total"] == 2

    (second,) = await api.items("/waits", application="waiter 2")
    assert second["ahead"] == 1, "of all who wait, not of those asked for"
    await first.execute("commit")
    await asyncio.gather(*waiting)


async def test_a_wait_for_a_paused_pool_says_so(api, clients, sidecar):
    conn = await clients.connect("web")
    sidecar.service.operations.pause(["main"])
    waiting = asyncio.create_task(conn.execute("select 1"))
    (wait,) = await api.until("/waits", 1)
    assert (wait["cause"], wait["reason"]) == ("paused", "the pool is paused")
    sidecar.service.operations.resume(["main"])
    await waiting


async def test_holders_tell_their_statement_without_its_literals(api, clients):
    await clients.holding("report", "select 'secret', 42")
    (holder,) = await api.items("/holders")
    assert holder["who"]["application"] == "report"
    assert holder["state"] == "idle in transaction"
    assert holder["transaction_seconds"] > 0
    assert holder["held_seconds"] >= holder["state_seconds"]
    assert holder["statement"]["operation"] == "select"
    assert "secret" not in holder["statement"]["text"]
    assert await api.items("/holders", application="web") == []

    (server,) = [each for each in await api.items("/servers") if each["state"] == "active"]
    assert server["backend_pid"] == holder["backend_pid"]
    assert server["who"] == holder["who"]
    assert server["is_in_transaction"]


async def test_instants_are_those_of_the_wall_clock(api, clients):
    before = datetime.now(UTC)
    await clients.holding("web")
    (holder,) = await api.items("/holders")
    leased_at = datetime.fromisoformat(holder["leased_at"])
    assert abs((leased_at - before).total_seconds()) < 5
    assert leased_at.tzinfo is not None


async def test_pins_tell_what_keeps_a_connection(api, clients):
    conn = await clients.connect("worker")
    await conn.execute("listen jobs")
    (pin,) = await api.until("/pins", 1)
    assert (pin["who"]["application"], pin["reason"]) == ("worker", "listen")
    assert pin["pinned_seconds"] >= 0
    await conn.execute("unlisten *")
    await api.until("/pins", 0)


async def test_leases_of_session_mode_are_pins(make_service, postgres):
    sidecar = await make_service(postgres.dsn(), mode="session", max_size=2)
    async with Api.of(sidecar) as api:
        conn = await psycopg.AsyncConnection.connect(sidecar.dsn(), autocommit=True)
        (pin,) = await api.items("/pins")
        assert pin["reason"] == "session_mode"
        await conn.close()
        await sidecar.until_whole()


# -- pages and parameters ------------------------------------------------------------------------------


@pytest.mark.parametrize("path", LISTS)
async def test_lists_are_pages(api, clients, path):
    """One item at a time gives what one page does."""
    short = path.removeprefix(V1)
    await clients.holding("report")
    await clients.connect("web")
    whole = await api.get(short)
    assert whole["total"] == len(whole["items"])
    assert whole["next"] is None
    found, page = [], await api.get(short, limit=1)
    while True:
        assert page["limit"] == 1
        found += page["items"]
        if page["next"] is None:
            break
        assert page["next"].startswith(f"{path}?")
        async with api.session.get(page["next"]) as response:
            page = await response.json()
    assert len(found) == whole["total"]
    assert (await api.get(short, offset=1000))["items"] == []


@pytest.mark.parametrize(
    ("path", "parameters", "parameter"),
    [
        ("/pools", {"limit": "0"}, "limit"),
        ("/pools", {"limit": "1001"}, "limit"),
        ("/pools", {"limit": "ten"}, "limit"),
        ("/pools", {"limit": "1e2"}, "limit"),
        ("/pools", {"limit": ""}, "limit"),
        ("/pools", {"limit": "٣"}, "limit"),
        ("/pools", {"limit": "9" * 5000}, "limit"),
        ("/clients", {"offset": "-1"}, "offset"),
        ("/clients", {"offset": "1000001"}, "offset"),
        ("/clients", {"state": "asleep"}, "state"),
        ("/statements", {"sort": "name"}, "sort"),
        ("/blame", {"by": ""}, "by"),
        ("/pools", {"pool": "main"}, "pool"),
        ("/config", {"verbose": "1"}, "verbose"),
        ("/events", {"limit": "1"}, "limit"),
    ],
)
async def test_a_wrong_parameter_is_named_with_what_is_allowed(api, path, parameters, parameter):
    status, problem = await api.ask(path, **parameters)
    assert (status, problem["status"], problem["parameter"]) == (400, 400, parameter)
    assert len(problem["value"]) <= 100
    assert problem["allowed"]
    assert problem["title"] == "Bad Request"


async def test_a_parameter_that_is_given_twice_is_refused(api):
    """Which one would count?"""
    status, problem = await api.ask("/pools?limit=1&limit=2")
    assert (status, problem["parameter"]) == (400, "limit")


@pytest.mark.parametrize(
    ("path", "parameters", "parameter"),
    [
        ("/pools/none", {}, "pool"),
        ("/clients", {"pool": "none"}, "pool"),
        ("/why", {"pool": "none"}, "pool"),
        ("/events", {"pool": "none"}, "pool"),
        ("/statements/0123456789abcdef", {}, "fingerprint"),
        ("/incidents/none", {}, "id"),
    ],
)
async def test_what_there_is_not_is_not_found(api, path, parameters, parameter):
    status, problem = await api.ask(path, **parameters)
    assert (status, problem["parameter"]) == (404, parameter)
