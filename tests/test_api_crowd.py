"""The JSON API of a sidecar with 5,000 clients: its answers are bounded, and nobody else waits for them."""

import asyncio
import json
import resource
from collections.abc import AsyncIterator
from time import perf_counter

import pytest

from sidecar.demo.postgres import EmbeddedPostgres
from tests.api_client import V1
from tests.contract import check
from tests.sidecar_process import MakeProcess, SidecarProcess
from tests.wire import query, startup

CLIENTS = 5000
AT_ONCE = 100
STALL = 0.06
"""Seconds that an answer may hold others up: in one piece it takes twice as long. The slices are of 0.5 ms;
the rest is for a machine with other things to do."""
LARGEST = 2 * 2**20
"""Bytes of a page of 1,000."""


@pytest.fixture
async def crowd(
    make_process: MakeProcess, postgres: EmbeddedPostgres
) -> AsyncIterator[SidecarProcess]:
    """All wait for the one connection that there is, but for the one that has it."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limits[1], limits[1]))
    sidecar = make_process(
        postgres.dsn(),
        max_size=1,
        min_idle=1,
        acquire_timeout="5m",
        listen={"max_clients": CLIENTS},
    )
    places = asyncio.Semaphore(AT_ONCE)
    writers: list[asyncio.StreamWriter] = []

    async def come(number: int) -> None:
        async with places:
            reader, writer = await asyncio.open_connection("127.0.0.1", sidecar.pg_port)
            writers.append(writer)
            name = f"application number {number}"
            writer.write(startup({"user": "app", "database": "main", "application_name": name}))
            await reader.readuntil(b"Z\0\0\0\x05I")
            writer.write(query("begin"))

    try:
        async with asyncio.timeout(50):
            await asyncio.gather(*(come(number) for number in range(CLIENTS)))
        await sidecar.until(lambda now: now.pending == CLIENTS - 1)
        yield sidecar
    finally:
        for writer in writers:
            writer.transport.abort()
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


async def longest_stall(sidecar: SidecarProcess, path: str) -> tuple[float, str]:
    """How long somebody else had to wait for an answer at most, while this one was made."""
    reader, writer = await asyncio.open_connection("127.0.0.1", sidecar.http_port)
    asked = asyncio.create_task(asyncio.to_thread(sidecar.get, path))
    longest = 0.0
    while not asked.done():
        began = perf_counter()
        writer.write(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")
        await reader.readuntil(b"ok\n")
        longest = max(longest, perf_counter() - began)
    writer.close()
    status, text = await asked
    assert status == 200, text
    return longest, text


@pytest.mark.timeout(120)
async def test_answers_about_5000_clients_are_bounded_and_hold_nobody_up(crowd):
    """Each path a few times: a machine may be busy now and then, the sidecar would be each time."""
    for path, total in (("clients", CLIENTS), ("waits", CLIENTS - 1)):
        stalls, text = [], ""
        for _ in range(8):
            stall, text = await longest_stall(crowd, f"{V1}/{path}?limit=1000&offset=2000")
            stalls.append(stall)
        page = json.loads(text)
        check(f"{V1}/{path}", 200, "application/json", page)
        assert (len(page["items"]), page["total"]) == (1000, total)
        assert len(text) < LARGEST
        print(f"{path}: {len(text)} bytes, stalls {[round(each * 1000, 1) for each in stalls]} ms")
        assert min(stalls) < STALL, stalls

    _, text = await longest_stall(crowd, f"{V1}/waits?application=application%20number%204321")
    assert [wait["who"]["application"] for wait in json.loads(text)["items"]] in (
        ["application number 4321"],
        [],  # it is the one that has the connection
    )
