"""What a query does, told from its text as cheaply as it can be: operation and session effects.

Pure. A lexical look only: it sees ``SET`` and ``LISTEN``, not what a function does inside. What it
sees is a suspicion, on the safe side: whether a transaction left something behind, the server is
asked (``proxy.pins``). In simple mode every text is new, so the common case (one DML statement)
must cost well under a microsecond; only a text with a suspicious word is looked at closely.
"""

import re
from typing import Final

from sidecar.events import Operation
from sidecar.work import OTHER_STATEMENT, Statement

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

# Effects that may outlive the transaction: bits, since a text can have several.
SETTING: Final = 1  # a setting whose value can be carried to another connection
ROLE: Final = 2
LISTEN: Final = 4
TEMP_TABLE: Final = 8
ADVISORY_LOCK: Final = 16
CURSOR: Final = 32
PREPARE: Final = 64
LOAD: Final = 128  # a library: nothing takes it out again
UNDO: Final = 256  # takes one of them back, perhaps
DEALLOCATE: Final = 512  # one statement that names one prepared statement
UNNAMED: Final = 1024  # a setting whose name is not in the text
UNCARRIED: Final = 4096  # a setting that is too long, or not ASCII: no text tells, the server does
RESET: Final = 8192  # of a setting, or of all
DIALECT: Final = 2048  # a setting, local ones included: what is parsed next may mean something else

LASTING: Final = ROLE | UNNAMED | LISTEN | TEMP_TABLE | ADVISORY_LOCK | CURSOR | PREPARE | LOAD
"""Effects that keep a connection with its client."""

UNKNOWN: Final = LASTING & ~(LOAD | UNNAMED) | SETTING | UNDO | DIALECT
"""Of a text that cannot be looked at. Nobody can tell whether it is to be refused: it is not."""

SEEN: Final = 4096  # with UNKNOWN: something that stays was seen, whatever else is hidden


UNKNOWN_STATEMENT: Final = Statement(OTHER_STATEMENT, "", int(Operation.OTHER))
"""Of texts that nobody has told apart yet."""


class Query:
    """One text: its operation, its effects, the settings that it resets (``all``: every one),
    the names with a dot among those that it sets: a server does not list them; and which statement
    it is, where that is known."""

    __slots__ = ("effects", "names", "operation", "resets", "statement")

    def __init__(
        self,
        operation: int,
        effects: int,
        resets: frozenset[bytes] = NONE,
        names: frozenset[bytes] = NONE,
        statement: Statement = UNKNOWN_STATEMENT,
    ) -> None:
        self.operation: Final[int] = operation
        self.effects: Final[int] = effects
        self.resets: Final = resets
        self.names: Final = names
        self.statement: Final = statement

    def as_statement(self, statement: Statement) -> "Query":
        """The same, known to be this statement."""
        return Query(self.operation, self.effects, self.resets, self.names, statement)


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
_COMMENT: Final = rb"""(?: --[^\n\r]*+
        | /\*(?: [^/*]++ | /(?!\*) | \*(?!/)
              | /\*(?: [^/*]++ | /(?!\*) | \*(?!/) )*+(?:\*/|\Z) )*+(?:\*/|\Z) )"""
"""They nest; two levels are enough for people, and with more of them it is none for us."""

_first_word = re.compile(rb"(?>[\s(;]+|" + _COMMENT + rb")*+([a-z]+)", re.DOTALL | re.VERBOSE).match

# Plain DML takes this exit; one Query object for each operation.
_PLAIN: Final = {op: Query(int(op), 0) for op in Operation}

# What has no end goes on to the end of the text, as it does for the server, which then refuses it.
_TOKENS = re.compile(
    rb"(?P<comment> "
    + _COMMENT
    + rb""")
    | (?P<text> (?<![A-Za-z0-9_$\x80-\xff])[Ee]'(?: [^'\\]++ | '' | \\. )*+(?:'|\Z)
        | '(?: [^']++ | '' )*+(?:'|\Z)
        | (?<![A-Za-z0-9_$\x80-\xff])\$(?P<tag>(?:[A-Za-z_\x80-\xff][A-Za-z0-9_\x80-\xff]*+)?)\$
          .*?(?:\$(?P=tag)\$|\Z) )
    | (?P<name> "(?: [^"]++ | "" )*+(?:"|\Z) )
    """,
    re.DOTALL | re.VERBOSE,
)

