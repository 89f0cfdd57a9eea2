"""SCRAM towards servers: bound to TLS or not, with a password or with the keys that a client gave away."""

import base64
import hashlib
from collections.abc import Iterator

import pytest

from sidecar.demo.postgres import EmbeddedPostgres
from sidecar.errors import AuthenticationFailed, ServerError, ServerProtocolError
from sidecar.protocol import messages as m
from sidecar.protocol.authentication import (
    ClientExchange,
    ScramKeys,
    ScramVerifier,
    ServerExchange,
    choose_exchange,
    derive_keys,
    make_verifier,
)
from tests.copied_postgres import CopiedPostgres
from tests.wire import Client, startup

OFFERED = (b"SCRAM-SHA-256-PLUS", b"SCRAM-SHA-256", b"")
HASH = hashlib.sha256(b"a certificate").digest()


@pytest.fixture(scope="module")
def guarded() -> Iterator[EmbeddedPostgres]:
    """PostgreSQL that asks for SCRAM."""
    with CopiedPostgres(16, auth="scram-sha-256", password="secret") as server:
        yield server


def log_in(server: EmbeddedPostgres, user: str, secret: str | ScramKeys) -> str:
    """Log in to PostgreSQL; the SQLSTATE of its refusal, or empty."""
    exchange = ClientExchange(secret)
    with Client((server.host, server.port)) as client:
        client.send(startup({"user": user, "database": "postgres"}))
        client.receive()
        mechanism = exchange.mechanism.encode()
        client.send(m.sasl_initial_response(mechanism, exchange.begin()))
        client.send(m.password(exchange.respond(client.receive().body[4:])))
        answer = client.receive()
        if answer.kind == "E":
            return answer.fields["C"]
        exchange.verify(answer.body[4:])
        assert [client.receive().body[:4]] == [m.AUTH_OK.to_bytes(4, "big")]
    return ""


def verifier_in(server: EmbeddedPostgres, user: str) -> ScramVerifier:
    """As PostgreSQL keeps it: SCRAM-SHA-256$4096:salt$StoredKey:ServerKey."""
    text = server.psql(f"select rolpassword from pg_authid where rolname = '{user}'")
    _, parameters, keys = text.split("$")
    iterations, salt = parameters.split(":")
    stored_key, server_key = map(base64.b64decode, keys.split(":"))
    return ScramVerifier(base64.b64decode(salt), stored_key, server_key, int(iterations))


def test_keys_of_a_clients_own_login_open_the_server(guarded):
    """Pass-through: we know the verifier only, the client proves its password, and we are in as it."""
    verifier = verifier_in(guarded, "postgres")
    client, server = ClientExchange("secret"), ServerExchange(verifier)
    challenge = server.first(client.begin())
    client.verify(server.final(client.respond(challenge)))
    assert server.keys == derive_keys("secret", verifier.salt, verifier.iterations)
    assert log_in(guarded, "postgres", server.keys) == ""


def test_keys_of_another_password_do_not_open_the_server(guarded):
    keys = derive_keys("guess", verifier_in(guarded, "postgres").salt, 4096)
    assert log_in(guarded, "postgres", keys) == "28P01"


def test_failed_login_gives_no_keys():
    client, server = ClientExchange("guess"), ServerExchange(make_verifier("secret", "me"))
    with pytest.raises(AuthenticationFailed):
        server.final(client.respond(server.first(client.begin())))
    assert server.keys is None


@pytest.mark.parametrize(
    "password",
    [
        "secret",
        "pass word\t",
        "pässwörd",
        "\N{LATIN SMALL LIGATURE FI}\N{NO-BREAK SPACE}x",  # SASLprep makes "fi x" of it
        "\N{SOFT HYPHEN}x",
        "é\x07",  # SASLprep prohibits it, PostgreSQL takes it as it is
        "a,b=c",
    ],
)
def test_password_is_prepared_as_by_postgresql(guarded, password):
    quoted = password.replace("'", "''")
    guarded.psql(f"drop role if exists someone; create role someone login password '{quoted}'")
    assert log_in(guarded, "someone", password) == ""
    assert log_in(guarded, "someone", password + "x") == "28P01"
    client, server = ClientExchange(password), ServerExchange(verifier_in(guarded, "someone"))
    client.verify(server.final(client.respond(server.first(client.begin()))))


