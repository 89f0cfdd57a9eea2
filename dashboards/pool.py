"""The board of one pool, as far as the pager needs it: is it full, who waits, who holds it, what is slow.

The rows below those, for the rest of the day, are in ``upkeep``.
"""

from typing import Final

from grafana_foundation_sdk.models import common
from grafana_foundation_sdk.models.dashboard import Panel

from dashboards import limits, shared, upkeep
from dashboards.board import Section
from dashboards.panels import (
    QUANTILES,
    STATES,
    Column,
    Query,
    chart,
    figure,
    heat,
    listing,
    outcomes,
    quantile,
    quantiles,
)

UID: Final = "pgsidecar-pool"
TITLE: Final = "pgsidecar: one pool"
ABOUT: Final = (
    "One pool from saturation to its sidecar. The first row answers a page: is it full, who waits, who "
    "holds it, what is the verdict, is the database up."
)
_STUCK: Final = ((limits.STUCK, "red"),)


def sections() -> list[Section]:
    return [
        Section("Overview", _overview()),
        Section("Who holds it", _holders()),
        Section("Saturation", _saturation()),
        Section("Latency", _latency()),
        *upkeep.sections(),
    ]


def _overview() -> list[Panel]:
    return [
        shared.worst_utilization("Pool used", (4, 4)),
        shared.waiting((4, 4)),
        figure(
            "Top holder",
            "The application that holds most connections now, and how many. Full and one application far "
            "ahead: it is the one to talk to.",
            "short",
            Query(
                "topk(1, sum by (application) (pgsidecar_pool_connections_held{<pool>}) > 0)",
                "{{application}}",
            ),
            (5, 4),
            shows=common.BigValueTextMode.VALUE_AND_NAME,
            empty="nobody",
        ),
        shared.verdict_now((6, 4)),
        figure(
            "PostgreSQL",
            "Whether the pool can use its server, as of the last ping or attempt to connect. DOWN: see the "
            "row Health; it comes back by itself.",
            "none",
            Query("min(pgsidecar_up{<pool>})"),
            (5, 4),
            mappings=shared.UP,
        ),
        figure(
            "Longest wait now",
            "How long the first client in the queue has waited. Near acquire_timeout, clients begin to "
            "get errors.",
            "s",
            Query("max(pgsidecar_pool_pending_max_wait_seconds{<pool>})"),
            steps=((limits.SLOW_ACQUIRE, "orange"),),
        ),
        shared.error_rate((4, 4)),
        shared.p99((5, 4)),
        figure(
            "Oldest running query",
            "Age of the oldest query that runs now; it has a connection all that time. Beyond a minute: "
            "the statements' board and SHOW SLOW say what it waits for.",
            "s",
            Query("max(pgsidecar_longest_running_query_seconds{<pool>})"),
            (6, 4),
            ((limits.SLOW_QUERY, "orange"), (limits.STUCK, "red")),
        ),
        figure(
            "Slow queries in this time",
            "Queries that reached the threshold (5 s unless configured otherwise) in the time shown. Any: "
            "find them among the top statements by P99.",
            "short",
            Query("sum(increase(pgsidecar_slow_queries_total{<pool>}[$__range]))"),
            (5, 4),
            shared.ANY,
            decimals=0,
        ),
        shared.firing_alerts((24, 6)),
    ]


