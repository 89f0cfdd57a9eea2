"""What comes from outside of the pool: the server gone, a crowd of clients, errors. None: it is not that.

Pure.
"""

from typing import Final

from sidecar.observe.evidence import LATELY, Evidence, name_of
from sidecar.observe.verdict import Kind, Verdict, is_burst, is_storm
from sidecar.observe.wording import (
    application,
    command,
    counted,
    host_of,
    lasting,
    number,
    one_line,
    option,
    percent,
    queue,
    sentence,
    statement,
    waiting,
    waits,
)

_MESSAGE: Final = 100
"""Characters of an error's message in a headline."""


def database_down(e: Evidence) -> Verdict:
    cause = f": {e.why_down}" if e.why_down else ""
    evidence = [f"Not reachable for {lasting(e.down_for)}{cause}."]
    if e.lost:
        evidence.append(f"{counted(e.lost, 'connection')} lost in the last {lasting(e.seconds)}.")
    if e.refused:
        evidence.append(f"{counted(e.refused, 'attempt')} to connect failed meanwhile.")
    evidence.append(f"{sentence(waiting(e.pending))} for a connection.")
    return Verdict(
        Kind.DATABASE_DOWN,
        e.pool,
        f"Pool {e.pool} cannot reach PostgreSQL at {e.settings.server}{cause}.",
        evidence=tuple(evidence),
        next_steps=(
            "See whether PostgreSQL runs and what its log says; from this host:"
            f" pg_isready -d '{host_of(e.settings.server)}'.",
            "The pool keeps trying, with at most 5 s between two attempts, and needs no restart.",
            "Clients wait up to acquire_timeout"
            f" ({option(e.settings.acquire_timeout)}), then they get an error.",
        ),
    )


def connection_storm(e: Evidence) -> Verdict | None:
    if not is_storm(e):
        return None
    came = sum(e.arrivals)
    rate = came / max(len(e.arrivals), 1)
    usual = "" if e.arrived_before is None else f" ({number(e.arrived_before)} per second before)"
    first = e.arrived[0] if e.arrived else None
    evidence = [
        f"{counted(came, 'new client')} in the last {lasting(e.seconds)}:"
        f" {number(rate)} per second{usual}."
    ]
    if first is not None:
        evidence.append(
            f"{first.clients} of them are {application(first.application)}, user {first.user},"
            f" from {first.host}."
        )
    if e.rejected:
        evidence.append(f"{number(e.rejected)} clients per second are turned away.")
    fresh = sum(share.fresh for share in e.shares)
    if e.connection_seconds and fresh:
        evidence.append(
            f"New clients have {percent(fresh / e.connection_seconds)} of the connections' time."
        )
    evidence.append(waits(e))
    culprit = "" if first is None else first.application
    who = "many clients" if first is None else application(culprit)
    limit = e.settings.max_clients
    return Verdict(
        Kind.CONNECTION_STORM,
        e.pool,
        f"Pool {e.pool} is swamped: {who} opens {number(rate)} connections per second: {queue(e)}.",
        culprit,
        None,
        tuple(evidence),
        (
            f"See who they are: {command(e.settings, 'SHOW CLIENTS')}.",
            f"Have {who} keep its connections, and wait longer before each retry.",
            f"max_clients (now {limit or 'no limit of its own'}) limits the clients of this pool"
            " and of a user.",
        ),
    )


def error_burst(e: Evidence) -> Verdict | None:
    if not is_burst(e):
        return None
    evidence = [
        f"{number(e.failures)} errors per second in the last {LATELY} s"
        + ("" if e.failures_before is None else f" ({number(e.failures_before)} before)")
        + f"; {number(e.queries)} queries per second have ended."
    ]
    first = e.failed[0] if e.failed else None
    culprit, name, what = "", None, "errors"
    if first is not None:
        culprit, name = first.application, name_of(first.statement)
        what = f"SQLSTATE {first.sqlstate} from the {first.origin}"
        of = "" if name is None else f", by {statement(name)}"
        evidence.append(f"{first.times} are {what} to {application(culprit)}{of}.")
        if first.message:
            what = f"{first.sqlstate} ({one_line(first.message, _MESSAGE)})"
            evidence.append(f"The last one says: {first.message}")
        if len(e.failed) > 1:
            others = sum(each.times for each in e.failed[1:])
            evidence.append(f"{others} others, of {counted(len(e.failed) - 1, 'kind')}.")
    return Verdict(
        Kind.ERROR_BURST,
        e.pool,
        f"{number(e.failures)} queries per second of pool {e.pool} fail, above all those of"
        f" {application(culprit)} with {what}.",
        culprit,
        name,
        tuple(evidence),
        (
            f"See what {application(culprit)} has changed lately: a release, a migration, its data.",
            "The pool itself is not the cause: connections are free.",
        ),
    )
