"""Where, as whom and how a pool connects, as values. Pure; ``dsn`` reads them from a text."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from pydantic import SecretStr

from sidecar.protocol.authentication import ScramKeys

_SHOWN_HOSTS = 3  # of a target with many, in a log line or a label


class SslMode(StrEnum):
    """libpq's ``sslmode`` (PostgreSQL manual, 34.19.3)."""

    DISABLE = "disable"
    ALLOW = "allow"
    PREFER = "prefer"
    REQUIRE = "require"
    VERIFY_CA = "verify-ca"
    VERIFY_FULL = "verify-full"


class SessionAttrs(StrEnum):
    """libpq's ``target_session_attrs``: which of several servers will do."""

    ANY = "any"
    READ_WRITE = "read-write"
    READ_ONLY = "read-only"
    PRIMARY = "primary"
    STANDBY = "standby"
    PREFER_STANDBY = "prefer-standby"


@dataclass(frozen=True, slots=True)
class TlsPolicy:
    """When to use TLS, and with which files. Paths; empty: none."""

    mode: SslMode = SslMode.PREFER
    root: str = ""
    """CAs that may have signed the server's certificate; ``system``: those of the system."""
    certificate: str = ""
    key: str = ""
    key_password: SecretStr | None = None
    revoked: str = ""
    """Certificates that are no longer good (``sslcrl``)."""
    oldest: str = "TLSv1.2"
    newest: str = ""
    names_server: bool = True
    """Whether the server is told, in the clear, which name was asked for (SNI)."""
    is_direct: bool = False
    """TLS from the first byte on, as PostgreSQL 17 and newer understand it."""

    @property
    def attempts(self) -> tuple[bool, ...]:
        """Whether to use TLS, in the order to try it."""
        match self.mode:
            case SslMode.DISABLE:
                return (False,)
            case SslMode.ALLOW:
                return (False, True)
            case SslMode.PREFER:
                return (True, False)
            case _:
                return (True,)


@dataclass(frozen=True, slots=True)
class Host:
    """One server of a target."""

    name: str
    """A name or an address, which the server's certificate has to bear; a path (it starts with ``/``)
    is the directory of a Unix socket."""
    port: int = 5432
    address: str = ""
    """Where to connect, if not where the name leads to (``hostaddr``)."""

    @property
    def is_unix(self) -> bool:
        return not self.address and self.name.startswith("/")

    def describe(self) -> str:
        """``host:port`` or the path of the socket."""
        if self.is_unix:
            return f"{self.name}/.s.PGSQL.{self.port}"
        return f"[{self.name}]:{self.port}" if ":" in self.name else f"{self.name}:{self.port}"


@dataclass(frozen=True, slots=True)
class ServerTarget:
    """Where and as whom a pool connects. Of a template, ``database`` and ``user`` may be empty."""

    hosts: tuple[Host, ...]
    """Servers that may do, in the order to try them; at least one."""
    database: str
    user: str
    password: SecretStr | None = None
    parameters: Mapping[str, str] = field(default_factory=dict, hash=False)
    """Startup parameters to send: ``application_name``, ``client_encoding``, ``options``."""
    scram_keys: ScramKeys | None = None
    """In place of a password, where the server asks for SCRAM."""
    tls: TlsPolicy = TlsPolicy()
    channel_binding: str = "prefer"
    """disable, prefer or require that the login is bound to the TLS connection."""
    methods: frozenset[str] | None = None
    """The methods by which the server may authenticate us (``require_auth``); None: any."""
    session_attrs: SessionAttrs = SessionAttrs.ANY
    is_balanced: bool = False
    """Try the hosts in random order (``load_balance_hosts``)."""
    socket_options: Mapping[str, int] = field(default_factory=dict, hash=False)
    """``keepalives``, ``keepalives_idle`` ..., ``tcp_user_timeout``, where given."""

    def describe(self) -> str:
        """The hosts as ``host:port``, a few of many; no secrets."""
        shown = [host.describe() for host in self.hosts[:_SHOWN_HOSTS]]
        if len(self.hosts) > _SHOWN_HOSTS:
            shown.append(f"+{len(self.hosts) - _SHOWN_HOSTS}")
        return ",".join(shown)
