"""The files of TLS to clients, for tests: what a sidecar is given, and what its clients are."""

import datetime as dt
from pathlib import Path
from typing import NamedTuple

from tests.certificates import Authority

DAY = dt.timedelta(days=1)


class ListenerFiles(NamedTuple):
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
            "auth_failure_delay": "0",
            "auth": "scram-sha-256",
            **options,
        }


def make_files(folder: Path) -> ListenerFiles:
    authority = Authority("Root of the tests")
    certificate, key = authority.issue("localhost", "127.0.0.1").write(folder, "server")
    return ListenerFiles(
        folder, str(authority.write(folder, "root")), str(certificate), str(key), authority
    )
