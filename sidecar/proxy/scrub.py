"""Error messages without what a client's data may be in them.

Pure. What stands in quotation marks in a message may be a value ("invalid input syntax for type
integer: \"4711x\"") or a name (column "x" does not exist): it is kept only where the normal form of the
statement has it, which is told anyway, or PostgreSQL itself says in a field that it is a name; of class 22
(data exceptions) it is a value. What follows a colon is mostly a value, too, and so is a number. What a
function makes up itself (RAISE) can be anything.

Works on translated messages alike: it goes by quotation marks, not by words.
"""

import re
from typing import Final

from sidecar.protocol import messages as m
from sidecar.work import Statement

LONGEST: Final = 200  # characters of a message that are kept

HIDDEN: Final = "?"

OF_A_FUNCTION: Final = "(raised by a function, in words of its own)"

_LOOKED_AT: Final = 16 * 1024  # characters of a normal form
_READ: Final = 1000  # characters of a message
_MOST: Final = 8  # quotations, and places of a word in a normal form, that are looked at

# The classes of errcodes.txt in PostgreSQL 18's sources, less P0 (PL/pgSQL's, which has its users' words).
_CLASSES: Final = frozenset(
    {
        *("00", "01", "02", "03", "08", "09", "0A", "0B", "0F", "0L", "0P", "0Z", "10"),
        *("20", "21", "22", "23", "24", "25", "26", "27", "28", "2B", "2D", "2F"),
        *("34", "38", "39", "3B", "3D", "3F", "40", "42", "44"),
        *("53", "54", "55", "57", "58", "72", "F0", "HV", "XX"),
    }
)
_RAISING: Final = ("exec_stmt_raise", "exec_stmt_assert")  # routines of PL/pgSQL

# Sources of the other languages and of what passes on another server's words
_FOREIGN: Final = re.compile(
    r"plpy_|plperl|pltcl|plv8|pljava|plr|dblink|connection\.c|postgres_fdw"
)

# PostgreSQL's own sources of the internal errors that are worth reading; of class XX any extension has
# errors, and every error that a function in C or in another language does not say the class of.
_INTERNAL: Final = frozenset(
    {
        *("aclchk.c", "bufmgr.c", "bufpage.c", "catcache.c", "detoast.c", "heapam.c"),
        *("heapam_handler.c", "inval.c", "lsyscache.c", "md.c", "nbtinsert.c", "nbtpage.c"),
        *("nbtsearch.c", "relcache.c", "syscache.c", "toast_internals.c", "tupdesc.c"),
    }
)

# Behind the colon are operators and types (42883, 42725), or what the system says (53, 58)
_TELLING: Final = ("42883", "42725", "53", "58")

_QUOTES: Final = {
    '"': '"',
    "'": "'",
    "`": "'`",
    "\u201c": "\u201d",
    "\u201e": "\u201c\u201d",
    "\u00ab": "\u00bb",
    "\u00bb": "\u00ab",
    "\u2018": "\u2019",
    "\u201a": "\u2018\u2019",
    "\u2039": "\u203a",
    "\u300c": "\u300d",
    "\u300e": "\u300f",
    "\uff02": "\uff02",
}
"""What opens a quotation in PostgreSQL's languages, and what closes it."""

_OPENS: Final = re.compile(f"(?:(?<!\\w)'|[{''.join({*_QUOTES} - {chr(39)})}])")
_ANY: Final = "".join(sorted({*_QUOTES, *"".join(_QUOTES.values())}))
_COLON: Final = re.compile("[ \u00a0\u202f]?[:\uff1a](?=\\s|[" + _ANY + "]|$)|\uff1a")
_NUMBER: Final = re.compile(r"(?<!\w)[0-9](?:[\w.]*\w)?|\\\w+")
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+")


