"""The HTTP service over a real socket: answers, formats, limits, and clients that misbehave."""

import asyncio
import logging
import socket
from collections.abc import AsyncIterator, Callable
from dataclasses import replace

import aiohttp
import pytest
import uvloop
from prometheus_client.parser import text_string_to_metric_families as parse_text

from sidecar.api import app as app_module
from sidecar.api import server as server_module
from sidecar.api.negotiate import accepts_gzip, choose_format
from sidecar.api.server import HttpServer
from sidecar.config import HttpConfig
from sidecar.events import ClientOutcome, Listener
from sidecar.observe.exposition import Format
from tests.metrics_page import IDLE, Nobody, Page

TEXT = "text/plain; version=0.0.4; charset=utf-8"
OPENMETRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"


class Service:
    """A running server, what it reads, and a client of it."""

    def __init__(self, **options: object) -> None:
        self.page = Page(replace(IDLE, used=7, pending=2))
        self.recorder = self.page.recorder
        self.reasons: list[str] = []
        self.server = HttpServer(
            HttpConfig.model_validate({"port": 0, **options}),
            self.page.metrics,
            lambda: self.reasons,
            self.recorder,
            Nobody(),
        )

    async def __aenter__(self) -> "Service":
        await self.server.start()
        host, port = self.server.address
        self.client = aiohttp.ClientSession(f"http://{host}:{port}")
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.client.close()
        await self.server.stop()

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection(*self.server.address)

    def requests(self) -> dict[tuple[str, str, int], int]:
        """The HTTP requests that were counted, by route, method and code."""
        return {key: count for key, count in self.recorder.http_requests.items() if count}


@pytest.fixture
async def service() -> AsyncIterator[Service]:
    async with Service() as running:
        yield running


async def eventually(condition: Callable[[], bool]) -> None:
    """Wait for what the kernel and the server do in their own time."""
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110  # nothing to wait on: the condition is the server's state
            await asyncio.sleep(0.01)


async def test_metrics_are_served_as_text(service):
    async with service.client.get("/metrics") as response:
        assert response.status == 200
        assert response.headers["Content-Type"] == TEXT
        assert response.headers["Vary"] == "Accept, Accept-Encoding"
        text = await response.text()

    families = {family.name: family for family in parse_text(text)}
    assert families["pgsidecar_pool_connections"].samples[0].value == 7
    assert "process_resident_memory_bytes" in families


async def test_metrics_are_served_as_openmetrics_to_prometheus(service):
    """What Prometheus 2.42 asks for."""
    accept = (
        "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;"
        "q=0.75,text/plain;version=0.0.4;q=0.5,*/*;q=0.1"
    )
    headers = {"Accept": accept, "Accept-Encoding": "gzip"}
    async with service.client.get("/metrics", headers=headers) as response:
        assert response.headers["Content-Type"] == OPENMETRICS
        assert response.headers["Content-Encoding"] == "gzip"
        text = await response.text()  # unpacked by the client
        assert int(response.headers["Content-Length"]) < len(text) / 5

    assert "# TYPE pgsidecar_pool_acquires counter\n" in text
    assert "# TYPE process_cpu_seconds counter\n" in text
    assert text.endswith("# EOF\n")


async def test_metrics_are_not_packed_where_gzip_is_refused(service):
    headers = {"Accept-Encoding": "gzip;q=0, identity"}
    async with service.client.get("/metrics", headers=headers) as response:
        assert "Content-Encoding" not in response.headers
        assert b"pgsidecar_up" in await response.read()


