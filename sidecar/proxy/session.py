"""A client from accept to login: startup packet, authentication, first ReadyForQuery.

Owns the client's socket until the login is complete, then hands it to a ``Relay``. One task for
each client in login, bounded by ``login_timeout``; it ends with the login.
"""

import asyncio
import logging
import secrets
import socket
from collections.abc import Callable
from typing import Any, Final, Protocol

from sidecar.config import PoolConfig
from sidecar.errors import AuthenticationFailed, ClientProtocolError, SidecarError
from sidecar.events import ClientOutcome, PoolMode, Traffic
from sidecar.hba import Peer, peer_address
from sidecar.pool.opening import Opener
from sidecar.pool.server import clock
from sidecar.protocol import messages as m
from sidecar.protocol import startup
from sidecar.proxy.authenticate import Authenticator
from sidecar.proxy.certificates import Identity
from sidecar.proxy.greeting import Greeting
from sidecar.proxy.guests import Console, Guest
from sidecar.proxy.limits import Limits
from sidecar.proxy.login import Login
from sidecar.proxy.relay import Relay
from sidecar.proxy.settings import from_startup
from sidecar.proxy.tables import Client, PoolTables
from sidecar.proxy.tls import ALPN, HandshakeFailed, TlsTransport

log = logging.getLogger("pgsidecar.proxy")

_MAX_BUFFERED: Final = 64 * 1024
"""Bytes; no client has more to say before it is logged in."""

_MAX_PASSWORD: Final = 64 * 1024  # bytes; PG_MAX_AUTH_TOKEN_LENGTH


class Host(Protocol):
    """The listener, as its sessions see it."""

    @property
    def console(self) -> Console: ...

    @property
    def traffic(self) -> Traffic: ...

    @property
    def login_timeout(self) -> float: ...

    @property
    def requires_tls(self) -> bool:
        """Of clients that come over TCP."""

    async def identity(self) -> Identity | None:
        """What TLS is done with; None: it is not."""

    def pool_for(self, database: str) -> PoolConfig: ...

    def enter(self, pool: PoolConfig, login: Login, client: object) -> PoolTables:
        """The pool's tables; they are this client's to use until it leaves."""

    def leave(self, tables: PoolTables, client: object) -> None: ...

    @property
    def authenticator(self) -> Authenticator: ...

    def limits(self, pool: PoolConfig, user: str) -> Limits: ...

    def admit_login(self, session: "Session") -> None:
        """Raises PoolSaturated if no further client may be in login."""

    def admit(self, user: str, pool: PoolConfig) -> None:
        """Raises PoolSaturated or PoolClosed if no further client is allowed."""

    def check_enabled(self, pool: str) -> None:
        """Raises SidecarError if this pool takes no new clients."""

    def admit_guest(self) -> None:
        """The same for a client of the console."""

    def register(self, relay: Relay | Guest, pid: int | None = None) -> None: ...

    def gone(self, relay: Relay | Guest) -> None: ...

    def closing(self, relay: Relay) -> None: ...

    def cancel(self, request: startup.CancelRequest) -> asyncio.Future[None] | None:
        """Pass it on. The future is done when the server has it; None: nobody has to be asked."""

    def login_ended(self, session: "Session", outcome: ClientOutcome | None) -> None: ...

    def login_timed_out(self, pool: str | None) -> None: ...


class _Gone(Exception):
    """The client closed its connection during the login."""


