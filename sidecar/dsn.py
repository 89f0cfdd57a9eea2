"""Connection strings: what libpq accepts, as a ``ServerTarget``.

Owns which keys of a connection string this version honours, ignores or refuses. Pure: libpq only
parses here; neither the environment nor a service file nor a password file is read.
"""

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache

import psycopg
from psycopg.conninfo import conninfo_to_dict
from pydantic import SecretStr

from sidecar.protocol.authentication import ScramKeys


@dataclass(frozen=True, slots=True)
class ServerTarget:
    """Where and as whom a pool connects. Of a template, ``database`` and ``user`` may be empty."""

    host: str
    """A name or an address; a path (it starts with ``/``) is the directory of a Unix socket."""
    port: int
    database: str
    user: str
    password: SecretStr | None = None
    parameters: Mapping[str, str] = field(default_factory=dict, hash=False)
    """Startup parameters to send: ``application_name``, ``client_encoding``, ``options``."""
    scram_keys: ScramKeys | None = None
    """In place of a password, where the server asks for SCRAM."""

    def describe(self) -> str:
        """``host:port`` or the path of the socket; no secrets."""
        if self.host.startswith("/"):
            return f"{self.host}/.s.PGSQL.{self.port}"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


_USED = ("host", "hostaddr", "port", "dbname", "user", "password")
_PARAMETERS = ("application_name", "client_encoding", "options")
_NO_TLS = "TLS to the server is not available in this version"
_ONE_SERVER = "a pool has one server"
_HARMLESS = {
    "sslmode": (("disable", "allow", "prefer"), _NO_TLS),
    "channel_binding": (("disable", "prefer"), _NO_TLS),
    "sslnegotiation": (("postgres",), _NO_TLS),
    "gssencmode": (("disable", "prefer"), "GSSAPI is not available in this version"),
    "target_session_attrs": (("any",), _ONE_SERVER),
    "load_balance_hosts": (("disable",), _ONE_SERVER),
}
"""Keys that ask for nothing with these values, and why other values are refused."""


@lru_cache(maxsize=64)
def parse_dsn(dsn: str, *, is_template: bool = False) -> ServerTarget:
    """Read a URL or ``key=value`` string by libpq's rules and with its defaults.

    Only a template's may leave out the user, and has no database where it names none.
    ``ValueError`` says all that is wrong, and quotes nothing from the string: one forgotten quote
    or percent sign makes any part of it a part of the password.
    """
    try:
        parsed = conninfo_to_dict(dsn.strip())
    except (psycopg.Error, UnicodeError) as exc:
        raise ValueError(_in_own_words(str(exc))) from None  # the original quotes the string
    given = {key: str(value) for key, value in parsed.items() if value}
    host = given.get("hostaddr") or given.get("host") or "localhost"
    port = given.get("port", "5432")
    user = given.get("user", "")
    problems = [problem for key, value in given.items() if (problem := _refusal(key, value))]
    if "," in host or "," in port:
        problems.append(f"it names several hosts, {_ONE_SERVER}")
    elif not re.fullmatch("[0-9]{1,5}", port) or not 1 <= int(port) <= 65535:
        problems.append("its port is not a number from 1 to 65535")
    if not user and not is_template:
        problems.append("it names no user")
    if not user and "password" in given:
        problems.append("it has a password and no user")
    if problems:
        raise ValueError(f"cannot be used: {'; '.join(problems)}")
    parameters = {key: given[key] for key in _PARAMETERS if key in given}
    if "fallback_application_name" in given:
        parameters.setdefault("application_name", given["fallback_application_name"])
    password = SecretStr(given["password"]) if "password" in given else None
    database = given.get("dbname", "" if is_template else user)
    return ServerTarget(host, int(port), database, user, password, parameters)


def _refusal(key: str, value: str) -> str | None:
    if key in (*_USED, *_PARAMETERS, "fallback_application_name"):
        return None
    if key in _HARMLESS:
        values, reason = _HARMLESS[key]
        return None if value in values else f"{reason}; allowed for {key}: {', '.join(values)}"
    if key == "connect_timeout":
        return "connect_timeout belongs to the pool's options, not into the dsn"
    return f"{key} is not available in this version, leave it out"


def _in_own_words(problem: str) -> str:
    """libpq's message without what it quotes, which may be a secret."""
    words = re.sub('".*"', "***", problem.strip(), flags=re.DOTALL)
    if unknown := re.match('invalid (?:connection option|URI query parameter:) "(.*)"', problem):
        known = [option.keyword.decode() for option in psycopg.pq.Conninfo.parse(b"")]
        if close := difflib.get_close_matches(unknown[1], known, 1):
            words += f", did you mean {close[0]}?"
    return (
        f"is not a connection string ({words}); allowed:"
        " postgresql://user:password@host:port/database, or host=... user=... dbname=..."
    )
