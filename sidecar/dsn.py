"""Connection strings: what libpq accepts, as a ``ServerTarget``.

Owns which keys of a connection string this version honours, ignores or refuses. Pure: libpq only
parses here; neither the environment nor a service file, a password file or ``~/.postgresql`` is read.
"""

import base64
import difflib
import ipaddress
import re
from collections.abc import Mapping
from functools import lru_cache

import psycopg
from psycopg.conninfo import conninfo_to_dict
from pydantic import SecretStr

from sidecar.protocol.authentication import ScramKeys
from sidecar.target import Host, ServerTarget, SessionAttrs, SslMode, TlsPolicy

_MOST_HOSTS = 100

_TEXTS = (
    *("host", "hostaddr", "port", "dbname", "user", "password", "require_auth"),
    *("application_name", "fallback_application_name", "client_encoding", "options"),
    *("sslrootcert", "sslcert", "sslkey", "sslpassword", "sslcrl"),
    *("scram_client_key", "scram_server_key"),
)
_NUMBERS = (
    *("keepalives_idle", "keepalives_interval", "keepalives_count"),
    "tcp_user_timeout",
)
_SWITCH = ("0", "1")
_TLS_VERSIONS = ("TLSv1.2", "TLSv1.3")
_CHOICES: dict[str, tuple[str, ...]] = {
    "sslmode": tuple(SslMode),
    "sslnegotiation": ("postgres", "direct"),
    "sslsni": _SWITCH,
    "ssl_min_protocol_version": _TLS_VERSIONS,
    "ssl_max_protocol_version": _TLS_VERSIONS,
    "channel_binding": ("disable", "prefer", "require"),
    "target_session_attrs": tuple(SessionAttrs),
    "load_balance_hosts": ("disable", "random"),
    "keepalives": _SWITCH,
    # harmless with these values
    "gssencmode": ("disable", "prefer"),
    "sslcertmode": ("disable", "allow"),
    "sslcompression": _SWITCH,
    "min_protocol_version": ("3.0",),
    "max_protocol_version": ("3.0", "3.2", "latest"),
}
_METHODS = ("password", "md5", "gss", "sspi", "scram-sha-256", "oauth", "none")


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
    problems = [problem for key, value in given.items() if (problem := _refusal(key, value))]
    hosts = _hosts(given, problems)
    tls = _tls(given, problems)
    methods = _methods(given.get("require_auth", ""), problems)
    scram_keys = _scram_keys(given, problems)
    user = given.get("user", "")
    if not user and not is_template:
        problems.append("it names no user")
    if not user and "password" in given:
        problems.append("it has a password and no user")
    if problems:
        raise ValueError(f"cannot be used: {'; '.join(problems)}")
    names = ("application_name", "client_encoding", "options")
    parameters = {key: given[key] for key in names if key in given}
    if "fallback_application_name" in given:
        parameters.setdefault("application_name", given["fallback_application_name"])
    return ServerTarget(
        hosts,
        given.get("dbname", "" if is_template else user),
        user,
        _secret(given, "password"),
        parameters,
        scram_keys=scram_keys,
        tls=tls,
        channel_binding=given.get("channel_binding", "prefer"),
        methods=methods,
        session_attrs=SessionAttrs(given.get("target_session_attrs", "any")),
        is_balanced=given.get("load_balance_hosts") == "random",
        socket_options={key: int(given[key]) for key in ("keepalives", *_NUMBERS) if key in given},
    )


def _secret(given: Mapping[str, str], key: str) -> SecretStr | None:
    return SecretStr(given[key]) if key in given else None


# -- what is honoured, and what is not -------------------------------------------------------------


def _refusal(key: str, value: str) -> str | None:
    if key in _TEXTS:
        return None
    if key in _CHOICES:
        choices = _CHOICES[key]
        return None if _chosen(choices, value) else f"allowed for {key}: {', '.join(choices)}"
    if key in _NUMBERS:
        return None if re.fullmatch("[0-9]{1,9}", value) else f"{key} is not a whole number"
    if key == "connect_timeout":
        return "connect_timeout belongs to the pool's options, not into the dsn"
    return f"{key} is not available in this version, leave it out"


def _chosen(choices: tuple[str, ...], value: str) -> str | None:
    """The choice; versions of TLS may be written in any case, as for libpq."""
    same = str.lower if choices is _TLS_VERSIONS else str
    return next((choice for choice in choices if same(choice) == same(value)), None)


# -- hosts -----------------------------------------------------------------------------------------


