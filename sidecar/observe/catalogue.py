"""The metrics by name, type, labels and meaning, and where each value is read at a scrape.

The only module that knows Prometheus names; ``docs/metrics.md`` describes them for users. Every label
combination is written from the first scrape on, at 0: ``increase()`` does not see the first error otherwise.
"""

import platform
from collections.abc import Iterable
from functools import cache
from itertools import chain
from operator import add

from sidecar import __version__
from sidecar.events import (
    AcquireOutcome,
    CloseReason,
    ConnectReason,
    IncidentKind,
    Listener,
    Operation,
    PingOutcome,
    PinReason,
    TimeoutKind,
)
from sidecar.observe.exposition import (
    Family,
    histogram_prefixes,
    histogram_values,
    prefix,
)
from sidecar.observe.families import (
    PREFIX,
    PerPool,
    Scrape,
    ScrapeFamily,
    each,
    histogram,
    metric,
)
from sidecar.observe.histogram import (
    LAG_BUCKETS,
    OVERHEAD_BUCKETS,
    QUERY_BUCKETS,
    USE_BUCKETS,
    WAIT_BUCKETS,
)
from sidecar.observe.keys import CLIENT_KEYS, CONNECTION_ERROR_KEYS, ERROR_KEYS
from sidecar.observe.sketch import QUANTILES, WINDOWS
from sidecar.observe.verdict import Kind as Verdict


def catalogue(pools: Iterable[str], revision: str) -> Iterable[Family[Scrape]]:
    """All families, in the order of the page."""
    per_pool = PerPool(pools)
    yield from _pool_families(per_pool)
    yield from _connection_families(per_pool)
    yield from _query_families(per_pool)
    yield from _statement_families(per_pool)
    yield from _transaction_families(per_pool)
    yield from _state_families(per_pool)
    yield from _reason_families(per_pool)
    yield from _client_families()
    yield from _sidecar_families(revision)


def _pool_families(pools: PerPool) -> Iterable[ScrapeFamily]:
    """How full the pools are, and how long clients wait."""
    yield pools.metric(
        "pool_connections",
        "Server connections by state.",
        lambda pool: (pool.snapshot.used, pool.snapshot.idle, pool.snapshot.connecting),
        each(state=("used", "idle", "connecting")),
    )
    yield pools.metric(
        "pool_connections_max",
        "Most server connections allowed.",
        lambda pool: [pool.snapshot.max_size],
    )
    yield pools.metric(
        "pool_connections_idle_min",
        "Idle server connections kept ready.",
        lambda pool: [pool.snapshot.min_idle],
    )
    yield pools.metric(
        "pool_connections_used_peak",
        "Most server connections in use at once within the window.",
        lambda pool: [max(pool.recorder.used_peak(), pool.snapshot.used)],
        each(window=("1m",)),
    )
    yield pools.metric(
        "pool_pending_requests",
        "Clients waiting for a connection.",
        lambda pool: [pool.snapshot.pending],
    )
    yield pools.metric(
        "pool_pending_max_wait_seconds",
        "How long the oldest waiting client has waited; 0 if none waits.",
        lambda pool: [pool.snapshot.oldest_wait],
    )
    yield pools.metric(
        "pool_acquires_total",
        "Requests for a connection by outcome.",
        lambda pool: pool.recorder.acquires().values(),
        each(outcome=AcquireOutcome),
    )
    yield pools.histogram(
        "pool_acquire_duration_seconds",
        "Time to get a connection, failures included.",
        WAIT_BUCKETS,
        lambda pool: [pool.acquire_durations()],
    )
    yield pools.histogram(
        "pool_connection_use_seconds",
        "Time from getting a connection to giving it back.",
        USE_BUCKETS,
        lambda pool: [pool.uses],
    )
    yield pools.of_applications(
        "pool_connections_held",
        "gauge",
        "Server connections leased now, by the application of the client.",
        lambda pool: pool.blame.held(),
    )
    yield Family(
        PREFIX + "pool_info", "gauge", "Configuration of the pool; always 1.", _pool_info_lines
    )


