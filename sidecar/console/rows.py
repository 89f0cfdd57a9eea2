"""Tables as messages of the wire protocol.

Pure. Types are PgBouncer's: text, int4, int8 and numeric, the last for whole numbers only. Both
formats are spoken, since some drivers ask for binary as soon as they know the types.
"""

import struct
from collections.abc import Sequence
from enum import IntEnum
from typing import Final, NamedTuple, TypeAlias

from sidecar.protocol import messages as m

Value: TypeAlias = str | int | None
Row: TypeAlias = Sequence[Value]

_INT4_MOST: Final = 0x7FFFFFFF
_NULL: Final = struct.pack("!i", -1)


class Type(IntEnum):
    """OIDs of pg_type."""

    TEXT = 25
    INT4 = 23
    INT8 = 20
    NUMERIC = 1700


_SIZES: Final = {Type.TEXT: -1, Type.INT4: 4, Type.INT8: 8, Type.NUMERIC: -1}


class Column(NamedTuple):
    name: str
    type: Type


def columns(text: str) -> tuple[Column, ...]:
    """Columns in words: ``database user cl_active:int4``."""
    found = []
    for word in text.split():
        name, _, kind = word.partition(":")
        found.append(Column(name, Type[kind.upper() or "TEXT"]))
    return tuple(found)


def description(table: Sequence[Column], formats: Sequence[int]) -> bytes:
    """RowDescription; ``formats``: 0 text, 1 binary, by column."""
    fields = [
        column.name.encode()
        + struct.pack("!xIHIhiH", 0, 0, column.type, _SIZES[column.type], -1, format)
        for column, format in zip(table, formats, strict=True)
    ]
    return m.message(m.ROW_DESCRIPTION, struct.pack("!H", len(fields)) + b"".join(fields))


def data_row(table: Sequence[Column], row: Row, formats: Sequence[int]) -> bytes:
    parts = [struct.pack("!H", len(row))]
    for column, value, format in zip(table, row, formats, strict=True):
        if value is None:
            parts.append(_NULL)
            continue
        if column.type is Type.INT4:
            assert isinstance(value, int)
            value = max(-_INT4_MOST, min(_INT4_MOST, value))
        data = _binary(column.type, value) if format else _text(value)
        parts += (struct.pack("!i", len(data)), data)
    return m.message(m.DATA_ROW, b"".join(parts))


def _text(value: str | int) -> bytes:
    # a NUL is in no text of PostgreSQL's
    return str(value).replace("\0", "?").encode("utf-8", "replace")


def _binary(type: Type, value: str | int) -> bytes:
    if isinstance(value, str):
        return _text(value)
    match type:
        case Type.INT4:
            return struct.pack("!i", value)
        case Type.INT8:
            return struct.pack("!q", value)
        case Type.NUMERIC:
            return _numeric(value)
        case Type.TEXT:
            return _text(value)


def _numeric(value: int) -> bytes:
    """numeric_send(): digits to base 10,000, the weight of the first, sign, decimals."""
    digits = []
    rest = abs(value)
    while rest:
        rest, digit = divmod(rest, 10_000)
        digits.append(digit)
    weight = max(0, len(digits) - 1)
    while digits and not digits[0]:
        del digits[0]  # zeros at the end are not sent
    sign = 0x4000 if value < 0 else 0
    return struct.pack(f"!HhHH{len(digits)}H", len(digits), weight, sign, 0, *reversed(digits))
