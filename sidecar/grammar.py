"""PostgreSQL's own grammar, by libpg_query: a fingerprint that knows aliases, casts and synonyms.

The only module that knows ``postgast``. What its parser gets is short: it is C, on our stack, and runs
to its end while everybody waits. PostgreSQL's grammar itself gives up at 10,000 open levels; chains
like 1+1+1... have no such limit, but a level each.
"""

from typing import Final

from postgast import PgQueryError
from postgast import fingerprint as _fingerprint

LONGEST: Final = 8 * 1024
"""Bytes of a text. One of these takes up to 3 ms (usual ones 10 us)."""

MOST_TOKENS: Final = 2000
"""And as many levels at most: a stack of 2 MiB is enough for them. 4000 are too many for that."""


def fingerprint(text: str) -> str:
    """16 hexadecimal digits; empty if this is no SQL of PostgreSQL's."""
    try:
        found: str = _fingerprint(text).hex
    except (PgQueryError, ValueError):  # it cuts its messages anywhere, in a character too
        return ""
    return found
