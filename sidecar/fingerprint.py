"""Which statement a text is: its normal form, and a fingerprint of that.

Pure. Two texts are one statement if they differ in literals, spacing, comments, upper and lower case,
or in how long an IN list or a list of VALUES is. The text that is shown never has a literal: it is
made here, token by token, also where PostgreSQL's parser told what the statement is. Where a server
may see the end of a literal elsewhere than we do, what follows is left out.
"""

import re
from hashlib import blake2b
from typing import Final

from sidecar import grammar

LONGEST: Final = 8 * 1024
"""Bytes that are looked at; what follows does not count."""

_LONGEST_SHOWN: Final = 2 * 1024
"""Characters."""

# Tokens as PostgreSQL's scan.l has them. Possessive: a client chooses the text, nothing may backtrack.
# Older servers end a number before a letter: here it goes on, which hides more.
_tokens = re.compile(
    rb"""(?P<space> \s++ )
    | (?P<comment> --[^\n\r]*+
        | /\*(?: [^/*]++ | /(?!\*) | \*(?!/)
              | /\*(?: [^/*]++ | /(?!\*) | \*(?!/) )*+(?:\*/|\Z) )*+(?:\*/|\Z) )
    | (?P<escaped> [Ee]'(?: [^'\\]++ | '' | \\. )*+(?:'|\Z) )
    | (?P<string> (?:[BbNnXx]|[Uu]&)?+'(?: [^']++ | '' )*+(?:'|\Z) )
    | (?P<dollar> \$(?P<tag>(?:[A-Za-z_\x80-\xff][A-Za-z0-9_\x80-\xff]*+)?)\$ .*?(?:\$(?P=tag)\$|\Z) )
    | (?P<param> \$[0-9]++ )
    | (?P<name> (?:[Uu]&)?+"(?: [^"]++ | "" )*+(?:"|\Z) )
    | (?P<word> [A-Za-z_\x80-\xff][A-Za-z0-9_$\x80-\xff]*+ )
    | (?P<number> \.?[0-9](?: [Ee][+-](?=[0-9]) | [0-9A-Za-z_.\x80-\xff] )*+ )
    | (?P<operator> (?: (?!--|/\*)[+\-*/<>=~!@#%^&|`?] )++ )
    | (?P<other> . )
    """,
    re.DOTALL | re.VERBOSE,
).finditer

_LITERAL: Final = b"0"
"""In keys. No token of another kind looks like it."""

_AFTER_SIGN: Final = frozenset(
    (b"(", b",", b"[", b"=", b"<", b">", b"<=", b">=", b"<>", b"!=", b"+", b"-", b"*", b"/")
)
_CONSTANTS: Final = frozenset((b"null", b"true", b"false"))


class Form:
    """What a text comes down to."""

    __slots__ = ("_blank", "_shown", "_spaced", "is_clean", "is_whole", "key")

    def __init__(
        self,
        key: bytes,
        shown: list[bytes],
        blank: list[bytes],
        spaced: list[bool],
        is_whole: bool,
        is_clean: bool,
    ) -> None:
        self.key: Final = key
        """The same for all spellings."""
        self.is_whole: Final = is_whole
        """All of it is in the key."""
        self.is_clean: Final = is_clean
        """And whatever is put behind it does not become part of a literal, comment or name."""
        self._shown: Final = shown
        self._blank: Final = blank
        self._spaced: Final = spaced

    def fingerprint(self) -> str:
        """16 hexadecimal digits: PostgreSQL's own, or ours of what is none of its."""
        if self.is_whole and len(self._blank) <= grammar.MOST_TOKENS:
            text = _joined(self._blank, self._spaced)
            if len(text) <= grammar.LONGEST and b"\0" not in text:
                try:
                    found = grammar.fingerprint(text.decode())
                except UnicodeDecodeError:
                    found = ""
                if found:
                    return found
        return blake2b(self.key, digest_size=8).hexdigest()

    def text(self) -> str:
        """To be shown; as in pg_stat_statements, with $1 for each literal."""
        taken = 0
        for token in self._shown:
            if token.startswith(b"$") and token[1:].isdigit():
                taken = max(taken, int(token[1:]))
        pieces: list[bytes] = []
        for token in self._shown:
            if token == _LITERAL:
                taken += 1
                token = b"$%d" % taken
            elif token == _MORE:
                token = b" /*, ... */"
            pieces.append(token)
        text = _joined(pieces, self._spaced).decode("utf-8", "replace").replace("\0", "")
        is_cut = len(text) > _LONGEST_SHOWN
        if is_cut:
            text = text[:_LONGEST_SHOWN]
        return f"{text} ..." if is_cut or not self.is_whole else text


_MORE: Final = b"\0more"
"""Among what is shown: here the rest of a list was."""


