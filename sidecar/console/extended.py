"""The extended protocol's messages as the console needs them: statements without parameters.

Pure. Raises ClientProtocolError where a message is broken, SidecarError where it asks for what the
console does not have.
"""

import struct
from dataclasses import dataclass
from typing import Final

from sidecar.errors import ClientProtocolError, SidecarError
from sidecar.protocol import messages as m

_FORMATS: Final = (0, 1)


@dataclass(frozen=True, slots=True)
class Bind:
    portal: bytes
    statement: bytes
    formats: tuple[int, ...]
    """Of results: none, one for all columns, or one for each."""

    def for_columns(self, count: int) -> tuple[int, ...]:
        """One for each of so many columns."""
        if len(self.formats) <= 1:
            return (self.formats or (0,)) * count
        if len(self.formats) != count:
            raise ClientProtocolError(
                f"bind message has {len(self.formats)} result formats but query has {count} columns"
            )
        return self.formats


def read_parse(body: bytes) -> tuple[bytes, str]:
    """The statement's name and text."""
    name, text, rest = _strings(body, 2)
    if len(rest) < 2 or len(rest) != 2 + 4 * int.from_bytes(rest[:2], "big"):
        raise ClientProtocolError("malformed Parse")
    try:
        return name, text.decode()
    except UnicodeDecodeError:
        raise SidecarError("the command is not UTF-8 text", sqlstate="22021") from None


def read_bind(body: bytes) -> Bind:
    portal, statement, rest = _strings(body, 2)
    try:
        (count,) = struct.unpack_from("!H", rest)
        at = 2 + 2 * count
        (values,) = struct.unpack_from("!H", rest, at)
        if values:
            raise SidecarError(
                f"bind message supplies {values} parameters, but commands of the console have none",
                sqlstate="08P01",
            )
        (count,) = struct.unpack_from("!H", rest, at + 2)
        formats = struct.unpack_from(f"!{count}H", rest, at + 4)
    except struct.error:
        raise ClientProtocolError("malformed Bind") from None
    if len(rest) != at + 4 + 2 * count or any(each not in _FORMATS for each in formats):
        raise ClientProtocolError("malformed Bind")
    return Bind(portal, statement, formats)


def read_target(body: bytes) -> tuple[int, bytes]:
    """Of Describe and Close: ``S`` or ``P``, and the name."""
    if body[:1] not in (b"S", b"P"):
        raise ClientProtocolError("malformed Describe or Close")
    name, rest = _strings(body[1:], 1)
    if rest:
        raise ClientProtocolError("malformed Describe or Close")
    return body[0], name


def read_execute(body: bytes) -> tuple[bytes, int]:
    """The portal, and the most rows; 0: all."""
    name, rest = _strings(body, 1)
    if len(rest) != 4:
        raise ClientProtocolError("malformed Execute")
    return name, int.from_bytes(rest, "big")


def read_query(body: bytes) -> str:
    text, rest = _strings(body, 1)
    if rest:
        raise ClientProtocolError("malformed Query")
    try:
        return text.decode()
    except UnicodeDecodeError:
        raise SidecarError("the command is not UTF-8 text", sqlstate="22021") from None


PARAMETER_DESCRIPTION: Final = m.message(m.PARAMETER_DESCRIPTION, b"\0\0")
BIND_COMPLETE: Final = m.message(m.BIND_COMPLETE, b"")
CLOSE_COMPLETE: Final = m.message(m.CLOSE_COMPLETE, b"")
NO_DATA: Final = m.message(m.NO_DATA, b"")
EMPTY: Final = m.message(m.EMPTY_QUERY_RESPONSE, b"")
SUSPENDED: Final = m.message(m.PORTAL_SUSPENDED, b"")


def complete(tag: str) -> bytes:
    return m.message(m.COMMAND_COMPLETE, tag.encode() + b"\0")


def notice(text: str, detail: str = "") -> bytes:
    """NoticeResponse: an ErrorResponse by another name."""
    body = m.error_response("NOTICE", "00000", text, detail=detail)
    return m.NOTICE_RESPONSE.to_bytes(1, "big") + body[1:]


def _strings(body: bytes, count: int) -> list[bytes]:
    """So many strings, and what follows them."""
    parts = body.split(b"\0", count)
    if len(parts) <= count:
        raise ClientProtocolError("invalid message: a string has no end")
    return parts
