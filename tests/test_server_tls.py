"""TLS to servers: as much of it as sslmode says, certificates checked, and logins bound to it.

With Debian's PostgreSQL and certificates made here; on uvloop and on asyncio's own loop, whose TLS are
two implementations.
"""

import asyncio
import datetime as dt
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import asyncpg
import psycopg
import pytest

from sidecar.errors import ServerError, ServerProtocolError, SidecarError, TlsFailed
from sidecar.events import ErrorReason, Phase
from sidecar.pool import health, tls
from sidecar.pool.server import cancel_query, clock
from sidecar.protocol import messages as m
from tests.certificates import Authority, Certificate, self_signed
from tests.debian_postgres import TlsPostgres
from tests.server_connection import Reader, ask, encryption, opened, refused
from tests.sidecar_process import PATIENCE
from tests.tap import Tap, end
from tests.wire import SSL_REQUEST, error

pytestmark = pytest.mark.both_loops

DAY = dt.timedelta(days=1)
NEWEST = "TLSv1.3"
SERIAL = "select client_serial from pg_stat_ssl where pid = pg_backend_pid()"


@pytest.fixture
def verified(tls_postgres: TlsPostgres) -> str:
    """The strictest connection string."""
    return tls_postgres.dsn(
        host="localhost", sslmode="verify-full", sslrootcert=str(tls_postgres.root)
    )


async def tls_failure(dsn: str) -> str:
    problem = await refused(dsn, TlsFailed)
    assert health.explain(problem, has_connected=True) == (Phase.TLS, ErrorReason.TLS)
    assert isinstance(problem, TlsFailed)
    return problem.message


# -- when ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "user", "expected"),
    [
        ("disable", "trusted", ""),
        ("disable", "unencrypted", ""),
        ("disable", "encrypted", "28000"),
        ("allow", "trusted", ""),
        ("allow", "unencrypted", ""),
        ("allow", "encrypted", NEWEST),
        ("prefer", "trusted", NEWEST),
        ("prefer", "unencrypted", ""),
        ("prefer", "encrypted", NEWEST),
        ("require", "trusted", NEWEST),
        ("require", "unencrypted", "28000"),
        ("require", "encrypted", NEWEST),
    ],
)
async def test_server_gets_as_much_encryption_as_sslmode_says(tls_postgres, mode, user, expected):
    """pg_hba.conf lets the one user in with TLS only, the other without only."""
    dsn = tls_postgres.dsn(user=user, sslmode=mode)
    if expected == "28000":
        problem = await refused(dsn, ServerError)
        assert isinstance(problem, ServerError)
        assert (problem.sqlstate, "rejects connection" in problem.message) == ("28000", True)
    else:
        async with opened(dsn) as server:
            assert await encryption(server) == expected


@pytest.mark.parametrize(
    ("mode", "is_let_in"),
    [("disable", True), ("allow", True), ("prefer", True), ("require", False)],
)
async def test_server_without_tls_is_refused_where_tls_is_required(postgres, mode, is_let_in):
    dsn = postgres.dsn(sslmode=mode)
    if is_let_in:
        async with opened(dsn) as server:
            assert (await ask(server, "select 1"), server.tls_version) == ([["1"]], "")
    else:
        assert await tls_failure(dsn) == "the server has no TLS, sslmode require asks for it"


async def test_unix_socket_is_never_encrypted(tls_postgres):
    dsn = tls_postgres.dsn(host=str(tls_postgres.socket_dir), sslmode="require")
    async with opened(dsn) as server:
        assert await encryption(server) == ""


async def test_wrong_password_is_not_tried_again_without_tls(tls_postgres):
    """It would be no better, and would be there for all to see."""
    begin = tls_postgres.log_path.stat().st_size
    problem = await refused(tls_postgres.dsn(password="wrong", sslmode="prefer"), ServerError)
    assert isinstance(problem, ServerError)
    assert problem.sqlstate == "28P01"
    assert tls_postgres.log_since(begin).count("password authentication failed") == 1


