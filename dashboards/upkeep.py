"""The lower half of the pool's board: traffic, errors, health, lifecycle, sidecar."""

from typing import Final

from grafana_foundation_sdk.models.dashboard import Panel

from dashboards import itself, limits, shared
from dashboards.board import Section
from dashboards.panels import (
    QUANTILES,
    Column,
    Query,
    chart,
    figure,
    listing,
    outcomes,
    quantiles,
    timeline,
)

_THIRD: Final = (8, 8)


def sections() -> list[Section]:
    return [
        Section("Traffic", _traffic()),
        Section("Errors", _errors()),
        Section("Health", _health()),
        Section("Lifecycle", _lifecycle(), collapsed=True),
        Section("Sidecar", itself.panels(), collapsed=True),
    ]


def _traffic() -> list[Panel]:
    return [
        chart(
            "Queries, by operation",
            "Queries that ended, per second. A kind that appears or doubles after a deployment is worth "
            "a look at the top statements.",
            "reqps",
            Query(
                "sum by (operation) (rate(pgsidecar_query_duration_seconds_count{<pool>}"
                "[$__rate_interval]))",
                "{{operation}}",
            ),
            stacked=True,
        ),
        chart(
            "Transactions, by outcome",
            "Finished transactions per second; a query outside of BEGIN is one. Rollbacks that grow are "
            "errors or conflicts: see Query errors.",
            "ops",
            Query(
                "sum by (outcome) (rate(pgsidecar_transactions_total{<pool>}[$__rate_interval]))",
                "{{outcome}}",
            ),
            stacked=True,
            colours=outcomes("commit", "rollback"),
        ),
        chart(
            "Bytes over PostgreSQL connections",
            "Of the whole sidecar: received from and sent to clients and servers. Far more sent to clients "
            "than usual: a query returns too many rows.",
            "Bps",
            Query(
                "sum by (side, direction) (rate(pgsidecar_network_bytes_total{<sidecar>}"
                "[$__rate_interval]))",
                "{{side}} {{direction}}",
            ),
            size=_THIRD,
        ),
        chart(
            "Client connections",
            "Of the whole sidecar: clients connected to PostgreSQL's port. At the limit new ones are "
            "refused: raise listen.max_clients or find who opens so many.",
            "short",
            Query('sum(pgsidecar_client_connections{listener="pg",<sidecar>})', "clients"),
            Query('sum(pgsidecar_client_connections_max{listener="pg",<sidecar>})', "limit"),
            size=_THIRD,
        ),
        chart(
            "New clients, by outcome",
            "Of the whole sidecar, per second. Thousands accepted: clients connect for each query. "
            "Rejected or auth_failed: see the sidecar's log for names and reasons.",
            "ops",
            Query(
                "sum by (outcome) (rate(pgsidecar_client_connections_total"
                '{listener="pg",<sidecar>}[$__rate_interval]))',
                "{{outcome}}",
            ),
            size=_THIRD,
            stacked=True,
            colours=outcomes("accepted", "rejected", "auth_failed"),
        ),
    ]


def _errors() -> list[Panel]:
    return [
        chart(
            "Connection error rate (5m)",
            "Share of the attempts to get a connection, acquires and pings, that failed. Above the line you "
            "are paged: the panels beside say in which phase and why.",
            "percentunit",
            Query(
                "max by (instance, pool) "
                "(instance_pool:pgsidecar_connection_errors:ratio_rate5m{<pool>})",
                "{{pool}} {{instance}}",
            ),
            steps=shared.ERROR_RATE,
            top=shared.ERROR_RATE_TOP,
            empty="no attempts",
        ),
        chart(
            "Attempts to get a connection",
            "Acquires and pings per second: what the error rate is a share of. Few attempts make a rate "
            "jump.",
            "ops",
            Query(
                "sum by (outcome) (rate(pgsidecar_connection_attempts_total{<pool>}"
                "[$__rate_interval]))",
                "{{outcome}}",
            ),
            stacked=True,
            colours=outcomes("ok", "error"),
        ),
        chart(
            "Connection errors, by phase and reason",
            "What went wrong. connect: network or server gone; auth: role, password, limits of the server; "
            "acquire timeout: the pool was full for too long.",
            "short",
            Query(
                "sum by (phase, reason) (increase(pgsidecar_connection_errors_total{<pool>}"
                "[$__rate_interval])) > 0",
                "{{phase}} {{reason}}",
            ),
            size=_THIRD,
            stacked=True,
            bars=True,
            empty="No connection errors",
        ),
        chart(
            "Query errors, by SQLSTATE class",
            "Errors that clients got, of the server or of the sidecar. 23: a constraint, 40: conflicts (retry), 42: wrong SQL, 53: pool full "
            "or server out of something, 57: cancelled or shut down.",
            "short",
            Query(
                "sum by (origin, sqlstate_class) (increase(pgsidecar_query_errors_total{<pool>}"
                "[$__rate_interval])) > 0",
                "{{origin}} {{sqlstate_class}}",
            ),
            size=_THIRD,
            stacked=True,
            bars=True,
            empty="No query errors",
        ),
        chart(
            "Timeouts, by kind",
            "Timeouts that ran out, each with its own setting. acquire: the pool is too small or held; "
            "login: of clients, some of which name no pool yet.",
            "short",
            Query(
                "sum by (kind) (increase(pgsidecar_timeouts_total{<pool>}[$__rate_interval]))",
                "{{kind}}",
            ),
            Query(
                'sum(increase(pgsidecar_timeouts_total{pool="",<sidecar>}[$__rate_interval]))',
                "login without a pool",
            ),
            size=_THIRD,
            stacked=True,
            bars=True,
        ),
    ]


