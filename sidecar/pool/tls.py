"""TLS towards servers: the settings of a connection, made of files that may be replaced at any time.

Owns the contexts (one for each policy, made anew when one of its files has changed) and the words for
what goes wrong. Does not own when TLS is used, nor the handshake: ``pool.link`` does.
"""

import asyncio
import ipaddress
import os
import re
import ssl
import stat
from typing import Final

from sidecar.errors import TlsFailed
from sidecar.target import SslMode, TlsPolicy

ALPN: Final = "postgresql"
"""What we say we want to speak, as libpq 17 does: no other server takes our bytes for its own."""

_MOST_CONTEXTS: Final = 256  # one for each policy in the configuration; there are not so many

_VERSIONS = {"TLSv1.2": ssl.TLSVersion.TLSv1_2, "TLSv1.3": ssl.TLSVersion.TLSv1_3}

_STRANGERS: Final = frozenset({18, 19, 20, 21})
"""X509_V_ERR_...: self-signed, also within the chain; its issuer, or the first one's, is not known."""

_Signature = tuple[tuple[int, ...], ...]
_contexts: dict[TlsPolicy, tuple[_Signature, ssl.SSLContext]] = {}


async def context_for(policy: TlsPolicy) -> ssl.SSLContext:
    """The context for a new connection. Raises TlsFailed where a file is missing or unusable."""
    # in a thread: reading all CAs of a system takes 20 ms, and any file may be on a network
    return await asyncio.to_thread(_current, policy)


def _current(policy: TlsPolicy) -> ssl.SSLContext:
    signature = tuple(_look_at(path) for path in _files(policy))
    known = _contexts.get(policy)
    if known is not None and known[0] == signature:
        return known[1]
    context = _load(policy)
    if len(_contexts) >= _MOST_CONTEXTS:
        _contexts.clear()
    _contexts[policy] = signature, context
    return context


def _files(policy: TlsPolicy) -> list[str]:
    root = "" if policy.root == "system" else policy.root
    return [path for path in (root, policy.certificate, policy.key, policy.revoked) if path]


def _look_at(path: str) -> tuple[int, ...]:
    try:
        found = os.stat(path)
    except OSError as exc:
        raise TlsFailed(f"cannot read {path}: {exc.strerror}") from exc
    return found.st_mtime_ns, found.st_ctime_ns, found.st_ino, found.st_size


def _load(policy: TlsPolicy) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = _VERSIONS[policy.oldest]
    if policy.newest:
        context.maximum_version = _VERSIONS[policy.newest]
    context.set_alpn_protocols([ALPN])
    context.check_hostname = policy.mode is SslMode.VERIFY_FULL
    # As with libpq, whoever names a CA has it checked, whatever the mode.
    context.verify_mode = ssl.CERT_REQUIRED if policy.root else ssl.CERT_NONE
    if policy.root == "system":
        context.set_default_verify_paths()
    elif policy.root:
        _read(policy.root, "CA certificates", context)
    if policy.root and policy.revoked:
        _read(policy.revoked, "revoked certificates", context)
        context.verify_flags |= ssl.VERIFY_CRL_CHECK_CHAIN
    if policy.certificate:
        _load_certificate(policy, context)
    return context


def _read(path: str, what: str, context: ssl.SSLContext) -> None:
    try:
        context.load_verify_locations(path)
    except ssl.SSLError as exc:
        raise TlsFailed(f"cannot load {what} from {path}: {_reason(exc)}") from exc
    except OSError as exc:
        raise TlsFailed(f"cannot load {what} from {path}: {exc.strerror}") from exc


def _load_certificate(policy: TlsPolicy, context: ssl.SSLContext) -> None:
    found = os.stat(policy.key)
    # libpq's rule: secrets that others can read are none
    allowed = 0o640 if found.st_uid == 0 else 0o600
    if stat.S_IMODE(found.st_mode) & ~allowed & 0o077:
        raise TlsFailed(
            f"others have access to the private key {policy.key}",
            hint="Its mode has to be 0600, or 0640 where it belongs to root.",
        )
    password = policy.key_password.get_secret_value() if policy.key_password else ""
    try:
        # always with a password: without, OpenSSL would ask for one on the terminal
        context.load_cert_chain(policy.certificate, policy.key, password)
    except ssl.SSLError as exc:
        raise TlsFailed(
            f"cannot load the certificate {policy.certificate} with its key: {_reason(exc)}"
        ) from exc
    except OSError as exc:
        raise TlsFailed(
            f"cannot load the certificate {policy.certificate} with its key: {exc.strerror}"
        ) from exc


def server_name(policy: TlsPolicy, host: str) -> str | None:
    """What the server is told it is called (SNI), and what its certificate is checked for."""
    if policy.mode is SslMode.VERIFY_FULL:
        return host  # ``ssl`` sends no address
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return host if policy.names_server else None
    return None


def failure(exc: BaseException) -> TlsFailed:
    """What a handshake, or what came of it later, failed for."""
    if isinstance(exc, ssl.SSLCertVerificationError):
        is_strange = exc.verify_code in _STRANGERS
        hint = "sslrootcert has to have the CA that signed it." if is_strange else ""
        return TlsFailed(f"the server's certificate is refused: {exc.verify_message}", hint=hint)
    if isinstance(exc, ssl.SSLError):
        return TlsFailed(f"TLS with the server failed: {_reason(exc)}")
    return TlsFailed(f"TLS with the server failed: {exc}")


def cut_off(policy: TlsPolicy) -> TlsFailed:
    """The connection was lost during the handshake."""
    return TlsFailed(
        "the server closed the connection during the TLS handshake",
        hint="sslnegotiation=direct needs PostgreSQL 17 or newer." if policy.is_direct else "",
    )


def _reason(exc: ssl.SSLError) -> str:
    """OpenSSL's reason as words: TLSV1_ALERT_UNKNOWN_CA, KEY_VALUES_MISMATCH."""
    words = exc.reason or exc.strerror or str(exc)
    return re.sub("^(sslv3|tlsv1|tlsv13) ", "", words.lower().replace("_", " "))