async def test_what_went_wrong_with_tls_is_told_where_nothing_else_works_either(tls_postgres):
    dsn = tls_postgres.dsn(
        user="encrypted", sslmode="prefer", sslrootcert=str(stranger(tls_postgres))
    )
    problem = await refused(dsn, ServerError)
    assert isinstance(problem, ServerError)
    assert "rejects connection" in problem.message
    assert "(with TLS: the server's certificate is refused: " in problem.message


# -- versions --------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["TLSv1.2", "TLSv1.3"])
async def test_version_of_tls_is_the_newest_allowed(tls_postgres, version):
    async with opened(
        tls_postgres.dsn(sslmode="require", ssl_max_protocol_version=version)
    ) as server:
        assert await encryption(server) == version


async def test_version_that_the_server_does_not_have_is_told(tls_postgres):
    with tls_postgres.configured(ssl_min_protocol_version="TLSv1.3"):
        dsn = tls_postgres.dsn(sslmode="require", ssl_max_protocol_version="TLSv1.2")
        assert "protocol version" in await tls_failure(dsn)
    with tls_postgres.configured(ssl_max_protocol_version="TLSv1.2"):
        dsn = tls_postgres.dsn(sslmode="require", ssl_min_protocol_version="TLSv1.3")
        assert "protocol version" in await tls_failure(dsn)


# -- certificates of servers -----------------------------------------------------------------------


def stranger(server: TlsPostgres) -> Path:
    """The file of an authority that has signed nothing here."""
    return Authority("somebody else").write(server.folder, "stranger")


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "::1"])
async def test_name_or_address_in_the_certificate_is_checked(tls_postgres, host):
    dsn = tls_postgres.dsn(host=host, sslmode="verify-full", sslrootcert=str(tls_postgres.root))
    async with opened(dsn) as server:
        assert await encryption(server) == NEWEST


async def test_certificate_is_checked_for_the_name_not_for_where_it_leads(tls_postgres):
    dsn = tls_postgres.dsn(
        host="db.example.org",
        hostaddr="127.0.0.1",
        sslmode="verify-full",
        sslrootcert=str(tls_postgres.root),
    )
    assert "Hostname mismatch" in await tls_failure(dsn)
    with tls_postgres.serving(tls_postgres.authority.issue("*.example.org")):
        async with opened(dsn) as server:
            assert await encryption(server) == NEWEST


@pytest.mark.parametrize(
    ("wrong", "mode", "words"),
    [
        ("issuer", "verify-full", "unable to get local issuer certificate"),
        ("issuer", "verify-ca", "unable to get local issuer certificate"),
        ("issuer", "require", "unable to get local issuer certificate"),
        ("itself", "verify-ca", "self-signed certificate"),
        ("expired", "verify-ca", "certificate has expired"),
        ("early", "verify-ca", "certificate is not yet valid"),
        ("name", "verify-full", "Hostname mismatch, certificate is not valid for 'localhost'"),
        ("name", "verify-ca", ""),
        ("name", "require", ""),
        ("purpose", "verify-ca", "unsuitable certificate purpose"),
    ],
)
async def test_wrong_certificate_is_refused(tls_postgres, wrong, mode, words):
    """Require with a root is as strict as verify-ca, as the manual says (34.18.1)."""
    authority = tls_postgres.authority
    made: dict[str, Callable[[], Certificate]] = {
        "issuer": lambda: Authority("somebody else").issue("localhost"),
        "itself": lambda: self_signed("localhost"),
        "expired": lambda: authority.issue("localhost", ends=-DAY),
        "early": lambda: authority.issue("localhost", begins=DAY),
        "name": lambda: authority.issue("db.example"),
        "purpose": lambda: authority.issue("localhost", for_client=True),
    }
    dsn = tls_postgres.dsn(host="localhost", sslmode=mode, sslrootcert=str(tls_postgres.root))
    with tls_postgres.serving(made[wrong]()):
        if words:
            problem = await refused(dsn, TlsFailed)
            assert isinstance(problem, TlsFailed)
            assert problem.message.startswith("the server's certificate is refused: ")
            assert words in problem.message
            is_strange = wrong in ("issuer", "itself")
            assert problem.hint == is_strange * "sslrootcert has to have the CA that signed it."
        else:
            async with opened(dsn) as server:
                assert await encryption(server) == NEWEST


