"""From a target to a session: which host, with TLS or without, who we are, is it the one we want.

Owns the order of the attempts and how the time is shared among them. Runs no task of its own.
Hosts are tried as libpq does (PostgreSQL manual, 34.1.1.3): one that cannot be reached, is starting up
or is not what ``target_session_attrs`` asks for is followed by the next; a refused login is final.
"""

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from sidecar.errors import (
    ServerError,
    ServerProtocolError,
    ServerUnavailable,
    SidecarError,
    TlsFailed,
    WrongRole,
)
from sidecar.events import Traffic
from sidecar.pool import tls
from sidecar.pool.link import Address, Link, connect, resolve
from sidecar.protocol import messages as m
from sidecar.protocol.authentication import (
    ClientExchange,
    ScramKeys,
    choose_exchange,
    md5_response,
    server_end_point,
)
from sidecar.protocol.startup import NEWEST_MINOR, startup_message
from sidecar.target import Host, ServerTarget, SessionAttrs, TlsPolicy
from sidecar.work import NO_ANSWER

_MAX_MESSAGES: Final = 1000  # PostgreSQL 18 sends about 20
_MAX_PARAMETERS: Final = 200  # PostgreSQL 18 reports 16

_STARTING_UP: Final = "57P03"  # cannot_connect_now
_SAME_WITH_TLS: Final = ("28P01", "3D000", "53300", _STARTING_UP)
"""Refusals that have nothing to do with encryption: wrong password, no such database, too many."""


@dataclass(slots=True)
class Session:
    """A login that succeeded; the server has said ReadyForQuery."""

    link: Link
    address: Address
    pid: int = 0
    secret: bytes = b""
    parameters: dict[bytes, bytes] = field(default_factory=dict)

    def remember_parameter(self, body: bytes) -> None:
        remember(self.parameters, body)


def remember(parameters: dict[bytes, bytes], body: bytes) -> None:
    """Take down a ParameterStatus; not more of them than there can be."""
    try:
        name, value = m.name_and_value(body)
    except ValueError:
        return
    if name in parameters or len(parameters) < _MAX_PARAMETERS:
        parameters[name] = value


class Versions:
    """Which version of the protocol each host is spoken to in: the newest, unless it cannot stand it.

    PostgreSQL since 9.3 says what it has instead (54.2.1); some poolers close or refuse. The attempt
    that follows is made in 3.0, and one that follows its failure in the newest again.
    """

    def __init__(self) -> None:
        self._old: set[Host] = set()

    def minor(self, host: Host) -> int:
        return 0 if host in self._old else NEWEST_MINOR

    def failed(self, host: Host, exc: Exception, *, was_answered: bool) -> None:
        """An attempt ended in this error; ``was_answered``: after the server had said something."""
        if host in self._old:
            self._old.discard(host)
        elif isinstance(exc, ServerError):
            if exc.sqlstate in ("0A000", "08P01"):
                self._old.add(host)
        elif not was_answered and isinstance(exc, ServerUnavailable | ConnectionError):
            self._old.add(host)


