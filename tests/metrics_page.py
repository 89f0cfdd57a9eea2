"""A /metrics page with the state behind it, and what the library's parsers read from it."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.openmetrics.parser import (
    text_string_to_metric_families as parse_openmetrics,
)
from prometheus_client.parser import text_string_to_metric_families as parse_text

from sidecar import config_file
from sidecar.events import (
    AcquireOutcome,
    ClientSnapshot,
    CloseReason,
    ConnectReason,
    ErrorOrigin,
    ErrorReason,
    Operation,
    Phase,
    PingOutcome,
    PinReason,
    PoolMode,
    PoolSnapshot,
    ServerSnapshot,
    TimeoutKind,
)
from sidecar.facts import PoolFacts
from sidecar.observe.exposition import Format
from sidecar.observe.metrics import MetricsText
from sidecar.observe.recorder import Recorder
from sidecar.work import Holder, Statement
from tests.work import failure, gauges, holder, statement

Labels = frozenset[tuple[str, str]]

IDLE = PoolSnapshot(
    name="main",
    mode=PoolMode.TRANSACTION,
    database="app",
    user="web",
    server="db.example:5432",
    used=0,
    idle=0,
    connecting=0,
    max_size=25,
    min_idle=5,
    pending=0,
    waited=0.0,
    oldest_wait=0.0,
    is_up=False,
    last_ping=0.0,
    queries_in_flight=0,
    longest_running_query=0.0,
    longest_idle_in_transaction=0.0,
    slow_query_threshold=5.0,
    pinned=dict.fromkeys(PinReason, 0),
    prepared_statements=0,
)


class Nobody:
    """What the API sees of a sidecar without clients."""

    config = config_file.parse(
        '{"pools": {"main": {"dsn": "postgresql://web@db/app"}}}', {}, "test"
    )

    def pools(self) -> list[PoolFacts]:
        return []

    def clients(self) -> Iterator[ClientSnapshot]:
        return iter(())

    def servers(self) -> Iterator[ServerSnapshot]:
        return iter(())

    def holders(self) -> Iterator[Holder]:
        return iter(())


class Page:
    """The metrics of a sidecar with these pools, and a clock that stands still."""

    def __init__(self, *pools: PoolSnapshot) -> None:
        self.now = 1000.0
        self.snapshots = list(pools or [IDLE])
        self.clients = (0, 10_000, 0, 100)
        self.recorder = Recorder(
            [(pool.name, pool.slow_query_threshold) for pool in self.snapshots],
            clock=lambda: self.now,
        )
        self.metrics = MetricsText(
            self.recorder,
            pools=lambda: self.snapshots,
            clients=lambda: self.clients,
            registry=CollectorRegistry(),
            revision="abc123",
        )

    def call(
        self, fingerprint: str, operation: Operation = Operation.SELECT, took: float = 0.001
    ) -> Statement:
        """Of pool ``main``."""
        pool = self.recorder.pool("main")
        called = pool.statement(fingerprint, f"SELECT {fingerprint}", int(operation))
        pool.query_done(called, took)
        return called

    def samples(self, format: Format = Format.TEXT) -> dict[str, dict[Labels, float]]:
        """The value of every sample, by name and labels, as the library reads them."""
        parse = parse_text if format is Format.TEXT else parse_openmetrics
        found: dict[str, dict[Labels, float]] = {}
        for family in parse(self.metrics.render(format)):
            for sample in family.samples:
                values = found.setdefault(sample.name, {})
                assert frozenset(sample.labels.items()) not in values, "the same series twice"
                values[frozenset(sample.labels.items())] = sample.value
        return found

    def described(self, format: Format) -> dict[str, tuple[str, str]]:
        """Type and help by family, as written."""
        lines = self.metrics.render(format).splitlines()
        helps = dict(line.split(" ", 3)[2:] for line in lines if line.startswith("# HELP "))
        types = dict(line.split(" ", 3)[2:] for line in lines if line.startswith("# TYPE "))
        assert helps.keys() == types.keys()
        return {name: (types[name], helps[name]) for name in types}

    def labels(self, name: str) -> set[Labels]:
        return set(self.samples()[f"pgsidecar_{name}"])

    def value(self, name: str, **labels: str) -> float:
        """The sample with these labels, those of pool ``main`` where it has a pool."""
        values = self.samples()[f"pgsidecar_{name}"]
        wanted = labels.items()
        (value,) = (
            value
            for key, value in values.items()
            if wanted <= dict(key).items() and dict(key).get("pool", "main") == "main"
        )
        return value


def fill(page: Page) -> None:
    """A different count everywhere, so that a value in the wrong place shows."""
    pool = page.recorder.pool("main")
    for number, outcome in enumerate(AcquireOutcome, 1):
        for _ in range(number):
            pool.acquired(outcome, 0.02, number)
    for number, operation in enumerate(Operation, 1):
        for _ in range(number):
            page.call(operation.label, operation, 0.001 * number)
            pool.query_slow(statement(operation))
    for number, connect_reason in enumerate(ConnectReason, 1):
        for _ in range(number):
            pool.connection_opened(connect_reason, 0.02)
    for number, close_reason in enumerate(CloseReason, 1):
        for _ in range(number):
            pool.connection_closed(close_reason)
    for number, ping in enumerate(PingOutcome, 1):
        for _ in range(number):
            pool.pinged(ping, 0.001)
    for number, kind in enumerate(TimeoutKind, 1):
        for _ in range(number):
            pool.timed_out(kind)
    pool.connection_failed(Phase.QUERY, ErrorReason.ADMIN_SHUTDOWN)
    pool.query_failed(failure(ErrorOrigin.SERVER, "23505"))
    pool.query_failed(failure(ErrorOrigin.SIDECAR, "53300"))
    pool.query_failed(failure(ErrorOrigin.SIDECAR, "U0001"))
    pool.reconnected(ok=False)
    pool.transaction_done(True, 0.01)
    pool.transaction_done(True, 0.01)
    pool.transaction_done(False, 0.01)
    pool.overhead(0.00002)
    pool.released(45.0)
    for server in (1, 2):
        pool.leak_began(holder(server))
    pool.leak_ended(holder(1))
    pool.watch(page.now, gauges(waited=3.0, holders=[holder(1), holder(2, "batch")]))
