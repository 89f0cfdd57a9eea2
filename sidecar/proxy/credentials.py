"""What each user has to prove: verifiers of the configured passwords, files and connection strings.

A verifier of a password costs milliseconds (PBKDF2): it is made in a thread, for the first login
that needs it, once for all that come meanwhile. So the start takes no longer with thousands of users.
"""

import asyncio
import logging
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass

from pydantic import SecretStr

from sidecar.config import PoolConfig, UserConfig
from sidecar.pool.opening import Spawn
from sidecar.protocol.authentication import (
    ScramVerifier,
    make_verifier,
    mock_verifier,
    parse_verifier,
)
from sidecar.proxy.lookup import Lookup

log = logging.getLogger("pgsidecar.proxy")

_MAX_PASSWORD_FILE = 4096
"""Bytes of a password file that are read; its first line has to end in them."""


@dataclass(frozen=True, slots=True, repr=False)
class Credential:
    """What a user has to prove, and its password where we know it."""

    verifier: ScramVerifier
    password: SecretStr | None = None


class Credentials:
    def __init__(
        self, users: Mapping[str, UserConfig], pools: Mapping[str, PoolConfig], spawn: Spawn
    ) -> None:
        self._users = users
        self._pools = pools
        self._lookups = {
            name: Lookup(pool, spawn) for name, pool in pools.items() if pool.auth_query
        }
        self._made: dict[
            tuple[str | None, str], tuple[SecretStr, asyncio.Future[ScramVerifier]]
        ] = {}
        """By pool (None: of ``users``) and user: the password, and the verifier made of it."""

    async def find(self, user: str, pool: PoolConfig | None, deadline: float) -> Credential | None:
        """Of ``users``, else of the pool's connection string, else of its ``auth_query``; None for
        anybody else, and for a user whose password file cannot be used.

        Without a pool the client has named one that does not exist. That is told to those who may
        know: the users of all connection strings.
        """
        entry = self._users.get(user)
        if entry is not None:
            if entry.verifier is not None:
                return Credential(parse_verifier(entry.verifier.get_secret_value()))
            password = await self.password(user)
            return None if password is None else await self._made_of(None, user, password)
        for each in (pool,) if pool is not None else self._pools.values():
            target = each.target
            if target.user == user and target.password is not None:
                return await self._made_of(each.name, user, target.password)
        lookup = None if pool is None else self._lookups.get(pool.name)
        verifier = None if lookup is None else await lookup.find(user, deadline)
        return None if verifier is None else Credential(verifier)

    def nobodys(self, user: str, pool: PoolConfig | None) -> Credential:
        """One that nobody can satisfy, for a user that is not known. It looks like those that are
        looked up for this pool."""
        lookup = None if pool is None else self._lookups.get(pool.name)
        if lookup is None or lookup.iterations is None:
            return Credential(mock_verifier(user))
        return Credential(mock_verifier(user, lookup.iterations))

    def forget(self, user: str, pool: PoolConfig | None) -> None:
        """A login failed: what has been looked up may be out of date."""
        lookup = None if pool is None else self._lookups.get(pool.name)
        if lookup is not None:
            lookup.forget(user)

    def close(self) -> None:
        for lookup in self._lookups.values():
            lookup.close()

    async def password(self, user: str) -> SecretStr | None:
        """The password that ``users`` has for this user, if any."""
        entry = self._users.get(user)
        if entry is None or entry.password_file is None:
            return None if entry is None else entry.password
        try:
            return SecretStr(await asyncio.to_thread(first_line, entry.password_file))
        except (OSError, ValueError) as exc:
            log.error(
                "password file cannot be used",
                extra={
                    "user": user,
                    "file": entry.password_file,
                    "cause": getattr(exc, "strerror", None) or str(exc),
                },
            )
            return None

    async def _made_of(self, pool: str | None, user: str, secret: SecretStr) -> Credential:
        known, made = self._made.get((pool, user), (None, None))
        if made is None or known != secret:
            loop = asyncio.get_running_loop()
            made = loop.run_in_executor(None, make_verifier, secret.get_secret_value(), user)
            self._made[pool, user] = secret, made
        await asyncio.wait((made,))  # not "await made": who is cancelled would cancel it for all
        return Credential(made.result(), secret)


def first_line(path: str) -> str:
    """Raises OSError, or ValueError with what is wrong, which quotes nothing from the file."""
    # A named pipe without a writer would block for ever.
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError("it is not a file")
        data = file.read(_MAX_PASSWORD_FILE + 1)
    line, newline, _ = data.partition(b"\n")
    if not newline and len(data) > _MAX_PASSWORD_FILE:
        raise ValueError(f"its first line has more than {_MAX_PASSWORD_FILE} bytes")
    line = line.removesuffix(b"\r")
    if not line:
        raise ValueError("its first line is empty")
    if b"\0" in line:
        raise ValueError("its first line contains a zero byte")
    try:
        return line.decode()
    except UnicodeDecodeError:
        raise ValueError("its first line is not UTF-8 text") from None