async def test_certificate_is_not_checked_without_a_root(tls_postgres):
    with tls_postgres.serving(self_signed("nobody")):
        async with opened(tls_postgres.dsn(sslmode="require")) as server:
            assert await encryption(server) == NEWEST


async def test_certificate_is_checked_through_the_authorities_between(tls_postgres, verified):
    between = tls_postgres.authority.intermediate("between")
    with tls_postgres.serving(between.issue("localhost")):
        async with opened(verified) as server:
            assert await encryption(server) == NEWEST


async def test_system_certificates_are_the_systems(tls_postgres, monkeypatch):
    """OpenSSL looks where SSL_CERT_FILE says, if anywhere."""
    dsn = tls_postgres.dsn(host="localhost", sslrootcert="system")
    assert "certificate is refused" in await tls_failure(dsn)
    monkeypatch.setenv("SSL_CERT_FILE", str(tls_postgres.root))
    # the context of before is of before: files of the system are not watched
    monkeypatch.setattr(tls, "_contexts", {})
    async with opened(dsn) as server:
        assert await encryption(server) == NEWEST


async def test_revoked_certificate_is_refused(tls_postgres, verified):
    revoked = tls_postgres.authority.issue("localhost")
    crl = tls_postgres.folder / "crl.pem"
    crl.write_bytes(tls_postgres.authority.revocations(revoked))
    dsn = f"{verified}&sslcrl={crl}"
    async with opened(dsn) as server:
        assert await encryption(server) == NEWEST
    with tls_postgres.serving(revoked):
        assert "certificate revoked" in await tls_failure(dsn)


async def test_root_that_was_replaced_holds_for_the_next_connection(tls_postgres, tmp_path):
    root = tmp_path / "root.crt"
    root.write_bytes(tls_postgres.root.read_bytes())
    dsn = tls_postgres.dsn(host="localhost", sslmode="verify-full", sslrootcert=str(root))
    async with opened(dsn) as server:
        assert await encryption(server) == NEWEST
    other = Authority("the next one")
    with tls_postgres.serving(other.issue("localhost")):
        assert "certificate is refused" in await tls_failure(dsn)
        fresh = tmp_path / "fresh"
        fresh.write_bytes(other.pem)
        fresh.rename(root)  # as Kubernetes replaces a mounted secret
        async with opened(dsn) as server:
            assert await encryption(server) == NEWEST
        root.unlink()
        assert await tls_failure(dsn) == f"cannot read {root}: No such file or directory"
        root.write_text("nonsense")
        assert f"cannot load CA certificates from {root}" in await tls_failure(dsn)


# -- certificates of ours --------------------------------------------------------------------------


def with_certificate(server: TlsPostgres, files: tuple[Path, Path], **options: str) -> str:
    return server.dsn(
        password="", sslmode="require", sslcert=str(files[0]), sslkey=str(files[1]), **options
    )


@pytest.mark.parametrize("user", ["certain", "mapped"])
async def test_certificate_logs_in_without_a_password(tls_postgres, user):
    name = "mapped@example.com" if user == "mapped" else user
    dsn = with_certificate(tls_postgres, tls_postgres.client_certificate(name), user=user)
    async with opened(dsn) as server:
        assert await ask(server, "select current_user") == [[user]]


async def test_certificate_of_another_user_is_refused_by_the_server(tls_postgres):
    files = tls_postgres.client_certificate("somebody")
    problem = await refused(with_certificate(tls_postgres, files, user="certain"), ServerError)
    assert isinstance(problem, ServerError)
    assert problem.sqlstate == "28000"
    assert health.is_permanent(problem)


