"""Attacks on who gets in, as whom, and on what is theirs: each has to fail."""

import hmac
import socket
import ssl
import struct
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import psycopg
import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from sidecar.config_changes import taken_over
from sidecar.demo.postgres import EmbeddedPostgres
from sidecar.protocol import messages as m
from sidecar.protocol.authentication import ClientExchange
from tests.listener_files import ListenerFiles
from tests.test_console import CONSOLE
from tests.wire import SSL_REQUEST, Sidecar, error, kinds, query, startup

HIDDEN = b"; SET search_path TO trap; CREATE TEMP TABLE trap (a int); --"


def reload_(sidecar: Sidecar, other: Sidecar) -> None:
    """As RELOAD does, with the configuration of the other one."""
    given = other.service.config
    sidecar.call(
        lambda: sidecar.service._take_over(taken_over(sidecar.service.config, given), given)
    )


# -- settings that are carried over ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("encoding", "character"),
    [("SJIS", b"\x83\\"), ("BIG5", b"\xa5\\"), ("GBK", b"\x95\\"), ("GB18030", b"\xa5\\")],
)
def test_value_whose_last_byte_looks_like_a_backslash_is_no_way_out_of_a_text(
    postgres, encoding, character
):
    """In these encodings a backslash may be the second byte of a character: what doubles it makes a
    character and a backslash of it, which escapes the quote that should end the text."""
    loose = {"client_encoding": encoding, "backslash_quote": "on"}
    with Sidecar(postgres, max_size=1) as sidecar:
        with sidecar.login(**loose) as first:
            assert first.value("SELECT 1") == "1"
        with sidecar.connect() as attacker:
            values: dict[str, str | bytes] = {"trap.a": character, "trap.b": HIDDEN}
            attacker.send(startup({"user": "app", "database": "main", **loose, **values}))
            found = attacker.until("ZE")
            assert found[-1].kind == "Z", error(found)
            rows = attacker.ask(
                query("SELECT current_setting('trap.a'), current_setting('trap.b')")
            )
            assert [row.columns for row in rows if row.kind == "D"] == [[character, HIDDEN]]
        with sidecar.login() as victim:
            assert victim.value("SHOW search_path") == '"$user", public'
            assert victim.value("SELECT to_regclass('pg_temp.trap') IS NULL") == "t"


@pytest.mark.parametrize("encoding", ["LATIN1", "SJIS"])
def test_encoding_of_the_client_before_does_not_change_what_is_carried(postgres, encoding):
    """A tenant's name, say, by which a policy lets rows be seen: in LATIN1 its bytes are another's."""
    with Sidecar(postgres, max_size=1) as sidecar:
        theirs = {"client_encoding": encoding}
        ours = {"trap.tenant": "é", "search_path": '"ü"'}
        for parameters in (ours, theirs, ours, theirs, ours | theirs, ours):
            if parameters == ours | theirs and encoding == "SJIS":
                continue  # these bytes are none there
            with sidecar.login(**parameters) as client:
                if "trap.tenant" in parameters and "client_encoding" not in parameters:
                    told = "SELECT current_setting('trap.tenant'), length(current_setting('trap.tenant'))"
                    assert client.rows(told) == [["é", "1"]]
                    assert client.value("SHOW search_path") == '"ü"'
                else:
                    assert client.value("SELECT 1") == "1"


@pytest.mark.parametrize(
    ("parameters", "text"),
    [
        ({"client_encoding": "SJIS"}, b"SELECT E'\x83\\'%b"),
        ({"options": "-c standard_conforming_strings=off"}, b"SELECT '\\''%b '"),
        ({}, b"SELECT E'a'\n'\\''%b '"),
        ({}, b"SELECT $A$ $a$ ' $A$%b '"),
        ({}, b"SELECT 1; --\r%b"),
        ({}, b"/* /* /* */ */ ' */ %b '"),
        ({}, b"/* /* */ select */ SET search_path TO trap"),
        ({}, b"--\rSET search_path TO trap /*\nselect */"),
    ],
    ids=["SJIS", "no_conforming", "continued", "tag", "cr", "deep", "nested_first", "cr_first"],
)
def test_statements_hidden_from_a_lexer_leave_nothing_to_others(postgres, parameters, text):
    """What PostgreSQL takes for the end of a text or comment, and a careless reader does not."""
    with Sidecar(postgres, max_size=1) as sidecar:
        with sidecar.login(**parameters) as attacker:
            found = attacker.ask(query(text % HIDDEN if b"%b" in text else text))
            assert b"SET\0" in [message.body for message in found if message.kind == "C"]
        with sidecar.login() as victim:
            assert victim.value("SHOW search_path") == '"$user", public'
            assert victim.value("SELECT to_regclass('pg_temp.trap') IS NULL") == "t"


# -- the console -----------------------------------------------------------------------------------


def test_rule_for_the_console_holds_for_its_other_name(postgres):
    rules = "host pgsidecar all 127.0.0.1/32 reject\nhost all all 127.0.0.1/32 trust\n"
    with Sidecar(postgres, console=CONSOLE, listen={"hba": rules}) as sidecar:
        for database in ("pgsidecar", "pgbouncer"):
            with sidecar.connect() as client:
                client.send(startup({"user": "admin", "database": database}))
                assert error(client.until_closed())["C"] == "28000"
        sidecar.login().value("SELECT 1")


