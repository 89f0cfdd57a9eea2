"""What explains a pool, as the console sees it: the recorder's, by its shape.

Pure.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

from sidecar.work import Holder, Statement


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
