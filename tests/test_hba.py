"""Rules on who may log in: read as PostgreSQL reads its pg_hba.conf, the first that fits counts."""

from collections.abc import Iterator
from ipaddress import ip_address, ip_network

import psycopg
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from sidecar import config, hba
from sidecar.config_file import parse
from sidecar.demo.postgres import EmbeddedPostgres
from sidecar.errors import ConfigError
from sidecar.hba import Kind, Method, Peer, Rule, first_match, parse_rules, peer_address
from tests.wire import Sidecar, error, startup

DOCUMENTED = """\
# Example 21.1 of PostgreSQL's manual, as far as it is about what there is here.

# Allow any user on the local system to connect to any database with
# any database user name using Unix-domain sockets (the default for local
# connections).
#
# TYPE  DATABASE        USER            ADDRESS                 METHOD
local   all             all                                     trust

# The same using local loopback TCP/IP connections.
host    all             all             127.0.0.1/32            trust

# The same as the previous line, but using a separate netmask column
host    all             all             127.0.0.1       255.255.255.255     trust

# The same over IPv6.
host    all             all             ::1/128                 trust

# Allow any user from any host with IP address 192.168.93.x to connect
# to database "postgres" ...
host    postgres        all             192.168.93.0/24         scram-sha-256

# Allow any user from host 192.168.12.10 to connect to database
# "postgres" if the user's password is correctly supplied.
host    postgres        all             192.168.12.10/32        scram-sha-256

# In the absence of preceding "host" lines, these three lines will
# reject all connections from 192.168.54.1 (since that entry will be
# matched first), but allow connections from anywhere else on the Internet.
host    all             all             192.168.54.1/32         reject
hostssl all             all             0.0.0.0/0               cert
host    all             all             0.0.0.0/0               scram-sha-256

# If these are the only four lines for local connections, they will
# allow local users to connect only to their own databases (databases
# with the same name as their database user name) ...
local   sameuser        all                                     scram-sha-256
local   all             admins                                  scram-sha-256
local   db1,db2,"all"   "all", bob                              password
hostssl all \\
        all samehost \\
        scram-sha-256 clientcert=verify-full
hostnossl replication,db3 all all reject
"""


def peer(address: str | None = None, *, is_encrypted: bool = False, here: str = "10.9.9.9") -> Peer:
    if address is None:
        return Peer(None, None, is_encrypted)
    return Peer(peer_address(address), peer_address(here), is_encrypted)


def line_of(text: str, where: Peer, database: str = "db", user: str = "bob") -> int | None:
    rule = first_match(parse_rules(text), where, [database], user)
    return None if rule is None else rule.line


# -- reading -----------------------------------------------------------------------------------


def as_postgresql_says_it(rule: Rule) -> tuple[object, ...]:
    """A line of the view pg_hba_file_rules."""
    databases = rule.databases.names | ({"all"} if rule.databases.has_all else set())
    databases |= {"sameuser"} if rule.databases.has_same else set()
    users = rule.users.names | ({"all"} if rule.users.has_all else set())
    address = "samehost" if rule.is_samehost else "all"
    if rule.network is not None:
        address = str(rule.network.network_address)
    mask = None if rule.network is None else str(rule.network.netmask)
    options = {f"clientcert={rule.client_cert}"} if rule.client_cert else set()
    if rule.method is Method.CERT:
        options = {"clientcert=verify-full"}
    return (
        rule.line,
        rule.kind.value,
        databases,
        users,
        None if rule.kind is Kind.LOCAL else address,
        mask,
        rule.method.value,
        options,
    )


Line = tuple[object, ...]


