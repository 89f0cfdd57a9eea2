"""A real sidecar for tests, in this process or in its own, and what its /metrics says.

In this process (``ServiceHere``) a test reaches into the pool; a load would share its event loop, so
loads, signals and exit codes take ``SidecarProcess``. Both are asked over their sockets in the same way.
"""

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar
from urllib.parse import quote, urlencode

import psycopg
from prometheus_client.parser import text_string_to_metric_families

from sidecar import config_file
from sidecar.pool.pool import Pool
from sidecar.service import Service

PATIENCE = 10.0
"""Seconds for something to come true that takes milliseconds on a machine with nothing else to do."""

POLL = 0.02  # seconds

T = TypeVar("T")


def configuration(
    dsn: str,
    *,
    listen: Mapping[str, object] | None = None,
    http: Mapping[str, object] | None = None,
    log: Mapping[str, object] | None = None,
    users: Mapping[str, object] | None = None,
    console: Mapping[str, object] | None = None,
    incidents: Mapping[str, object] | None = None,
    statements: Mapping[str, object] | None = None,
    drain_timeout: str = "1s",
    **main: object,
) -> str:
    """The text of a configuration: pool ``main`` with these options, ports from the kernel.

    JSON, which is YAML; ``$`` would begin a variable. Clients need no password: it would cost each
    login milliseconds, and has its own tests.
    """
    pools = {"main": {"dsn": dsn, **main}}
    sections = {
        "listen": {"port": 0, "auth": "trust", **(listen or {})},
        "http": {"port": 0, **(http or {})},
        "log": log or {},
        "users": users or {},
        "console": console or {},
        "incidents": incidents or {},
        "statements": statements or {},
        "pools": pools,
        "drain_timeout": drain_timeout,
    }
    return json.dumps(sections, default=str).replace("$", "$$")


class Metrics:
    """One scrape."""

    def __init__(self, text: str) -> None:
        self.text = text
        self._samples: dict[str, dict[frozenset[tuple[str, str]], float]] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                values = self._samples.setdefault(sample.name, {})
                values[frozenset(sample.labels.items())] = sample.value

    def __str__(self) -> str:
        """What is not 0."""
        lines = [line for line in self.text.splitlines() if "_bucket{" not in line]
        return "\n".join(line for line in lines if not line.startswith("#") and line[-2:] != " 0")

    def value(self, name: str, **labels: str) -> float:
        """The sample with exactly these labels."""
        return self._samples[name][frozenset(labels.items())]

    def total(self, name: str, **labels: str) -> float:
        """The sum of the samples that have these labels."""
        found = [v for key, v in self._samples[name].items() if labels.items() <= dict(key).items()]
        assert found, f"no {name} with {labels}"
        return sum(found)

    def above_zero(self, name: str, *by: str) -> dict[tuple[str, ...], float]:
        """The samples that are not 0, by the values of these labels."""
        counts: dict[tuple[str, ...], float] = {}
        for key, value in self._samples[name].items():
            if value:
                labels = dict(key)
                counts[tuple(labels[label] for label in by)] = value
        return counts

    @property
    def used(self) -> float:
        return self.value("pgsidecar_pool_connections", pool="main", state="used")

    @property
    def idle(self) -> float:
        return self.value("pgsidecar_pool_connections", pool="main", state="idle")

    @property
    def pending(self) -> float:
        return self.value("pgsidecar_pool_pending_requests", pool="main")

    @property
    def is_up(self) -> bool:
        return self.value("pgsidecar_up", pool="main") == 1

    @property
    def acquires(self) -> dict[str, float]:
        """By outcome, those that happened."""
        found = self.above_zero("pgsidecar_pool_acquires_total", "outcome")
        return {outcome: count for (outcome,), count in found.items()}

    @property
    def errors(self) -> dict[tuple[str, ...], float]:
        """Query errors by origin and class, those that happened."""
        return self.above_zero("pgsidecar_query_errors_total", "origin", "sqlstate_class")

    @property
    def queries(self) -> dict[str, float]:
        """By operation, those that happened."""
        found = self.above_zero("pgsidecar_query_duration_seconds_count", "operation")
        return {operation: count for (operation,), count in found.items()}

    @property
    def transactions(self) -> dict[str, float]:
        """By outcome, both."""
        return {
            outcome: self.value("pgsidecar_transactions_total", pool="main", outcome=outcome)
            for outcome in ("commit", "rollback")
        }

    @property
    def is_whole(self) -> bool:
        """Nobody has or wants a connection, and every lease that began has ended."""
        begun = self.acquires.get("immediate", 0) + self.acquires.get("waited", 0)
        ended = self.value("pgsidecar_pool_connection_use_seconds_count", pool="main")
        return self.used == self.pending == 0 and begun == ended