def test_reload_takes_the_rights_of_those_who_are_there(postgres):
    """An administrator of yesterday looks on today, and tomorrow does not even that."""
    with (
        Sidecar(postgres, console=CONSOLE) as sidecar,
        sidecar.login("admin", "pgsidecar") as admin,
    ):
        assert kinds(admin.ask(query("RECONNECT"))) == "CZ"
        for rights, allowed in (({"stats_users": ["admin"]}, True), ({}, False)):
            reload_(sidecar, Sidecar(postgres, console=rights))
            assert error(admin.ask(query("PAUSE")))["C"] == "42501"
            assert (kinds(admin.ask(query("SHOW VERSION"))) == "TDCZ") is allowed


# -- limits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("parameters", [{}, {"TimeZone": "Asia/Tokyo"}], ids=["none", "settings"])
@pytest.mark.parametrize("mode", ["session", "transaction"])
def test_limit_of_a_user_holds_for_logins_that_come_together(postgres, mode, parameters):
    """They all wait for a server connection, with nobody logged in yet."""
    users = {"alice": {"password": "x", "max_clients": 1}}
    with Sidecar(postgres, users=users, mode=mode, min_idle=0, max_size=4) as sidecar:
        clients = [sidecar.connect() for _ in range(4)]
        for client in clients:
            client.send(startup({"user": "alice", "database": "main", **parameters}))
        ends = sorted(client.until("ZE")[-1].kind for client in clients)
        assert ends == ["E", "E", "E", "Z"]


# -- who exists ------------------------------------------------------------------------------------


def challenge(sidecar: Sidecar, user: str, database: str) -> tuple[str, str]:
    """Salt and iterations that a stranger is shown."""
    with sidecar.connect() as client:
        client.send(startup({"user": user, "database": database}))
        assert client.until("RE")[-1].kind == "R"
        client.send(m.sasl_initial_response(b"SCRAM-SHA-256", ClientExchange("guess").begin()))
        found = client.until("RE")[-1].body[4:].decode()
        _, salt, rounds = found.split(",")
        return salt, rounds


def test_salts_tell_nobody_who_exists(postgres):
    """Neither one that differs between databases, nor one that changes with a reload."""
    pools = {
        name: {"dsn": postgres.dsn(user="postgres", password=f"of {name}"), "min_idle": 0}
        for name in ("main", "other")
    }
    sidecar = Sidecar(pools=pools, users={"alice": "x"}, listen={"auth": "scram-sha-256"})
    with sidecar:
        seen: dict[str, set[tuple[str, str]]] = {}
        for _ in range(2):
            for user in ("alice", "postgres", "stranger"):
                for database in ("main", "other", "nowhere"):
                    seen.setdefault(user, set()).add(challenge(sidecar, user, database))
            reload_(sidecar, sidecar)
        assert {user: len(salts) for user, salts in seen.items()} == dict.fromkeys(seen, 1)
        assert len(set.union(*seen.values())) == 3


def test_iterations_tell_nobody_who_exists(postgres):
    """Where the server's scram_iterations is not the default, a stranger's have to be the same."""
    verifier = f"SCRAM-SHA-256$5000:{'QUJD' * 5}QQ==${'A' * 43}=:{'A' * 43}="
    # the names of the users are all that it looks at
    asked = f"SELECT $1, CASE WHEN $1 LIKE 'known%' THEN '{verifier}' END"
    pools = {"main": {"dsn": postgres.dsn(), "min_idle": 0, "auth_query": asked}}
    with Sidecar(pools=pools, listen={"auth": "scram-sha-256"}) as sidecar:
        for user in ("known", "stranger", "known too"):
            assert challenge(sidecar, user, "main")[1] == "i=5000"


# -- a reload during a login -----------------------------------------------------------------------


def test_password_for_one_pool_is_none_for_another_that_a_reload_has_put_in_its_place(postgres):
    """The proof comes late, on purpose; meanwhile the name means something else."""

    def pools(**names: str) -> dict[str, dict[str, object]]:
        return {
            name: {"dsn": postgres.dsn(user="postgres", password=password), "min_idle": 0}
            for name, password in names.items()
        }

    for database, before, after in (
        ("fresh", {"main": "known"}, {"main": "known", "fresh": "unknown"}),
        ("main", {"main": "known"}, {"main": "unknown"}),
    ):
        with Sidecar(pools=pools(**before), listen={"auth": "scram-sha-256"}) as sidecar:
            exchange = ClientExchange("known")
            with sidecar.connect() as client:
                client.send(startup({"user": "postgres", "database": database}))
                client.until("R")
                client.send(m.sasl_initial_response(b"SCRAM-SHA-256", exchange.begin()))
                final = exchange.respond(client.until("R")[-1].body[4:])
                reload_(sidecar, Sidecar(pools=pools(**after), listen={"auth": "scram-sha-256"}))
                client.send(m.password(final))
                refused = error(client.until_closed())
                assert refused["C"] == "57P03", (database, refused)