def _saturation() -> list[Panel]:
    return [
        chart(
            "Connections by state",
            "Server connections: used by clients, idle and ready, connecting (opened, checked or reset). "
            "Used up to the limit: the next client waits.",
            "short",
            Query("sum by (state) (pgsidecar_pool_connections{<pool>})", "{{state}}"),
            Query("sum(pgsidecar_pool_connections_max{<pool>})", "limit"),
            stacked=True,
            colours=STATES,
        ),
        shared.by_utilization("instance, pool", "{{pool}} {{instance}}", (12, 8)),
        chart(
            "Peak of use within a minute",
            "Most connections in use at once, as a share of the limit, of the fullest sidecar: bursts "
            "between two scrapes are seen here alone. At 100% while the average is low: clients come in "
            "bursts.",
            "percentunit",
            Query(
                'max(max by (instance, pool) (pgsidecar_pool_connections_used_peak{window="1m",<pool>})'
                " / (max by (instance, pool) (pgsidecar_pool_connections_max{<pool>}) > 0))",
                "peak",
            ),
            size=(8, 8),
            steps=shared.UTILIZATION,
        ),
        chart(
            "Clients waiting, and the longest wait",
            "Clients in the queue, and on the right how long the first of them has waited. Both growing: "
            "the pool is stuck, not busy.",
            "short",
            Query("sum(pgsidecar_pool_pending_requests{<pool>})", "waiting"),
            Query("max(pgsidecar_pool_pending_max_wait_seconds{<pool>})", "longest wait"),
            size=(8, 8),
            colours={"waiting": "orange", "longest wait": "red"},
            right=("longest wait", "s"),
        ),
        chart(
            "Connections needed",
            "Connections that the load takes on average (time of all leases per second), and the limit. "
            "Close to it: a larger pool helps, or shorter transactions do.",
            "short",
            Query(
                "round(sum(rate(pgsidecar_pool_connection_use_seconds_sum{<pool>}[$__rate_interval])), 0.1)",
                "needed",
            ),
            Query("sum(pgsidecar_pool_connections_max{<pool>})", "limit"),
            size=(8, 8),
        ),
        chart(
            "Time to get a connection",
            "Quantiles of the wait, failures included; an immediate one counts as 0. A P99 above the line "
            "for 5 minutes warns: clients feel the queue.",
            "s",
            *quantiles("pgsidecar_pool_acquire_duration_seconds"),
            steps=((limits.SLOW_ACQUIRE, "orange"),),
            colours=QUANTILES,
            empty="no requests",
        ),
        chart(
            "Requests for a connection, by outcome",
            "Immediate and waited are well; timeout and rejected are errors that clients got. Waited that "
            "grows is the first sign of a pool that gets too small.",
            "reqps",
            Query(
                "sum by (outcome) (rate(pgsidecar_pool_acquires_total{<pool>}[$__rate_interval]))",
                "{{outcome}}",
            ),
            stacked=True,
            colours=outcomes("immediate", "waited", "timeout", "rejected", "cancelled"),
        ),
    ]


def _holders() -> list[Panel]:
    per = "sum by (application)"
    return [
        shared.held_by_application((15, 9)),
        listing(
            "Holders now",
            "Applications by the connections they hold, the share of the limit that is, and how many "
            "clients they kept waiting on average over 5 minutes.",
            "short",
            Query(f"{per} (pgsidecar_pool_connections_held{{<pool>}}) > 0", "held"),
            Query(
                f"({per} (pgsidecar_pool_connections_held{{<pool>}}) > 0)"
                " / scalar(sum(pgsidecar_pool_connections_max{<pool>}) > 0)",
                "of the limit",
            ),
            Query(
                f"{per} (rate(pgsidecar_blamed_wait_seconds_total{{<pool>}}[5m])) > 0.05",
                "kept waiting",
            ),
            columns=[
                Column("application"),
                Column("held", width=70),
                Column("of the limit", "percentunit", shared.UTILIZATION, width=110),
                Column("kept waiting", steps=shared.ANY, decimals=1, width=120),
            ],
            sort="held",
            size=(9, 9),
            empty="Nobody holds a connection",
        ),
        shared.blamed((12, 9)),
        shared.verdicts("instance, pool", "{{pool}} {{instance}}", (12, 9)),
        chart(
            "Held, and at work",
            "Connections held, and those on which a query runs. A wide gap: clients hold connections "
            "and do nothing with them, in open transactions or by pins.",
            "short",
            Query('sum(pgsidecar_pool_connections{state="used",<pool>})', "held"),
            Query("sum(pgsidecar_queries_in_flight{<pool>})", "at work"),
            Query("sum(pgsidecar_pool_connections_max{<pool>})", "limit"),
            size=(8, 8),
            colours={"held": "orange", "at work": "green"},
        ),
        chart(
            "Oldest query, and longest idle in transaction",
            "How long the oldest query has run, and a client with an open transaction has been silent. "
            "Above the line someone is told: both hold a connection, and perhaps locks.",
            "s",
            Query("max(pgsidecar_longest_running_query_seconds{<pool>})", "oldest query"),
            Query(
                "max(pgsidecar_longest_idle_in_transaction_seconds{<pool>})", "idle in transaction"
            ),
            size=(8, 8),
            steps=_STUCK,
            colours={"oldest query": "yellow", "idle in transaction": "purple"},
        ),
        chart(
            "Leaked and pinned connections",
            "Leases older than the leak threshold, and connections that stay with their client beyond the "
            "transaction. Neither can be shared: details are on the statements' board.",
            "short",
            Query("sum(pgsidecar_leaked_connections{<pool>})", "leaked"),
            Query(
                'sum(pgsidecar_pinned_connections{reason!="session_mode",<pool>})',
                "pinned",
            ),
            Query("sum(pgsidecar_pool_connections_max{<pool>})", "limit"),
            size=(8, 8),
            colours={"leaked": "red", "pinned": "purple"},
        ),
    ]