class Reader:
    """PostgreSQL, as a reader of rules."""

    def __init__(self, postgres: EmbeddedPostgres, connection: psycopg.Connection) -> None:
        self._path = postgres.data_dir / "pg_hba.conf"
        self._connection = connection
        self.original = self._path.read_bytes()

    def write(self, data: bytes) -> None:
        with self._path.open("r+b") as file:  # it stays the server's
            file.truncate()
            file.write(data)

    def read(self, text: str) -> tuple[list[Line], list[str]]:
        """Its rules, and its errors."""
        self.write(text.encode())
        found = self._connection.execute(
            "SELECT line_number, type, database, user_name, address, netmask, auth_method, options,"
            " error FROM pg_hba_file_rules ORDER BY line_number"
        ).fetchall()
        lines: list[Line] = []
        for number, kind, databases, users, address, mask, method, options, _ in found:
            # "replication" without quotes is a keyword for a kind of connection we do not have
            names = set(databases or ()) - {"replication"}
            if mask is not None:
                network = ip_network(f"{address}/{int(ip_address(mask)).bit_count()}", strict=False)
                address = str(network.network_address)
            lines.append(
                (number, kind, names, set(users or ()), address, mask, method, set(options or ()))
            )
        return lines, [row[-1] for row in found if row[-1] is not None]


@pytest.fixture(scope="module")
def reader(postgres) -> Iterator[Reader]:
    with psycopg.connect(postgres.dsn(), autocommit=True) as connection:
        reader = Reader(postgres, connection)
        try:
            yield reader
        finally:
            reader.write(reader.original)


def same(text: str, reader: Reader) -> bool:
    """Whether PostgreSQL reads the same rules."""
    lines, errors = reader.read(text)
    assert not errors, errors
    mine = [as_postgresql_says_it(rule) for rule in parse_rules(text)]
    assert mine == lines
    return True


# PostgreSQL without TLS refuses what it could not check: those are read by tables below.
WITHOUT_TLS = DOCUMENTED.replace("hostssl", "host   ").replace("cert\n", "reject\n")
WITHOUT_TLS = WITHOUT_TLS.replace(" clientcert=verify-full", "")


def test_documented_example_is_read_as_by_postgresql(reader):
    assert same(WITHOUT_TLS, reader)


def test_documented_example_is_read():
    rules = parse_rules(DOCUMENTED)
    assert len(rules) == 14
    assert [rule.method for rule in rules[:5]] == [Method.TRUST] * 4 + [Method.SCRAM]
    assert rules[1].network == rules[2].network == ip_network("127.0.0.1/32")
    assert rules[3].network == ip_network("::1/128")
    assert (rules[7].kind, rules[7].method) == (Kind.HOSTSSL, Method.CERT)
    assert rules[9].databases.has_same
    assert rules[11].databases.names == {"db1", "db2", "all"}
    assert rules[11].users.names == {"all", "bob"}
    assert not rules[11].users.has_all
    assert (rules[12].is_samehost, rules[12].client_cert) == (True, hba.ClientCert.VERIFY_FULL)
    assert DOCUMENTED.splitlines()[rules[12].line - 1] == "hostssl all \\"
    assert rules[13].databases.names == {"db3"}


# What PostgreSQL reads as words: names, quotes, commas, comments, joined lines.
NAME = st.sampled_from(
    [
        'a"b"c',
        "bob",
        '"all"',
        '"sameuser"',
        '"a b"',
        '"a,b"',
        '"a""b"',
        '"#x"',
        "a\\b",
        "ünï",
        '"+x"',
    ]
)
SPACE = st.sampled_from([" ", "\t", "  \t ", " \\\n ", "\\\n "])
COMMA = st.sampled_from([",", ", ", ",,", ",\t", ",\\\n"])


def listed(word: str) -> st.SearchStrategy[str]:
    one = st.one_of(st.just(word), NAME)
    return st.builds(
        lambda first, rest: first + "".join(comma + name for comma, name in rest),
        one,
        st.lists(st.tuples(COMMA, one), max_size=3),
    )


def any_network() -> st.SearchStrategy[str]:
    v4 = st.tuples(st.ip_addresses(v=4), st.integers(0, 32))
    v6 = st.tuples(st.ip_addresses(v=6), st.integers(0, 128))
    short = st.one_of(v4, v6).map(lambda pair: f"{pair[0]}/{pair[1]}")
    masks = v4.map(lambda pair: f"{pair[0]} {ip_network(f'0.0.0.0/{pair[1]}').netmask}")
    return st.one_of(st.sampled_from(["all", "samehost"]), short, masks)


