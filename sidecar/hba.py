"""Rules on who may log in from where and how: a subset of pg_hba.conf (PostgreSQL manual, 21.1).

Owns the syntax, read as PostgreSQL reads it, which rule applies to a client, and which rules never
can. Pure. What a method asks for is checked in ``proxy.authenticate``.

A rule for something that this pool does not have (``md5``, ``+group``, host names ...) is refused
rather than skipped: the rules behind it would apply to those it was meant for.
"""

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from ipaddress import (
    IPv4Address,
    IPv4Network,
    IPv6Address,
    IPv6Network,
    ip_address,
    ip_network,
)

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network


class Kind(StrEnum):
    """Which connections a rule is for."""

    LOCAL = "local"
    HOST = "host"
    HOSTSSL = "hostssl"
    HOSTNOSSL = "hostnossl"


class Method(StrEnum):
    SCRAM = "scram-sha-256"
    PASSWORD = "password"
    CERT = "cert"
    TRUST = "trust"
    REJECT = "reject"


class ClientCert(StrEnum):
    """What has to be true of the client's certificate, besides the method."""

    ANY = ""
    VERIFY_CA = "verify-ca"
    VERIFY_FULL = "verify-full"


@dataclass(frozen=True, slots=True)
class Peer:
    """Where a client is."""

    address: Address | None
    """None: on a Unix socket."""
    here: Address | None
    """The address of ours that it has connected to."""
    is_encrypted: bool

    def describe(self) -> str:
        """As PostgreSQL says it in its errors."""
        host = "[local]" if self.address is None else str(self.address)
        return f'host "{host}"'


@dataclass(frozen=True, slots=True)
class Names:
    """A list of databases or users."""

    names: frozenset[str] = frozenset()
    has_all: bool = False
    has_same: bool = False  # sameuser

    def __contains__(self, name: str) -> bool:
        return self.has_all or name in self.names

    def covers(self, other: "Names") -> bool:
        return self.has_all or (
            not other.has_all
            and other.names <= self.names
            and (self.has_same or not other.has_same)
        )


@dataclass(frozen=True, slots=True)
class Rule:
    line: int
    """The number of its first line."""
    kind: Kind
    databases: Names
    users: Names
    network: Network | None
    """Addresses it is for; None with ``local``, ``all`` and ``samehost``."""
    is_samehost: bool
    method: Method
    client_cert: ClientCert = ClientCert.ANY

    def matches(self, peer: Peer, databases: Collection[str], user: str) -> bool:
        """``databases``: every name of the one that the client asks for."""
        return (
            self._is_for(peer)
            and user in self.users
            and any(
                name in self.databases or (self.databases.has_same and name == user)
                for name in databases
            )
        )

    def _is_for(self, peer: Peer) -> bool:
        if peer.address is None or self.kind is Kind.LOCAL:
            return peer.address is None and self.kind is Kind.LOCAL
        if self.kind is Kind.HOSTSSL and not peer.is_encrypted:
            return False
        if self.kind is Kind.HOSTNOSSL and peer.is_encrypted:
            return False
        if self.is_samehost:
            # Who connects to an address of its own host has, unless it takes another one, the same.
            return peer.address == peer.here or peer.address.is_loopback
        return self.network is None or peer.address in self.network

    def covers(self, other: "Rule") -> bool:
        """Whether all that the other could match is matched by this one."""
        return (
            (self.kind is other.kind or (self.kind is Kind.HOST and other.kind is not Kind.LOCAL))
            and self.databases.covers(other.databases)
            and self.users.covers(other.users)
            and self._covers_addresses(other)
        )

    def _covers_addresses(self, other: "Rule") -> bool:
        if self.is_samehost:
            return other.is_samehost
        if self.network is None:
            return True
        mine, its = self.network, other.network
        if isinstance(mine, IPv4Network):
            return isinstance(its, IPv4Network) and its.subnet_of(mine)
        return isinstance(its, IPv6Network) and its.subnet_of(mine)

    @property
    def checks_certificate(self) -> bool:
        return self.method is Method.CERT or self.client_cert is not ClientCert.ANY

    @property
    def names_user(self) -> bool:
        """Whether the certificate's common name has to be the user's."""
        return self.method is Method.CERT or self.client_cert is ClientCert.VERIFY_FULL


