"""The types of options: how the text of a value becomes a number, a duration, a list.

Pure. Each converts text (or the Python value, when built in code); its ValueError is the rest of a
sentence that starts with the option's path and the value, and says what is allowed.
"""

import ipaddress
import re

from pydantic import BeforeValidator, SecretStr

CONSOLE_DATABASE = "pgsidecar"
"""The database that is the console; no pool may have its name."""

PGBOUNCER = "pgbouncer"
"""PgBouncer's own name of its console, which some programs have built in. A pool may have it."""


class Conflict(ValueError):
    """A value that does not go with the one of ``other``, an option of the same section."""

    def __init__(self, message: str, other: str) -> None:
        super().__init__(message)
        self.other = other


def whole(low: int, high: int) -> BeforeValidator:
    def convert(value: object) -> int:
        if isinstance(value, str) and re.fullmatch(r"\s*-?[0-9]{1,18}\s*", value):
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool):
            raise ValueError(f"is not a whole number; allowed: {low} to {high}")
        if not low <= value <= high:
            raise ValueError(f"is out of range; allowed: {low} to {high}")
        return value

    return BeforeValidator(convert)


_UNITS = {"d": 86_400_000, "h": 3_600_000, "m": 60_000, "s": 1000, "ms": 1}
_DURATION = re.compile("".join(rf"(?:([0-9]+(?:\.[0-9]+)?){unit})?" for unit in _UNITS))


def seconds(text: str) -> float | None:
    """Seconds of ``1m30s``; ``None`` if the text is not a duration."""
    found = _DURATION.fullmatch(text) if text else None
    if found is None:
        return 0.0 if text == "0" else None
    amounts = zip(found.groups("0"), _UNITS.values(), strict=True)
    # Through milliseconds, so that 0.1s and 100ms are the same float.
    return sum(float(amount) * unit for amount, unit in amounts) / 1000


def duration(low: str, high: str) -> BeforeValidator:
    least, most = seconds(low), seconds(high)
    assert least is not None
    assert most is not None

    def convert(value: object) -> float:
        if isinstance(value, str):
            text = value.strip()
            if text.startswith("-"):
                raise ValueError(f"is negative; allowed: {low} to {high}")
            if re.fullmatch(r"[0-9]+(\.[0-9]+)?", text) and text != "0":
                raise ValueError(f"has no unit, write {text}s or {text}m; allowed: {low} to {high}")
            length = seconds(text)
        else:  # only code can give a number: it means seconds
            length = float(value) if isinstance(value, int | float) else None
        if length is None:
            raise ValueError(
                f"is not a duration; allowed: {low} to {high},"
                " written like 100ms, 30s, 5m, 1m30s, 2h or 1d"
            )
        if not least <= length <= most:
            raise ValueError(f"is out of range; allowed: {low} to {high}")
        return length

    return BeforeValidator(convert)


def flag(value: object) -> bool:
    word = value.strip().lower() if isinstance(value, str) else value
    if word in (True, "true", "yes", "on"):
        return True
    if word in (False, "false", "no", "off"):
        return False
    raise ValueError("is neither true nor false; allowed: true, false")


def some_host(host: str) -> str:
    # Left to the system, an empty address means all of them.
    if not host:
        raise ValueError("is empty; allowed: an address or a name (0.0.0.0 for all addresses)")
    return host


def socket_dir(value: object) -> object:
    if value in ("", "null", "~"):
        return None
    # 107 bytes is Linux's limit for a socket's path (unix(7)); "/.s.PGSQL.65535" takes 15.
    if isinstance(value, str) and not (value.startswith("/") and len(value.encode()) <= 92):
        raise ValueError("is not usable; allowed: an absolute path of at most 92 bytes")
    return value


def pool_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_.*-]{1,63}", name):
        raise ValueError(
            "is not a pool's name; allowed: 1 to 63 of A-Z a-z 0-9 _ . -, and * in a template's"
        )
    if name == CONSOLE_DATABASE:
        raise ValueError("is the name of the console; allowed: any other name")
    return name


def name_matches(pattern: str, name: str) -> bool:
    """Whether a template's pattern means this database; ``*`` stands for any text, also for none."""
    first, *others = pattern.split("*")
    if not others:
        return name == first
    last = others.pop()
    if len(name) < len(first) + len(last):
        return False
    if not (name.startswith(first) and name.endswith(last)):
        return False
    pos, end = len(first), len(name) - len(last)
    for part in others:  # the leftmost place is always good enough
        found = name.find(part, pos, end)
        if found < 0:
            return False
        pos = found + len(part)
    return True


def user_name(name: str) -> str:
    # NAMEDATALEN - 1: PostgreSQL has no longer names.
    if not 1 <= len(name.encode()) <= 63:
        raise ValueError("is not a user's name; allowed: 1 to 63 bytes")
    return name


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def duration_or_none(low: str, high: str) -> BeforeValidator:
    """A duration that may be left empty: then it is another option's matter."""
    convert = duration(low, high).func

    def convert_or_none(value: object) -> float | None:
        if value is None or value == "":
            return None
        result = convert(value)  # type: ignore[call-arg]  # one of pydantic's two shapes: ours
        assert isinstance(result, float)
        return result

    return BeforeValidator(convert_or_none)


def file_path(value: object) -> object:
    return None if value == "" else value


def scram_verifier(verifier: SecretStr) -> SecretStr:
    """RFC 5803: the salt has some length, the two keys are those of SHA-256."""
    if not _VERIFIER.fullmatch(verifier.get_secret_value()):
        raise ValueError(
            "is not a SCRAM verifier; allowed:"
            " SCRAM-SHA-256$<iterations>:<salt>$<StoredKey>:<ServerKey>, as in pg_authid.rolpassword"
        )
    return verifier


_VERIFIER = re.compile(
    r"SCRAM-SHA-256\$[1-9][0-9]{0,8}:[A-Za-z0-9+/]{4,}={0,2}\$[A-Za-z0-9+/]{43}=:[A-Za-z0-9+/]{43}="
)


def user_names(value: object) -> object:
    """A list, or text with commas."""
    names = value.split(",") if isinstance(value, str) else value
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise ValueError("is not a list of users; allowed: names, with commas between")
    return tuple(user_name(name.strip()) for name in names if name.strip())