METHOD = st.sampled_from(["scram-sha-256", "password", "reject", '"reject"'])
HOST_LINE = st.tuples(
    st.sampled_from(["host", "hostnossl", '"host"']),
    listed("all"),
    listed("all"),
    any_network(),
    METHOD,
)
LOCAL_LINE = st.tuples(st.just("local"), listed("sameuser"), listed("all"), METHOD)
END = st.sampled_from(["", " ", ' # comment, "quoted" all', "#x", "\r"])


@st.composite
def rule_lines(draw: st.DrawFn) -> str:
    fields = draw(st.one_of(HOST_LINE, LOCAL_LINE))
    text = draw(st.sampled_from(["", " ", "\t"]))
    for field in fields:
        text += field + draw(SPACE)
    return text.rstrip("\\\n\t ") + draw(END)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.one_of(rule_lines(), st.sampled_from(["", "# all", " \t"])), min_size=1))
@example(['host all bob"x y" 10.0.0.1/8 reject', 'local "a", b all reject'])
def test_generated_rules_are_read_as_by_postgresql(reader, lines):
    """Also host bits that are set, white space, empty elements and lines that go on."""
    text = "\n".join([*lines, "local all all reject"])
    assert same(text, reader)


@settings(max_examples=300, deadline=None)
@given(
    st.one_of(
        st.text(max_size=200),
        st.lists(
            st.sampled_from(
                [*("host ", "local ", "hostssl ", "all ", '"', ",", "\\\n", "\n", "#", "cert "),
                 *("10.0.0.0/8 ", "::/0 ", "/", "255.0.0.255 ", "scram-sha-256 ", "clientcert="),
                 *("fe80::1%eth0/64 ", "\0", "٣", "1.2.3.4/٣ ", "+a ", "@f ", "trust ")]
            ),
            max_size=30,
        ).map("".join),
    )
)  # fmt: skip
def test_any_text_is_read_or_refused_with_its_line(text):
    try:
        rules = parse_rules(text)
    except ValueError as exc:
        problem = str(exc)
    else:
        assert all(1 <= rule.line <= text.count("\n") + 1 for rule in rules)
        return
    assert problem.startswith(("line ", "has no rule"))


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("hosts all all all reject", "type 'hosts' is unknown; allowed: local, host, hostssl, hostnossl"),
        ("hostgssenc all all all reject", "type 'hostgssenc' is unknown; allowed: local, host, hostssl, hostnossl"),
        ("include other.conf", "type 'include' is unknown; allowed: local, host, hostssl, hostnossl"),
        ("host,local all all all reject", "a type cannot be a list; allowed: one in each line"),
        ("host", "ends before a database"),
        ("host all", "ends before a user"),
        ("host all all", "ends before an address; allowed: all, samehost, address/bits, or address and mask"),
        ("host all all all", "ends before a method; allowed: scram-sha-256, password, cert, trust, reject"),
        ("local all all 10.0.0.0/8 reject", "method '10.0.0.0/8' is not available; allowed: scram-sha-256, password, cert, trust, reject"),
        ("host all all all md5", "method 'md5' is not available; allowed: scram-sha-256, password, cert, trust, reject"),
        ("host all all db.example reject", "'db.example' is not an address; allowed: all, samehost, address/bits, or address and mask"),
        ("host all all samenet reject", "'samenet' is not an address; allowed: all, samehost, address/bits, or address and mask"),
        ('host all all "all" reject', "'all' is not an address; allowed: all, samehost, address/bits, or address and mask"),
        ("host all all 10.0.0.0/33 reject", "'10.0.0.0/33' has no number of bits; allowed behind the /: 0 to 32"),
        ("host all all ::/129 reject", "'::/129' has no number of bits; allowed behind the /: 0 to 128"),
        ("host all all 10.0.0.0/ reject", "'10.0.0.0/' has no number of bits; allowed behind the /: 0 to 32"),
        ("host all all 10.0.0.0", "ends before a mask; allowed: one like 255.255.255.0, or address/bits"),
        ("host all all 10.0.0.0 reject", "'reject' is not a mask; allowed: one like 255.255.255.0, or address/bits"),
        ("host all all 10.0.0.0 255.0.255.0 reject", "mask '255.0.255.0' has gaps; allowed: one like 255.255.255.0"),
        ("host all all 10.0.0.0 0.255.255.255 reject", "mask '0.255.255.255' has gaps; allowed: one like 255.255.255.0"),
        ("host all all 10.0.0.0 ffff:: reject", "address 10.0.0.0 and mask 'ffff::' are not of the same IP version"),
        ("host all all fe80::1%eth0/64 reject", "'fe80::1%eth0/64' has a zone; allowed: all, samehost, address/bits, or address and mask"),
        ("host samerole all all reject", "samerole is not available: the roles of the server are not known here"),
        ("host all +admins all reject", "'+admins' is not available: the roles of the server are not known here; allowed: all, and names (\"+name\" in quotes is one)"),
        ("host all /^a all reject", "'/^a': regular expressions are not available; allowed: names"),
        ("host @file all all reject", "'@file': files are not available; allowed: names"),
        ('host "" all all reject', 'a name is empty ("")'),
        ('host all "all all reject', 'a quote (") without its end'),
        ("host all all all cert", "method cert with type host; allowed: hostssl"),
        ("host all all all scram-sha-256 clientcert=verify-ca", "clientcert with type host; allowed: hostssl"),
        ("hostssl all all all scram-sha-256 clientcert=1", "clientcert '1'; allowed: verify-ca, verify-full"),
        ("hostssl all all all cert clientcert=verify-ca", "clientcert=verify-ca with method cert; allowed: verify-full, or nothing"),
        ("hostssl all all all cert map=x", "option 'map=x' is not available; allowed: clientcert=verify-ca, clientcert=verify-full"),
        ("host all all all reject now", "option 'now' is not available; allowed: clientcert=verify-ca, clientcert=verify-full"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_with_its_line(line, problem):
    with pytest.raises(ValueError, match="line") as caught:
        parse_rules(f"# nothing\nlocal all all \\\nreject\n{line}")
    assert str(caught.value) == f"line 4: {problem}"


@pytest.mark.parametrize(
    "address", ["all", "samehost", "0.0.0.0/0", "10.0.0.1/32", "127.0.0.0/7", "::/0", "::1/127"]
)
def test_trust_is_for_the_own_host_only(address):
    """DESIGN D13: else everyone who can reach this address is in the database."""
    for kind in ("host", "hostssl", "hostnossl"):
        with pytest.raises(ValueError, match="line 1: method trust would let everyone"):
            parse_rules(f"{kind} all all {address} trust")
    for near in (
        "local all all trust",
        "host all all 127.0.0.0/8 trust",
        "host all all ::1/128 trust",
    ):
        assert parse_rules(near)[0].method is Method.TRUST


# -- matching ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "database", "user", "line"),
    [
        (peer(), "db", "bob", 8),
        (peer("127.0.0.1"), "db", "bob", 11),
        (peer("::1"), "db", "bob", 17),
        (peer("192.168.93.77"), "postgres", "bob", 21),
        (peer("192.168.93.77"), "db", "bob", 32),
        (peer("192.168.12.10"), "postgres", "bob", 25),
        (peer("192.168.12.11"), "postgres", "bob", 32),
        (peer("192.168.54.1"), "db", "bob", 30),
        (peer("192.168.54.1", is_encrypted=True), "db", "bob", 30),
        (peer("8.8.8.8", is_encrypted=True), "db", "bob", 31),
        (peer("8.8.8.8"), "db", "bob", 32),
        (peer("::ffff:8.8.8.8"), "db", "bob", 32),
        (peer("fd00::1"), "db", "bob", None),
        (peer("fd00::1", here="fd00::1"), "db", "bob", None),
        (peer("fd00::1", here="fd00::1", is_encrypted=True), "db", "bob", 40),
        (peer("fd00::1%eth0", here="fd00::1%eth0", is_encrypted=True), "db", "bob", 40),
        (peer("fd00::1", here="fd00::2", is_encrypted=True), "db", "bob", None),
        (peer("fd00::1"), "db3", "bob", 43),
        (peer("fd00::1", is_encrypted=True), "db3", "bob", None),
        (peer("fd00::1"), "replication", "bob", None),
    ],
)
def test_first_rule_that_fits_counts(where, database, user, line):
    assert line_of(DOCUMENTED, where, database, user) == line


