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


NONE: Final[frozenset[bytes]] = frozenset()


class Query:
    """One text: its operation, why it pins a server connection, and the settings that it resets
    (``all``: every one)."""

    __slots__ = ("operation", "pin", "resets")

    def __init__(
        self, operation: int, pin: PinReason | None, resets: frozenset[bytes] = NONE
    ) -> None:
        self.operation: Final[int] = operation
        self.pin: Final = pin
        self.resets: Final = resets


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

# Possessive, here and below: a client chooses the text, so none may make a match backtrack for ever.
_first_word = re.compile(rb"(?>[\s(;]+|--[^\n]*\n|/\*.*?\*/)*+([a-z]+)", re.DOTALL).match

# Plain DML takes this exit; one Query object for each operation.
_PLAIN: Final = {op: Query(int(op), None) for op in Operation}

# What has no end goes on to the end of the text, as it does for the server, which then refuses it.
# Comments nest; two levels are enough for people.
_TOKENS = re.compile(
    rb"""
      (?P<comment> --[^\n]*+
        | /\*(?: [^/*]++ | /(?!\*) | \*(?!/)
              | /\*(?: [^*]++ | \*(?!/) )*+(?:\*/|\Z) )*+(?:\*/|\Z) )
    | (?P<text> (?<![a-z0-9_$\x80-\xff])e'(?: [^'\\]++ | '' | \\. )*+(?:'|\Z)
        | '(?: [^']++ | '' )*+(?:'|\Z)
        | (?<![a-z0-9_$\x80-\xff])\$(?P<tag>(?:[a-z_\x80-\xff][a-z0-9_\x80-\xff]*+)?)\$
          .*?(?:\$(?P=tag)\$|\Z) )
    | (?P<name> "(?: [^"]++ | "" )*+(?:"|\Z) )
    """,
    re.DOTALL | re.VERBOSE,
)

# Of one statement without comments and texts, its words one blank apart.
_EFFECTS: Final = (
    (PinReason.LISTEN, re.compile(rb"listen\b").match),
    (PinReason.PREPARE, re.compile(rb"prepare\b(?! transaction\b)").match),
    (PinReason.CURSOR, re.compile(rb"declare\b.*\bwith hold\b").match),
    (
        PinReason.TEMP_TABLE,
        re.compile(
            rb"\bcreate (?:or replace )?(?:(?:global|local) )?temp(?:orary)?\b"
            rb"|(?<!insert )(?<!merge )\binto (?:(?:global|local) )?temp(?:orary)?\b"
        ).search,
    ),
    (PinReason.TEMP_TABLE, re.compile(rb"create\b[^(]*\bpg_temp").match),
    (PinReason.SET, re.compile(rb"load\b").match),
    (PinReason.ADVISORY_LOCK, re.compile(rb"\bpg_(?:try_)?advisory_lock(?:_shared)? ?\(").search),
)
_suspicious = re.compile(
    rb"\b(?:set|reset|listen|prepare|declare|create|into|load|pg_try_advisory|pg_advisory|set_config)"
).search
_set_name = re.compile(rb"set(?: session)?(?: |(?=\"))(\"[^\"]+\"|[^\s=]+)").match
_reset_name = re.compile(rb"reset(?: |(?=\"))\"?([^\s\"]+)").match
_SET_CONFIG = re.compile(rb"\bset_config ?\(")
_is_local = re.compile(
    rb", ?(?:is_local ?=> ?)?(?:true|'t'|'true')(?: ?:: ?bool(?:ean)?)? ?\)"
).search
_PLPGSQL = re.compile(rb"[;$]|\b(?:do|begin|then|else|loop)\b")
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
    pin, resets = session_effect(low) if len(low) <= _LOOKED_AT else (PinReason.SET, NONE)
    return Query(int(operation), pin, resets) if pin or resets else _PLAIN[operation]


def session_effect(low: bytes) -> tuple[PinReason | None, frozenset[bytes]]:
    """Of statements in lower case: why they leave session state behind (None: they do not), and
    which settings they reset."""
    pin: PinReason | None = None
    resets: frozenset[bytes] = NONE
    bare = _TOKENS.sub(_without_text, low)
    statements = bare.split(b";")
    if any(statement.lstrip().startswith(b"do") for statement in statements):
        statements += _PLPGSQL.split(low)  # the one kind of code that is there to be seen
    for statement in statements:
        if _suspicious(statement) is None:
            continue
        words = b" ".join(statement.split())
        pin = pin or _effect_of(words)
        reset = _reset_name(words)
        if reset is not None:
            resets |= {b"timezone" if reset[1] == b"time" else reset[1]}
    return pin, resets


def _without_text(match: re.Match[bytes]) -> bytes:
    """Blank out what could look like SQL but is not; keep a short value (set_config's 'true')."""
    if match["comment"] is not None:
        return b" "
    if match["text"] is not None and len(match[0]) <= 8:
        return match[0].replace(b";", b" ")
    return match[0].replace(b";", b"_") if match["name"] is not None else b" '' "


def _effect_of(words: bytes) -> PinReason | None:
    named = _set_name(words)
    if named is not None and _sets_for_session(named[1].strip(b'"')):
        return PinReason.SET
    for reason, found in _EFFECTS:
        if found(words):
            return reason
    # each call up to the next one: it says itself whether it is local
    calls = _SET_CONFIG.split(words)[1:]
    return None if all(_is_local(call) for call in calls) else PinReason.SET


def _sets_for_session(name: bytes) -> bool:
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