async def test_missing_certificate_is_told_by_the_server(tls_postgres):
    problem = await refused(tls_postgres.dsn(user="certain", sslmode="require"), ServerError)
    assert "connection requires a valid client certificate" in str(problem)


@pytest.mark.parametrize("version", ["TLSv1.2", "TLSv1.3"])
async def test_certificate_that_the_server_does_not_trust_is_told(tls_postgres, tmp_path, version):
    """With TLS 1.3 the server says so after our side of the handshake is over."""
    files = Authority("x").issue(common_name="certain", for_client=True).write(tmp_path, "c")
    dsn = with_certificate(tls_postgres, files, user="certain", ssl_max_protocol_version=version)
    assert await tls_failure(dsn) in (
        "TLS with the server failed: alert unknown ca",
        "the server closed the connection when it had seen our certificate",  # its alert is lost
    )


async def test_key_with_a_password_needs_it(tls_postgres, tmp_path):
    made = tls_postgres.authority.issue(common_name="certain", for_client=True)
    files = made.write(tmp_path, "c", password="open sesame")
    dsn = with_certificate(tls_postgres, files, user="certain")
    assert "cannot load the certificate" in await tls_failure(dsn)
    assert "cannot load the certificate" in await tls_failure(f"{dsn}&sslpassword=guess")
    async with opened(f"{dsn}&sslpassword=open%20sesame") as server:
        assert await encryption(server) == NEWEST


async def test_key_that_others_can_read_is_refused(tls_postgres, tmp_path):
    files = tls_postgres.authority.issue(common_name="certain", for_client=True).write(
        tmp_path, "c"
    )
    files[1].chmod(0o644)
    dsn = with_certificate(tls_postgres, files, user="certain")
    assert await tls_failure(dsn) == f"others have access to the private key {files[1]}"


async def test_certificate_that_was_replaced_is_used_for_the_next_connection(
    tls_postgres, tmp_path
):
    authority: Authority = tls_postgres.authority

    def write(name: str) -> tuple[Path, Path]:
        return authority.issue(common_name=name, for_client=True).write(tmp_path, "c")

    dsn = with_certificate(tls_postgres, write("somebody"), user="certain")
    await refused(dsn, ServerError)
    write("certain")
    async with opened(dsn) as server:
        assert await ask(server, "select current_user") == [["certain"]]


# -- channel binding -------------------------------------------------------------------------------


@pytest.mark.parametrize("digest", ["sha256", "sha384", "sha512"])
async def test_login_is_bound_to_the_connection(tls_postgres, digest):
    """PostgreSQL checks it: with another certificate's hash it says no."""
    with tls_postgres.serving(tls_postgres.authority.issue("localhost", digest=digest)):
        dsn = tls_postgres.dsn(sslmode="require", channel_binding="require")
        async with opened(dsn) as server:
            assert await encryption(server) == NEWEST


@pytest.mark.parametrize("key", ["ec", "rsa"])
async def test_login_is_bound_whatever_the_key(tls_postgres, key):
    with tls_postgres.serving(tls_postgres.authority.issue("localhost", key=key)):
        async with opened(tls_postgres.dsn(channel_binding="require")) as server:
            assert await encryption(server) == NEWEST


async def test_certificate_without_a_hash_is_bound_only_where_required(tls_postgres):
    """Ed25519 has no hash of its own, so RFC 5929 defines no binding. libpq fails in any case."""
    with tls_postgres.serving(Authority("ed", key="ed25519").issue("localhost")):
        async with opened(tls_postgres.dsn(sslmode="require")) as server:
            assert await encryption(server) == NEWEST
        dsn = tls_postgres.dsn(sslmode="require", channel_binding="require")
        assert "defines none" in str(await refused(dsn, ServerError))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sslmode": "disable"}, "channel binding is required, but the connection has no TLS"),
        (
            {"user": "trusted"},
            "channel binding is required, but the server wants no authentication",
        ),
        ({"user": "md5"}, "channel binding is required, but the server wants a password (md5)"),
        ({"user": "cleartext"}, "channel binding is required, but the server wants a password"),
    ],
)
async def test_required_binding_is_not_given_up(tls_postgres, options, words):
    dsn = tls_postgres.dsn(channel_binding="require", **options)
    problem = await refused(dsn, ServerError)
    assert words in str(problem)