def _connection_families(pools: PerPool) -> Iterable[ScrapeFamily]:
    """The life of server connections, and whether the server is well."""
    yield pools.histogram(
        "pool_connection_create_seconds",
        "Time to open a server connection: TCP, TLS and authentication.",
        WAIT_BUCKETS,
        lambda pool: [pool.creates],
    )
    yield pools.metric(
        "connections_opened_total",
        "Server connections opened, by reason.",
        lambda pool: pool.recorder.opened.values(),
        each(reason=ConnectReason),
    )
    yield pools.metric(
        "connections_closed_total",
        "Server connections closed, by reason.",
        lambda pool: pool.recorder.closed.values(),
        each(reason=CloseReason),
    )
    yield pools.metric(
        "connection_attempts_total",
        "Attempts to get a usable connection: acquires, those given up by the client excepted, and pings.",
        lambda pool: pool.recorder.attempts(),
        each(outcome=("ok", "error")),
    )
    yield pools.metric(
        "connection_errors_total",
        "Connection errors, by phase and cause.",
        lambda pool: pool.recorder.connection_errors.values(),
        [{"phase": phase, "reason": reason} for phase, reason in CONNECTION_ERROR_KEYS],
    )
    yield pools.metric(
        "reconnects_total",
        "Attempts to replace a lost server connection.",
        lambda pool: (pool.recorder.reconnects[True], pool.recorder.reconnects[False]),
        each(outcome=("ok", "error")),
    )
    yield pools.metric(
        "up",
        "1 if the server can be used, else 0.",
        lambda pool: [int(pool.snapshot.is_up)],
    )
    yield pools.metric(
        "pings_total",
        "Pings sent over idle server connections, by outcome.",
        lambda pool: pool.recorder.pings.values(),
        each(outcome=PingOutcome),
    )
    yield pools.histogram(
        "ping_duration_seconds",
        "Round trip of a ping, failures included.",
        WAIT_BUCKETS,
        lambda pool: [pool.ping_durations],
    )
    yield pools.metric(
        "ping_last_success_timestamp_seconds",
        "Unix time of the last good ping; 0 before the first.",
        lambda pool: [pool.snapshot.last_ping],
    )


def _query_families(pools: PerPool) -> Iterable[ScrapeFamily]:
    """What the server does for the clients, and how long it takes."""
    operations = [{"operation": operation.label} for operation in Operation]
    yield pools.histogram(
        "query_duration_seconds",
        "Time from forwarding a query to its end, failures included.",
        QUERY_BUCKETS,
        lambda pool: pool.queries,
        operations,
        lambda pool: pool.statements.exemplars,
    )
    yield pools.quantiles(
        "query_latency_seconds",
        "Rolling quantile of query durations, at most 1 % off; NaN without samples.",
        lambda pool: chain.from_iterable(quantiles for quantiles, _ in pool.latency),
        each(window=WINDOWS, quantile=map(repr, QUANTILES)),
    )
    yield pools.metric(
        "query_latency_samples",
        "Queries that ended within the window: the samples of the quantiles.",
        lambda pool: (samples for _, samples in pool.latency),
        each(window=WINDOWS),
    )
    yield pools.metric(
        "slow_queries_total",
        "Queries that reached the slow threshold, counted when they cross it.",
        lambda pool: pool.recorder.slow,
        operations,
    )
    yield pools.metric(
        "slow_query_threshold_seconds",
        "Duration from which on a query is slow.",
        lambda pool: [pool.recorder.slow_query_threshold],
    )
    yield pools.metric(
        "queries_in_flight",
        "Queries running now.",
        lambda pool: [pool.snapshot.queries_in_flight],
    )
    yield pools.metric(
        "longest_running_query_seconds",
        "Age of the oldest running query; 0 if none runs.",
        lambda pool: [pool.snapshot.longest_running_query],
    )
    yield pools.metric(
        "query_errors_total",
        "Errors sent to clients, by who raised them and the class of their SQLSTATE.",
        lambda pool: pool.recorder.errors.values(),
        [{"origin": origin, "sqlstate_class": each} for origin, each in ERROR_KEYS],
    )


