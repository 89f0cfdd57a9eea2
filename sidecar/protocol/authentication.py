"""The steps of password authentication, both sides (PostgreSQL manual 54.3; RFC 5802, RFC 7677).

No I/O. The one module that imports scramp. Deriving keys from a password costs milliseconds
(PBKDF2, 4096 rounds): callers run ``make_verifier`` and ``ClientExchange.respond`` in a thread.
"""

import hashlib
import hmac
import secrets
from dataclasses import dataclass

import scramp

from sidecar.errors import AuthenticationFailed, ServerProtocolError

MECHANISM = "SCRAM-SHA-256"

_ITERATIONS = 4096  # PostgreSQL's scram_iterations
_SALT_SIZE = 16  # bytes; PostgreSQL's SCRAM_DEFAULT_SALT_LEN

_REFUSED = (scramp.ScramException, ValueError, TypeError)
"""What scramp raises for a message that is wrong; TypeError where one is not ASCII."""

_MOCK_KEY = secrets.token_bytes(32)


@dataclass(frozen=True, slots=True, repr=False)
class ScramVerifier:
    """What a server keeps instead of a password (RFC 5802, 3)."""

    salt: bytes
    stored_key: bytes
    server_key: bytes
    iterations: int


def make_verifier(password: str) -> ScramVerifier:
    """About 4 ms of CPU."""
    salt, stored, server, rounds = scramp.ScramMechanism(MECHANISM).make_auth_info(
        password, iteration_count=_ITERATIONS, salt=secrets.token_bytes(_SALT_SIZE)
    )
    return ScramVerifier(salt, stored, server, rounds)


def mock_verifier(user: str) -> ScramVerifier:
    """For a user that does not exist: looks like one who does, always with the same salt.

    So a stranger cannot find out which users there are (PostgreSQL's mock authentication).
    """
    salt = hmac.digest(_MOCK_KEY, user.encode("utf-8", "replace"), "sha256")[:_SALT_SIZE]
    return ScramVerifier(salt, secrets.token_bytes(32), secrets.token_bytes(32), _ITERATIONS)


class ServerExchange:
    """We are the server: a client proves that it knows the password."""

    def __init__(self, verifier: ScramVerifier) -> None:
        known = (verifier.salt, verifier.stored_key, verifier.server_key, verifier.iterations)
        # The name inside SCRAM is ignored, as PostgreSQL does: libpq sends an empty one.
        self._scram = scramp.ScramMechanism(MECHANISM).make_server(lambda _user: known)

    def first(self, data: bytes) -> bytes:
        """client-first-message to server-first-message. Raises AuthenticationFailed."""
        try:
            self._scram.set_client_first(data.decode("utf-8"))
            return str(self._scram.get_server_first()).encode()
        except _REFUSED as exc:
            raise AuthenticationFailed(f"malformed SCRAM message: {exc}", sqlstate="08P01") from exc

    def final(self, data: bytes) -> bytes:
        """client-final-message to server-final-message. Raises AuthenticationFailed."""
        try:
            self._scram.set_client_final(data.decode("utf-8"))
            return str(self._scram.get_server_final()).encode()
        except _REFUSED as exc:
            raise AuthenticationFailed("password authentication failed") from exc


class ClientExchange:
    """We are the client: we prove to the server that we know the password."""

    def __init__(self, password: str) -> None:
        # PostgreSQL takes the user from the startup packet and ignores the name sent here.
        self._scram = scramp.ScramClient([MECHANISM], "*", password)
        self.is_verified = False  # the server has proved that it knows us

    def begin(self) -> bytes:
        return str(self._scram.get_client_first()).encode()

    def respond(self, data: bytes) -> bytes:
        """server-first-message to client-final-message; about 4 ms of CPU, more if the server wants."""
        try:
            self._scram.set_server_first(data.decode("utf-8"))
            return str(self._scram.get_client_final()).encode()
        except _REFUSED as exc:
            raise ServerProtocolError(f"malformed SCRAM message from the server: {exc}") from exc

    def verify(self, data: bytes) -> None:
        """server-final-message: the server proves that it knows us. Raises ServerProtocolError."""
        try:
            self._scram.set_server_final(data.decode("utf-8"))
        except _REFUSED as exc:
            raise ServerProtocolError(
                "the server did not prove that it knows the password"
            ) from exc
        self.is_verified = True


def md5_response(user: str, password: str, salt: bytes) -> bytes:
    """Answer to AuthenticationMD5Password (54.2.1)."""
    inner = hashlib.md5(password.encode() + user.encode()).hexdigest().encode()
    return b"md5" + hashlib.md5(inner + salt).hexdigest().encode() + b"\0"