class Session:
    """An ``asyncio.Protocol`` by shape."""

    def __init__(self, host: Host) -> None:
        self._host: Final = host
        self._transport: Any = None
        self._buffer = b""
        self._wake: asyncio.Future[None] | None = None
        self._is_closed = False
        self._is_unwanted = False  # abort as soon as there is a transport
        self._is_paused = False
        self._is_local = False  # over a Unix socket
        self._tls: TlsTransport | None = None  # once the handshake is done
        self.end_point: bytes | None = None  # what a login over TLS can be bound to
        self._user = ""  # as it says; empty before
        self._pool: str | None = None  # as soon as it is known
        self._greeting: Greeting | None = None
        self._opener: Opener | None = None  # while we wait for it
        self.address = "unknown"

    def __repr__(self) -> str:
        return f"<Session {self.address} in login>"

    # -- asyncio.Protocol ----------------------------------------------------------------------

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        if self._is_unwanted:
            transport.abort()
            return
        self.address = _address_of(transport)
        sock = transport.get_extra_info("socket")
        self._is_local = sock is not None and sock.family == socket.AF_UNIX
        if sock is not None and not self._is_local:
            # a client whose host is gone must not keep its place for ever
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)

    def data_received(self, data: bytes) -> None:
        self._host.traffic.client_received += len(data)
        self._buffer += data
        if len(self._buffer) > _MAX_BUFFERED:
            self._is_paused = True
            self._transport.pause_reading()
        self._notify()

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._is_closed = True
        self._notify()
        if self._greeting is not None:
            self._greeting.give_up()

    def pause_writing(self) -> None:
        """A login writes little: the deadline takes care of who does not read it."""

    def resume_writing(self) -> None:
        pass

    def abort(self) -> None:
        """Close without a word. A new client's task may run before ``connection_made``."""
        self._is_unwanted = True
        if self._transport is not None:
            self._transport.abort()

    # -- the login -----------------------------------------------------------------------------

    async def run(self) -> None:
        """Log the client in, or tell it why not; never raises but for cancellation."""
        outcome: ClientOutcome | None = ClientOutcome.REJECTED
        deadline = clock() + self._host.login_timeout
        try:
            async with asyncio.timeout_at(deadline):
                outcome = await self._log_in(deadline)
        except TimeoutError:
            self._refuse(self._too_late())
        except AuthenticationFailed as exc:
            outcome = ClientOutcome.AUTH_FAILED
            self._refuse(exc)
        except SidecarError as exc:
            self._refuse(exc)
        except (_Gone, EOFError):
            outcome = None
        except HandshakeFailed as exc:
            self._close_unheard(f"could not accept SSL connection: {exc}")
        except Exception:
            log.exception("login failed", extra={"client": self.address})
            self._refuse(SidecarError("internal error of the connection pool"))
        finally:
            self._host.login_ended(self, outcome)

    def _too_late(self) -> SidecarError:
        """The client's time is over. The loop may have been held up, and the server be late rather."""
        if self._opener is not None:
            return self._opener.unavailable()
        self._host.login_timed_out(self._pool)
        timeout = f"{self._host.login_timeout:g} s"
        return SidecarError(f"login not complete within {timeout}", sqlstate="57014")

    async def _log_in(self, deadline: float) -> ClientOutcome | None:
        packet = await self._first_packet()
        if isinstance(packet, startup.CancelRequest):
            arriving = self._host.cancel(packet)
            if arriving is not None:
                # Our end of file means, as PostgreSQL's, that what the client runs next is safe.
                await asyncio.wait((arriving,), timeout=deadline - 0.1 - clock())
            self._transport.close()
            return None
        self._user = packet.name(b"user")
        self._host.admit_login(self)
        self._check(packet)
        user = self._user
        database = packet.name(b"database") or user
        if self._host.console.is_meant(database):
            return await self._log_in_to_console(packet, user, database, deadline)
        pool, no_pool = self._find_pool(database)
        login = await self._host.authenticator.authenticate(self, user, database, pool, deadline)
        asked = pool
        pool, no_pool = self._find_pool(database)  # again: a reload may have come between
        if pool is None:
            assert no_pool is not None
            raise no_pool
        if asked is None or not asked.has_same_users(pool):
            raise SidecarError(
                f'database "{database}" has changed during the login',
                hint="Log in again: who may, and with which password, may have changed, too.",
                sqlstate="57P03",
            )
        self._host.check_enabled(pool.name)
        self._host.admit(user, pool)
        tables = self._host.enter(pool, login, self)
        try:
            self._opener = tables.pool.opener
            await self._opener.wait_for_parameters(deadline - 0.1)  # it can say more than we
            self._opener = None
            if self._is_closed:
                raise _Gone
            self._host.check_enabled(pool.name)
            self._host.admit(user, pool)  # others may have come in meanwhile
            settings = tables.settings.intern(from_startup(packet, tables.pool.opener.parameters))
            tables.settings.is_known(settings)
            client = Client(user, database, self.address)
            relay = Relay(tables, self._host, client, settings, self._host.limits(pool, user))
            relay.secret = secrets.token_bytes(packet.secret_size)
            if pool.mode is PoolMode.SESSION or relay.carrier.must_be_tried:
                await self._greet(relay, pool, deadline)
            else:
                self._host.register(relay)
                self._hand_over(relay, b"".join(relay.carrier.told()))
        finally:
            self._host.leave(tables, self)
        return ClientOutcome.ACCEPTED

    async def _greet(self, relay: Relay, config: PoolConfig, deadline: float) -> None:
        """The end of a login that needs a server connection: to keep, or to try the settings on."""
        pool = relay.tables.pool
        timeout = min(relay.limits.acquire, deadline - 0.1 - clock())
        greeting = self._greeting = Greeting(pool, relay.carrier, relay.who(), timeout)
        try:
            server = await greeting.take()
            data = await greeting.settle(server)
            if self._is_closed:
                raise _Gone
            self._host.check_enabled(pool.name)
            self._host.admit(relay.client.user, config)  # again: this may have taken a while
            told = b"".join(m.parameter_status(*each) for each in server.parameters.items())
            if pool.config.mode is PoolMode.SESSION:
                self._host.register(relay, server.pid)
                greeting.server = None
                self._hand_over(relay, told, lambda: relay.adopt(server, data))
            else:
                self._host.register(relay)
                greeting.give_up()
                self._hand_over(relay, told)
        finally:
            greeting.give_up()

    async def _log_in_to_console(
        self, packet: startup.StartupMessage, user: str, database: str, deadline: float
    ) -> ClientOutcome:
        await self._host.authenticator.authenticate(self, user, database, None, deadline)
        application = packet.text(b"application_name")
        self._host.admit_guest()
        if self._is_closed:
            raise _Gone
        guest = self._host.console.receive(user, database, application, self._host)
        guest.secret = secrets.token_bytes(packet.secret_size)
        self._host.register(guest)
        self._hand_over(guest, guest.greeting())
        return ClientOutcome.ACCEPTED

    def _find_pool(self, database: str) -> tuple[PoolConfig | None, SidecarError | None]:
        """The pool, or the error to raise once the client has proved who it is."""
        try:
            pool = self._host.pool_for(database)
        except SidecarError as exc:
            return None, exc
        self._pool = pool.name
        return pool, None

    def _check(self, packet: startup.StartupMessage) -> None:
        if not packet.text(b"user"):
            raise AuthenticationFailed(
                "no PostgreSQL user name specified in startup packet", sqlstate="28000"
            )
        if packet.text(b"replication") not in ("", "0", "false", "off", "no"):
            raise SidecarError(
                "replication connections cannot be pooled",
                hint="Connect to the server directly.",
                sqlstate="0A000",
            )
        if self._host.requires_tls and self._tls is None and not self._is_local:
            raise SidecarError(
                f'no encryption: connections of user "{packet.text(b"user")}" from'
                f" {self.address} have to use SSL",
                hint="Connect with sslmode=require, or a stricter one (listen.tls_mode is require).",
                sqlstate="28000",
            )
        if packet.minor > startup.NEWEST_MINOR or packet.unknown_options:
            minor = min(packet.minor, startup.NEWEST_MINOR)
            self.write(m.negotiate_protocol_version(minor, packet.unknown_options))

    def _hand_over(
        self, relay: Relay | Guest, told: bytes, then: Callable[[], None] = lambda: None
    ) -> None:
        """``told``: ParameterStatus messages. ``then`` runs before what the client has said already."""
        self.write(
            m.authentication(m.AUTH_OK)
            + told
            + m.backend_key_data(relay.pid, relay.secret)
            + m.READY_IDLE_MESSAGE
        )
        data, self._buffer = self._buffer, b""
        self._transport.set_protocol(relay)
        relay.connection_made(self._transport)
        if self._is_paused:
            self._transport.resume_reading()
        then()
        if data and not self._transport.is_closing():
            self._host.traffic.client_received -= len(data)  # the relay counts it again
            relay.data_received(data)

    # -- startup packet ------------------------------------------------------------------------

    async def _first_packet(self) -> startup.CancelRequest | startup.StartupMessage:
        """The first packet that is not about encryption; over TLS, if the client asks for it."""
        if (await self._peek(1))[0] == startup.TLS_HELLO:
            await self._encrypt_directly()
        for _ in range(3):  # GSSENCRequest, SSLRequest, then the real one
            length = startup.packet_length(await self._peek(4))
            packet = startup.parse_startup(await self._take(length))
            if not isinstance(packet, startup.EncryptionRequest):
                return packet
            if self._tls is not None:
                raise ClientProtocolError("an encryption request over an encrypted connection")
            identity = await self._identity() if packet.is_tls else None
            if self._buffer:
                # Whoever sits in between could have put it there (CVE-2021-23214).
                raise ClientProtocolError(
                    "received unencrypted data after an encryption request",
                    detail="This could be either a client-software bug or evidence of an attempted"
                    " man-in-the-middle attack.",
                )
            if identity is None:
                self.write(b"N")
            else:
                await self._encrypt(identity, b"S")
        raise ClientProtocolError("too many encryption requests")

    async def _identity(self) -> Identity | None:
        """As PostgreSQL's, our Unix socket has no TLS."""
        return None if self._is_local else await self._host.identity()

    async def _encrypt_directly(self) -> None:
        """TLS from the first byte (sslnegotiation=direct). The protocol has to be named in it: else
        a browser could be made to talk here (54.2.11)."""
        identity = await self._identity()
        if identity is None:
            raise ClientProtocolError("direct SSL connection where there is no SSL")
        tls = await self._encrypt(identity, b"")
        if tls.application_protocol != ALPN:
            raise ClientProtocolError(
                "received direct SSL connection request without ALPN protocol negotiation extension"
            )

    async def _encrypt(self, identity: Identity, answer: bytes) -> TlsTransport:
        self.write(answer)
        received, self._buffer = self._buffer, b""
        self._host.traffic.client_received -= len(received)  # what TLS carries is counted
        self._is_paused = False  # the handshake reads on
        tls = TlsTransport(self._transport, identity.context, self)
        self._transport = tls
        await tls.handshake(received)
        self._tls = tls
        self.end_point = identity.end_point
        log.debug(
            "client encrypted",
            extra={"client": self.address, "version": tls.version, "cipher": tls.cipher},
        )
        return tls

    # -- what TLS has shown --------------------------------------------------------------------

    @property
    def is_encrypted(self) -> bool:
        return self._tls is not None

    def certificate_name(self) -> str | None:
        """The common name in the client's certificate, which a CA of ours has signed; None: it has
        shown none, or the certificate has no name that could be a user's."""
        for kind, value in [] if self._tls is None else self._tls.subject():
            if kind == "commonName":
                return None if "\0" in value else value  # a user's name ends there (CVE-2009-4034)
        return None

    # -- a client that is not proven yet (see ``authenticate``) ----------------------------------

    def peer(self) -> Peer:
        if self._is_local:
            return Peer(None, None, self.is_encrypted)
        there = self._transport.get_extra_info("peername")
        here = self._transport.get_extra_info("sockname")
        if not there or not here:
            raise _Gone  # before we could ask: never taken for a local one
        return Peer(peer_address(there[0]), peer_address(here[0]), self.is_encrypted)

    async def password_message(self) -> bytes:
        kind, length = m.HEADER.unpack(await self._peek(5))
        if kind != m.PASSWORD or not 4 <= length <= _MAX_PASSWORD:
            raise ClientProtocolError(
                f"expected password response, got message type {kind} of {length} bytes"
            )
        return (await self._take(1 + length))[5:]

    async def linger(self, seconds: float) -> None:
        until = clock() + seconds
        while not self._is_closed and (left := until - clock()) > 0:
            self._wake = asyncio.get_running_loop().create_future()
            await asyncio.wait((self._wake,), timeout=left)

    # -- bytes ---------------------------------------------------------------------------------

    async def _peek(self, size: int) -> bytes:
        while len(self._buffer) < size:
            if self._is_closed:
                raise _Gone
            self._wake = asyncio.get_running_loop().create_future()
            await self._wake
        return self._buffer[:size]

    async def _take(self, size: int) -> bytes:
        data = await self._peek(size)
        self._buffer = self._buffer[size:]
        return data

    def _notify(self) -> None:
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)

    def write(self, data: bytes) -> None:
        if not self._is_closed:
            self._host.traffic.client_sent += len(data)
            self._transport.write(data)

    def _close_unheard(self, cause: str) -> None:
        """Close without an error: the client could not read it."""
        self._log_refusal("08P01", cause)
        self._transport.close()

    def _log_refusal(self, sqlstate: str, cause: str) -> None:
        known = {"user": self._user, "pool": self._pool or ""}
        log.info(
            "client refused",
            extra={
                "client": self.address,
                **{field: value for field, value in known.items() if value},
                "sqlstate": sqlstate,
                "cause": cause,
            },
        )

    def _refuse(self, error: SidecarError) -> None:
        self._log_refusal(error.sqlstate, error.logged)
        self.write(
            m.error_response(
                "FATAL", error.sqlstate, error.message, detail=error.detail, hint=error.hint
            )
        )
        if not self._is_closed:
            self._transport.close()


def _address_of(transport: Any) -> str:
    peer = transport.get_extra_info("peername")
    if isinstance(peer, tuple):
        host, port = peer[:2]
        return f"[{host}]:{port}" if ":" in str(host) else f"{host}:{port}"
    return "local socket"
