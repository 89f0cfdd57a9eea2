"""Thousands of cancel requests at any moment, and keys that are guessed: who did not ask is not hit.

A cancel request names a backend of PostgreSQL, not a query: one that comes late would hit whoever is
next there. Here many clients take turns on few backends, with queries as short as can be.
"""

import asyncio
import random
import secrets
import struct
import time
from typing import Self

import pytest

from sidecar.demo.postgres import EmbeddedPostgres
from sidecar.protocol import messages as m
from tests.sidecar_process import PATIENCE, MakeProcess, SidecarProcess
from tests.wire import query, run, startup

CANCELS = 2000
LONGEST = 25.0  # seconds of a storm, on a machine that has much else to do


class Talker:
    """A client that waits for nothing but what it says it waits for."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self.pid = 0
        self.secret = b""

    @classmethod
    async def connect(cls, port: int, minor: int) -> Self:
        client = cls(*await asyncio.open_connection("127.0.0.1", port))
        client.send(startup({"user": "app", "database": "main"}, 3 << 16 | minor))
        await client.answer()
        assert len(client.secret) == (32 if minor else 4)
        return client

    def send(self, data: bytes) -> None:
        self._writer.write(data)

    async def answer(self) -> dict[str, str]:
        """Up to ReadyForQuery; the fields of the error on the way, if there is one."""
        error: dict[str, str] = {}
        while True:
            kind, length = m.HEADER.unpack(await self._reader.readexactly(5))
            body = await self._reader.readexactly(length - 4)
            if kind == m.ERROR_RESPONSE:
                error = m.error_fields(body)
            elif kind == m.BACKEND_KEY_DATA:
                self.pid, self.secret = int.from_bytes(body[:4], "big"), body[4:]
            elif kind == m.READY_FOR_QUERY:
                return error

    async def ask(self, data: bytes) -> dict[str, str]:
        self.send(data)
        return await self.answer()

    async def close(self) -> None:
        self._writer.close()
        await self._writer.wait_closed()


async def cancel(port: int, pid: int, secret: bytes) -> None:
    """Returns when the other side says that it has been dealt with."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    body = struct.pack("!II", 80877102, pid) + secret
    writer.write(struct.pack("!I", len(body) + 4) + body)
    try:
        assert await reader.read() == b""
    finally:
        writer.close()


class Storm:
    def __init__(self, sidecar: SidecarProcess) -> None:
        self.port = sidecar.pg_port
        self.bystanders: list[Talker] = []
        self.is_over = False
        self.problems: list[str] = []
        self.sent = self.hit = self.untouched = self.guessed = 0

    async def stand_by(self, client: Talker, seed: int) -> None:
        """Queries of one's own, that nobody has asked to cancel."""
        rng = random.Random(seed)
        texts = ["select 1", "select pg_sleep(0.001)", "select count(*) from pg_class"]
        while not self.is_over:
            text = rng.choice(texts)
            error = await client.ask(query(text) if rng.random() < 0.5 else run(text))
            if error:
                self.problems.append(f"bystander: {error}")
            self.untouched += 1

    async def ask_for_it(self, client: Talker, seed: int) -> None:
        """Queries that end before, while and after they are cancelled, several times each."""
        rng = random.Random(seed)
        while not self.is_over:
            client.send(query(f"select pg_sleep({rng.choice([0, 0.001, 0.005, 0.02])})"))
            async with asyncio.TaskGroup() as group:
                for _ in range(rng.randint(1, 4)):
                    group.create_task(cancel(self.port, client.pid, client.secret))
                    self.sent += 1
                    if rng.random() < 0.3:
                        await asyncio.sleep(rng.random() * 0.003)
                error = await client.answer()
            if error:
                self.hit += 1
                if error["C"] != "57014":
                    self.problems.append(f"asker: {error}")
            # all have been dealt with: this one is safe
            if error := await client.ask(query("select 1")):
                self.problems.append(f"asker, after the end of the requests: {error}")

    async def guess(self, seed: int) -> None:
        """The pid of another client, which is no secret, with keys that are not its own."""
        rng = random.Random(seed)
        while not self.is_over:
            client = rng.choice(self.bystanders)
            right = client.secret
            wrong = rng.choice(
                [
                    secrets.token_bytes(len(right)),
                    right[:-1] + bytes([right[-1] ^ 1]),
                    right[:-1] + b"\0" if right[-1] else right[:-1] + b"\1",
                    right + b"\0" * rng.choice([1, 28]),
                    bytes(len(right)),
                ]
            )
            await cancel(self.port, client.pid, wrong)
            self.guessed += 1


@pytest.mark.parametrize("mode", ["transaction", "session"])
async def test_storm_of_cancels_hits_nobody_else(
    postgres: EmbeddedPostgres, make_process: MakeProcess, mode: str
):
    bystanders, askers = (8, 8) if mode == "transaction" else (4, 6)
    size = 4 if mode == "transaction" else bystanders + askers
    sidecar = make_process(postgres.dsn(), max_size=size, mode=mode)
    storm = Storm(sidecar)
    clients = [
        await Talker.connect(sidecar.pg_port, 2 if number % 2 else 0)
        for number in range(bystanders + askers)
    ]
    storm.bystanders = clients[:bystanders]
    deadline = time.monotonic() + LONGEST
    try:
        async with asyncio.timeout(LONGEST + PATIENCE), asyncio.TaskGroup() as group:
            for seed, client in enumerate(clients):
                work = storm.stand_by if seed < bystanders else storm.ask_for_it
                group.create_task(work(client, seed))
            group.create_task(storm.guess(-1))
            while storm.sent < CANCELS and time.monotonic() < deadline:  # noqa: ASYNC110  ends the storm
                await asyncio.sleep(0.05)
            storm.is_over = True
    finally:
        for client in clients:
            await client.close()
    assert storm.problems == []
    assert storm.sent >= CANCELS
    assert storm.hit > 20
    assert storm.untouched > 200
    assert storm.guessed > 50
    await sidecar.until_whole()


@pytest.mark.parametrize("mode", ["transaction", "session"])
async def test_key_of_one_client_is_no_other_ones(
    postgres: EmbeddedPostgres, make_process: MakeProcess, mode: str
):
    """Nor that of a client that has gone, whose backend somebody else works on now."""
    sidecar = make_process(postgres.dsn(), max_size=1, mode=mode)
    old: list[tuple[int, bytes]] = []
    for minor in (0, 2) * 5:
        client = await Talker.connect(sidecar.pg_port, minor)
        client.send(query("select pg_sleep(0.05)"))
        for pid, secret in old:
            await cancel(sidecar.pg_port, pid, secret)
            await cancel(sidecar.pg_port, client.pid, secret)
        assert await client.answer() == {}
        old.append((client.pid, client.secret))
        await client.close()
    assert len({secret for _, secret in old}) == len(old)
    await sidecar.until_whole()
