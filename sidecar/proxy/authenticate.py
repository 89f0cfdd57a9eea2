"""How a client proves who it is: which method applies, the exchange, what follows a failure.

Owns the answers, which are the same for a wrong password and for a user that does not exist, and
their delay. What a user has to prove is known by ``credentials``, which rule is for whom by ``hba``;
the socket is the session's.
"""

import asyncio
import logging
from typing import Final, Protocol, assert_never

from pydantic import SecretStr

from sidecar.config import Config, PoolConfig
from sidecar.config_values import CONSOLE_DATABASE, PGBOUNCER
from sidecar.errors import AuthenticationFailed, ClientProtocolError
from sidecar.hba import Method, Peer, Rule, first_match
from sidecar.pool.opening import Spawn
from sidecar.pool.server import clock
from sidecar.protocol import messages as m
from sidecar.protocol.authentication import (
    MECHANISM,
    MECHANISM_PLUS,
    ServerExchange,
    knows_password,
)
from sidecar.proxy.credentials import Credential, Credentials
from sidecar.proxy.login import Login

log = logging.getLogger("pgsidecar.proxy")


_MAX_PASSWORD: Final = 4096
"""Bytes of a password that is said. One of 64 KiB can cost a second of CPU (SASLprep)."""


class Unproven(Protocol):
    """A client in login, as a session offers it."""

    @property
    def address(self) -> str:
        """For messages and the log."""

    @property
    def end_point(self) -> bytes | None:
        """What a login over TLS can be bound to; None: nothing."""

    def peer(self) -> Peer: ...

    def certificate_name(self) -> str | None:
        """The common name in its certificate, proved by TLS and signed by a CA of ours."""

    def write(self, data: bytes) -> None: ...

    async def password_message(self) -> bytes:
        """The body of the next message, which has to be of type ``p``."""

    async def linger(self, seconds: float) -> None:
        """Let time pass; returns early if the client goes."""


