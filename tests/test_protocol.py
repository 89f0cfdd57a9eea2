"""The wire protocol without a wire: startup packets, messages, the steps of authentication."""

import hashlib
import struct

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sidecar.errors import AuthenticationFailed, ClientProtocolError, ServerProtocolError
from sidecar.protocol import messages as m
from sidecar.protocol import startup
from sidecar.protocol.authentication import (
    ClientExchange,
    ServerExchange,
    knows_password,
    make_verifier,
    md5_response,
    mock_verifier,
    parse_verifier,
)
from sidecar.protocol.startup import (
    CancelRequest,
    EncryptionRequest,
    StartupMessage,
    packet_length,
    parse_startup,
    split_options,
    startup_message,
)

steady = settings(deadline=None)  # on a busy machine any example may take long

WORDS = st.binary(min_size=1, max_size=20).filter(lambda word: 0 not in word)


def packet(code: int, rest: bytes = b"") -> bytes:
    return struct.pack("!II", len(rest) + 8, code) + rest


# -- startup packets ---------------------------------------------------------------------------


@pytest.mark.parametrize("length", [8, 9, 1000, startup.MAX_STARTUP_PACKET])
def test_length_of_a_startup_packet_is_taken(length):
    assert packet_length(struct.pack("!I", length)) == length


@pytest.mark.parametrize("head", [0, 1, 7, 10_001, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF])
def test_length_that_no_startup_packet_has_is_refused(head):
    with pytest.raises(ClientProtocolError, match="invalid length of startup packet") as caught:
        packet_length(struct.pack("!I", head))
    assert caught.value.sqlstate == "08P01"


@pytest.mark.parametrize("head", [b"GET ", b"POST", b"\x16\x03\x01\x02", b"SSH-", b"\0\0\0\0"])
def test_other_protocols_are_not_taken_for_a_client(head):
    with pytest.raises(ClientProtocolError):
        packet_length(head)


@pytest.mark.parametrize(("code", "is_tls"), [(80877103, True), (80877104, False)])
def test_encryption_requests_are_known(code, is_tls):
    assert parse_startup(packet(code)) == EncryptionRequest(is_tls)


@pytest.mark.parametrize("secret", [b"1234", b"x" * 32, b"y" * 256])
def test_cancel_request_is_read_with_a_secret_of_any_length(secret):
    data = startup.cancel_request(4711, secret)
    assert packet_length(data[:4]) == len(data)
    assert parse_startup(data) == CancelRequest(4711, secret)


@pytest.mark.parametrize("rest", [b"", b"\0\0\0\1", b"\0\0\0\1abc", b"\0\0\0\1" + b"x" * 257])
def test_cancel_request_of_a_wrong_length_is_refused(rest):
    with pytest.raises(ClientProtocolError, match="cancel request"):
        parse_startup(packet(80877102, rest))


@pytest.mark.parametrize(("major", "minor"), [(2, 0), (1, 0), (4, 0), (0, 0), (1234, 5000)])
def test_other_major_versions_are_refused(major, minor):
    with pytest.raises(ClientProtocolError, match=f"protocol {major}.{minor}") as caught:
        parse_startup(packet(major << 16 | minor, b"user\0x\0\0"))
    assert caught.value.sqlstate == "0A000"


@pytest.mark.parametrize("minor", [0, 2, 9999])
def test_minor_versions_are_told_apart(minor):
    found = parse_startup(packet(3 << 16 | minor, b"user\0x\0\0"))
    assert found == StartupMessage(minor, {b"user": b"x"}, ())


def test_options_of_the_protocol_are_kept_apart_from_settings():
    body = b"user\0x\0_pq_.some\0on\0application_name\0a\0_pq_.other\0\0\0"
    found = parse_startup(packet(3 << 16, body))
    assert isinstance(found, StartupMessage)
    assert found.parameters == {b"user": b"x", b"application_name": b"a"}
    assert found.unknown_options == (b"_pq_.some", b"_pq_.other")


