"""Who may use the JSON API, what hostile requests get, and what becomes of those who listen to events."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator

import aiohttp
import psycopg
import pytest

from sidecar.api import streams as streams_module
from sidecar.api import v1 as v1_module
from sidecar.api.access import refusal
from sidecar.api.v1 import ApiV1
from sidecar.demo.postgres import EmbeddedPostgres
from sidecar.events import Stop
from tests.api_client import PATHS, V1, Api, named
from tests.contract import check, is_a
from tests.sidecar_process import (
    MakeService,
    ServiceHere,
    come_true,
    configuration,
)

TOKEN = "token-that-nobody-may-see"


@pytest.fixture
async def sidecar(make_service: MakeService, postgres: EmbeddedPostgres) -> ServiceHere:
    return await make_service(postgres.dsn(), max_size=2, min_idle=1)


@pytest.fixture
async def guarded(make_service: MakeService, postgres: EmbeddedPostgres) -> ServiceHere:
    """One with a token."""
    return await make_service(postgres.dsn(), max_size=2, min_idle=1, http={"token": TOKEN})


@pytest.fixture
async def api(sidecar: ServiceHere) -> AsyncIterator[Api]:
    async with Api.of(sidecar) as client:
        yield client


def v1(sidecar: ServiceHere) -> ApiV1:
    assert sidecar.service._http is not None
    return sidecar.service._http._v1


# -- the token ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "status"),
    [
        (f"Bearer {TOKEN}", 200),
        (f"bearer  {TOKEN} ", 200),
        (f"Bearer {TOKEN}x", 401),
        (f"Bearer {TOKEN[:-1]}", 401),
        (f"Basic {TOKEN}", 401),
        (TOKEN, 401),
        ("Bearer", 401),
        ("Bearer ", 401),
        ("Bearer \udcff\udcfe", 401),
        (None, 401),
    ],
)
async def test_with_a_token_every_request_needs_it(guarded, header, status):
    headers = {} if header is None else {"Authorization": header}
    async with (
        Api.of(guarded) as api,
        api.session.get(f"{V1}/pools", headers=headers) as response,
    ):
        body = await response.json(content_type=None)
        assert response.status == status, body
        check(f"{V1}/pools", status, response.content_type, body)
        if status == 401:
            assert response.headers["WWW-Authenticate"].startswith("Bearer ")


async def test_the_token_in_the_address_is_none(guarded):
    """Addresses end up in logs."""
    async with Api.of(guarded) as api:
        status, _ = await api.ask("/pools", token=TOKEN, access_token=TOKEN)
        assert status == 401


async def test_two_tokens_are_none(guarded):
    async with Api.of(guarded) as api:
        headers = [("Authorization", f"Bearer {TOKEN}"), ("Authorization", f"Bearer {TOKEN}")]
        async with api.session.get(f"{V1}/pools", headers=headers) as response:
            assert response.status == 401


async def test_without_the_token_no_path_says_what_there_is(guarded):
    """Neither which pools and paths there are, nor which methods and parameters."""
    async with Api.of(guarded) as api:

        async def status(method: str, path: str) -> int:
            async with api.session.request(method, path) as response:
                return response.status

        paths = (*PATHS, "/api", "/api/", "/api/v2", f"{V1}/pools/main", "/%61pi/v1/pools")
        asked = [status(method, path) for path in paths for method in ("GET", "HEAD", "POST")]
        assert set(await asyncio.gather(*asked)) == {401}


async def test_metrics_and_health_need_no_token(guarded):
    for path in ("/metrics", "/livez", "/readyz", "/"):
        status, _ = await asyncio.to_thread(guarded.get, path)
        assert status in (200, 503), path  # PostgreSQL may not be reached yet


async def test_wrong_tokens_are_answered_late_and_counted(guarded):
    async with Api.of(guarded, "wrong") as api:
        began = asyncio.get_running_loop().time()
        assert (await api.ask("/pools"))[0] == 401
        assert asyncio.get_running_loop().time() - began >= v1_module.REFUSAL_DELAY
    counted = await guarded.value(
        "pgsidecar_http_requests_total", route=f"{V1}/pools", method="GET", code="401"
    )
    assert counted == 1


async def test_the_token_is_shown_nowhere(make_process, postgres):
    """Not in the log, with every request in it, nor by the API or metrics."""
    sidecar = make_process(
        postgres.dsn(), http={"token": TOKEN, "access_log": True}, log={"level": "debug"}
    )
    async with Api.of(sidecar, TOKEN) as api:
        told = [json.dumps(await api.get(path)) for path in ("/config", "/pools", "/openapi.json")]
    async with Api.of(sidecar) as api:
        _, problem = await api.ask("/config", key=TOKEN[:5])
        told.append(json.dumps(problem))
    told += [(await asyncio.to_thread(sidecar.get, path))[1] for path in ("/metrics", "/")]
    sidecar.terminate()
    await asyncio.to_thread(sidecar.wait)
    assert "/api/v1/config" in sidecar.log
    assert '"token": "***"' in told[0]
    for text in (*told, sidecar.log):
        assert TOKEN not in text


# -- without a token -----------------------------------------------------------------------------------


def asked(peer: str, **headers: str | list[str]) -> int:
    """The status that such a request gets where there is no token."""
    given = {name.replace("_", "-"): value for name, value in headers.items()}

    def values(name: str) -> list[str]:
        found = given.get(name, [])
        return [found] if isinstance(found, str) else found

    problem = refusal("", peer, values)
    return 200 if problem is None else problem.status


@pytest.mark.parametrize(
    "host",
    [
        *("localhost", "localhost:9632", "LOCALHOST", "127.0.0.1", "127.0.0.1:9632"),
        *("127.1.2.3:1", "[::1]", "[::1]:9632", "127.0.0.1:"),
    ],
)
def test_loopback_is_answered_by_its_names(host):
    assert asked("127.0.0.1", Host=host) == 200
    assert asked("::1", Host=host) == 200
    assert asked("::ffff:127.0.0.1", Host=host) == 200


@pytest.mark.parametrize(
    "host",
    [
        *("evil.example", "evil.example:9632", "localhost.evil.example", "127.0.0.1.evil.example"),
        *("10.0.0.1", "0.0.0.0", "[::]", "[::ffff:10.0.0.1]", "", " ", "a:b:c", "[::1", "::1]"),
        *("localhost@evil.example", "evil.example#localhost", "localhost/", "127.0.0.1:80:80"),
        *("127.0.0.1:x", "0x7f.1", "2130706433"),
    ],
)
def test_another_name_is_refused(host):
    """A page whose own name was made to lead to loopback, say."""
    assert asked("127.0.0.1", Host=host) == 403


@pytest.mark.parametrize("peer", ["10.0.0.1", "192.168.1.7", "2001:db8::1", "::ffff:10.0.0.1", ""])
def test_another_host_is_refused(peer):
    assert asked(peer, Host="127.0.0.1") == 403


def test_requests_without_a_host_or_with_two_are_refused():
    assert asked("127.0.0.1") == 403
    assert asked("127.0.0.1", Host=["localhost", "localhost"]) == 403


@pytest.mark.parametrize("header", ["Forwarded", "X-Forwarded-For", "X-Forwarded-Host", "Via"])
def test_a_proxy_on_this_host_does_not_open_the_api_to_others(header):
    given = {"Host": "localhost", header.replace("-", "_"): "10.0.0.1"}
    assert asked("127.0.0.1", **given) == 403


async def test_a_refusal_says_which_option_opens_the_api(api):
    headers = {"Host": "evil.example"}
    async with api.session.get(f"{V1}/config", headers=headers) as response:
        problem = await response.json(content_type=None)
        check(f"{V1}/config", 403, response.content_type, problem)
    assert "http.token" in problem["detail"]
    assert "main" not in json.dumps(problem)


async def test_another_address_of_this_host_is_not_loopback(make_service, postgres):
    """Over the network's own address, where there is one."""
    sidecar = await make_service(postgres.dsn(), http={"host": "0.0.0.0"})
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing
            address = probe.getsockname()[0]
        except OSError:
            address = "127.0.0.1"  # no network: only loopback can be tried
    url = f"http://{address}:{sidecar.http_port}{V1}/pools"
    async with aiohttp.ClientSession() as session, session.get(url) as response:
        assert response.status == (200 if address.startswith("127.") else 403)