def message_of(body: bytes, statement: Statement | None) -> str:
    """The message of an ErrorResponse of the server's, to be kept and shown."""
    fields = m.error_fields(body)
    said = fields.get("M", "")
    text = said[:_READ]
    if not text or _is_made_up(fields):
        return OF_A_FUNCTION if text else ""
    names = {fields[key].lower() for key in "stcdn" if key in fields}
    sqlstate = fields.get("C", "")
    normal = ""
    if statement is not None and not sqlstate.startswith("22"):
        normal = statement.text[:_LOOKED_AT].lower()
    is_telling = sqlstate.startswith(_TELLING)
    is_cut = text != said or not body.endswith(b"\0\0")
    return _shortened(_Scrub(names, normal, is_telling, is_cut).clean(text))


def _is_made_up(fields: dict[str, str]) -> bool:
    """By a function, or by another server."""
    sqlstate, file = fields.get("C", ""), fields.get("F", "")
    return (
        sqlstate[:2] not in _CLASSES
        or fields.get("R", "") in _RAISING
        or _FOREIGN.match(file) is not None
        or (sqlstate[:2] == "XX" and file not in _INTERNAL)
    )


class _Scrub:
    """What is known to be no value: names, lower case, and the text of a statement, so. ``is_telling``:
    nor is what follows a colon; ``is_cut``: the end of the message is missing."""

    def __init__(self, names: set[str], normal: str, is_telling: bool, is_cut: bool) -> None:
        self._names: Final = names
        self._normal: Final = normal
        self._is_telling: Final = is_telling
        self._is_cut: Final = is_cut

    def clean(self, text: str) -> str:
        kept = self._without_quotations(text)
        return _NUMBER.sub(lambda found: found[0] if self._is_told(found[0]) else HIDDEN, kept)

    def _without_quotations(self, text: str) -> str:
        """Left to right. From the first quotation that may be a value on, nothing is what it looks like
        any more: the value may have quotation marks itself. So all up to the last one is left out."""
        out: list[str] = []
        pos = 0
        while (opening := _OPENS.search(text, pos)) is not None:
            start = opening.end()
            before = text[pos : opening.start()]
            if (end := self._colon(before)) >= 0:
                return "".join(out) + before[:end] + f" {HIDDEN}"
            out.append(before + opening[0])
            closers = _QUOTES[opening[0]]
            end = _first(text, closers, start)
            is_whole = end >= 0 and not text[end + 1 : end + 2].isalnum()
            if is_whole and len(out) < 2 * _MOST and self._is_told(text[start:end].strip()):
                out.append(text[start : end + 1])
                pos = end + 1
                continue
            end = max(text.rfind(each, start) for each in _ANY)
            out.append(HIDDEN + closers[0])
            pos = end + 1 if end >= start and not self._is_cut else len(text)
            break
        rest = text[pos:]
        if (end := self._colon(rest)) >= 0:
            rest = rest[:end] + f" {HIDDEN}"
        return "".join(out) + rest

    def _colon(self, text: str) -> int:
        """Where a value begins; -1: nowhere."""
        colon = None if self._is_telling else _COLON.search(text)
        return -1 if colon is None else colon.end()

    def _is_told(self, word: str) -> bool:
        word = word.lower()
        return bool(word) and (word in self._names or _has(self._normal, word))


def _first(text: str, closers: str, start: int) -> int:
    found = [at for each in closers if (at := text.find(each, start)) >= 0]
    return min(found, default=-1)


def _has(text: str, word: str) -> bool:
    """Whether the text has this, and not within a longer word."""
    pos = -1
    for _ in range(_MOST):
        pos = text.find(word, pos + 1)
        if pos < 0:
            break
        end = pos + len(word)
        is_begun = _is_of_word(word[0]) and _is_of_word(text[pos - 1 : pos])
        is_going_on = _is_of_word(word[-1]) and _is_of_word(text[end : end + 1])
        if not is_begun and not is_going_on:
            return True
    return False


def _is_of_word(character: str) -> bool:
    return character.isalnum() or character in ("_", "$")


def _shortened(text: str) -> str:
    text = _CONTROL.sub(" ", text)
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "\u2026"
