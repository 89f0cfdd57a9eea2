"""What ``pgsidecar top`` knows and what it has been told to show: its state between two frames.

Pure: time is an argument. ``frame`` draws it, ``top`` feeds it.
"""

from dataclasses import dataclass, field
from enum import IntEnum
from math import isnan, nan
from typing import Final

from sidecar.ask.answers import Entry

SORTS: Final = {
    "seconds": "total time",
    "calls": "calls",
    "mean": "mean time",
    "p99": "P99",
    "longest": "longest",
    "rows": "rows",
    "errors": "errors",
    "blamed": "blamed wait",
}
"""The orders of statements that the API offers, in words."""

ROWS: Final = 100
"""Rows asked for of the list that is shown alone: what it can be scrolled through."""
FEW: Final = 30
"""So of the others: a statement with its quantiles costs the sidecar up to 0.1 ms."""


class Pane(IntEnum):
    ALL = 0
    WHY = 1
    WAITERS = 2
    HOLDERS = 3
    STATEMENTS = 4
    INCIDENTS = 5


@dataclass(frozen=True, slots=True)
class Look:
    """All answers of one moment."""

    at: float
    pools: list[Entry] = field(default_factory=list)
    details: dict[str, Entry] = field(default_factory=dict)
    verdicts: list[tuple[str, Entry]] = field(default_factory=list)
    lists: dict[Pane, Entry] = field(default_factory=dict)
    """Pages of waits, holders, statements and incidents."""

    def items(self, pane: Pane) -> list[Entry]:
        return self.lists.get(pane, Entry()).entries("items")

    def total(self, pane: Pane) -> int:
        """On all pages."""
        return self.lists.get(pane, Entry()).whole("total")

    @property
    def names(self) -> list[str]:
        return [pool.text("name") for pool in self.pools]


class Board:
    def __init__(self, url: str) -> None:
        self.url: Final = url
        self.look = Look(0.0)
        self.pane = Pane.ALL
        self.pool = ""  # of which the lists are; empty: of all
        self.sort = "seconds"
        self.skipped = 0  # rows scrolled away
        self.is_helping = False
        self.is_over = False
        self.missed = ""  # why the last question was not answered; empty if it was
        self.silent = 0.0  # seconds since the last answer, then
        self._before: Look | None = None

    def take(self, look: Look) -> None:
        self._before = self.look if self.look.pools else None
        self.look = look
        self.missed = ""
        if self.pool not in look.names:
            self.pool = ""

    def miss(self, why: str, now: float) -> None:
        """The sidecar did not answer: what was there last goes on being shown."""
        self.missed = why
        self.silent = max(0.0, now - self.look.at)

    def rate(self, pool: str, total: str) -> float:
        """How much this total of a pool grows in a second; NaN if that is not known."""
        if self._before is None:
            return nan
        took = self.look.at - self._before.at
        now, before = (
            look.details.get(pool, Entry()).entry("totals").number(total)
            for look in (self.look, self._before)
        )
        if took <= 0.0 or isnan(now) or isnan(before) or now < before:
            return nan  # less than before: another process answers
        return (now - before) / took

    def press(self, key: str) -> bool:
        """Do what this key is for. True: other answers are needed than there are."""
        if self.is_helping and key != "q":
            self.is_helping = False
            return False
        match key:
            case "q":
                self.is_over = True
            case "?" | "h":
                self.is_helping = True
            case "p":
                self.pool = _next(["", *self.look.names], self.pool)
                self.skipped = 0
                return True
            case "s":
                self.sort = _next(list(SORTS), self.sort)
                self.skipped = 0
                return True
            case "0" | "1" | "2" | "3" | "4" | "5":
                return self._turn_to(Pane(int(key)))
            case "tab" | "right":
                return self._turn_to(Pane((self.pane + 1) % len(Pane)))
            case "backtab" | "left":
                return self._turn_to(Pane((self.pane - 1) % len(Pane)))
            case "escape":
                return self._turn_to(Pane.ALL)
            case "down":
                most = max(0, len(self.look.items(self.pane)) - 1)
                self.skipped = min(self.skipped + 1, most)
            case "up":
                self.skipped = max(0, self.skipped - 1)
        return False

    def rows(self, pane: Pane) -> int:
        """How many to ask for."""
        return ROWS if pane is self.pane else FEW

    def _turn_to(self, pane: Pane) -> bool:
        """True: more rows are needed than there are."""
        self.pane = pane
        self.skipped = 0
        return self.look.total(pane) > len(self.look.items(pane))


def _next(names: list[str], current: str) -> str:
    return names[(names.index(current) + 1) % len(names)] if current in names else names[0]
