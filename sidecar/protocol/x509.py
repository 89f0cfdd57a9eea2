"""What has to be read from a certificate that Python's ssl does not tell of one's own: when it ends.

Pure. Certificates are DER (RFC 5280, 4.1; X.690): elements of a tag, a length and a content.
"""

import calendar

_SEQUENCE, _VERSION = 0x30, 0xA0
_UTC_TIME, _GENERALIZED_TIME = 0x17, 0x18


def not_after(certificate: bytes) -> float:
    """When the certificate ends, in seconds since 1970. Raises ValueError for what is none."""
    fields, _ = _enter(certificate, 0)
    pos, _ = _enter(certificate, fields)
    if certificate[pos] == _VERSION:
        pos = _end(certificate, pos)
    for _ in range(3):  # serial number, signature algorithm, issuer
        pos = _end(certificate, pos)
    pos, _ = _enter(certificate, pos)
    pos = _end(certificate, pos)  # not before
    tag, begin, end = _element(certificate, pos)
    return _time(tag, certificate[begin:end].decode("ascii"))


def _time(tag: int, text: str) -> float:
    if tag == _UTC_TIME:  # YYMMDDHHMMSSZ, 1950 to 2049
        text = ("19" if text[:2] >= "50" else "20") + text
    elif tag != _GENERALIZED_TIME:
        raise ValueError("no time where there has to be one")
    if len(text) != 15 or not text.endswith("Z"):
        raise ValueError(f"not a time: {text}")
    year, rest = int(text[:4]), text[4:14]
    month, day, hour, minute, second = (int(rest[at : at + 2]) for at in range(0, 10, 2))
    return float(calendar.timegm((year, month, day, hour, minute, second)))


def _element(data: bytes, pos: int) -> tuple[int, int, int]:
    """Tag, begin and end of the content."""
    if pos + 2 > len(data):
        raise ValueError("the certificate ends too early")
    length = data[pos + 1]
    begin = pos + 2
    if length & 0x80:
        size = length & 0x7F
        length = int.from_bytes(data[begin : begin + size], "big")
        begin += size
    if begin + length > len(data):
        raise ValueError("the certificate ends too early")
    return data[pos], begin, begin + length


def _enter(data: bytes, pos: int) -> tuple[int, int]:
    """Begin and end of a sequence's content."""
    tag, begin, end = _element(data, pos)
    if tag != _SEQUENCE:
        raise ValueError("not a certificate")
    return begin, end


def _end(data: bytes, pos: int) -> int:
    return _element(data, pos)[2]