@pytest.mark.parametrize(
    ("user", "allowed", "is_let_in"),
    [
        ("postgres", "scram-sha-256", True),
        ("postgres", "!scram-sha-256", False),
        ("md5", "md5", True),
        ("md5", "scram-sha-256", False),
        ("cleartext", "password", True),
        ("cleartext", "!password,!md5", False),
        ("trusted", "none", True),
        ("trusted", "scram-sha-256", False),
    ],
)
async def test_only_methods_that_are_allowed_are_answered(tls_postgres, user, allowed, is_let_in):
    dsn = tls_postgres.dsn(user=user, require_auth=allowed)
    if is_let_in:
        async with opened(dsn) as server:
            assert await ask(server, "select current_user") == [[user]]
    else:
        assert "require_auth rules out" in str(await refused(dsn, ServerError))


# -- who lies --------------------------------------------------------------------------------------


class Liar:
    """Answers the request for TLS with what it is told, on a thread; holds the connection open."""

    def __init__(self, *answers: bytes) -> None:
        self._answers = answers
        self.heard: list[bytes] = []
        self._connections: list[socket.socket] = []

    def __enter__(self) -> "Liar":
        self._socket = socket.create_server(("127.0.0.1", 0))
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        # now: what the other side has closed, it closes only when its event loop runs again
        for each in (self._socket, *self._connections):
            end(each)
        self._thread.join(5)
        self._socket.close()

    def dsn(self, **options: str) -> str:
        port = self._socket.getsockname()[1]
        query = "&".join(f"{key}={value}" for key, value in options.items())
        return f"postgresql://u:secret@127.0.0.1:{port}/d?{query}"

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            self._connections.append(connection)
            with connection:
                connection.settimeout(5)
                try:
                    self.heard.append(connection.recv(8))
                    for answer in self._answers:
                        connection.sendall(answer)
                    while data := connection.recv(65536):
                        self.heard.append(data)
                except OSError:
                    pass  # it was let go


GREETING = m.authentication(m.AUTH_OK) + m.message(m.READY_FOR_QUERY, b"I")


@pytest.mark.parametrize("mode", ["prefer", "require"])
@pytest.mark.parametrize("answers", [(b"S" + GREETING,), (b"S", GREETING), (b"N" + GREETING,)])
async def test_bytes_before_the_upgrade_are_refused(mode, answers):
    """CVE-2021-23222: put there by somebody in the middle, they would be taken for the server's."""
    with Liar(*answers) as liar:
        problem = await refused(liar.dsn(sslmode=mode), SidecarError)
        if answers == (b"S", GREETING):  # they may also come in the middle of the handshake
            assert isinstance(problem, ServerProtocolError | TlsFailed)
        else:
            assert isinstance(problem, ServerProtocolError)
            assert "received unencrypted data" in problem.message
            assert len(liar.heard) == 1  # the request, and no word after it


@pytest.mark.parametrize(
    ("answer", "kind", "words"),
    [
        (b"E", TlsFailed, "answered the request for TLS with an error"),
        (b"x", ServerProtocolError, "unexpected answer b'x' to the request for TLS"),
        (b"S\x16\x03", ServerProtocolError, "received unencrypted data"),
    ],
)
async def test_odd_answer_to_the_request_is_told(answer, kind, words):
    with Liar(answer) as liar:
        assert words in str(await refused(liar.dsn(sslmode="require"), kind))
        assert b"secret" not in b"".join(liar.heard)


async def test_silence_after_the_answer_ends_with_the_deadline():
    with Liar(b"S") as liar:
        await refused(liar.dsn(sslmode="require"), TimeoutError, within=0.3)


