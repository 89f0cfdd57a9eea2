"""The console's language: what a client typed, told apart into commands.

Pure. Names and meaning are PgBouncer's (its usage.md, "Admin console"); what a command does is
decided elsewhere. Every error is a SidecarError with the SQLSTATE for the client.
"""

import difflib
import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from sidecar.errors import SidecarError


class Verb(StrEnum):
    """What a command does; the value is its first word and its command tag."""

    SHOW = "SHOW"
    PAUSE = "PAUSE"
    RESUME = "RESUME"
    RECONNECT = "RECONNECT"
    RELOAD = "RELOAD"
    KILL = "KILL"
    KILL_CLIENT = "KILL_CLIENT"
    DISABLE = "DISABLE"
    ENABLE = "ENABLE"
    SUSPEND = "SUSPEND"
    SHUTDOWN = "SHUTDOWN"
    WAIT_CLOSE = "WAIT_CLOSE"
    SET = "SET"
    BEGIN = "BEGIN"
    COMMIT = "COMMIT"
    ROLLBACK = "ROLLBACK"


@dataclass(frozen=True, slots=True)
class Command:
    verb: Verb
    argument: str = ""
    """Of SHOW what, in upper case; else a database, a client's id, or WAIT_FOR_...; may be empty."""


ANYONE: Final = frozenset({Verb.SHOW, Verb.SET, Verb.BEGIN, Verb.COMMIT, Verb.ROLLBACK})
"""What users in ``stats_users`` may say. SET changes nothing."""

SHOWN: Final = (
    *("HELP", "CONFIG", "DATABASES", "POOLS", "CLIENTS", "SERVERS", "USERS", "VERSION"),
    *("FDS", "SOCKETS", "ACTIVE_SOCKETS", "LISTS", "MEM", "STATE", "DNS_HOSTS", "DNS_ZONES"),
    *("STATS", "STATS_TOTALS", "STATS_AVERAGES", "TOTALS", "WAITS", "HOLDERS", "PINS"),
    *("WHY", "INCIDENTS", "STATEMENTS", "SLOW", "ERRORS", "LEAKS", "BLAME"),
)
"""What SHOW shows."""

HELP: Final = """
	SHOW HELP|CONFIG|DATABASES|POOLS|CLIENTS|SERVERS|USERS|VERSION
	SHOW SOCKETS|ACTIVE_SOCKETS|LISTS|MEM|STATE
	SHOW DNS_HOSTS|DNS_ZONES
	SHOW STATS|STATS_TOTALS|STATS_AVERAGES|TOTALS
	SHOW WAITS|HOLDERS|PINS|LEAKS
	SHOW WHY|INCIDENTS|STATEMENTS|SLOW|ERRORS|BLAME
	RELOAD
	PAUSE [<db>]
	RESUME [<db>]
	DISABLE <db>
	ENABLE <db>
	RECONNECT [<db>]
	KILL <db>
	KILL_CLIENT <client_id>
	SHUTDOWN
	SHUTDOWN WAIT_FOR_SERVERS|WAIT_FOR_CLIENTS
	WAIT_CLOSE [<db>]"""
"""The detail of the notice that answers SHOW HELP."""

PARAMETERS: Final = {
    "server_encoding": "UTF8",
    "client_encoding": "UTF8",
    "DateStyle": "ISO, MDY",
    "IntervalStyle": "postgres",
    "TimeZone": "UTC",
    "integer_datetimes": "on",
    "standard_conforming_strings": "on",
    "default_transaction_read_only": "off",
    "in_hot_standby": "off",
    "is_superuser": "off",
}
"""What the console reports of itself, so that drivers know how to talk to it."""

_SETTINGS: Final = {name.lower(): name for name in PARAMETERS} | {
    name: name
    for name in ("application_name", "extra_float_digits", "server_version", "search_path")
}
_VALUES: Final = {name.lower(): value for name, value in PARAMETERS.items()} | {
    "transaction_read_only": "off",
    "transaction_isolation": "read committed",
    "default_transaction_isolation": "read committed",
}
"""Settings that drivers ask for with SHOW."""

_TOKEN: Final = re.compile(
    r"""\s+ | --[^\n]* | /\*.*?(?:\*/|\Z)
    | (?P<quoted>"(?:[^"]|"")*" | '(?:[^']|'')*')
    | (?P<end>;)
    | (?P<word>[^\s;"'=]+)
    | (?P<equals>=)
    | (?P<broken>["'])
    """,
    re.VERBOSE | re.DOTALL,
)

