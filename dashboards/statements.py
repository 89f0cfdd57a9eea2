"""The board of the developer: which statements take the time, and who holds what the others wait for."""

from typing import Final

from grafana_foundation_sdk.models.dashboard import Panel

from dashboards import limits, shared
from dashboards.board import Section
from dashboards.panels import Column, Query, chart, figure, listing, outcomes

UID: Final = "pgsidecar-statements"
TITLE: Final = "pgsidecar: statements and holders"
ABOUT: Final = (
    "Which statements take the time, who keeps whom waiting, and what cannot be shared: pins, leaks, "
    "prepared statements, incidents."
)

_TEXT: Final = (
    "topk by (pool, fingerprint) (1, "
    "max by (pool, fingerprint, query) (pgsidecar_statement_info{<pool>}))"
)
"""One text for each statement, whatever number of sidecars know it."""
_RATE: Final = (
    "sum by (pool, fingerprint) (rate(pgsidecar_statement_%s_total{%s}[$__rate_interval]))"
)
_TOLD_APART: Final = 'fingerprint!="other",<pool>'
_THIRD: Final = (8, 8)


def sections() -> list[Section]:
    return [
        Section("Overview", _overview()),
        Section("Top statements", _statements()),
        Section("Who waits for whom", _blame()),
        Section("Pins and leaks", _pins()),
        Section("Prepared statements", _prepared(), collapsed=True),
        Section("The list of statements", _list(), collapsed=True),
    ]


def _with_text(expr: str) -> str:
    return f"{expr} * on (pool, fingerprint) group_left (query) {_TEXT}"


def _top(kind: str) -> Query:
    rate = _RATE % (kind, _TOLD_APART)
    return Query(_with_text(f"topk(10, {rate} > 0)"), "{{query}}")


def _other(kind: str) -> Query:
    rate = f"rate(pgsidecar_statement_{kind}_total"
    return Query(
        f'sum({rate}{{fingerprint="other",<pool>}}[$__rate_interval]))', "all others together"
    )


def _overview() -> list[Panel]:
    return [
        figure(
            "Connections kept busy",
            "How many connections queries keep busy on average (their time per second). Compare with the "
            "limit: far below while clients wait, connections are held and idle.",
            "short",
            Query("sum(rate(pgsidecar_statement_seconds_total{<pool>}[$__rate_interval]))"),
        ),
        shared.p99((4, 4)),
        figure(
            "Clients kept waiting",
            "How many clients waited on average over the last minutes. Some all the time: the pool is "
            "held; below is by whom.",
            "short",
            Query("sum(rate(pgsidecar_blamed_wait_seconds_total{<pool>}[$__rate_interval]))"),
            steps=shared.ANY,
        ),
        figure(
            "Leaks now",
            "Leases older than the leak threshold. Any: SHOW LEAKS at the console names client and "
            "statement.",
            "short",
            Query("sum(pgsidecar_leaked_connections{<pool>})"),
            steps=shared.ANY_IS_BAD,
        ),
        figure(
            "Incidents in this time",
            "Dumps of the flight recorder in the time shown. Each has a recording of what happened just "
            "before: `pgsidecar why`, or /api/v1/incidents.",
            "short",
            Query("sum(increase(pgsidecar_incidents_total{<pool>}[$__range]))"),
            steps=shared.ANY,
        ),
        shared.verdict_now((4, 4)),
    ]


