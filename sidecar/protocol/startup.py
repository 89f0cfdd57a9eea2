"""What a client sends before the first typed message: startup packets.

Pure. PostgreSQL 18 manual, 54.1.4 "Protocol versions", 54.2.1 "Start-up", 54.2.9 "Canceling
requests", 54.2.11 "SSL session encryption". A startup packet has a length but no type byte.
"""

import struct
from dataclasses import dataclass

from sidecar.errors import ClientProtocolError

MAX_STARTUP_PACKET = 10_000
"""Bytes; PostgreSQL's own limit (MAX_STARTUP_PACKET_LENGTH in libpq/pqcomm.h)."""

_MAX_NAME = 63  # bytes; NAMEDATALEN - 1

NEWEST_MINOR = 2
"""The newest minor version of protocol 3 that we speak. 3.1 was never used, and counts as 3.0."""

TLS_HELLO = 0x16
"""First byte of a client that begins with TLS at once: a handshake record (RFC 8446, 5.1)."""

_CANCEL = 80877102
_SSL = 80877103
_GSSENC = 80877104

_INT = struct.Struct("!I")

SSL_REQUEST = _INT.pack(8) + _INT.pack(_SSL)
"""Asks a server for TLS; it answers with one byte, S or N."""


@dataclass(frozen=True, slots=True)
class EncryptionRequest:
    """SSLRequest, or GSSENCRequest."""

    is_tls: bool


@dataclass(frozen=True, slots=True)
class CancelRequest:
    pid: int
    secret: bytes


@dataclass(frozen=True, slots=True)
class StartupMessage:
    minor: int
    parameters: dict[bytes, bytes]
    unknown_options: tuple[bytes, ...]  # names that begin with _pq_.

    @property
    def secret_size(self) -> int:
        """Bytes of a cancel key's secret: what PostgreSQL 18 gives a client of this version."""
        return 32 if self.minor >= 2 else 4

    def text(self, name: bytes) -> str:
        """A parameter for messages and look-ups; empty if the client did not send it."""
        return self.parameters.get(name, b"").decode("utf-8", "replace")

    def name(self, parameter: bytes) -> str:
        """Of a user or a database: what a server would make of it, which cuts long ones. Else who
        adds a letter to a name of that length would be another for us and the same for the server."""
        return self.parameters.get(parameter, b"")[:_MAX_NAME].decode("utf-8", "replace")


StartupPacket = EncryptionRequest | CancelRequest | StartupMessage


def packet_length(head: bytes) -> int:
    """Length in bytes of the startup packet that begins with these four bytes, itself included.

    Raises ClientProtocolError if no startup packet can have this length: what talks here is
    not a PostgreSQL client.
    """
    length: int = _INT.unpack(head)[0]
    if not 8 <= length <= MAX_STARTUP_PACKET:
        raise ClientProtocolError(
            f"invalid length of startup packet: {length} bytes, allowed are 8 to {MAX_STARTUP_PACKET}",
            hint="This port speaks the PostgreSQL protocol; metrics are on the HTTP port.",
        )
    return length


def parse_startup(packet: bytes) -> StartupPacket:
    """One whole startup packet. Raises ClientProtocolError for anything that is not one."""
    code: int = _INT.unpack_from(packet, 4)[0]
    if code in (_SSL, _GSSENC):
        return EncryptionRequest(is_tls=code == _SSL)
    if code == _CANCEL:
        # 256 bytes is the longest secret of protocol 3.2
        if not 16 <= len(packet) <= 12 + 256:
            raise ClientProtocolError(f"invalid length of cancel request: {len(packet)} bytes")
        return CancelRequest(_INT.unpack_from(packet, 8)[0], packet[12:])
    major, minor = code >> 16, code & 0xFFFF
    if major != 3:
        raise ClientProtocolError(
            f"unsupported frontend protocol {major}.{minor}: server supports 3.0 to 3.{NEWEST_MINOR}",
            sqlstate="0A000",
        )
    return _startup_message(minor, packet[8:])


def _startup_message(minor: int, body: bytes) -> StartupMessage:
    if not body.endswith(b"\0"):
        raise ClientProtocolError("invalid startup packet layout: expected terminator as last byte")
    parts = body[:-1].split(b"\0")
    if parts and parts[-1] == b"":
        parts.pop()
    if len(parts) % 2:
        raise ClientProtocolError("invalid startup packet layout: a parameter has no value")
    pairs = dict(zip(parts[::2], parts[1::2], strict=True))
    unknown = tuple(name for name in pairs if name.startswith(b"_pq_."))
    return StartupMessage(minor, {k: v for k, v in pairs.items() if k not in unknown}, unknown)


def startup_message(parameters: dict[bytes, bytes], minor: int = 0) -> bytes:
    """StartupMessage of protocol 3."""
    body = b"".join(k + b"\0" + v + b"\0" for k, v in parameters.items()) + b"\0"
    return _INT.pack(len(body) + 8) + _INT.pack(3 << 16 | minor) + body


def cancel_request(pid: int, secret: bytes) -> bytes:
    return _INT.pack(12 + len(secret)) + _INT.pack(_CANCEL) + _INT.pack(pid) + secret


def split_options(options: bytes) -> dict[bytes, bytes]:
    """The settings in the startup parameter ``options`` (``-c name=value``, ``--name=value``).

    White space separates, a backslash escapes (libpq, PGOPTIONS). Raises ClientProtocolError for
    a switch that is not a setting.
    """
    settings: dict[bytes, bytes] = {}
    words = _words(options)
    while words:
        word = words.pop(0)
        if word == b"-c" and words:
            word = words.pop(0)
        elif word.startswith((b"-c", b"--")):
            word = word[2:]
        else:
            raise ClientProtocolError(
                f"unsupported startup option: {word.decode('utf-8', 'replace')}",
                hint="Only settings (-c name=value) can be given in options.",
                sqlstate="0A000",
            )
        name, equals, value = word.partition(b"=")
        if not equals:
            raise ClientProtocolError(f"-c {word.decode('utf-8', 'replace')} requires a value")
        settings[name.replace(b"-", b"_")] = value
    return settings


def _words(options: bytes) -> list[bytes]:
    words: list[bytes] = []
    word = bytearray()
    inside = escaped = False
    for byte in options:
        if escaped:
            word.append(byte)
            escaped = False
        elif byte == 0x5C:
            inside = escaped = True
        elif byte in b" \t\n\r\v\f":
            if inside:
                words.append(bytes(word))
                word.clear()
                inside = False
        else:
            word.append(byte)
            inside = True
    if inside:
        words.append(bytes(word))
    return words