# -- in use ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_midway", [False, True])
async def test_backend_ends_when_its_connection_is_closed(verified, tls_postgres, is_midway):
    """Also one that waits for the rest of a message, to which nobody can say Terminate."""
    async with opened(verified) as server:
        pid = server.pid
        if is_midway:
            server.write(m.query(b"select 1")[:-3])
            server.mid_message = True
    look = f"select count(*) from pg_stat_activity where pid = {pid}"
    assert tls_postgres.psql(look) == "0"


async def test_cancel_request_is_encrypted(tls_postgres, verified):
    """Seen by who looks between: its key is as good for others."""
    with Tap(tls_postgres.port) as tap:
        dsn = verified.replace(f":{tls_postgres.port}/", f":{tap.port}/")
        async with opened(dsn) as server:
            server.receiver = reader = Reader()
            server.write(m.query(b"select pg_sleep(30)"))
            await cancel_query(server, clock() + PATIENCE)
            async with asyncio.timeout(PATIENCE):
                messages = await reader.messages
            server.receiver = None
            assert error(messages)["C"] == "57014"
            seen, secret = b"".join(tap.seen), server.secret
        assert secret not in seen
        assert seen.count(SSL_REQUEST) == 2


async def test_cancel_request_is_not_sent_in_the_clear_where_the_server_has_no_tls_any_more(
    tls_postgres,
):
    dsn = tls_postgres.dsn(sslmode="prefer")
    with Tap(tls_postgres.port) as tap:
        async with opened(dsn.replace(f":{tls_postgres.port}/", f":{tap.port}/")) as server:
            assert await encryption(server) == NEWEST
            no_more = pytest.raises(TlsFailed, match="the server has no TLS any more")
            with tls_postgres.configured(ssl="off"), no_more:
                await cancel_query(server, clock() + PATIENCE)
            assert server.secret not in b"".join(tap.seen)


async def test_pool_works_over_tls(verified, tls_postgres, make_service):
    sidecar = await make_service(
        f"{verified}&application_name=pool&channel_binding=require", max_size=2
    )
    one, other = await asyncpg.connect(sidecar.dsn()), await asyncpg.connect(sidecar.dsn())
    try:
        big = await one.fetchval("select repeat('x', 20000000)")
        assert big == "x" * 20_000_000
        assert await other.fetchval("select length($1)", big) == 20_000_000
        async with one.transaction():
            await one.execute("create temp table t (a int) on commit drop")
            await one.copy_records_to_table("t", records=[(n,) for n in range(10_000)])
            assert await one.fetchval("select sum(a) from t") == 49_995_000
        with pytest.raises(asyncpg.QueryCanceledError):
            async with asyncio.timeout(0.2):
                await one.execute("select pg_sleep(30)")
    except TimeoutError:
        pass  # asyncpg has cancelled it
    finally:
        await one.close()
        await other.close()
    await sidecar.until_whole()
    seen = await asyncio.to_thread(tls_postgres.encryption_of, "pool")
    assert set(seen) == {(True, NEWEST)}
    await sidecar.stop()
    assert tls_postgres.encryption_of("pool") == []


async def test_failure_of_tls_is_counted_as_one_and_told(tls_postgres, make_service):
    dsn = tls_postgres.dsn(
        host="localhost", sslmode="verify-full", sslrootcert=str(stranger(tls_postgres))
    )
    sidecar = await make_service(dsn, listen={"login_timeout": "500ms"})
    with pytest.raises(asyncpg.PostgresError) as caught:
        await asyncpg.connect(sidecar.dsn())
    assert caught.value.sqlstate == "08001"
    assert "the server's certificate is refused: " in str(caught.value)
    metrics = await sidecar.metrics()
    errors = metrics.above_zero("pgsidecar_connection_errors_total", "phase", "reason")
    assert errors.keys() == {("tls", "tls")}


