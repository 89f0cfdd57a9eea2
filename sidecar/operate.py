"""What people may see of a running sidecar and do to it: the ``Control`` of the console, and the
``View`` of the API.

Owns no state of the pools or of the listener: it reads theirs, and calls what they offer. Made by
``service``, which alone starts and stops.
"""

import logging
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Final

from sidecar.config import Config
from sidecar.console.facts import Changes
from sidecar.errors import SidecarError
from sidecar.events import (
    AcquireOutcome,
    ClientSnapshot,
    PoolSnapshot,
    ServerSnapshot,
    Stop,
)
from sidecar.facts import PoolFacts, Totals
from sidecar.observe.incidents import Incident
from sidecar.observe.recorder import PoolRecorder, Recorder
from sidecar.pool import report, steering, telling
from sidecar.pool.pool import Pool
from sidecar.pool.server import clock
from sidecar.pool.state import ConnectionState
from sidecar.proxy.directory import Directory
from sidecar.proxy.listener import PgListener
from sidecar.work import Holder

log = logging.getLogger("pgsidecar")


class Operations:
    def __init__(
        self,
        config: Config,
        recorder: Recorder,
        shut_down: Callable[[Stop], None],
        reload: Callable[[], Awaitable[Changes]],
    ) -> None:
        self.config = config
        self.listener: PgListener | None = None  # as soon as there is one
        self.directory: Directory | None = None  # so
        self._recorder: Final = recorder
        self._shut_down: Final = shut_down
        self._reload: Final = reload

    # -- seeing --------------------------------------------------------------------------------

    @property
    def pg_address(self) -> tuple[str, int]:
        return self._clients.address

    def pools(self) -> list[PoolFacts]:
        """One for each entry of the configuration; all pools of a template are one."""
        fixed = self._directory.fixed
        return [
            self._facts(snapshot, fixed.get(snapshot.name))
            for snapshot in self._directory.snapshots(clock())
        ]

    def live_pools(self) -> list[tuple[int, str, PoolSnapshot]]:
        now = clock()
        return [
            (
                id(pool),
                pool.target.database if pool.config.is_template else pool.name,
                pool.snapshot(now),
            )
            for pool in self._directory
        ]

    def _facts(self, snapshot: PoolSnapshot, pool: Pool | None) -> PoolFacts:
        return PoolFacts(
            snapshot,
            self.config.pools[snapshot.name],
            _totals(self._recorder.pool(snapshot.name)),
            is_paused=snapshot.name in self._directory.paused,
            is_disabled=snapshot.name in self._clients.disabled,
            why_down="" if pool is None else pool.opener.why_down(),
        )

    def clients(self) -> Iterator[ClientSnapshot]:
        return self._clients.snapshots()

    def servers(self) -> Iterator[ServerSnapshot]:
        for pool in list(self._directory):
            yield from telling.servers(pool)

    def holders(self) -> Iterator[Holder]:
        """Of each lease, as it is when it is asked for: the caller may pause between."""
        for pool in list(self._directory):
            for server in list(pool.state.active):
                if server.state is ConnectionState.ACTIVE:
                    yield report.holder(pool.name, server)

    def logins(self) -> int:
        return self._clients.logins

    def insights(self) -> list[PoolRecorder]:
        return list(self._recorder.pools.values())

    def incidents(self) -> list[Incident]:
        return self._recorder.incidents.all()

    # -- doing ---------------------------------------------------------------------------------

    def meant(self, database: str) -> list[str]:
        if not database:
            return list(self.config.pools)
        if database in self.config.pools:
            return [database]
        pool = self.config.pool_for(database)
        if pool.is_template:
            raise SidecarError(
                f'database "{database}" is one of template "{pool.name}"',
                hint=f'Name the template, which means all of its databases: "{pool.name}".',
                sqlstate="0A000",
            )
        return [pool.name]

    def pause(self, pools: Sequence[str]) -> list[str]:
        now, paused = clock(), self._directory.paused
        log.info("pools paused", extra={"pools": ",".join(pools)})
        self._directory.paused = paused.union(pools)
        for pool in self._named(pools):
            steering.pause(pool, now)
        return [name for name in pools if name not in paused]

    def resume(self, pools: Sequence[str]) -> list[str]:
        now, paused = clock(), self._directory.paused
        resumed = [name for name in pools if name in paused]
        if resumed:
            log.info("pools resumed", extra={"pools": ",".join(resumed)})
        self._directory.paused = paused.difference(pools)
        for pool in self._named(resumed):
            steering.resume(pool, now)
        return resumed

    def has_connections(self, pools: Sequence[str]) -> bool:
        return any(pool.state.size for pool in self._named(pools))

    def reconnect(self, pools: Sequence[str]) -> None:
        now = clock()
        log.info("connections are replaced", extra={"pools": ",".join(pools)})
        for pool in self._named(pools):
            steering.replace_all(pool, now)

    def has_replaced(self, pools: Sequence[str]) -> bool:
        return any(
            server.is_replaced for pool in self._named(pools) for server in telling.servers(pool)
        )

    def kill(self, pools: Sequence[str]) -> None:
        now = clock()
        log.warning("pools killed", extra={"pools": ",".join(pools)})
        self._directory.paused = self._directory.paused.union(pools)
        for pool in self._named(pools):
            steering.kill(pool, now)
        for relay in self._clients.relays():
            if relay.pool.name in pools:
                relay.kill()

    def kill_client(self, id: int) -> bool:
        for relay in self._clients.relays():
            if relay.id == id:
                relay.kill()
                return True
        return False

    def set_enabled(self, pools: Sequence[str], enabled: bool) -> None:
        log.info("pools enabled" if enabled else "pools disabled", extra={"pools": ",".join(pools)})
        disabled = self._clients.disabled
        self._clients.disabled = disabled.difference(pools) if enabled else disabled.union(pools)

    async def reload(self) -> Changes:
        return await self._reload()

    def shut_down(self, stop: Stop) -> None:
        self._shut_down(stop)

    def apply(self, config: Config) -> None:
        """Take over what a reload may change; clients of pools that are gone are sent away."""
        self.config = config
        self._clients.reconfigure(config)
        gone = self._directory.reconfigure(config, clock())
        for relay in self._clients.relays():
            if relay.pool in gone:
                relay.shut_down()

    def _named(self, names: Sequence[str]) -> list[Pool]:
        return [pool for pool in self._directory if pool.name in names]

    @property
    def _directory(self) -> Directory:
        assert self.directory is not None
        return self.directory

    @property
    def _clients(self) -> PgListener:
        assert self.listener is not None
        return self.listener


def _totals(recorder: PoolRecorder) -> Totals:
    acquires = recorder.acquires()
    return Totals(
        assignments=acquires[AcquireOutcome.IMMEDIATE] + acquires[AcquireOutcome.WAITED],
        transactions=recorder.transactions.count(),
        queries=sum(histogram.count() for histogram in recorder.queries),
        received=recorder.traffic.client_received,
        sent=recorder.traffic.client_sent,
        transaction_time=recorder.transactions.total,
        query_time=sum(histogram.total for histogram in recorder.queries),
        wait_time=recorder.acquire_durations().total,
        client_parses=sum(recorder.parses.values()),
        server_parses=recorder.parses[False],
    )