def first_match(
    rules: Iterable[Rule], peer: Peer, databases: Collection[str], user: str
) -> Rule | None:
    return next((rule for rule in rules if rule.matches(peer, databases, user)), None)


def peer_address(text: str) -> Address:
    """An address as the system tells it: without a zone, and IPv4 as such. ValueError if it is none."""
    address = ip_address(text.partition("%")[0])
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return mapped or address


# -- the text ----------------------------------------------------------------------------------


@lru_cache(maxsize=16)
def parse_rules(text: str) -> tuple[Rule, ...]:
    """The rules in order. ValueError says all that is wrong, with the lines."""
    rules: list[Rule] = []
    problems: list[str] = []
    for number, line in _logical_lines(text):
        try:
            fields = list(_fields(line))
            if fields:
                rules.append(_rule(number, fields))
        except ValueError as exc:
            problems.append(f"line {number}: {exc}")
    if problems:
        raise ValueError("; ".join(problems))
    if text.strip() and not rules:
        raise ValueError("has no rule: nobody could log in; allowed: rules, or nothing at all")
    return tuple(rules)


@dataclass(frozen=True, slots=True)
class _Token:
    text: str
    is_quoted: bool  # it begins with a quote: no keyword then

    def is_word(self, word: str) -> bool:
        return not self.is_quoted and self.text == word


def _logical_lines(text: str) -> Iterator[tuple[int, str]]:
    """Lines with the number of the first; a backslash at the end of one joins the next to it."""
    begun, first = "", 0
    number = 0
    for number, line in enumerate(text.split("\n"), start=1):
        line = line.removesuffix("\r")
        first = first or number
        if line.endswith("\\"):
            begun += line[:-1]
        else:
            yield first, begun + line
            begun, first = "", 0
    if first:
        yield first, begun


def _fields(line: str) -> Iterator[list[_Token]]:
    """Fields of a line, each a list of what has commas between (``next_field_expand`` in hba.c)."""
    at = 0
    field: list[_Token] = []
    while True:
        token, at, has_comma = _next_token(line, at)
        if token is not None:
            field.append(token)
        if not has_comma or token is None:
            if field:
                yield field
            field = []
        if token is None:
            return


def _next_token(line: str, at: int) -> tuple[_Token | None, int, bool]:
    """The token, where it ends, and whether a comma follows (``next_token`` in hba.c)."""
    while at < len(line) and line[at] in " \t\r,":
        at += 1
    text: list[str] = []
    is_quoted = is_inside = was_quote = has_quote = False
    while at < len(line) and (is_inside or line[at] not in " \t\r"):
        char = line[at]
        if not is_inside and char == "#":
            at = len(line)
            break
        if not is_inside and char == ",":
            return _Token("".join(text), is_quoted), at + 1, True
        if char != '"' or was_quote:
            text.append(char)
        was_quote = is_inside and char == '"' and not was_quote
        if char == '"':
            is_inside = not is_inside
            is_quoted = is_quoted or not text
            has_quote = True
        at += 1
    if is_inside:
        raise ValueError('a quote (") without its end')
    if not text and not has_quote:
        return None, at, False
    return _Token("".join(text), is_quoted), at, False


# -- fields ------------------------------------------------------------------------------------


