"""The parameters of a request to the API, checked: whatever is not documented is refused.

Pure.
"""

import re
from collections.abc import Collection, Iterable, Sequence
from typing import Final

from sidecar.api.problems import Problem, Refused, bad_parameter

DEFAULT_LIMIT: Final = 100
MOST: Final = 1000
"""Items of one page."""
FARTHEST: Final = 1_000_000
"""The largest offset: no list is longer."""

PAGE: Final = ("limit", "offset")


class Parameters:
    """The query of one request; ``known`` are the names that this path has."""

    def __init__(self, given: Iterable[tuple[str, str]], known: Sequence[str]) -> None:
        self._given: Final[dict[str, str]] = {}
        for name, value in given:
            if name not in known:
                allowed = f"a parameter of this path: {', '.join(known)}" if known else ""
                raise Refused(
                    Problem(
                        400,
                        "the path has no such parameter",
                        name[:MOST],
                        value,
                        allowed or "no parameter",
                    )
                )
            if name in self._given:
                raise Refused(Problem(400, f"{name} is given twice", name, value, "given once"))
            self._given[name] = value

    def text(self, name: str) -> str | None:
        return self._given.get(name)

    def number(self, name: str, default: int, least: int, most: int) -> int:
        value = self._given.get(name)
        if value is None:
            return default
        if not re.fullmatch("[0-9]{1,9}", value) or not least <= int(value) <= most:
            raise bad_parameter(name, value, f"a whole number of {least} to {most}")
        return int(value)

    def one_of(self, name: str, words: Collection[str], default: str) -> str:
        value = self._given.get(name, default)
        if value not in words and name in self._given:
            raise bad_parameter(name, value, f"one of {', '.join(words)}")
        return value

    @property
    def limit(self) -> int:
        return self.number("limit", DEFAULT_LIMIT, 1, MOST)

    @property
    def offset(self) -> int:
        return self.number("offset", 0, 0, FARTHEST)

    def next_page(self, total: int) -> dict[str, str] | None:
        """The parameters of the page after this one, if there is one."""
        offset = self.offset + self.limit
        if offset >= total or offset > FARTHEST:
            return None
        return {**self._given, "limit": str(self.limit), "offset": str(offset)}