def _statement_families(pools: PerPool) -> Iterable[ScrapeFamily]:
    """The statements that matter most, and how well the table of them does."""
    yield pools.of_statements(
        "statement_calls_total",
        "counter",
        "Queries that ended, failed ones included, by statement.",
    )
    yield pools.of_statements(
        "statement_seconds_total",
        "counter",
        "Time from forwarding queries to their end, by statement.",
    )
    yield pools.of_statements(
        "statement_errors_total",
        "counter",
        "Errors sent to clients, by the statement that failed.",
    )
    yield pools.of_statements(
        "statement_rows_total", "counter", "Rows returned or affected, by statement."
    )
    yield pools.of_statements(
        "statement_latency_seconds",
        "summary",
        "Rolling quantile of query durations within 5 minutes, at most 1 % off; NaN without samples.",
    )
    yield pools.of_statements(
        "statement_info", "gauge", "The normalised text of a statement; always 1."
    )
    yield pools.metric(
        "statements_tracked",
        "Statements told apart now.",
        lambda pool: [len(pool.recorder.statements)],
    )
    yield pools.metric(
        "statements_evicted_total",
        "Statements that made room for others, with their figures.",
        lambda pool: [pool.recorder.statements.evicted],
    )


def _state_families(pools: PerPool) -> Iterable[ScrapeFamily]:
    """What clients leave on server connections."""
    yield pools.metric(
        "pinned_connections",
        "Server connections kept beyond the transaction, by what keeps them.",
        lambda pool: pool.snapshot.pinned.values(),
        each(reason=PinReason),
    )
    yield pools.metric(
        "pins_total",
        "Times a client kept its server connection beyond the transaction, by what kept it.",
        lambda pool: pool.recorder.pins.values(),
        each(reason=PinReason),
    )
    yield pools.metric(
        "prepared_statements",
        "Prepared statements kept on all server connections together.",
        lambda pool: [pool.snapshot.prepared_statements],
    )
    yield pools.metric(
        "prepared_parses_total",
        "Named statements needed on a server connection that had them (reused) or not (parsed).",
        lambda pool: pool.recorder.parses.values(),
        each(result=("reused", "parsed")),
    )


def _reason_families(pools: PerPool) -> Iterable[ScrapeFamily]:
    """Who keeps others waiting, and what that led to."""
    yield pools.metric(
        "leaked_connections",
        "Server connections that are leaks now: leased, or in a transaction, for too long.",
        lambda pool: [len(pool.recorder.leaks)],
    )
    yield pools.metric(
        "leaks_total",
        "Leases that became leaks.",
        lambda pool: [pool.recorder.leaks_began],
    )
    yield pools.of_applications(
        "blamed_wait_seconds_total",
        "counter",
        "Time that clients waited for a connection, charged to those who held the connections meanwhile.",
        lambda pool: pool.blame.by_application(),
    )
    yield pools.metric(
        "verdict",
        "1 for what is wrong by the incidents that last now, healthy if none does.",
        lambda pool: map(int, pool.recorder.why.verdicts().values()),
        each(kind=Verdict),
    )
    yield pools.metric(
        "incidents_total",
        "Incidents recorded, by what began them.",
        lambda pool: pool.recorder.why.incidents.values(),
        each(kind=IncidentKind),
    )


def _transaction_families(pools: PerPool) -> Iterable[ScrapeFamily]:
    """Transactions, timeouts and the sidecar's own part in the time."""
    yield pools.histogram(
        "transaction_duration_seconds",
        "Time from the first statement of a transaction to its end.",
        QUERY_BUCKETS,
        lambda pool: [pool.transactions],
    )
    yield pools.metric(
        "transactions_total",
        "Finished transactions.",
        lambda pool: pool.recorder.committed_and_rolled_back(),
        each(outcome=("commit", "rollback")),
    )
    yield pools.metric(
        "longest_idle_in_transaction_seconds",
        "How long the client that idles longest in a transaction has sent nothing; 0 if none does.",
        lambda pool: [pool.snapshot.longest_idle_in_transaction],
    )
    yield pools.histogram(
        "proxy_overhead_seconds",
        "Time of the sidecar itself for one cycle, sampled.",
        OVERHEAD_BUCKETS,
        lambda pool: [pool.overheads],
    )
    yield metric(
        "timeouts_total",
        "Timeouts that ran out; pool is empty for a login that had not named it yet.",
        lambda scrape: chain(
            *(pool.recorder.timeouts.values() for pool in scrape.pools),
            [scrape.recorder.logins_timed_out],
        ),
        [*pools.labels(each(kind=TimeoutKind)), {"pool": "", "kind": TimeoutKind.LOGIN}],
    )


