"""Why the pool is in trouble: evidence in, verdict out.

Pure. Where several things go wrong, the deeper one is named: a lock chain makes statements slow, a leak makes the
pool small, a crowd of new clients makes any statement the one that all run.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Final

from sidecar.events import IncidentKind
from sidecar.observe.causes import (
    besides,
    hung,
    is_surely_slow,
    leak,
    lock_chain,
    pool_too_small,
    slow_statement,
)
from sidecar.observe.evidence import Evidence
from sidecar.observe.troubles import connection_storm, database_down, error_burst
from sidecar.observe.verdict import Kind, Verdict, is_contended, is_down
from sidecar.observe.wording import command, number, one_line, waiting

FIGURES: Final = 5
STEPS: Final = 4
"""Sentences at most: a person who is half awake reads no more."""


_NOT_ALONE: Final = (Kind.SLOW_STATEMENT, Kind.POOL_TOO_SMALL, Kind.CONNECTION_STORM)
"""These are named where no deeper cause has most of the connections; it may have some."""


def judge(e: Evidence, about: IncidentKind | None = None) -> Verdict:
    """``about``: what happened, if one thing did; it is looked into first if clients do not wait."""
    found = _judged(e, about)
    if found.kind in _NOT_ALONE and is_contended(e):
        first, *rest = found.evidence
        found = replace(found, evidence=(first, *besides(e), *rest))
    return replace(
        found,
        headline=one_line(found.headline),
        evidence=tuple(map(one_line, found.evidence[:FIGURES])),
        next_steps=tuple(map(one_line, found.next_steps[:STEPS])),
    )


def _judged(e: Evidence, about: IncidentKind | None) -> Verdict:
    if is_down(e):
        return database_down(e)
    if is_contended(e):
        found: Verdict | None = lock_chain(e) or leak(e) or hung(e)
        if found is None and not is_surely_slow(e):
            found = connection_storm(e)
        return found or slow_statement(e) or pool_too_small(e)
    looks: list[tuple[IncidentKind | None, Callable[[Evidence], Verdict | None]]] = [
        (IncidentKind.CONNECTION_STORM, connection_storm),
        (IncidentKind.ERROR_BURST, error_burst),
        (IncidentKind.SLOW_QUERY, lock_chain),
        (IncidentKind.LEAK, leak),
        (IncidentKind.SLOW_QUERY, slow_statement),
    ]
    looks.sort(key=lambda each: each[0] is not about)
    for _, look in looks:
        found = look(e)
        if found is not None:
            return found
    return healthy(e)


def healthy(e: Evidence) -> Verdict:
    use = f"{e.used} of {e.max_size} connections in use, {waiting(e.pending)}"
    if e.is_paused:
        return Verdict(
            Kind.HEALTHY,
            e.pool,
            f"Pool {e.pool} is paused by an administrator: {use}.",
            next_steps=(f"To let clients go on: {command(e.settings, f'RESUME {e.pool}')}.",),
        )
    return Verdict(
        Kind.HEALTHY,
        e.pool,
        f"Pool {e.pool} is well: {use}.",
        evidence=(f"{number(e.transactions)} transactions per second.",),
    )
