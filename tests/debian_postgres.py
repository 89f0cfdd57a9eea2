"""Debian's PostgreSQL with TLS, for tests: the embedded one is built without OpenSSL.

``make debian-packages`` installs it. Only its programs are used: each server here has a data directory,
a port and certificates of its own, and is gone after the tests.
"""

import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg

from sidecar.demo.install import server_account
from sidecar.demo.postgres import EmbeddedPostgres, EmbeddedPostgresError
from tests.certificates import Authority, Certificate

_HBA = """
local      all  all         trust
hostssl    all  certain     all  cert
hostssl    all  mapped      all  cert map=people
hostssl    all  encrypted   all  scram-sha-256
hostnossl  all  unencrypted all  scram-sha-256
host       all  encrypted   all  reject
host       all  unencrypted all  reject
host       all  trusted     all  trust
host       all  md5         all  md5
host       all  cleartext   all  password
host       all  all         all  scram-sha-256
"""
"""What a user may do is said by its name; all have the password of ``TlsPostgres.password``."""

_USERS = ["certain", "mapped", "encrypted", "unencrypted", "trusted", "md5", "cleartext"]
_LOADED = 10.0  # seconds that the server may take to load its configuration anew


def debian_bin() -> Path:
    """The programs of the newest PostgreSQL that Debian has installed here."""
    found = list(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
    if not found:
        raise EmbeddedPostgresError(
            "Debian's PostgreSQL is not installed: make debian-packages, or apt-get install postgresql"
        )
    return max(found, key=lambda path: float(path.parts[-3])).parent


class TlsPostgres(EmbeddedPostgres):
    """A server at 127.0.0.1 and ::1 with a certificate for ``localhost`` and both addresses.

    ``authority`` has signed it, and the server trusts clients whose certificates it has signed.
    ``root`` is its file; ``folder`` is for more files, of ours.
    """

    password: str

    def __init__(self, folder: Path, authority: Authority | None = None) -> None:
        bin_dir = debian_bin()
        super().__init__(
            int(float(bin_dir.parts[-2])),
            settings={"listen_addresses": "127.0.0.1,::1", "max_connections": "200"},
            auth="scram-sha-256",
            bin_dir=bin_dir,
        )
        self.folder = folder
        self.authority = authority or Authority("the tests' authority")
        self.root = self.authority.write(folder, "root")
        self.certificate = self.authority.issue("localhost", "127.0.0.1", "::1")

    def start(self) -> "TlsPostgres":
        super().start()
        try:
            self._configure()
        except BaseException:
            self.stop()
            raise
        return self

    def _configure(self) -> None:
        for user in _USERS:
            hashed = "md5" if user == "md5" else "scram-sha-256"
            self.psql(
                f"set password_encryption = '{hashed}';"
                f" create role {user} login password '{self.password}'"
            )
        self._place("pg_hba.conf", _HBA.encode())
        self._place("pg_ident.conf", b"people  /^(.*)@example.com$  mapped\n")
        self._place("clients.crt", self.authority.pem)
        self._place_certificate(self.certificate)
        with (self.data_dir / "postgresql.conf").open("a") as file:
            file.write("ssl = on\nssl_ca_file = 'clients.crt'\n")
        self.reload()

    def client_certificate(self, user: str) -> tuple[Path, Path]:
        """Files of a certificate that ``user`` may log in with, and its key."""
        return self.authority.issue(common_name=user, for_client=True).write(self.folder, user)

    @contextmanager
    def serving(self, certificate: Certificate) -> Iterator[None]:
        """Have another certificate for a while."""
        self.serve(certificate)
        try:
            yield
        finally:
            self.serve(self.certificate)

    def serve(self, certificate: Certificate) -> None:
        """Replace the certificate, of new connections."""
        self._place_certificate(certificate)
        self.reload()

    @contextmanager
    def configured(self, **settings: str) -> Iterator[None]:
        """Have other settings for a while; only such as need no restart."""
        for name, value in settings.items():
            self.psql(f"alter system set {name} = '{value}'")
        self.reload()
        try:
            yield
        finally:
            # at the socket, and writable: what it was set to may have locked out everybody else
            with psycopg.connect(
                self.dsn(host=str(self.socket_dir)), autocommit=True
            ) as connection:
                connection.execute("set default_transaction_read_only = off")
                for name in settings:
                    connection.execute(f"alter system reset {name}")
            self.reload()

    def reload(self) -> None:
        """Load the configuration anew; new connections have it when this returns."""
        began = time.time()
        with psycopg.connect(self.dsn(host=str(self.socket_dir)), autocommit=True) as connection:
            connection.execute("select pg_reload_conf()")
        # The time of loading is said by backends started after it. A clock's tick is a difference.
        deadline = time.monotonic() + _LOADED
        while self._loaded_at() < began:
            if time.monotonic() > deadline:
                raise EmbeddedPostgresError(f"not loaded in {_LOADED:.0f} s\n{self._log_tail(0)}")
            time.sleep(0.005)

    def _loaded_at(self) -> float:
        with psycopg.connect(self.dsn(host=str(self.socket_dir)), autocommit=True) as connection:
            row = connection.execute(
                "select extract(epoch from pg_conf_load_time())::float8"
            ).fetchone()
        assert row is not None
        return float(row[0])

    def _place_certificate(self, certificate: Certificate) -> None:
        self._place("server.crt", certificate.pem)
        self._place("server.key", certificate.key_pem())

    def _place(self, name: str, content: bytes) -> None:
        """Put a file of the server's own in place, whole or not at all."""
        path, fresh = self.data_dir / name, self.data_dir / f"{name}.new"
        fresh.touch(0o600)
        fresh.write_bytes(content)
        account = server_account()
        if account is not None:
            os.chown(fresh, account.uid, account.gid)
        shutil.move(fresh, path)

    def log_since(self, begin: int) -> str:
        """What was logged after this position."""
        return self.log_path.read_bytes()[begin:].decode(errors="replace")

    def encryption_of(self, application: str) -> list[tuple[bool, str | None]]:
        """Of the connections with this application_name: whether encrypted, and the TLS version."""
        rows = self.psql(
            "select ssl, version from pg_stat_ssl join pg_stat_activity using (pid)"
            f" where application_name = '{application}'"
        ).splitlines()
        return [
            (ssl == "t", version or None) for ssl, version in (re.split(r"\|", r) for r in rows)
        ]