# -- requests ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
async def test_other_methods_are_refused(api, path):
    for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"):
        async with api.session.request(method, named(path), data=b"x" * 1000) as response:
            assert response.status == 405
            body = await response.json(content_type=None)
            check(path, 405, response.content_type, body)
            assert response.headers["Allow"] == "GET,HEAD"


@pytest.mark.parametrize("path", [path for path in PATHS if "{" not in path])
async def test_head_is_get_without_the_body(api, path):
    async with api.session.head(path) as response:
        assert response.status == 200
        assert await response.read() == b""
    async with api.session.head(f"{path}?limit=x&more=1") as response:
        assert response.status == 400


async def test_other_paths_are_problems_too(api):
    for path in ("/api", "/api/", "/api/v2/pools", f"{V1}/", f"{V1}/nothing", f"{V1}/pools/a/b"):
        async with api.session.get(path) as response:
            assert response.status == 404, path
            assert response.content_type == "application/problem+json"
            assert "openapi.json" in (await response.json(content_type=None))["detail"]


@pytest.mark.parametrize(
    "target",
    [
        f"{V1}/pools/%00",
        f"{V1}/pools/%ff%fe",
        f"{V1}/pools/..%2f..%2fetc%2fpasswd",
        f"{V1}/statements/%F0%9F%92%A5",
        f"{V1}/incidents/" + "a" * 4000,
        f"{V1}/incidents/..%2F..%2Fconfig.yaml",
        f"{V1}/clients?application=%ff%00%0a&pool=main",
        f"{V1}/clients?%ff=1",
        f"{V1}/clients?&&&=&=",
        f"{V1}/clients?limit=1;offset=1",
        f"{V1}/clients?" + "a=1&" * 900,
    ],
)
async def test_odd_requests_get_an_answer_and_nothing_more(sidecar, target, no_errors_logged):
    reader, writer = await asyncio.open_connection("127.0.0.1", sidecar.http_port)
    writer.write(f"GET {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
    async with asyncio.timeout(10):
        answer = await reader.read()
    writer.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    status = int(head.split()[1])
    assert status in (200, 400, 404), head
    assert b"passwd" not in body or status == 404
    json.loads(body)
    assert b"pools:" not in body  # of the configuration file


# -- events --------------------------------------------------------------------------------------------


async def test_events_tell_the_pools_every_second(api, sidecar):
    async with api.events() as events:
        for _ in range(2):
            gauges = await events.next("gauges")
            is_a("Pool", gauges["items"][0])
            assert gauges["items"][0]["name"] == "main"
    await come_true(lambda: not len(v1(sidecar).streams), "the listener is gone")


async def test_events_of_one_pool_leave_the_others_out(postgres):
    text = configuration(postgres.dsn())
    pools = {"main": {"dsn": postgres.dsn()}, "second": {"dsn": postgres.dsn(), "min_idle": 0}}
    sidecar = await ServiceHere.start(json.dumps(json.loads(text) | {"pools": pools}))
    async with Api.of(sidecar) as api, api.events(pool="second") as events, api.events() as all:
        gauges = await events.next("gauges")
        assert [item["name"] for item in gauges["items"]] == ["second"]
        gauges = await all.next("gauges")
        assert [item["name"] for item in gauges["items"]] == ["main", "second"]
    await sidecar.stop()


async def test_a_quiet_stream_has_heartbeats(api, monkeypatch):
    """So that a connection that is gone is noticed, by both sides."""
    monkeypatch.setattr(streams_module, "HEARTBEAT", 0.05)
    monkeypatch.setattr(streams_module, "PERIOD", 3600)
    async with api.events() as events:
        await events.next("gauges")
        assert await events.block() == [": still here"]


async def test_streams_are_limited(api, sidecar, monkeypatch):
    monkeypatch.setattr(streams_module, "MOST", 2)
    async with api.events() as first, api.events() as second:
        status, problem = await api.ask("/events")
        assert (status, problem["detail"]) == (503, "too many streams")
        await first.next("gauges")
        await second.next("gauges")
    await come_true(lambda: not len(v1(sidecar).streams), "their places are free", within=0.9)
    async with api.events():
        pass


async def test_a_listener_that_does_not_read_is_cut_off(sidecar, monkeypatch):
    """What is kept for it is bounded, and the others do not notice."""
    monkeypatch.setattr(v1_module, "SEND_TIMEOUT", 0.3)
    streams = v1(sidecar).streams
    loop = asyncio.get_running_loop()
    with socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.setblocking(False)
        await loop.sock_connect(deaf, ("127.0.0.1", sidecar.http_port))
        request = f"GET {V1}/events HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
        await loop.sock_sendall(deaf, request)
        await come_true(lambda: len(streams) == 1, "it listens")
        big = b": " + b"x" * 100_000 + b"\n\n"
        async with Api.of(sidecar) as api, api.events() as events:
            async with asyncio.timeout(10):
                while len(streams) == 2:
                    streams._tell("main", big)
                    await asyncio.sleep(0.01)
                    await events.block()
            await events.next("gauges")


def test_a_listener_has_a_bounded_queue():
    listener = streams_module.Listener(None, lambda: False)
    over = []
    for _ in range(streams_module.QUEUED + 1):
        listener.put(b"x")
        over.append(listener.is_over)
    assert over == [False] * streams_module.QUEUED + [True]
    assert not listener._queue


async def test_draining_ends_the_streams_and_begins_no_more(sidecar):
    """A stream must not hold up the stop; what answers at once still does."""
    conn = await psycopg.AsyncConnection.connect(sidecar.dsn(), autocommit=True)
    async with Api.of(sidecar) as api, api.events() as events:
        await events.next("gauges")
        sidecar.service.shut_down(Stop.CLIENTS_GONE)
        await events.rest()
        status, problem = await api.ask("/events")
        assert (status, problem["detail"]) == (503, "the sidecar is draining")
        assert await api.items("/pools")
    await conn.close()


async def test_the_sidecar_stops_at_once_while_somebody_listens(make_process, postgres):
    sidecar = make_process(postgres.dsn())
    async with Api.of(sidecar) as api, api.events() as events:
        await events.next("gauges")
        sidecar.terminate()
        await events.rest()
        assert await asyncio.to_thread(sidecar.wait, 5) == 0
    assert "ERROR" not in sidecar.log


async def test_who_leaves_a_stream_is_forgotten(sidecar):
    streams = v1(sidecar).streams
    async with Api.of(sidecar) as api:
        for _ in range(3):
            async with api.events() as events:
                await events.next("gauges")
                assert len(streams) >= 1
    await come_true(lambda: not len(streams), "all listeners are gone")
