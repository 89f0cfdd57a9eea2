"""What explains a pool, as the console sees it: the recorder's, by its shape.

Pure.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

from sidecar.work import Holder, SlowQuery, Statement


class Failures(Protocol):
    """Failures that have all of this in common. Instants are those of the sidecar's clock."""

    @property
    def origin(self) -> str: ...
    @property
    def sqlstate(self) -> str: ...
    @property
    def application(self) -> str: ...
    @property
    def statement(self) -> Statement | None: ...
    @property
    def first_at(self) -> float: ...
    @property
    def last_at(self) -> float: ...
    @property
    def message(self) -> str: ...
    @property
    def count(self) -> int: ...


class FailureList(Protocol):
    def entries(self) -> Sequence[Failures]:
        """Those seen last come first."""


class Accounts(Protocol):
    @property
    def waited(self) -> float:
        """Seconds, by all clients together."""

    def by_application(self) -> Mapping[str, float]:
        """Seconds charged."""


class Statements(Protocol):
    def ranked(self, sort: str, limit: int) -> Sequence[Statement]:
        """Most first."""

    def quantiles(self, statement: Statement, now: float) -> tuple[Sequence[float], int]:
        """P50, P90 and P99 of the last minutes (seconds), and of how many calls; NaN if of none."""


class Verdict(Protocol):
    """What is wrong with a pool, in words."""

    @property
    def kind(self) -> str: ...
    @property
    def headline(self) -> str: ...
    @property
    def evidence(self) -> Sequence[str]: ...
    @property
    def next_steps(self) -> Sequence[str]: ...


class Incident(Protocol):
    @property
    def id(self) -> str: ...
    @property
    def pool(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def began_at(self) -> float:
        """Unix time."""

    @property
    def ended_at(self) -> float | None:
        """None while it lasts."""

    @property
    def verdict(self) -> Verdict: ...


class Insight(Protocol):
    """One pool."""

    @property
    def name(self) -> str: ...
    @property
    def failures(self) -> FailureList: ...
    @property
    def leaks(self) -> Mapping[int, Holder]:
        """While they last, by the id of the server connection."""

    @property
    def blame(self) -> Accounts: ...
    @property
    def statements(self) -> Statements: ...
    @property
    def slow_queries(self) -> Sequence[tuple[float, SlowQuery]]:
        """The last ones, each with the instant at which it was seen; latest last."""

    def verdict(self, now: float) -> Verdict: ...
