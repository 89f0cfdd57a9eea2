"""Settings that a client brought along and that must hold on whichever connection it gets.

Pure. A client's startup parameters (``application_name``, ``DateStyle``, ...) and what it later
sets of the reported ones make a ``Settings``; equal ones are one object, so that the hot path
compares identities. ``change`` is the SQL that turns one into another.
"""

import re
from collections import OrderedDict
from collections.abc import Mapping
from typing import Final
from weakref import WeakValueDictionary

from sidecar.protocol.startup import StartupMessage, split_options

READ_ONLY: Final = frozenset(
    {
        b"in_hot_standby",
        b"integer_datetimes",
        b"is_superuser",
        b"server_encoding",
        b"server_version",
        b"session_authorization",
        b"scram_iterations",
    }
)
"""Reported by the server (54.2.7) but not a client's to carry along."""

_NOT_SETTINGS: Final = frozenset({b"user", b"database", b"options", b"replication"})

_not_parsed_by: Final = re.compile(
    rb"application_name|client_min_messages|.*_timeout|.*_mem"
    rb"|.*_cost|enable_.*|jit.*|log_.*|max_parallel_.*|default_transaction_.*|synchronous_commit"
    rb"|tcp_.*|.*\..*"  # with a dot: an application's or an extension's own
).fullmatch
"""Settings that do not change what a query's text means."""

_LIST_VALUED: Final = re.compile(
    rb"search_path|temp_tablespaces|session_preload_libraries|local_preload_libraries"
)
"""SET takes these as lists of identifiers; set_config takes the text as a client sent it."""


_ENCODING: Final = b"client_encoding"

_MOST_SPELLINGS: Final = 1000

_printable: Final = re.compile(rb"[ -~]*").fullmatch

_NAME: Final = re.compile(rb"[a-z_][a-z0-9_]*")


class Settings:
    """Name (lower case) to value, immutable. Equal settings of a pool are one object."""

    __slots__ = ("__weakref__", "canonical", "dialect", "is_proven", "is_risky", "values")

    def __init__(self, values: dict[bytes, bytes]) -> None:
        self.values: Final[Mapping[bytes, bytes]] = values
        # What queries are parsed by: with another DateStyle, '1/2/2020'::date is another constant.
        self.dialect: Final = b"\0".join(
            name + b"=" + value for name, value in values.items() if not _not_parsed_by(name)
        )
        self.is_proven = not values  # a server has accepted them
        # A role may have been taken away since: nothing must run before it is taken again.
        self.is_risky: Final = b"role" in values or b"session_authorization" in values
        self.canonical: Settings | None = None  # the same as the server spells them, once known

    def __repr__(self) -> str:
        return f"<Settings {dict(self.values)}>"


class SettingsTable:
    """The settings that clients of one pool have now."""

    def __init__(self) -> None:
        self._known: WeakValueDictionary[tuple[tuple[bytes, bytes], ...], Settings] = (
            WeakValueDictionary()
        )
        self._spellings: OrderedDict[tuple[bytes, bytes], bytes] = OrderedDict()

    def intern(self, values: Mapping[bytes, bytes]) -> Settings:
        key = tuple(sorted(values.items()))
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = Settings(dict(key))
        return found

    def note_spelling(self, brought: Settings, spelled: Settings) -> None:
        """A server has accepted what clients bring, and spells it like this."""
        for name, value in brought.values.items():
            self._spellings[name, value] = spelled.values[name]
        while len(self._spellings) > _MOST_SPELLINGS:
            self._spellings.popitem(last=False)

    def is_known(self, settings: Settings) -> bool:
        """Whether every value has been accepted before; then its canonical form is known, too."""
        if settings.is_proven:
            return True
        spelled: dict[bytes, bytes] = {}
        for name, value in settings.values.items():
            known = self._spellings.get((name, value))
            if known is None and name == b"application_name" and _is_plain(value):
                known = value
            if known is None:
                return False
            spelled[name] = known
        canonical = self.intern(spelled)
        canonical.is_proven = settings.is_proven = True
        if canonical is not settings:
            settings.canonical = canonical
        return True

    def with_value(self, settings: Settings, name: bytes, value: bytes) -> Settings:
        return self.intern({**settings.values, name: value})


