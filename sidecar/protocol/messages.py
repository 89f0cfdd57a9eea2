"""Messages of the PostgreSQL wire protocol, version 3: type bytes and encoders.

Pure. Names are those of the manual (PostgreSQL 18, chapter 54 "Frontend/Backend Protocol"; formats
in 54.7). Encoders return complete messages, ready to be written.
"""

import struct
from collections.abc import Iterable
from typing import Final

# Client to server
BIND: Final = 0x42  # B
CLOSE: Final = 0x43  # C
COPY_DATA: Final = 0x64  # d, both ways
COPY_DONE: Final = 0x63  # c, both ways
COPY_FAIL: Final = 0x66  # f
DESCRIBE: Final = 0x44  # D
EXECUTE: Final = 0x45  # E
FLUSH: Final = 0x48  # H
FUNCTION_CALL: Final = 0x46  # F
PARSE: Final = 0x50  # P
PASSWORD: Final = 0x70  # p: PasswordMessage, SASLInitialResponse, SASLResponse
QUERY: Final = 0x51  # Q
SYNC: Final = 0x53  # S
TERMINATE: Final = 0x58  # X

# Server to client
AUTHENTICATION: Final = 0x52  # R
BACKEND_KEY_DATA: Final = 0x4B  # K
BIND_COMPLETE: Final = 0x32  # 2
CLOSE_COMPLETE: Final = 0x33  # 3
COMMAND_COMPLETE: Final = 0x43  # C
COPY_BOTH_RESPONSE: Final = 0x57  # W
COPY_IN_RESPONSE: Final = 0x47  # G
COPY_OUT_RESPONSE: Final = 0x48  # H
DATA_ROW: Final = 0x44  # D
EMPTY_QUERY_RESPONSE: Final = 0x49  # I
ERROR_RESPONSE: Final = 0x45  # E
FUNCTION_CALL_RESPONSE: Final = 0x56  # V
NEGOTIATE_PROTOCOL_VERSION: Final = 0x76  # v
NO_DATA: Final = 0x6E  # n
NOTICE_RESPONSE: Final = 0x4E  # N
NOTIFICATION_RESPONSE: Final = 0x41  # A
PARAMETER_DESCRIPTION: Final = 0x74  # t
PARAMETER_STATUS: Final = 0x53  # S
PARSE_COMPLETE: Final = 0x31  # 1
PORTAL_SUSPENDED: Final = 0x73  # s
READY_FOR_QUERY: Final = 0x5A  # Z
ROW_DESCRIPTION: Final = 0x54  # T

# Transaction status of ReadyForQuery
IDLE: Final = 0x49  # I
IN_TRANSACTION: Final = 0x54  # T
FAILED: Final = 0x45  # E

# Authentication requests (54.7, "Authentication*")
AUTH_OK: Final = 0
AUTH_CLEARTEXT: Final = 3
AUTH_MD5: Final = 5
AUTH_SASL: Final = 10
AUTH_SASL_CONTINUE: Final = 11
AUTH_SASL_FINAL: Final = 12

HEADER: Final = struct.Struct("!BI")
"""Type byte and length; the length counts itself but not the type."""

_INT: Final = struct.Struct("!I")

PARSE_COMPLETE_MESSAGE: Final = b"1\x00\x00\x00\x04"
SYNC_MESSAGE: Final = b"S\x00\x00\x00\x04"
FLUSH_MESSAGE: Final = b"H\x00\x00\x00\x04"
TERMINATE_MESSAGE: Final = b"X\x00\x00\x00\x04"
READY_IDLE_MESSAGE: Final = b"Z\x00\x00\x00\x05I"


def length_at(data: bytes, pos: int) -> int:
    """The length in the header that begins here.

    The hot path looks at its last byte itself, and asks only if the others are not 0: compiled, that
    is a tenth of what unpacking a ``HEADER`` costs, which was a quarter of all that the relay does.
    """
    return data[pos + 1] << 24 | data[pos + 2] << 16 | data[pos + 3] << 8 | data[pos + 4]


