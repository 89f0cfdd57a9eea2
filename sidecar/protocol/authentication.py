"""The steps of password authentication, both sides (PostgreSQL manual 54.3; RFC 5802, RFC 7677).

No I/O. The one module that imports scramp. Deriving keys from a password costs milliseconds
(PBKDF2, 4096 rounds): callers run ``make_verifier`` and ``ClientExchange.respond`` in a thread.
"""

import base64
import hashlib
import hmac
import secrets
from collections.abc import Collection
from dataclasses import dataclass

import scramp
from scramp.core import saslprep

from sidecar.errors import AuthenticationFailed, ServerError, ServerProtocolError

MECHANISM = "SCRAM-SHA-256"
MECHANISM_PLUS = "SCRAM-SHA-256-PLUS"
"""With channel binding: the proof holds for this TLS connection only."""

_ITERATIONS = 4096  # PostgreSQL's scram_iterations
_SALT_SIZE = 16  # bytes; PostgreSQL's SCRAM_DEFAULT_SALT_LEN

_REFUSED = (scramp.ScramException, ValueError, TypeError)
"""What scramp raises for a message that is wrong; TypeError where one is not ASCII."""

_MOST_ITERATIONS = 10_000_000
"""A server that asks for more wants our CPU: this many take seconds already (scramp's limit, too)."""

_SALT_KEY = secrets.token_bytes(32)


@dataclass(frozen=True, slots=True, repr=False)
class ScramVerifier:
    """What a server keeps instead of a password (RFC 5802, 3)."""

    salt: bytes
    stored_key: bytes
    server_key: bytes
    iterations: int


@dataclass(frozen=True, slots=True, repr=False)
class ScramKeys:
    """What logs in to a server in place of the password (libpq's scram_client_key, scram_server_key).

    They are good for one user, until its password is set anew.
    """

    client_key: bytes
    server_key: bytes


def derive_keys(password: str, salt: bytes, iterations: int) -> ScramKeys:
    """About 4 ms of CPU at 4096 iterations."""
    salted = hashlib.pbkdf2_hmac("sha256", _prepared(password), salt, iterations)
    return ScramKeys(
        hmac.digest(salted, b"Client Key", "sha256"), hmac.digest(salted, b"Server Key", "sha256")
    )


def _prepared(password: str) -> bytes:
    """SASLprep as PostgreSQL does it: what it prohibits is taken as it is (54.3.1)."""
    if password.isascii():
        return password.encode()
    try:
        return (str(saslprep(password)) or password).encode()
    except scramp.ScramException:
        return password.encode()


def make_verifier(password: str, user: str) -> ScramVerifier:
    """About 4 ms of CPU."""
    salt = _salt_of(user)
    keys = derive_keys(password, salt, _ITERATIONS)
    stored_key = hashlib.sha256(keys.client_key).digest()
    return ScramVerifier(salt, stored_key, keys.server_key, _ITERATIONS)


def mock_verifier(user: str, iterations: int = _ITERATIONS) -> ScramVerifier:
    """For a user that does not exist: looks like one who does, always with the same salt.

    So a stranger cannot find out which users there are (PostgreSQL's mock authentication).
    """
    keys = secrets.token_bytes(32), secrets.token_bytes(32)
    return ScramVerifier(_salt_of(user), *keys, iterations)


def _salt_of(user: str) -> bytes:
    """The same whether the user exists, and in each pool: else who compares would learn it."""
    return hmac.digest(_SALT_KEY, user.encode("utf-8", "replace"), "sha256")[:_SALT_SIZE]


