"""Which statement a text is: its normal form, and a fingerprint of that.

Pure. Two texts are one statement if they differ in literals, spacing, comments, upper and lower case
of keywords, or the length of an IN list. The normal form never has a literal.
"""

import re
from hashlib import blake2b
from typing import Final

_LONGEST: Final = 64 * 1024  # bytes that are looked at

_TOKENS = re.compile(
    rb"""(?P<comment> --[^\n\r]*+ | /\*(?: [^*]++ | \*(?!/) )*+(?:\*/|\Z) )
    | (?P<text> [Ee]'(?: [^'\\]++ | '' | \\. )*+(?:'|\Z) | '(?: [^']++ | '' )*+(?:'|\Z)
        | \$(?P<tag>(?:[A-Za-z_\x80-\xff][A-Za-z0-9_\x80-\xff]*+)?)\$ .*?(?:\$(?P=tag)\$|\Z) )
    | (?P<name> "(?: [^"]++ | "" )*+(?:"|\Z) )
    | (?P<number> (?<![A-Za-z0-9_$\x80-\xff]) [0-9][0-9A-Za-z_.]*+ )
    """,
    re.DOTALL | re.VERBOSE,
)
_LISTS = re.compile(rb"\(\s*\?(?:\s*,\s*\?)+\s*\)")


def normalise(text: bytes) -> str:
    """The normal form."""
    bare = _TOKENS.sub(_without_literal, text[:_LONGEST])
    words = b" ".join(bare.split()).rstrip(b"; ")
    return _LISTS.sub(b"(?)", words).decode("utf-8", "replace")


def fingerprint(normal: str) -> str:
    """16 hexadecimal digits."""
    return blake2b(normal.lower().encode(), digest_size=8).hexdigest()


def _without_literal(match: re.Match[bytes]) -> bytes:
    if match["comment"] is not None:
        return b" "
    return match[0] if match["name"] is not None else b"?"