@pytest.mark.parametrize(
    ("accept", "format"),
    [
        ("", Format.TEXT),
        ("*/*", Format.TEXT),
        ("text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8", Format.TEXT),
        ("application/json", Format.TEXT),
        ("application/openmetrics-text", Format.OPENMETRICS),
        ("application/openmetrics-text; version=1.0.0; charset=utf-8", Format.OPENMETRICS),
        ('Application/OpenMetrics-Text; Version="1.0.0"', Format.OPENMETRICS),
        ("application/openmetrics-text;version=0.0.1", Format.TEXT),
        ("application/openmetrics-text;version=2.0.0", Format.TEXT),
        ("application/openmetrics-text, */*", Format.OPENMETRICS),
        ("application/*, text/plain;q=0.5", Format.OPENMETRICS),
        ("text/plain;q=0.9, application/openmetrics-text;q=0.1", Format.TEXT),
        ("text/plain;q=0.1, application/openmetrics-text;q=0.9", Format.OPENMETRICS),
        ("application/openmetrics-text;q=0, */*", Format.TEXT),
        ("application/openmetrics-text;q=nonsense", Format.TEXT),
        ("application/openmetrics-text;q=7", Format.TEXT),
        ("text/plain;q=0, application/openmetrics-text;q=0.001", Format.OPENMETRICS),
        (
            # Prometheus 3
            "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.5,"
            "application/openmetrics-text;version=0.0.1;q=0.4,"
            "text/plain;version=1.0.0;escaping=allow-utf-8;q=0.3,"
            "text/plain;version=0.0.4;q=0.2,*/*;q=0.1",
            Format.OPENMETRICS,
        ),
        (
            # Prometheus with protobuf first, which nobody here speaks
            "application/vnd.google.protobuf;proto=io.prometheus.client.MetricFamily;q=0.6,"
            "text/plain;version=0.0.4;q=0.5,application/openmetrics-text;version=1.0.0;q=0.4",
            Format.TEXT,
        ),
        (";;;,,,=;q=,", Format.TEXT),
    ],
)
def test_the_format_is_the_one_the_client_prefers(accept, format):
    assert choose_format(accept) is format


@pytest.mark.parametrize(
    ("accept_encoding", "accepted"),
    [
        ("", False),
        ("gzip", True),
        ("deflate, GZIP;q=0.5", True),
        ("*", True),
        ("gzip;q=0", False),
        ("gzip;q=0, *", False),
        ("*;q=0", False),
        ("identity", False),
        ("gzipped", False),
    ],
)
def test_gzip_is_used_where_it_is_accepted(accept_encoding, accepted):
    assert accepts_gzip(accept_encoding) is accepted


async def test_a_scrape_counts_the_scrapes_before_it(service):
    for _ in range(2):
        async with service.client.get("/metrics"):
            pass
    async with service.client.get("/metrics") as response:
        text = await response.text()

    assert 'pgsidecar_http_requests_total{route="/metrics",method="GET",code="200"} 2\n' in text
    assert 'pgsidecar_http_request_duration_seconds_count{route="/metrics"} 2\n' in text
    assert service.requests() == {("/metrics", "GET", 200): 3}


async def test_the_first_scrape_has_every_route_at_zero(service):
    async with service.client.get("/metrics") as response:
        text = await response.text()

    for route, code in [("/", 200), ("/metrics", 200), ("/livez", 200), ("/readyz", 503)]:
        labels = f'{{route="{route}",method="GET",code="{code}"}}'
        assert f"pgsidecar_http_requests_total{labels} 0\n" in text


async def test_live_does_not_depend_on_anything(service):
    """A restart of the sidecar does not help a PostgreSQL that is down."""
    service.reasons = ["pool 'main': PostgreSQL is down"]
    async with service.client.get("/livez") as response:
        assert (response.status, await response.text()) == (200, "ok\n")


async def test_ready_says_why_not(service):
    async with service.client.get("/readyz") as response:
        assert (response.status, await response.text()) == (200, "ok\n")

    service.reasons = ["pool 'main': PostgreSQL is down", "draining"]
    async with service.client.get("/readyz") as response:
        assert response.status == 503
        assert response.headers["Content-Type"] == "text/plain; charset=utf-8"
        assert await response.text() == "pool 'main': PostgreSQL is down\ndraining\n"

    assert service.requests() == {("/readyz", "GET", 200): 1, ("/readyz", "GET", 503): 1}


async def test_the_page_shows_the_pools(service):
    async with service.client.get("/") as response:
        assert response.headers["Content-Type"] == "text/html; charset=utf-8"
        page = await response.text()

    for link in ("metrics", "livez", "readyz", "api/v1/why", "api/v1/openapi.json"):
        assert f'href="{link}"' in page
    assert (
        "<td>main</td><td>down</td><td>7</td><td>0</td><td>2</td><td>25</td><td>healthy</td>"
        in page
    )
    assert "http://" not in page
    assert "https://" not in page


async def test_the_page_escapes_names(service):
    service.page.snapshots = [replace(IDLE, name="<script>alert(1)</script>&")]
    async with service.client.get("/") as response:
        page = await response.text()

    assert "<script>" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;&amp;" in page