# -- pass-through ----------------------------------------------------------------------------------


def test_who_is_trusted_does_not_ride_on_the_password_of_another(own_postgres):
    """Alone it would be refused by the server: so it is while somebody who has proved to be this user
    is there, too, and afterwards, as long as there are connections of that one."""
    server = own_postgres(auth="scram-sha-256")
    server.psql("CREATE ROLE alice LOGIN PASSWORD 'alice-secret'")
    verifier = server.psql("SELECT rolpassword FROM pg_authid WHERE rolname = 'alice'")
    pools = {"post*": {"dsn": f"host={server.host} port={server.port}"}}
    rules = "local all all scram-sha-256\nhost all all 127.0.0.1/32 trust"
    folder = str(server.socket_dir)
    listen = {"hba": rules, "unix_socket_dir": folder}
    users = {"alice": {"verifier": verifier}}

    def ride(sidecar: Sidecar) -> dict[str, str]:
        with sidecar.connect() as client:
            client.send(startup({"user": "alice", "database": "postgres"}))
            return error(client.until("ZE"))

    with Sidecar(pools=pools, users=users, listen=listen) as sidecar:
        dsn = f"host={folder} port={sidecar.port} user=alice password=alice-secret dbname=postgres"
        assert ride(sidecar)["C"] == "28P01"
        with psycopg.connect(dsn) as proven:
            assert proven.execute("SELECT current_user::text").fetchone() == ("alice",)
            assert ride(sidecar)["C"] == "28P01"
            assert proven.execute("SELECT 1").fetchone() == (1,)
        assert ride(sidecar)["C"] == "28P01"
        with psycopg.connect(dsn) as proven:
            assert proven.execute("SELECT 1").fetchone() == (1,)


# -- memory and time -------------------------------------------------------------------------------


def test_password_that_is_costly_to_prepare_is_not(postgres):
    """Each character becomes 18 by SASLprep: 64 KiB of them are 0.7 s of CPU, for anybody who asks."""
    rules = {"hba": "host all all 127.0.0.1/32 password"}
    with Sidecar(postgres, users={"alice": "x"}, listen=rules) as sidecar:
        started = time.process_time()
        for _ in range(3):
            with sidecar.connect() as client:
                client.send(startup({"user": "alice", "database": "main"}))
                client.until("R")
                client.send(m.password("\ufdfa".encode() * 21_000 + b"\0"))
                assert error(client.until_closed())["C"] == "28P01"
        assert time.process_time() - started < 1.0


def expanded(secret: bytes, label: bytes, size: int) -> bytes:
    """HKDF-Expand-Label without a context, by SHA-384 (RFC 8446, 7.1)."""
    info = struct.pack("!HB", size, len(label) + 6) + b"tls13 " + label + b"\0"
    return hmac.digest(secret, info + b"\1", "sha384")[:size]


def key_updates(secret: bytes) -> Iterator[bytes]:
    """Records that each ask for a change of keys, encrypted (RFC 8446, 4.6.3)."""
    while True:
        head = bytes.fromhex("1703030016")
        key, nonce = expanded(secret, b"key", 32), expanded(secret, b"iv", 12)
        yield head + AESGCM(key).encrypt(nonce, bytes.fromhex("180000010116"), head)
        secret = expanded(secret, b"traffic upd", 48)


def test_changes_of_keys_without_end_do_not_fill_the_memory(
    postgres: EmbeddedPostgres, files: ListenerFiles, tmp_path: Path
) -> None:
    """Each is answered by one of ours, which this client never reads. It needs no password for it."""
    log = tmp_path / "keys"
    context = ssl.create_default_context(cafile=files.root)
    context.check_hostname = False
    context.keylog_filename = str(log)
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = context.wrap_bio(incoming, outgoing)
    listen = files.listen(login_timeout="1m")
    with Sidecar(postgres, listen=listen) as sidecar, sidecar.connect() as client:
        client.send(SSL_REQUEST)
        assert client.socket.recv(1) == b"S"
        while True:
            try:
                tls.do_handshake()
            except ssl.SSLWantReadError:
                client.send(outgoing.read())
                incoming.write(client.socket.recv(65536))
            else:
                break
        client.send(outgoing.read())
        assert tls.cipher()[0] == "TLS_AES_256_GCM_SHA384"  # type: ignore[index]  # there is one
        listener = sidecar.service._listener
        assert listener is not None
        (session,) = listener._logins
        small = 4096  # bytes, so that the kernel does not keep megabytes of it
        sidecar.call(
            lambda: session._transport.get_extra_info("socket").setsockopt(
                socket.SOL_SOCKET, socket.SO_SNDBUF, small
            )
        )
        (line,) = [
            each for each in log.read_text().split("\n") if "CLIENT_TRAFFIC_SECRET_0" in each
        ]
        records = key_updates(bytes.fromhex(line.split()[2]))

        def flood() -> None:
            for _ in range(300):  # 8 MiB
                client.send(*islice(records, 1000))

        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            flood()
        sidecar.until_whole()