def normalise(text: bytes, longest: int = LONGEST) -> Form:
    """The form of a text, by its first ``longest`` bytes."""
    words: list[bytes] = []
    shown: list[bytes] = []
    blank: list[bytes] = []
    spaced: list[bool] = []
    is_spaced = False
    is_clean = is_whole = len(text) <= longest
    part = text if is_whole else text[:longest]
    size = len(part)
    for match in _tokens(part):
        kind = match.lastgroup
        token = match[0]
        if kind == "tag":
            kind = "dollar"
        if kind == "space":
            is_spaced = True
            continue
        if kind == "comment":
            is_spaced = True
            if match.end() == size:
                is_clean = (
                    is_clean and token.startswith(b"/*") and token.find(b"*/", 2) == len(token) - 2
                )
            continue
        if kind == "word":
            words.append(token.lower())
            shown.append(token)
            blank.append(token)
        elif kind == "number":
            words.append(_LITERAL)
            shown.append(_LITERAL)
            blank.append(b"1")
        elif kind == "param" and len(token) <= 6:
            words.append(_LITERAL)
            shown.append(token)
            blank.append(token)
        elif kind == "operator" or kind == "other":
            if token == b"\\" or token < b" " or part.startswith(b"/*", match.start()):
                is_whole = is_clean = False
                break
            words.append(token)
            shown.append(token)
            blank.append(token)
        elif kind == "name":
            if len(token) < 2 or not token.endswith(b'"') or token.count(b'"') & 1:
                is_whole = is_clean = False
                break
            words.append(token)
            shown.append(token)
            blank.append(token)
        else:
            words.append(_LITERAL)
            shown.append(_LITERAL)
            blank.append(b"$0" if kind == "param" else b"''")
            if _is_ambiguous(kind, part, match.start(), token):
                spaced.append(is_spaced)
                is_whole = is_clean = False
                break
            if match.end() == size:
                is_clean = is_clean and _has_end(kind, token)
        spaced.append(is_spaced)
        is_spaced = False
    while words and words[-1] == b";":
        words.pop()
    del shown[len(words) :], blank[len(words) :], spaced[len(words) :]
    if b"set" in words:
        _hide_settings(words, shown, blank)
    _shorten(words, shown, blank, spaced)
    return Form(
        b" ".join([word for word in words if word]), shown, blank, spaced, is_whole, is_clean
    )


def spans_of(text: bytes) -> tuple[tuple[int, int], ...] | None:
    """Where the *code* of a clean text has digits that belong to names; None: quotes do not tell.

    The code is what is left when the text is cut at each ' and every second piece is taken, with a '
    between them. What it says of one text, it says of all with the same code but for other digits
    outside these spans: each piece begins where a literal ends, so that it is read in the same way.
    There is one span between two numbers at most.
    """
    spans: list[tuple[int, int]] = []
    is_open = False  # the last span may be made longer
    at = 0  # in the code
    for match in _tokens(text):
        kind = match.lastgroup
        token = match[0]
        size = len(token)
        if kind == "string" or kind == "escaped":
            if kind == "escaped" and b"\\" in token:
                return None
            quotes = token.count(b"'")
            at += token.find(b"'") + quotes // 2
            continue
        if kind == "dollar" or kind == "tag":
            return None
        if kind == "word" or kind == "name":
            if b"'" in token:
                return None
            if _has_digit(token):
                if is_open:
                    spans[-1] = spans[-1][0], at + size
                else:
                    spans.append((at, at + size))
                is_open = True
        elif kind == "comment":
            if b"'" in token:
                return None
            is_open = False
        elif kind == "number" or kind == "param":
            is_open = False
        at += size
    return tuple(spans)


def squeeze(code: bytes) -> bytes | None:
    """The *code* of a long text in short: a number for every literal in a list, and of lists and rows
    of VALUES what comes first. None: that is not how it can be told.

    For clean texts; in C throughout, 10 us for each KiB: a thousand rows would take 20 ms to normalise.
    """
    short = _number.sub(b"0", code.replace(b"''", b"'"))
    for value in (b"-0", b"'", b"NULL", b"null", b"true", b"false"):
        if value in short:
            for before in (b"(", b",", b", "):
                short = short.replace(before + value, before + b"0")
    short = _equal_rows.sub(rb"\1", short)
    return None if _number_in_name(short) else _in_list.sub(rb"\1(0)", short)


_number = re.compile(rb"(?<![A-Za-z0-9_$.\x80-\xff])[0-9][0-9.]*+")
# A row has no quotes and begins no comment: after many of them, a text is read as after one.
_equal_rows = re.compile(rb"(\([^()\"$/]*+\))(?:\s*+,\s*+\1)++")
_in_list = re.compile(rb"\b([Ii][Nn] ?)\(0(?:, ?0)++\)")
_number_in_name = re.compile(rb'"[^"]*[^"A-Za-z0-9_$.\x80-\xff][0-9][^"]*"').search

_has_digit = re.compile(rb"[0-9]").search


def fingerprint(text: str) -> str:
    """16 hexadecimal digits, of what is no SQL."""
    return blake2b(text.encode(), digest_size=8).hexdigest()


