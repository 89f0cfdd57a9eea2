"""A socket to a server until a pool has it: connect, upgrade to TLS, read message by message.

Owns the socket's options and the order in which plain and encrypted bytes may come. What is said
over it is for ``pool.login`` to know; afterwards it is handed over to a ``ServerConnection``.
"""

import asyncio
import socket
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from sidecar.errors import ServerProtocolError, ServerUnavailable, TlsFailed
from sidecar.events import Traffic
from sidecar.pool import tls
from sidecar.protocol import messages as m
from sidecar.protocol.startup import SSL_REQUEST
from sidecar.target import Host, TlsPolicy

MAX_LOGIN_MESSAGE: Final = 64 * 1024
"""Bytes; nothing a server says during a login is longer."""

_MAX_UNREAD: Final = 4 * MAX_LOGIN_MESSAGE  # bytes that may have come before we look at them

_SOCKET_OPTIONS = {
    "keepalives_idle": "TCP_KEEPIDLE",
    "keepalives_interval": "TCP_KEEPINTVL",
    "keepalives_count": "TCP_KEEPCNT",
    "tcp_user_timeout": "TCP_USER_TIMEOUT",  # ms, as in the connection string
}
"""Keys of connection strings, and the system's names. Not every system has them all."""


@dataclass(frozen=True, slots=True)
class Address:
    """One address of a host: where a connection leads to, so that a cancel request follows it."""

    host: Host
    family: int
    sockaddr: Any  # as getaddrinfo has it; a path for a Unix socket


async def resolve(host: Host) -> list[Address]:
    """The addresses of a host, in the order to try them; asked anew each time.

    Raises socket.gaierror.
    """
    if host.is_unix:
        return [Address(host, socket.AF_UNIX, f"{host.name}/.s.PGSQL.{host.port}")]
    found = await asyncio.get_running_loop().getaddrinfo(
        host.address or host.name, host.port, type=socket.SOCK_STREAM
    )
    return [Address(host, family, sockaddr) for family, _, _, _, sockaddr in found]