@pytest.mark.parametrize("path", ["/", "/metrics", "/livez", "/readyz"])
async def test_head_tells_what_get_would(service, path):
    async with service.client.head(path) as response:
        assert response.status == 200
        assert int(response.headers["Content-Length"]) > 0
        assert await response.read() == b""
    assert service.requests() == {(path, "HEAD", 200): 1}


async def test_unknown_paths_share_one_series(service):
    """Scanners try thousands of paths."""
    for path in ("/admin", "/metrics/", "/.env", "/livez/x?y"):
        async with service.client.get(path) as response:
            assert response.status == 404
            assert await response.text() == "Not Found\n"

    assert service.requests() == {("other", "GET", 404): 4}


async def test_wrong_methods_are_refused(service):
    for method in ("POST", "DELETE", "OPTIONS"):
        async with service.client.request(method, "/metrics", data=b"x") as response:
            assert response.status == 405
            assert response.headers["Allow"] == "GET,HEAD"
            assert await response.text() == "Method Not Allowed\n"

    assert service.requests() == {("other", "other", 405): 3}


async def test_a_handler_that_fails_is_answered_counted_and_logged(service, monkeypatch, caplog):
    def fail(format: Format) -> str:
        raise RuntimeError("details for the log only")

    monkeypatch.setattr(service.page.metrics, "own_parts", fail)
    async with service.client.get("/metrics") as response:
        assert (response.status, await response.text()) == (500, "internal error\n")

    assert service.requests() == {("/metrics", "GET", 500): 1}
    assert [record.name for record in caplog.records] == ["sidecar.api.app"]
    async with service.client.get("/livez") as response:
        assert response.status == 200


async def test_connections_are_counted(service):
    assert service.server.connections == 0
    async with service.client.get("/livez"):
        assert service.server.connections == 1
    _, writer = await service.connect()
    await eventually(lambda: service.server.connections == 2)
    assert service.recorder.clients[Listener.HTTP, ClientOutcome.ACCEPTED] == 2

    writer.close()
    await writer.wait_closed()
    await eventually(lambda: service.server.connections == 1)


async def test_connections_above_the_limit_are_refused_and_counted():
    """Clients that hold connections must not take the memory, or the metrics from those within the limit."""
    async with Service(max_connections=2) as service:
        held = [await service.connect() for _ in range(2)]
        await eventually(lambda: service.server.connections == 2)
        reader, writer = await service.connect()
        answer = await reader.read()
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert answer.endswith(b"\r\n\r\ntoo many connections\n")
        writer.close()
        assert service.recorder.clients[Listener.HTTP, ClientOutcome.REJECTED] == 1
        assert service.server.connections == 2

        _, first = held[0]
        first.close()
        await eventually(lambda: service.server.connections == 1)
        async with service.client.get("/livez") as response:
            assert response.status == 200
        held[1][1].close()


async def test_a_burst_of_connections_does_not_pass_the_limit():
    """All accepted in one turn of the loop, before any of them is set up."""
    async with Service(max_connections=3) as service:
        connections = await asyncio.gather(*(service.connect() for _ in range(20)))
        clients = service.recorder.clients
        await eventually(lambda: sum(clients.values()) == 20)

        assert clients[Listener.HTTP, ClientOutcome.ACCEPTED] == 3
        assert clients[Listener.HTTP, ClientOutcome.REJECTED] == 17
        assert service.server.connections == 3
        for _, writer in connections:
            writer.close()


async def test_a_client_that_sends_its_request_slowly_is_cut_off(monkeypatch):
    """A byte now and then must not keep a connection."""
    monkeypatch.setattr(server_module, "KEEPALIVE", 0.3)
    async with Service() as service:
        reader, writer = await service.connect()
        writer.write(b"GET /metrics HTTP/1.1\r\nHost: x\r\nX-Slow: ")
        end = asyncio.create_task(reader.read())
        async with asyncio.timeout(5):
            while not end.done():
                writer.write(b"a")
                await asyncio.wait([end], timeout=0.05)
        writer.close()
        await eventually(lambda: service.server.connections == 0)