@pytest.mark.parametrize(
    "body", [b"", b"user", b"user\0x", b"user\0x\0database\0\0\0\0x", b"user\0\0x\0y\0z\0\0"]
)
def test_parameters_without_end_or_value_are_refused(body):
    with pytest.raises(ClientProtocolError, match="layout"):
        parse_startup(packet(3 << 16, body))


@steady
@given(st.dictionaries(WORDS, WORDS, max_size=5))
def test_startup_message_is_read_as_it_was_written(parameters):
    data = startup_message(parameters)
    assert packet_length(data[:4]) == len(data)
    found = parse_startup(data)
    assert isinstance(found, StartupMessage)
    assert found.minor == 0
    assert found.parameters | dict.fromkeys(found.unknown_options, b"") == {
        name: b"" if name.startswith(b"_pq_.") else value for name, value in parameters.items()
    }


@steady
@given(st.binary(min_size=4, max_size=200), st.sampled_from([3 << 16, 80877102, 80877103, 1 << 16]))
def test_no_startup_packet_raises_anything_but_a_protocol_error(data, code):
    for candidate in (data, packet(code, data)):
        try:
            length = packet_length(candidate[:4])
            if length <= len(candidate):
                parse_startup(candidate[:length])
        except ClientProtocolError:
            pass  # what the client is told


# -- options -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "found"),
    [
        (b"", {}),
        (b"  ", {}),
        (b"-c a=b", {b"a": b"b"}),
        (b"-ca=b", {b"a": b"b"}),
        (b"--a=b", {b"a": b"b"}),
        (b"--search-path=a,b", {b"search_path": b"a,b"}),
        (b"-c search_path=my-schema", {b"search_path": b"my-schema"}),
        (b" -c  a=b\t--c=d\n", {b"a": b"b", b"c": b"d"}),
        (b"-c a=b -c a=c", {b"a": b"c"}),
        (b"-c a=", {b"a": b""}),
        (b"-c a=b=c", {b"a": b"b=c"}),
        (rb"-c a=x\ y", {b"a": b"x y"}),
        (rb"-c a=x\\y", {b"a": rb"x\y"}),
        (rb"-c a=\'x\'", {b"a": b"'x'"}),
    ],
)
def test_settings_in_options_are_found(options, found):
    assert split_options(options) == found


@pytest.mark.parametrize("options", [b"-c", b"-c a", b"--a", b"-B 10", b"x", b"-d5", b"-", b"-e"])
def test_options_that_are_no_settings_are_refused(options):
    with pytest.raises(ClientProtocolError):
        split_options(options)


@steady
@given(
    st.dictionaries(
        st.from_regex(rb"[a-z_][a-z_0-9.]*", fullmatch=True), st.binary(max_size=20), max_size=4
    )
)
def test_escaped_values_come_back(values):
    escaped = {
        name: b"".join(b"\\" + bytes([c]) if c in b" \t\n\r\v\f\\" else bytes([c]) for c in value)
        for name, value in values.items()
    }
    options = b" ".join(b"-c " + name + b"=" + value for name, value in escaped.items())
    assert split_options(options) == values


@steady
@given(st.binary(max_size=100))
def test_no_options_raise_anything_but_a_protocol_error(options):
    try:
        split_options(options)
    except ClientProtocolError:
        pass  # what the client is told


# -- messages ----------------------------------------------------------------------------------


def test_error_is_told_with_all_its_fields():
    data = m.error_response("FATAL", "53300", "no more", detail="25 in use", hint="wait")
    kind, length = m.HEADER.unpack_from(data)
    assert (kind, length) == (m.ERROR_RESPONSE, len(data) - 1)
    assert m.error_fields(data[5:]) == {
        "S": "FATAL",
        "V": "FATAL",
        "C": "53300",
        "M": "no more",
        "D": "25 in use",
        "H": "wait",
    }
    assert data.endswith(b"\0\0")


@steady
@given(st.text(max_size=50), st.text(max_size=50))
@example("a\0b", "\0")
@example("\ud800", "\udfff")
def test_no_text_breaks_an_error_apart(text, detail):
    data = m.error_response("ERROR", "XX000", text, detail=detail)
    assert m.HEADER.unpack_from(data) == (m.ERROR_RESPONSE, len(data) - 1)
    assert data.count(b"\0", 5) == 5 + bool(detail)  # one for each field, one for the end
    assert m.sqlstate_of(data[5:]) == "XX000"