@pytest.mark.parametrize(
    ("rule", "database", "user", "is_matched"),
    [
        ("local sameuser all reject", "bob", "bob", True),
        ("local sameuser all reject", "db", "bob", False),
        ('local "sameuser" all reject', "bob", "bob", False),
        ('local "sameuser" all reject', "sameuser", "bob", True),
        ('local "all" all reject', "db", "bob", False),
        ('local all "all" reject', "db", "all", True),
        ('local all "all" reject', "db", "bob", False),
        ("local a,db,c x,bob reject", "db", "bob", True),
        ("local DB all reject", "db", "bob", False),
        ("local pgsidecar all reject", "pgsidecar", "bob", True),
        ("local all all reject", "pgsidecar", "bob", True),
        ("local replication all reject", "replication", "bob", False),
        ('local "replication" all reject', "replication", "bob", True),
        ('local all "+bob" reject', "db", "+bob", True),
    ],
)
def test_names_are_matched_as_by_postgresql(rule, database, user, is_matched):
    assert (line_of(rule, peer(), database, user) == 1) is is_matched


def test_database_is_matched_by_each_of_its_names():
    """A pool is asked for by its own name or by its database's: a rule for one is not got around."""
    rules = parse_rules("local shop all reject")
    assert first_match(rules, peer(), ["main", "main", "shop"], "bob") is not None
    assert first_match(rules, peer(), ["main", "main", "other"], "bob") is None