# What this reading of texts may be wrong about: whether a backslash escapes a quote (that depends on
# standard_conforming_strings, on an E'' in a line before, and on the encoding, where it may be the
# second byte of a character), and a $ right behind a number.
_is_ambiguous = re.compile(rb"\\'|[0-9]\$[^\s$]*\$").search
_has_effect = re.compile(
    rb"\b(?:set|reset|listen|prepare|declare|load|discard|do)\b|temp|advisory|set_config"
).search

# Of one statement without comments and texts, its words one blank apart.
_EFFECTS: Final = (
    (LISTEN, re.compile(rb"listen\b").match),
    (PREPARE, re.compile(rb"prepare\b(?! transaction\b)").match),
    (CURSOR, re.compile(rb"declare\b.*\bwith hold\b").match),
    (
        TEMP_TABLE,
        re.compile(
            rb"\bcreate (?:or replace )?(?:(?:global|local) )?temp(?:orary)?\b"
            rb"|(?<!insert )(?<!merge )\binto (?:(?:global|local) )?temp(?:orary)?\b"
        ).search,
    ),
    (TEMP_TABLE, re.compile(rb"create\b[^(]*\bpg_temp").match),
    (LOAD, re.compile(rb"load\b").match),
    (ADVISORY_LOCK, re.compile(rb"\bpg_(?:try_)?advisory_lock(?:_shared)? ?\(").search),
    (UNDO, re.compile(rb"(?:unlisten|drop|close|deallocate|discard)\b").match),
    (RESET | UNDO, re.compile(rb"reset\b").match),
    (UNDO, re.compile(rb"\bpg_advisory_unlock(?:_shared|_all)? ?\(").search),
    (DEALLOCATE, re.compile(rb"deallocate(?! all\b)(?! prepare all\b)").match),
)
_suspicious = re.compile(
    rb"\b(?:set|reset|listen|unlisten|prepare|deallocate|declare|close|create|drop|into|load|discard"
    rb"|pg_try_advisory|pg_advisory|set_config)"
).search
_set_name = re.compile(rb"set(?: session)?(?: |(?=\"))(\"[^\"]+\"(?:\.\"[^\"]+\")?|[^\s=]+)").match
_reset_name = re.compile(rb"reset(?: |(?=\"))\"?([^\s\"]+)").match
_set_or_reset = re.compile(rb"set\b|reset\b|.*\bset_config\b").match
_SET_CONFIG = re.compile(rb"\bset_config ?\(")
_set_configs = re.compile(rb"\bset_config\s*\(").findall
_config_names = re.compile(rb"\bset_config\s*\(\s*'([^'\\]+)'\s*,").findall
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
    # Not ``in``, which takes the bytes for a number first and makes up an error: 0.14 us. And not
    # ``find``, which parses its arguments: 0.08 us. This is 0.05 us, the copies included.
    is_single = not low.partition(b";")[2]
    if (
        operation < _TRANSACTION
        and is_single
        and not low.partition(b"advisory")[1]
        and not low.partition(b"set_config")[1]
        and not low.partition(b"temp")[1]
    ):
        return _PLAIN[operation]
    if operation == _TRANSACTION and is_single:
        return _PLAIN[operation]
    # Too long to look at closely without stalling everybody: anything may be in it.
    if len(low) > _LOOKED_AT:
        return Query(int(operation), UNKNOWN)
    bare = _TOKENS.sub(_without_text, text).lower()  # after it: $A$ does not end at $a$
    effects, resets, names = session_effects(low, bare)
    if (b"/*" in bare or _is_ambiguous(low)) and _has_effect(low):
        effects |= UNKNOWN | SEEN if effects & (LASTING | SETTING) else UNKNOWN
    return Query(int(operation), effects, resets, names) if effects or resets else _PLAIN[operation]