def test_few_iterations_are_taken_as_libpq_takes_them(guarded):
    """PostgreSQL 16 allows them to save time: scram_iterations."""
    guarded.psql(
        "drop role if exists hasty; set scram_iterations = 1; create role hasty login password 'x'"
    )
    assert log_in(guarded, "hasty", "x") == ""


def test_keys_are_not_shown():
    keys = derive_keys("secret", b"salt", 1)
    assert "client_key" not in repr(keys)
    assert repr(keys.client_key) not in repr(ServerExchange(make_verifier("x", "me")))


# -- channel binding -------------------------------------------------------------------------------


def chosen(
    offered: tuple[bytes, ...] = OFFERED,
    channel_binding: str = "prefer",
    is_encrypted: bool = True,
    end_point: bytes | None = HASH,
) -> tuple[str, bytes]:
    """Mechanism and GS2 flag."""
    exchange = choose_exchange(
        "secret",
        offered,
        channel_binding=channel_binding,
        is_encrypted=is_encrypted,
        end_point=end_point,
    )
    return exchange.mechanism, exchange.begin().split(b",")[0]


_PLUS = ("SCRAM-SHA-256-PLUS", b"p=tls-server-end-point")


def test_exchange_is_bound_to_tls_where_both_can():
    assert chosen() == chosen(channel_binding="require") == _PLUS


def test_exchange_is_not_bound_where_we_must_not():
    assert chosen(channel_binding="disable") == ("SCRAM-SHA-256", b"n")
    assert chosen((b"SCRAM-SHA-256",), is_encrypted=False, end_point=None) == (
        "SCRAM-SHA-256",
        b"n",
    )
    assert chosen(end_point=None) == ("SCRAM-SHA-256", b"n")  # Ed25519


def test_server_is_told_that_we_would_have_bound():
    """So it notices where somebody between us has removed its offer."""
    assert chosen((b"SCRAM-SHA-256",)) == ("SCRAM-SHA-256", b"y")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"offered": (b"SCRAM-SHA-256",)}, "the server offers none"),
        ({"offered": (b"SCRAM-SHA-256",), "is_encrypted": False}, "the connection has no TLS"),
        ({"end_point": None}, "has a signature that defines none"),
    ],
)
def test_required_binding_is_not_left_out(options, words):
    with pytest.raises(ServerError, match=words) as caught:
        chosen(channel_binding="require", **options)
    assert caught.value.sqlstate == "28000"


def test_offer_of_binding_without_tls_is_refused():
    with pytest.raises(ServerProtocolError, match="without TLS"):
        chosen(is_encrypted=False, end_point=None)


def test_mechanism_that_we_do_not_have_is_named():
    with pytest.raises(ServerError, match=r"no SASL mechanism that we have \(OAUTHBEARER\)"):
        chosen((b"OAUTHBEARER", b""))


@pytest.mark.parametrize(
    "challenge",
    [
        b"r=NONCE,s=c2FsdA==,i=4096,x=1",
        b"m=1,r=NONCE,s=c2FsdA==,i=4096",
        b"s=c2FsdA==,r=NONCE,i=4096",
        b"r=other,s=c2FsdA==,i=4096",
        b"r=NONCE,s=not base64,i=4096",
        b"r=NONCE,s=c2FsdA==",
        b"\xff",
        b"",
    ],
)
def test_malformed_challenge_of_a_server_is_refused(challenge):
    client = ClientExchange("secret")
    nonce = client.begin().partition(b"r=")[2]
    with pytest.raises(ServerProtocolError, match="malformed SCRAM message"):
        client.respond(challenge.replace(b"NONCE", nonce))


def test_proof_of_a_server_before_the_question_is_none():
    """An empty signature must not pass for one that is right."""
    client = ClientExchange("secret")
    with pytest.raises(ServerProtocolError):
        client.verify(b"v=")
    assert not client.is_verified