# -- what makes no sense -----------------------------------------------------------------------


def odd(text: str, **known: object) -> list[str]:
    options: dict[str, object] = dict.fromkeys(("has_tls", "has_tcp", "has_socket"), True)
    options |= {"requires_tls": False, "databases": {"main"}, **known}
    return hba.odd_rules(parse_rules(text), **options)  # type: ignore[arg-type]  # passed on


@pytest.mark.parametrize(
    ("text", "known", "remarks"),
    [
        ("local all all reject\nhost all all all reject", {}, []),
        ("local all all reject", {"has_socket": False}, ["line 1 never matches: there is no Unix socket (listen.unix_socket_dir)"]),
        ("host all all all reject", {"has_tcp": False}, ["line 1 never matches: there is no TCP listener (listen.host)"]),
        ("hostssl all all all reject", {"has_tls": False}, ["line 1 never matches: there is no TLS (listen.tls_cert_file)"]),
        ("hostnossl all all all reject", {"requires_tls": True}, ["line 1 never matches: all have to use TLS (listen.tls_mode)"]),
        ("local replication all reject", {}, ["line 1 never matches: replication connections are not pooled"]),
        ("local mian,shop all reject", {}, ["line 1 never matches: no pool has 'mian' or 'shop'"]),
        ("local mian all reject", {"databases": None}, []),
        ("local mian,main all reject", {}, []),
        ("host all all 10.0.0.0/8 reject\nhostssl main bob 10.1.0.0/16 cert", {}, ["line 2 never matches: line 1 matches all of it"]),
        ("hostssl all all 10.0.0.0/8 reject\nhost main bob 10.1.0.0/16 reject", {}, []),
        ("host all all 10.1.0.0/16 reject\nhost all all 10.0.0.0/8 reject", {}, []),
        ("host all all ::/0 reject\nhost all all 0.0.0.0/0 reject", {}, []),
        ("host sameuser all all reject\nhost main all all reject", {}, []),
        ("host all all all reject\nhost sameuser all samehost reject", {}, ["line 2 never matches: line 1 matches all of it"]),
        ("host all all all password", {"requires_tls": True}, []),
        ("host all all all password", {}, ["line 1: passwords may cross the network in clear text; safe are hostssl, and scram-sha-256"]),
        ("hostssl all all all password\nlocal all all password", {}, []),
    ],
)  # fmt: skip
def test_rules_that_make_no_sense_are_remarked_upon(text, known, remarks):
    assert odd(text, **known) == remarks


