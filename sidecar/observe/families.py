"""What a metric family is made of: name, type, labels, and where its values are read at a scrape.

The tools of ``catalogue``, which has the families themselves.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, product

from sidecar.events import PoolSnapshot
from sidecar.observe.exported import Lines
from sidecar.observe.exposition import (
    Family,
    Kind,
    exemplar,
    fixed,
    histogram_prefixes,
    histogram_values,
    number_or_nan,
    prefix,
)
from sidecar.observe.histogram import Histogram
from sidecar.observe.recorder import PoolRecorder, Recorder
from sidecar.observe.statements import Exemplar

PREFIX = "pgsidecar_"

ClientCounts = tuple[int, int, int, int]
"""Client connections: PostgreSQL now and at most, HTTP now and at most."""


@dataclass(frozen=True, slots=True)
class PoolScrape:
    """One pool at a scrape."""

    recorder: PoolRecorder
    snapshot: PoolSnapshot
    latency: list[tuple[list[float], int]]  # by window: the QUANTILES, and their samples
    statements: Lines


@dataclass(frozen=True, slots=True)
class Scrape:
    """What one scrape reads."""

    recorder: Recorder
    pools: list[PoolScrape]
    clients: ClientCounts
    previous_took: float  # seconds the previous scrape kept the event loop


Exemplars = Mapping[int, Exemplar]
"""The last one of each bucket."""

Labels = Mapping[str, str]
ScrapeFamily = Family[Scrape]


def each(**labels: Iterable[str]) -> list[Labels]:
    """Every combination of the labels' values, the last label changing fastest."""
    return [dict(zip(labels, values, strict=True)) for values in product(*labels.values())]


def metric(
    name: str,
    help: str,
    read: Callable[[Scrape], Iterable[float]],
    labels: Iterable[Labels] = ({},),
) -> ScrapeFamily:
    """A counter or a gauge; ``read`` gives its values in the order of ``labels``."""
    name = PREFIX + name
    kind: Kind = "counter" if name.endswith("_total") else "gauge"
    return Family(name, kind, help, fixed([prefix(name, one) for one in labels], read))


def histogram(
    name: str,
    help: str,
    bounds: Sequence[float],
    read: Callable[[Scrape], Iterable[Histogram]],
    labels: Iterable[Labels] = ({},),
) -> ScrapeFamily:
    name = PREFIX + name
    prefixes = chain.from_iterable(histogram_prefixes(name, one, bounds) for one in labels)

    def values(scrape: Scrape) -> Iterable[float]:
        return chain.from_iterable(map(histogram_values, read(scrape)))

    return Family(name, "histogram", help, fixed(prefixes, values))


class PerPool:
    """Makes families with the label ``pool``: ``read`` and ``labels`` are those of one pool."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = tuple(names)

    def metric(
        self,
        name: str,
        help: str,
        read: Callable[[PoolScrape], Iterable[float]],
        labels: Iterable[Labels] = ({},),
    ) -> ScrapeFamily:
        def values(scrape: Scrape) -> Iterable[float]:
            return chain.from_iterable(map(read, scrape.pools))

        return metric(name, help, values, self.labels(labels))

    def quantiles(
        self,
        name: str,
        help: str,
        read: Callable[[PoolScrape], Iterable[float]],
        labels: Iterable[Labels],
    ) -> ScrapeFamily:
        """A summary of quantiles only: ``_sum`` and ``_count`` of a window would not be counters."""
        name = PREFIX + name
        prefixes = [prefix(name, one) for one in self.labels(labels)]

        def values(scrape: Scrape) -> Iterable[float]:
            return chain.from_iterable(map(read, scrape.pools))

        return Family(name, "summary", help, fixed(prefixes, values, number_or_nan))

    def histogram(
        self,
        name: str,
        help: str,
        bounds: Sequence[float],
        read: Callable[[PoolRecorder], Iterable[Histogram]],
        labels: Iterable[Labels] = ({},),
        exemplars: Callable[[PoolRecorder], Iterable[Exemplars]] | None = None,
    ) -> ScrapeFamily:
        def histograms(scrape: Scrape) -> Iterable[Histogram]:
            return chain.from_iterable(read(pool.recorder) for pool in scrape.pools)

        family = histogram(name, help, bounds, histograms, self.labels(labels))
        if exemplars is None:
            return family
        read_exemplars = exemplars

        def with_exemplars(scrape: Scrape) -> Iterable[str]:
            lines = list(family.lines(scrape))
            first = 0  # line of a histogram: its buckets, +Inf, sum and count
            for pool in scrape.pools:
                for found in read_exemplars(pool.recorder):
                    for bucket, (trace, took, at) in found.items():
                        ids = {"trace_id": trace.trace_id, "span_id": trace.span_id}
                        lines[first + bucket] += exemplar(ids, took, at)
                    first += len(bounds) + 3
            return lines

        return replace(family, with_exemplars=with_exemplars)

    def of_statements(self, name: str, kind: Kind, help: str) -> ScrapeFamily:
        """A family whose lines come with the statements that have series."""
        name = PREFIX + name

        def lines(scrape: Scrape) -> Iterable[str]:
            return chain.from_iterable(pool.statements[name] for pool in scrape.pools)

        return Family(name, kind, help, lines)

    def of_applications(
        self, name: str, kind: Kind, help: str, read: Callable[[PoolRecorder], Mapping[str, float]]
    ) -> ScrapeFamily:
        """A family with a line for each application that has series."""
        name = PREFIX + name

        def lines(scrape: Scrape) -> Iterable[str]:
            for pool in scrape.pools:
                for application, value in read(pool.recorder).items():
                    labels = {"pool": pool.recorder.name, "application": application}
                    yield prefix(name, labels) + repr(value)

        return Family(name, kind, help, lines)

    def labels(self, labels: Iterable[Labels]) -> list[Labels]:
        return [{"pool": name, **one} for name, one in product(self._names, labels)]
