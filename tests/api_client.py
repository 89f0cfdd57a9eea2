"""A client of the JSON API that holds each answer against the contract; and clients to be told of."""

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, Self

import aiohttp
import psycopg

from tests.contract import Json, check, contract
from tests.sidecar_process import PATIENCE, Sidecar

V1 = "/api/v1"
PATHS = tuple(contract()["paths"])


NAMES = {"{pool}": "main", "{fingerprint}": "other", "{id}": "none"}
"""What stands for the parameters in paths, where any value does."""


def named(path: str) -> str:
    """A real path for a documented one."""
    for name, value in NAMES.items():
        path = path.replace(name, value)
    return path


def documented(path: str) -> str:
    """The path of the contract that this one is meant by."""
    if path in PATHS:
        return path
    found: list[str] = [
        each for each in PATHS if re.fullmatch(re.sub(r"\{\w+\}", "[^/]+", each), path)
    ]
    assert len(found) == 1, path
    return found[0]


class Api:
    """For the sidecar of an HTTP port."""

    def __init__(self, port: int, token: str = "") -> None:
        headers = {"Authorization": f"Bearer {token}"} if token else None
        self.session = aiohttp.ClientSession(f"http://127.0.0.1:{port}", headers=headers)

    @classmethod
    def of(cls, sidecar: Sidecar, token: str = "") -> Self:
        return cls(sidecar.http_port, token)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.session.close()

    async def ask(self, path: str, **parameters: object) -> tuple[int, Json]:
        """The answer, which the contract has."""
        given = {name: str(value) for name, value in parameters.items()}
        async with self.session.get(V1 + path, params=given) as response:
            body: Json = json.loads(await response.read())
            which = documented(V1 + path.partition("?")[0])
            check(which, response.status, response.content_type, body)
            assert response.headers["Cache-Control"] == "no-store"
            assert response.headers["X-Content-Type-Options"] == "nosniff"
            return response.status, body

    async def get(self, path: str, **parameters: object) -> Json:
        status, body = await self.ask(path, **parameters)
        assert status == 200, body
        return body

    async def items(self, path: str, **parameters: object) -> list[Any]:
        items: list[Any] = (await self.get(path, **parameters))["items"]
        return items

    async def until(self, path: str, count: int, **parameters: object) -> list[Any]:
        """The items, as soon as there are so many."""
        deadline = time.monotonic() + PATIENCE
        while len(items := await self.items(path, **parameters)) != count:
            assert time.monotonic() < deadline, f"{path} has {items}"
            await asyncio.sleep(0.02)
        return items

    @asynccontextmanager
    async def events(self, **parameters: str) -> AsyncIterator["Events"]:
        async with self.session.get(V1 + "/events", params=parameters) as response:
            assert response.status == 200, await response.read()
            assert response.content_type == "text/event-stream"
            yield Events(response.content)


class Events:
    """A stream of server-sent events."""

    def __init__(self, content: aiohttp.StreamReader) -> None:
        self._content = content

    async def block(self) -> list[str]:
        """The lines up to the next empty one; none when the stream is over."""
        lines: list[str] = []
        async with asyncio.timeout(PATIENCE):
            while line := (await self._content.readline()).decode():
                if line == "\n":
                    return lines
                lines.append(line.removesuffix("\n"))
        assert not lines, "the stream ended within an event"
        return []

    async def next(self, name: str) -> Json:
        """The data of the next event of this name."""
        while lines := await self.block():
            if lines[0] == f"event: {name}":
                data: Json = json.loads(lines[1].removeprefix("data: "))
                return data
        raise AssertionError(f"the stream ended without {name}")

    async def rest(self) -> None:
        """Until the stream is over."""
        while await self.block():
            pass


class Clients:
    """Connections to the sidecar by application, closed in the end."""

    def __init__(self, sidecar: Sidecar, stack: AsyncExitStack) -> None:
        self._sidecar = sidecar
        self._stack = stack

    async def connect(self, application: str) -> psycopg.AsyncConnection:
        dsn = self._sidecar.dsn(application_name=application)
        conn = await psycopg.AsyncConnection.connect(dsn, autocommit=True)
        self._stack.push_async_callback(conn.close)
        return conn

    async def holding(self, application: str, query: str = "select 1") -> psycopg.AsyncConnection:
        """One in an open transaction."""
        conn = await self.connect(application)
        await conn.execute("begin")
        await conn.execute(query)
        return conn