ADDRESSES = ["10.1.1.1", "10.2.0.1", "127.0.0.1", "::1", "fd00::1"]
NETWORKS = ["all", "samehost", "10.0.0.0/8", "10.1.0.0/16", "::/0", "127.0.0.1/32", "fd00::/8"]
SMALL_RULE = st.builds(
    "{} {} {} {} reject".format,
    st.sampled_from(["host", "hostssl", "hostnossl"]),
    st.sampled_from(["all", "sameuser", "main", "bob", "main,bob", "main,sameuser"]),
    st.sampled_from(["all", "bob", "bob,eve", "eve"]),
    st.sampled_from(NETWORKS),
)


@given(SMALL_RULE, SMALL_RULE)
def test_rule_that_is_said_to_be_covered_is(one, other):
    """Whoever the second is for, the first is for as well."""
    first, second = parse_rules(f"{one}\n{other}")
    if first.covers(second):
        for address in ADDRESSES:
            for is_encrypted in (False, True):
                where = peer(address, is_encrypted=is_encrypted, here="10.1.1.1")
                for database in ("main", "bob", "x"):
                    for user in ("bob", "eve", "x"):
                        if second.matches(where, [database], user):
                            assert first.matches(where, [database], user)


# -- in the configuration ----------------------------------------------------------------------


def listen(options: str) -> config.Config:
    text = f"listen: {{{options}}}\npools: {{main: {{dsn: 'postgresql://app@db.example/shop'}}}}"
    return parse(text, {}, "config.yaml")


def test_problem_names_the_option_and_the_line_and_quotes_no_more():
    with pytest.raises(ConfigError) as caught:
        listen('hba: "local all all reject\\nlocal all all\\nhost all all all mdfive"')
    assert str(caught.value) == (
        "listen.hba: line 2: ends before a method; allowed: scram-sha-256, password, cert, trust, reject;"
        " line 3: method 'mdfive' is not available; allowed: scram-sha-256, password, cert, trust, reject"
    )


def test_text_without_a_rule_is_refused():
    """Nobody could log in: it is more likely that somebody commented out one line too many."""
    with pytest.raises(ConfigError, match="has no rule"):
        listen('hba: "# local all all reject"')
    assert listen('hba: ""').listen.rules == ()


@pytest.mark.parametrize("rule", ["hostssl all all all cert", "hostssl all all all reject clientcert=verify-ca"])  # fmt: skip
def test_certificates_are_checked_by_something(rule):
    with pytest.raises(
        ConfigError, match=r"a rule for certificates \(hba, line 1\) and without tls_ca"
    ):
        listen(f'hba: "{rule}"')
    assert listen(f'hba: "{rule}", tls_ca_file: ca.pem').listen.rules


def test_remarks_know_the_pools_and_the_sockets():
    rules = "local all all reject\\nhost main,shop all all reject\\nhost nowhere all all reject"
    assert config.remarks(listen(f'hba: "{rules}"')) == [
        "line 1 never matches: there is no Unix socket (listen.unix_socket_dir)",
        "line 3 never matches: no pool has 'nowhere'",
    ]


# -- at the door -------------------------------------------------------------------------------

RULES = """\
local  all            all                  trust
host   main           nobody  all          reject
host   main           plain   127.0.0.1/32 password
host   other          all     samehost     scram-sha-256
host   main           alice   127.0.0.1/32 scram-sha-256
hostssl main          all     127.0.0.1/32 scram-sha-256
host   main           app     127.0.0.1/32 trust
"""
PASSWORDS = {"alice": "wonder land", "plain": "pläin text"}


@pytest.fixture(scope="module")
def ruled(postgres, tmp_path_factory):
    folder = tmp_path_factory.mktemp("socket")
    listen = {"auth": "trust", "hba": RULES, "unix_socket_dir": str(folder)}
    pools = {
        "main": {"dsn": postgres.dsn(), "max_size": 2},
        "other": {"dsn": postgres.dsn(dbname="template1"), "max_size": 2},
    }
    with Sidecar(pools=pools, listen=listen, users=PASSWORDS) as sidecar:
        yield sidecar, folder