def _health() -> list[Panel]:
    return [
        timeline(
            "PostgreSQL over time",
            "When the pool could use its server. Compare gaps with the server's log: restarts, failovers, "
            "network.",
            Query("min by (instance, pool) (pgsidecar_up{<pool>})", "{{pool}} {{instance}}"),
            mappings=shared.UP,
            size=(10, 6),
        ),
        figure(
            "Last good ping",
            "How long ago it was, of the pool that waits longest for one. Minutes: the server does not answer, or all "
            "connections are in use, which are not pinged.",
            "s",
            Query("max(time() - (pgsidecar_ping_last_success_timestamp_seconds{<pool>} > 0))"),
            (4, 6),
            ((limits.STUCK, "orange"),),
            empty="no ping yet",
        ),
        chart(
            "Reconnects, by outcome",
            "Attempts to replace lost connections. Again and again: something between here and the "
            "server cuts connections, or it restarts.",
            "short",
            Query(
                "sum by (outcome) (increase(pgsidecar_reconnects_total{<pool>}[$__rate_interval]))",
                "{{outcome}}",
            ),
            size=(10, 6),
            stacked=True,
            bars=True,
            colours=outcomes("ok", "error"),
        ),
        chart(
            "Ping round trips",
            "A ping asks for nothing: what it takes is the network and the server's CPU. Slow pings make "
            "every query slow; above the line, it warns.",
            "s",
            *quantiles("pgsidecar_ping_duration_seconds"),
            steps=((limits.SLOW_PING, "orange"),),
            colours=QUANTILES,
            empty="no pings",
        ),
        chart(
            "Pings, by outcome",
            "Round trips over idle connections. None at all while the pool is full; timeout and error "
            "close the connection that failed.",
            "ops",
            Query(
                "sum by (outcome) (rate(pgsidecar_pings_total{<pool>}[$__rate_interval]))",
                "{{outcome}}",
            ),
            stacked=True,
            colours=outcomes("ok", "timeout", "error"),
        ),
    ]


def _lifecycle() -> list[Panel]:
    return [
        chart(
            "Connections opened, by reason",
            "warm: to keep min_idle ready; demand: a client waited; reconnect: after a loss. Demand all "
            "the time: raise min_idle, so that clients need not wait for a login.",
            "short",
            Query(
                "sum by (reason) (increase(pgsidecar_connections_opened_total{<pool>}"
                "[$__rate_interval]))",
                "{{reason}}",
            ),
            stacked=True,
            bars=True,
        ),
        chart(
            "Connections closed, by reason",
            "idle_timeout and max_lifetime are upkeep. server_closed, ping_failed, client_lost or "
            "query_timeout in numbers are worth the log of that time.",
            "short",
            Query(
                "sum by (reason) (increase(pgsidecar_connections_closed_total{<pool>}"
                "[$__rate_interval])) > 0",
                "{{reason}}",
            ),
            stacked=True,
            bars=True,
            empty="None closed",
        ),
        chart(
            "Time to open a connection",
            "TCP, TLS and login at the server. Slow: DNS, TLS, or a server short of CPU; each client that "
            "waits for a new connection waits that long.",
            "s",
            *quantiles("pgsidecar_pool_connection_create_seconds"),
            size=_THIRD,
            colours=QUANTILES,
            empty="None opened",
        ),
        chart(
            "Length of leases",
            "How long clients keep a connection. The average times the rate of leases is how many the "
            "load needs; a long P99 is who makes the others wait.",
            "s",
            *quantiles("pgsidecar_pool_connection_use_seconds"),
            size=_THIRD,
            colours=QUANTILES,
            empty="no leases",
        ),
        chart(
            "Idle connections, and how many are kept",
            "Idle connections, and the min_idle that the pool keeps ready. Below it for long: the pool is "
            "full, or connecting fails.",
            "short",
            Query('sum(pgsidecar_pool_connections{state="idle",<pool>})', "idle"),
            Query("sum(pgsidecar_pool_connections_idle_min{<pool>})", "lower limit"),
            size=_THIRD,
            colours={"idle": "green"},
        ),
        listing(
            "What the pools are",
            "Server, database, user and mode as configured, with the limit and the threshold of slow "
            "queries. A limit that differs between sidecars is a configuration not rolled out.",
            "short",
            Query(
                "max by (instance, pool, server, database, user, mode) (pgsidecar_pool_info{<pool>})"
            ),
            Query("max by (instance, pool) (pgsidecar_pool_connections_max{<pool>})", "limit"),
            Query(
                "max by (instance, pool) (pgsidecar_slow_query_threshold_seconds{<pool>})",
                "slow from",
            ),
            columns=[
                Column("pool"),
                Column("instance"),
                Column("server"),
                Column("database"),
                Column("user"),
                Column("mode"),
                Column("limit"),
                Column("slow from", "s"),
            ],
            size=(24, 6),
        ),
    ]
