"""The composition root, and the documentation of the sidecar's life.

Start: pools (they begin to connect), PostgreSQL listener, HTTP, janitor.
Drain: stop accepting; clients without a lease go, the others finish theirs, up to a deadline.
Stop: clients, pools, HTTP.

Loops: the janitor, every 100 ms: sweeps the pools' deadlines, moves the rolling windows on, looks at
who waits and who holds what, and measures how late the event loop runs. Every other task belongs to a login, a connection being
opened or a cancel request, and lives in the same TaskGroup.
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any, Final

from prometheus_client import CollectorRegistry

from sidecar.api.server import HttpServer
from sidecar.circumstances import settings_of
from sidecar.config import Config
from sidecar.config_changes import changed, needs_restart, taken_over
from sidecar.console.desk import Desk
from sidecar.console.facts import Changes
from sidecar.errors import ConfigError
from sidecar.events import Observer, PoolSnapshot, Stop
from sidecar.observe.incident_files import IncidentFiles
from sidecar.observe.incidents import IncidentStore
from sidecar.observe.metrics import MetricsText
from sidecar.observe.recorder import Recorder
from sidecar.operate import Operations
from sidecar.pool.pool import Pool
from sidecar.pool.server import clock
from sidecar.proxy.directory import Directory
from sidecar.proxy.listener import PgListener

log = logging.getLogger("pgsidecar")

TICK: Final = 0.1  # s

_CLOSE_TIMEOUT: Final = 3.0
"""Seconds for the server to end our backends at the stop; then the sockets are closed."""


class Service:
    """``start`` and ``stop``, once each. ``observer`` replaces the recorder in the query path;
    ``source`` reads the configuration again, in a thread."""

    def __init__(
        self,
        config: Config,
        observer: Observer | None = None,
        source: Callable[[], Config] | None = None,
    ) -> None:
        self.config = config
        self._source: Final = source
        self._reloading: Final = asyncio.Lock()
        self.recorder: Final = Recorder(
            [(pool.name, pool.slow_query_threshold) for pool in config.pools.values()],
            clock,
            IncidentStore(config.incidents.keep, clock, config.incidents.directory),
            config.statements.limit,
            config.statements.exported,
        )
        self._files: Final = (
            None
            if config.incidents.directory is None
            else IncidentFiles(config.incidents.directory, config.incidents.keep)
        )
        self._saving = False
        self._observer: Final[Observer] = self.recorder if observer is None else observer
        self.operations: Final = Operations(config, self.recorder, self.shut_down, self.reload)
        self._directory: Directory | None = None
        self._stop = Stop.CLIENTS_GONE
        self._listener: PgListener | None = None
        self._http: HttpServer | None = None
        self._stopping = asyncio.Event()
        self._started: asyncio.Future[None] | None = None
        self._main: asyncio.Task[None] | None = None
        self._children: set[asyncio.Task[None]] = set()

    @property
    def pg_address(self) -> tuple[str, int]:
        """Where PostgreSQL clients connect to; with the real port where 0 was asked for."""
        assert self._listener is not None
        return self._listener.address

    @property
    def http_address(self) -> tuple[str, int]:
        assert self._http is not None
        return self._http.address

    @property
    def directory(self) -> Directory:
        """All pools, those of templates too."""
        assert self._directory is not None
        return self._directory

    @property
    def pools(self) -> dict[str, Pool]:
        """The pools that are no template's, by name."""
        return {} if self._directory is None else self._directory.fixed

    def snapshots(self) -> list[PoolSnapshot]:
        return self.directory.snapshots(clock())

    async def start(self) -> None:
        """Returns when both ports are open. Raises ConfigError if one cannot be."""
        self._started = asyncio.get_running_loop().create_future()
        self._main = asyncio.create_task(self._run())
        await asyncio.wait((self._started, self._main), return_when=asyncio.FIRST_COMPLETED)
        if self._main.done():
            _reraise(self._main)

    async def wait(self) -> None:
        """Until ``stop``; raises what broke the service."""
        assert self._main is not None
        await asyncio.wait((self._main,))
        _reraise(self._main)

    async def stop(self) -> None:
        """Drain and stop. Safe to call if ``start`` failed."""
        self.shut_down(Stop.DRAIN)
        if self._main is not None and not self._main.done():
            await self.wait()

    def shut_down(self, how: Stop) -> None:
        """Begin to stop, or go on with more haste."""
        self._stop = max(how, self._stop)
        self._stopping.set()

    async def reload(self) -> Changes:
        """Read the configuration again and take over what can change now.

        Raises ConfigError, and then nothing has changed.
        """
        async with self._reloading:  # of two, the later one has to win
            try:
                if self._source is None:
                    raise ConfigError("this sidecar was not started from a file")
                given = await asyncio.to_thread(self._source)
                config = taken_over(self.config, given)
            except ConfigError as exc:
                self.recorder.config_refused()
                log.error("configuration not reloaded", extra={"cause": exc.message})
                raise
            return self._take_over(config, given)

    def _take_over(self, config: Config, given: Config) -> Changes:
        different = changed(self.config, given)
        restart = [option for option in different if needs_restart(option)]
        applied = [option for option in different if not needs_restart(option)]
        if config.log.level != self.config.log.level:
            logging.getLogger("pgsidecar").setLevel(config.log.level.upper())
        self.config = config
        self.recorder.config_read(
            [(pool.name, pool.slow_query_threshold) for pool in config.pools.values()]
        )
        self.recorder.settle(settings_of(config, self.pg_address))
        self.operations.apply(config)
        log.info(
            "configuration reloaded",
            extra={"changed": ",".join(applied), "needs_restart": ",".join(restart)},
        )
        return Changes(applied, restart)

    def reload_soon(self) -> None:
        """The same, for a signal: what is wrong is in the log."""
        self._spawn(self._reload_and_log())

    async def _reload_and_log(self) -> None:
        try:
            await self.reload()
        except ConfigError:
            pass  # logged
        except Exception:
            log.exception("configuration not reloaded")

    # -- life ----------------------------------------------------------------------------------

    async def _run(self) -> None:
        async with asyncio.TaskGroup() as group:
            self._group = group
            try:
                await self._open()
                janitor = group.create_task(self._janitor())
                assert self._started is not None
                self._started.set_result(None)
                await self._stopping.wait()
                await self._drain()
                await self._close()
                janitor.cancel()
            finally:
                if self._http is not None:
                    await self._http.stop()
                for child in self._children:
                    child.cancel()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._group.create_task(work)
        self._children.add(task)
        task.add_done_callback(self._children.discard)

    async def _open(self) -> None:
        observer = self._observer
        self._directory = Directory(self.config, observer, self._spawn)
        self._desk = Desk(self.operations, self._spawn, observer.traffic, clock)
        self._listener = PgListener(self.config, self._directory, observer, self._spawn, self._desk)
        self.operations.listener = self._listener
        self.operations.directory = self._directory
        metrics = MetricsText(self.recorder, self.snapshots, self._clients, CollectorRegistry())
        http = HttpServer(self.config.http, metrics, self.readiness, self.recorder, self.operations)
        await self._listener.start()
        try:
            await http.start()
        except OSError as exc:
            where = f"{self.config.http.host}:{self.config.http.port}"
            raise ConfigError(f"http: cannot listen on {where}: {exc.strerror or exc}") from exc
        self._http = http
        self.recorder.settle(settings_of(self.config, self.pg_address))
        self._directory.start(clock())
        log.info(
            "ready for clients",
            extra={
                "postgresql": "{}:{}".format(*self.pg_address),
                "http": "{}:{}".format(*self.http_address),
                "pools": ",".join(self.config.pools),
            },
        )

    async def _janitor(self) -> None:
        if self._files is not None:  # if they cannot be written, better hear it now than at night
            self._saving = True
            self._spawn(self._save_incidents())
        due = clock() + TICK
        while True:
            await asyncio.sleep(due - clock())
            late = max(0.0, clock() - due)
            self._observer.loop_lag(late)
            if late > TICK:
                # Timers run before what has come from the sockets is read: an answer to a ping, say,
                # that is there already, must not be taken for one that never came.
                await asyncio.sleep(0)
                await asyncio.sleep(0)
            now = clock()
            self.directory.tick(now)
            assert self._listener is not None
            self._listener.tick(now)
            self.recorder.tick(now)
            self.recorder.watch(now, self.directory.gauges(now))
            if self.recorder.incidents.changed and not self._saving:
                self._saving = True
                self._spawn(self._save_incidents())
            self._desk.tick(now)
            if self._http is not None:
                self._http.tick()
            due = max(due + TICK, now)

    async def _save_incidents(self) -> None:
        """One at a time: a thread that a disk holds up is joined by no other."""
        try:
            if self._files is not None:
                await asyncio.to_thread(self._files.save, self.recorder.incidents.take_changed())
        except Exception:
            log.exception("incidents not written")
        finally:
            self._saving = False

    async def _drain(self) -> None:
        assert self._listener is not None
        log.info("draining", extra={"clients": self._listener.clients})
        self._listener.stop_accepting()
        if self._http is not None:
            self._http.drain()
        has_sent_away = False
        deadline: float | None = None
        while self._stop is not Stop.NOW:
            if self._stop is Stop.CLIENTS_GONE:
                if not self._listener.relays():
                    break
            elif not has_sent_away:
                has_sent_away = True
                self._listener.send_away()
            elif not any(pool.state.active or pool.state.waiters for pool in self.directory):
                break
            elif self._stop is Stop.DRAIN:
                deadline = deadline or clock() + self.config.drain_timeout
                if clock() >= deadline:
                    break
            await asyncio.sleep(0.02)

    async def _close(self) -> None:
        assert self._listener is not None
        now = clock()
        for pool in self.directory:
            pool.close(now)
        self.directory.close()
        self._listener.end_all()
        deadline = clock() + _CLOSE_TIMEOUT
        while clock() < deadline and any(pool.state.size for pool in self.directory):  # noqa: ASYNC110  once in a life; an event would need a hook in the hot path
            await asyncio.sleep(0.02)
        for pool in self.directory:
            pool.abort()
        self.recorder.close(clock())
        try:
            async with asyncio.timeout(_CLOSE_TIMEOUT):
                await self._save_incidents()
        except TimeoutError:
            log.warning("incidents not written in time")
        log.info("stopped")

    # -- telling ---------------------------------------------------------------------------------

    def readiness(self) -> list[str]:
        """Why no traffic should come here; empty if it may. A template is always ready: whether
        its server is there is known when a client asks for a database."""
        if self._stopping.is_set():
            return ["draining"]
        return [
            f"pool {pool.name!r}: PostgreSQL at {pool.config.target.describe()} is not reachable"
            + (f" ({cause})" if (cause := pool.opener.why_down()) else "")
            for pool in self.pools.values()
            if not pool.opener.is_up
        ]

    def _clients(self) -> tuple[int, int, int, int]:
        listener, http = self._listener, self._http
        return (
            0 if listener is None else listener.clients,
            self.config.listen.max_clients,
            0 if http is None else http.connections,
            self.config.http.max_connections,
        )


def _reraise(task: asyncio.Task[None]) -> None:
    """The cause rather than the group it came in."""
    if task.cancelled():
        return
    error = task.exception()
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    if error is not None:
        raise error