def _is_plain(application_name: bytes) -> bool:
    """PostgreSQL takes it as it is (NAMEDATALEN; other characters are replaced)."""
    return len(application_name) < 64 and _printable(application_name) is not None


def from_startup(message: StartupMessage, reported: Mapping[bytes, bytes]) -> dict[bytes, bytes]:
    """What a startup packet sets and the server (``reported``: its ParameterStatus) has not.

    Raises ClientProtocolError for ``options`` that are not settings.
    """
    defaults = {name.lower(): value for name, value in reported.items()}
    given = split_options(message.parameters.get(b"options", b""))
    given |= {k: v for k, v in message.parameters.items() if k not in _NOT_SETTINGS}
    wanted = {name.lower(): value for name, value in given.items()}  # the last one counts
    return {
        name: value
        for name, value in wanted.items()
        if not _is_same(name, value, defaults.get(name))
    }


def _is_same(name: bytes, value: bytes, default: bytes | None) -> bool:
    if name == b"client_encoding" and default is not None:  # "utf-8" is UTF8
        return _letters(value) == _letters(default)
    return value == default


def _letters(encoding: bytes) -> bytes:
    return re.sub(rb"[^A-Z0-9]", b"", encoding.upper())


def change(before: Mapping[bytes, bytes], after: Mapping[bytes, bytes]) -> bytes:
    """The SQL that turns one into the other; empty if there is nothing to do.

    SET rather than set_config where it can be: it needs no planning, a third of the server's time.
    """
    statements = [b"RESET " + _name(name) for name in before if name not in after]
    encoding = after.get(_ENCODING)
    is_recoded = before.get(_ENCODING) != encoding
    if is_recoded and encoding is not None:
        statements.append(_assign(_ENCODING, encoding))
    for name, value in after.items():
        if is_recoded and name == _ENCODING:
            continue
        if is_recoded and not value.isascii():
            statements.append(_assign_in_new_encoding(name, value))
        elif before.get(name) != value:
            if name == b"datestyle" and name in before and b"," not in value:
                statements.append(b"RESET datestyle")  # half a style keeps the other half
            statements.append(_assign(name, value))
    return b";".join(statements)


def _assign(name: bytes, value: bytes) -> bytes:
    if _LIST_VALUED.fullmatch(name):
        return b"SELECT pg_catalog.set_config(%b,%b,false)" % (literal(name), literal(value))
    return b"SET " + _name(name) + b" TO " + literal(value)


def _assign_in_new_encoding(name: bytes, value: bytes) -> bytes:
    """The server reads the whole text in the old one, before it does the first statement."""
    return (
        b"SELECT pg_catalog.set_config(%b,pg_catalog.convert_from(pg_catalog.decode('%b','hex'),"
        b"pg_catalog.current_setting('client_encoding')::pg_catalog.name),false)"
        % (literal(name), value.hex().encode())
    )


def _name(name: bytes) -> bytes:
    """A setting's name in SQL; quoted where it may be a keyword, or no name at all."""
    if _NAME.fullmatch(name):
        return name
    return b".".join(b'"' + part.replace(b'"', b'""') + b'"' for part in name.split(b"."))


def literal(text: bytes) -> bytes:
    """A text in SQL; safe with standard_conforming_strings on and off, and in each encoding.

    In SJIS, BIG5 or GBK a backslash may be the second byte of a character; a quote and a dollar never.
    """
    if b"\\" not in text:
        return b"'" + text.replace(b"'", b"''") + b"'"
    tag = b"$t"
    while tag in text:
        tag += b"t"
    return tag + b"$" + text + tag + b"$"