@pytest.mark.parametrize(
    ("body", "sqlstate"),
    [
        (b"SERROR\0C42P01\0Mx\0\0", "42P01"),
        (b"C57014\0\0", "57014"),
        (b"SERROR\0Mno code\0\0", "XX000"),
        (b"SERROR\0C42\0\0", "XX000"),
        (b"SERROR\0C42P0\xff\0\0", "XX000"),
        (b"SERROR\0C42 01\0\0", "XX000"),
        (b"SERROR\0C42P0", "XX000"),
        (b"", "XX000"),
        (b"\0\0\0", "XX000"),
    ],
)
def test_sqlstate_is_five_letters_or_digits_whatever_the_server_says(body, sqlstate):
    assert m.sqlstate_of(body) == sqlstate


@steady
@given(st.binary(max_size=100))
def test_no_error_of_a_server_is_too_odd(body):
    m.error_fields(body)
    code = m.sqlstate_of(body)
    assert len(code) == 5
    assert code.isalnum()


def test_negotiation_names_what_is_not_known():
    data = m.negotiate_protocol_version(0, [b"_pq_.a", b"_pq_.b"])
    assert data == b"v" + struct.pack("!III", 26, 3 << 16, 2) + b"_pq_.a\0_pq_.b\0"


# -- passwords ---------------------------------------------------------------------------------

VERIFIER = make_verifier("secret", "me")
MALFORMED = [
    *(b"", b"n,,", b"n,,r=abc", b"p=tls-server-end-point,,n=,r=abc", b"x,,n=,r=abc"),
    *(b"n,,n=,r=a,m=1", b"n,a=b,n=,r=abc" * 2, b"\xff\xfe", b"n" * 1000, b"n,,n=,r=\xc3\xa9,r=x"),
]


def test_password_proves_both_sides():
    client, server = ClientExchange("secret"), ServerExchange(VERIFIER)
    challenge = server.first(client.begin())
    client.verify(server.final(client.respond(challenge)))
    assert client.is_verified


def test_wrong_password_proves_nothing():
    client, server = ClientExchange("guess"), ServerExchange(VERIFIER)
    proof = client.respond(server.first(client.begin()))
    with pytest.raises(AuthenticationFailed) as caught:
        server.final(proof)
    assert caught.value.sqlstate == "28P01"
    assert not client.is_verified


def test_stranger_cannot_tell_who_exists():
    """Same fields, same rounds; and the same salt each time, as for somebody who exists."""

    def challenge(user: str) -> dict[str, str]:
        text = ServerExchange(mock_verifier(user)).first(ClientExchange("x").begin()).decode()
        return dict(part.split("=", 1) for part in text.split(","))

    real = ServerExchange(VERIFIER).first(ClientExchange("x").begin()).decode()
    first, again = challenge("ghost"), challenge("ghost")
    assert first["s"] == again["s"] != challenge("other")["s"]
    assert f"i={first['i']}" in real
    assert len(first["s"]) == len(real.split("s=")[1].split(",i=")[0])


def test_verifier_of_postgresql_is_read():
    """Example of a real one: password ``pencil``, with salt and keys of RFC 7677, 3."""
    verifier = parse_verifier(
        "SCRAM-SHA-256$4096:W22ZaJ0SNY7soEsUEjb6gQ==$"
        "WG5d8oPm3OtcPnkdi4Uo7BkeZkBFzpcXkuLmtbsT4qY=:wfPLwcE6nTWhTAmQ7tl2KeoiWGPlZqQxSrmfPwDl2dU="
    )
    assert verifier.iterations == 4096
    assert knows_password(verifier, "pencil")
    assert not knows_password(verifier, "Pencil")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "md5" + "0" * 32,
        "password",
        "SCRAM-SHA-1$4096:QUJD$" + "A" * 43 + "=:" + "A" * 43 + "=",
        "SCRAM-SHA-256$4096:QUJD$AAAA:AAAA",
        "SCRAM-SHA-256$4096:QUJD$" + "A" * 43 + "=",
        "SCRAM-SHA-256$0:QUJD$" + "A" * 43 + "=:" + "A" * 43 + "=",
        "SCRAM-SHA-256$999999999:QUJD$" + "A" * 43 + "=:" + "A" * 43 + "=",
        "SCRAM-SHA-256$4096:Q!JD$" + "A" * 43 + "=:" + "A" * 43 + "=",
    ],
)
def test_what_is_no_verifier_is_refused_and_not_quoted(text):
    with pytest.raises(ValueError, match=r"\Ais not a SCRAM-SHA-256 verifier\Z"):
        parse_verifier(text)


