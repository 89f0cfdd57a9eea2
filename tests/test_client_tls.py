"""TLS to clients: who gets in how, what is refused, and that nobody is harmed by who breaks off.

With libpq (psycopg's and Debian's psql), asyncpg, and Python's ssl where a client must misbehave.
"""

import asyncio
import ssl
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import asyncpg
import psycopg
import pytest

from sidecar.config import ListenConfig
from sidecar.demo.postgres import EmbeddedPostgres
from sidecar.errors import ConfigError
from sidecar.proxy.certificates import read_identity
from tests.certificates import Authority, self_signed
from tests.debian_postgres import debian_bin
from tests.listener_files import DAY, ListenerFiles
from tests.sidecar_process import environment, eventually
from tests.wire import SSL_REQUEST, Client, Sidecar, error, startup

pytestmark = pytest.mark.usefixtures("no_errors_logged")

PASSWORD = "correct horse"


@pytest.fixture(scope="module")
def sidecar(postgres: EmbeddedPostgres, files: ListenerFiles) -> Iterator[Sidecar]:
    """TLS is allowed, a password asked for."""
    listen = files.listen(tls_ca_file=files.root)
    with Sidecar(postgres, listen=listen, users={"app": PASSWORD}) as running:
        yield running
        running.until_whole()


@pytest.fixture(scope="module")
def strict(postgres: EmbeddedPostgres, files: ListenerFiles, tmp_path_factory) -> Iterator[Sidecar]:
    """TLS is required, on TCP."""
    folder = tmp_path_factory.mktemp("sockets")
    listen = files.listen(tls_mode="require", auth="trust", unix_socket_dir=str(folder))
    with Sidecar(postgres, listen=listen) as running:
        yield running
        running.until_whole()


def connect(sidecar: Sidecar, **options: object) -> psycopg.Connection:
    return psycopg.connect(sidecar.dsn(password=PASSWORD), **options)  # type: ignore[arg-type]


def refusal(sidecar: Sidecar, **options: str) -> str:
    """What libpq says when it does not get in; and the sidecar is none the worse."""
    with pytest.raises(psycopg.OperationalError) as caught:
        connect(sidecar, **options)
    sidecar.until_whole()
    return str(caught.value)


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


@pytest.mark.parametrize(
    ("key", "digest"),
    [("ec", "sha256"), ("ec", "sha512"), ("rsa", "sha256"), ("rsa", "sha384"), ("rsa", "sha512")],
)
def test_login_is_bound_whatever_signed_the_certificate(postgres, tmp_path, key, digest):
    """The hash that a login is bound to is the signature's (RFC 5929, 4.1)."""
    authority = Authority("another root", key=key)
    certificate, key_file = authority.issue("localhost", key=key, digest=digest).write(
        tmp_path, "server"
    )
    listen = {"tls_cert_file": str(certificate), "tls_key_file": str(key_file)}
    with Sidecar(
        postgres, listen={"auth": "scram-sha-256", **listen}, users={"app": PASSWORD}
    ) as sidecar:
        assert works(connect(sidecar, sslmode="require", channel_binding="require"))


def test_login_is_not_bound_where_the_signature_defines_nothing(postgres, tmp_path):
    """Ed25519 has no hash of its own: binding is not offered, and who insists does not get in."""
    authority = Authority("another root", key="ed25519")
    certificate, key = authority.issue("localhost", key="ed25519").write(tmp_path, "server")
    listen = {
        "tls_cert_file": str(certificate),
        "tls_key_file": str(key),
        "auth": "scram-sha-256",
        "auth_failure_delay": "0",
    }
    with Sidecar(postgres, listen=listen, users={"app": PASSWORD}) as sidecar:
        assert works(connect(sidecar, sslmode="require"))
        said = refusal(sidecar, sslmode="require", channel_binding="require")
        assert "channel binding is required, but server did not offer" in said


def test_wrong_password_is_wrong_by_tls_too(sidecar):
    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        psycopg.connect(sidecar.dsn(password="guessed", sslmode="require"))


