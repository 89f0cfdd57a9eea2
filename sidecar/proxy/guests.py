"""Clients of the console, as the proxy sees them: they log in like any other, and have no pool.

Only shapes: what such a client is told is decided in ``sidecar.console``, which ``service`` brings
along, since the proxy does not know it.
"""

import asyncio
from typing import Any, Protocol


class Guest(Protocol):
    """One connection to the console; an ``asyncio.Protocol`` by shape besides."""

    pid: int
    secret: bytes
    id: int
    opened_at: float

    def greeting(self) -> bytes:
        """What a client is told between AuthenticationOk and BackendKeyData."""

    def connection_made(self, transport: Any) -> None: ...

    def data_received(self, data: bytes) -> None: ...

    def cancel(self) -> asyncio.Future[None] | None:
        """The client's cancel request; nobody else has to be asked."""

    def shut_down(self) -> None:
        """The sidecar drains."""

    def end(self, text: str = ...) -> None:
        """Tell the client why, and close."""


class Registry(Protocol):
    """Who keeps the guests."""

    def gone(self, guest: Guest) -> None: ...


class Console(Protocol):
    def is_meant(self, database: str) -> bool:
        """Whether this database is the console."""

    def receive(self, user: str, database: str, application: str, registry: Registry) -> Guest:
        """Raises SidecarError (28000) if this user may not use it."""


class NoConsole:
    """For a listener without one."""

    def is_meant(self, database: str) -> bool:
        return False

    def receive(self, user: str, database: str, application: str, registry: Registry) -> Guest:
        raise AssertionError("nobody was sent here")