def _rule(line: int, fields: list[list[_Token]]) -> Rule:
    fields = list(fields)
    kind = _kind(_next(fields, f"a type; allowed: {_all_of(Kind)}"))
    databases = _databases(_next(fields, "a database"))
    users = _users(_next(fields, "a user"))
    network, is_samehost = None, False
    if kind is not Kind.LOCAL:
        network, is_samehost = _addresses(fields)
    method = _method(_next(fields, f"a method; allowed: {_all_of(Method)}"))
    client_cert = _options(kind, method, fields)
    if method is Method.CERT and kind is not Kind.HOSTSSL:
        raise ValueError(f"method cert with type {kind}; allowed: hostssl")
    is_near = kind is Kind.LOCAL or (network is not None and network.is_loopback)
    if method is Method.TRUST and not is_near:
        raise ValueError(
            "method trust would let everyone who can reach this address into the database without"
            " a password; allowed: type local, or addresses on loopback (127.0.0.1/32, ::1/128)"
        )
    return Rule(line, kind, databases, users, network, is_samehost, method, client_cert)


def _next(fields: list[list[_Token]], what: str) -> list[_Token]:
    if not fields:
        raise ValueError(f"ends before {what}")
    return fields.pop(0)


def _one(field: list[_Token], what: str) -> _Token:
    if len(field) != 1:
        raise ValueError(f"{what} cannot be a list; allowed: one in each line")
    return field[0]


def _kind(field: list[_Token]) -> Kind:
    word = _one(field, "a type").text
    if word not in list(Kind):
        raise ValueError(f"type {_shown(word)} is unknown; allowed: {_all_of(Kind)}")
    return Kind(word)


def _databases(field: list[_Token]) -> Names:
    for word in ("samerole", "samegroup"):
        if any(token.is_word(word) for token in field):
            raise ValueError(f"{word} is not available: the roles of the server are not known here")
    has_same = any(token.is_word("sameuser") for token in field)
    # "replication" is a kind of connection that there is not: it stands in the list for nobody
    words = ("all", "sameuser", "replication")
    return Names(_literal(field, words), _has_all(field), has_same)


def _users(field: list[_Token]) -> Names:
    if group := next((t.text for t in field if not t.is_quoted and t.text.startswith("+")), None):
        raise ValueError(
            f"{_shown(group)} is not available: the roles of the server are not known here;"
            ' allowed: all, and names ("+name" in quotes is one)'
        )
    return Names(_literal(field, ("all",)), _has_all(field))


def _has_all(field: list[_Token]) -> bool:
    return any(token.is_word("all") for token in field)


def _literal(field: list[_Token], keywords: Collection[str]) -> frozenset[str]:
    for token in field:
        if token.text.startswith("/"):
            raise ValueError(
                f"{_shown(token.text)}: regular expressions are not available; allowed: names"
            )
        if token.text.startswith("@") and not token.is_quoted:
            raise ValueError(f"{_shown(token.text)}: files are not available; allowed: names")
        if not token.text:
            raise ValueError('a name is empty ("")')
    return frozenset(
        token.text for token in field if not any(token.is_word(word) for word in keywords)
    )


def _addresses(fields: list[list[_Token]]) -> tuple[Network | None, bool]:
    """Network (None: all), and whether it is ``samehost``."""
    allowed = "allowed: all, samehost, address/bits, or address and mask"
    token = _one(_next(fields, f"an address; {allowed}"), "an address")
    if token.is_word("all"):
        return None, False
    if token.is_word("samehost"):
        return None, True
    host, slash, bits = token.text.partition("/")
    try:
        address = ip_address(host)
    except ValueError:
        raise ValueError(f"{_shown(token.text)} is not an address; {allowed}") from None
    if getattr(address, "scope_id", None) is not None:
        raise ValueError(f"{_shown(token.text)} has a zone; {allowed}")
    if slash:
        if not (bits.isascii() and bits.isdigit() and int(bits) <= address.max_prefixlen):
            raise ValueError(
                f"{_shown(token.text)} has no number of bits;"
                f" allowed behind the /: 0 to {address.max_prefixlen}"
            )
        return ip_network(f"{address}/{int(bits)}", strict=False), False
    mask = _one(_next(fields, "a mask; allowed: one like 255.255.255.0, or address/bits"), "a mask")
    return ip_network(f"{address}/{_bits_of(mask.text, address)}", strict=False), False