async def test_pool_goes_on_through_a_rotation_of_certificates(
    tls_postgres, make_service, tmp_path
):
    """Root, server's certificate and client's certificate are replaced; nobody restarts anything."""
    server: TlsPostgres = tls_postgres
    root = tmp_path / "root.crt"
    root.write_bytes(server.authority.pem)
    key_pair = server.authority.issue(common_name="certain", for_client=True).write(tmp_path, "c")
    dsn = server.dsn(
        host="localhost",
        user="certain",
        password="",
        sslmode="verify-full",
        sslrootcert=str(root),
        sslcert=str(key_pair[0]),
        sslkey=str(key_pair[1]),
    )
    sidecar = await make_service(dsn, max_size=1, max_lifetime="200ms")
    client = await asyncpg.connect(sidecar.dsn())
    try:
        before = await client.fetchval(SERIAL)
        fresh = Authority("the next one")
        root.write_bytes(fresh.pem + server.authority.pem)
        server.authority.issue(common_name="certain", for_client=True).write(tmp_path, "c")
        with server.serving(fresh.issue("localhost")):
            async with asyncio.timeout(PATIENCE):
                while await client.fetchval(SERIAL) == before:
                    pass  # the connection is replaced when it is older than max_lifetime
    finally:
        await client.close()
    await sidecar.until_whole()


@pytest.mark.parametrize("mode", ["transaction", "session"])
async def test_direct_tls_is_spoken_from_the_first_byte_on(
    tls_postgres, make_service, tmp_path, mode
):
    """PostgreSQL 17 has it, and our own listener: a sidecar before a sidecar, with all that is checked."""
    certificate, key = tls_postgres.authority.issue("localhost").write(tmp_path, "server")
    listen = {
        "tls_cert_file": str(certificate),
        "tls_key_file": str(key),
        "tls_mode": "require",
        "auth": "scram-sha-256",
    }
    inner = await make_service(tls_postgres.dsn(), listen=listen)
    with Tap(inner.pg_port) as tap:
        outer = await make_service(
            f"postgresql://postgres:{tls_postgres.password}@localhost:{tap.port}/main"
            f"?sslmode=verify-full&sslrootcert={tls_postgres.root}"
            "&sslnegotiation=direct&channel_binding=require",
            mode=mode,
        )
        client = await asyncpg.connect(outer.dsn())
        assert await client.fetchval("select length(repeat('x', 5000000))") == 5_000_000
        await client.close()
        await outer.until_whole()
        await outer.stop()
        assert SSL_REQUEST not in b"".join(tap.seen)
        assert tap.seen[0][0] == 0x16, "a TLS handshake"


async def test_both_ways_are_bound_to_their_tls(tls_postgres, make_service, tmp_path):
    """libpq with channel_binding=require to the sidecar, the sidecar with it to PostgreSQL."""
    certificate, key = tls_postgres.authority.issue("localhost").write(tmp_path, "server")
    sidecar = await make_service(
        tls_postgres.dsn(
            host="localhost",
            sslmode="verify-full",
            sslrootcert=str(tls_postgres.root),
            channel_binding="require",
        ),
        listen={
            "auth": "scram-sha-256",
            "tls_cert_file": str(certificate),
            "tls_key_file": str(key),
        },
    )
    client = await psycopg.AsyncConnection.connect(
        host="localhost",
        port=sidecar.pg_port,
        user="postgres",
        password=tls_postgres.password,
        dbname="main",
        sslmode="verify-full",
        sslrootcert=str(tls_postgres.root),
        channel_binding="require",
        require_auth="scram-sha-256",
    )
    async with client:
        seen = await client.execute("select version from pg_stat_ssl where pid = pg_backend_pid()")
        assert await seen.fetchone() == (NEWEST,)


async def test_server_that_knows_no_direct_tls_is_told(tls_postgres):
    """PostgreSQL before 17 takes it for a startup packet that is far too long."""
    with Tap(tls_postgres.port) as tap:
        dsn = f"postgresql://u@127.0.0.1:{tap.port}/d?sslmode=require&sslnegotiation=direct"
        problem = await refused(dsn, TlsFailed)
        assert isinstance(problem, TlsFailed)
        assert "TLS" in problem.message
        assert problem.hint == "sslnegotiation=direct needs PostgreSQL 17 or newer."