def _statements() -> list[Panel]:
    seconds = _RATE % ("seconds", "<pool>")
    calls = _RATE % ("calls", "<pool>")
    return [
        listing(
            "Statements, by time",
            "All statements that have series, and the others together. Busy connections is what a statement "
            "takes from the pool: many short calls weigh as much as a few long ones.",
            "short",
            Query(
                f"{_with_text(seconds)} or {seconds} unless on (pool, fingerprint) {_TEXT}",
                "busy connections",
            ),
            Query(calls, "calls/s"),
            Query(f"{seconds} / ({calls} > 0)", "average"),
            Query(
                "max by (pool, fingerprint) (pgsidecar_statement_latency_seconds"
                '{quantile="0.99",<pool>} >= 0)',
                "P99",
            ),
            Query(f"{_RATE % ('rows', '<pool>')} / ({calls} > 0)", "rows a call"),
            Query(f"{_RATE % ('errors', '<pool>')} / ({calls} > 0)", "failed"),
            columns=[
                Column("query"),
                Column("busy connections", width=140),
                Column("calls/s", "reqps", width=110),
                Column("average", "s", width=100),
                Column("P99", "s", shared.LATENCY, width=100),
                Column("rows a call", width=100),
                Column("failed", "percentunit", shared.ERROR_RATE, width=90),
                Column("pool", width=110),
                Column("fingerprint", width=160),
            ],
            sort="busy connections",
            size=(24, 11),
            empty="no statements",
        ),
        chart(
            "Top 10 by time",
            "Connections that each statement keeps busy. The thickest layer is what to speed up, or to "
            "call less often.",
            "short",
            _top("seconds"),
            _other("seconds"),
            Query("sum(pgsidecar_pool_connections_max{<pool>})", "limit"),
            size=(24, 10),
            stacked=True,
        ),
        chart(
            "Top 10 by P99",
            "One call in a hundred took longer, within 5 minutes; of several sidecars the worst. Slow and "
            "rare hurts few; slow and at the top by time hurts all.",
            "s",
            Query(
                _with_text(
                    "topk(10, max by (pool, fingerprint) (pgsidecar_statement_latency_seconds"
                    '{quantile="0.99",<pool>} >= 0))'
                ),
                "{{query}}",
            ),
            size=(12, 10),
            steps=shared.LATENCY,
            empty="no statements",
        ),
        chart(
            "Top 10 by calls",
            "Calls per second. Thousands of one statement: a loop in the application (N+1) that one query "
            "with IN or a join would replace.",
            "reqps",
            _top("calls"),
            size=(12, 10),
            empty="no calls",
        ),
        chart(
            "Top 10 by rows",
            "Rows returned or affected per second. Far more than anyone reads: a LIMIT or a WHERE is "
            "missing.",
            "short",
            _top("rows"),
            size=(12, 10),
            empty="no rows",
        ),
        chart(
            "Top 10 by errors",
            "Calls that failed, per second. The SQLSTATE classes are on the pool's board, the messages in "
            "PostgreSQL's log.",
            "ops",
            _top("errors"),
            size=(12, 10),
            empty="No statement fails",
        ),
    ]


def _blame() -> list[Panel]:
    per = "sum by (application)"
    waited = "pgsidecar_blamed_wait_seconds_total{<pool>}"
    return [
        shared.blamed((12, 9)),
        shared.held_by_application((12, 9)),
        listing(
            "Who costs the others how much",
            "Seconds that others waited because of each application in the time shown, and the "
            "connections it holds now. (pool) is connecting and resetting, (none): no server.",
            "short",
            Query(f"{per} (increase({waited}[$__range])) > 0", "waiting caused"),
            Query(f"{per} (pgsidecar_pool_connections_held{{<pool>}}) > 0", "held now"),
            columns=[
                Column("application"),
                Column("waiting caused", "s"),
                Column("held now"),
            ],
            sort="waiting caused",
            size=(12, 8),
            empty="Nobody has waited",
        ),
        chart(
            "Incidents, by kind",
            "What made the flight recorder write a dump. Its file says who held what at that moment: "
            "read it before you change the size of the pool.",
            "short",
            Query(
                "sum by (kind) (increase(pgsidecar_incidents_total{<pool>}[$__rate_interval]))",
                "{{kind}}",
            ),
            stacked=True,
            bars=True,
        ),
    ]