def said_to(sidecar: Sidecar, user: str, database: str) -> dict[str, str]:
    with sidecar.connect() as client:
        client.send(startup({"user": user, "database": database}))
        return error(client.until_closed())


def test_the_log_says_who_was_refused(postgres, ruled, caplog):
    """Before the pool is known, too."""
    sidecar, _ = ruled
    with caplog.at_level("INFO", "pgsidecar.proxy"):
        said_to(sidecar, "eve", "main")
        said_to(sidecar, "eve", "nowhere")
    found = [vars(each) for each in caplog.records if each.message == "client refused"]
    assert [(each["user"], each.get("pool")) for each in found] == [("eve", "main"), ("eve", None)]


def test_client_without_a_rule_is_told_in_postgresqls_words(postgres, ruled):
    sidecar, _ = ruled
    fields = said_to(sidecar, "eve", "main")
    assert (fields["S"], fields["C"], fields["M"]) == (
        "FATAL",
        "28000",
        "the pool's rules have no entry for"
        ' host "127.0.0.1", user "eve", database "main", no encryption',
    )
    assert fields["H"] == "The rules are in listen.hba; the first that fits counts."
    fields = said_to(sidecar, "nobody", "main")
    assert (fields["C"], fields["M"]) == (
        "28000",
        "the pool's rules reject connection for"
        ' host "127.0.0.1", user "nobody", database "main", no encryption',
    )


def test_rule_holds_for_the_servers_name_of_the_database_too(postgres, ruled):
    sidecar, _ = ruled
    assert "reject connection" in said_to(sidecar, "nobody", postgres.database)["M"]


def test_trust_and_scram_are_for_those_whose_rules_say_so(ruled):
    sidecar, _ = ruled
    with sidecar.login("app") as client:
        assert client.value("select 1") == "1"
    dsn = sidecar.dsn("alice", password=PASSWORDS["alice"])
    with psycopg.connect(dsn) as connection:
        assert connection.execute("select 1").fetchone() == (1,)
    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        psycopg.connect(sidecar.dsn("alice", password="guess"))
    with psycopg.connect(sidecar.dsn("alice", "other", password=PASSWORDS["alice"])) as connection:
        assert connection.info.dbname == "other"


def test_unix_socket_has_rules_of_its_own(ruled):
    sidecar, folder = ruled
    with psycopg.connect(f"host={folder} port={sidecar.port} dbname=main user=eve") as connection:
        assert connection.execute("select 1").fetchone() == (1,)


async def test_password_in_clear_text_lets_in(ruled):
    """libpq is told to accept nothing else, asyncpg answers what it is asked."""
    import asyncpg

    sidecar, _ = ruled
    dsn = sidecar.dsn("plain", password=PASSWORDS["plain"])
    with psycopg.connect(f"{dsn}&require_auth=password") as connection:
        assert connection.execute("select 1").fetchone() == (1,)
    await (await asyncpg.connect(dsn)).close()
    for guess in ("guess", "x" * 10_000):
        with pytest.raises(asyncpg.InvalidPasswordError):
            await asyncpg.connect(sidecar.dsn("plain", password=guess))


@pytest.mark.parametrize(
    ("body", "sqlstate"),
    [
        (b"\0", "28P01"),
        (b"\xff\0", "28P01"),
        (b"", "08P01"),
        (b"abc", "08P01"),
        (b"a\0b\0", "08P01"),
    ],
)
def test_clear_text_that_is_no_password_is_refused(ruled, body, sqlstate):
    sidecar, _ = ruled
    with sidecar.connect() as client:
        client.send(startup({"user": "plain", "database": "main"}))
        assert client.receive() == ("R", b"\0\0\0\3")
        client.send(b"p" + (len(body) + 4).to_bytes(4, "big") + body)
        assert error(client.until_closed())["C"] == sqlstate
    sidecar.until_whole()