class Sidecar:
    """A running sidecar, by its addresses."""

    def __init__(self, pg_port: int, http_port: int) -> None:
        self.pg_port = pg_port
        self.http_port = http_port

    def dsn(self, user: str = "app", database: str = "main", **parameters: str | int) -> str:
        query = urlencode({key: str(value) for key, value in parameters.items()}, quote_via=quote)
        return f"postgresql://{user}@127.0.0.1:{self.pg_port}/{database}?{query}"

    def get(self, path: str) -> tuple[int, str]:
        """Status and text."""
        try:
            url = f"http://127.0.0.1:{self.http_port}{path}"
            with urllib.request.urlopen(url, timeout=PATIENCE) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as answer:
            with answer:
                return answer.code, answer.read().decode()

    def scrape(self) -> Metrics:
        status, text = self.get("/metrics")
        assert status == 200, text
        return Metrics(text)

    async def metrics(self) -> Metrics:
        return await asyncio.to_thread(self.scrape)

    async def value(self, name: str, **labels: str) -> float:
        return (await self.metrics()).value(name, **labels)

    async def until(
        self, condition: Callable[[Metrics], object], within: float = PATIENCE
    ) -> Metrics:
        """The first scrape of which the condition is true."""
        deadline = time.monotonic() + within
        while not condition(metrics := await self.metrics()):
            assert time.monotonic() < deadline, f"not within {within:g} s; now:\n{metrics}"
            await asyncio.sleep(POLL)
        return metrics

    async def until_pinged(self) -> Metrics:
        """The first ping is over: no other comes, and takes a connection, for ``ping_interval``."""
        return await self.until(lambda now: now.total("pgsidecar_pings_total", outcome="ok"))

    async def until_whole(self, idle: int | None = None) -> Metrics:
        """Nobody has or wants a connection, no lease is left; ``idle`` connections, if given."""
        return await self.until(lambda now: now.is_whole and idle in (None, now.idle))


class ServiceHere(Sidecar):
    """A sidecar on this event loop."""

    def __init__(self, service: Service) -> None:
        super().__init__(service.pg_address[1], service.http_address[1])
        self.service = service

    @property
    def pool(self) -> Pool:
        return self.service.pools["main"]

    @classmethod
    async def start(cls, text: str) -> Self:
        service = Service(config_file.parse(text, {}, "test"))
        await service.start()
        return cls(service)

    async def stop(self) -> None:
        """Drain and stop, and see that nothing is left: in the ledgers, and in the pools."""
        for server in (idle for pool in self.service.directory for idle in pool.state.idle):
            owed = [server.expected, server.undo, server.queries]
            owed += [server.refusals, server.described]
            assert not any(owed), server
            assert (server.automatic, server.tx_started, server.receiver) == (0, 0.0, None)
        async with asyncio.timeout(PATIENCE):
            await self.service.stop()
        for pool in self.service.directory:
            assert pool.state.size == 0, f"left behind: {pool.state!r}"
            assert not pool.state.waiters


class SidecarProcess(Sidecar):
    """``pgsidecar run`` in a process of its own; its log is in a file."""

    def __init__(
        self, process: subprocess.Popen[bytes], log: Path, pg_port: int, http_port: int
    ) -> None:
        super().__init__(pg_port, http_port)
        self.process = process
        self._log = log

    @classmethod
    def start(cls, text: str, folder: Path) -> Self:
        """Returns when both ports are open."""
        path = folder / "config.yaml"
        path.write_text(text)
        log = folder / "log"
        with log.open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", "sidecar", "run", "--config", path],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                env=environment(),
                start_new_session=True,
            )
        try:
            ports = eventually(lambda: _ports(process, log), "the sidecar is ready")
        except BaseException:
            process.kill()
            process.wait()
            raise
        return cls(process, log, *ports)

    @property
    def log(self) -> str:
        return self._log.read_text()

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def wait(self, within: float = PATIENCE) -> int:
        """Its exit code."""
        return self.process.wait(within)

    def close(self) -> None:
        """End it, if it still runs. What it logged is shown where the test failed."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        print(self.log)


def _ports(process: subprocess.Popen[bytes], log: Path) -> tuple[int, int] | None:
    text = log.read_text()
    assert process.poll() is None, f"the sidecar ended with {process.returncode}:\n{text}"
    ready = r'"?postgresql"?[=:] ?"?127\.0\.0\.1:(\d+)"?,? "?http"?[=:] ?"?127\.0\.0\.1:(\d+)'
    found = re.search(ready, text)
    return (int(found[1]), int(found[2])) if found else None


def environment() -> dict[str, str]:
    """Ours, without what libpq or the sidecar would take settings from."""
    return {k: v for k, v in os.environ.items() if not k.startswith(("PG", "DATABASE_URL"))}


def eventually(look: Callable[[], T | None], what: str, within: float = PATIENCE) -> T:
    """What ``look`` finds once it finds something, in a test without an event loop."""
    deadline = time.monotonic() + within
    while not (found := look()):
        assert time.monotonic() < deadline, f"not within {within:g} s: {what}"
        time.sleep(POLL)
    return found


async def come_true(look: Callable[[], T | None], what: str, within: float = PATIENCE) -> T:
    """What ``look`` finds once it finds something."""
    deadline = time.monotonic() + within
    while not (found := look()):
        assert time.monotonic() < deadline, f"not within {within:g} s: {what}"
        await asyncio.sleep(POLL)
    return found


def duplicate(conn: psycopg.AsyncConnection[Any]) -> socket.socket:
    """The connection's socket, to do with it what the driver would not."""
    return socket.socket(fileno=os.dup(conn.fileno()))


def hang_up(conn: psycopg.AsyncConnection[Any]) -> None:
    """Close the connection's socket under it, as the death of its process would."""
    with duplicate(conn) as sock:
        sock.shutdown(socket.SHUT_RDWR)


class MakeService(Protocol):
    """Starts a sidecar on this event loop. ``main`` are options of pool ``main``."""

    async def __call__(self, dsn: str, **options: object) -> ServiceHere: ...


class MakeProcess(Protocol):
    """Starts a sidecar in a process of its own."""

    def __call__(self, dsn: str, **options: object) -> SidecarProcess: ...