def session_effects(low: bytes, bare: bytes) -> tuple[int, frozenset[bytes], frozenset[bytes]]:
    """Of statements in lower case, as they are and without comments and texts: their effects, which
    settings they reset, and which names with a dot they set."""
    effects = 0
    resets: frozenset[bytes] = NONE
    names: frozenset[bytes] = NONE
    sets_config = False
    statements = bare.split(b";")
    if any(statement.lstrip().startswith(b"do") for statement in statements):
        statements += _PLPGSQL.split(low)  # the one kind of code that is there to be seen
    for statement in statements:
        if _suspicious(statement) is None:
            continue
        words = b" ".join(statement.split())
        effects |= _effects_of(words)
        if _set_or_reset(words):
            effects |= DIALECT
        named = _set_name(words)
        if named is not None and named[1] != b"local":
            effects |= _effect_of_set(named[1], words)
            names |= _dotted(named[1])
        sets_config = sets_config or _sets_config(words)
        reset = _reset_name(words)
        if reset is not None:
            resets |= {b"timezone" if reset[1] == b"time" else reset[1]}
    if sets_config:
        known = _config_names(low)
        # all of them, local or not: it does no harm to ask for one that is not set
        names = names.union(*map(_dotted, known))
        is_known = len(known) == len(_set_configs(low))
        effects |= SETTING if is_known else SETTING | UNNAMED
    if effects & DEALLOCATE and len([each for each in statements if each.strip()]) > 1:
        effects &= ~DEALLOCATE
    return effects, resets, names


def begins_block(query: Query, text: bytes) -> bool:
    """Whether this is a single BEGIN or START TRANSACTION."""
    if query.operation != _TRANSACTION or text.find(b";", 0, -1) >= 0:
        return False
    found = _first_word(text.lower())
    return found is not None and found[1] in (b"begin", b"start")


def deallocated(text: bytes) -> bytes:
    """Which prepared statement a text with the effect ``DEALLOCATE`` names, as the server folds it."""
    bare = _TOKENS.sub(lambda m: b" " if m["comment"] is not None else m[0], text).lower()
    found = _deallocate(bare)
    if found is None:
        return b""
    if found[1] is not None:
        quoted = text[text.find(b'"') + 1 : text.rfind(b'"')]
        return quoted.replace(b'""', b'"')
    name: bytes = found[2]
    return name


_deallocate = re.compile(
    rb"\s*deallocate(?:\s+prepare\b)?\s*(?:(\"(?:[^\"]|\"\")+\")|([^\s;\"]+))"
).match


def _without_text(match: re.Match[bytes]) -> bytes:
    """Blank out what could look like SQL but is not; keep a short value (set_config's 'true')."""
    if match["comment"] is not None:
        return b" "
    if match["text"] is not None and len(match[0]) <= 8:
        return match[0].replace(b";", b" ")
    return match[0].replace(b";", b"_") if match["name"] is not None else b" '' "


def _effects_of(words: bytes) -> int:
    effects = 0
    for effect, found in _EFFECTS:
        if found(words):
            effects |= effect
    return effects


def _effect_of_set(name: bytes, words: bytes) -> int:
    name = name.strip(b'"')
    if name in (b"transaction", b"constraints") or name in REPORTED_SETTINGS:
        return 0
    if name == b"role" or (name == b"authorization" and words.startswith(b"set session")):
        return ROLE | UNDO  # SET ROLE NONE undoes
    return SETTING | UNDO  # to DEFAULT, perhaps


def _sets_config(words: bytes) -> bool:
    # each call up to the next one: it says itself whether it is local
    return not all(_is_local(call) for call in _SET_CONFIG.split(words)[1:])


def _dotted(name: bytes) -> frozenset[bytes]:
    name = name.replace(b'"', b"").strip()
    return frozenset({name}) if b"." in name else NONE


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