def _hosts(given: Mapping[str, str], problems: list[str]) -> tuple[Host, ...]:
    """The hosts, by position in ``host``, ``hostaddr`` and ``port`` (34.1.1.3)."""
    names, addresses = given.get("host", "").split(","), given.get("hostaddr", "").split(",")
    ports = given.get("port", "").split(",")
    if "hostaddr" not in given:
        addresses = [""] * len(names)
    elif "host" not in given:
        names = [""] * len(addresses)
    if len(ports) == 1:
        ports *= len(names)
    if not len(names) == len(addresses) == len(ports):
        problems.append(
            f"it has {len(names)} hosts, {len(addresses)} addresses and {len(ports)} ports;"
            " allowed: as many of each, or one port for all"
        )
        return ()
    if len(names) > _MOST_HOSTS:
        problems.append(f"it names {len(names)} hosts; allowed: at most {_MOST_HOSTS}")
    if not all(
        re.fullmatch("[0-9]{0,5}", port) and 1 <= int(port or 5432) <= 65535 for port in ports
    ):
        problems.append("its port is not a number from 1 to 65535")
        return ()
    if not all(map(_is_address, filter(None, addresses))):
        problems.append("its hostaddr is not an IP address; allowed for a name: host")
    return tuple(
        Host(name or address or "localhost", int(port or 5432), address)
        for name, address, port in zip(names, addresses, ports, strict=True)
    )


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


# -- TLS -------------------------------------------------------------------------------------------

_WEAK = (SslMode.DISABLE, SslMode.ALLOW, SslMode.PREFER)
_VERIFYING = (SslMode.VERIFY_CA, SslMode.VERIFY_FULL)


def _tls(given: Mapping[str, str], problems: list[str]) -> TlsPolicy:
    root = given.get("sslrootcert", "")
    default = SslMode.VERIFY_FULL if root == "system" else SslMode.PREFER
    word = given.get("sslmode", default)
    mode = SslMode(word) if word in _CHOICES["sslmode"] else default
    is_direct = given.get("sslnegotiation") == "direct"
    names_server = given.get("sslsni") != "0"
    sends_certificate = "sslcert" in given and given.get("sslcertmode") != "disable"
    oldest = _chosen(_TLS_VERSIONS, given.get("ssl_min_protocol_version", "")) or _TLS_VERSIONS[0]
    newest = _chosen(_TLS_VERSIONS, given.get("ssl_max_protocol_version", "")) or ""
    if root == "system" and mode is not SslMode.VERIFY_FULL:
        problems.append("sslrootcert=system is for sslmode verify-full only: anyone can have such")
    if mode in _VERIFYING and not root:
        problems.append(f"sslmode {mode} needs sslrootcert, a file or system")
    if mode is SslMode.VERIFY_FULL and not names_server:
        problems.append("sslsni=0 is not available with sslmode verify-full")
    if is_direct and mode in _WEAK:
        problems.append("sslnegotiation=direct is for sslmode require, verify-ca or verify-full")
    if ("sslcert" in given) != ("sslkey" in given):
        problems.append("sslcert and sslkey belong together, one is missing")
    if newest and oldest > newest:
        problems.append("ssl_min_protocol_version is more than ssl_max_protocol_version")
    return TlsPolicy(
        mode,
        root,
        given.get("sslcert", "") if sends_certificate else "",
        given.get("sslkey", "") if sends_certificate else "",
        _secret(given, "sslpassword"),
        given.get("sslcrl", ""),
        oldest,
        newest,
        names_server,
        is_direct,
    )


# -- authentication --------------------------------------------------------------------------------


def _methods(text: str, problems: list[str]) -> frozenset[str] | None:
    """``require_auth``: all that are named, or all but those named with a ``!``."""
    if not text:
        return None
    words = [word.strip() for word in text.split(",")]
    negative = {word[1:] for word in words if word.startswith("!")}
    positive = {word for word in words if not word.startswith("!")}
    if (negative and positive) or not negative | positive <= set(_METHODS):
        problems.append(
            f"allowed for require_auth: {', '.join(_METHODS)}; with a ! before each or none"
        )
    return frozenset(positive or set(_METHODS) - negative)


def _scram_keys(given: Mapping[str, str], problems: list[str]) -> ScramKeys | None:
    keys = [given[key] for key in ("scram_client_key", "scram_server_key") if key in given]
    if not keys:
        return None
    try:
        client_key, server_key = (base64.b64decode(key, validate=True) for key in keys)
    except ValueError:
        client_key = server_key = b""
    if len(client_key) != 32 or len(server_key) != 32:
        problems.append("scram_client_key and scram_server_key are not both 32 bytes in base64")
    return ScramKeys(client_key, server_key)


# -- words -----------------------------------------------------------------------------------------


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