async def connect(address: Address, options: Mapping[str, int], traffic: Traffic) -> "Link":
    """Open a socket. Raises OSError; the caller sets the deadline."""
    loop = asyncio.get_running_loop()
    link = Link(traffic)
    factory: Any = lambda: link  # noqa: E731  a protocol by shape, which typeshed cannot see
    if address.family == socket.AF_UNIX:
        await loop.create_unix_connection(factory, address.sockaddr)
        return link
    sock = socket.socket(address.family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        _set_options(sock, options)
        await loop.sock_connect(sock, address.sockaddr)
        await loop.create_connection(factory, sock=sock)
    except BaseException:
        sock.close()
        raise
    return link


def _set_options(sock: socket.socket, options: Mapping[str, int]) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if options.get("keepalives", 1):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for key, name in _SOCKET_OPTIONS.items():
        value = options.get(key, 0)
        if value and hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


class Link:
    """An ``asyncio.Protocol`` by shape, for the time of the login."""

    def __init__(self, traffic: Traffic) -> None:
        self.transport: Any = None  # asyncio.Transport, set by connection_made
        self.is_closed = False
        self._traffic = traffic
        self._is_on_trial = False  # the server may not have judged our certificate yet
        self._buffer = b""
        self._error: BaseException | None = None
        self._wake: asyncio.Future[None] | None = None

    # -- asyncio.Protocol ----------------------------------------------------------------------

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self._traffic.server_received += len(data)
        self._is_on_trial = False
        self._buffer += data
        if len(self._buffer) > _MAX_UNREAD:
            self._error = ServerProtocolError(
                f"more than {_MAX_UNREAD} bytes that nobody asked for, during login"
            )
            self.transport.abort()
        self._notify()

    def eof_received(self) -> bool:
        return False  # close the transport; connection_lost follows

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_closed = True
        self._error = self._error or exc
        self._notify()

    def pause_writing(self) -> None:
        pass  # a login is a few bytes

    def resume_writing(self) -> None:
        pass

    # -- use -----------------------------------------------------------------------------------

    @property
    def encryption(self) -> ssl.SSLObject | None:
        """What is known of the encryption, where there is any."""
        found: ssl.SSLObject | None = self.transport.get_extra_info("ssl_object")
        return found

    def write(self, data: bytes) -> None:
        self._traffic.server_sent += len(data)
        self.transport.write(data)

    async def next_message(self) -> tuple[int, bytes]:
        """Kind and body of the next message. Raises ServerProtocolError, ServerUnavailable,
        TlsFailed."""
        while True:
            if len(self._buffer) >= 5:
                kind, length = m.HEADER.unpack_from(self._buffer)
                if not 4 <= length <= MAX_LOGIN_MESSAGE:
                    raise ServerProtocolError(f"invalid message length {length} during login")
                if len(self._buffer) > length:
                    body = self._buffer[5 : length + 1]
                    self._buffer = self._buffer[length + 1 :]
                    return kind, body
            await self._more()

    async def request_tls(self) -> bool:
        """Ask whether the server has TLS (54.2.11); with True, the handshake has to follow at once."""
        self.write(SSL_REQUEST)
        while not self._buffer:
            await self._more()
        answer = self._buffer[:1]
        if answer == b"E":
            # not to be shown: nobody knows yet who says it
            raise TlsFailed("the server answered the request for TLS with an error")
        if answer not in (b"S", b"N"):
            raise ServerProtocolError(f"unexpected answer {answer!r} to the request for TLS")
        if len(self._buffer) > 1:
            # Somebody between us might have put it there, to be taken for what comes encrypted
            # (CVE-2021-23222). Nor is there anything to be said in the clear.
            raise ServerProtocolError(
                "received unencrypted data after the answer to the request for TLS"
            )
        self._buffer = b""
        return answer == b"S"

    async def start_tls(self, policy: TlsPolicy, context: ssl.SSLContext, host: str) -> None:
        """The handshake. Raises TlsFailed. From ``request_tls`` to here nothing may be awaited."""
        if self._buffer:
            raise ServerProtocolError("received unencrypted data before the TLS handshake")
        if self.is_closed or self.transport.is_closing():
            raise TlsFailed("the server closed the connection before the TLS handshake")
        loop = asyncio.get_running_loop()
        myself: Any = self
        try:
            transport = await loop.start_tls(
                self.transport,
                myself,
                context,
                server_hostname=tls.server_name(policy, host),
                ssl_handshake_timeout=_NEVER,
            )
        except TimeoutError:
            raise
        except ConnectionError as exc:
            raise tls.cut_off(policy) from exc
        except (OSError, ValueError) as exc:  # ValueError: a name that no certificate can have
            raise tls.failure(exc) from exc
        if transport is None:  # lost during the handshake; uvloop's and asyncio's own way to say so
            raise tls.cut_off(policy)
        self.transport = transport
        self._is_on_trial = bool(policy.certificate)
        encryption = self.encryption
        spoken = None if encryption is None else encryption.selected_alpn_protocol()
        if spoken != tls.ALPN and (spoken is not None or policy.is_direct):
            raise TlsFailed(f"the server did not agree to speak {tls.ALPN} over TLS (ALPN)")

    async def closed(self) -> None:
        """Return when the other side has closed the connection."""
        while not self.is_closed:
            self._buffer = b""
            self._wake = asyncio.get_running_loop().create_future()
            await self._wake

    async def say_goodbye(self) -> None:
        """End a session that is not wanted, and return when its backend is gone."""
        self.write(m.TERMINATE_MESSAGE)
        await self.closed()

    def abort(self) -> None:
        if self.transport is not None and not self.is_closed:
            self.transport.abort()

    def hand_over(self, protocol: object) -> bytes:
        """Another protocol gets what comes from now on; returns what has come and was not read."""
        if self.is_closed or self.transport.is_closing():
            raise ServerUnavailable("the server closed the connection after the login")
        self.transport.set_protocol(protocol)
        rest, self._buffer = self._buffer, b""
        return rest

    async def _more(self) -> None:
        if self._error is not None or self.is_closed:
            raise self._why_lost()
        self._wake = asyncio.get_running_loop().create_future()
        await self._wake

    def _why_lost(self) -> BaseException:
        error = self._error
        # With TLS 1.3 a server judges our certificate after our side of the handshake is over, and
        # what it says of it may be lost in the end of the connection.
        if isinstance(error, ssl.SSLError):
            return tls.failure(error)
        if self._is_on_trial and (error is None or isinstance(error, ConnectionError)):
            return TlsFailed("the server closed the connection when it had seen our certificate")
        return error or ServerUnavailable("the server closed the connection during login")

    def _notify(self) -> None:
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)


_NEVER: Final = 24 * 3600.0
"""Seconds: a handshake ends at the attempt's deadline, not at one of its own."""
