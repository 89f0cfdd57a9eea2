"""Tables that explain: which statements cost what, what fails, who is to blame for waiting.

Pure. Query texts are normalised. Each table goes pool by pool.
"""

from collections.abc import Iterator
from math import isnan
from typing import Final

from sidecar.console import beyond
from sidecar.console.facts import View
from sidecar.console.rows import Row, columns
from sidecar.console.words import micro, query_of

STATEMENTS: Final = columns(
    "database fingerprint calls:numeric rows:numeric errors:numeric total_us:numeric mean_us:int8"
    " max_us:int8 p50_us:int8 p90_us:int8 p99_us:int8 blamed_us:numeric query"
)
SLOW: Final = columns(
    "database user application_name addr client:int4 server:int4 remote_pid:int4 seen_time"
    " age_us:int8 wait_event blocked_by blocker_application blocker_fingerprint blocker_query"
    " trace_id fingerprint query not_asked"
)
INCIDENTS: Final = columns("id database kind began ended verdict headline")
WHY: Final = columns("database verdict part text")
LEAKS: Final = beyond.HOLDERS
ERRORS: Final = columns(
    "database origin sqlstate application_name count:numeric first_time last_time fingerprint query"
    " message"
)
BLAME: Final = columns("database application_name blamed_us:numeric share")


def why(view: View) -> Iterator[Row]:
    """What is wrong now: a line that says it, the figures, and what to do next."""
    for insight in view.control.insights():
        verdict = insight.verdict(view.now)
        kind = str(verdict.kind)
        yield (insight.name, kind, "headline", verdict.headline)
        for text in verdict.evidence:
            yield (insight.name, kind, "evidence", text)
        for text in verdict.next_steps:
            yield (insight.name, kind, "next", text)


def statements(view: View) -> Iterator[Row]:
    """Those with most time first."""
    limit = view.control.config.statements.limit
    for insight in view.control.insights():
        for statement in insight.statements.ranked("seconds", limit):
            fingerprint, text = query_of(statement)
            calls, seconds = statement.calls, statement.seconds
            quantiles, _ = insight.statements.quantiles(statement, view.now)
            yield (
                *(insight.name, fingerprint, calls, statement.rows),
                sum(statement.errors.values()),
                *(micro(seconds), micro(seconds / calls) if calls else 0),
                micro(statement.longest),
                *(None if isnan(quantile) else micro(quantile) for quantile in quantiles),
                *(micro(statement.blamed), text),
            )


def slow(view: View) -> Iterator[Row]:
    """The last queries that crossed the threshold, latest first, and whom each waited for."""
    for insight in view.control.insights():
        for seen_at, query in reversed(insight.slow_queries):
            holder, blockers = query.holder, query.blockers
            root = next((each for each in reversed(blockers) if not each.waits_for), None)
            its = None if root is None or root.holder is None else root.holder.statement
            yield (
                *(insight.name, holder.who.user, holder.who.application, holder.who.address),
                *(holder.who.client, holder.server, holder.backend_pid),
                *(view.when(seen_at), micro(query.age), query.wait_event),
                ",".join(str(each.backend_pid) for each in blockers),
                "" if root is None else root.application,
                *query_of(its),
                "" if query.trace is None else query.trace.trace_id,
                *query_of(holder.statement),
                query.cause,
            )


def incidents(view: View) -> Iterator[Row]:
    """Latest first."""
    for incident in view.control.incidents():
        began, ended = incident.began_at, incident.ended_at
        yield (
            *(incident.id, incident.pool, str(incident.kind), view.at(began)),
            "" if ended is None else view.at(ended),
            *(str(incident.verdict.kind), incident.verdict.headline),
        )


def leaks(view: View) -> Iterator[Row]:
    """Of the leases those that are leaks, oldest first."""
    found = {server for insight in view.control.insights() for server in insight.leaks}
    yield from beyond.holders(view, only=found)


def errors(view: View) -> Iterator[Row]:
    """Latest first."""
    for insight in view.control.insights():
        for entry in insight.failures.entries():
            yield (
                *(insight.name, entry.origin, entry.sqlstate, entry.application, entry.count),
                *(view.when(entry.first_at), view.when(entry.last_at)),
                *query_of(entry.statement),
                entry.message,
            )


def blame(view: View) -> Iterator[Row]:
    """Most first; whoever held nothing while others waited is left out."""
    for insight in view.control.insights():
        waited = insight.blame.waited
        charged = sorted(insight.blame.by_application().items(), key=lambda each: -each[1])
        for application, seconds in charged:
            if seconds > 0.0:
                yield (insight.name, application, micro(seconds), f"{seconds / waited:.1%}")
