"""The text of ``/metrics``: what ``catalogue`` reads at a scrape, and the process metrics of the library.

Counts nothing itself and keeps nothing between two scrapes but the time the last one took.
"""

import time
from collections.abc import Callable, Iterator, Sequence

from prometheus_client import (
    CollectorRegistry,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.openmetrics import exposition as openmetrics

from sidecar.events import PoolSnapshot
from sidecar.observe.catalogue import catalogue
from sidecar.observe.exported import Lines
from sidecar.observe.exposition import Exposition, Format
from sidecar.observe.families import ClientCounts, PoolScrape, Scrape
from sidecar.observe.recorder import PoolRecorder, Recorder
from sidecar.observe.sketch import QUANTILES, WINDOWS


class MetricsText:
    """The text of ``/metrics``.

    ``own_parts`` reads state and belongs on the event loop, which may do something else after each of
    them. ``process_text`` belongs in a thread: it lists the open files, which takes 5 ms where there
    are 5,000 clients.
    """

    def __init__(
        self,
        recorder: Recorder,
        pools: Callable[[], Sequence[PoolSnapshot]],
        clients: Callable[[], ClientCounts],
        registry: CollectorRegistry,
        revision: str = "unknown",
    ) -> None:
        self.pools = pools
        self._recorder = recorder
        self._clients = clients
        self._took = 0.0
        self._registry = registry
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        self._revision = revision
        self._pools: tuple[str, ...] = ()
        self._build()

    def _build(self) -> None:
        """All that is the same in every scrape; a reload may bring other pools."""
        self._pools = tuple(self._recorder.pools)
        self._exposition = Exposition(catalogue(self._pools, self._revision))

    def own_parts(self, format: Format) -> Iterator[str]:
        """All metrics but those of the process, family by family."""
        took, began = 0.0, time.perf_counter()
        for part in self._parts(format):
            took += time.perf_counter() - began
            yield part
            began = time.perf_counter()
        self._took = took + time.perf_counter() - began

    def _parts(self, format: Format) -> Iterator[str]:
        now = self._recorder.clock()
        self._recorder.tick(now)  # the windows are up to date even where the loop was held up
        if self._pools != tuple(self._recorder.pools):
            self._build()
        exposition = self._exposition  # a reload in between makes another one
        snapshots = {snapshot.name: snapshot for snapshot in self.pools()}
        pools: list[PoolScrape] = []
        for name, pool in list(self._recorder.pools.items()):
            latency = [pool.latency.quantiles(window, now, QUANTILES) for window in WINDOWS]
            pools.append(PoolScrape(pool, snapshots[name], latency, statement_lines(pool)))
            yield ""
        yield from exposition.render(
            format, Scrape(self._recorder, pools, self._clients(), self._took)
        )

    def process_text(self, format: Format) -> str:
        """The metrics of the process, and the end of the page."""
        if format is Format.OPENMETRICS:
            text: bytes = openmetrics.generate_latest(self._registry)  # type: ignore[no-untyped-call]
        else:
            text = generate_latest(self._registry)
        return text.decode()

    def render(self, format: Format) -> str:
        """The whole page."""
        return "".join(self.own_parts(format)) + self.process_text(format)


def statement_lines(pool: PoolRecorder) -> Lines:
    queries = pool.queries
    table = pool.statements
    calls = sum(query.count() for query in queries)
    seconds = sum(query.total for query in queries)
    return pool.exported.scrape((calls, seconds, table.failures, table.rows()))
