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
_SHORT: Final = f'label_replace({_TEXT}, "query", "$1…$2", "query", "(.{{15}}).+(.{{10}})")'
"""As legends have room for: how it begins and how it ends, since many begin alike."""
_OTHERS: Final = "others"
_P99: Final = (
    "max by (pool, fingerprint) "
    '(pgsidecar_statement_latency_seconds{quantile="0.99",<pool>}%s >= 0)'
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


def _rate(kind: str, selector: str, window: str) -> str:
    total = f"pgsidecar_statement_{kind}_total{{{selector}}}"
    return f"sum by (pool, fingerprint) (rate({total}{window}))"


def _with_text(expr: str, text: str = _SHORT) -> str:
    return f"{expr} * on (pool, fingerprint) group_left (query) {text}"


def _top(kind: str) -> Query:
    """The same ten all the time: those of the whole time shown."""
    rate = _rate(kind, _TOLD_APART, "[$__rate_interval]")
    whole = _rate(kind, _TOLD_APART, "[$__range] @ end()")
    top = f"{rate} and on (pool, fingerprint) topk(10, {whole} > 0)"
    return Query(_with_text(f"round({top}, 0.001)"), "{{query}}")


def _now(kind: str) -> str:
    return _rate(kind, "<pool>", "[5m]")


def _other(kind: str) -> Query:
    rate = f"rate(pgsidecar_statement_{kind}_total"
    others = f'{rate}{{fingerprint="other",<pool>}}[$__rate_interval])'
    return Query(f"round(sum({others}), 0.001)", _OTHERS)


def _overview() -> list[Panel]:
    return [
        figure(
            "Busy connections",
            "How many connections queries kept busy on average over 5 minutes (their time per second). "
            "Compare with the limit: far below while clients wait, connections are held and idle.",
            "short",
            Query("sum(rate(pgsidecar_statement_seconds_total{<pool>}[5m]))"),
            decimals=2,
        ),
        shared.p99((4, 4)),
        figure(
            "Clients kept waiting",
            "How many clients waited on average over 5 minutes. Some all the time: the pool is held; below "
            "is by whom.",
            "short",
            Query("sum(rate(pgsidecar_blamed_wait_seconds_total{<pool>}[5m]))"),
            steps=shared.ANY,
            decimals=1,
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
            decimals=0,
        ),
        shared.verdict_now((4, 4)),
    ]


def _statements() -> list[Panel]:
    seconds, calls = _now("seconds"), _now("calls")
    return [
        listing(
            "Statements, by time",
            "Over 5 minutes: all statements that have series, and the others together. Busy: connections "
            "that it takes from the pool; many short calls weigh as much as a few long ones.",
            "short",
            Query(
                f"{_with_text(seconds, _TEXT)} or label_replace("
                f"{seconds} unless on (pool, fingerprint) {_TEXT}, "
                f'"query", "{_OTHERS}", "fingerprint", "other")',
                "busy",
            ),
            Query(calls, "calls/s"),
            Query(f"{seconds} / ({calls} > 0)", "average"),
            Query(_P99 % "", "P99"),
            Query(f"{_now('rows')} / ({calls} > 0)", "rows a call"),
            Query(f"{_now('errors')} / ({calls} > 0)", "failed"),
            columns=[
                Column("query"),
                Column("busy", decimals=3, width=90),
                Column("calls/s", decimals=2, width=90),
                Column("average", "s", width=100),
                Column("P99", "s", shared.LATENCY, width=100),
                Column("rows a call", width=110),
                Column("failed", "percentunit", shared.ERROR_RATE, width=90),
                Column("pool", width=110),
                Column("fingerprint", width=160),
            ],
            sort="busy",
            size=(24, 10),
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
            colours={_OTHERS: "text"},
            sort="Max",
        ),
        chart(
            "Top 10 by P99",
            "One call in a hundred took longer, within 5 minutes; of several sidecars the worst. Slow and "
            "rare hurts few; slow and at the top by time hurts all.",
            "s",
            Query(
                _with_text(
                    f"({_P99 % ''} and on (pool, fingerprint) topk(10, {_P99 % ' @ end()'}))"
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
                Column("waiting caused", "s", width=150),
                Column("held now", width=110),
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
            "Pinned connections as a share of the limit, session mode left out: what the alert looks at, of "
            "several sidecars the worst.",
            "percentunit",
            Query(
                "max by (pool) (sum by (instance, pool) "
                '(pgsidecar_pinned_connections{reason!="session_mode",<pool>})'
                " / (max by (instance, pool) (pgsidecar_pool_connections_max{<pool>}) > 0))",
                "{{pool}}",
            ),
            steps=((limits.PINNED, "orange"),),
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