class Authenticator:
    def __init__(self, config: Config, spawn: Spawn) -> None:
        self._rules: Final = config.listen.rules
        self._default: Final = Method(config.listen.auth)
        self._delay: Final = config.listen.auth_failure_delay
        self._credentials: Final = Credentials(config.users, config.pools, spawn)

    async def authenticate(
        self, client: Unproven, user: str, database: str, pool: PoolConfig | None, deadline: float
    ) -> Login:
        """Without a pool: for the console, or for a database that does not exist.

        Raises AuthenticationFailed, after a delay that ends before ``deadline``.
        """
        try:
            return await self._prove(client, user, database, pool, deadline)
        except AuthenticationFailed as exc:
            where = {"client": client.address, "user": user, "pool": pool and pool.name}
            if name := client.certificate_name():
                where["certificate"] = name
            log.warning("authentication failed", extra=where)
            self._credentials.forget(user, pool)
            if exc.sqlstate.startswith("28"):
                await client.linger(min(self._delay, deadline - 0.1 - clock()))
            raise

    def close(self) -> None:
        """At the stop."""
        self._credentials.close()

    async def _prove(
        self, client: Unproven, user: str, database: str, pool: PoolConfig | None, deadline: float
    ) -> Login:
        rule = self._rule(client, user, database, pool) if self._rules else None
        method = self._default if rule is None else rule.method
        if rule is not None and rule.checks_certificate:
            _check_certificate(rule, client.certificate_name(), user)
        match method:
            case Method.SCRAM:
                return await self._scram(client, user, database, pool, deadline)
            case Method.PASSWORD:
                return await self._password(client, user, database, pool, deadline)
            case Method.TRUST | Method.CERT:
                return Login(user, database, password=await self._credentials.password(user))
            case Method.REJECT:
                raise AssertionError("refused by _rule")
            case _:
                assert_never(method)

    def _rule(self, client: Unproven, user: str, database: str, pool: PoolConfig | None) -> Rule:
        """The rule for this client. Raises AuthenticationFailed if it lets nobody in."""
        peer = client.peer()
        # A pool may be asked for by two names: a rule for either is a rule for the pool. So may the
        # console; where its other name means no pool and no console, nobody gets in anyway.
        if pool is not None:
            databases = [database, pool.name, pool.target.database]
        else:
            databases = [database, CONSOLE_DATABASE] if database == PGBOUNCER else [database]
        rule = first_match(self._rules, peer, databases, user)
        if rule is not None and rule.method is not Method.REJECT:
            return rule
        said = "have no entry for" if rule is None else "reject connection for"
        encryption = "SSL encryption" if peer.is_encrypted else "no encryption"
        raise AuthenticationFailed(
            f'the pool\'s rules {said} {peer.describe()}, user "{user}", database "{database}",'
            f" {encryption}",
            hint="The rules are in listen.hba; the first that fits counts.",
            sqlstate="28000",
        )

    # -- passwords -----------------------------------------------------------------------------

    async def _credential(self, user: str, pool: PoolConfig | None, deadline: float) -> Credential:
        """Of a user that is not known, one that nobody can satisfy."""
        found = await self._credentials.find(user, pool, deadline)
        return found or self._credentials.nobodys(user, pool)

    async def _scram(
        self, client: Unproven, user: str, database: str, pool: PoolConfig | None, deadline: float
    ) -> Login:
        credential = await self._credential(user, pool, deadline)
        offered = [MECHANISM.encode()]
        if client.end_point is not None:
            offered.insert(0, MECHANISM_PLUS.encode())
        client.write(m.authentication(m.AUTH_SASL, b"\0".join(offered) + b"\0\0"))
        body = await client.password_message()
        mechanism, _, rest = body.partition(b"\0")
        if mechanism not in offered or len(rest) < 4:
            raise ClientProtocolError("client selected an invalid SASL authentication mechanism")
        exchange = ServerExchange(
            credential.verifier,
            end_point=client.end_point,
            is_bound=mechanism == MECHANISM_PLUS.encode(),
        )
        client.write(m.authentication(m.AUTH_SASL_CONTINUE, exchange.first(rest[4:])))
        try:
            final = exchange.final(await client.password_message())
        except AuthenticationFailed as exc:
            raise _wrong_password(user) if exc.sqlstate == "28P01" else exc from None
        client.write(m.authentication(m.AUTH_SASL_FINAL, final))
        return Login(user, database, exchange.keys, credential.password)

    async def _password(
        self, client: Unproven, user: str, database: str, pool: PoolConfig | None, deadline: float
    ) -> Login:
        client.write(m.authentication(m.AUTH_CLEARTEXT))
        body = await client.password_message()
        if body[-1:] != b"\0" or b"\0" in body[:-1]:
            raise ClientProtocolError("invalid password packet size")
        if len(body) > _MAX_PASSWORD + 1:
            raise _wrong_password(user)
        try:
            said = body[:-1].decode()
        except UnicodeDecodeError:
            raise _wrong_password(user) from None
        credential = await self._credential(user, pool, deadline)
        # in a thread: PBKDF2 would stall every client for milliseconds
        if not await asyncio.to_thread(knows_password, credential.verifier, said):
            raise _wrong_password(user)
        return Login(user, database, password=SecretStr(said))


def _check_certificate(rule: Rule, name: str | None, user: str) -> None:
    """Before any password: who has another's certificate cannot try passwords with it."""
    if name is None:
        raise AuthenticationFailed(
            "connection requires a valid client certificate",
            hint="Connect with sslcert and sslkey: a certificate of a CA in listen.tls_ca_file.",
            sqlstate="28000",
        )
    if rule.names_user and name != user:
        raise AuthenticationFailed(
            f'certificate authentication failed for user "{user}"',
            hint="The common name of the certificate has to be the user's name.",
            sqlstate="28000",
        )


def _wrong_password(user: str) -> AuthenticationFailed:
    return AuthenticationFailed(f'password authentication failed for user "{user}"')