class Login:
    """One attempt to connect, over all hosts. ``run`` it once."""

    def __init__(self, target: ServerTarget, traffic: Traffic, versions: Versions) -> None:
        self.has_connected = False
        """Whether the last host that was tried had taken the connection."""
        self._target = target
        self._traffic = traffic
        self._versions = versions

    async def run(self, deadline: float) -> Session:
        """Log in somewhere. Raises OSError (TimeoutError is one), ServerError (the server refused),
        ServerProtocolError, and ServerUnavailable for the rest.

        Each host gets an equal share of what time is left, so a dead one leaves time for the others.
        """
        target = self._target
        hosts: Sequence[Host] = target.hosts
        if target.is_balanced:
            hosts = random.sample(hosts, len(hosts))
        failures: list[tuple[Host, Exception]] = []
        rounds: list[SessionAttrs] = [target.session_attrs]
        if target.session_attrs is SessionAttrs.PREFER_STANDBY:
            rounds = [SessionAttrs.STANDBY, SessionAttrs.ANY]
        while rounds:
            wanted = rounds.pop(0)
            left = len(hosts) * (1 + len(rounds))
            for host in hosts:
                share = time.monotonic() + (deadline - time.monotonic()) / left
                left -= 1
                try:
                    async with asyncio.timeout_at(share):
                        return await self._try_host(host, wanted, share)
                except ServerError as exc:
                    if exc.sqlstate != _STARTING_UP:
                        raise
                    failures.append((host, exc))
                except (OSError, SidecarError) as exc:
                    failures.append((host, exc))
            if rounds:  # no standby: any of those that would have let us in
                hosts = [host for host, exc in failures if isinstance(exc, WrongRole)]
                failures = [each for each in failures if not isinstance(each[1], WrongRole)]
        raise _all_failed(failures)

    # -- one host ------------------------------------------------------------------------------

    async def _try_host(self, host: Host, wanted: SessionAttrs, deadline: float) -> Session:
        self.has_connected = False
        addresses = await resolve(host)
        if self._target.is_balanced:
            random.shuffle(addresses)
        address, link = await self._reach(addresses, deadline)
        session = await self._log_in(address, link)
        try:
            problem = await _role_problem(session, wanted)
            if problem:
                await session.link.say_goodbye()
        except BaseException:
            session.link.abort()
            raise
        if problem:
            raise WrongRole(f"{problem}, target_session_attrs asks for {wanted}")
        return session

    async def _reach(self, addresses: list[Address], deadline: float) -> tuple[Address, Link]:
        """The first address that takes a connection; each gets an equal share of the time left."""
        last: OSError | None = None
        for left, address in zip(range(len(addresses), 0, -1), addresses, strict=True):
            now = time.monotonic()
            try:
                async with asyncio.timeout_at(now + (deadline - now) / left):
                    return address, await self._connect(address)
            except OSError as exc:  # TimeoutError is one
                last = exc
        assert last is not None, "getaddrinfo returns an address or raises"
        raise last

    async def _connect(self, address: Address) -> Link:
        link = await connect(address, self._target.socket_options, self._traffic)
        self.has_connected = True
        return link

    async def _log_in(self, address: Address, link: Link) -> Session:
        """With TLS or without, in the order that ``sslmode`` says; the second time anew."""
        attempts = (False,) if address.host.is_unix else self._target.tls.attempts
        first: SidecarError | None = None
        for with_tls in attempts:
            if first is not None:
                link = await self._connect(address)
            try:
                if with_tls:
                    await encrypt(link, address, self._target.tls)
                login = _Authentication(
                    self._target, link, address, self._versions.minor(address.host)
                )
                try:
                    return await login.run()
                except (SidecarError, ConnectionError) as exc:
                    self._versions.failed(address.host, exc, was_answered=login.was_answered)
                    raise
            except SidecarError as exc:
                link.abort()
                is_decided = with_tls and link.encryption is None and not isinstance(exc, TlsFailed)
                if first is None and len(attempts) > 1 and not is_decided and _may_differ(exc):
                    first = exc
                    continue
                if first is not None:
                    how = "without TLS" if with_tls else "with TLS"
                    exc.message += f" ({how}: {first.message})"
                raise
            except BaseException:
                link.abort()
                raise
        raise AssertionError("the last attempt returns or raises")


def _may_differ(exc: SidecarError) -> bool:
    """Whether a server may say something else with TLS than without."""
    if isinstance(exc, ServerError):
        return exc.sqlstate not in _SAME_WITH_TLS
    return isinstance(exc, TlsFailed)


def _all_failed(failures: list[tuple[Host, Exception]]) -> Exception:
    if len(failures) == 1:
        return failures[0][1]
    told = "; ".join(f"{host.describe()}: {describe(exc)}" for host, exc in failures)
    error = ServerUnavailable(f"no server would do: {told}")
    error.__cause__ = failures[-1][1]
    return error


def describe(exc: BaseException) -> str:
    """What went wrong, in words for a person."""
    if isinstance(exc, SidecarError):
        return exc.message
    if isinstance(exc, TimeoutError):
        return NO_ANSWER
    if isinstance(exc, ConnectionRefusedError):
        return "connection refused"
    return getattr(exc, "strerror", None) or str(exc) or type(exc).__name__