class ServerExchange:
    """We are the server: a client proves that it knows the password.

    ``end_point`` is our certificate's hash (``server_end_point``) where the connection has TLS and we
    have offered to bind the login to it; ``is_bound`` where the client has chosen that.
    """

    def __init__(
        self, verifier: ScramVerifier, *, end_point: bytes | None = None, is_bound: bool = False
    ) -> None:
        self.keys: ScramKeys | None = None
        """After ``final``: what the client's proof gave away, enough to log in to the server as it."""
        self._verifier = verifier
        self._said: list[bytes] = []
        known = (verifier.salt, verifier.stored_key, verifier.server_key, verifier.iterations)
        # The name inside SCRAM is ignored, as PostgreSQL does: libpq sends an empty one.
        self._is_bound = is_bound
        self._has_offered = end_point is not None
        self._scram = scramp.ScramMechanism(MECHANISM_PLUS if is_bound else MECHANISM).make_server(
            lambda _user: known,
            None if end_point is None else ("tls-server-end-point", end_point),
        )

    def first(self, data: bytes) -> bytes:
        """client-first-message to server-first-message. Raises AuthenticationFailed."""
        if self._has_offered and data[:1] == b"y":
            # Somebody in between has taken our offer away (RFC 5802, 6).
            raise AuthenticationFailed(
                "SCRAM channel binding negotiation error",
                detail="The client supports SCRAM channel binding but thinks the server does not."
                "  However, this server does support channel binding.",
                sqlstate="28000",
            )
        if (data[:1] == b"p") != self._is_bound:
            raise AuthenticationFailed(
                "malformed SCRAM message: channel binding in it is not that of the mechanism",
                sqlstate="08P01",
            )
        try:
            self._scram.set_client_first(data.decode("utf-8"))
            challenge = str(self._scram.get_server_first()).encode()
        except _REFUSED as exc:
            raise AuthenticationFailed(f"malformed SCRAM message: {exc}", sqlstate="08P01") from exc
        self._said = [data.split(b",", 2)[2], challenge]
        return challenge

    def final(self, data: bytes) -> bytes:
        """client-final-message to server-final-message. Raises AuthenticationFailed."""
        try:
            self._scram.set_client_final(data.decode("utf-8"))
            answer = str(self._scram.get_server_final()).encode()
        except _REFUSED as exc:
            if "channel-bindings-dont-match" in str(exc):
                raise AuthenticationFailed(
                    "SCRAM channel binding check failed", sqlstate="28000"
                ) from exc
            raise AuthenticationFailed("password authentication failed") from exc
        part = dict(each.split(b"=", 1) for each in data.split(b","))
        said = b",".join([*self._said, b"c=" + part[b"c"], b"r=" + part[b"r"]])
        signature = _sign(self._verifier.stored_key, said)
        client_key = _xor(base64.b64decode(part[b"p"]), signature)
        self.keys = ScramKeys(client_key, self._verifier.server_key)
        return answer


class ClientExchange:
    """We are the client: we prove to the server that we know the password, or the keys made of it.

    ``end_point`` is the server certificate's hash (``server_end_point``): with it, the exchange is
    bound to the TLS connection. ``could_bind`` tells a server that offers no binding that we would
    have bound: one that did offer it knows then that somebody between us has removed the offer.
    """

    def __init__(
        self,
        secret: str | ScramKeys,
        *,
        end_point: bytes | None = None,
        could_bind: bool = False,
    ) -> None:
        self.mechanism = MECHANISM if end_point is None else MECHANISM_PLUS
        self.is_verified = False  # the server has proved that it knows us
        self._secret = secret
        if end_point is not None:
            self._flag, self._binding = b"p=tls-server-end-point,,", end_point
        else:
            self._flag, self._binding = (b"y,," if could_bind else b"n,,"), b""
        self._nonce = base64.b64encode(secrets.token_bytes(18))  # as long as libpq's
        # PostgreSQL takes the user from the startup packet and ignores the name sent here.
        self._first = b"n=*,r=" + self._nonce
        self._signature = b""

    def begin(self) -> bytes:
        return self._flag + self._first

    def respond(self, data: bytes) -> bytes:
        """server-first-message to client-final-message; about 4 ms of CPU, more if the server wants."""
        nonce, salt, iterations = self._challenge(data)
        secret = self._secret
        keys = derive_keys(secret, salt, iterations) if isinstance(secret, str) else secret
        bare = b"c=" + base64.b64encode(self._flag + self._binding) + b",r=" + nonce
        said = b",".join([self._first, data, bare])
        stored_key = hashlib.sha256(keys.client_key).digest()
        proof = _xor(keys.client_key, _sign(stored_key, said))
        self._signature = _sign(keys.server_key, said)
        return bare + b",p=" + base64.b64encode(proof)

    def _challenge(self, data: bytes) -> tuple[bytes, bytes, int]:
        """Nonce, salt and iterations of a server-first-message; nothing else may be in it."""
        try:
            nonce, salt, rounds = data.split(b",")
            if (nonce[:2], salt[:2], rounds[:2]) != (b"r=", b"s=", b"i="):
                raise ValueError("unexpected attribute")
            if not nonce[2:].startswith(self._nonce):
                raise ValueError("the nonce is not ours")
            iterations = int(rounds[2:])
            if not 1 <= iterations <= _MOST_ITERATIONS:
                raise ValueError(f"{iterations} iterations, allowed are 1 to {_MOST_ITERATIONS}")
            return nonce[2:], base64.b64decode(salt[2:], validate=True), iterations
        except ValueError as exc:
            raise ServerProtocolError(f"malformed SCRAM message from the server: {exc}") from exc

    def verify(self, data: bytes) -> None:
        """server-final-message: the server proves that it knows us. Raises ServerProtocolError."""
        proof = b"v=" + base64.b64encode(self._signature)
        if not self._signature or not hmac.compare_digest(data, proof):
            raise ServerProtocolError("the server did not prove that it knows the password")
        self.is_verified = True


