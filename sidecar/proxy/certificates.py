"""The certificate that clients are shown: read from its files, and again when they change.

Owns everything that makes a TLS context for clients. No loop: who connects has the files looked at,
at most once a second, in a thread.
"""

import asyncio
import logging
import os
import ssl
from dataclasses import dataclass
from typing import Final

from sidecar.config import ListenConfig
from sidecar.errors import ConfigError
from sidecar.pool.server import clock
from sidecar.protocol.authentication import server_end_point
from sidecar.proxy.tls import ALPN

log = logging.getLogger("pgsidecar.proxy")

_LOOK_EVERY: Final = 1.0
"""Seconds between two looks at the files; they change when a certificate is renewed."""

_VERSIONS: Final = {"TLSv1.2": ssl.TLSVersion.TLSv1_2, "TLSv1.3": ssl.TLSVersion.TLSv1_3}

_END: Final = "-----END CERTIFICATE-----"


@dataclass(frozen=True, slots=True, repr=False)
class Identity:
    """Who we are to clients, ready for use."""

    context: ssl.SSLContext
    end_point: bytes | None
    """What a SCRAM login is bound to (tls-server-end-point); None: this certificate defines nothing."""
    certificate: bytes
    """In DER."""


def read_identity(listen: ListenConfig) -> Identity:
    """Read the files; blocks. Raises ConfigError that names the option and what is wrong."""
    path = listen.tls_cert_file
    assert path is not None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = _VERSIONS[listen.tls_min_version]
    # As PostgreSQL: a session is never resumed, so nothing is kept of one, here or with the client.
    context.options |= ssl.OP_NO_TICKET | ssl.OP_NO_RENEGOTIATION | ssl.OP_CIPHER_SERVER_PREFERENCE
    context.num_tickets = 0
    context.set_alpn_protocols([ALPN])
    certificate = _first_certificate(path)
    key = listen.tls_key_file
    if key is not None:
        _read("tls_key_file", key)
    try:
        context.load_cert_chain(path, key, password=_no_passphrase)
    except (ssl.SSLError, ValueError) as exc:
        raise ConfigError(_explained(exc, path, key)) from exc
    if listen.tls_ca_file is not None:
        _read("tls_ca_file", listen.tls_ca_file)
        try:
            context.load_verify_locations(listen.tls_ca_file)
        except (ssl.SSLError, ValueError) as exc:
            raise ConfigError(
                f"listen.tls_ca_file: no certificate of a CA in {listen.tls_ca_file}"
            ) from exc
        context.verify_mode = ssl.CERT_OPTIONAL
    return Identity(context, server_end_point(certificate), certificate)


def _read(option: str, path: str) -> str:
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            return file.read()
    except OSError as exc:
        raise ConfigError(f"listen.{option}: cannot read {path}: {exc.strerror or exc}") from exc


def _first_certificate(path: str) -> bytes:
    """In DER; the rest of the file is the chain."""
    text = _read("tls_cert_file", path)
    begin, end = text.find("-----BEGIN CERTIFICATE-----"), text.find(_END)
    try:
        if not 0 <= begin < end:
            raise ValueError
        return ssl.PEM_cert_to_DER_cert(text[begin : end + len(_END)])
    except ValueError as exc:
        raise ConfigError(f"listen.tls_cert_file: no certificate in {path}") from exc


def _no_passphrase() -> str:
    """Instead of OpenSSL's question on the terminal."""
    raise ValueError("it is encrypted: a key without a passphrase is needed")


def _explained(exc: ssl.SSLError | ValueError, path: str, key: str | None) -> str:
    # with a key, the certificate itself has been read
    where = f"listen.tls_cert_file: {path}" if key is None else f"listen.tls_key_file: {key}"
    if not isinstance(exc, ssl.SSLError):
        return f"{where}: {exc}"
    if exc.reason == "KEY_VALUES_MISMATCH":
        return f"{where}: not the key of the certificate in {path}"
    if exc.reason in (None, "NO_START_LINE"):
        return f"{where}: no usable certificate and key in it"
    return f"{where}: {str(exc.reason).replace('_', ' ').lower()}"


class Certificates:
    """The identity of now."""

    def __init__(self, listen: ListenConfig) -> None:
        self._listen: Final = listen
        self._paths: Final = [
            path
            for path in (listen.tls_cert_file, listen.tls_key_file, listen.tls_ca_file)
            if path is not None
        ]
        self._identity: Identity | None = None
        self._seen: list[tuple[int, ...]] = []
        self._next_look = 0.0

    async def load(self) -> None:
        """Read the files now: at the start, and when an operator asks. Raises ConfigError."""
        self._next_look = clock() + _LOOK_EVERY
        self._seen, self._identity = await asyncio.to_thread(self._read)

    async def identity(self) -> Identity:
        """To be shown to a new client. Where the files have changed and are wrong: the one before."""
        now = clock()
        if now >= self._next_look:
            self._next_look = now + _LOOK_EVERY
            await self._look()
        assert self._identity is not None, "load comes first"
        return self._identity

    async def _look(self) -> None:
        seen = await asyncio.to_thread(self._stamps)
        if seen == self._seen:
            return
        self._seen = seen  # also if they are wrong: this is said once
        try:
            await self.load()
        except ConfigError as exc:
            log.error("TLS certificate not renewed", extra={"cause": exc.message})
        else:
            log.info("TLS certificate renewed", extra={"path": self._listen.tls_cert_file})

    def _read(self) -> tuple[list[tuple[int, ...]], Identity]:
        seen = self._stamps()  # before: what changes meanwhile is read again
        return seen, read_identity(self._listen)

    def _stamps(self) -> list[tuple[int, ...]]:
        """What is different once a file has been replaced, or written to."""
        stamps: list[tuple[int, ...]] = []
        for path in self._paths:
            try:
                found = os.stat(path)
                stamps.append((found.st_mtime_ns, found.st_ino, found.st_size))
            except OSError:
                stamps.append(())
        return stamps