async def encrypt(link: Link, address: Address, policy: TlsPolicy) -> None:
    """Upgrade to TLS; where ``sslmode`` is prefer and the server has none, leave it as it is.

    Raises TlsFailed.
    """
    context = await tls.context_for(policy)
    if not policy.is_direct and not await link.request_tls():
        if False in policy.attempts:
            return
        raise TlsFailed(
            f"the server has no TLS, sslmode {policy.mode} asks for it",
            hint="On the server: ssl = on.",
        )
    await link.start_tls(policy, context, address.host.name)


async def _role_problem(session: Session, wanted: SessionAttrs) -> str:
    """What is wrong with this server; empty if it is what is wanted.

    PostgreSQL 14 and newer report it with the login; others are asked.
    """
    if wanted in (SessionAttrs.ANY, SessionAttrs.PREFER_STANDBY):
        return ""
    if wanted in (SessionAttrs.READ_WRITE, SessionAttrs.READ_ONLY):
        names = [b"default_transaction_read_only", b"in_hot_standby"]
        asked, yes = b"SHOW transaction_read_only", b"on"
        said = ("the server is read-only", "the server is not read-only")
    else:
        names = [b"in_hot_standby"]
        asked, yes = b"SELECT pg_catalog.pg_is_in_recovery()", b"t"
        said = ("the server is a standby", "the server is not a standby")
    is_wanted = wanted in (SessionAttrs.READ_ONLY, SessionAttrs.STANDBY)
    if all(name in session.parameters for name in names):
        is_so = any(session.parameters[name] == b"on" for name in names)
    else:
        is_so = await _first_value(session, asked) == yes
    return "" if is_so is is_wanted else said[not is_so]


async def _first_value(session: Session, sql: bytes) -> bytes:
    session.link.write(m.query(sql))
    value = b""
    for _ in range(_MAX_MESSAGES):
        kind, body = await session.link.next_message()
        if kind == m.DATA_ROW:
            value = body[6:]  # number of columns, length, value (54.7, DataRow)
        elif kind == m.PARAMETER_STATUS:
            session.remember_parameter(body)
        elif kind == m.ERROR_RESPONSE:
            raise _refusal(body)
        elif kind == m.READY_FOR_QUERY:
            return value
    raise ServerProtocolError("the answer to a query has no end")