async def test_a_client_that_does_not_read_its_answer_is_cut_off(monkeypatch):
    """Its answers would be held in memory for as long as it likes."""
    monkeypatch.setattr(app_module, "SEND_TIMEOUT", 0.3)
    async with Service() as service:
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.setblocking(False)
            loop = asyncio.get_running_loop()
            await loop.sock_connect(client, service.server.address)
            for _ in range(200):  # more than the kernel buffers
                await loop.sock_sendall(client, b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
            await eventually(lambda: service.server.connections == 1)
            await eventually(lambda: service.server.connections == 0)
        async with service.client.get("/livez") as response:
            assert response.status == 200


@pytest.mark.parametrize(
    "garbage",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
        b"\x00\x00\x00\x08\x04\xd2\x16\x2f\r\n\r\n",  # PostgreSQL's SSLRequest
        b"GET / HTTP/1.1\r\nX: " + b"a" * 100_000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 10_000 + b"\r\n",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n",
        b"POST /metrics HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
    ],
)
async def test_garbage_is_refused_without_filling_the_log(service, caplog, garbage):
    caplog.set_level(logging.INFO)
    reader, writer = await service.connect()
    writer.write(garbage)
    async with asyncio.timeout(5):
        try:
            answer = await reader.read()
        except ConnectionResetError:
            answer = b""  # closed before everything was read
    writer.close()

    assert answer == b"" or answer.startswith((b"HTTP/1.1 400 ", b"HTTP/1.0 400 "))
    assert caplog.records == []
    await eventually(lambda: service.server.connections == 0)


async def test_a_client_that_leaves_before_its_answer_harms_nobody(service, caplog):
    for _ in range(20):
        _, writer = await service.connect()
        writer.write(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
        await writer.drain()
        writer.transport.abort()
    await eventually(lambda: service.server.connections == 0)

    assert caplog.records == []
    async with service.client.get("/livez") as response:
        assert response.status == 200


async def test_requests_are_logged_only_on_demand(caplog):
    caplog.set_level(logging.INFO)
    async with Service() as service, service.client.get("/livez"):
        assert caplog.records == []
    async with Service(access_log=True) as service, service.client.get("/livez"):
        await eventually(lambda: bool(caplog.records))
    assert [record.name for record in caplog.records] == ["sidecar.api.access"]
    assert "GET /livez" in caplog.records[0].getMessage()


async def test_the_server_can_be_stopped_with_clients_connected(service):
    reader, writer = await service.connect()
    async with service.client.get("/livez"):
        pass
    await service.server.stop()

    assert await reader.read() == b""
    assert service.server.connections == 0
    writer.close()
    with pytest.raises(aiohttp.ClientConnectorError):
        await service.client.get("/livez")


async def test_a_server_that_was_not_started_can_be_stopped():
    await Service().server.stop()


async def test_an_address_that_is_taken_is_an_error(service):
    _, port = service.server.address
    other = Service(port=port)
    with pytest.raises(OSError, match="address already in use"):
        await other.server.start()
    await other.server.stop()


async def test_the_loop_does_other_things_while_the_page_is_written(service, monkeypatch):
    """Between any two slices; and what is counted meanwhile tears no family apart."""
    monkeypatch.setattr(app_module, "SLICE", 0.0)
    turns = 0
    is_over = False

    async def live() -> None:
        nonlocal turns
        while not is_over:
            turns += 1
            service.page.call("f", took=0.001)
            await asyncio.sleep(0)

    living = asyncio.create_task(live())
    async with service.client.get("/metrics") as response:
        text = await response.text()
    is_over = True
    await living
    assert turns > len(service.page.metrics._exposition.families)
    families = {family.name: family for family in parse_text(text)}
    durations = families["pgsidecar_query_duration_seconds"]
    counts = {
        s.labels["operation"]: s.value for s in durations.samples if s.name.endswith("_count")
    }
    whole = {
        s.labels["operation"]: s.value for s in durations.samples if s.labels.get("le") == "+Inf"
    }
    assert counts == whole
    assert counts["select"] > 0


async def test_the_loop_is_free_while_the_answer_is_packed(service, monkeypatch):
    """Packing and the process metrics run in a thread; queries go on meanwhile."""
    threads = []

    def process_text(format: Format) -> str:
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            threads.append("no loop here")
        return ""

    monkeypatch.setattr(service.page.metrics, "process_text", process_text)
    async with service.client.get("/metrics"):
        pass

    assert threads == ["no loop here"]


def test_it_runs_on_uvloop():
    """The loop the service uses; its transports are not asyncio's."""

    async def scrape() -> None:
        async with Service(max_connections=1) as service:
            async with service.client.get("/metrics") as response:
                assert response.status == 200
                assert "pgsidecar_up" in await response.text()
            reader, writer = await service.connect()
            assert (await reader.read()).startswith(b"HTTP/1.1 503 ")
            writer.close()

    uvloop.run(scrape())