def _latency() -> list[Panel]:
    return [
        chart(
            "Query latency, last minute",
            "Quantiles that the sidecar keeps itself, at most 1% off; of several the worst. Orange: the "
            "objective for P99. Red: a P99 of 5 s over 5 minutes pages.",
            "s",
            *[
                Query(
                    f'max(pgsidecar_query_latency_seconds{{quantile="{share}",window="1m",<pool>}} >= 0)',
                    name,
                )
                for name, share in (("P50", 0.5), ("P90", 0.9), ("P99", 0.99))
            ],
            steps=shared.LATENCY,
            colours=QUANTILES,
            empty="no queries",
        ),
        chart(
            "Query latency, all sidecars together",
            "Quantiles from the histogram, over all that is selected; dots are traces of single queries. "
            "Use it where several sidecars count as one; otherwise the one beside is more exact.",
            "s",
            *quantiles("pgsidecar_query_duration_seconds", exemplars=True),
            steps=shared.LATENCY,
            colours=QUANTILES,
            empty="no queries",
        ),
        heat(
            "Query durations",
            "How many queries took how long. Two bands are two kinds of queries; a band that climbs is "
            "one that gets slower.",
            "s",
            Query(
                "sum by (le) (increase(pgsidecar_query_duration_seconds_bucket{<pool>}[$__rate_interval]))",
                "{{le}}",
            ),
        ),
        chart(
            "P99 by operation",
            "Which kind of statement is slow. COMMIT (transaction) that is slow points at the server's "
            "disk, select at a plan, update at locks.",
            "s",
            Query(
                quantile(0.99, "pgsidecar_query_duration_seconds", by="operation, le"),
                "{{operation}}",
                exemplars=True,
            ),
            steps=shared.LATENCY,
            empty="no queries",
        ),
        chart(
            "Slow queries, by operation",
            "Queries that reached the threshold, counted when they cross it: one that hangs is here. Any "
            "of them warns.",
            "short",
            Query(
                "sum by (operation) (increase(pgsidecar_slow_queries_total{<pool>}[$__rate_interval]))",
                "{{operation}}",
            ),
            size=(8, 8),
            stacked=True,
            bars=True,
        ),
        chart(
            "Duration of transactions",
            "From the first query to the end, pauses of the client included. Much longer than its "
            "queries: clients think, or call others, with a transaction open.",
            "s",
            *quantiles("pgsidecar_transaction_duration_seconds"),
            size=(8, 8),
            colours=QUANTILES,
            empty="no transactions",
        ),
        chart(
            "Queries behind the quantiles",
            "How many queries the rolling quantiles are made of. Below some hundred a P99 is little more "
            "than the slowest query.",
            "short",
            Query(
                "sum by (window) (pgsidecar_query_latency_samples{<pool>})",
                "last {{window}}",
            ),
            size=(8, 8),
        ),
    ]
