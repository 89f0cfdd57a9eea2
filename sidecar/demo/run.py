"""``pgsidecar demo``: PostgreSQL, the sidecar and its clients, started together and stopped together.

Owns: the order. Started: PostgreSQL, the service (in this process), the workload (its own process);
stopped the other way round, whatever happens. Does not own: any of the three, nor the view.

One loop: every second the view shows the figures since the look before. SIGINT and SIGTERM end it; a
second one leaves at once (the server's guard and the workload then see that we are gone).
"""

import asyncio
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from asyncio.subprocess import DEVNULL, Process
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import IO, TextIO

from sidecar import config_file
from sidecar.demo.figures import DemoFigures, FigureReader
from sidecar.demo.postgres import EmbeddedPostgres
from sidecar.demo.view import SHOW_CURSOR, View
from sidecar.errors import ConfigError, SidecarError
from sidecar.service import Service
from sidecar.units import seconds

PG_PORT, HTTP_PORT = 6432, 9632
VERSION = 18
USER, PASSWORD, DATABASE = "app", "demo", "shop"  # on loopback, and gone when the demo ends

_HOST = "127.0.0.1"
_LOOK_EVERY = 1.0  # seconds
_WORKLOAD_STOPS = 3.0  # seconds; it promises 2


class DemoFailed(SidecarError):
    """A part of the demo ended by itself."""


@dataclass(frozen=True, slots=True)
class _Workload:
    """The process that runs the applications, and the file with what it says."""

    process: Process
    said: IO[bytes]

    def check(self) -> None:
        if self.process.returncode is None:
            return
        self.said.seek(0)
        text = self.said.read().decode(errors="replace").strip()
        raise DemoFailed(f"the workload ended by itself ({self.process.returncode})\n{text}")


async def run_demo(
    duration: float | None, port: int | None, http_port: int | None, out: TextIO
) -> int:
    """Run for ``duration`` seconds (None: until a signal) and return the exit code.

    A port of None is the default one, or a free one if that is taken; 0 is any free port.
    ``ConfigError`` if a port that was asked for is taken.
    """
    port = _choose_port("--port", port, PG_PORT, out)
    http_port = _choose_port("--http-port", http_port, HTTP_PORT, out)
    with _signals(out) as stopping:
        async with AsyncExitStack() as stack:
            server = stack.enter_context(_postgres(out))
            service = await stack.enter_async_context(_service(server, port, http_port, stopping))
            workload = await stack.enter_async_context(_workload(server, service))
            try:
                _print_addresses(server, service, out)
                await _watch(service, workload, stopping, duration, out)
                print("stopping ...", file=out, flush=True)
            except BrokenPipeError:  # whoever read our output has seen enough
                os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())  # for the flush at exit
    return 0


def _choose_port(option: str, asked: int | None, default: int, out: TextIO) -> int:
    wanted = default if asked is None else asked
    with socket.socket() as probe:
        # as the listener will: a port whose connections only linger is free
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((_HOST, wanted))
        except OSError as exc:
            reason = exc.strerror or str(exc)
            if asked is not None:
                raise ConfigError(f"{option} {wanted}: {_HOST}:{wanted}: {reason}") from exc
            print(f"port {wanted}: {reason}; taking a free one instead", file=out)
            return 0
    return wanted


@contextmanager
def _signals(out: TextIO) -> Iterator[asyncio.Event]:
    """An event that SIGINT and SIGTERM set; the second signal ends the process."""
    loop = asyncio.get_running_loop()
    stopping = asyncio.Event()

    def stop() -> None:
        if stopping.is_set():
            if out.isatty():
                out.write(SHOW_CURSOR)
                out.flush()
            os._exit(130)
        stopping.set()

    numbers = (signal.SIGINT, signal.SIGTERM)
    for number in numbers:
        loop.add_signal_handler(number, stop)
    try:
        yield stopping
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


@contextmanager
def _postgres(out: TextIO) -> Iterator[EmbeddedPostgres]:
    """The server with the applications' user and database. Blocks: nothing else runs yet."""
    began = time.monotonic()
    print(f"starting PostgreSQL {VERSION} ...", end=" ", file=out, flush=True)
    with EmbeddedPostgres(VERSION, auth="scram-sha-256") as server:
        server.psql(f"CREATE ROLE {USER} LOGIN PASSWORD '{PASSWORD}'")
        server.psql(f"CREATE DATABASE {DATABASE} OWNER {USER}")
        print(f"ready after {seconds(time.monotonic() - began)}", file=out, flush=True)
        yield server


