"""TLS to clients: who gets in how, what is refused, and that nobody is harmed by who breaks off.

With libpq (psycopg's and Debian's psql), asyncpg, and Python's ssl where a client must misbehave.
"""

import datetime as dt
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psycopg
import pytest

from sidecar.demo.postgres import EmbeddedPostgres
from tests.certificates import Authority
from tests.wire import Sidecar

PASSWORD = "correct horse"
DAY = dt.timedelta(days=1)


class Files(NamedTuple):
    """The certificates of one folder, as paths."""

    folder: Path
    root: str
    """The CA that has signed everything but ``stranger``."""
    certificate: str
    """For localhost and 127.0.0.1."""
    key: str
    authority: Authority

    def client(
        self, name: str, authority: Authority | None = None, ends: dt.timedelta = DAY
    ) -> dict[str, str]:
        """libpq's options for a client's certificate."""
        made = (authority or self.authority).issue(common_name=name, for_client=True, ends=ends)
        certificate, key = made.write(self.folder, f"client-{name}")
        return {"sslcert": str(certificate), "sslkey": str(key)}

    def listen(self, **options: object) -> dict[str, object]:
        return {
            "tls_cert_file": self.certificate,
            "tls_key_file": self.key,
            "login_timeout": "3s",
            "auth": "scram-sha-256",
            **options,
        }


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("tls")
    authority = Authority("Root of the tests")
    certificate, key = authority.issue("localhost", "127.0.0.1").write(folder, "server")
    return Files(
        folder, str(authority.write(folder, "root")), str(certificate), str(key), authority
    )


@pytest.fixture(scope="module")
def sidecar(postgres: EmbeddedPostgres, files: Files) -> Iterator[Sidecar]:
    """TLS is allowed, a password asked for."""
    listen = files.listen(tls_ca_file=files.root)
    with Sidecar(postgres, listen=listen, users={"app": PASSWORD}) as running:
        yield running
        running.until_whole()


@pytest.fixture(scope="module")
def strict(postgres: EmbeddedPostgres, files: Files, tmp_path_factory) -> Iterator[Sidecar]:
    """TLS is required, on TCP."""
    folder = tmp_path_factory.mktemp("sockets")
    listen = files.listen(tls_mode="require", auth="trust", unix_socket_dir=str(folder))
    with Sidecar(postgres, listen=listen) as running:
        yield running
        running.until_whole()


def connect(sidecar: Sidecar, **options: object) -> psycopg.Connection:
    return psycopg.connect(sidecar.dsn(password=PASSWORD), **options)  # type: ignore[arg-type]


def works(connection: psycopg.Connection) -> bool:
    with connection:
        return connection.execute("select repeat('x', 100000)").fetchone() == ("x" * 100000,)


# -- who gets in -------------------------------------------------------------------------------


@pytest.mark.parametrize("negotiation", ["postgres", "direct"])
@pytest.mark.parametrize("version", ["TLSv1.2", "TLSv1.3"])
@pytest.mark.parametrize("mode", ["require", "verify-ca", "verify-full"])
def test_libpq_connects_by_tls(sidecar, files, mode, version, negotiation):
    connection = connect(
        sidecar,
        sslmode=mode,
        sslrootcert=files.root,
        sslnegotiation=negotiation,
        ssl_min_protocol_version=version,
        ssl_max_protocol_version=version,
        channel_binding="require",
    )
    assert connection.pgconn.ssl_in_use
    assert works(connection)


@pytest.mark.parametrize(
    ("mode", "is_encrypted"), [("disable", False), ("allow", False), ("prefer", True)]
)
def test_tls_is_the_clients_choice_where_it_is_allowed(sidecar, mode, is_encrypted):
    connection = connect(sidecar, sslmode=mode)
    assert connection.pgconn.ssl_in_use == is_encrypted
    assert works(connection)
