"""The board of the fleet: which pool is in trouble, and whether all sidecars are there."""

from typing import Final

from grafana_foundation_sdk.models.dashboard import Panel

from dashboards import limits, shared
from dashboards.board import Section
from dashboards.panels import Column, Query, chart, figure, listing, quantile

UID: Final = "pgsidecar-overview"
TITLE: Final = "pgsidecar: all pools"
ABOUT: Final = (
    "All pools of all sidecars: which one is full, who waits, what is wrong. Begin here when paged."
)


def sections() -> list[Section]:
    return [
        Section("Now", _now()),
        Section("Pools", _pools()),
        Section("Over time", _over_time()),
        Section("Sidecars", _sidecars()),
    ]


def _now() -> list[Panel]:
    size = (4, 4)
    return [
        shared.worst_utilization("Fullest pool", size),
        shared.waiting(size),
        figure(
            "Databases down",
            "Pools that cannot use their PostgreSQL now. Any: see the row Health of the pool; the pool "
            "comes back by itself when the server does.",
            "short",
            Query("count(pgsidecar_up{<pool>} == 0) or vector(0)"),
            size,
            shared.ANY_IS_BAD,
        ),
        figure(
            "Sidecars down",
            "Targets of Prometheus that do not answer its scrapes. Any: look whether the process is there "
            "and what it logged; clients of that sidecar have no database.",
            "short",
            Query("count(up{<sidecar>} == 0) or vector(0)"),
            size,
            shared.ANY_IS_BAD,
        ),
        shared.error_rate(size),
        shared.p99(size),
    ]


def _pools() -> list[Panel]:
    return [
        listing(
            "Pools, the fullest first",
            "One line for each pool of each sidecar; the pool's name opens its board. Look for a verdict "
            "that is not healthy, for waiting clients, and for a database that is down.",
            "short",
            Query(
                "max by (instance, pool) (instance_pool:pgsidecar_pool_utilization:ratio{<pool>})",
                "utilization",
            ),
            Query(
                'sum by (instance, pool) (pgsidecar_pool_connections{state=~"used|connecting",<pool>})',
                "used",
            ),
            Query("max by (instance, pool) (pgsidecar_pool_connections_max{<pool>})", "limit"),
            Query("max by (instance, pool) (pgsidecar_pool_pending_requests{<pool>})", "waiting"),
            Query(
                "max by (instance, pool) (pgsidecar_query_latency_seconds"
                '{quantile="0.99",window="5m",<pool>} >= 0)',
                "P99 (5m)",
            ),
            Query(
                "max by (instance, pool) (instance_pool:pgsidecar_connection_errors:ratio_rate5m{<pool>})",
                "error rate (5m)",
            ),
            Query("min by (instance, pool) (pgsidecar_up{<pool>})", "database"),
            Query("max by (instance, pool, kind) (pgsidecar_verdict{<pool>} == 1)"),
            columns=[
                Column("pool", link=shared.POOL_LINK),
                Column("instance"),
                Column("verdict", label="kind", colours=True, width=150),
                Column("utilization", "percentunit", shared.UTILIZATION, width=130),
                Column("used", width=80),
                Column("limit", width=80),
                Column("waiting", steps=shared.ANY, width=90),
                Column("P99 (5m)", "s", shared.LATENCY, width=110),
                Column("error rate (5m)", "percentunit", shared.ERROR_RATE, width=130),
                Column("database", mappings=shared.UP, width=100),
            ],
            sort="utilization",
            size=(24, 9),
        ),
        shared.firing_alerts((12, 7)),
        shared.verdicts("instance, pool", "{{pool}} {{instance}}", (12, 7)),
    ]


def _over_time() -> list[Panel]:
    return [
        shared.by_utilization("pool", "{{pool}}", (12, 8)),
        chart(
            "Clients waiting, by pool",
            "Clients that wait for a connection. A plateau means that the pool is full or the database "
            "gone; short spikes are bursts that the pool takes.",
            "short",
            Query("sum by (pool) (pgsidecar_pool_pending_requests{<pool>})", "{{pool}}"),
            stacked=True,
        ),
        chart(
            "P99 of queries, by pool (5m)",
            "One query in a hundred took longer; of several sidecars the worst. Above the orange line the "
            "objective is missed, above the red one you are paged.",
            "s",
            Query(
                "max by (pool) (pgsidecar_query_latency_seconds"
                '{quantile="0.99",window="5m",<pool>} >= 0)',
                "{{pool}}",
            ),
            steps=shared.LATENCY,
            empty="no queries",
        ),
        chart(
            "Connection errors, by pool (5m)",
            "Share of the attempts to get a connection that failed. Above the line you are paged: the row "
            "Errors of the pool's board says in which phase and why.",
            "percentunit",
            Query(
                "max by (pool) (instance_pool:pgsidecar_connection_errors:ratio_rate5m{<pool>})",
                "{{pool}}",
            ),
            steps=shared.ERROR_RATE,
            top=shared.ERROR_RATE_TOP,
            empty="no attempts",
        ),
        chart(
            "Queries, by pool",
            "Queries that ended, per second. A drop with clients waiting is a stall; a drop without is "
            "the applications' doing.",
            "reqps",
            Query(
                "sum by (pool) (rate(pgsidecar_query_duration_seconds_count{<pool>}[$__rate_interval]))",
                "{{pool}}",
            ),
            stacked=True,
        ),
        chart(
            "Connections used, of the limit",
            "Server connections that all selected pools use together, and what they may use. Compare the "
            "limit with max_connections of the server: the sum over all sidecars has to fit.",
            "short",
            Query(
                'sum by (pool) (pgsidecar_pool_connections{state=~"used|connecting",<pool>})',
                "{{pool}}",
            ),
            Query("sum(pgsidecar_pool_connections_max{<pool>})", "limit"),
            stacked=True,
        ),
    ]


def _sidecars() -> list[Panel]:
    per = "max by (instance)"
    return [
        listing(
            "Sidecars",
            "What runs where. Versions that differ mean a rollout that is not done; a configuration that "
            "was refused is still the old one, and a restart would fail.",
            "short",
            Query("max by (instance, version, revision) (pgsidecar_build_info{<sidecar>})"),
            Query(f"time() - {per} (process_start_time_seconds{{<sidecar>}})", "running for"),
            Query(f"{per} (pgsidecar_config_last_reload_successful{{<sidecar>}})", "configuration"),
            Query(f"{per} (process_resident_memory_bytes{{<sidecar>}})", "memory"),
            Query(f"{per} (rate(process_cpu_seconds_total{{<sidecar>}}[5m]))", "CPU"),
            Query(f'{per} (pgsidecar_client_connections{{listener="pg",<sidecar>}})', "clients"),
            Query(
                quantile(
                    0.99, "pgsidecar_event_loop_lag_seconds", "<sidecar>", "instance, le", "5m"
                ),
                "loop lag P99",
            ),
            columns=[
                Column("instance"),
                Column("version"),
                Column("revision"),
                Column("running for", "s", width=120),
                Column("configuration", mappings=shared.RELOADED, width=120),
                Column("clients", width=90),
                Column("CPU", "percentunit", width=90),
                Column("memory", "bytes", width=110),
                Column("loop lag P99", "s", ((limits.LATE_LOOP, "orange"),), width=120),
            ],
            sort="running for",
            size=(24, 7),
        )
    ]