def test_psql_of_debian_connects_by_tls(sidecar, files):
    dsn = sidecar.dsn(password=PASSWORD, sslmode="verify-full", sslrootcert=files.root)
    done = subprocess.run(
        [debian_bin() / "psql", "-X", "-c", "\\conninfo", "-c", "select 40 + 2", dsn],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=20,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "TLSv1.3" in done.stdout
    assert " 42\n" in done.stdout


@pytest.mark.parametrize("is_direct", [False, True])
async def test_asyncpg_connects_by_tls(sidecar, files, is_direct):
    context = ssl.create_default_context(cafile=files.root)
    context.set_alpn_protocols(["postgresql"])
    connection = await asyncpg.connect(
        sidecar.dsn(password=PASSWORD), ssl=context, direct_tls=is_direct
    )
    assert await connection.fetchval("select repeat('x', 100000)") == "x" * 100_000
    await connection.close()


def test_asyncpg_is_told_to_encrypt(strict):
    async def attempt() -> None:
        await asyncpg.connect(strict.dsn(), ssl=False)

    with pytest.raises(asyncpg.InvalidAuthorizationSpecificationError, match="no encryption"):
        asyncio.run(attempt())


# -- who does not ------------------------------------------------------------------------------


def test_plain_connection_is_refused_where_tls_is_required(strict):
    said = refusal(strict, sslmode="disable")
    assert 'FATAL:  no encryption: connections of user "app" from 127.0.0.1:' in said
    assert "sslmode=require" in said
    with strict.connect() as client:
        client.send(startup({"user": "app", "database": "main"}))
        assert error(client.until_closed())["C"] == "28000"
    for mode in ("allow", "prefer", "require"):
        assert works(connect(strict, sslmode=mode))


def test_unix_socket_needs_no_tls_where_it_is_required(strict):
    """And has none, as PostgreSQL's; libpq does not even ask."""
    folder = strict.service.config.listen.unix_socket_dir
    path = f"{folder}/.s.PGSQL.{strict.port}"
    with Client.login(path) as client:
        assert client.value("select 1") == "1"
    with Client(path) as client:
        client.send(SSL_REQUEST)
        assert client.socket.recv(1) == b"N"
    with Client(path) as client:
        client.send(bytes.fromhex("16030100c8010000c40303") + bytes(190))
        assert error(client.until_closed())["C"] == "08P01"


def test_disabled_tls_is_disabled(postgres, files):
    with Sidecar(postgres, listen=files.listen(tls_mode="disable", auth="trust")) as sidecar:
        assert "server does not support SSL, but SSL was required" in refusal(
            sidecar, sslmode="require"
        )
        assert refusal(sidecar, sslmode="require", sslnegotiation="direct")
        assert works(connect(sidecar, sslmode="prefer"))


def test_client_of_an_old_version_is_refused(postgres, files):
    listen = files.listen(auth="trust", tls_min_version="TLSv1.3")
    with Sidecar(postgres, listen=listen) as sidecar:
        said = refusal(sidecar, sslmode="require", ssl_max_protocol_version="TLSv1.2")
        assert "protocol version" in said
        assert works(connect(sidecar, sslmode="require"))


def test_client_that_knows_another_ca_does_not_trust_us(sidecar, files):
    stranger = Authority("a stranger").write(files.folder, "stranger")
    for mode in ("verify-ca", "verify-full"):
        said = refusal(sidecar, sslmode=mode, sslrootcert=str(stranger))
        assert "certificate verify failed" in said


def test_client_notices_another_host_name(sidecar, files):
    options = {"sslrootcert": files.root, "host": "another.example", "hostaddr": "127.0.0.1"}
    assert works(connect(sidecar, sslmode="verify-ca", **options))
    assert "does not match host name" in refusal(sidecar, sslmode="verify-full", **options)


@pytest.mark.parametrize(
    ("begins", "ends", "text"),
    [(-9 * DAY, -DAY, "certificate has expired"), (DAY, 9 * DAY, "certificate is not yet valid")],
)
def test_client_notices_the_wrong_time(postgres, files, tmp_path, begins, ends, text):
    made = files.authority.issue("localhost", "127.0.0.1", begins=begins, ends=ends)
    certificate, key = made.write(tmp_path, "server")
    listen = files.listen(tls_cert_file=str(certificate), tls_key_file=str(key), auth="trust")
    with Sidecar(postgres, listen=listen) as sidecar:
        said = refusal(sidecar, sslmode="verify-ca", sslrootcert=files.root)
        assert "certificate verify failed" in said
        context = ssl.create_default_context(cafile=files.root)
        with pytest.raises(ssl.SSLCertVerificationError, match=text):
            asyncio.run(asyncpg.connect(sidecar.dsn(), ssl=context))
        assert works(connect(sidecar, sslmode="require"))


def test_self_signed_certificate_serves_those_who_know_it(postgres, tmp_path):
    certificate, key = self_signed("localhost").write(tmp_path, "server")
    listen = {"tls_cert_file": str(certificate), "tls_key_file": str(key)}
    with Sidecar(postgres, listen=listen) as sidecar:
        assert works(connect(sidecar, sslmode="verify-ca", sslrootcert=str(certificate)))


# -- client certificates -----------------------------------------------------------------------


@pytest.fixture
def seen(sidecar, monkeypatch) -> list[str | None]:
    """The certificates' names, as authentication learns them."""
    names: list[str | None] = []
    listener = sidecar.service._listener
    assert listener is not None
    inner = listener.authenticator.authenticate

    async def authenticate(client, *arguments):
        names.append(client.certificate_name())
        return await inner(client, *arguments)

    monkeypatch.setattr(listener.authenticator, "authenticate", authenticate)
    return names


@pytest.mark.parametrize("version", ["TLSv1.2", "TLSv1.3"])
def test_name_in_a_clients_certificate_is_known(sidecar, files, seen, version):
    options = {"sslmode": "require", "ssl_max_protocol_version": version}
    assert works(connect(sidecar, **options, **files.client("alice")))
    assert works(connect(sidecar, **options, **files.client("Žofie, née O'Hara")))
    assert works(connect(sidecar, **options))
    assert works(connect(sidecar, sslmode="disable"))
    assert seen == ["alice", "Žofie, née O'Hara", None, None]


@pytest.mark.parametrize("version", ["TLSv1.2", "TLSv1.3"])
@pytest.mark.parametrize("wrong", ["a stranger's", "expired", "self-signed"])
def test_certificate_that_proves_nothing_is_refused(sidecar, files, seen, wrong, version):
    if wrong == "expired":
        options = files.client("alice", ends=-DAY)
    elif wrong == "self-signed":
        certificate, key = self_signed("alice").write(files.folder, "self")
        options = {"sslcert": str(certificate), "sslkey": str(key)}
    else:
        options = files.client("alice", Authority("a stranger"))
    said = refusal(sidecar, sslmode="require", ssl_max_protocol_version=version, **options)
    assert "SSL" in said
    assert seen == []


# -- certificates that change ------------------------------------------------------------------


def shown(sidecar: Sidecar) -> bytes:
    """The certificate that a new client gets, in DER."""
    with Client(sidecar.address) as client:
        client.send(SSL_REQUEST)
        assert client.socket.recv(1) == b"S"
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        with context.wrap_socket(client.socket) as tls:
            return tls.getpeercert(binary_form=True) or b""


def test_renewed_certificate_is_shown_without_a_restart(postgres, files, tmp_path, caplog):
    """The next clients see it, those who are there stay; broken files change nothing and are told
    once; the login is bound to the certificate that was shown."""
    first, second = (files.authority.issue("localhost") for _ in range(2))
    certificate, key = first.write(tmp_path, "server")
    listen = files.listen(tls_cert_file=str(certificate), tls_key_file=str(key))
    caplog.set_level("INFO")
    with Sidecar(postgres, listen=listen, users={"app": PASSWORD}) as sidecar:
        assert shown(sidecar) == first.der
        old = connect(sidecar, sslmode="require")

        certificate.write_bytes(b"")  # half of a renewal
        said = "TLS certificate not renewed"
        eventually(lambda: shown(sidecar) == first.der and said in caplog.text, "it is told")
        time.sleep(1.1)  # the files are looked at once a second
        assert shown(sidecar) == first.der
        assert [r.message for r in caplog.records].count(said) == 1

        second.write(tmp_path, "server")
        eventually(lambda: shown(sidecar) == second.der, "the new one is shown")
        assert works(connect(sidecar, sslmode="require", channel_binding="require"))
        assert works(old)
    caplog.clear()


def test_certificates_are_read_when_an_operator_asks(postgres, files, tmp_path):
    first, second = (files.authority.issue("localhost") for _ in range(2))
    certificate, key = first.write(tmp_path, "server")
    listen = files.listen(tls_cert_file=str(certificate), tls_key_file=str(key))
    with Sidecar(postgres, listen=listen) as sidecar:
        listener = sidecar.service._listener
        assert listener is not None
        first_identity = sidecar.await_(listener.identity())
        second.write(tmp_path, "server")
        sidecar.await_(listener.reload_certificates())
        second_identity = sidecar.await_(listener.identity())
        assert first_identity is not None
        assert second_identity is not None
        assert (first_identity.certificate, second_identity.certificate) == (first.der, second.der)
        key.write_text("nothing")
        with pytest.raises(ConfigError, match=r"listen\.tls_key_file"):
            sidecar.await_(listener.reload_certificates())
        assert shown(sidecar) == second.der


def _other_key(folder: Path) -> dict[str, str]:
    _, key = self_signed("localhost").write(folder, "other")
    return {"tls_key_file": str(key)}


def _key_with_passphrase(folder: Path) -> dict[str, str]:
    certificate, key = self_signed("localhost").write(folder, "locked", password="secret")
    return {"tls_cert_file": str(certificate), "tls_key_file": str(key)}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            _other_key,
            r"tls_key_file: .*other\.key: not the key of the certificate in .*server\.crt",
        ),
        (_key_with_passphrase, r"tls_key_file: .*locked\.key: it is encrypted"),
        (
            lambda _: {"tls_key_file": None},
            r"tls_cert_file: .*server\.crt: no usable certificate and",
        ),
        (
            lambda _: {"tls_key_file": "/no/such"},
            r"tls_key_file: cannot read /no/such: No such file",
        ),
        (lambda _: {"tls_cert_file": "/no/such"}, r"tls_cert_file: cannot read /no/such: No such"),
        (lambda _: {"tls_ca_file": "/no/such"}, r"tls_ca_file: cannot read /no/such: No such file"),
        (lambda _: {"tls_cert_file": __file__}, r"tls_cert_file: no certificate in "),
        (lambda _: {"tls_ca_file": __file__}, r"tls_ca_file: no certificate of a CA in "),
    ],
)
def test_files_that_cannot_be_used_are_told_at_the_start(files, tmp_path, change, text):
    options = {**files.listen(auth="trust"), **change(tmp_path)}
    listen = ListenConfig.model_validate({k: v for k, v in options.items() if v is not None})
    with pytest.raises(ConfigError, match=f"listen\\.{text}"):
        read_identity(listen)
