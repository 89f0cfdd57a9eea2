"""Small conversions that several tables need.

Pure.
"""

from collections.abc import Iterator, Mapping
from typing import Final

from sidecar.events import ClientSnapshot
from sidecar.work import Statement

SHOWN: Final = 200
"""Characters of a query that a table shows."""


def micro(seconds: float) -> int:
    """Microseconds, whole; a clock that was read earlier makes none negative."""
    return max(0, int(seconds * 1_000_000))


def application_of(client: ClientSnapshot | None) -> str:
    return "" if client is None else client.application


def query_of(statement: Statement | None) -> tuple[str | None, str | None]:
    """Its fingerprint, and the beginning of its text in one line."""
    if statement is None:
        return None, None
    text = " ".join(statement.text[: 2 * SHOWN].split())
    return statement.fingerprint, text if len(text) <= SHOWN else text[:SHOWN] + "..."


def flat(tree: Mapping[str, object], path: str = "") -> Iterator[tuple[str, str]]:
    """The leaves of a tree of options, each with its dotted path."""
    for key, value in tree.items():
        where = f"{path}.{key}" if path else key
        if isinstance(value, Mapping):
            yield from flat(value, where)
        else:
            yield where, word(value)


def word(value: object) -> str:
    """The value of an option as the file would have it."""
    match value:
        case None:
            return ""
        case bool():
            return "true" if value else "false"
        case tuple():
            return ", ".join(map(str, value))
        case float():
            return f"{value:.6f}".rstrip("0").rstrip(".") + "s"
        case _:
            return str(value)
