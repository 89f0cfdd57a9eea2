"""Listens for HTTP, and limits how many clients are connected and for how long.

Runs no task of its own: aiohttp has one for each connection, all gone when ``stop`` returns.
"""

import asyncio
import logging
from collections.abc import Callable
from typing import cast

from aiohttp import web

from sidecar.api.answers import View
from sidecar.api.app import build_app
from sidecar.api.v1 import ApiV1
from sidecar.config import HttpConfig
from sidecar.events import ClientOutcome, Listener
from sidecar.observe.metrics import MetricsText
from sidecar.observe.recorder import Recorder

KEEPALIVE = 75.0
"""Seconds a connection may be idle, or take for a request's head: longer than the usual scrape
intervals of 15 to 60 s, so that Prometheus keeps its connection. aiohttp cuts off a first request
that takes longer since 3.14.4."""
LINGERING = 2.0
"""Seconds for a request's body that nobody reads."""
STOP_TIMEOUT = 2.0
"""Seconds for requests that run when the server stops."""
BACKLOG = 128

_BUSY = (
    b"HTTP/1.1 503 Service Unavailable\r\n"
    b"Content-Type: text/plain\r\nContent-Length: 21\r\nConnection: close\r\n\r\n"
    b"too many connections\n"
)

log = logging.getLogger(__name__)
access_log = logging.getLogger("sidecar.api.access")


class HttpServer:
    """The HTTP service on its address."""

    def __init__(
        self,
        config: HttpConfig,
        metrics: MetricsText,
        readiness: Callable[[], list[str]],
        recorder: Recorder,
        view: View,
    ) -> None:
        self._config = config
        self._recorder = recorder
        token = "" if config.token is None else config.token.get_secret_value()
        self._v1 = ApiV1(view, recorder, token)
        self._runner = web.AppRunner(
            build_app(metrics, readiness, recorder, self._v1),
            access_log=access_log if config.access_log else None,
            keepalive_timeout=KEEPALIVE,
            lingering_time=LINGERING,
            logger=_ProtocolLog(log),
            shutdown_timeout=STOP_TIMEOUT,
        )
        self._listener: asyncio.Server | None = None

    async def start(self) -> None:
        """Listen; raises OSError where the address is taken or unknown."""
        await self._runner.setup()
        loop = asyncio.get_running_loop()
        self._listener = await loop.create_server(
            lambda: _Door(self), self._config.host, self._config.port, backlog=BACKLOG
        )

    def tick(self) -> None:
        """Tell those who listen what has happened; every 100 ms."""
        self._v1.streams.tick()

    def drain(self) -> None:
        """End the streams of events, and begin no more."""
        self._v1.streams.close()

    async def stop(self) -> None:
        """Stop listening, give running requests a moment, close all connections."""
        self.drain()
        if self._listener is not None:
            self._listener.close()
        await self._runner.cleanup()

    @property
    def address(self) -> tuple[str, int]:
        """The host and port it listens on; the port is the real one where 0 was asked for."""
        assert self._listener is not None, "not started"
        host, port, *_ = self._listener.sockets[0].getsockname()
        return host, port

    @property
    def connections(self) -> int:
        """HTTP connections open now."""
        server = self._runner.server
        return 0 if server is None else len(server.connections)

    def admit(self, transport: asyncio.Transport) -> None:
        """Hand a new connection to aiohttp, or close it where there are too many."""
        server = self._runner.server
        assert server is not None, "listens after setup only"
        if self.connections >= self._config.max_connections:
            self._recorder.client_ended(Listener.HTTP, ClientOutcome.REJECTED)
            transport.write(_BUSY)
            transport.close()
            return
        self._recorder.client_ended(Listener.HTTP, ClientOutcome.ACCEPTED)
        protocol = server()
        transport.set_protocol(protocol)
        protocol.connection_made(transport)


class _Door(asyncio.Protocol):
    """A connection that was accepted by the kernel, and not by us yet."""

    def __init__(self, server: HttpServer) -> None:
        self._server = server

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._server.admit(cast(asyncio.Transport, transport))  # uvloop's is one by its interface


class _ProtocolLog(logging.LoggerAdapter[logging.Logger]):
    """aiohttp logs what is not HTTP as errors, with a traceback: anybody could fill the log.

    Errors of our own handlers do not come here, ``app`` logs them.
    """

    def exception(self, msg: object, *args: object, **kwargs: object) -> None:
        self.debug(f"{msg}: %r", *args, kwargs.get("exc_info"))
