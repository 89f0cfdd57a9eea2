"""What a sidecar answered, read without trust: nothing in it can break the reader or the terminal.

Pure. A field that is missing or of another type is empty, so an older or newer sidecar can be asked.
Texts come from clients (an ``application_name`` may be any bytes): what is no printable character is
replaced, escape sequences included.
"""

from collections.abc import Iterator, Mapping
from math import isfinite, nan
from typing import Final

_LONGEST: Final = 10_000
"""Characters of one text, at most."""


class Entry:
    """One object of an answer."""

    __slots__ = ("_fields",)

    def __init__(self, value: object = None) -> None:
        self._fields: Final[Mapping[object, object]] = value if isinstance(value, Mapping) else {}

    def __bool__(self) -> bool:
        return bool(self._fields)

    @property
    def value(self) -> Mapping[object, object]:
        """As it came."""
        return self._fields

    def text(self, name: str) -> str:
        value = self._fields.get(name)
        return printable(value) if isinstance(value, str) else ""

    def number(self, name: str) -> float:
        """NaN where there is none."""
        value = self._fields.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            return nan
        try:
            number = float(value)
        except OverflowError:
            return nan
        return number if isfinite(number) else nan

    def whole(self, name: str) -> int:
        """0 where there is none."""
        number = self.number(name)
        return int(number) if isfinite(number) else 0

    def flag(self, name: str) -> bool:
        return self._fields.get(name) is True

    def entry(self, name: str) -> "Entry":
        return Entry(self._fields.get(name))

    def entries(self, name: str) -> "list[Entry]":
        return [Entry(value) for value in self._list(name)]

    def texts(self, name: str) -> list[str]:
        return [printable(value) for value in self._list(name) if isinstance(value, str)]

    def _list(self, name: str) -> Iterator[object]:
        value = self._fields.get(name)
        yield from value if isinstance(value, list) else ()


def printable(text: str) -> str:
    """In one line, and nothing in it moves the cursor or turns the writing around."""
    if text.isprintable() and len(text) <= _LONGEST:
        return text
    return "".join(
        each if each.isprintable() else " " if each.isspace() else "\N{REPLACEMENT CHARACTER}"
        for each in text[:_LONGEST]
    )
