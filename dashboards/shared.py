"""Panels that stand on more than one board, and the colours by threshold that they share."""

from typing import Final

from grafana_foundation_sdk.models import common
from grafana_foundation_sdk.models.dashboard import Panel

from dashboards import limits
from dashboards.board import link_to
from dashboards.panels import (
    VERDICTS,
    Column,
    Query,
    Size,
    chart,
    figure,
    listing,
    timeline,
    verdict,
)

UTILIZATION: Final = ((limits.NEARLY_FULL, "orange"), (limits.FULL, "red"))
LATENCY: Final = ((limits.LATENCY_OBJECTIVE, "orange"), (limits.SLOW_QUERY, "red"))
ERROR_RATE: Final = ((limits.ERROR_RATE, "red"),)
ERROR_RATE_TOP: Final = 2 * limits.ERROR_RATE
"""Of the axis, so that the line is always in view."""
ANY: Final = ((1.0, "orange"),)
ANY_IS_BAD: Final = ((1.0, "red"),)

UP: Final = {"1": ("up", "green"), "0": ("DOWN", "red")}
RELOADED: Final = {"1": ("in force", "green"), "0": ("REFUSED", "red")}
POOL_LINK: Final = (
    "Open this pool",
    link_to("pgsidecar-pool", instance="instance", pool="pool"),
)


def worst_utilization(title: str, size: Size) -> Panel:
    return figure(
        title,
        "Connections in use, or being opened, as a share of the limit, of the fullest pool that is "
        "selected. From 80% on you are paged; at 100% clients wait: see who holds them.",
        "percentunit",
        Query("max(instance_pool:pgsidecar_pool_utilization:ratio{<pool>})"),
        size,
        UTILIZATION,
    )


def waiting(size: Size) -> Panel:
    return figure(
        "Clients waiting",
        "Clients that wait for a connection now. More than a few for longer than a moment: the pool is "
        "full or the database is down; the verdict tells which.",
        "short",
        Query("sum(pgsidecar_pool_pending_requests{<pool>})"),
        size,
        ANY,
    )


def p99(size: Size) -> Panel:
    return figure(
        "P99 of queries (5m)",
        "One query in a hundred of the last 5 minutes took longer; of several sidecars the worst. "
        "The objective is 100 ms; from 5 s on you are paged: see the top statements.",
        "s",
        Query('max(pgsidecar_query_latency_seconds{quantile="0.99",window="5m",<pool>} >= 0)'),
        size,
        LATENCY,
        empty="no queries",
    )


def error_rate(size: Size) -> Panel:
    return figure(
        "Error rate (5m)",
        "Share of the attempts to get a connection that failed in the last 5 minutes, of the worst "
        "pool. From 1% on you are paged: the row Errors says in which phase and why.",
        "percentunit",
        Query("max(instance_pool:pgsidecar_connection_errors:ratio_rate5m{<pool>})"),
        size,
        ERROR_RATE,
        empty="no attempts",
    )


def verdict_now(size: Size) -> Panel:
    return figure(
        "Verdict",
        "What the sidecar itself says is wrong now. Anything but healthy: ask `pgsidecar why`, which "
        "names the culprit, the evidence and the next steps.",
        "none",
        Query(
            'max by (kind) (pgsidecar_verdict{kind!="healthy",<pool>} == 1)'
            ' or on () max by (kind) (pgsidecar_verdict{kind="healthy",<pool>} == 1)',
            "{{kind}}",
        ),
        size,
        colours=VERDICTS,
        shows=common.BigValueTextMode.NAME,
    )


def verdicts(by: str, legend: str, size: Size) -> Panel:
    return timeline(
        "Verdict over time",
        "What the sidecar said was wrong, and when. Compare the moment it turned with deployments and "
        "restarts; the flight recorder keeps the details of each incident.",
        Query(verdict(by), legend),
        mappings={
            str(number): (kind, colour) for number, (kind, colour) in enumerate(VERDICTS.items())
        },
        size=size,
    )


def firing_alerts(size: Size) -> Panel:
    colour = {"critical": ("critical", "red"), "warning": ("warning", "orange")}
    return listing(
        "Firing alerts",
        "Alerts of pgsidecar that fire now, for what is selected. Each has a runbook of its name; begin "
        "with the critical ones, since causes mute their symptoms only in notifications.",
        "none",
        Query(
            'max by (alertname, severity, instance, pool) (ALERTS{alertname=~"PgSidecar.*",'
            'alertstate="firing",<alert>})'
        ),
        columns=[
            Column("alert", label="alertname", width=280),
            Column("severity", mappings=colour, width=90),
            Column("pool"),
            Column("instance"),
        ],
        sort="severity",
        rising=True,
        size=size,
        empty="No alert fires",
    )


def held_by_application(size: Size) -> Panel:
    return chart(
        "Connections held, by application",
        "Who has the connections, by the application_name of the client. When the stack touches the "
        "limit the thickest layer is the one to talk to.",
        "short",
        Query("sum by (application) (pgsidecar_pool_connections_held{<pool>})", "{{application}}"),
        Query("sum(pgsidecar_pool_connections_max{<pool>})", "limit"),
        size=size,
        stacked=True,
        empty="Nobody holds a connection",
    )


def blamed(size: Size) -> Panel:
    """Colours go by the place of a series: (none), which holds nothing, is last, so that applications
    have those that they have where they hold connections."""
    waiting = (
        "round(sum by (application) (rate(pgsidecar_blamed_wait_seconds_total"
        "{%s,<pool>}[$__rate_interval])), 0.1)"
    )
    return chart(
        "Clients kept waiting, by who holds the connections",
        "How many clients wait because of each application: waiting is charged to those who hold the "
        "connections, or the lock, meanwhile. The top one is the cause, whoever complains.",
        "short",
        Query(waiting % 'application!="(none)"', "{{application}}"),
        Query(waiting % 'application="(none)"', "(none)"),
        size=size,
        stacked=True,
        colours={"(none)": "text"},
        empty="Nobody has waited",
    )


def by_utilization(by: str, legend: str, size: Size) -> Panel:
    return chart(
        "Utilization",
        "Connections in use as a share of the limit: the figure that alerts look at, of several sidecars "
        "the fullest. Orange: you are paged after a minute. Red: full, and clients wait.",
        "percentunit",
        Query(f"max by ({by}) (instance_pool:pgsidecar_pool_utilization:ratio{{<pool>}})", legend),
        size=size,
        steps=UTILIZATION,
    )
