"""What a query does, told from its text as cheaply as it can be: operation and session effects.

Pure. A lexical look only: it sees ``SET`` and ``LISTEN``, not what a function does inside. In
simple mode every text is new, so the common case (one DML statement) must cost well under a
microsecond; only a text with a suspicious word is looked at closely.
"""

import re
from typing import Final

from sidecar.events import Operation, PinReason

REPORTED_SETTINGS: Final = frozenset(
    {
        b"application_name",
        b"client_encoding",
        b"datestyle",
        b"intervalstyle",
        b"standard_conforming_strings",
        b"timezone",
        b"time",  # SET TIME ZONE
        b"names",  # SET NAMES 'encoding'
    }
)
"""Settings whose change the server reports by ParameterStatus on every supported version: these
are carried over by ``proxy.settings`` and need no pin."""


class Query:
    """One text: its operation and why it pins a server connection, if it does."""

    __slots__ = ("operation", "pin")

    def __init__(self, operation: int, pin: PinReason | None) -> None:
        self.operation: Final[int] = operation
        self.pin: Final = pin


_OPERATIONS: Final = {
    **dict.fromkeys((b"select", b"values", b"table"), Operation.SELECT),
    b"with": Operation.SELECT,  # refined by _WITH
    b"insert": Operation.INSERT,
    b"update": Operation.UPDATE,
    b"delete": Operation.DELETE,
    b"copy": Operation.COPY,
    **dict.fromkeys(
        (b"begin", b"start", b"commit", b"end", b"rollback", b"abort", b"savepoint", b"release"),
        Operation.TRANSACTION,
    ),
    **dict.fromkeys(
        (
            *(b"alter", b"analyze", b"call", b"checkpoint", b"close", b"cluster", b"comment"),
            *(b"create", b"deallocate", b"declare", b"discard", b"do", b"drop", b"explain"),
            *(b"fetch", b"grant", b"import", b"listen", b"load", b"lock", b"merge", b"move"),
            *(b"notify", b"prepare", b"reassign", b"refresh", b"reindex", b"reset", b"revoke"),
            *(b"security", b"set", b"show", b"truncate", b"unlisten", b"vacuum", b"execute"),
        ),
        Operation.UTILITY,
    ),
}

_COMMON: Final = {
    b"select ": Operation.SELECT,
    b"insert ": Operation.INSERT,
    b"update ": Operation.UPDATE,
    b"delete ": Operation.DELETE,
}

_TRANSACTION: Final = int(Operation.TRANSACTION)
"""The lesser ones are plain DML. A name of its own: ``Enum.MEMBER`` costs 0.2 us on Python 3.11."""

_LOOKED_AT: Final = 64 * 1024  # bytes

_first_word = re.compile(rb"(?:[\s(;]+|--[^\n]*\n|/\*.*?\*/)*([a-z]+)", re.DOTALL).match

# Plain DML takes this exit; one Query object for each operation.
_PLAIN: Final = {op: Query(int(op), None) for op in Operation}

_TOKENS = re.compile(
    rb"""
      (?P<blank> --[^\n]* | /\*.*?\*/ )
    | (?P<text> e?'(?:[^'\\]|''|\\.)*' | \$(?P<tag>[a-z_0-9]*)\$.*?\$(?P=tag)\$ )
    | (?P<name> "(?:[^"]|"")*" )
    """,
    re.DOTALL | re.VERBOSE,
)

_EFFECTS: Final = (
    (PinReason.LISTEN, re.compile(rb"listen\b")),
    (PinReason.PREPARE, re.compile(rb"prepare\s+(?!transaction\b)")),
    (PinReason.CURSOR, re.compile(rb"declare\b.*\bwith\s+hold\b", re.DOTALL)),
    (
        PinReason.TEMP_TABLE,
        re.compile(
            rb"create\s+(?:or\s+replace\s+)?(?:(?:global|local)\s+)?temp(?:orary)?\b"
            rb"|create\b[^(]*\bpg_temp\b|.*\binto\s+(?:(?:global|local)\s+)?temp(?:orary)?\b",
            re.DOTALL,
        ),
    ),
    (PinReason.SET, re.compile(rb"load\b")),
)
_set_name = re.compile(rb"set\s+(?:session\s+)?([a-z_0-9.\"]+)").match
_ADVISORY_LOCK = re.compile(rb"\bpg_(?:try_)?advisory_lock(?:_shared)?\s*\(")
_SET_CONFIG = re.compile(rb"\bset_config\s*\((?!.*,\s*(?:true|'t'|'true')\s*\))", re.DOTALL)
_WITH = re.compile(rb"\)\s*(select|insert|update|delete|values|merge)\b")


def classify(text: bytes) -> Query:
    """The operation of a query's first statement and the session effect of all of them."""
    low = text.lower()
    operation = _COMMON.get(low[:7])  # 0.1 us; a regular expression needs 1.5 us to say the same
    if operation is None:
        operation = _operation_of(low)
    is_single = low.find(b";", 0, -1) < 0
    if (
        operation < _TRANSACTION
        and is_single
        and b"advisory" not in low
        and b"set_config" not in low
        and b"temp" not in low
    ):
        return _PLAIN[operation]
    if operation == _TRANSACTION and is_single:
        return _PLAIN[operation]
    # Too long to look at closely without stalling everybody: take the worst for granted.
    pin = session_effect(low) if len(low) <= _LOOKED_AT else PinReason.SET
    return _PLAIN[operation] if pin is None else Query(int(operation), pin)


def session_effect(low: bytes) -> PinReason | None:
    """Why these statements (in lower case) leave session state behind; None if they do not."""
    bare = _TOKENS.sub(_without_text, low)
    for statement in bare.split(b";"):
        reason = _effect_of(statement.strip())
        if reason is not None:
            return reason
    return None


def _without_text(match: re.Match[bytes]) -> bytes:
    """Blank out what could look like SQL but is not; keep a short value (set_config's 'true')."""
    if match["text"] is not None and len(match[0]) <= 8:
        return match[0].replace(b";", b" ")
    return match[0].replace(b";", b"_") if match["name"] is not None else b" '' "


def _effect_of(statement: bytes) -> PinReason | None:
    named = _set_name(statement)
    if named is not None and _sets_for_session(statement, named[1].strip(b'"')):
        return PinReason.SET
    for reason, pattern in _EFFECTS:
        if pattern.match(statement):
            return reason
    if _ADVISORY_LOCK.search(statement):
        return PinReason.ADVISORY_LOCK
    if _SET_CONFIG.search(statement):
        return PinReason.SET
    return None


def _sets_for_session(statement: bytes, name: bytes) -> bool:
    if name in (b"local", b"transaction", b"constraints"):
        return False
    return name not in REPORTED_SETTINGS


def _operation_of(low: bytes) -> Operation:
    found = _first_word(low)
    if found is None:
        return Operation.OTHER
    if found[1] == b"with":
        return _operation_of_with(low)
    return _OPERATIONS.get(found[1], Operation.OTHER)


def _operation_of_with(low: bytes) -> Operation:
    last = Operation.SELECT
    for match in _WITH.finditer(low):
        last = _OPERATIONS.get(match[1], Operation.OTHER)
    return last