def _bits_of(text: str, address: Address) -> int:
    """How many bits a mask has set: from the left, without a gap."""
    try:
        mask = ip_address(text)
    except ValueError:
        raise ValueError(
            f"{_shown(text)} is not a mask; allowed: one like 255.255.255.0, or address/bits"
        ) from None
    if mask.version != address.version:
        raise ValueError(
            f"address {address} and mask {_shown(text)} are not of the same IP version"
        )
    size = mask.max_prefixlen
    bits = int(mask).bit_count()
    if int(mask) != (1 << size) - (1 << (size - bits)):
        raise ValueError(f"mask {_shown(text)} has gaps; allowed: one like 255.255.255.0")
    return bits


def _method(field: list[_Token]) -> Method:
    word = _one(field, "a method").text
    if word not in list(Method):
        raise ValueError(f"method {_shown(word)} is not available; allowed: {_all_of(Method)}")
    return Method(word)


def _options(kind: Kind, method: Method, fields: list[list[_Token]]) -> ClientCert:
    given = ClientCert.ANY
    for token in (token for field in fields for token in field):
        name, equals, value = token.text.partition("=")
        if name != "clientcert" or not equals:
            raise ValueError(
                f"option {_shown(token.text)} is not available;"
                " allowed: clientcert=verify-ca, clientcert=verify-full"
            )
        if value not in ("verify-ca", "verify-full"):
            raise ValueError(f"clientcert {_shown(value)}; allowed: verify-ca, verify-full")
        if kind is not Kind.HOSTSSL:
            raise ValueError(f"clientcert with type {kind}; allowed: hostssl")
        given = ClientCert(value)
    if method is Method.CERT and given is ClientCert.VERIFY_CA:
        raise ValueError("clientcert=verify-ca with method cert; allowed: verify-full, or nothing")
    return given


def _shown(text: str) -> str:
    return repr(text if len(text) <= 80 else f"{text[:77]}...")


def _all_of(kind: type[StrEnum]) -> str:
    return ", ".join(kind)


# -- what makes no sense -----------------------------------------------------------------------


def odd_rules(
    rules: tuple[Rule, ...],
    *,
    has_tls: bool,
    requires_tls: bool,
    has_tcp: bool,
    has_socket: bool,
    databases: Collection[str] | None,
) -> list[str]:
    """A line on each rule that can never match, or that is risky. ``databases`` are all that clients
    can ask for, None if they are not known beforehand."""
    found: list[str] = []
    for number, rule in enumerate(rules):
        names = rule.databases
        before = next((each for each in rules[:number] if each.covers(rule)), None)
        why = ""
        if rule.kind is Kind.LOCAL and not has_socket:
            why = "there is no Unix socket (listen.unix_socket_dir)"
        elif rule.kind is not Kind.LOCAL and not has_tcp:
            why = "there is no TCP listener (listen.host)"
        elif rule.kind is Kind.HOSTSSL and not has_tls:
            why = "there is no TLS (listen.tls_cert_file)"
        elif rule.kind is Kind.HOSTNOSSL and requires_tls:
            why = "all have to use TLS (listen.tls_mode)"
        elif not (names.has_all or names.has_same or names.names):
            why = "replication connections are not pooled"
        elif before is not None:
            why = f"line {before.line} matches all of it"
        elif (
            databases is not None
            and not (names.has_all or names.has_same)
            and names.names.isdisjoint(databases)
        ):
            why = f"no pool has {' or '.join(sorted(map(_shown, names.names)))}"
        if why:
            found.append(f"line {rule.line} never matches: {why}")
        elif rule.method is Method.PASSWORD and not (
            rule.kind in (Kind.LOCAL, Kind.HOSTSSL) or requires_tls
        ):
            found.append(
                f"line {rule.line}: passwords may cross the network in clear text;"
                " safe are hostssl, and scram-sha-256"
            )
    return found