class _Authentication:
    """Startup packet to ReadyForQuery."""

    def __init__(self, target: ServerTarget, link: Link, address: Address, minor: int) -> None:
        self.was_answered = False
        self._minor = minor
        self._target = target
        self._link = link
        self._session = Session(link, address)
        self._scram: ClientExchange | None = None
        self._was_asked = False

    async def run(self) -> Session:
        link, session, target = self._link, self._session, self._target
        link.write(startup_message(_startup_parameters(target), self._minor))
        is_authenticated = False
        for _ in range(_MAX_MESSAGES):
            kind, body = await link.next_message()
            if kind == m.READY_FOR_QUERY and is_authenticated:
                return session
            if kind == m.ERROR_RESPONSE:
                raise _refusal(body)
            self.was_answered = True
            if kind == m.AUTHENTICATION and not is_authenticated:
                await self._authenticate(body)
                is_authenticated = body == _AUTH_OK
            elif kind == m.PARAMETER_STATUS:
                session.remember_parameter(body)
            elif kind == m.BACKEND_KEY_DATA:
                if len(body) < 8:
                    raise ServerProtocolError(f"BackendKeyData of {len(body)} bytes")
                session.pid, session.secret = int.from_bytes(body[:4], "big"), body[4:]
            elif kind not in (m.NOTICE_RESPONSE, m.NEGOTIATE_PROTOCOL_VERSION):
                raise ServerProtocolError(f"unexpected message {chr(kind)!r} during login")
        raise ServerProtocolError("the login has no end")

    async def _authenticate(self, body: bytes) -> None:
        if len(body) < 4:
            raise ServerProtocolError(f"Authentication of {len(body)} bytes")
        code, data = int.from_bytes(body[:4], "big"), body[4:]
        scram = self._scram
        if code == m.AUTH_OK:
            self._check_proof()
        elif code == m.AUTH_SASL_CONTINUE and scram is not None:
            # in a thread: PBKDF2 would stall every client for milliseconds
            self._link.write(m.password(await asyncio.to_thread(scram.respond, data)))
        elif code == m.AUTH_SASL_FINAL and scram is not None:
            scram.verify(data)
        elif self._was_asked:
            raise ServerProtocolError("the server asks for a second authentication")
        else:
            self._was_asked = True
            self._begin(code, data)

    def _check_proof(self) -> None:
        """The server lets us in. Has it shown that it knows us, where it has to?"""
        scram = self._scram
        if scram is not None and not scram.is_verified:
            raise ServerProtocolError("the server did not prove that it knows the password")
        if not self._was_asked:
            self._check_method("none")

    def _begin(self, code: int, data: bytes) -> None:
        method = _METHODS.get(code)
        if method is None:
            raise ServerError(
                f"the server asks for an authentication method we do not have (code {code})",
                sqlstate="28000",
                hint="Available: trust, password, md5, scram-sha-256.",
            )
        self._check_method(method)
        secret = self._secret(method)
        if code == m.AUTH_SASL:
            found = self._link.encryption
            certificate = found.getpeercert(True) if found is not None else None
            self._scram = choose_exchange(
                secret,
                data.split(b"\0"),
                channel_binding=self._target.channel_binding,
                is_encrypted=found is not None,
                end_point=server_end_point(certificate) if certificate else None,
            )
            mechanism = self._scram.mechanism.encode()
            self._link.write(m.sasl_initial_response(mechanism, self._scram.begin()))
            return
        assert isinstance(secret, str)
        if code == m.AUTH_MD5:
            self._link.write(m.password(md5_response(self._target.user, secret, data[:4])))
        else:
            self._link.write(m.password(secret.encode() + b"\0"))

    def _check_method(self, method: str) -> None:
        allowed = self._target.methods
        if allowed is not None and method not in allowed:
            raise ServerError(
                f"the server wants {_WANTS[method]}, which require_auth rules out", sqlstate="28000"
            )
        if self._target.channel_binding == "require" and method != "scram-sha-256":
            raise ServerError(
                f"channel binding is required, but the server wants {_WANTS[method]}",
                sqlstate="28000",
            )

    def _secret(self, method: str) -> str | ScramKeys:
        target = self._target
        if target.scram_keys is not None and method == "scram-sha-256":
            return target.scram_keys
        if target.password is None:
            known = "only the keys for SCRAM are known" if target.scram_keys else "the dsn has none"
            raise ServerError(
                f"the server asks for {_WANTS[method]} of user {target.user!r}, {known}",
                sqlstate="28P01",
            )
        return target.password.get_secret_value()


_AUTH_OK = m.AUTH_OK.to_bytes(4, "big")
_METHODS = {m.AUTH_CLEARTEXT: "password", m.AUTH_MD5: "md5", m.AUTH_SASL: "scram-sha-256"}
_WANTS = {
    "none": "no authentication",
    "password": "a password",
    "md5": "a password (md5)",
    "scram-sha-256": "a password (SCRAM)",
}


def _startup_parameters(target: ServerTarget) -> dict[bytes, bytes]:
    parameters = {b"user": target.user.encode(), b"database": target.database.encode()}
    return parameters | {k.encode(): v.encode() for k, v in target.parameters.items()}


def _refusal(body: bytes) -> ServerError:
    fields = m.error_fields(body)
    return ServerError(
        fields.get("M", "the server refused the connection"),
        detail=fields.get("D", ""),
        hint=fields.get("H", ""),
        sqlstate=m.sqlstate_of(body),
    )


async def send_cancel(
    address: Address, policy: TlsPolicy, packet: bytes, *, is_encrypted: bool, deadline: float
) -> None:
    """Send a cancel request to the address of a connection, encrypted if that is.

    PostgreSQL closes the connection after it has signalled the backend (54.2.9). Raises OSError,
    TlsFailed, ServerProtocolError, ServerUnavailable.
    """
    link: Link | None = None
    try:
        async with asyncio.timeout_at(deadline):
            link = await connect(address, {}, Traffic())
            if is_encrypted:
                await encrypt(link, address, policy)
                if link.encryption is None:  # it had TLS when the connection was made
                    raise TlsFailed("the server has no TLS any more")
            link.write(packet)
            await link.closed()
    finally:
        if link is not None:
            link.abort()