@asynccontextmanager
async def _service(
    server: EmbeddedPostgres, port: int, http_port: int, stopping: asyncio.Event
) -> AsyncIterator[Service]:
    """The sidecar; if it breaks, the demo stops and tells why."""
    service = Service(config_file.parse(_config_text(server, port, http_port), {}, "demo"))
    try:
        await service.start()
        ended = asyncio.create_task(service.wait())
        ended.add_done_callback(lambda _: stopping.set())
        yield service
    finally:
        await service.stop()
    await ended


def _config_text(server: EmbeddedPostgres, port: int, http_port: int) -> str:
    dsn = _direct_dsn(server)
    return f"""
listen: {{host: {_HOST}, port: {port}}}
http: {{host: {_HOST}, port: {http_port}}}
users:
  {USER}: {{password: {PASSWORD}}}
console: {{admin_users: {USER}}}
pools:
  main: {{dsn: "{dsn}", mode: transaction, max_size: 25, min_idle: 5}}
  direct: {{dsn: "{dsn}", mode: session, max_size: 3, min_idle: 0}}
drain_timeout: 2s
"""


def _direct_dsn(server: EmbeddedPostgres) -> str:
    """The way around the sidecar."""
    return server.dsn(user=USER, password=PASSWORD, database=DATABASE)


def _pooled_dsn(service: Service, pool: str) -> str:
    host, port = service.pg_address
    return f"postgresql://{USER}:{PASSWORD}@{host}:{port}/{pool}"


@asynccontextmanager
async def _workload(server: EmbeddedPostgres, service: Service) -> AsyncIterator[_Workload]:
    arguments = ["--dsn", _pooled_dsn(service, "main"), "--schema-dsn", _direct_dsn(server)]
    with tempfile.TemporaryFile() as said:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "sidecar.demo.workload", *arguments),
            stdin=DEVNULL,
            stdout=said,
            stderr=said,
            start_new_session=True,  # a Ctrl-C is for us, who stop it in its turn
        )
        try:
            yield _Workload(process, said)
        finally:
            await _stop(process)


async def _stop(process: Process) -> None:
    if process.returncode is not None:
        return
    process.terminate()
    try:
        async with asyncio.timeout(_WORKLOAD_STOPS):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()


def _print_addresses(server: EmbeddedPostgres, service: Service, out: TextIO) -> None:
    psql = "psql" if shutil.which("psql") else server.bin_dir / "psql"
    host, port = service.http_address
    print(
        f"""
The sidecar is ready. Try it in another terminal:
  {psql} {_pooled_dsn(service, "main")}
  {psql} {_pooled_dsn(service, "pgsidecar")} -c 'SHOW HOLDERS'
  pgsidecar top --url http://{host}:{port}
  curl http://{host}:{port}/metrics
Session mode, for migrations:  {_pooled_dsn(service, "direct")}
PostgreSQL without the pool:   {_direct_dsn(server)}
""",
        file=out,
        flush=True,
    )


async def _watch(
    service: Service,
    workload: _Workload,
    stopping: asyncio.Event,
    duration: float | None,
    out: TextIO,
) -> None:
    """Show the figures every second until the time is over or a signal came."""
    clock = asyncio.get_running_loop().time
    reader = FigureReader(service.recorder, service.recorder.clock())
    figures = reader.read(service.snapshots(), service.recorder.clock())
    view = View(out)
    due = clock()
    ends = None if duration is None else due + duration
    try:
        while not stopping.is_set() and (ends is None or due < ends):
            due += _LOOK_EVERY
            if ends is not None:
                due = min(due, ends)
            try:
                async with asyncio.timeout_at(due):
                    await stopping.wait()
            except TimeoutError:
                pass
            workload.check()
            figures = reader.read(service.snapshots(), service.recorder.clock())
            if not stopping.is_set():  # a second cut short would show a rate of chance
                view.show(figures)
    finally:
        view.close()
    print(_summary(figures), file=out)


def _summary(figures: DemoFigures) -> str:
    queries = sum(pool.queries for pool in figures.pools)
    errors = sum(pool.errors for pool in figures.pools)
    return f"{queries} queries in {figures.elapsed:.1f} s, {errors} of them failed"