def choose_exchange(
    secret: str | ScramKeys,
    offered: Collection[bytes],
    *,
    channel_binding: str,
    is_encrypted: bool,
    end_point: bytes | None,
) -> ClientExchange:
    """The mechanism for a server that offers these, by libpq's rules.

    ``channel_binding`` is disable, prefer or require. ``end_point`` is None without TLS, and where
    the certificate's kind of signature defines none (Ed25519). Raises ServerError, and
    ServerProtocolError for what only somebody between us and the server would offer.
    """
    plain, plus = MECHANISM.encode() in offered, MECHANISM_PLUS.encode() in offered
    if plus and not is_encrypted:
        raise ServerProtocolError(
            f"the server offers {MECHANISM_PLUS} over a connection without TLS"
        )
    can_bind = end_point is not None and channel_binding != "disable"
    if plus and can_bind:
        return ClientExchange(secret, end_point=end_point)
    if channel_binding == "require":
        why = "the server offers none" if is_encrypted else "the connection has no TLS"
        if plus:
            why = "the server's certificate has a signature that defines none"
        raise ServerError(f"channel binding is required, but {why}", sqlstate="28000")
    if not plain:
        names = ", ".join(sorted(name.decode("ascii", "replace") for name in offered if name))
        raise ServerError(
            f"the server offers no SASL mechanism that we have ({names[:200] or 'none'})",
            sqlstate="28000",
            hint=f"Available: {MECHANISM}, and {MECHANISM_PLUS} over TLS.",
        )
    return ClientExchange(secret, could_bind=can_bind)


_WITHOUT_HASH = (
    (bytes.fromhex("300506032b6570034100"), 64),
    (bytes.fromhex("300506032b6571037300"), 114),
)
"""How certificates signed with Ed25519 and Ed448 end (RFC 8410): this, and a signature of so many bytes."""


class _Certificate:
    """What scramp asks for: something with a TLS peer's certificate."""

    def __init__(self, der: bytes) -> None:
        self._der = der

    def getpeercert(self, binary_form: bool) -> bytes:
        return self._der


def server_end_point(certificate: bytes) -> bytes | None:
    """Channel binding of a server with this certificate, in DER (RFC 5929, 4: tls-server-end-point).

    None where its signature has no hash of its own, as Ed25519, or one that is not known here.
    """
    if any(certificate[:-size].endswith(end) for end, size in _WITHOUT_HASH):
        return None  # scramp would take the hash that is inside the algorithm; PostgreSQL does not
    try:
        _, digest = scramp.make_channel_binding("tls-server-end-point", _Certificate(certificate))
    except _REFUSED:
        return None
    return bytes(digest)


def _sign(key: bytes, message: bytes) -> bytes:
    return hmac.digest(key, message, "sha256")


def _xor(one: bytes, other: bytes) -> bytes:
    return bytes(a ^ b for a, b in zip(one, other, strict=True))


def md5_response(user: str, password: str, salt: bytes) -> bytes:
    """Answer to AuthenticationMD5Password (54.2.1)."""
    inner = hashlib.md5(password.encode() + user.encode()).hexdigest().encode()
    return b"md5" + hashlib.md5(inner + salt).hexdigest().encode() + b"\0"


def parse_verifier(text: str) -> ScramVerifier:
    """Of ``SCRAM-SHA-256$<iterations>:<salt>$<StoredKey>:<ServerKey>`` (pg_authid.rolpassword).

    Raises ValueError, which quotes nothing of it.
    """
    try:
        mechanism, parameters, keys = text.split("$")
        rounds, salt = parameters.split(":")
        stored, server = (base64.b64decode(key, validate=True) for key in keys.split(":"))
        iterations = int(rounds)
        if mechanism != MECHANISM or not 1 <= iterations <= _MOST_ITERATIONS:
            raise ValueError("another mechanism, or too many iterations")
        if not len(stored) == len(server) == 32:
            raise ValueError("a key is not one of SHA-256")
        return ScramVerifier(base64.b64decode(salt, validate=True), stored, server, iterations)
    except ValueError:
        raise ValueError("is not a SCRAM-SHA-256 verifier") from None


def knows_password(verifier: ScramVerifier, password: str) -> bool:
    """Whether the verifier was made of this password; as slow as ``make_verifier``."""
    keys = derive_keys(password, verifier.salt, verifier.iterations)
    return hmac.compare_digest(hashlib.sha256(keys.client_key).digest(), verifier.stored_key)