_OPTIONAL: Final = frozenset({Verb.PAUSE, Verb.RESUME, Verb.RECONNECT, Verb.WAIT_CLOSE})
_REQUIRED: Final = frozenset({Verb.KILL, Verb.DISABLE, Verb.ENABLE})
_TRANSACTION: Final = {
    "BEGIN": Verb.BEGIN,
    "START": Verb.BEGIN,
    "COMMIT": Verb.COMMIT,
    "END": Verb.COMMIT,
    "ROLLBACK": Verb.ROLLBACK,
    "ABORT": Verb.ROLLBACK,
}


def split(text: str) -> list[list[str]]:
    """The words of each statement; none for one that is empty. Raises SidecarError."""
    statements: list[list[str]] = [[]]
    for token in _TOKEN.finditer(text):
        match token.lastgroup:
            case "end":
                statements.append([])
            case "broken":
                raise _syntax_error("unterminated quoted string", "")
            case "quoted":
                word = token[0]
                statements[-1].append(word[1:-1].replace(word[0] * 2, word[0]))
            case "word" | "equals":
                statements[-1].append(token[0])
            case _:
                pass  # space and comments
    return [words for words in statements if words]


def parse(words: list[str]) -> Command:
    """The command of one statement. Raises SidecarError, 42601 if it is none."""
    first = words[0].upper()
    rest = words[1:]
    if first in _TRANSACTION:
        return Command(_TRANSACTION[first])
    if first not in Verb.__members__:
        close = difflib.get_close_matches(first, [*Verb.__members__], 1, cutoff=0.7)
        raise _syntax_error(f'invalid command "{_shown(words)}"', close[0] if close else "")
    verb = Verb(first)
    if verb is Verb.SET:
        return Command(verb, rest[0] if rest else "")
    if verb is Verb.SHOW:
        return Command(verb, _what_to_show(words))
    if verb is Verb.SHUTDOWN:
        mode = rest[0].upper() if rest else ""
        if len(rest) > 1 or mode not in ("", "WAIT_FOR_SERVERS", "WAIT_FOR_CLIENTS"):
            raise _syntax_error(
                f'invalid command "{_shown(words)}"', "SHUTDOWN WAIT_FOR_SERVERS|WAIT_FOR_CLIENTS"
            )
        return Command(verb, mode)
    if verb is Verb.KILL_CLIENT:
        if len(rest) != 1 or not re.fullmatch("[0-9]{1,10}", rest[0]):
            raise _syntax_error("KILL_CLIENT takes the id of a client", "KILL_CLIENT <client_id>")
        return Command(verb, rest[0])
    if verb in _REQUIRED and len(rest) != 1:
        raise _syntax_error(f"{verb} takes one database", f"{verb} <db>")
    if len(rest) > (verb in _OPTIONAL or verb in _REQUIRED):
        allowed = f"{verb} [<db>]" if verb in _OPTIONAL else str(verb)
        raise _syntax_error(f'invalid command "{_shown(words)}"', allowed)
    return Command(verb, rest[0] if rest else "")


def _what_to_show(words: list[str]) -> str:
    what = words[1].upper() if len(words) > 1 else "HELP"
    if len(words) == 2 and what == "ALL":
        raise _syntax_error('invalid command "SHOW ALL"', "SHOW CONFIG")
    if len(words) <= 2 and (what in SHOWN or what.lower() in _VALUES):
        return what
    close = difflib.get_close_matches(what, SHOWN, 1)
    raise _syntax_error(f'invalid command "{_shown(words)}"', f"SHOW {close[0]}" if close else "")


def setting(name: str) -> str | None:
    """The value of a setting that SHOW is asked for by drivers; ``name`` in upper case."""
    return _VALUES.get(name.lower())


def refuse_set(name: str) -> None:
    """SET is ignored where drivers say it, and else refused."""
    if name.lower() not in _SETTINGS:
        raise SidecarError(
            f'cannot SET "{_shown([name])}"',
            hint="Options are changed in the configuration file; then RELOAD.",
            sqlstate="0A000",
        )


def refuse(verb: str) -> SidecarError:
    """Why a command of PgBouncer's does not exist here."""
    reasons = {
        "SUSPEND": "It prepares PgBouncer's online restart (-R), which there is not: start a second"
        " pgsidecar, then SHUTDOWN WAIT_FOR_CLIENTS.",
        "FDS": "It hands over sockets for PgBouncer's online restart (-R), which there is not; SHOW"
        " SOCKETS lists them.",
    }
    return SidecarError(f"{verb} is not supported", detail=reasons.get(verb, ""), sqlstate="0A000")


def _shown(words: list[str]) -> str:
    text = " ".join(words)
    return text if len(text) <= 60 else text[:57] + "..."


def _syntax_error(message: str, meant: str) -> SidecarError:
    hint = f"Did you mean {meant}? " if meant else ""
    return SidecarError(message, hint=f"{hint}SHOW HELP lists all commands.", sqlstate="42601")