def _client_families() -> Iterable[ScrapeFamily]:
    listeners = each(listener=Listener)
    yield metric(
        "client_connections",
        "Client connections open now.",
        lambda scrape: (scrape.clients[0], scrape.clients[2]),
        listeners,
    )
    yield metric(
        "client_connections_max",
        "Most client connections allowed.",
        lambda scrape: (scrape.clients[1], scrape.clients[3]),
        listeners,
    )
    yield metric(
        "client_connections_total",
        "Client connections by what became of them.",
        lambda scrape: scrape.recorder.clients.values(),
        [{"listener": listener, "outcome": outcome} for listener, outcome in CLIENT_KEYS],
    )
    yield metric(
        "network_bytes_total",
        "Bytes moved over PostgreSQL connections.",
        _network_bytes,
        each(side=("client", "server"), direction=("received", "sent")),
    )
    yield Family(PREFIX + "http_requests_total", "counter", "HTTP requests answered.", _http_lines)
    yield Family(
        PREFIX + "http_request_duration_seconds",
        "histogram",
        "Time from an HTTP request to the end of its answer.",
        _http_duration_lines,
    )


def _sidecar_families(revision: str) -> Iterable[ScrapeFamily]:
    yield histogram(
        "event_loop_lag_seconds",
        "How late the event loop ran its timers.",
        LAG_BUCKETS,
        lambda scrape: [scrape.recorder.lags],
    )
    yield metric(
        "metrics_render_seconds",
        "How long the previous scrape kept the event loop, all of its slices together.",
        lambda scrape: [scrape.previous_took],
    )
    yield metric(
        "build_info",
        "What runs here; always 1.",
        lambda scrape: [1],
        [
            {
                "version": __version__,
                "revision": revision,
                "python_version": platform.python_version(),
            }
        ],
    )
    yield metric(
        "config_last_reload_success_timestamp_seconds",
        "Unix time when the configuration in force was read.",
        lambda scrape: [scrape.recorder.config_read_at],
    )
    yield metric(
        "config_last_reload_successful",
        "Whether the last attempt to read the configuration went well.",
        lambda scrape: [int(scrape.recorder.is_config_read)],
    )


def _pool_info_lines(scrape: Scrape) -> Iterable[str]:
    for pool in scrape.pools:
        snapshot = pool.snapshot
        labels = {
            "pool": snapshot.name,
            "database": snapshot.database,
            "user": snapshot.user,
            "server": snapshot.server,
            "mode": snapshot.mode,
        }
        yield prefix(PREFIX + "pool_info", labels) + "1"


def _network_bytes(scrape: Scrape) -> Iterable[int]:
    recorder = scrape.recorder
    traffics = [recorder.traffic, *(pool.traffic for pool in recorder.pools.values())]
    return (
        sum(traffic.client_received for traffic in traffics),
        sum(traffic.client_sent for traffic in traffics),
        sum(traffic.server_received for traffic in traffics),
        sum(traffic.server_sent for traffic in traffics),
    )


def _http_lines(scrape: Scrape) -> Iterable[str]:
    for (route, method, code), count in scrape.recorder.http_requests.items():
        yield _http_prefix(route, method, code) + repr(count)


def _http_duration_lines(scrape: Scrape) -> Iterable[str]:
    for route, durations in scrape.recorder.http_durations.items():
        yield from map(add, _http_duration_prefixes(route), map(repr, histogram_values(durations)))


@cache
def _http_prefix(route: str, method: str, code: int) -> str:
    labels = {"route": route, "method": method, "code": str(code)}
    return prefix(PREFIX + "http_requests_total", labels)


@cache
def _http_duration_prefixes(route: str) -> tuple[str, ...]:
    name = PREFIX + "http_request_duration_seconds"
    return tuple(histogram_prefixes(name, {"route": route}, WAIT_BUCKETS))