def message(kind: int, body: bytes) -> bytes:
    """One message: type, length, body."""
    return HEADER.pack(kind, len(body) + 4) + body


def query(sql: bytes) -> bytes:
    return message(QUERY, sql + b"\0")


def parse(name: bytes, rest: bytes) -> bytes:
    """Parse; ``rest`` is what follows the statement's name: query, NUL, parameter types."""
    return message(PARSE, name + b"\0" + rest)


def close_statement(name: bytes) -> bytes:
    return message(CLOSE, b"S" + name + b"\0")


def describe_statement(name: bytes) -> bytes:
    return message(DESCRIBE, b"S" + name + b"\0")


def authentication(code: int, data: bytes = b"") -> bytes:
    return message(AUTHENTICATION, _INT.pack(code) + data)


def password(data: bytes) -> bytes:
    """PasswordMessage or SASLResponse."""
    return message(PASSWORD, data)


def sasl_initial_response(mechanism: bytes, data: bytes) -> bytes:
    return message(PASSWORD, mechanism + b"\0" + _INT.pack(len(data)) + data)


def parameter_status(name: bytes, value: bytes) -> bytes:
    return message(PARAMETER_STATUS, name + b"\0" + value + b"\0")


def backend_key_data(pid: int, secret: bytes) -> bytes:
    return message(BACKEND_KEY_DATA, _INT.pack(pid) + secret)


def negotiate_protocol_version(minor: int, options: Iterable[bytes]) -> bytes:
    """The newest version 3 we speak and the ``_pq_.`` options we do not know.

    The manual says "minor version"; PostgreSQL sends, and libpq reads, the whole number.
    """
    unknown = list(options)
    body = (
        _INT.pack(3 << 16 | minor) + _INT.pack(len(unknown)) + b"".join(o + b"\0" for o in unknown)
    )
    return message(NEGOTIATE_PROTOCOL_VERSION, body)


def error_response(
    severity: str, sqlstate: str, text: str, *, detail: str = "", hint: str = "", routine: str = ""
) -> bytes:
    """ErrorResponse with the fields S, V, C, M and, where given, D, H and R (54.8)."""
    fields = [
        b"S" + severity.encode(),
        b"V" + severity.encode(),
        b"C" + sqlstate.encode(),
        b"M" + _printable(text),
    ]
    if detail:
        fields.append(b"D" + _printable(detail))
    if hint:
        fields.append(b"H" + _printable(hint))
    if routine:
        fields.append(b"R" + routine.encode())
    return message(ERROR_RESPONSE, b"\0".join(fields) + b"\0\0")


def _printable(text: str) -> bytes:
    """A NUL would end the field early, and the message with it."""
    return text.replace("\0", "?").encode("utf-8", "replace")


def error_fields(body: bytes) -> dict[str, str]:
    """The fields of an ErrorResponse or NoticeResponse by their letter; tolerates a cut-off body."""
    fields: dict[str, str] = {}
    for part in body.split(b"\0"):
        if part:
            fields.setdefault(chr(part[0]), part[1:].decode("utf-8", "replace"))
    return fields


def sqlstate_of(body: bytes) -> str:
    """The SQLSTATE of an ErrorResponse, ``XX000`` if it has none that is one."""
    at = body.find(b"\0C")
    code = body[at + 2 : at + 7] if at >= 0 else body[1:6] if body[:1] == b"C" else b""
    if len(code) == 5 and code.isalnum() and code.isascii():
        return code.decode("ascii")
    return "XX000"


def name_and_value(body: bytes) -> tuple[bytes, bytes]:
    """The two strings of a ParameterStatus. Raises ValueError if there are not two."""
    name, value, _ = body.split(b"\0", 2)
    return name, value