def _pins() -> list[Panel]:
    limit = Query("sum(pgsidecar_pool_connections_max{<pool>})", "limit")
    return [
        chart(
            "Pinned connections, by reason",
            "Connections that stay with one client beyond its transactions. From half of the limit on it "
            "warns: they cannot be shared; the reason says what to change in the application.",
            "short",
            Query(
                "sum by (reason) (pgsidecar_pinned_connections{<pool>})",
                "{{reason}}",
            ),
            limit,
            stacked=True,
        ),
        chart(
            "Share of connections pinned",
            "Pinned connections as a share of the limit, session mode left out: what the alert looks at.",
            "percentunit",
            Query(
                'sum by (instance, pool) (pgsidecar_pinned_connections{reason!="session_mode",<pool>})'
                " / (max by (instance, pool) (pgsidecar_pool_connections_max{<pool>}) > 0)",
                "{{pool}} {{instance}}",
            ),
            steps=((limits.PINNED, "orange"),),
            top=1.0,
        ),
        chart(
            "New pins, by reason",
            "How often a connection came to be pinned, per second. Often but few at a time: short-lived "
            "temporary tables or advisory locks, which is well.",
            "ops",
            Query(
                "sum by (reason) (rate(pgsidecar_pins_total{<pool>}[$__rate_interval]))",
                "{{reason}}",
            ),
            size=_THIRD,
            stacked=True,
        ),
        chart(
            "Leaks, of the limit",
            "Leases older than the leak threshold, while they last. Steps that never come down: each is a "
            "connection that the application forgot.",
            "short",
            Query("sum by (pool) (pgsidecar_leaked_connections{<pool>})", "{{pool}}"),
            limit,
            size=_THIRD,
            stacked=True,
        ),
        chart(
            "New leaks",
            "Leaks that began. With each deployment: the new version forgets a release on some path; the "
            "log has client and statement.",
            "short",
            Query(
                "sum by (pool) (increase(pgsidecar_leaks_total{<pool>}[$__rate_interval]))",
                "{{pool}}",
            ),
            size=_THIRD,
            bars=True,
        ),
    ]


def _prepared() -> list[Panel]:
    parses = "pgsidecar_prepared_parses_total"
    return [
        chart(
            "Prepared statements kept",
            "On all server connections together. It costs memory of the server: growing without end, "
            "clients put values into the text instead of parameters.",
            "short",
            Query("sum by (pool) (pgsidecar_prepared_statements{<pool>})", "{{pool}}"),
            size=_THIRD,
        ),
        chart(
            "Parses, by result",
            "reused: the server connection had the statement; parsed: the server had to parse it. Mostly "
            "parsed: texts differ in literals or comments.",
            "ops",
            Query(
                f"sum by (result) (rate({parses}{{<pool>}}[$__rate_interval]))",
                "{{result}}",
            ),
            size=_THIRD,
            stacked=True,
            colours=outcomes("reused", "parsed"),
        ),
        chart(
            "Share reused",
            "Parses that cost the server nothing. Low for long: prepared statements bring little here.",
            "percentunit",
            Query(
                f'sum by (pool) (rate({parses}{{result="reused",<pool>}}[$__rate_interval]))'
                f" / (sum by (pool) (rate({parses}{{<pool>}}[$__rate_interval])) > 0)",
                "{{pool}}",
            ),
            size=_THIRD,
            top=1.0,
            empty="Nothing prepared",
        ),
    ]


def _list() -> list[Panel]:
    return [
        chart(
            "Statements told apart",
            "Texts that differ in more than literals, at most statements.limit. At the limit the least "
            "useful tenth makes room.",
            "short",
            Query("sum by (pool) (pgsidecar_statements_tracked{<pool>})", "{{pool}}"),
        ),
        chart(
            "Statements that made room",
            "Per second. Many: clients put values into names, or texts that never come back; raise "
            "statements.limit only if they are real.",
            "ops",
            Query(
                "sum by (pool) (rate(pgsidecar_statements_evicted_total{<pool>}[$__rate_interval]))",
                "{{pool}}",
            ),
        ),
    ]