def _joined(tokens: list[bytes], spaced: list[bool]) -> bytes:
    pieces: list[bytes] = []
    for i in range(len(tokens)):
        if spaced[i] and tokens[i] and pieces:
            pieces.append(b" ")
        pieces.append(tokens[i])
    return b"".join(pieces)


def _has_end(kind: str | None, token: bytes) -> bool:
    """Whether a literal at the end of a text is complete."""
    if kind == "dollar":
        tag = token[: token.find(b"$", 1) + 1]
        return len(token) >= 2 * len(tag) and token.endswith(tag)
    if kind == "param":
        return True
    body = token[token.find(b"'") + 1 :]
    if kind == "escaped":
        body = _escape.sub(b"", body)
    return body.count(b"'") % 2 == 1


_escape = re.compile(rb"\\.", re.DOTALL)
_escape_in_character = re.compile(rb"[\x80-\xff]\\").search


def _is_ambiguous(kind: str | None, text: bytes, start: int, token: bytes) -> bool:
    """Whether this literal may have another end for a server.

    A backslash escapes a quote or not: that depends on standard_conforming_strings, and on the
    encoding, where it may be the second byte of a character. So may what we see as the character
    before E'' and $$, which are then part of a word.
    """
    if kind == "string":
        return b"\\'" in token
    if kind == "escaped":
        if b"\\" not in token:
            return False
        if _escape_in_character(token):
            return True
    if kind == "dollar" and start and text[start - 1 : start].isalnum():
        return True  # 1x$$: a number and a word, for old servers
    return start > 1 and text[start - 2] >= 0x80 and 0x30 <= text[start - 1] < 0x80


def _hide_settings(words: list[bytes], shown: list[bytes], blank: list[bytes]) -> None:
    """SET name TO value: the value is a literal, with quotes or without."""
    first = True  # the next word begins a statement
    may_set = is_set = is_value = False
    for i in range(len(words)):
        word = words[i]
        if word == b";":
            first = True
            may_set = is_set = is_value = False
        elif first:
            first = False
            may_set = word == b"alter" or word == b"set"
            is_set = word == b"set"
        elif word == b"alter" or not may_set:
            pass
        elif word == b"set":
            is_set = True
        elif is_set and not is_value:
            is_value = word == b"to" or word == b"="
        elif is_value and word not in (_LITERAL, b",", b"default") and _is_value(word):
            words[i] = shown[i] = _LITERAL
            blank[i] = b"''"


def _is_value(word: bytes) -> bool:
    return word[:1].isalpha() or word[:1] in (b'"', b"_") or word[0] >= 0x80


def _shorten(
    words: list[bytes], shown: list[bytes], blank: list[bytes], spaced: list[bool]
) -> None:
    """Empty the tokens that say nothing: signs of literals, all but the first of a list."""
    size = len(words)
    for i in range(1, size - 1):
        word = words[i]
        if (
            (word == b"-" or word == b"+")
            and words[i + 1] == _LITERAL
            and words[i - 1] in _AFTER_SIGN
        ):
            words[i] = shown[i] = blank[i] = b""
            spaced[i + 1] = spaced[i + 1] or spaced[i]
    for i in range(size - 1):
        word = words[i]
        if word == b"in" and words[i + 1] == b"(":
            _shorten_list(words, shown, blank, i + 2)
        elif word == b"values" and words[i + 1] == b"(":
            _shorten_rows(words, shown, blank, i + 1)


def _shorten_list(words: list[bytes], shown: list[bytes], blank: list[bytes], start: int) -> None:
    """Of literals only, after IN."""
    size = len(words)
    end = start
    while end < size and words[end] in (_LITERAL, b",", b""):
        end += 1
    if end < size and words[end] != b")":
        return
    first = start
    while first < end and words[first] != _LITERAL:
        first += 1
    if end - first < 2:
        return
    for i in range(first + 1, end):
        words[i] = shown[i] = blank[i] = b""
    shown[first + 1] = _MORE


def _shorten_rows(words: list[bytes], shown: list[bytes], blank: list[bytes], start: int) -> None:
    """Rows that are like the one before."""
    size = len(words)
    row: list[bytes] = []
    is_long = False
    pos = start
    while pos < size and words[pos] == b"(":
        end = pos
        depth = 0
        while end < size:
            word = words[end]
            if word == b"(":
                depth += 1
            elif word == b")":
                depth -= 1
                if depth == 0:
                    break
            elif word in _CONSTANTS and words[end - 1] in (b"(", b",") and depth == 1:
                words[end] = shown[end] = _LITERAL
                blank[end] = b"1"
            end += 1
        this = [word for word in words[pos : end + 1] if word]
        is_cut = end == size and len(this) < len(row)
        if this == row or (is_cut and row[: len(this)] == this):
            for i in range(pos - 1, min(end + 1, size)):  # with the comma before
                words[i] = shown[i] = blank[i] = b""
            shown[pos - 1] = b"" if is_long else _MORE
            is_long = True
        else:
            row = this
            is_long = False
        pos = end + 1
        if pos + 1 >= size or words[pos] != b",":
            break
        pos += 1
