"""What people may see of a running sidecar and do to it: the ``Control`` of the console.

Owns no state of the pools or of the listener: it reads theirs, and calls what they offer. Made by
``service``, which alone starts and stops.
"""

from collections.abc import Iterator
from typing import Final

from sidecar.config import Config
from sidecar.console.facts import PoolFacts, Totals
from sidecar.events import AcquireOutcome, ClientSnapshot, PoolSnapshot, ServerSnapshot
from sidecar.observe.recorder import PoolRecorder, Recorder
from sidecar.pool import telling
from sidecar.pool.pool import Pool
from sidecar.pool.server import clock
from sidecar.proxy.directory import Directory
from sidecar.proxy.listener import PgListener


class Operations:
    def __init__(self, config: Config, recorder: Recorder) -> None:
        self.config = config
        self.listener: PgListener | None = None  # as soon as there is one
        self.directory: Directory | None = None  # so
        self._recorder: Final = recorder

    # -- seeing --------------------------------------------------------------------------------

    @property
    def pg_address(self) -> tuple[str, int]:
        assert self.listener is not None
        return self.listener.address

    def pools(self) -> list[PoolFacts]:
        """One for each entry of the configuration; all pools of a template are one."""
        assert self.directory is not None
        fixed = self.directory.fixed
        return [
            self._facts(snapshot, fixed.get(snapshot.name))
            for snapshot in self.directory.snapshots(clock())
        ]

    def _facts(self, snapshot: PoolSnapshot, pool: Pool | None) -> PoolFacts:
        return PoolFacts(
            snapshot,
            self.config.pools[snapshot.name],
            _totals(self._recorder.pool(snapshot.name)),
            is_paused=False,
            is_disabled=False,
            why_down="" if snapshot.is_up or pool is None else pool.opener.why_down(),
        )

    def clients(self) -> Iterator[ClientSnapshot]:
        assert self.listener is not None
        return self.listener.snapshots()

    def servers(self) -> Iterator[ServerSnapshot]:
        assert self.directory is not None
        for pool in list(self.directory):
            yield from telling.servers(pool)

    def logins(self) -> int:
        assert self.listener is not None
        return self.listener.logins


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
