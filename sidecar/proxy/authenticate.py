"""How a client proves who it is: which method applies, the exchange, what follows a failure.

Owns the answers, which are the same for a wrong password and for a user that does not exist, and
their delay. What a user has to prove is known by ``credentials``, where a client may come from by
``hba``; the socket is the session's.
"""

import logging
from typing import Final, Protocol

from sidecar.config import Config, PoolConfig
from sidecar.errors import AuthenticationFailed, ClientProtocolError
from sidecar.pool.server import clock
from sidecar.protocol import messages as m
from sidecar.protocol.authentication import (
    MECHANISM,
    MECHANISM_PLUS,
    ServerExchange,
    mock_verifier,
)
from sidecar.proxy.credentials import Credential, Credentials
from sidecar.proxy.login import Login

log = logging.getLogger("pgsidecar.proxy")


class Unproven(Protocol):
    """A client in login, as a session offers it."""

    @property
    def address(self) -> str:
        """For messages and the log."""

    @property
    def is_encrypted(self) -> bool: ...

    @property
    def end_point(self) -> bytes | None:
        """What a login over TLS can be bound to; None: nothing."""

    def certificate_name(self) -> str | None:
        """The common name in its certificate, proved by TLS and signed by a CA of ours."""

    def write(self, data: bytes) -> None: ...

    async def password_message(self) -> bytes:
        """The body of the next message, which has to be of type ``p``."""

    async def linger(self, seconds: float) -> None:
        """Let time pass; returns early if the client goes."""


class Authenticator:
    def __init__(self, config: Config) -> None:
        self._trusts: Final = config.listen.auth == "trust"
        self._delay: Final = config.listen.auth_failure_delay
        self._credentials: Final = Credentials(config.users, config.pools)

    async def authenticate(
        self, client: Unproven, user: str, database: str, pool: PoolConfig | None, deadline: float
    ) -> Login:
        """Raises AuthenticationFailed, after a delay that ends before ``deadline``."""
        try:
            return await self._prove(client, user, database, pool)
        except AuthenticationFailed as exc:
            log.warning(
                "authentication failed",
                extra={
                    "client": client.address,
                    "user": user,
                    "pool": None if pool is None else pool.name,
                },
            )
            if exc.sqlstate.startswith("28"):
                await client.linger(min(self._delay, deadline - 0.1 - clock()))
            raise

    async def _prove(
        self, client: Unproven, user: str, database: str, pool: PoolConfig | None
    ) -> Login:
        if self._trusts:
            return Login(user, database, password=await self._credentials.password(user))
        found = await self._credentials.find(user, pool)
        return await self._scram(client, user, database, found or Credential(mock_verifier(user)))

    async def _scram(
        self, client: Unproven, user: str, database: str, credential: Credential
    ) -> Login:
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


def _wrong_password(user: str) -> AuthenticationFailed:
    return AuthenticationFailed(f'password authentication failed for user "{user}"')
