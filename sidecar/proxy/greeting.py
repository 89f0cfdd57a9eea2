"""A client's first server connection, while it is still in login.

In session mode the client keeps it: it is told its backend's pid. In the other modes one is needed only
if the client brings settings that no server has accepted yet: they take effect, or end the login,
as they would on a connection of its own. Awaited by ``session``; runs no task of its own.
"""

import asyncio
from typing import Final

from sidecar.errors import (
    ServerConnectionLost,
    ServerProtocolError,
    SidecarError,
)
from sidecar.events import CloseReason
from sidecar.pool.pool import Pool
from sidecar.pool.server import ServerConnection, clock
from sidecar.protocol import messages as m
from sidecar.proxy.carrier import Carrier
from sidecar.proxy.scrub import message_of
from sidecar.work import Who


class Greeting:
    """A ``Waiter`` of the pool, then the ``Receiver`` of its connection. Use once:

    ``take``, then ``settle``, then the connection is the caller's to keep or to give back. ``give_up``
    ends whatever is under way.
    """

    def __init__(self, pool: Pool, carrier: Carrier, who: Who, acquire_timeout: float) -> None:
        """``who``: for people who ask what holds the pool. ``acquire_timeout`` in seconds."""
        self._pool: Final = pool
        self._carrier: Final = carrier
        self._who: Final = who
        self._step: asyncio.Future[None] | None = None
        self._held = b""
        self.acquire_timeout: Final = acquire_timeout
        self.deadline = 0.0
        self.waiting_since = 0.0
        self.server: ServerConnection | None = None

    async def take(self) -> ServerConnection:
        """Wait for a connection. Raises what the pool refuses with, EOFError if given up."""
        self.server = self._pool.acquire(self, clock())
        if self.server is None:
            self._step = asyncio.get_running_loop().create_future()
            await self._step
        server = self.server
        if server is None:  # given up meanwhile
            raise EOFError("the client is gone")
        server.receiver = self
        return server

    async def settle(self, server: ServerConnection) -> bytes:
        """Make the connection this client's. Returns what the server has said after that.

        Raises SidecarError with the server's own words where it refuses a setting.
        """
        carrier = self._carrier
        carrier.set_up(server)
        if carrier.is_setting:
            self._step = asyncio.get_running_loop().create_future()
            await self._step
        carrier.take_news()  # the client has not been told anything yet
        if carrier.error is not None:
            fields = m.error_fields(carrier.error)
            raise SidecarError(
                fields.get("M", "a startup parameter was refused"),
                detail=fields.get("D", ""),
                hint=fields.get("H", ""),
                sqlstate=m.sqlstate_of(carrier.error),
                logged=message_of(carrier.error, None),
            )
        held, self._held = self._held, b""
        return held

    def give_up(self) -> None:
        """The login fails: give back what it has, or do not wait any more. May be called again."""
        now = clock()
        self._pool.abandon(self, now)
        server, self.server = self.server, None
        if server is not None and server.receiver in (None, self):
            server.receiver = None
            if self._carrier.is_setting or self._held:
                self._pool.discard(server, CloseReason.CLIENT_LOST, now)
            else:
                self._pool.release(server, now)
        self._end(None)

    def _end(self, error: SidecarError | None) -> None:
        step, self._step = self._step, None
        if step is None or step.done():
            return
        if error is None:
            step.set_result(None)
        else:
            step.set_exception(error)

    # -- Waiter --------------------------------------------------------------------------------

    def granted(self, server: ServerConnection, now: float) -> None:
        self.server = server
        server.receiver = self
        self._end(None)

    def refused(self, error: SidecarError) -> None:
        self._end(error)

    # -- Receiver --------------------------------------------------------------------------------

    def server_data(self, data: bytes) -> None:
        server = self.server
        assert server is not None
        data = self._held + data
        try:
            pos = self._carrier.take_reply(server, data)
        except ServerProtocolError as exc:
            self.server = None
            self._pool.discard(server, CloseReason.PROTOCOL_ERROR, clock())
            self._end(exc)
            return
        self._held = data[pos:]
        if not self._carrier.is_setting:
            self._end(None)

    def server_lost(self) -> None:
        self.server = None
        self._end(
            ServerConnectionLost("the server closed the connection unexpectedly during the login")
        )

    def server_writable(self, is_writable: bool) -> None:
        pass  # a SET is a few bytes

    def describe(self, now: float) -> str:
        return f'user "{self._who.user}", {self._who.address}, in login'

    def who(self) -> Who:
        return self._who
