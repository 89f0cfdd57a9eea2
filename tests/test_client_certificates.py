"""Logins with a client certificate, alone or besides a password: by libpq, over real TLS."""

from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest

from sidecar.demo.postgres import EmbeddedPostgres
from tests.certificates import Authority
from tests.wire import Sidecar

RULES = """\
hostssl main   all  all           cert
hostssl second all  127.0.0.1/32  scram-sha-256  clientcert=verify-full
hostssl third  all  127.0.0.1/32  scram-sha-256  clientcert=verify-ca
"""
PASSWORDS = {"alice": "wonder land", "bob": "builder"}

Connect = Callable[..., psycopg.Connection]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("certificates")


@pytest.fixture(scope="module")
def sidecar(postgres: EmbeddedPostgres, folder: Path) -> Iterator[Sidecar]:
    authority = Authority("Root of the tests")
    root = authority.write(folder, "root")
    certificate, key = authority.issue("localhost", "127.0.0.1").write(folder, "server")
    for name in ("alice", "bob", "nobody"):
        authority.issue(common_name=name, for_client=True).write(folder, name)
    listen = {
        "hba": RULES,
        "tls_cert_file": str(certificate),
        "tls_key_file": str(key),
        "tls_ca_file": str(root),
    }
    pools = {name: {"dsn": postgres.dsn(), "max_size": 1} for name in ("main", "second", "third")}
    with Sidecar(pools=pools, listen=listen, users=PASSWORDS) as running:
        yield running
        running.until_whole()


@pytest.fixture(scope="module")
def connect(sidecar: Sidecar, folder: Path) -> Connect:
    def as_user(
        user: str, certificate: str | None, database: str = "main", password: str | None = None
    ) -> psycopg.Connection:
        options = {"sslmode": "require"}
        if certificate is not None:
            options["sslcert"] = str(folder / f"{certificate}.crt")
            options["sslkey"] = str(folder / f"{certificate}.key")
        if password is not None:
            options["password"] = password
        return psycopg.connect(sidecar.dsn(user, database, **options))

    return as_user


def refusal(connect: Connect, *arguments: str | None) -> str:
    with pytest.raises(psycopg.OperationalError) as caught:
        connect(*arguments)
    return str(caught.value).partition("FATAL:")[2].strip()


def lets_in(connection: psycopg.Connection) -> bool:
    with connection:
        return connection.execute("select 1").fetchone() == (1,)


def test_certificate_lets_in_whom_it_names(connect):
    assert lets_in(connect("alice", "alice"))
    assert lets_in(connect("nobody", "nobody"))


def test_certificate_of_another_is_none(connect, caplog):
    """Whether such a user exists is not told; the log says whose it was."""
    for user in ("alice", "stranger"):
        assert (
            refusal(connect, user, "bob")
            == f'certificate authentication failed for user "{user}"\n'
            "HINT:  The common name of the certificate has to be the user's name."
        )
    found = [vars(each) for each in caplog.records if each.message == "authentication failed"]
    assert [(each["user"], each["certificate"]) for each in found] == [
        ("alice", "bob"),
        ("stranger", "bob"),
    ]


@pytest.mark.parametrize("database", ["main", "second", "third"])
def test_without_a_certificate_nobody_is_asked_for_a_password(connect, database):
    said = refusal(connect, "alice", None, database, PASSWORDS["alice"])
    assert said.splitlines() == [
        "connection requires a valid client certificate",
        "HINT:  Connect with sslcert and sslkey: a certificate of a CA in listen.tls_ca_file.",
    ]


def test_without_tls_there_is_no_rule(sidecar):
    with pytest.raises(psycopg.OperationalError, match=r"have no entry for .* no encryption"):
        psycopg.connect(sidecar.dsn("alice", sslmode="disable"))


def test_verify_full_wants_both_the_own_certificate_and_the_password(connect):
    assert lets_in(connect("alice", "alice", "second", PASSWORDS["alice"]))
    assert "password authentication failed" in refusal(
        connect, "alice", "alice", "second", PASSWORDS["bob"]
    )
    assert "certificate authentication failed" in refusal(
        connect, "alice", "bob", "second", PASSWORDS["alice"]
    )


def test_verify_ca_wants_the_password_and_anyones_certificate(connect):
    assert lets_in(connect("alice", "bob", "third", PASSWORDS["alice"]))
    assert "password authentication failed" in refusal(
        connect, "alice", "alice", "third", PASSWORDS["bob"]
    )
