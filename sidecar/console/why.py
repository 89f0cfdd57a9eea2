"""Tables that explain: which statements cost what, what fails, who is to blame for waiting.

Pure. Query texts are normalised. Each table goes pool by pool.
"""

from collections.abc import Iterator
from typing import Final

from sidecar.console import beyond
from sidecar.console.facts import View
from sidecar.console.rows import Row, columns
from sidecar.console.words import micro, query_of

LEAKS: Final = beyond.HOLDERS
ERRORS: Final = columns(
    "database origin sqlstate application_name count:numeric first_time last_time fingerprint query"
    " message"
)
BLAME: Final = columns("database application_name blamed_us:numeric share")


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