def test_nobody_can_be_the_stranger():
    client, server = ClientExchange("secret"), ServerExchange(mock_verifier("ghost"))
    proof = client.respond(server.first(client.begin()))
    with pytest.raises(AuthenticationFailed):
        server.final(proof)


@pytest.mark.parametrize("data", MALFORMED)
def test_malformed_first_message_of_a_client_is_refused(data):
    with pytest.raises(AuthenticationFailed) as caught:
        ServerExchange(VERIFIER).first(data)
    assert caught.value.sqlstate == "08P01"


@pytest.mark.parametrize(
    "change",
    [
        lambda proof: b"",
        lambda proof: proof.replace(b"c=biws", b"c=eSws"),
        lambda proof: proof.replace(b",r=", b",r=x"),
        lambda proof: proof.rpartition(b"p=")[0] + b"p=AAAA",
        lambda proof: proof.rpartition(b"p=")[0] + "p=é".encode(),
        lambda proof: proof + b",m=1",
        lambda proof: b"\xff" + proof,
    ],
)
def test_changed_proof_is_refused(change):
    client, server = ClientExchange("secret"), ServerExchange(VERIFIER)
    proof = client.respond(server.first(client.begin()))
    with pytest.raises(AuthenticationFailed):
        server.final(change(proof))


@pytest.mark.parametrize("rounds", ["0", "-1", "99999999999999999999", "x", ""])
def test_server_that_asks_for_odd_rounds_is_refused(rounds):
    client = ClientExchange("secret")
    nonce = client.begin().decode().partition("r=")[2]
    with pytest.raises(ServerProtocolError):
        client.respond(f"r={nonce}abc,s=c2FsdA==,i={rounds}".encode())


@pytest.mark.parametrize(
    "final", [b"", b"v=", b"v=AAAA", "v=é".encode(), b"e=other-error", b"\xff", b"v=\0"]
)
def test_server_that_does_not_know_us_is_refused(final):
    """``v=é`` made a TypeError of it, which nobody expected: the whole sidecar ended."""
    client, server = ClientExchange("secret"), ServerExchange(VERIFIER)
    client.respond(server.first(client.begin()))
    with pytest.raises(ServerProtocolError):
        client.verify(final)
    assert not client.is_verified


@steady
@given(st.data())
def test_no_message_raises_anything_but_our_errors(data):
    def changed(message: bytes) -> bytes:
        at = data.draw(st.integers(0, len(message)))
        end = data.draw(st.integers(at, min(len(message), at + 4)))
        return bytes(message[:at] + data.draw(st.binary(max_size=4)) + message[end:])

    server = ServerExchange(VERIFIER)
    try:
        server.first(changed(b"n,,n=,r=abcdefghij"))
        server.final(changed(b"c=biws,r=abcdefghij,p=AAAA"))
    except AuthenticationFailed:
        pass  # what the client is told


def test_md5_response_is_the_manuals():
    """54.2.1: concat('md5', md5(concat(md5(concat(password, username)), random-salt)))."""
    inner = hashlib.md5(b"secret" + b"me").hexdigest()
    outer = hashlib.md5(inner.encode() + b"\1\2\3\4").hexdigest()
    assert md5_response("me", "secret", b"\1\2\3\4") == f"md5{outer}".encode() + b"\0"
